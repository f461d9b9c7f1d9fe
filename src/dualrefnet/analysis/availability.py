"""Patterns of missing answers: those that the training rows show, and those that a practice may have."""

# also: A run asked with less than was recorded: without metadata, without the image, with some of the fields.
# also: What a trained run is worth when a part of the form, all of it, or the photograph isn't there.
# also: Pictures of varying availability: what runs reach as answers and photographs are missing.

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.perturbations import (
    Floats,
    Forms,
    keep_fields,
    predict_with_metadata,
    predict_without_image,
    without_fields,
)
from dualrefnet.data.loader import Examples
from dualrefnet.data.metadata import EncodedMetadata
from dualrefnet.data.schema import DatasetSchema
from dualrefnet.display.figure import COLOURS, INK, MARKERS, ReportFigure, new_figure, styled
from dualrefnet.display.format import MEASURE_NAMES
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import Bootstrap, group_codes, percentile_interval
from dualrefnet.evaluation.calibration import Calibration
from dualrefnet.evaluation.comparison import PooledBootstrap, pooled_bootstrap
from dualrefnet.progress import progress_bar
from dualrefnet.runtime.availability import (
    ALWAYS_RECORDED,
    AS_RECORDED,
    IMAGE_ONLY,
    METADATA_ONLY,
    availability_groups,
    share_given,
)
from dualrefnet.runtime.availability import Availability as InputGroups
from dualrefnet.runtime.calibration import malignancy

# Patterns of fewer training rows aren't asked about.
LEAST = 0.01


ALL_FIELDS, NO_FIELDS, ALWAYS_FIELDS = "all answers that are there", "no form", "only what is always recorded, M1"


# Fields that a name lists before it says "...".
NAMED = 3


@dataclass(frozen=True)
class Pattern:
    """Fields that are missing together.

    Attributes:
        name: for people.
        removed: the fields, in the schema's order.
        training_share: of the training rows that miss exactly these; NaN for a pattern that isn't one of theirs.
    """

    name: str
    removed: tuple[str, ...]
    training_share: float

    @property
    def fields(self) -> str:
        """The removed fields in one text, which tells patterns apart."""
        return "; ".join(self.removed)


def find_patterns(rows: pd.DataFrame, schema: DatasetSchema) -> list[Pattern]:
    """Return the patterns to ask about, from the whole form to no form.

    Args:
        rows: of the training side.
        schema: which fields there are, which of them are always recorded and which make subgroups.

    Returns:
        The whole form; what the training rows miss, the most frequent first, if 1% of them or more do; the fields of
        tier M1 alone; the
        fields that make subgroups (age, sex and so on) alone; no form. Patterns that remove the same fields are one.
    """
    names = [field.name for field in schema.fields]
    gaps = rows[names].isna()
    found: dict[tuple[str, ...], Pattern] = {(): Pattern(ALL_FIELDS, (), float((~gaps.any(axis=1)).mean()))}
    shown, counts = np.unique(gaps.to_numpy(), axis=0, return_counts=True)
    for place in np.argsort(-counts, kind="stable"):
        removed = tuple(name for name, gap in zip(names, shown[place], strict=True) if gap)
        if removed and counts[place] / len(rows) >= LEAST:
            found[removed] = Pattern(_missing(removed), removed, float(counts[place] / len(rows)))
    subgroups = [field.name for field in schema.fields if field.subgroup]
    wanted = [
        (ALWAYS_FIELDS, [field.name for field in schema.fields if field.tier == "M1"]),
        (f"only {', '.join(subgroups)}", subgroups),
        (NO_FIELDS, []),
    ]
    for name, kept in wanted:
        removed = tuple(field for field in names if field not in kept)
        if name != NO_FIELDS and not kept:
            continue
        if removed in found:
            known = found[removed]
            found[removed] = Pattern(f"{known.name} ({name})" if removed else known.name, removed, known.training_share)
        else:
            found[removed] = Pattern(name, removed, np.nan)
    # Names are for people, but must tell patterns apart.
    short = [pattern.name for pattern in found.values()]
    for removed, pattern in found.items():
        if short.count(pattern.name) > 1:
            found[removed] = replace(pattern, name=_missing(removed, len(removed)))
    # What keeps most comes first.
    return sorted(found.values(), key=lambda pattern: len(pattern.removed))


def _missing(removed: tuple[str, ...], named: int = NAMED) -> str:
    listed = ", ".join(removed[:named]) + (", ..." if len(removed) > named else "")
    return f"{len(removed)} field{'s' if len(removed) > 1 else ''} missing: {listed}"


