"""External tests: a trained run or a bundle on a data set of another source, whose images and patients it never saw.

The model predicts as it is deployed: calibrated, with conformal sets and referral by the thresholds of its own run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.analysis.evaluate import measure_aggregated, refuse_unnamed
from dualrefnet.analysis.subgroups import measure_subgroups
from dualrefnet.data.adapters import ADAPTERS, load_dataset
from dualrefnet.data.csv_table import same_files
from dualrefnet.data.protocols import FOLD
from dualrefnet.data.schema import Dataset, DatasetSchema, groups
from dualrefnet.data.store import map_ahead
from dualrefnet.deploy.hub import is_bundle
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import DataError, ImageError
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.comparison import metrics_with_intervals
from dualrefnet.files import write_csv, write_json
from dualrefnet.models.inference import resolve_device
from dualrefnet.progress import note, warn
from dualrefnet.recipe import suggestion
from dualrefnet.run import Run
from dualrefnet.runtime.metadata import MetadataError, by_fold, fold
from dualrefnet.runtime.prediction import Prediction

BATCH = 32
# Of a bundle, which doesn't say how its run was measured.
SAMPLES = 1000


class Seen(NamedTuple):
    """Which of N rows the model was trained on."""

    images: NDArray[np.bool_]  # (N,)
    patients: NDArray[np.bool_]  # (N,) another image of the patient was
    unknown: str = ""  # why it can't be told, or not of all


def load_external(name: str, root: Path | None, description: Path | None = None) -> Dataset:
    """Read a data set by the name of its adapter, or a folder with a `csv_table`."""
    if name in ADAPTERS:
        return load_dataset(name, root, description)
    if not Path(name).is_dir():
        raise DataError(f"{name} is neither a folder with dataset.yaml nor a data set: {', '.join(ADAPTERS)}")
    if root is not None:
        raise DataError(f"{name} is the data set's folder itself: leave out --root")
    return load_dataset("csv_table", name, description)


def evaluate_external(
    model: Path,
    dataset: Dataset,
    out: Path | None = None,
    mapping: Sequence[str] = (),
    allow_seen: bool = False,
    aggregate: str | None = None,
    device: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Predict a data set and measure it; write `predictions.csv`, `metrics.json` and, if there are, `subgroups.csv`.

    `mapping` holds CLASS=LABEL: a class of the model and what the data set calls it. With `allow_seen` images and
    patients of the training are measured too, which the result then says.
    """
    run, schema = None if is_bundle(model) else Run(model), dataset.schema
    if out is None and run is None:
        raise DataError(f"{model} is a bundle, whose files aren't to be changed: name a folder with --out")
    name = schema.name if schema.name != "csv_table" else re.sub(r"\W+", "-", dataset.root.resolve().name)
    out = out or model / "external" / name
    for message in dataset.warnings:
        warn(message)
    predictor = Predictor.load(model, device or ("cpu" if run is None else str(resolve_device(None))))
    grouped = run.recipe.data.classes if run is not None else {}
    class_of = map_classes(schema, predictor.classes, predictor.class_names, grouped, mapping)
    known = dataset.with_image if predictor.reads_image else dataset.table
    if not len(known):
        raise DataError(dataset.no_image)
    rows = known[known["label"].isin(class_of)]
    group = groups(dataset.table, schema)[rows.index]
    if group.nunique() < 2:
        raise DataError(f"{schema.title} has {len(rows)} images of {group.nunique()} {schema.unit}s: two are needed")
    if aggregate is not None:
        refuse_unnamed(aggregate, rows)
    left_out = known["label"][~known["label"].isin(class_of)].value_counts().to_dict()
    seen = find_seen(run, dataset, rows, group)
    records, absent, remarks = read_records(dataset, rows, predictor)
    remarks += refuse_seen(seen, rows, f"{schema.title} were seen in the training of {model}", allow_seen)
    if len(known) < len(dataset.table):
        remarks.append(f"{len(dataset.table) - len(known)} rows without an image are left out")
    if left_out:
        counts = ", ".join(f"{label} ({count})" for label, count in left_out.items())
        remarks.append(f"labels that are no class of the model are left out: {counts}; --map CLASS=LABEL names one")
    if absent:
        remarks.append(f"{schema.title} has no {', '.join(absent)}: missing for every image")
    predictions = predict_rows(predictor, list(rows["image_path"]), records, workers)
    failed = np.array([isinstance(one, str) for one in predictions])
    if failed.any():
        first = f"{rows['image_id'][failed].iloc[0]}: {next(one for one in predictions if isinstance(one, str))}"
        remarks.append(f"{int(failed.sum())} images can't be predicted and are left out, the first, {first}")
        if group[~failed].nunique() < 2:
            raise DataError(f"too few images of {schema.title} are left: {remarks[-1]}")
    rows, group, good = rows[~failed], group[~failed], [one for one in predictions if isinstance(one, Prediction)]
    table = prediction_rows(rows["image_id"], group, rows["label"].map(class_of), good)
    labels = table["label"].map(predictor.classes.index).to_numpy(dtype=np.int64)
    scores = table[[f"prob_{name}" for name in predictor.classes]].to_numpy(dtype=float)
    samples, seed = (run.recipe.evaluation.bootstrap, run.recipe.seed) if run is not None else (SAMPLES, 0)
    classes = predictor.classes, predictor.malignant
    bootstrap = Bootstrap(group, samples, seed, label="bootstrap")
    metrics = metrics_with_intervals(labels, scores, bootstrap, *classes)
    metrics |= {
        "remarks": [*metrics["remarks"], *remarks],
        "protocol": "external",
        "dataset": schema.title,
        "drawn": schema.synthetic,
        "unit": schema.unit,
        "model": predictor.name,
        "classes": class_of,
        "left_out": left_out,
        "missing_fields": absent,
        "seen": {"images": int(seen.images.sum()), "patients": int(seen.patients.sum()), "unknown": seen.unknown},
        "deployed": measure_decisions(predictor, good, labels, bootstrap),
    }
    if aggregate is not None:
        metrics["aggregated"] = measure_aggregated(aggregate, rows, labels, scores, bootstrap, *classes)
    write_csv(out / "predictions.csv", table)
    write_json(out / "metrics.json", metrics)
    if any(field.subgroup for field in schema.fields):
        of_model = {"classes": classes[0], "malignant": classes[1], "class_names": predictor.class_names}
        of_image = pd.Series(group.to_numpy(), rows["image_id"])
        found = measure_subgroups(table, rows, of_image, schema.model_copy(update=of_model), samples, seed)
        write_csv(out / "subgroups.csv", found.frame())
        note(
            f"subgroups: of {found.looked_at} gaps {found.flagged} have an interval without 0, {found.by_chance:.1f} "
            f"would by chance; {out / 'subgroups.csv'}"
        )
    note(f"the external test is in {out}")
    return metrics


