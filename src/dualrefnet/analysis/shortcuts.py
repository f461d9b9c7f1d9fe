"""How much of the score is shortcut? A trained run's test predictions with parts of the input removed or permuted.

A network that predicts without an image meets an input that it may never have seen, and can do worse than the input
deserves. A single-modality baseline, a logistic regression that was trained on that input alone, tells the two apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dualrefnet.analysis.opened_run import OpenedRun, sample_rows
from dualrefnet.analysis.perturbations import (
    Floats,
    Metadata,
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
from dualrefnet.display.figure import (
    FAINT,
    INK,
    PAPER,
    PRIMARY,
    SECONDARY,
    ReportFigure,
    label_rows,
    new_figure,
    styled,
)
from dualrefnet.display.format import MEASURE_NAMES, Cell, PrintedTable, interval, sentence
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import Bootstrap, Estimate, images_of, percentile_interval
from dualrefnet.evaluation.comparison import PooledBootstrap, pooled_bootstrap

MEASURES = ("balanced_accuracy", "auc_macro_ovr", "malignant.auc")
BALANCED = MEASURES[0]
LEVEL = 0.95
# Training images that the regression on image features is fitted on, at most, each class in proportion.
TRAIN_IMAGES = 2000
# More than enough for standardised columns; a fit that needs more has converged for all that counts here.
ITERATIONS = 2000
# The full model: on all test images, and on those with an outline of the lesion.
FULL, FULL_OUTLINED = "whole", "whole_outlined"
# Probe -> its input, and the single-modality baseline of that input. `{unit}` is a patient, or a lesion.
PROBES = {
    FULL: ("full model", ""),
    "no_photograph": ("metadata, no image", "trained_form"),
    "other_photographs": ("metadata, images permuted across {unit}s", "trained_form"),
    "no_form": ("image, no metadata", "trained_photograph"),
    "other_forms": ("image, metadata permuted across {unit}s", "trained_photograph"),
    "gaps": ("only which fields are missing", "trained_gaps"),
    "photograph_and_gaps": ("image, and which fields are missing", ""),
    "flags_hidden": ("all, flags of missing fields hidden", ""),
    FULL_OUTLINED: ("full model, images with an outline", ""),
    "lesion_blurred": ("all, lesion blurred", ""),
    "background_only": ("all, lesion filled with skin colour", ""),
    "lesion_only": ("all, background filled with skin colour", ""),
    "background_alone": ("lesion filled, metadata permuted across {unit}s", ""),
    "lesion_alone": ("background filled, metadata permuted across {unit}s", ""),
}
# A perturbation of the image, with permuted metadata -> probe.
ALONE = {"background_only": "background_alone", "lesion_only": "lesion_alone"}
BASELINES = {
    "trained_form": "regression on the metadata",
    "trained_photograph": "regression on the image features",
    "trained_gaps": "regression on which fields are missing",
}
# Probes of the summary, the most important first.
_SUMMARY = ("gaps", "background_alone", "other_photographs", "other_forms", "photograph_and_gaps")


@dataclass(frozen=True)
class Shortcuts:
    """What a run's score depends on: a row of `table` for each probe and measure.

    `trained` marks the single-modality baselines; `lead` is the share that is left of the full model's gain over
    chance, NaN where that gain isn't significant; `repeats` are permutations, of which the value is the mean.
    """

    table: pd.DataFrame
    remarks: tuple[str, ...]  # what was left out and what must be known
    title: str  # the method
    unit: str  # what was resampled and permuted, `patient` or `lesion`
    permutations: int  # of which the mean is taken
    train_images: int  # that the regression on image features was fitted on
    samples: int
    seed: int


def probe_shortcuts(
    opened: OpenedRun, masks: Path | None = None, permutations: int = 10, samples: int = 1000, seed: int = 0
) -> Shortcuts:
    """Predict a trained run's test split with changed inputs; `masks` as for `OpenedRun.masks`."""
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, not {permutations}")
    model, unit = opened.model, opened.dataset.schema.unit
    probe = _Probe(opened, seed, permutations)
    masked = opened.masks(masks) if model.reads_image else {}
    read = probe.fit_baselines(probe.predict_metadata())
    labels = probe.examples.labels
    bootstrap = Bootstrap(probe.groups, samples, seed, label="intervals")
    measured = [measure_probes(opened, labels, probe.predictions, FULL, bootstrap)]
    if model.reads_image:
        places, perturbed = probe.predict_outlined(masked)
        if perturbed:
            bootstrap = Bootstrap(probe.groups[places], samples, seed, label="intervals")
            measured.append(measure_probes(opened, labels[places], perturbed, FULL_OUTLINED, bootstrap))
    table = pd.concat(measured, ignore_index=True)
    texts = {name: text.format(unit=unit) for name, (text, _) in PROBES.items()} | BASELINES
    baseline = {name: of_input for name, (_, of_input) in PROBES.items() if of_input in probe.predictions}
    if not (model.reads_image and opened.reads_metadata):
        # Of a single-modality method the baseline is that of its whole input.
        baseline[FULL] = "trained_photograph" if model.reads_image else "trained_form"
    table.insert(1, "input", table["probe"].map(texts))
    table.insert(2, "trained", table["probe"].isin(list(BASELINES)))
    table.insert(3, "trained_probe", table["probe"].map(baseline).fillna(""))
    return Shortcuts(table, tuple(probe.remarks), model.title, unit, permutations, read, samples, seed)