# Random inputs of a group that are drawn of each case; a group without metadata has one.
DRAWS = 4


LEVEL = 0.95


@dataclass(frozen=True)
class InputPredictions:
    """What a run answers to one way of asking about the cases of a side.

    Attributes:
        group: of availability; None for a named input, whose cases may belong to several.
        image: whether there is an image.
        places: (P,) rows of the side that can be asked so.
        share: (D, P) of the fields with a value, in each draw.
        probabilities: (D, P, C), as the model gives them.
    """

    group: InputGroups | None
    image: bool
    places: NDArray[np.int64]
    share: Floats
    probabilities: Floats

    @property
    def draws(self) -> int:
        """D."""
        return len(self.probabilities)

    def flat(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return an attribute (N,) of the side's rows for every answer, (D * P,), in the order of `probabilities`."""
        return np.tile(values[self.places], self.draws)


@dataclass(frozen=True)
class _Input:
    group: InputGroups | None
    image: bool
    metadata: EncodedMetadata
    places: NDArray[np.int64]


@dataclass(frozen=True)
class SplitPredictions:
    """All that a run answers about one side.

    Attributes:
        recorded: (N, C) probabilities of the inputs as they were recorded.
        vectors: (N, D) of the images; None if none is read.
        groups: of each group of availability.
        named: of each named input but `as_recorded`.
        share: (N,) of the fields with a recorded value.
        field_effects: field -> how much of the probability moves when it is left out, on average over the rows where it
            is recorded; of
            validation alone.
    """

    recorded: Floats
    vectors: NDArray[np.float32] | None
    groups: list[InputPredictions]
    named: dict[str, InputPredictions]
    share: Floats
    field_effects: dict[str, float]


def predict_split(
    opened: OpenedRun, side: str, examples: Examples, progress: Callable[[int, int], None] | None = None
) -> SplitPredictions:
    """Ask a run about one side: as recorded, and with less. Every image is encoded once.

    Args:
        opened: the run.
        side: `val` or `test`.
        examples: of that side.
        progress: called with (images done, images in all).
    """
    rows = opened.rows(side)
    recorded = opened.metadata.encode(rows)
    share = share_given(recorded.missing, opened.reads_metadata)
    inputs: dict[str, list[_Input]] = {}
    if opened.reads_metadata:
        inputs = _inputs(opened, rows, recorded)
    # Validation says which fields matter; the test side isn't asked for it.
    without = _without_each(opened, rows) if side == "val" else {}
    pictured = [one for ways in inputs.values() for one in ways if one.image or not opened.model.reads_image]
    blank = [one for ways in inputs.values() for one in ways if opened.model.reads_image and not one.image]
    forms = [examples.metadata, *without.values(), *(one.metadata.values for one in pictured)]
    asked = predict_with_metadata(opened, examples, forms, progress)
    answers = dict(zip(map(id, pictured), asked.answers[1 + len(without) :], strict=True))
    answers |= dict(
        zip(map(id, blank), predict_without_image(opened, [one.metadata.values for one in blank]), strict=True)
    )
    moved = [np.abs(answer - asked.answers[0]).sum(axis=1) / 2 for answer in asked.answers[1 : 1 + len(without)]]
    effects = {
        name: float(change[known].mean()) if known.any() else 0.0
        for (name, change), known in zip(zip(without, moved, strict=True), ~recorded.missing.T, strict=False)
    }
    gathered = {
        name: InputPredictions(
            ways[0].group,
            ways[0].image,
            ways[0].places,
            np.stack([share_given(one.metadata.missing, opened.reads_metadata)[one.places] for one in ways]),
            np.stack([answers[id(one)][one.places] for one in ways]),
        )
        for name, ways in inputs.items()
    }
    groups = [one for one in gathered.values() if one.group is not None]
    named = {name: one for name, one in gathered.items() if one.group is None}
    if not opened.reads_metadata:
        everything = availability_groups(reads_image=True, needs_image=True, reads_metadata=False)[0]
        groups = [InputPredictions(everything, True, np.arange(len(rows)), share[None], asked.answers[0][None])]
    return SplitPredictions(
        asked.answers[0], asked.vectors if opened.model.reads_image else None, groups, named, share, effects
    )


def draw_present(
    recorded: NDArray[np.bool_],
    patterns: Sequence[NDArray[np.bool_]],
    group: InputGroups,
    generator: np.random.Generator,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Draw for each case which of its recorded fields are left, so that it belongs to a group.

    Args:
        recorded: (N, F), which fields have a value.
        patterns: (F,) each, fields that are known together somewhere.
        group: of availability.
        generator: draws.

    Returns:
        (N, F) what is left, and (N,) whether the case has enough recorded fields for the group; what is left of the
        others is nothing.
    """
    count, fields = recorded.shape
    amounts = np.arange(fields + 1)
    legal = amounts[group.contains(np.full(fields + 1, group.image), amounts / max(fields, 1))]
    if not len(legal):
        # A form of two fields has no third of them.
        return np.zeros_like(recorded), np.zeros(count, dtype=bool)
    known = recorded.sum(axis=1)
    able = known >= legal.min()
    wanted = np.floor(
        legal.min() + generator.random(count) * (np.minimum(known, legal.max()) - legal.min() + 1)
    ).astype(np.int64)
    rank = np.where(recorded, generator.random((count, fields)), np.inf).argsort(axis=1).argsort(axis=1)
    present = recorded & (rank < wanted[:, None])
    if patterns:
        chosen = recorded & np.stack(patterns)[generator.integers(len(patterns), size=count)]
        fits = np.isin(chosen.sum(axis=1), legal) & (generator.random(count) < 0.5)
        present[fits] = chosen[fits]
    present[~able] = False
    return present, able


def measure_availability(
    calibration: Calibration,
    answered: SplitPredictions,
    labels: NDArray[np.int64],
    groups: NDArray[Any],
    samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure what a calibrated run is worth by what is given. Intervals are 95%, over patients, given the calibration.

    Args:
        calibration: with the thresholds of each group.
        answered: of the test side.
        labels: (N,) of its rows.
        groups: (N,) their patients.
        samples: bootstrap samples; 0: no intervals.
        seed: of the draw.
        progress: called with (ways of asking done, all).

    Returns:
        `inputs`: named input -> measures; `groups`: of each group of availability its `name`, `group`, `temperature`,
        `referral_threshold`, `remarks` and measures. The measures are `images`, `fields` (mean share with a value),
        `balanced_accuracy`,
        `auc_macro_ovr`, `malignant_auc`; by the thresholds of each input's group `coverage` and `mean_size` of the
        sets,
        `cancers_referred` and `benign_referred`; and, at the temperature and threshold of the inputs as recorded,
        `mean_malignancy` over
        all cases and `cancers_at_recorded_threshold`: what a missingness shortcut takes away.
    """
    everything = np.arange(len(labels))
    as_recorded = InputPredictions(
        None, answered.vectors is not None, everything, answered.share[None], answered.recorded[None]
    )
    alone = next(
        (one for one in answered.groups if one.group is not None and one.group.image and one.group.to == 0), None
    )
    known = {AS_RECORDED: as_recorded, IMAGE_ONLY: alone, **answered.named}
    found = {name: known.get(name) for name in (AS_RECORDED, ALWAYS_RECORDED, IMAGE_ONLY, METADATA_ONLY)}
    named = {name: one for name, one in found.items() if one is not None}
    codes = group_codes(groups)
    measured: list[dict[str, Any]] = []
    ways = [*named.values(), *answered.groups]
    for done, one in enumerate(ways, 1):
        measured.append(_measure(calibration, one, labels, codes, samples, seed))
        if progress:
            progress(done, len(ways))
    fitted = {thresholds.group: thresholds for thresholds in calibration.availability}
    by_group = []
    for one, values in zip(answered.groups, measured[len(named) :], strict=True):
        thresholds = fitted.get(one.group) if one.group is not None else None
        if one.group is None or thresholds is None:
            continue
        told = {
            "temperature": thresholds.temperature,
            "referral_threshold": thresholds.referral,
            "remarks": list(thresholds.notes),
        }
        by_group.append({"name": one.group.name, "group": one.group._asdict(), **told, **values})
    return {"inputs": dict(zip(named, measured, strict=False)), "groups": by_group}


def _measure(
    calibration: Calibration,
    one: InputPredictions,
    labels: NDArray[np.int64],
    codes: NDArray[np.int64],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    truth, patients = one.flat(labels), one.flat(codes)
    scores = one.probabilities.reshape(-1, one.probabilities.shape[2])
    result: dict[str, Any] = {"images": len(one.places), "fields": float(one.share.mean()) if one.share.size else None}
    if len(np.unique(patients)) < 2:
        return result
    # Patients without such an input aren't resampled.
    bootstrap = Bootstrap(patients, len(truth), samples, seed, LEVEL)
    decided = calibration.decide(scores, np.full(len(scores), one.image), one.share.ravel())
    drawn = pooled_bootstrap(
        truth[: len(one.places)],
        {"run": list(one.probabilities)},
        patients[: len(one.places)],
        calibration.classes,
        samples,
        seed,
        LEVEL,
        calibration.malignant,
    )
    for measure in ("balanced_accuracy", "auc_macro_ovr", *(["malignant.auc"] if calibration.malignant else [])):
        result |= drawn.value("run", measure).to_json(measure.replace(".", "_"), LEVEL)
    everyone = np.ones(len(truth), dtype=bool)
    ill = calibration.cancer[truth]
    score = malignancy(calibration.probabilities(scores), calibration.cancer)
    at_recorded = np.zeros(len(truth), dtype=bool) if calibration.referral is None else score >= calibration.referral
    refer = decided.refer if decided.refer is not None else at_recorded
    amounts = np.stack([decided.sets[np.arange(len(truth)), truth], refer, refer, at_recorded], axis=1)
    ratios = bootstrap.ratios(amounts, np.stack([everyone, ill, ~ill, ill], axis=1))
    names = ("coverage", "cancers_referred", "benign_referred", "cancers_at_recorded_threshold")
    for name, ratio in zip(names, ratios, strict=True):
        result |= ratio.to_json(name, LEVEL)
    amounts = np.stack([decided.sets.sum(axis=1), score], axis=1)
    means = bootstrap.ratios(amounts, np.ones(amounts.shape, dtype=bool), proportions=False)
    for name, mean in zip(("mean_size", "mean_malignancy"), means, strict=True):
        result |= mean.to_json(name, LEVEL)
    return result


def _inputs(opened: OpenedRun, rows: pd.DataFrame, recorded: EncodedMetadata) -> dict[str, list[_Input]]:
    """Return the ways of asking about the rows; those of a group stand under its name."""
    schema, encoder = opened.dataset.schema, opened.metadata
    names = [field.name for field in encoder.fields]
    known = ~recorded.missing
    patterns = [~np.isin(names, pattern.removed) for pattern in find_patterns(opened.rows("train"), schema)]
    needs_image = opened.model.needs_image
    groups = availability_groups(reads_image=opened.model.reads_image, needs_image=needs_image, reads_metadata=True)
    everything = np.arange(len(rows))
    inputs: dict[str, list[_Input]] = {}
    for number, group in enumerate(groups):
        for draw in range(DRAWS if group.to else 1):
            generator = np.random.default_rng([opened.recipe.seed, number, draw])
            present, able = draw_present(known, patterns, group, generator)
            if able.any():
                inputs.setdefault(group.name, []).append(
                    _Input(group, group.image, encoder.encode(keep_fields(rows, names, present)), np.flatnonzero(able))
                )
    always = np.array([field.tier == "M1" for field in encoder.fields])
    if always.any() and not always.all() and opened.model.reads_image:
        inputs[ALWAYS_RECORDED] = [
            _Input(None, True, encoder.encode(keep_fields(rows, names, known & always)), everything)
        ]
    if opened.model.reads_image and not needs_image:
        inputs[METADATA_ONLY] = [_Input(None, False, recorded, everything)]
    return inputs


def _without_each(opened: OpenedRun, rows: pd.DataFrame) -> dict[str, NDArray[np.float32]]:
    """Return, for each field that the model reads, the encoded rows without it."""
    if not opened.reads_metadata:
        return {}
    return {
        field.name: opened.metadata.encode(without_fields(rows, [field.name])).values
        for field in opened.metadata.fields
    }


SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


MEASURES = ("balanced_accuracy", "auc_macro_ovr")


WITH_IMAGE, WITHOUT_IMAGE = "with photograph", "without photograph"


@dataclass(frozen=True)
class MissingMetadata:
    """How a run does with what is there.

    Attributes:
        name: of the run, for people.
        curve: one row a photograph (`with photograph`, `without photograph`), share and measure: photograph, share (of
            the recorded
            answers that were kept), answers_kept (on average), draws, measure, value (mean over draws), low, high;
            difference,
            difference_low, difference_high from the whole form with the same photograph.
        patterns: one row a photograph, pattern and measure: photograph, pattern (its name), removed (the fields, with
            `; ` between),
            training_share (of the training rows that show it; NaN if it wasn't looked for), answers_kept, measure,
            value and so on.
        chance: balanced accuracy of guessing.
        bootstrap: what the tables were made from: the value of every question in every resample.
        image_ids: (N,) of the test images.
        groups: (N,) their patients.
        fields: of the form, of which shares are kept, also those that the run doesn't read.
        unit: what was resampled, `patient` or `lesion`.
        draws: choices of answers of which the mean is taken.
        samples: of the bootstrap.
        seed: of choices and bootstrap.
    """

    name: str
    curve: pd.DataFrame
    patterns: pd.DataFrame
    chance: float
    bootstrap: PooledBootstrap
    image_ids: tuple[str, ...]
    groups: tuple[str, ...]
    fields: int
    unit: str
    draws: int
    samples: int
    seed: int


def measure_missing_metadata(
    opened: OpenedRun,
    shares: Sequence[float] = SHARES,
    draws: int = 5,
    samples: int = 1000,
    seed: int = 0,
    name: str | None = None,
) -> MissingMetadata:
    """Ask a trained run about its test side with fewer and fewer answers, with and without the photograph.

    Args:
        opened: the run. Of a method that reads no photograph, or no form, only what it reads is taken away.
        shares: of the recorded answers that are kept; ascending, the last is 1.
        draws: choices of answers for each share between 0 and 1.
        samples: bootstrap samples, drawn over patients.
        seed: of choices and bootstrap.
        name: of the run, for people; None: its method's.

    Raises:
        ValueError: `shares` aren't ascending within 0..1 or don't end with 1, or `draws` or `samples` is below 1.
    """
    shares = list(shares)
    if not shares or shares[-1] != 1 or shares[0] < 0 or any(one >= other for one, other in pairwise(shares)):
        raise ValueError(f"shares must ascend within 0..1 and end with 1, not {shares}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    rows, schema = opened.rows("test"), opened.dataset.schema
    recorded = rows[[field.name for field in schema.fields]].notna().to_numpy()
    patterns = find_patterns(opened.rows("train"), schema)
    asked: dict[str, list[NDArray[np.bool_]]] = {}
    orders = draw_orders(opened, draws, seed)
    for share in shares:
        # Nothing and everything can be chosen in one way only.
        asked[_share(share)] = [
            keep_share(recorded, order, share) for order in (orders[:1] if share in (0, 1) else orders)
        ]
    for pattern in patterns:
        asked[_without(pattern.fields)] = [
            recorded & ~np.isin([field.name for field in schema.fields], pattern.removed)
        ]
    answers = _ask(opened, rows, asked)
    examples_ids = tuple(rows["image_id"])
    groups = opened.groups.loc[list(examples_ids)].to_numpy(dtype=object)
    labels = rows["label"].map({label: index for index, label in enumerate(opened.classes)}).to_numpy(dtype=np.int64)
    with progress_bar("intervals") as show:
        bootstrap = _slim(
            pooled_bootstrap(labels, answers, groups, opened.classes, samples, seed, LEVEL, progress=show)
        )
    kept = {key: float(np.mean([part.sum(axis=1).mean() for part in parts])) for key, parts in asked.items()}
    curve, named = [], []
    for photograph in (WITH_IMAGE, WITHOUT_IMAGE):
        if _key(photograph, _share(1)) not in answers:
            continue
        for share in shares:
            start: dict[str, object] = {"photograph": photograph, "share": share, "answers_kept": kept[_share(share)]}
            curve += _measured(bootstrap, photograph, _share(share), start | {"draws": len(asked[_share(share)])})
        for pattern in patterns:
            start = {"photograph": photograph, "pattern": pattern.name, "removed": pattern.fields}
            start |= {"training_share": pattern.training_share, "answers_kept": kept[_without(pattern.fields)]}
            named += _measured(bootstrap, photograph, _without(pattern.fields), start)
    unit = schema.unit
    return MissingMetadata(
        name or opened.model.title,
        pd.DataFrame(curve),
        pd.DataFrame(named),
        1 / len(np.unique(labels)),
        bootstrap,
        examples_ids,
        tuple(map(str, groups)),
        len(schema.fields),
        unit,
        draws,
        samples,
        seed,
    )


def compare_missing_metadata(first: MissingMetadata, second: MissingMetadata) -> pd.DataFrame:
    """Compare two runs at every share and pattern, on the same images, with the same answers and the same resamples.

    A run that reads no photograph answers the same with one as without: that answer is set beside the other's with a
    photograph.

    Returns:
        One row a question and measure: photograph, share (NaN for a pattern), pattern and removed (empty for a share),
        measure, first,
        second, difference (first - second), low, high.

    Raises:
        DataError: they weren't asked about the same images, or with other draws, samples or seed.
    """
    for what, own, others in (
        ("test images", first.image_ids, second.image_ids),
        ("patients", first.groups, second.groups),
        (
            "draws, samples and seed",
            (first.draws, first.samples, first.seed),
            (second.draws, second.samples, second.seed),
        ),
    ):
        if own != others:
            raise DataError(
                f"{first.name} and {second.name} don't have the same {what}, so they can't be compared in pairs"
            )
    questions = [(_share(share), share, "", "") for share in first.curve["share"].unique()]
    named = first.patterns.drop_duplicates("removed")
    questions += [
        (_without(removed), np.nan, name, removed)
        for removed, name in zip(named["removed"], named["pattern"], strict=True)
    ]
    rows = []
    for photograph in (WITH_IMAGE, WITHOUT_IMAGE):
        for question, share, pattern, removed in questions:
            one, other = (_found(run.bootstrap, photograph, question) for run in (first, second))
            if one is None or other is None:
                continue
            for measure in MEASURES:
                values = first.bootstrap.points[one][measure], second.bootstrap.points[other][measure]
                drawn = first.bootstrap.drawn[one][measure] - second.bootstrap.drawn[other][measure]
                low, high = percentile_interval(drawn, LEVEL) or (np.nan, np.nan)
                rows.append(
                    {
                        **{
                            "photograph": photograph,
                            "share": share,
                            "pattern": pattern,
                            "removed": removed,
                            "measure": measure,
                        },
                        **{
                            "first": values[0],
                            "second": values[1],
                            "difference": values[0] - values[1],
                            "low": low,
                            "high": high,
                        },
                    }
                )
    return pd.DataFrame(rows)


def draw_orders(opened: OpenedRun, draws: int, seed: int) -> NDArray[np.float64]:
    """Draw in which order each test row loses its answers, and how a part of an answer is rounded: (draws, N, F + 1) in
    0..1.

    Drawn for all rows of the data set, so that every run of it gets the same.
    """
    table = opened.dataset.table
    numbers = np.random.default_rng(seed).random((draws, len(table), len(opened.dataset.schema.fields) + 1))
    places = pd.Index(table["image_id"]).get_indexer(pd.Index(opened.rows("test")["image_id"]))
    return np.asarray(numbers[:, places])


def keep_share(recorded: NDArray[np.bool_], order: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """Return which of the recorded answers are kept; a larger share keeps those of a smaller one.

    Args:
        recorded: (N, F).
        order: (N, F + 1) of `draw_orders`: of each row the answers with the smallest numbers are kept longest, and the
            last number
            rounds: half an answer is one for half of the rows, so that on average exactly the share is kept.
        share: in 0..1.
    """
    rank = np.where(recorded, order[:, :-1], np.inf).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    wanted = np.floor(share * recorded.sum(axis=1) + order[:, -1])
    return np.asarray(recorded & (rank < wanted[:, None]))


def _ask(
    opened: OpenedRun, rows: pd.DataFrame, asked: Mapping[str, Sequence[NDArray[np.bool_]]]
) -> dict[str, list[Floats]]:
    """Ask with what is kept of each row's answers; `photograph question` -> answers, one a draw."""
    examples = opened.pictures("test")
    names = [field.name for field in opened.dataset.schema.fields]
    forms: list[Forms] = []
    if opened.reads_metadata:
        with progress_bar("removing answers") as show:
            total = sum(map(len, asked.values()))
            for kept in (part for parts in asked.values() for part in parts):
                forms.append(opened.metadata.encode(keep_fields(rows, names, kept)).values)
                show(len(forms), total)
    else:
        forms = [examples.metadata]
    found: dict[str, list[Floats]] = {}
    if opened.model.reads_image:
        with progress_bar("asking with fewer answers") as show:
            found[WITH_IMAGE] = predict_with_metadata(opened, examples, forms, show).answers
    if opened.reads_metadata:
        with progress_bar("asking without photograph") as show:
            found[WITHOUT_IMAGE] = predict_without_image(opened, forms, show)
    answers = {}
    for photograph, given in found.items():
        remaining = iter(given)
        for question, parts in asked.items():
            # A run that reads no form gives the same answer whatever is kept of it.
            answers[_key(photograph, question)] = [next(remaining) for _ in parts] if opened.reads_metadata else given
    return answers


def _measured(
    bootstrap: PooledBootstrap, photograph: str, question: str, start: dict[str, object]
) -> list[dict[str, object]]:
    """Return a row a measure, `start` first."""
    rows, key, whole = [], _key(photograph, question), _key(photograph, _share(1))
    for measure in MEASURES:
        value, difference = bootstrap.value(key, measure), bootstrap.difference(key, whole, measure)
        rows.append(
            {
                **start,
                **{"measure": measure, "value": value.value, "low": value.low, "high": value.high},
                **{
                    "difference": difference.value,
                    "difference_low": difference.low,
                    "difference_high": difference.high,
                },
            }
        )
    return rows


def _slim(bootstrap: PooledBootstrap) -> PooledBootstrap:
    """Return a bootstrap of the measures that are looked at, which is kept in memory for comparisons."""
    points = {key: {measure: values[measure] for measure in MEASURES} for key, values in bootstrap.points.items()}
    drawn = {key: {measure: values[measure] for measure in MEASURES} for key, values in bootstrap.drawn.items()}
    return PooledBootstrap(points, drawn, bootstrap.groups, bootstrap.images, bootstrap.samples, bootstrap.level)


def _found(bootstrap: PooledBootstrap, photograph: str, question: str) -> str | None:
    """Return the key of a question, for a run without photographs the same with and without; None if the run wasn't
    asked it.
    """
    reads_image = any(key.startswith(f"{WITH_IMAGE}:") for key in bootstrap.points)
    key = _key(photograph if reads_image else WITHOUT_IMAGE, question)
    return key if key in bootstrap.points else None


def _share(share: float) -> str:
    return f"share {share:g}"


def _without(removed: str) -> str:
    return f"without {removed}" if removed else _share(1)


def _key(photograph: str, question: str) -> str:
    return f"{photograph}: {question}"


# Inches: a line of a label, a mark, between two rows, and all that isn't a row. Letters of a line of a label.
LINE, SLOT, GAP, REST, LETTERS = 0.125, 0.15, 0.1, 1.0, 30


# Runs in one picture.
MOST = 4


@styled
def draw_missing_metadata(runs: Sequence[MissingMetadata], measure: str = "balanced_accuracy") -> ReportFigure:
    """Draw a measure against the share of the recorded answers that are kept, with 95% bands.

    One run is one panel with a line with and one without photograph; of several runs there is a panel for each of the
    two.

    Args:
        runs: from `measure_availability`, at most four, of the same test images.
        measure: `balanced_accuracy` or `auc_macro_ovr`.

    Raises:
        ValueError: there are no runs, or too many.
    """
    _check(runs)
    data = pd.concat(
        [run.curve[run.curve["measure"] == measure].assign(run=run.name) for run in runs], ignore_index=True
    )
    chance = runs[0].chance if measure == "balanced_accuracy" else 0.5
    panels = [WITH_IMAGE, WITHOUT_IMAGE] if len(runs) > 1 else [""]
    panels = [panel for panel in panels if not panel or (data["photograph"] == panel).any()]
    figure, axes = new_figure(1.9 * len(panels) + 0.75, len(panels), 1, sharex=True, sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        axis.axhline(chance, color=INK, linestyle=":", linewidth=1)
        of_panel = data[data["photograph"] == panel] if panel else data
        for (run, photograph), line in of_panel.groupby(["run", "photograph"], sort=False):
            # Of one run a colour tells the photograph, of several the run.
            place = (
                [one.name for one in runs].index(str(run))
                if panel
                else (WITH_IMAGE, WITHOUT_IMAGE).index(str(photograph))
            )
            axis.fill_between(line["share"], line["low"], line["high"], color=COLOURS[place], alpha=0.2, linewidth=0)
            axis.plot(
                line["share"],
                line["value"],
                color=COLOURS[place],
                marker=MARKERS[place],
                markersize=3.5,
                label=run if panel else photograph,
            )
        axis.set_title(panel)
        axis.set_ylabel(MEASURE_NAMES[measure].replace(", one versus rest", ""))
    axes[-1].set_xlabel("recorded answers that are kept")
    axes[-1].xaxis.set_major_formatter(PercentFormatter(1))
    _legend(axes)
    first = runs[0]
    caption = (
        f"{len(first.image_ids):,} test photographs of {first.bootstrap.groups:,} {first.unit}s: of each form a share of the answers that "
        f"it has is kept, the others are removed as if nobody had asked (mean of {first.draws} random choices, the same for all runs, seed "
        f"{first.seed}). Bands: 95% intervals from {first.samples:,} resamples of the {first.unit}s; dotted: guessing. In practice answers "
        "are missing together and not at random: see the patterns."
    )
    words = []
    for (run, photograph), line in data.groupby(["run", "photograph"], sort=False):
        points = ", ".join(
            f"{value:.2f} at {share:.0%}" for share, value in zip(line["share"], line["value"], strict=True)
        )
        words.append(f"{run} {photograph}: {points}")
    stem = "availability" if measure == "balanced_accuracy" else f"availability_{measure}"
    columns = ["run", "photograph", "share", "answers_kept", "draws", "measure", "value", "low", "high"]
    return ReportFigure(
        stem, "With fewer answers", caption, f"{'; '.join(words)}. Guessing {chance:.2f}.", figure, data[columns]
    )


@styled
def draw_missing_patterns(runs: Sequence[MissingMetadata], measure: str = "balanced_accuracy") -> ReportFigure:
    """Draw a measure for patterns of missing answers, with and without photograph, with 95% intervals.

    Args:
        runs: from `measure_availability`, at most four, of the same test images.
        measure: `balanced_accuracy` or `auc_macro_ovr`.

    Raises:
        ValueError: there are no runs, or too many.
    """
    _check(runs)
    data = pd.concat(
        [run.patterns[run.patterns["measure"] == measure].assign(run=run.name) for run in runs], ignore_index=True
    )
    chance = runs[0].chance if measure == "balanced_accuracy" else 0.5
    series = list(data[["run", "photograph"]].drop_duplicates().itertuples(index=False, name=None))
    patterns = data.drop_duplicates("removed").sort_values("answers_kept", ascending=False, kind="stable")
    labels = [textwrap.fill(text, LETTERS) for text in patterns["pattern"]]
    heights = [max(LINE * (label.count("\n") + 1), SLOT * len(series)) + GAP for label in labels]
    figure, (axis,) = new_figure(sum(heights) + REST + SLOT * ((len(series) + 1) // 2))
    axis.axvline(chance, color=INK, linestyle=":", linewidth=1)
    middles, below = [], 0.0
    for removed, height in zip(patterns["removed"], heights, strict=True):
        middles.append(below + height / 2)
        for place, (run, photograph) in enumerate(series):
            row = data[(data["removed"] == removed) & (data["run"] == run) & (data["photograph"] == photograph)]
            y = below + height / 2 + SLOT * (place - (len(series) - 1) / 2)
            for one in row.to_dict("records"):
                axis.plot([one["low"], one["high"]], [y, y], color=COLOURS[place], linewidth=1.3)
                label = (
                    (f"{run}, {photograph}" if len(runs) > 1 else photograph)
                    if removed == patterns["removed"].iloc[0]
                    else None
                )
                axis.plot(one["value"], y, MARKERS[place], color=COLOURS[place], markersize=4.2, label=label)
        below += height
    axis.set_ylim(below, 0)
    axis.set_yticks(middles, labels)
    axis.tick_params(axis="y", length=0, labelsize=7)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(MEASURE_NAMES[measure].replace(", one versus rest", ""))
    figure.legend(loc="outside lower center", ncols=1 if len(runs) > 1 else 2)
    first = runs[0]
    shown = patterns[patterns["training_share"].notna()]
    shares = "; ".join(
        f"{share:.0%}: {name}" for name, share in zip(shown["pattern"], shown["training_share"], strict=True)
    )
    caption = (
        f"{len(first.image_ids):,} test photographs of {first.bootstrap.groups:,} {first.unit}s, with the answers that a pattern removes "
        f"removed from each form; lines: 95% intervals from {first.samples:,} resamples of the {first.unit}s (seed {first.seed}); dotted: "
        f"guessing. Patterns that training shows, with their share of its rows: {shares}."
    )
    words = [
        f"{row['run']}, {row['photograph']}, {row['pattern']}: {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        for row in data.to_dict("records")
    ]
    stem = "patterns" if measure == "balanced_accuracy" else f"patterns_{measure}"
    columns = [
        "run",
        "photograph",
        "pattern",
        "removed",
        "training_share",
        "answers_kept",
        "measure",
        "value",
        "low",
        "high",
    ]
    return ReportFigure(stem, "With what is missing together", caption, "; ".join(words), figure, data[columns])


def _legend(axes: Sequence[Axes]) -> None:
    """Write the lines' names below the panels."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure = axes[0].get_figure()
    assert figure is not None
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=2)


def _check(runs: Sequence[MissingMetadata]) -> None:
    if not 1 <= len(runs) <= MOST:
        raise ValueError(f"one picture holds 1 to {MOST} runs, not {len(runs)}")
