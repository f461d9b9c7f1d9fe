"""What an input is worth to a model that was trained for it: a logistic regression on that input alone.

A trained network that is asked without a photograph meets an input that it may never have seen, and can do worse than
the input
deserves. The regression tells the two apart.
"""

# also: What probes reach: values, differences and the share of a lead over chance, all from the same resamples of
# patients.
# also: How much of the score is shortcut? One trained run, asked about its test side with parts of the input taken away
# or exchanged.
# also: What the probes say, for people: printed tables and plain sentences.
# also: The picture of the probes: what a model reaches with each part of its input.

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dualrefnet.analysis.availability import ALL_FIELDS, NO_FIELDS, WITH_IMAGE, WITHOUT_IMAGE, MissingMetadata
from dualrefnet.analysis.opened_run import OpenedRun, sample_rows
from dualrefnet.analysis.perturbations import (
    Floats,
    Forms,
    Predictions,
    count_flags,
    find_missing,
    hide_flags,
    permute_across_groups,
    predict_perturbed,
    predict_with_metadata,
    predict_without_image,
    read_outlines,
    replace_values,
    without_fields,
)
from dualrefnet.data.loader import Examples
from dualrefnet.display.figure import FAINT, INK, PAPER, PRIMARY, SECONDARY, ReportFigure, new_figure, styled
from dualrefnet.display.format import MEASURE_NAMES, Cell, PrintedTable
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import percentile_interval
from dualrefnet.evaluation.comparison import PooledBootstrap, pooled_bootstrap
from dualrefnet.progress import progress_bar

# More than enough for standardised columns; a fit that needs more has converged for all that counts here.
ITERATIONS = 2000


def fit_baseline(
    train: NDArray[np.float32], labels: NDArray[np.int64], test: NDArray[np.float32], classes: int
) -> Floats:
    """Fit a logistic regression, classes balanced and columns standardised, and return its probabilities.

    Args:
        train: (N, D) of the training side.
        labels: (N,) class indices.
        test: (T, D).
        classes: C.

    Returns:
        (T, C), 0 for a class without a training row.
    """
    fitted = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=ITERATIONS)).fit(
        train.astype(np.float64), labels
    )
    result = np.zeros((len(test), classes))
    result[:, fitted.classes_] = fitted.predict_proba(test.astype(np.float64))
    return result


def with_missing_indicators(train: Forms, test: Forms) -> tuple[Forms, Forms]:
    """Return encoded forms without NaN: 0 in its place, and a further column for each that has one, which tells where."""
    gappy = np.isnan(train).any(axis=0) | np.isnan(test).any(axis=0)
    filled = [
        np.concatenate([np.nan_to_num(forms), np.isnan(forms[:, gappy]).astype(np.float32)], axis=1)
        for forms in (train, test)
    ]
    return filled[0], filled[1]


MEASURES = ("balanced_accuracy", "auc_macro_ovr", "malignant.auc")


LEVEL = 0.95