class _Probe:
    """Predicts with changed inputs, and gathers predictions (probe -> (N, C) probabilities a repeat) and remarks."""

    def __init__(self, opened: OpenedRun, seed: int, permutations: int) -> None:
        self.opened, self.permutations, self.seed = opened, permutations, seed
        self.examples, self.rows = opened.image_examples("test"), opened.rows("test")
        self.groups = opened.patients("test")
        self.predictions: dict[str, list[Floats]] = {}
        self.remarks: list[str] = []
        self.incomplete = False

    def predict_metadata(self) -> Predictions:
        """Predict with and without the images, with metadata as recorded, changed, permuted or missing."""
        opened, own = self.opened, self.examples.metadata
        beside: dict[str, list[Metadata]] = {FULL: [own]}
        alone: dict[str, list[Metadata]] = {}
        orders: list[NDArray[np.int64]] = []
        if opened.model.reads_image and opened.reads_metadata:
            orders = self._permute(self.groups, 1)
            empty = without_fields(self.rows, [field.name for field in opened.metadata.fields])
            beside["other_forms"] = [own[order] for order in orders]
            beside["no_form"] = [opened.metadata.encode(empty).values]
            alone["no_photograph"] = [own]
        elif opened.model.reads_image:
            self.remarks.append("the run reads no metadata: probes of the metadata were left out")
        else:
            self.remarks.append("the run reads no image: probes of the image were left out")
        if opened.reads_metadata:
            self._add_missingness(beside, alone)
        every = [one for versions in beside.values() for one in versions]
        predicted = predict_with_metadata(opened, self.examples, every, "predicting with changed metadata")
        remaining = iter(predicted.probabilities)
        found = {name: [next(remaining) for _ in versions] for name, versions in beside.items()}
        # An image beside the metadata of another is a probe of either of the two: row i had metadata `order[i]`.
        found["other_photographs"] = [
            probabilities[np.argsort(order)]
            for probabilities, order in zip(found.get("other_forms", []), orders, strict=True)
        ]
        for name, versions in alone.items():
            found[name] = predict_without_image(opened, self.examples, versions)
        self.predictions |= {name: found[name] for name in PROBES if found.get(name)}
        return predicted

    def _add_missingness(self, beside: dict[str, list[Metadata]], alone: dict[str, list[Metadata]]) -> None:
        """Add metadata of which only the missing fields are true, and those whose flags are hidden."""
        encoder, own = self.opened.metadata, self.examples.metadata
        missing, not_known = find_missing(self.rows, encoder)
        self.incomplete = bool(missing.any() or not_known.any())
        if not self.incomplete:
            self.remarks.append("no field of the test split is missing: probes of missing fields were left out")
            return
        if not_known.any():
            self.remarks.append("'not known' counts as missing: it stays where values are replaced")
        generator = np.random.default_rng([self.seed, 2])
        replaced = [
            encoder.encode(replace_values(self.rows, encoder, self.groups, generator)).values
            for _ in range(self.permutations)
        ]
        if self.opened.model.reads_image:
            beside["photograph_and_gaps"] = alone["gaps"] = replaced
        else:
            beside["gaps"] = replaced
        if np.isnan(own).any():
            self.remarks.append("the run has learned tokens for missing fields: there are no flags to hide")
        elif not count_flags(encoder):
            self.remarks.append(f"metadata tier {encoder.section.tier} has no flags of missing fields to hide")
        else:
            beside["flags_hidden"] = [hide_flags(encoder, own)]
            if encoder.imputer is None:
                self.remarks.append("missing fields hold 0 in this run, so they show even where the flags are hidden")

    def predict_outlined(self, masks: dict[str, Path]) -> tuple[NDArray[np.int64], dict[str, list[Floats]]]:
        """Return the places of outlined examples, and predictions without the lesion, or with it alone."""
        outlines = read_outlines(self.opened, self.examples, masks)
        places = outlines.places
        if outlines.left_out:
            self.remarks.append(f"{outlines.left_out} outlines mark nothing, or the whole image, and were left out")
        if len(np.unique(self.groups[places])) < 2:
            self.remarks.append("there are no outlines of lesions: probes without the lesion were left out")
            return places, {}
        own = self.examples.metadata[places]
        orders = self._permute(self.groups[places], 3) if self.opened.reads_metadata else []
        versions = [own, *(own[order] for order in orders)]
        perturbed = predict_perturbed(self.opened, self.examples, outlines, versions)
        found = {FULL_OUTLINED: [self.predictions[FULL][0][places]]}
        found |= {change: predicted[:1] for change, predicted in perturbed.items()}
        if orders:
            found |= {probe: perturbed[change][1:] for change, probe in ALONE.items()}
        return places, found

    def fit_baselines(self, predicted: Predictions) -> int:
        """Fit the regressions on the training split, and return how many images were read for that."""
        opened, train, read = self.opened, self.opened.image_examples("train"), 0
        inputs: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        if opened.reads_metadata:
            inputs["trained_form"] = with_missing_indicators(train.metadata, self.examples.metadata)
        if self.incomplete:
            both = (find_missing(opened.rows(split), opened.metadata) for split in ("train", "test"))
            first, second = (np.concatenate(missing, axis=1).astype(np.float32) for missing in both)
            inputs["trained_gaps"] = (first, second)
        names = [*inputs, *(["trained_photograph"] if opened.model.reads_image else [])]
        found = {name: np.zeros((len(self.examples), len(opened.classes))) for name in names}
        for fit in opened.fits(train, len(self.examples)):
            for name, (features, test) in inputs.items():
                found[name][fit.tested] = fit_baseline(
                    features[fit.rows], train.labels[fit.rows], test[fit.tested], len(opened.classes)
                )
            if opened.model.reads_image:
                places = fit.rows[sample_rows(train.labels[fit.rows], TRAIN_IMAGES, self.seed)]
                read = max(read, len(places))
                vectors = opened.vectors(fit.train, places, "training images")
                found["trained_photograph"][fit.tested] = fit_baseline(
                    vectors, train.labels[places], predicted.vectors[fit.tested], len(opened.classes)
                )
        if read:
            self.remarks.append(
                f"the image features were learned on the same {read} training images as their regression, which may "
                "trust them too much"
            )
        self.predictions |= {name: [probabilities] for name, probabilities in found.items()}
        return read

    def _permute(self, groups: NDArray[np.object_], stream: int) -> list[NDArray[np.int64]]:
        """Draw permutations across patients; none, with a note, if there can't be any."""
        generator = np.random.default_rng([self.seed, stream])
        try:
            return [permute_across_groups(groups, generator) for _ in range(self.permutations)]
        except DataError as error:
            self.remarks.append(str(error))
            return []