def map_classes(
    schema: DatasetSchema,
    classes: Sequence[str],
    class_names: Mapping[str, str],
    grouped: Mapping[str, Sequence[str]],
    given: Sequence[str] = (),
) -> dict[str, str]:
    """Return label of the data set -> class of the model: as `given` (CLASS=LABEL), else by name, words or group."""
    chosen: dict[str, str] = {}
    for text in given:
        name, equals, label = (part.strip() for part in text.partition("="))
        there = f"classes of the model: {', '.join(classes)}; labels of {schema.title}: {', '.join(schema.classes)}"
        if not equals:
            raise DataError(f"--map {text} isn't CLASS=LABEL, such as MEL=melanoma; {there}")
        if name not in classes or label not in schema.classes:
            near = suggestion(name, classes) if name not in classes else suggestion(label, schema.classes)
            near = f"; did you mean {label}={name}?" if name in schema.classes and label in classes else near
            raise DataError(f"--map {text} must be CLASS=LABEL{near} ({there})")
        if chosen.setdefault(label, name) != name:
            raise DataError(f"--map gives {label} two classes, {chosen[label]} and {name}; it can have one")
    words = {text: name for name, text in class_names.items() if text and name in classes}
    words |= {member: group for group, members in grouped.items() for member in members}
    known = by_fold(words | {name: name for name in classes})
    for label in schema.classes:
        called = (fold(word) for word in (label, schema.class_names.get(label, "")))
        found = next((known[word] for word in called if word in known), None)
        if found is not None:
            chosen.setdefault(label, found)
    if not chosen:
        raise DataError(
            f"no label of {schema.title} ({', '.join(schema.classes)}) is a class of the model ({', '.join(classes)}): "
            "say which is which with --map CLASS=LABEL"
        )
    return chosen