def measure_probes(
    opened: OpenedRun,
    labels: NDArray[np.int64],
    groups: NDArray[np.object_],
    answers: Mapping[str, Sequence[Floats]],
    whole: str,
    samples: int,
    seed: int,
) -> pd.DataFrame:
    """Measure every probe, and set it beside the whole.

    Args:
        opened: the run that was asked.
        labels: (N,) class indices.
        groups: (N,) patients.
        answers: probe -> one (N, C) array of probabilities a repeat; the value is the mean over repeats.
        whole: the probe that others are compared with.
        samples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        One row a probe and measure; see `Shortcuts.table`.

    Raises:
        ValueError: see `pooled_bootstrap`.
    """
    with progress_bar("intervals") as show:
        bootstrap = pooled_bootstrap(
            labels, answers, groups, opened.classes, samples, seed, LEVEL, opened.dataset.schema.malignant, show
        )
    # A resample without any image of a class is one of fewer classes.
    present = np.sum(
        [~np.isnan(bootstrap.drawn[whole][f"per_class.{name}.sensitivity"]) for name in opened.classes], axis=0
    )
    rows = []
    for name, repeats in answers.items():
        for measure in MEASURES:
            if measure not in bootstrap.points[name]:
                continue
            balanced = measure == "balanced_accuracy"
            chance = 1 / len(np.unique(labels)) if balanced else 0.5
            value, difference = bootstrap.value(name, measure), bootstrap.difference(name, whole, measure)
            lead = _lead(
                bootstrap, name, whole, measure, chance, 1 / present if balanced else np.full(len(present), 0.5)
            )
            rows.append(
                {
                    **{"probe": name, "compared_with": whole, "measure": measure, "chance": chance},
                    **{"value": value.value, "low": value.low, "high": value.high, "difference": difference.value},
                    **{"difference_low": difference.low, "difference_high": difference.high},
                    **dict(zip(("lead", "lead_low", "lead_high"), lead, strict=True)),
                    **{"images": bootstrap.images, "patients": bootstrap.groups, "repeats": len(repeats)},
                }
            )
    return pd.DataFrame(rows)


def _lead(
    bootstrap: PooledBootstrap, name: str, whole: str, measure: str, chance: float, drawn_chance: Floats
) -> tuple[float, float, float]:
    """Return the share of the whole's lead over chance that a probe keeps, with its interval; NaN if there may be no
    lead.
    """
    over = bootstrap.drawn[whole][measure] - drawn_chance
    interval = percentile_interval(over, LEVEL)
    if interval is None or interval[0] <= 0:
        return np.nan, np.nan, np.nan
    share = (bootstrap.points[name][measure] - chance) / (bootstrap.points[whole][measure] - chance)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.where(over > 0, (bootstrap.drawn[name][measure] - drawn_chance) / over, np.nan)
    low, high = percentile_interval(drawn, LEVEL) or (np.nan, np.nan)
    return share, low, high


FULL, FULL_OUTLINED = "whole", "whole_outlined"


# Probe -> what the model is given, and what was trained for that input. `{unit}` is a patient, or a lesion.
PROBES = {
    FULL: ("everything, as it is", ""),
    "no_photograph": ("form, no photograph", "trained_form"),
    "other_photographs": ("form, photographs of other {unit}s", "trained_form"),
    "no_form": ("photograph, no answers", "trained_photograph"),
    "other_forms": ("photograph, forms of other {unit}s", "trained_photograph"),
    "gaps": ("only which answers are missing", "trained_gaps"),
    "photograph_and_gaps": ("photograph, and which answers are missing", ""),
    "flags_hidden": ("everything, flags say nothing is missing", ""),
    FULL_OUTLINED: ("everything, photographs with an outline", ""),
    "lesion_blurred": ("everything, lesion blurred away", ""),
    "background_only": ("everything, lesion filled with skin colour", ""),
    "lesion_only": ("everything, all but the lesion filled", ""),
    "background_alone": ("photograph with the lesion filled, forms of other {unit}s", ""),
    "lesion_alone": ("photograph with all but the lesion filled, forms of other {unit}s", ""),
}


# A change of the picture, asked with forms of others -> probe.
ALONE = {"background_only": "background_alone", "lesion_only": "lesion_alone"}


BASELINES = {
    "trained_form": "regression on the form",
    "trained_photograph": "regression on what the encoder sees",
    "trained_gaps": "regression on which answers are missing",
}


