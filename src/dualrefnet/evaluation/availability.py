"""A run asked with less than was recorded: without metadata, without the image, with some of the fields.

Calibration is fitted on such inputs of the validation side and measured on those of the test side, for each group of
`dualrefnet.runtime.availability`. Half of the inputs of a group miss what another row misses (a pattern of the training side or of a
practice that asks little), as far as it falls into the group; the others miss fields drawn at random. Which fields a case loses has
nothing to do with its class, so that "missing" means no more than that nobody asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.loader import Examples
from dualrefnet.data.metadata import EncodedMetadata
from dualrefnet.evaluation.calibrated import Calibration
from dualrefnet.evaluation.changed_inputs import ask_with_forms, ask_without_photograph, keep_answers, without_answers
from dualrefnet.evaluation.comparison import pooled_bootstrap
from dualrefnet.evaluation.intervals import group_codes
from dualrefnet.evaluation.missing_patterns import find_patterns
from dualrefnet.evaluation.opened_run import OpenedRun
from dualrefnet.evaluation.ratios import beside, measure_ratios
from dualrefnet.runtime.availability import (
    ALWAYS_RECORDED,
    AS_RECORDED,
    IMAGE_ONLY,
    METADATA_ONLY,
    Availability,
    availability_groups,
    share_given,
)
from dualrefnet.runtime.probabilities import malignancy

Floats = NDArray[np.float64]

# Random inputs of a group that are drawn of each case; a group without metadata has one.
DRAWS = 4
LEVEL = 0.95


@dataclass(frozen=True)
class Answers:
    """What a run answers to one way of asking about the cases of a side.

    Attributes:
        group: of availability; None for a named input, whose cases may belong to several.
        image: whether there is an image.
        places: (P,) rows of the side that can be asked so.
        share: (D, P) of the fields with a value, in each draw.
        probabilities: (D, P, C), as the model gives them.
    """

    group: Availability | None
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
    group: Availability | None
    image: bool
    metadata: EncodedMetadata
    places: NDArray[np.int64]


@dataclass(frozen=True)
class SideAnswers:
    """All that a run answers about one side.

    Attributes:
        recorded: (N, C) probabilities of the inputs as they were recorded.
        vectors: (N, D) of the images; None if none is read.
        groups: of each group of availability.
        named: of each named input but `as_recorded`.
        share: (N,) of the fields with a recorded value.
        field_effects: field -> how much of the probability moves when it is left out, on average over the rows where it is recorded; of
            validation alone.
    """

    recorded: Floats
    vectors: NDArray[np.float32] | None
    groups: list[Answers]
    named: dict[str, Answers]
    share: Floats
    field_effects: dict[str, float]


def answer_side(opened: OpenedRun, side: str, examples: Examples, progress: Callable[[int, int], None] | None = None) -> SideAnswers:
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
    asked = ask_with_forms(opened, examples, forms, progress)
    answers = dict(zip(map(id, pictured), asked.answers[1 + len(without) :], strict=True))
    answers |= dict(zip(map(id, blank), ask_without_photograph(opened, [one.metadata.values for one in blank]), strict=True))
    moved = [np.abs(answer - asked.answers[0]).sum(axis=1) / 2 for answer in asked.answers[1 : 1 + len(without)]]
    effects = {
        name: float(change[known].mean()) if known.any() else 0.0
        for (name, change), known in zip(zip(without, moved, strict=True), ~recorded.missing.T, strict=False)
    }
    gathered = {
        name: Answers(
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
        groups = [Answers(everything, True, np.arange(len(rows)), share[None], asked.answers[0][None])]
    return SideAnswers(asked.answers[0], asked.vectors if opened.model.reads_image else None, groups, named, share, effects)


def draw_present(
    recorded: NDArray[np.bool_], patterns: Sequence[NDArray[np.bool_]], group: Availability, generator: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Draw for each case which of its recorded fields are left, so that it belongs to a group.

    Args:
        recorded: (N, F), which fields have a value.
        patterns: (F,) each, fields that are known together somewhere.
        group: of availability.
        generator: draws.

    Returns:
        (N, F) what is left, and (N,) whether the case has enough recorded fields for the group; what is left of the others is nothing.
    """
    count, fields = recorded.shape
    amounts = np.arange(fields + 1)
    legal = amounts[group.holds(np.full(fields + 1, group.image), amounts / max(fields, 1))]
    if not len(legal):
        # A form of two fields has no third of them.
        return np.zeros_like(recorded), np.zeros(count, dtype=bool)
    known = recorded.sum(axis=1)
    able = known >= legal.min()
    wanted = np.floor(legal.min() + generator.random(count) * (np.minimum(known, legal.max()) - legal.min() + 1)).astype(np.int64)
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
    answered: SideAnswers,
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
        `referral_threshold`, `remarks` and measures. The measures are `images`, `fields` (mean share with a value), `balanced_accuracy`,
        `auc_macro_ovr`, `malignant_auc`; by the thresholds of each input's group `coverage` and `mean_size` of the sets,
        `cancers_referred` and `benign_referred`; and, at the temperature and threshold of the inputs as recorded, `mean_malignancy` over
        all cases and `cancers_at_recorded_threshold`: what a missingness shortcut takes away.
    """
    everything = np.arange(len(labels))
    as_recorded = Answers(None, answered.vectors is not None, everything, answered.share[None], answered.recorded[None])
    alone = next((one for one in answered.groups if one.group is not None and one.group.image and one.group.to == 0), None)
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
        told = {"temperature": thresholds.temperature, "referral_threshold": thresholds.referral, "remarks": list(thresholds.remarks)}
        by_group.append({"name": one.group.name, "group": one.group._asdict(), **told, **values})
    return {"inputs": dict(zip(named, measured, strict=False)), "groups": by_group}


def _measure(
    calibration: Calibration, one: Answers, labels: NDArray[np.int64], codes: NDArray[np.int64], samples: int, seed: int
) -> dict[str, Any]:
    truth, patients = one.flat(labels), one.flat(codes)
    scores = one.probabilities.reshape(-1, one.probabilities.shape[2])
    result: dict[str, Any] = {"images": len(one.places), "fields": float(one.share.mean()) if one.share.size else None}
    if len(np.unique(patients)) < 2:
        return result
    # Patients who can't be asked so aren't resampled.
    patients = group_codes(patients)
    decided = calibration.decide(scores, np.full(len(scores), one.image), one.share.ravel())
    drawn = pooled_bootstrap(
        truth[: len(one.places)], {"run": list(one.probabilities)}, patients[: len(one.places)], calibration.classes, max(samples, 1), seed,
        LEVEL, calibration.malignant,
    )  # fmt: skip
    for measure in ("balanced_accuracy", "auc_macro_ovr", *(["malignant.auc"] if calibration.malignant else [])):
        value = drawn.value("run", measure)
        result |= beside(measure.replace(".", "_"), value.value, (value.low, value.high) if samples else None, LEVEL)
    everyone = np.ones(len(truth), dtype=bool)
    ill = calibration.cancer[truth]
    score = malignancy(calibration.probabilities(scores), calibration.cancer)
    at_recorded = np.zeros(len(truth), dtype=bool) if calibration.referral is None else score >= calibration.referral
    refer = decided.refer if decided.refer is not None else at_recorded
    amounts = np.stack([decided.sets[np.arange(len(truth)), truth], refer, refer, at_recorded], axis=1)
    ratios = measure_ratios(amounts, np.stack([everyone, ill, ~ill, ill], axis=1), patients, samples, seed, LEVEL)
    names = ("coverage", "cancers_referred", "benign_referred", "cancers_at_recorded_threshold")
    for name, ratio in zip(names, ratios, strict=True):
        result |= ratio.to_json(name, LEVEL)
    amounts = np.stack([decided.sets.sum(axis=1), score], axis=1)
    means = measure_ratios(amounts, np.ones(amounts.shape, dtype=bool), patients, samples, seed, LEVEL, shares=False)
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
                    _Input(group, group.image, encoder.encode(keep_answers(rows, names, present)), np.flatnonzero(able))
                )
    always = np.array([field.tier == "M1" for field in encoder.fields])
    if always.any() and not always.all() and opened.model.reads_image:
        inputs[ALWAYS_RECORDED] = [_Input(None, True, encoder.encode(keep_answers(rows, names, known & always)), everything)]
    if opened.model.reads_image and not needs_image:
        inputs[METADATA_ONLY] = [_Input(None, False, recorded, everything)]
    return inputs


def _without_each(opened: OpenedRun, rows: pd.DataFrame) -> dict[str, NDArray[np.float32]]:
    """Return, for each field that the model reads, the encoded rows without it."""
    if not opened.reads_metadata:
        return {}
    return {field.name: opened.metadata.encode(without_answers(rows, [field.name])).values for field in opened.metadata.fields}