def fit_baseline(
    train: NDArray[np.float32], labels: NDArray[np.int64], test: NDArray[np.float32], classes: int
) -> Floats:
    """Return (T, C) probabilities of `test` by a balanced, standardised logistic regression on `train`."""
    regression = LogisticRegression(class_weight="balanced", max_iter=ITERATIONS)
    fitted = make_pipeline(StandardScaler(), regression).fit(train.astype(np.float64), labels)
    result = np.zeros((len(test), classes))
    result[:, fitted.classes_] = fitted.predict_proba(test.astype(np.float64))
    return result


def with_missing_indicators(train: Metadata, test: Metadata) -> tuple[Metadata, Metadata]:
    """Return encoded metadata without NaN: 0 in its place, and an indicator for each column that has one."""
    missing = np.isnan(train).any(axis=0) | np.isnan(test).any(axis=0)
    first, second = (
        np.concatenate([np.nan_to_num(part), np.isnan(part[:, missing]).astype(np.float32)], axis=1)
        for part in (train, test)
    )
    return first, second


def measure_probes(
    opened: OpenedRun,
    labels: NDArray[np.int64],
    predictions: Mapping[str, Sequence[Floats]],
    full: str,
    resamples: Bootstrap,
) -> pd.DataFrame:
    """Measure probes (name -> (N, C) probabilities a repeat) and compare them with `full` on the same resamples."""
    bootstrap = pooled_bootstrap(labels, predictions, resamples, opened.classes, opened.dataset.schema.malignant)
    # A resample without any image of a class is one of fewer classes.
    sensitivities = [bootstrap.drawn[full][f"per_class.{name}.sensitivity"] for name in opened.classes]
    present = (~np.isnan(sensitivities)).sum(axis=0)
    rows = []
    for name, repeats in predictions.items():
        for measure in MEASURES:
            if measure not in bootstrap.points[name]:
                continue
            chance, drawn_chance = 0.5, np.full(len(present), 0.5)
            if measure == BALANCED:
                chance, drawn_chance = 1 / len(np.unique(labels)), 1 / present
            value, difference = bootstrap.value(name, measure), bootstrap.difference(name, full, measure)
            gain = _share_of_gain(bootstrap, name, full, measure, chance, drawn_chance)
            row = {"probe": name, "compared_with": full, "measure": measure, "chance": chance}
            row |= value.columns() | difference.columns("difference") | gain.columns("lead")
            rows.append(row | {"images": bootstrap.images, "patients": bootstrap.groups, "repeats": len(repeats)})
    return pd.DataFrame(rows)