@dataclass(frozen=True)
class Shortcuts:
    """What a run's score leans on.

    Attributes:
        table: one row a probe and measure: probe, input (in words), trained (True for the references trained for that
            input),
            trained_probe (their name), compared_with; measure, chance, value, low, high; difference, difference_low,
            difference_high
            from `compared_with` on the same images and resamples; lead, lead_low, lead_high, the share of its lead over
            chance that
            is left (NaN where that has no lead that can be told from none); images, patients, repeats (of which the
            value is the mean).
        remarks: what was left out and what must be known, one sentence each.
        title: the method.
        unit: what was resampled and exchanged, `patient` or `lesion`.
        permutations: exchanges of which the mean is taken.
        train_images: photographs of the training side that the regression on vectors was fitted on.
        samples: of the bootstrap.
        seed: of exchanges and bootstrap.
    """

    table: pd.DataFrame
    remarks: tuple[str, ...]
    title: str
    unit: str
    permutations: int
    train_images: int
    samples: int
    seed: int


def probe_shortcuts(
    opened: OpenedRun,
    masks: Path | None = None,
    permutations: int = 10,
    samples: int = 1000,
    seed: int = 0,
    train_images: int = 2000,
) -> Shortcuts:
    """Ask a trained run about its test side with changed inputs.

    Args:
        opened: the run.
        masks: folder of outlines `<image id>.png`; None: `masks` in the data set's folder, if it is there.
        permutations: how often inputs are exchanged between patients; the mean is reported.
        samples: bootstrap samples, drawn over patients.
        seed: of exchanges, choice of training images and bootstrap.
        train_images: at most so many photographs of the training side are read, each class in proportion.

    Raises:
        ValueError: `permutations` or `samples` is below 1, `train_images` is below the number of classes.
        DataError: `masks` isn't there or has none of the test images.
        ImageError: a mask can't be read.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, not {permutations}")
    probe = _Probe(opened, opened.pictures("test"), seed, permutations)
    masked = opened.masks(masks) if opened.model.reads_image else {}
    asked = probe.ask_forms()
    read = probe.train_references(asked, train_images)
    labels = probe.examples.labels
    measured = [measure_probes(opened, labels, probe.groups, probe.answers, FULL, samples, seed)]
    if opened.model.reads_image:
        places, changed = probe.ask_outlined(masked)
        if changed:
            measured.append(
                measure_probes(opened, labels[places], probe.groups[places], changed, FULL_OUTLINED, samples, seed)
            )
    unit = opened.dataset.schema.unit
    table = pd.concat(measured, ignore_index=True)
    table.insert(
        1,
        "input",
        [PROBES[name][0].format(unit=unit) if name in PROBES else BASELINES[name] for name in table["probe"]],
    )
    table.insert(2, "trained", table["probe"].isin(list(BASELINES)))
    references = [PROBES[name][1] if name in PROBES else "" for name in table["probe"]]
    if not (opened.model.reads_image and opened.reads_metadata):
        # What the run reads alone is its whole input.
        own = "trained_photograph" if opened.model.reads_image else "trained_form"
        references = [own if probe == FULL else name for probe, name in zip(table["probe"], references, strict=True)]
    table.insert(3, "trained_probe", [name if name in probe.answers else "" for name in references])
    return Shortcuts(table, tuple(probe.remarks), opened.model.title, unit, permutations, read, samples, seed)


class _Probe:
    """Asks a run, and gathers answers and remarks.

    Attributes:
        examples: the test side, with its pictures.
        groups: (N,) patients.
        answers: probe -> one (N, C) array of probabilities a repeat.
        remarks: what was left out.
    """

    def __init__(self, opened: OpenedRun, examples: Examples, seed: int, permutations: int) -> None:
        self.opened, self.examples, self.permutations, self.seed = opened, examples, permutations, seed
        self.rows = opened.rows("test")
        self.groups = opened.groups.loc[list(examples.image_ids)].to_numpy(dtype=object)
        self.answers: dict[str, list[Floats]] = {}
        self.remarks: list[str] = []
        self.gappy = False

    def ask_forms(self) -> Predictions:
        """Ask with the photographs as they are, and without: with forms that are whole, changed, exchanged or empty."""
        opened, own = self.opened, self.examples.metadata
        both = opened.model.reads_image and opened.reads_metadata
        beside: dict[str, list[Forms]] = {FULL: [own]}
        alone: dict[str, list[Forms]] = {}
        given: list[NDArray[np.int64]] = []
        if both:
            given = self._exchanges(self.groups, 1)
            beside |= {"other_forms": [own[order] for order in given], "no_form": [self._empty()]}
            alone["no_photograph"] = [own]
        elif opened.model.reads_image:
            self.remarks.append("the run reads no form: probes of the form were left out")
        else:
            self.remarks.append("the run reads no photograph: probes of the photograph were left out")
        if opened.reads_metadata:
            self._add_gaps(beside, alone)
        with progress_bar("asking with changed forms") as show:
            asked = predict_with_metadata(
                opened, self.examples, [form for forms in beside.values() for form in forms], show
            )
        remaining = iter(asked.answers)
        found = {name: [next(remaining) for _ in forms] for name, forms in beside.items()}
        # The photograph of one beside the form of another is a question about either of the two.
        found["other_photographs"] = [
            _placed(answer, order) for answer, order in zip(found.get("other_forms", []), given, strict=True)
        ]
        for name, forms in alone.items():
            found[name] = predict_without_image(opened, forms) if opened.model.reads_image else found[name]
        self.answers |= {name: found[name] for name in PROBES if found.get(name)}
        return asked

    def ask_outlined(self, masks: dict[str, Path]) -> tuple[NDArray[np.int64], dict[str, list[Floats]]]:
        """Ask with pictures from which the lesion, or all but the lesion, was taken.

        Returns:
            The places (P,) of the examples that have an outline, and their answers by probe; none if there are too few.
        """
        outlines = read_outlines(self.opened, self.examples, masks)
        places = outlines.places
        if outlines.left_out:
            self.remarks.append(f"{outlines.left_out} outlines mark nothing, or the whole picture, and were left out")
        if len(np.unique(self.groups[places])) < 2:
            self.remarks.append(
                "there are no outlines of lesions, so the lesion could not be taken out of the photographs"
            )
            return places, {}
        own = self.examples.metadata[places]
        others = self._exchanges(self.groups[places], 3) if self.opened.reads_metadata else []
        with progress_bar("pictures without the lesion") as show:
            changed = predict_perturbed(
                self.opened, self.examples, outlines, [own, *(own[order] for order in others)], show
            )
        answers = {FULL_OUTLINED: [self.answers[FULL][0][places]]} | {
            name: found[:1] for name, found in changed.items()
        }
        if others:
            answers |= {ALONE[name]: found[1:] for name, found in changed.items() if name in ALONE}
        return places, answers

    def train_references(self, asked: Predictions, train_images: int) -> int:
        """Fit the regressions on the training side, and return how many photographs were read for that."""
        opened, train = self.opened, self.opened.pictures("train")
        classes, read = len(opened.classes), 0
        if opened.reads_metadata:
            forms = with_missing_indicators(train.metadata, self.examples.metadata)
            self.answers["trained_form"] = [fit_baseline(forms[0], train.labels, forms[1], classes)]
        if self.gappy:
            gaps = [
                np.concatenate(find_missing(opened.rows(side), opened.metadata), axis=1).astype(np.float32)
                for side in ("train", "test")
            ]
            self.answers["trained_gaps"] = [fit_baseline(gaps[0], train.labels, gaps[1], classes)]
        if opened.model.reads_image:
            places = sample_rows(train.labels, train_images, self.seed)
            with progress_bar("photographs of the training side") as show:
                vectors = opened.vectors(train, places, show)
            self.answers["trained_photograph"] = [fit_baseline(vectors, train.labels[places], asked.vectors, classes)]
            read = len(places)
            self.remarks.append(
                f"what the encoder sees was learned on the same {read} training photographs that its regression was fitted on, "
                "so the regression may trust it too much"
            )
        return read

    def _add_gaps(self, beside: dict[str, list[Forms]], alone: dict[str, list[Forms]]) -> None:
        """Add the forms of which only the gaps are true, and those whose flags are hidden."""
        metadata = self.opened.metadata
        missing, not_known = find_missing(self.rows, metadata)
        self.gappy = bool(missing.any() or not_known.any())
        if not self.gappy:
            self.remarks.append("no answer of the test side is missing: probes of what is missing were left out")
            return
        if not_known.any():
            self.remarks.append("an answer 'not known' counts as none: it stays where answers are replaced")
        generator = np.random.default_rng([self.seed, 2])
        replaced = [
            metadata.encode(replace_values(self.rows, metadata, self.groups, generator)).values
            for _ in range(self.permutations)
        ]
        if self.opened.model.reads_image:
            beside["photograph_and_gaps"] = alone["gaps"] = replaced
        else:
            beside["gaps"] = replaced
        if count_flags(metadata) and not np.isnan(self.examples.metadata).any():
            beside["flags_hidden"] = [hide_flags(metadata, self.examples.metadata)]
            if metadata.imputer is None:
                self.remarks.append("gaps hold 0 in this run, so they can be seen even where the flags are hidden")
        elif np.isnan(self.examples.metadata).any():
            self.remarks.append("the run has learned tokens for what is missing: there are no flags to hide")
        else:
            self.remarks.append(
                f"metadata tier {metadata.section.tier} has no flags for what is missing, so none could be hidden"
            )

    def _exchanges(self, groups: NDArray[np.object_], stream: int) -> list[NDArray[np.int64]]:
        """Draw exchanges between patients; none, with a remark, if there can't be any."""
        generator = np.random.default_rng([self.seed, stream])
        try:
            return [permute_across_groups(groups, generator) for _ in range(self.permutations)]
        except DataError as error:
            self.remarks.append(str(error))
            return []

    def _empty(self) -> Forms:
        """Return the encoded forms (N, M) of which every answer is missing."""
        fields = [field.name for field in self.opened.metadata.fields]
        return self.opened.metadata.encode(without_fields(self.rows, fields)).values