def find_seen(run: Run | None, dataset: Dataset, rows: pd.DataFrame, group: pd.Series) -> Seen:
    """Find the rows that the run, or one it started from, was trained on: by bytes, within a data set by ids."""
    seen = Seen(np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool))
    if run is None:
        return seen._replace(unknown="a bundle doesn't tell which images it was trained on: none is known to be new")
    runs, unknown = [run], []
    while (start := runs[-1].recipe.model.init_from) is not None:
        source = Run(Path(start).expanduser())
        if not (source.path / "recipe.yaml").is_file() or source in runs:
            unknown.append(f"the run {start} that it started from isn't there: what that was trained on isn't checked")
            break
        runs.append(source)
    for one in runs:
        found = _seen_by(one, dataset, rows, group)
        seen = Seen(seen.images | found.images, seen.patients | found.patients)
        unknown += [found.unknown] if found.unknown else []
    return Seen(seen.images, seen.patients & ~seen.images, "; ".join(unknown))


def _seen_by(run: Run, dataset: Dataset, rows: pd.DataFrame, group: pd.Series) -> Seen:
    none = np.zeros(len(rows), dtype=bool)
    recipe, split = run.recipe, run.split
    # In a cross-fitted run every image trains some of the members.
    trained = split if FOLD in split else split[split["split"] != "test"]
    schema, images, unknown = dataset.schema, none, ""
    # The ids of a sample mean nothing: each sample has the same.
    about = run.model["dataset"]
    same = (about["name"], about["title"]) == (schema.name, schema.title) and not schema.synthetic
    if same:
        images = rows["image_id"].isin(trained["image_id"]).to_numpy()
    try:
        data = load_dataset(recipe.data.dataset, recipe.data.root, recipe.data.description)
        table = data.with_image[data.with_image["image_id"].isin(trained["image_id"])]
        hashes = same_files(pd.concat([rows["image_path"], table["image_path"]], ignore_index=True))
        copies = hashes[: len(rows)].isin(hashes[len(rows) :].dropna()).to_numpy()
        images = images | copies
        patients = groups(dataset.table, schema).isin(group[copies])[rows.index].to_numpy()
    except DataError as error:
        unknown, patients = f"copies of training images under other names can't be found ({error})", none
    if same:
        patients = patients | group.isin(trained["patient_id"]).to_numpy()
    return Seen(images, patients, unknown)


def refuse_seen(seen: Seen, rows: pd.DataFrame, where: str, allowed: bool) -> list[str]:
    """Raise a DataError if the model was trained on some of the rows; where that is allowed, return what to say."""
    found, remarks = seen.images | seen.patients, [seen.unknown] if seen.unknown else []
    if not found.any():
        return remarks
    count = f"{int(seen.images.sum())} images, and {int(seen.patients.sum())} others of their patients, of {where}"
    if not allowed:
        raise DataError(
            f"{count}, the first: {rows['image_id'][found].iloc[0]}; a test on them says nothing of new patients. "
            "Leave them out of the table (or give another data set another title), or accept it with --allow-seen, "
            "which the result then says"
        )
    return [*remarks, f"{count} (--allow-seen): the numbers are too high for new patients"]