def _share_of_gain(
    bootstrap: PooledBootstrap, name: str, full: str, measure: str, chance: float, drawn_chance: Floats
) -> Estimate:
    """Return the share of the full model's gain over chance that a probe keeps; NaN if that gain isn't significant."""
    gain = bootstrap.drawn[full][measure] - drawn_chance
    bounds = percentile_interval(gain, LEVEL)
    if bounds is None or bounds[0] <= 0:
        return Estimate(np.nan)
    share = (bootstrap.points[name][measure] - chance) / (bootstrap.points[full][measure] - chance)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.where(gain > 0, (bootstrap.drawn[name][measure] - drawn_chance) / gain, np.nan)
    return Estimate(share, *(percentile_interval(drawn, LEVEL) or ()))


def shortcut_table(shortcuts: Shortcuts) -> PrintedTable:
    """Return one row an input: what the model reaches with it, and what its single-modality baseline does."""
    table = shortcuts.table
    values: dict[Any, Any] = {(row["probe"], row["measure"]): row for row in table.to_dict("records")}
    cancer = (FULL, MEASURES[2]) in values
    rows = []
    for probe, baseline in table[~table["trained"]].drop_duplicates("probe")[["probe", "trained_probe"]].to_numpy():
        own = values[probe, BALANCED]
        aucs = [values[probe, measure] for measure in MEASURES[1 : 2 + cancer]]
        trained = values.get((baseline, BALANCED), {})
        rows.append([Cell(own["input"]), _cell(own), _gain_cell(own), *map(_cell, [*aucs, trained])])
    columns = ["input", "balanced accuracy", "share of gain", "macro AUC"]
    columns += [*(["malignant AUC"] if cancer else []), "baseline"]
    full, outlined = values[FULL, BALANCED], values.get((FULL_OUTLINED, BALANCED))
    sizes = images_of(full["images"], full["patients"], shortcuts.unit)
    sizes += f", {outlined['images']:,} of them with an outline of the lesion" if outlined else ""
    notes = [
        f"Chance: balanced accuracy {full['chance']:.3f}, AUC 0.5. Share of gain: of the full model's gain in balanced "
        "accuracy over chance, on the same images; redundant inputs can each keep most of it.",
        "Baseline: balanced accuracy of a logistic regression that was trained on that input alone.",
        f"{sizes}. In brackets: 95% intervals from resampling {shortcuts.unit}s; permutations: mean of "
        f"{shortcuts.permutations}.",
        *map(sentence, shortcuts.remarks),
    ]
    return PrintedTable(f"Shortcut probes: {shortcuts.title}", tuple(columns), rows, tuple(notes))


def shortcut_sentences(shortcuts: Shortcuts) -> list[str]:
    """Say in plain words what is left of the gain over chance with parts of the input."""
    rows: dict[Any, Any] = {
        row["probe"]: row for row in shortcuts.table[shortcuts.table["measure"] == BALANCED].to_dict("records")
    }
    full = rows[FULL]
    start = f"Balanced accuracy is {full['value']:.2f}, by chance it would be {full['chance']:.2f}."
    if pd.isna(full["lead"]):
        return [f"{start} The gain over chance isn't significant, so no share of it can be given."]
    shares = [
        f"{rows[probe]['input']}: {_gain_cell(rows[probe]).text} {_gain_cell(rows[probe]).small}"
        for probe in _SUMMARY
        if probe in rows and not pd.isna(rows[probe]["lead"])
    ]
    return [f"{start} Share of the gain over chance that is left: {'; '.join(shares)}." if shares else start]