def _placed(answer: Floats, order: NDArray[np.int64]) -> Floats:
    """Return answers in the order of the forms they were asked with: row i was asked with form `order[i]`."""
    result = np.empty_like(answer)
    result[order] = answer
    return result


BALANCED = "balanced_accuracy"


# Said of the probes that a reader should know first.
_SAID = {
    "gaps": "when it is given nothing but which answers are missing",
    "background_alone": "when the lesion is filled with skin colour and the form is another {unit}'s",
    "other_photographs": "when the form is right and the photograph another {unit}'s",
    "other_forms": "when the photograph is right and the form another {unit}'s",
    "photograph_and_gaps": "when the photograph is right and of the form only which answers are missing",
}


def shortcut_table(shortcuts: Shortcuts) -> PrintedTable:
    """Return one row an input: what the model reaches with it, and what a model does that was trained for it."""
    values = {(row["probe"], row["measure"]): row for row in shortcuts.table.to_dict("records")}
    asked = shortcuts.table[~shortcuts.table["trained"]].drop_duplicates("probe")
    cancer = (FULL, MEASURES[2]) in values
    rows = []
    for probe, given, trained in zip(asked["probe"], asked["input"], asked["trained_probe"], strict=True):
        row = [
            Cell(given),
            _cell(values[probe, BALANCED]),
            _kept(values[probe, BALANCED]),
            _cell(values[probe, MEASURES[1]]),
        ]
        row += [_cell(values[probe, MEASURES[2]])] if cancer else []
        rows.append([*row, _cell(values.get((trained, BALANCED)))])
    columns = [
        "the model is given",
        "balanced accuracy",
        "lead kept",
        "macro AUC",
        *(["malignant AUC"] if cancer else []),
        "trained for it",
    ]
    whole = values[FULL, BALANCED]
    notes = [
        f"Guessing reaches a balanced accuracy of {whole['chance']:.3f} and AUCs of 0.5. Lead kept: of the balanced accuracy over chance "
        "that the whole input gives on the same photographs. The shares needn't add up to 100%: inputs that tell the same can each do "
        "without the other.",
        "Trained for it: balanced accuracy of a logistic regression that was trained on that input alone. Where it is much higher, the "
        "input holds more than the model makes of it when it is asked with that alone.",
        f"{_sizes(shortcuts)} In brackets: 95% intervals from resampling {shortcuts.unit}s; exchanges between {shortcuts.unit}s: mean of "
        f"{shortcuts.permutations}.",
        *(f"{remark[0].upper()}{remark[1:]}." for remark in shortcuts.remarks),
    ]
    return PrintedTable(f"How much of the score is shortcut? {shortcuts.title}", tuple(columns), rows, tuple(notes))


