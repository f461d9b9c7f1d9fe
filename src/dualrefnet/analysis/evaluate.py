"""Evaluate a run: its predictions of validation and test, and the metrics with their intervals.

Every run is calibrated and measured also with less than was recorded: without metadata, without the image, with some of
the fields, in the same groups of inputs (see `runtime.availability`) and a few named ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from dualrefnet.data.protocols import FOLD, leak_remarks, leakage
from dualrefnet.data.schema import Dataset
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import Bootstrap, group_sums
from dualrefnet.evaluation.calibration import (
    Calibration,
    CalibrationByFold,
    fit_calibration,
    fit_thresholds,
    measure_calibrated,
)
from dualrefnet.evaluation.comparison import metrics_with_intervals, pooled_bootstrap
from dualrefnet.evaluation.metrics import HEADLINE_MEASURES, compute_metrics, no_metrics
from dualrefnet.files import write_csv, write_json
from dualrefnet.progress import track
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

NOT_MEASURED = "not measured, since no patient is left to test on; see the run that it follows from"
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
        return len(self.probabilities)

    def of(self, rows: NDArray[np.bool_]) -> InputPredictions:
        """Return those for some of the split's rows, (N,)."""
        kept = rows[self.places]
        return replace(
            self, places=self.places[kept], share=self.share[:, kept], probabilities=self.probabilities[:, kept]
        )

    def flat(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return an attribute (N,) of the split's rows for every prediction, (D * P,), ordered as `probabilities`."""
        return np.tile(values[self.places], self.draws)


class _Input(NamedTuple):
    """One draw of an input of that name; see `InputPredictions`."""

    name: str
    group: Availability | None
    image: bool
    metadata: EncodedMetadata
    places: NDArray[np.int64]


class SplitPredictions(NamedTuple):
    """All predictions of a run for one split."""

    inputs: dict[str, InputPredictions]  # `as_recorded`, the groups of availability, and the other named inputs
    vectors: NDArray[np.float32]  # (N, D) of the images; D is 0 where none is read
    # Of what the calibration is fitted on: field -> how much of the probability moves when it is left out, on average
    # over the rows where it is recorded.
    field_effects: dict[str, float]


def predict_split(opened: OpenedRun, split: str, examples: Examples, effects: bool) -> SplitPredictions:
    """Predict a split as recorded and with less; `effects`: also with each field left out."""
    rows, encoder = opened.rows(split), opened.metadata
    recorded = encoder.encode(rows)
    inputs = _inputs(opened, rows, recorded)
    left_out = encoder.fields if effects and opened.reads_metadata else ()
    without = [encoder.encode(without_fields(rows, [field.name])).values for field in left_out]
    beside = [one for one in inputs if one.image or not opened.model.reads_image]
    alone = [one for one in inputs if opened.model.reads_image and not one.image]
    versions = [*(one.metadata.values for one in beside), *without]
    predicted, vectors = predict_with_metadata(opened, examples, versions, f"predicting {split}")
    predicted_alone = predict_without_image(opened, examples, [one.metadata.values for one in alone])
    field_effects = {}
    for index, (field, probabilities) in enumerate(zip(left_out, predicted[len(beside) :], strict=True)):
        moved, known = np.abs(probabilities - predicted[0]).sum(axis=1) / 2, ~recorded.missing[:, index]
        field_effects[field.name] = float(moved[known].mean()) if known.any() else 0.0
    of_input = dict(zip(map(id, [*beside, *alone]), [*predicted[: len(beside)], *predicted_alone], strict=True))
    gathered = {}
    for name in dict.fromkeys(one.name for one in inputs):
        draws = [one for one in inputs if one.name == name]
        group, image, places = draws[0].group, draws[0].image, draws[0].places
        shares = [share_given(one.metadata.missing, opened.reads_metadata)[places] for one in draws]
        probabilities = np.stack([of_input[id(one)][places] for one in draws])
        gathered[name] = InputPredictions(group, image, places, np.stack(shares), probabilities)
    return SplitPredictions(gathered, vectors, field_effects)


def _inputs(opened: OpenedRun, rows: pd.DataFrame, recorded: EncodedMetadata) -> list[_Input]:
    """Return the inputs as recorded, those of each group of availability, one a draw, and the other named ones."""
    encoder, model, everything = opened.metadata, opened.model, np.arange(len(rows))
    inputs = [_Input(AS_RECORDED, None, model.reads_image, recorded, everything)]
    if not opened.reads_metadata:
        (group,) = availability_groups(reads_image=True, needs_image=True, reads_metadata=False)
        return [*inputs, _Input(group.name, group, True, recorded, everything)]
    names = [field.name for field in encoder.fields]
    known = ~recorded.missing
    patterns = find_patterns(opened.rows("train"), opened.dataset.schema)
    kept = [~np.isin(names, pattern.removed) for pattern in patterns]
    groups = availability_groups(reads_image=model.reads_image, needs_image=model.needs_image, reads_metadata=True)
    for number, group in enumerate(groups):
        for draw in range(DRAWS if group.to else 1):
            generator = np.random.default_rng([opened.recipe.seed, number, draw])
            present, able = draw_present(known, kept, group, generator)
            if able.any():
                encoded = encoder.encode(keep_fields(rows, names, present))
                inputs.append(_Input(group.name, group, group.image, encoded, np.flatnonzero(able)))
    always = np.array([field.tier == "M1" for field in encoder.fields])
    if always.any() and not always.all() and model.reads_image:
        encoded = encoder.encode(keep_fields(rows, names, known & always))
        inputs.append(_Input(ALWAYS_RECORDED, None, True, encoded, everything))
    if model.reads_image and not model.needs_image:
        inputs.append(_Input(METADATA_ONLY, None, False, recorded, everything))
    return inputs


def draw_present(
    recorded: NDArray[np.bool_],
    patterns: Sequence[NDArray[np.bool_]],
    group: Availability,
    generator: np.random.Generator,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Draw which recorded fields (N, F) are left, so that each case belongs to a group; and (N,) which cases can.

    `patterns`, (F,) each, are fields that are known together somewhere.
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
    inputs: Mapping[str, InputPredictions],
    labels: NDArray[np.int64],
    bootstrap: Bootstrap,
    by_fold: CalibrationByFold = (),
) -> dict[str, Any]:
    """Measure a calibrated run's test split by what is given; intervals are given the calibration.

    At the temperature and threshold of the inputs as recorded, `mean_malignancy` over all cases and
    `cancers_at_recorded_threshold` show what a missingness shortcut takes away.
    """
    measured = {
        name: _measure(by_fold or [(np.ones(len(labels), dtype=bool), calibration)], inputs[name], labels, bootstrap)
        for name in track(list(inputs), "with missing inputs")
    }
    fitted = {thresholds.group: thresholds for thresholds in calibration.availability}
    by_group = []
    for name, one in inputs.items():
        if one.group is not None and one.group in fitted:
            thresholds = fitted[one.group]
            row = {"name": name, "group": one.group._asdict(), "temperature": thresholds.temperature}
            row |= {"referral_threshold": thresholds.referral, "remarks": list(thresholds.notes)}
            by_group.append(row | measured[name])
    image_only = next((name for name, one in inputs.items() if one.group and one.group.image and one.group.to == 0), "")
    named = {name: name for name in (AS_RECORDED, ALWAYS_RECORDED)} | {IMAGE_ONLY: image_only}
    named |= {METADATA_ONLY: METADATA_ONLY}
    return {"inputs": {key: measured[name] for key, name in named.items() if name in measured}, "groups": by_group}


def _measure(
    by_fold: CalibrationByFold, one: InputPredictions, labels: NDArray[np.int64], every: Bootstrap
) -> dict[str, Any]:
    calibration = by_fold[0][1]
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
    everyone, ill = np.ones(len(truth), dtype=bool), calibration.cancer[truth]
    sets, score = np.zeros(scores.shape, dtype=bool), np.zeros(len(truth))
    refer, at_recorded = (np.zeros(len(truth), dtype=bool) for _ in range(2))
    for of_fold, own in by_fold:
        rows = one.flat(of_fold)
        decided = own.decide(scores[rows], np.full(rows.sum(), one.image), one.share.ravel()[rows])
        sets[rows] = decided.sets
        score[rows] = malignancy(own.probabilities(scores[rows]), own.cancer)
        at_recorded[rows] = False if own.referral is None else score[rows] >= own.referral
        refer[rows] = at_recorded[rows] if decided.refer is None else decided.refer
    amounts = np.stack([sets[np.arange(len(truth)), truth], refer, refer, at_recorded], axis=1)
    ratios = bootstrap.ratios(amounts, np.stack([everyone, ill, ~ill, ill], axis=1))
    names = ("coverage", "cancers_referred", "benign_referred", "cancers_at_recorded_threshold")
    for name, ratio in zip(names, ratios, strict=True):
        result |= ratio.to_json(name, bootstrap.level)
    amounts = np.stack([sets.sum(axis=1), score], axis=1)
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
    aggregate: str | None = None,
) -> dict[str, Any]:
    """Predict validation and test, write `predictions.csv`, `calibration.json` and `metrics.json`, return the metrics.

    The calibration is fitted on the validation split alone; of a cross-fitted run on all out-of-fold predictions, and
    each fold is measured with one that was fitted on the others.
    """
    opened = open_run(run, root, dataset, cache, device)
    recipe, schema = opened.recipe, opened.dataset.schema
    wanted, seed, classes, malignant = recipe.evaluation, recipe.seed, schema.classes, schema.malignant
    tables, predicted, arrays, measured = [], {}, {}, {}
    # In a cross-fitted run every image is predicted by the member that hasn't seen it; there is no other split.
    fitted_on = "test" if FOLD in opened.split else "val"
    measured_on = "test" if "test" in set(opened.split["split"]) else fitted_on
    if aggregate is not None:
        if measured_on == "val":
            raise DataError(f"{run.path} has no test split, so there is nothing to measure by {aggregate}")
        refuse_unnamed(aggregate, opened.rows(measured_on))
    for split in dict.fromkeys((fitted_on, measured_on)):
        examples, patients = opened.examples(split), opened.patients(split)
        predicted[split] = predict_split(opened, split, examples, effects=split == fitted_on)
        probabilities = predicted[split].inputs[AS_RECORDED].probabilities[0]
        tables.append(prediction_table(examples.image_ids, split, examples.labels, probabilities, classes))
        arrays[split] = (examples.labels, probabilities, Bootstrap(patients, wanted.bootstrap, seed))
        bootstrap = Bootstrap(patients, wanted.bootstrap, seed, label="bootstrap")
        measured[split] = metrics_with_intervals(examples.labels, probabilities, bootstrap, classes, malignant)
    write_csv(run.path / "predictions.csv", pd.concat(tables, ignore_index=True))
    validation, test = predicted[fitted_on], predicted[measured_on]
    labels, probabilities, resampled = arrays[measured_on]

    def fit(rows: NDArray[np.bool_], samples: int) -> Calibration:
        truth, scores, bootstrap = arrays[fitted_on]
        targets = wanted.coverage, wanted.referral_sensitivity
        thresholds = []
        for one in (every.of(rows) for every in validation.inputs.values()):
            if one.group is not None and len(one.places):
                drawn = one.probabilities.reshape(-1, len(classes))
                found = fit_thresholds(one.group, one.flat(truth), drawn, classes, malignant, *targets, one.draws)
                thresholds.append(found)
        bootstrap = Bootstrap(bootstrap.codes[rows], samples, seed)
        effects = validation.field_effects
        return fit_calibration(truth[rows], scores[rows], bootstrap, classes, malignant, *targets, thresholds, effects)

    calibration = fit(np.ones(len(arrays[fitted_on][0]), dtype=bool), wanted.bootstrap)
    write_json(run.calibration_file, calibration.to_json())
    # The last split of the loop is the one that is measured.
    by_fold, folds = [], examples.folds
    if folds is not None:
        # What is measured had no part in the calibration either.
        by_fold = [(folds == fold, fit(folds != fold, 0)) for fold in np.unique(folds)]
    leaks = leak_remarks(opened.split, schema.unit) if recipe.data.allow_leak else []
    if measured_on == "test":
        result = measured["test"]
        result["calibrated"] = measure_calibrated(calibration, labels, probabilities, resampled, by_fold)
    else:
        result = no_metrics(classes, malignant, NOT_MEASURED)
    metrics = {
        **result,
        # Without a test split of the images that the thresholds were fitted on: enough to see whether missing metadata
        # mean benign to the model.
        "availability": measure_availability(calibration, test.inputs, labels, resampled, by_fold),
        "remarks": [*result["remarks"], *leaks],
        "split": measured_on,
        "protocol": recipe.data.protocol,
        "dataset": schema.title,
        "drawn": schema.synthetic,
        "unit": schema.unit,
        "method": recipe.model.method,
        "leakage": leakage(opened.dataset, opened.split),
    }
    if folds is None:
        metrics["validation"] = measured["val"]
    else:
        metrics["folds"] = measure_folds(labels, probabilities, folds, classes, malignant)
    if aggregate is not None:
        metrics["aggregated"] = measure_aggregated(
            aggregate, opened.rows(measured_on), labels, probabilities, resampled, classes, malignant
        )
    if opened.model.reads_image:
        metrics["out_of_scope"] = fit_run(opened, validation.vectors, test.vectors if measured_on == "test" else None)
    write_json(run.metrics_file, metrics)
    return metrics