def _cell(row: Mapping[Any, Any]) -> Cell:
    return Cell.estimate(row.get("value"), row.get("low"), row.get("high"))


def _gain_cell(row: Mapping[Any, Any]) -> Cell:
    if pd.isna(row["lead"]) or row["probe"] in (FULL, FULL_OUTLINED):
        return Cell("–")
    # Less than chance is shown as nothing kept; the exact share stands in the CSV.
    share, low, high = (max(row[key], 0) for key in ("lead", "lead_low", "lead_high"))
    return Cell(f"{share:.0%}", interval(low, high, ".0%"))


# Inches: a line of a label, between two rows, and all that isn't a row. Letters of a line of a label.
LINE, GAP, REST, LETTERS = 0.125, 0.09, 0.95, 27


@styled
def draw_shortcuts(shortcuts: Shortcuts) -> ReportFigure:
    """Draw the balanced accuracy with each input, with 95% intervals, chance, and single-modality baselines."""
    from matplotlib.lines import Line2D

    table = shortcuts.table[shortcuts.table["measure"] == BALANCED]
    baselines = table[table["trained"]].set_index("probe")["value"]
    drawn = table[~table["trained"]].reset_index(drop=True)
    outlined = drawn[drawn["probe"] == FULL_OUTLINED]
    unit = shortcuts.unit
    labels = [textwrap.fill(text, LETTERS) for text in drawn["input"]]
    # The images with an outline begin a block of their own.
    before = np.where(drawn["probe"] == FULL_OUTLINED, 2 * GAP, 0.0)
    heights = np.array([LINE * (label.count("\n") + 1) + GAP for label in labels])
    below = np.cumsum(before + heights)
    middles = below - heights / 2
    figure, (axis,) = new_figure(below[-1] + REST)
    chance = float(drawn["chance"].iloc[0])
    axis.axvline(chance, color=INK, linestyle=":", linewidth=1)
    hollow: dict[str, Any] = {"marker": "D", "color": INK, "markersize": 4.5}
    texts = []
    for place, row in zip(middles, drawn.to_dict("records"), strict=True):
        colour, marker = (SECONDARY, "s") if row["probe"] in (FULL, FULL_OUTLINED) else (PRIMARY, "o")
        axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.4)
        axis.plot(row["value"], place, marker, color=colour, markersize=4.5)
        text = f"{row['input']}: {row['value']:.2f} {interval(row['low'], row['high'])}".strip()
        if row["trained_probe"]:
            baseline = baselines[row["trained_probe"]]
            axis.plot(baseline, place, markerfacecolor="none", **hollow)
            text += f", baseline {baseline:.2f}"
        texts.append(text)
    for top in (below - heights - GAP)[before > 0]:
        axis.axhline(top, color=FAINT, linewidth=0.8)
    axis.set_ylim(below[-1], 0)
    label_rows(axis, middles, labels, [f"{value:.2f}" for value in drawn["value"]])
    axis.set_xlabel(MEASURE_NAMES[BALANCED])
    mark: dict[str, Any] = {"linestyle": "", "markersize": 4.5}
    handles = [
        Line2D([], [], marker="s", color=SECONDARY, label="full model", **mark),
        Line2D([], [], marker="o", color=PRIMARY, label="changed input", **mark),
        Line2D([], [], linestyle=":", color=INK, linewidth=1, label="chance"),
    ]
    if len(baselines):
        handles.append(Line2D([], [], linestyle="", markerfacecolor=PAPER, label="baseline", **hollow))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handletextpad=0.3, columnspacing=1)
    sizes = images_of(drawn["images"].iloc[0], drawn["patients"].iloc[0], unit)
    caption = (
        f"Trained model on {sizes} with parts of the input removed or permuted across {unit}s (mean of "
        f"{shortcuts.permutations}); lines: 95% intervals from {shortcuts.samples:,} resamples of the {unit}s (seed "
        f"{shortcuts.seed})."
    )
    if len(baselines):
        caption += " Hollow diamonds: a logistic regression that was trained on that input alone."
    if len(outlined):
        caption += f" Below the line: the {outlined['images'].iloc[0]:,} images with an outline of the lesion."
    columns = ["probe", "input", "trained", "measure", "chance", "value", "low", "high"]
    columns += ["lead", "lead_low", "lead_high", "images"]
    alt = f"{MEASURE_NAMES[BALANCED]}; chance {chance:.2f}. {'; '.join(texts)}"
    return ReportFigure("shortcuts", "Shortcut probes", caption, alt, figure, table[columns].reset_index(drop=True))