def shortcut_sentences(shortcuts: Shortcuts) -> list[str]:
    """Say in plain words what is left of the lead over chance with parts of the input."""
    found = {row["probe"]: row for row in shortcuts.table[shortcuts.table["measure"] == BALANCED].to_dict("records")}
    whole = found[FULL]
    start = f"Guessing reaches a balanced accuracy of {whole['chance']:.2f}, this model {whole['value']:.2f}"
    if pd.isna(whole["lead"]):
        return [f"{start}: a lead over chance can't be told from none, so it can't be shared out."]
    said = [f"{start}. What is left of that lead:"]
    for probe, words in _SAID.items():
        if probe in found and not pd.isna(found[probe]["lead"]):
            row = found[probe]
            kept, low, high = (f"{max(row[key], 0):.0%}" for key in ("lead", "lead_low", "lead_high"))
            said.append(f"{kept} [{low} to {high}] {words.format(unit=shortcuts.unit)};")
    if len(said) == 1:
        return [f"{start}. No input could be taken away from it."]
    return [" ".join(said)[:-1] + "."]


def missing_metadata_table(availability: MissingMetadata) -> PrintedTable:
    """Return balanced accuracy by the share of the recorded answers that are kept."""
    curve = availability.curve[availability.curve["measure"] == BALANCED]
    photographs = [name for name in (WITH_IMAGE, WITHOUT_IMAGE) if (curve["photograph"] == name).any()]
    values = {(row["photograph"], row["share"]): row for row in curve.to_dict("records")}
    rows = []
    for share, answers in curve.drop_duplicates("share")[["share", "answers_kept"]].itertuples(index=False):
        rows.append(
            [Cell(f"{share:.0%}"), Cell(f"{answers:.1f}"), *(_cell(values[name, share]) for name in photographs)]
        )
    return PrintedTable(
        f"Balanced accuracy by how much of the form is there: {availability.name}",
        ("answers kept", "on average", *photographs),
        rows,
        (_drawn(availability),),
    )