def measure_folds(
    labels: NDArray[np.int64],
    probabilities: Floats,
    folds: NDArray[np.int64],
    classes: Sequence[str],
    malignant: Sequence[str],
) -> dict[str, Any]:
    """Return the headline measures of each fold (N,), with mean and standard deviation over those where defined."""
    each = [
        compute_metrics(labels[folds == one], probabilities[folds == one], classes, malignant)
        for one in np.unique(folds)
    ]
    result: dict[str, Any] = {"count": len(each)}
    for name in HEADLINE_MEASURES:
        values = [found[name] for found in each]
        known = [value for value in values if value is not None]
        mean, sd = np.mean(known) if known else None, np.std(known, ddof=1) if len(known) > 1 else None
        result[name] = {"values": values, "mean": mean and float(mean), "sd": sd and float(sd)}
    return result


def refuse_unnamed(by: str, rows: pd.DataFrame) -> None:
    """Refuse to aggregate by `lesion` or `patient` where no row names one."""
    if rows[f"{by}_id"].isna().all():
        raise DataError(f"the data set names no {by}: nothing to aggregate by")


def measure_aggregated(
    by: str,
    rows: pd.DataFrame,
    labels: NDArray[np.int64],
    probabilities: Floats,
    bootstrap: Bootstrap,
    classes: Sequence[str],
    malignant: Sequence[str],
) -> dict[str, Any]:
    """Measure lesions or patients instead of images: each counts once, with the mean of its images' probabilities.

    One whose images have different labels is left out, and an image without an id counts alone.
    """
    refuse_unnamed(by, rows)
    named = rows[f"{by}_id"].notna().to_numpy()
    # A lesion's number may be counted anew for each patient.
    ids = ["patient_id", "lesion_id"] if by == "lesion" else ["patient_id"]
    units = rows.groupby(ids, dropna=False, sort=False).ngroup().to_numpy()
    units = pd.factorize(np.where(named, units, -1 - np.arange(len(rows))))[0]
    size = int(units.max()) + 1
    counts = np.bincount(units, minlength=size)
    means = group_sums(probabilities, units, size) / counts[:, None]
    first = pd.Series(units).drop_duplicates().index.to_numpy()
    agree = np.bincount(units[labels == labels[first][units]], minlength=size) == counts
    kept, left_out = bootstrap.codes[first][agree], int((~agree).sum())
    if len(np.unique(kept)) < 2:
        raise DataError(f"less than two {by}s are left whose images have one label: nothing to measure")
    again = Bootstrap(kept, bootstrap.samples, bootstrap.seed, bootstrap.level)
    metrics = metrics_with_intervals(labels[first][agree], means[agree], again, classes, malignant)
    if left_out:
        metrics["remarks"].append(f"{left_out} {by}s are left out, since the labels of their images differ")
    return metrics | {"by": by, "images": int(counts[agree].sum()), "left_out": left_out}


def prediction_table(
    image_ids: tuple[str, ...], split: str, labels: np.ndarray, probabilities: np.ndarray, classes: tuple[str, ...]
) -> pd.DataFrame:
    """Return rows of `predictions.csv`: image_id, split, label, predicted, prob_<CLASS>."""
    names = np.array(classes, dtype=object)
    preds = names[probabilities.argmax(axis=1)]
    table = pd.DataFrame({"image_id": image_ids, "split": split, "label": names[labels], "predicted": preds})
    return pd.concat([table, pd.DataFrame(probabilities, columns=[f"prob_{name}" for name in classes])], axis=1)