def read_records(
    dataset: Dataset, rows: pd.DataFrame, predictor: Predictor
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Return the metadata of every row, the model's fields that the data set lacks, and what was not believed."""
    records: list[dict[str, Any]] = [{} for _ in range(len(rows))]
    absent, remarks = [], []
    declared = {field.name for field in dataset.schema.fields}
    for index, field in enumerate(predictor.fields):
        source = dataset.table if field.name in declared else dataset.other_columns
        if field.name not in source:
            absent.append(field.name)
            continue
        invalid, text = 0, 0
        for record, value in zip(records, source[field.name][rows.index], strict=True):
            try:
                parsed = predictor.encoder.parse(index, value)
            except MetadataError:
                text += 1
                continue
            invalid += parsed.invalid is not None
            if parsed.value is not None:
                record[field.name] = value
        if text:
            raise DataError(f"{field.name} must be a number, and {text} rows hold text; is it the right column?")
        if invalid:
            remarks.append(f"{field.name}: {invalid} values that the model doesn't know are treated as missing")
    return records, absent, remarks


def predict_rows(
    predictor: Predictor, paths: Sequence[str | None], records: Sequence[Mapping[str, Any]], workers: int | None
) -> list[Prediction | str]:
    """Predict every row in batches; the reason where the image can't be read."""

    def prepare(path: str | None) -> NDArray[np.uint8] | str | None:
        try:
            return predictor.prepare(Path(path)) if path is not None and predictor.reads_image else None
        except (ImageError, DataError) as error:
            return str(error)

    result: list[Prediction | str] = []
    waiting: list[tuple[int, NDArray[np.uint8] | None]] = []

    def predict() -> None:
        found = predictor.predict_arrays([image for _, image in waiting], [records[place] for place, _ in waiting])
        for (place, _), prediction in zip(waiting, found, strict=True):
            result[place] = prediction
        waiting.clear()

    for place, image in enumerate(map_ahead(prepare, list(paths), workers, 2 * BATCH, "predicting")):
        result.append(image if isinstance(image, str) else "")
        if not isinstance(image, str):
            waiting.append((place, image))
        if len(waiting) == BATCH:
            predict()
    if waiting:
        predict()
    return result


def prediction_rows(
    image_ids: pd.Series, group: pd.Series, labels: pd.Series, predictions: Sequence[Prediction]
) -> pd.DataFrame:
    """Return `predictions.csv`: as that of a run, and what the deployed model says of each image."""
    table = pd.DataFrame({"image_id": image_ids, "patient_id": group, "label": labels}).reset_index(drop=True)
    table["predicted"] = [one.label for one in predictions]
    for name in predictions[0].probabilities:
        table[f"prob_{name}"] = [one.probabilities[name] for one in predictions]
    table["likely"] = [" ".join(one.likely) for one in predictions]
    table["refer"] = [one.refer for one in predictions]
    table["out_of_scope"] = [one.out_of_scope for one in predictions]
    return table


def measure_decisions(
    predictor: Predictor, predictions: Sequence[Prediction], labels: NDArray[np.int64], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Measure what the thresholds of the run give here, with intervals; without what the model doesn't have."""
    everyone, truth = np.ones(len(labels), dtype=bool), [predictor.classes[label] for label in labels]
    ill = np.isin(truth, predictor.malignant)
    columns: dict[str, tuple[Any, NDArray[np.bool_]]] = {}
    if predictor.decision is not None:
        columns["coverage"] = [label in one.likely for label, one in zip(truth, predictions, strict=True)], everyone
        columns["mean_size"] = [len(one.likely) for one in predictions], everyone
    if all(one.refer is not None for one in predictions):
        refer = [bool(one.refer) for one in predictions]
        columns |= {"cancers_referred": (refer, ill), "benign_referred": (refer, ~ill)}
    if all(one.out_of_scope is not None for one in predictions):
        columns["out_of_scope"] = [float(one.out_of_scope or 0) > 1 for one in predictions], everyone
    result: dict[str, Any] = {}
    for name, (amounts, included) in columns.items():
        pair = np.array(amounts, dtype=float)[:, None], included[:, None]
        (found,) = bootstrap.ratios(*pair, proportions=name != "mean_size")
        result |= found.to_json(name, bootstrap.level)
    return result