def missing_pattern_table(availability: MissingMetadata) -> PrintedTable:
    """Return balanced accuracy by patterns of missing answers."""
    table = availability.patterns[availability.patterns["measure"] == BALANCED]
    photographs = [name for name in (WITH_IMAGE, WITHOUT_IMAGE) if (table["photograph"] == name).any()]
    values = {(row["photograph"], row["removed"]): row for row in table.to_dict("records")}
    rows = []
    for row in table.drop_duplicates("removed").to_dict("records"):
        share = "" if pd.isna(row["training_share"]) else f"{row['training_share']:.0%}"
        cells = [_cell(values[name, row["removed"]]) for name in photographs]
        rows.append([Cell(row["pattern"]), Cell(share), Cell(f"{row['answers_kept']:.1f}"), *cells])
    columns = ("what is there", "of training", "answers", *photographs)
    note = (
        "Of training: the share of the training rows in which exactly these answers are missing. What a test row itself misses is missing "
        "too."
    )
    return PrintedTable(
        f"Balanced accuracy by what is missing: {availability.name}", columns, rows, (note, _drawn(availability))
    )


def missing_difference_table(differences: pd.DataFrame, first: str, second: str) -> PrintedTable:
    """Return how far one run is above another, by what is there; see `compare_availability`."""
    rows = []
    table = differences[differences["measure"] == BALANCED]
    # The whole form and no form are shares too.
    said = [name for name, share in ((NO_FIELDS, 0), (ALL_FIELDS, 1)) if (table["share"] == share).any()]
    for row in table[~table["pattern"].isin(said)].to_dict("records"):
        there = row["pattern"] or f"{row['share']:.0%} of the answers"
        cell = Cell(_signed(row["difference"]), f"[{_signed(row['low'])}, {_signed(row['high'])}]")
        rows.append(
            [Cell(f"{row['photograph']}, {there}"), Cell(f"{row['first']:.3f}"), Cell(f"{row['second']:.3f}"), cell]
        )
    note = "An interval that leaves out 0 tells the two apart; of so many, one in twenty does by chance."
    return PrintedTable(
        f"Balanced accuracy: {first} and {second}", ("what is there", first, second, "difference"), rows, (note,)
    )


