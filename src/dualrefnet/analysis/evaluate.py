"""Evaluate a run: its predictions of validation and test, and the metrics with their intervals.

Every run is calibrated and measured also with less than was recorded: without metadata, without the image, with some of
the fields, in the same groups of inputs (see `runtime.availability`) and a few named ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dualrefnet.analysis.missing_metadata import find_patterns
from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.analysis.out_of_distribution import fit_run
from dualrefnet.analysis.perturbations import (
    Floats,
    keep_fields,
    predict_with_metadata,
    predict_without_image,
    without_fields,
)
from dualrefnet.data.loader import Examples
from dualrefnet.data.metadata import EncodedMetadata
from dualrefnet.data.protocols import leakage
from dualrefnet.data.schema import Dataset
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.calibration import Calibration, fit_calibration, fit_thresholds, measure_calibrated
from dualrefnet.evaluation.comparison import metrics_with_intervals, pooled_bootstrap
from dualrefnet.files import write_csv, write_json
from dualrefnet.progress import progress_bar, track
from dualrefnet.run import Run
from dualrefnet.runtime.availability import (
    ALWAYS_RECORDED,
    AS_RECORDED,
    IMAGE_ONLY,
    METADATA_ONLY,
    Availability,
    availability_groups,
    share_given,
)
from dualrefnet.runtime.calibration import malignancy

# Random inputs of a group that are drawn of each case; a group without metadata has one.
DRAWS = 4


@dataclass(frozen=True)
class InputPredictions:
    """A run's predictions with one kind of input, for the P rows of a split for which there is such an input."""

    group: Availability | None  # None for a named input, whose cases may belong to several
    image: bool  # whether there is one
    places: NDArray[np.int64]  # (P,) rows of the split
    share: Floats  # (D, P) of the fields with a value, in each of D draws
    probabilities: Floats  # (D, P, C), as the model gives them

    @property
    def draws(self) -> int:
        """D."""
        return len(self.probabilities)

    def flat(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return an attribute (N,) of the split's rows for every prediction, (D * P,), ordered as `probabilities`."""
        return np.tile(values[self.places], self.draws)


@dataclass(frozen=True)
class SplitPredictions:
    """All predictions of a run for one split."""

    recorded: Floats  # (N, C) probabilities of the inputs as they were recorded
    vectors: NDArray[np.float32] | None  # (N, D) of the images; None if none is read
    groups: list[InputPredictions]  # of each group of availability
    named: dict[str, InputPredictions]  # of each named input but `as_recorded`
    share: Floats  # (N,) of the fields with a recorded value
    # Of validation alone: field -> how much of the probability moves when it is left out, on average over the rows
    # where it is recorded.
    field_effects: dict[str, float]


@dataclass(frozen=True)
class _Input:
    group: Availability | None
    image: bool
    metadata: EncodedMetadata
    places: NDArray[np.int64]


def predict_split(opened: OpenedRun, split: str, examples: Examples) -> SplitPredictions:
    """Predict the examples of a split (`val` or `test`) as recorded and with less; every image is encoded once."""
    rows, encoder = opened.rows(split), opened.metadata
    recorded = encoder.encode(rows)
    share = share_given(recorded.missing, opened.reads_metadata)
    inputs = _inputs(opened, rows, recorded) if opened.reads_metadata else {}
    # Validation says which fields matter; the test split isn't used for it.
    left_out = encoder.fields if split == "val" and opened.reads_metadata else ()
    without = [encoder.encode(without_fields(rows, [field.name])).values for field in left_out]
    drawn = [one for draws in inputs.values() for one in draws]
    beside = [one for one in drawn if one.image or not opened.model.reads_image]
    alone = [one for one in drawn if opened.model.reads_image and not one.image]
    versions = [examples.metadata, *without, *(one.metadata.values for one in beside)]
    with progress_bar(f"predicting {split}") as show:
        (full, *others), vectors = predict_with_metadata(opened, examples, versions, show)
    blank = predict_without_image(opened, [one.metadata.values for one in alone])
    effects = {}
    for index, (field, probabilities) in enumerate(zip(left_out, others, strict=False)):
        moved, known = np.abs(probabilities - full).sum(axis=1) / 2, ~recorded.missing[:, index]
        effects[field.name] = float(moved[known].mean()) if known.any() else 0.0
    of_input = dict(zip(map(id, [*beside, *alone]), [*others[len(without) :], *blank], strict=True))
    gathered = {}
    for name, draws in inputs.items():
        group, image, places = draws[0].group, draws[0].image, draws[0].places
        shares = np.stack([share_given(one.metadata.missing, True)[places] for one in draws])
        gathered[name] = InputPredictions(
            group, image, places, shares, np.stack([of_input[id(one)][places] for one in draws])
        )
    groups = [one for one in gathered.values() if one.group is not None]
    if not opened.reads_metadata:
        (group,) = availability_groups(reads_image=True, needs_image=True, reads_metadata=False)
        groups = [InputPredictions(group, True, np.arange(len(rows)), share[None], full[None])]
    named = {name: one for name, one in gathered.items() if one.group is None}
    return SplitPredictions(full, vectors if opened.model.reads_image else None, groups, named, share, effects)


def _inputs(opened: OpenedRun, rows: pd.DataFrame, recorded: EncodedMetadata) -> dict[str, list[_Input]]:
    """Return the inputs of each group of availability, one a draw, and the named ones."""
    encoder, model = opened.metadata, opened.model
    names = [field.name for field in encoder.fields]
    known = ~recorded.missing
    patterns = find_patterns(opened.rows("train"), opened.dataset.schema)
    kept = [~np.isin(names, pattern.removed) for pattern in patterns]
    groups = availability_groups(reads_image=model.reads_image, needs_image=model.needs_image, reads_metadata=True)
    inputs: dict[str, list[_Input]] = {}
    for number, group in enumerate(groups):
        for draw in range(DRAWS if group.to else 1):
            generator = np.random.default_rng([opened.recipe.seed, number, draw])
            present, able = draw_present(known, kept, group, generator)
            if able.any():
                encoded = encoder.encode(keep_fields(rows, names, present))
                inputs.setdefault(group.name, []).append(_Input(group, group.image, encoded, np.flatnonzero(able)))
    always = np.array([field.tier == "M1" for field in encoder.fields])
    if always.any() and not always.all() and model.reads_image:
        encoded = encoder.encode(keep_fields(rows, names, known & always))
        inputs[ALWAYS_RECORDED] = [_Input(None, True, encoded, np.arange(len(rows)))]
    if model.reads_image and not model.needs_image:
        inputs[METADATA_ONLY] = [_Input(None, False, recorded, np.arange(len(rows)))]
    return inputs


def draw_present(
    recorded: NDArray[np.bool_],
    patterns: Sequence[NDArray[np.bool_]],
    group: Availability,
    generator: np.random.Generator,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Draw for each case which of its recorded fields, (N, F), are left, so that it belongs to a group.

    `patterns`, (F,) each, are fields that are known together somewhere. Return (N, F) what is left, and (N,) whether
    the case has enough recorded fields for the group; what is left of the others is nothing.
    """
    count, fields = recorded.shape
    amounts = np.arange(fields + 1)
    legal = amounts[group.contains(np.full(fields + 1, group.image), amounts / max(fields, 1))]
    if not len(legal):
        # Two fields have no third of them.
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
    predictions: SplitPredictions,
    labels: NDArray[np.int64],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Measure a calibrated run's test split by what is given. Intervals are 95%, over patients, given the calibration.

    Predictions, labels (N,) and resamples are of the test split.

    Returns:
        `inputs`: named input -> measures; `groups`: of each group of availability its `name`, `group`, `temperature`,
            `referral_threshold`, `remarks` and measures. The measures are `images`, `fields` (mean share with a value),
            `balanced_accuracy`, `auc_macro_ovr`, `malignant_auc`; by the thresholds of each input's group `coverage`
            and `mean_size` of the sets, `cancers_referred` and `benign_referred`; and, at the temperature and threshold
            of the inputs as recorded, `mean_malignancy` over all cases and `cancers_at_recorded_threshold`: what a
            missingness shortcut takes away.
    """
    of_group, named = predictions.groups, predictions.named
    share, recorded = predictions.share[None], predictions.recorded[None]
    as_recorded = InputPredictions(None, predictions.vectors is not None, np.arange(len(labels)), share, recorded)
    inputs: dict[str, InputPredictions | None] = {
        AS_RECORDED: as_recorded,
        ALWAYS_RECORDED: named.get(ALWAYS_RECORDED),
        IMAGE_ONLY: next((one for one in of_group if one.group and one.group.image and one.group.to == 0), None),
        METADATA_ONLY: named.get(METADATA_ONLY),
    }
    given = {name: one for name, one in inputs.items() if one is not None}
    measured = [
        _measure(calibration, one, labels, bootstrap)
        for one in track([*given.values(), *of_group], "with missing inputs")
    ]
    fitted = {thresholds.group: thresholds for thresholds in calibration.availability}
    by_group = []
    for one, values in zip(of_group, measured[len(given) :], strict=True):
        if one.group in fitted:
            thresholds = fitted[one.group]
            row = {"name": one.group.name, "group": one.group._asdict(), "temperature": thresholds.temperature}
            row |= {"referral_threshold": thresholds.referral, "remarks": list(thresholds.notes)}
            by_group.append(row | values)
    return {"inputs": dict(zip(given, measured, strict=False)), "groups": by_group}


def _measure(
    calibration: Calibration, one: InputPredictions, labels: NDArray[np.int64], every: Bootstrap
) -> dict[str, Any]:
    truth, patients = one.flat(labels), one.flat(every.codes)
    scores = one.probabilities.reshape(len(truth), -1)
    result: dict[str, Any] = {"images": len(one.places), "fields": float(one.share.mean()) if one.share.size else None}
    if len(np.unique(patients)) < 2:
        return result
    # Patients without such an input aren't resampled.
    bootstrap = Bootstrap(patients, every.samples, every.seed)
    once = Bootstrap(every.codes[one.places], every.samples, every.seed)
    systems = {"run": list(one.probabilities)}
    drawn = pooled_bootstrap(labels[one.places], systems, once, calibration.classes, calibration.malignant)
    for measure in ("balanced_accuracy", "auc_macro_ovr", *(["malignant.auc"] if calibration.malignant else [])):
        result |= drawn.value("run", measure).to_json(measure.replace(".", "_"), bootstrap.level)
    decided = calibration.decide(scores, np.full(len(scores), one.image), one.share.ravel())
    everyone, ill = np.ones(len(truth), dtype=bool), calibration.cancer[truth]
    score = malignancy(calibration.probabilities(scores), calibration.cancer)
    at_recorded = np.zeros(len(truth), dtype=bool) if calibration.referral is None else score >= calibration.referral
    refer = decided.refer if decided.refer is not None else at_recorded
    amounts = np.stack([decided.sets[np.arange(len(truth)), truth], refer, refer, at_recorded], axis=1)
    ratios = bootstrap.ratios(amounts, np.stack([everyone, ill, ~ill, ill], axis=1))
    names = ("coverage", "cancers_referred", "benign_referred", "cancers_at_recorded_threshold")
    for name, ratio in zip(names, ratios, strict=True):
        result |= ratio.to_json(name, bootstrap.level)
    amounts = np.stack([decided.sets.sum(axis=1), score], axis=1)
    means = bootstrap.ratios(amounts, np.ones(amounts.shape, dtype=bool), proportions=False)
    for name, mean in zip(("mean_size", "mean_malignancy"), means, strict=True):
        result |= mean.to_json(name, bootstrap.level)
    return result


def evaluate_run(
    run: Run,
    root: Path | str | None = None,
    dataset: Dataset | None = None,
    cache: Path | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Predict validation and test, write `predictions.csv`, `calibration.json` and `metrics.json`, return the metrics.

    The calibration is fitted on the validation split alone. Arguments and errors are those of `open_run`.
    """
    opened = open_run(run, root, dataset, cache, device)
    recipe, schema, groups = opened.recipe, opened.dataset.schema, opened.groups
    wanted, seed, classes, malignant = recipe.evaluation, recipe.seed, schema.classes, schema.malignant
    tables, predicted, arrays, measured = [], {}, {}, {}
    for split in ("val", "test"):
        examples = opened.examples(split)
        predicted[split] = predict_split(opened, split, examples)
        table = prediction_table(examples.image_ids, split, examples.labels, predicted[split].recorded, classes)
        tables.append(table)
        probabilities = table[[f"prob_{name}" for name in classes]].to_numpy(dtype=float)
        patients = groups.loc[table["image_id"]].to_numpy()
        arrays[split] = (examples.labels, probabilities, Bootstrap(patients, wanted.bootstrap, seed))
        with progress_bar("bootstrap") as show:
            bootstrap = Bootstrap(patients, wanted.bootstrap, seed, progress=show)
            measured[split] = metrics_with_intervals(examples.labels, probabilities, bootstrap, classes, malignant)
    write_csv(run.path / "predictions.csv", pd.concat(tables, ignore_index=True))
    validation, test = predicted["val"], predicted["test"]
    targets = wanted.coverage, wanted.referral_sensitivity
    thresholds = [
        fit_thresholds(
            one.group,
            one.flat(arrays["val"][0]),
            one.probabilities.reshape(-1, len(classes)),
            classes,
            malignant,
            *targets,
            one.draws,
        )
        for one in validation.groups
        if one.group is not None
    ]
    calibration = fit_calibration(*arrays["val"], classes, malignant, *targets, thresholds, validation.field_effects)
    write_json(run.calibration_file, calibration.to_json())
    labels, _, resampled = arrays["test"]
    metrics = {
        **measured["test"],
        "calibrated": measure_calibrated(calibration, *arrays["test"]),
        "availability": measure_availability(calibration, test, labels, resampled),
        "split": "test",
        "protocol": recipe.data.protocol,
        "dataset": schema.title,
        "drawn": schema.synthetic,
        "unit": schema.unit,
        "method": recipe.model.method,
        "leakage": leakage(opened.dataset, opened.split),
        "validation": measured["val"],
    }
    if validation.vectors is not None and test.vectors is not None:
        metrics["out_of_scope"] = fit_run(opened, validation.vectors, test.vectors)
    write_json(run.metrics_file, metrics)
    return metrics


def prediction_table(
    image_ids: tuple[str, ...], split: str, labels: np.ndarray, probabilities: np.ndarray, classes: tuple[str, ...]
) -> pd.DataFrame:
    """Return rows of `predictions.csv`: image_id, split, label, predicted, prob_<CLASS>."""
    names = np.array(classes, dtype=object)
    preds = names[probabilities.argmax(axis=1)]
    table = pd.DataFrame({"image_id": image_ids, "split": split, "label": names[labels], "predicted": preds})
    return pd.concat([table, pd.DataFrame(probabilities, columns=[f"prob_{name}" for name in classes])], axis=1)