def _sizes(shortcuts: Shortcuts) -> str:
    sizes = {row["probe"]: row for row in shortcuts.table.to_dict("records")}
    whole = sizes[FULL]
    text = f"{whole['images']:,} test photographs of {whole['patients']:,} {shortcuts.unit}s"
    if FULL_OUTLINED in sizes:
        text += f", {sizes[FULL_OUTLINED]['images']:,} of them with an outline of the lesion"
    return f"{text}."


def _drawn(availability: MissingMetadata) -> str:
    return (
        f"{len(availability.image_ids):,} test photographs, {availability.fields} questions; mean of {availability.draws} random choices "
        f"of answers (seed {availability.seed}). In brackets: 95% intervals from resampling {availability.unit}s. Guessing reaches "
        f"{availability.chance:.3f}."
    )


def _cell(row: Mapping[Any, Any] | None) -> Cell:
    if row is None or pd.isna(row["value"]):
        return Cell("–")
    return Cell(f"{row['value']:.3f}", "" if pd.isna(row["low"]) else f"[{row['low']:.2f}, {row['high']:.2f}]")


def _kept(row: Mapping[Any, Any]) -> Cell:
    if pd.isna(row["lead"]) or row["probe"] in (FULL, FULL_OUTLINED):
        return Cell("–")
    # Less than chance is nothing kept, as far as a reader is concerned; the exact share stands in the CSV.
    return Cell(*(f"{max(row['lead'], 0):.0%}", f"[{max(row['lead_low'], 0):.0%}, {max(row['lead_high'], 0):.0%}]"))


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


# Inches: a line of a label, between two rows, and all that isn't a row. Letters of a line of a label.
LINE, GAP, REST, LETTERS = 0.125, 0.09, 0.95, 27


@styled
def draw_shortcuts(shortcuts: Shortcuts, measure: str = "balanced_accuracy") -> ReportFigure:
    """Draw what the model reaches with each input, with 95% intervals, chance, and what was trained for the input.

    Args:
        shortcuts: from `probe_shortcuts`.
        measure: `balanced_accuracy`, `auc_macro_ovr` or `malignant.auc`.

    Raises:
        ValueError: the measure wasn't taken.
    """
    table = shortcuts.table[shortcuts.table["measure"] == measure]
    if table.empty:
        raise ValueError(f"the probes have no {measure}; they have: {', '.join(shortcuts.table['measure'].unique())}")
    references = table[table["trained"]].set_index("probe")
    drawn = table[~table["trained"]].reset_index(drop=True)
    labels = [textwrap.fill(text, LETTERS) for text in drawn["input"]]
    heights = [LINE * (label.count("\n") + 1) + GAP for label in labels]
    places, below = [], 0.0
    for height, probe in zip(heights, drawn["probe"], strict=True):
        # The photographs with an outline begin a block of their own.
        below += 2 * GAP if probe == FULL_OUTLINED else 0.0
        places.append(below + height / 2)
        below += height
    figure, (axis,) = new_figure(below + REST)
    chance = float(drawn["chance"].iloc[0])
    axis.axvline(chance, color=INK, linestyle=":", linewidth=1)
    for place, row in zip(places, drawn.to_dict("records"), strict=True):
        colour = SECONDARY if row["probe"] in (FULL, FULL_OUTLINED) else PRIMARY
        axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.4)
        axis.plot(row["value"], place, "s" if colour == SECONDARY else "o", color=colour, markersize=4.5)
        if row["trained_probe"]:
            axis.plot(
                references.loc[row["trained_probe"], "value"],
                place,
                "D",
                color=INK,
                markerfacecolor="none",
                markersize=4.5,
            )
        if row["probe"] == FULL_OUTLINED:
            axis.axhline(
                place - heights[drawn["probe"].tolist().index(FULL_OUTLINED)] / 2 - GAP, color=FAINT, linewidth=0.8
            )
    axis.set_ylim(below, 0)
    axis.set_yticks(places, labels)
    axis.tick_params(axis="y", length=0, labelsize=7)
    axis.grid(visible=False, axis="y")
    axis.locator_params(axis="x", nbins=5)
    numbers = axis.secondary_yaxis("right")
    numbers.set_yticks(places, [f"{value:.2f}" for value in drawn["value"]])
    numbers.tick_params(length=0, labelsize=7)
    numbers.spines["right"].set_visible(False)
    name = MEASURE_NAMES[measure.replace("malignant.", "malignant_")]
    axis.set_xlabel(name)
    handles = [
        Line2D([], [], linestyle="", marker="s", color=SECONDARY, markersize=4.5, label="whole input"),
        Line2D([], [], linestyle="", marker="o", color=PRIMARY, markersize=4.5, label="changed input"),
        Line2D([], [], linestyle=":", color=INK, linewidth=1, label="guessing"),
    ]
    if len(references):
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker="D",
                color=INK,
                markerfacecolor=PAPER,
                markersize=4.5,
                label="trained for it",
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handletextpad=0.3, columnspacing=1)
    caption = (
        f"What the trained model reaches on {drawn['images'].iloc[0]:,} test photographs of {drawn['patients'].iloc[0]:,} "
        f"{shortcuts.unit}s when parts of its input are taken away or are another {shortcuts.unit}'s (mean of {shortcuts.permutations} "
        f"exchanges); lines: 95% intervals from {shortcuts.samples:,} resamples of the {shortcuts.unit}s (seed {shortcuts.seed}). What "
        "lies far right of guessing without the lesion came from somewhere else."
    )
    if len(references):
        caption += " Hollow diamonds: a logistic regression that was trained on that input alone."
    if (drawn["probe"] == FULL_OUTLINED).any():
        outlined = drawn[drawn["probe"] == FULL_OUTLINED].iloc[0]
        caption += f" Below the line: the {outlined['images']:,} photographs with an outline of the lesion."
    words = [_words(row, references) for row in drawn.to_dict("records")]
    alt = f"{name}; guessing {chance:.2f}. {'; '.join(words)}"
    columns = [
        "probe",
        "input",
        "trained",
        "measure",
        "chance",
        "value",
        "low",
        "high",
        "lead",
        "lead_low",
        "lead_high",
        "images",
    ]
    stem = "shortcuts" if measure == "balanced_accuracy" else f"shortcuts_{measure.replace('.', '_')}"
    return ReportFigure(stem, "What the score leans on", caption, alt, figure, table[columns].reset_index(drop=True))


def _words(row: Mapping[Any, Any], references: pd.DataFrame) -> str:
    text = f"{row['input']}: {row['value']:.2f}"
    if not pd.isna(row["low"]):
        text += f" [{row['low']:.2f}, {row['high']:.2f}]"
    if row["trained_probe"]:
        text += f", trained for it {references.loc[row['trained_probe'], 'value']:.2f}"
    return text
