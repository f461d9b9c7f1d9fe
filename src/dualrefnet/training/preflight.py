"""What can be known to go wrong with a training before torch is imported, an image is read or a folder is made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.check import check_table, crossing_ids, identical_images
from dualrefnet.data.csv_table import same_files
from dualrefnet.data.metadata import missingness_warning
from dualrefnet.data.protocols import check_protocol, split_dataset
from dualrefnet.data.schema import Dataset
from dualrefnet.errors import DataError, WeightsError
from dualrefnet.models.registry import METHODS, check_method
from dualrefnet.progress import warn
from dualrefnet.recipe import Recipe
from dualrefnet.run import Run, refuse_taken

# Findings of `check` in a line.
SHOWN = 3


def check_start(recipe: Recipe, out: Path, resume: bool = False, overwrite: bool = False) -> Dataset | None:
    """Refuse a training that can't begin or go on, warn of what may spoil it; return the data set, if it was read."""
    check_method(recipe)
    # Of several processes the first one has made the folder, perhaps, and one warning is enough.
    first = os.environ.get("RANK", "0") == "0"
    if first:
        refuse_taken(out, resume, overwrite)
    if resume and Run(out).finished:
        return None
    dataset = check_recipe(recipe)
    for message in _findings(recipe, dataset) if first else ():
        warn(message)
    return dataset


def _findings(recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    """Yield what `audit` and `check` find without decoding an image, in three lines at most, the worst first."""
    data = recipe.data
    task = dataset.of_task(data.keep, data.classes)
    if METHODS[recipe.model.method].reads_metadata:
        shortcut = missingness_warning(recipe.metadata, task.table, task.schema)
        if shortcut is not None:
            yield shortcut
    if data.protocol == "paper":
        leaks = crossing_ids(task, split_dataset(task, "paper"))
        yield f"`dualrefnet audit` finds {'; '.join(leak.message for leak in leaks)}"
    there = dataset.with_image
    hashes = there["same_file"] if "same_file" in there else same_files(there["image_path"])
    copies = identical_images(zip(there["image_id"], there["label"], hashes.fillna(""), strict=True))
    # Notes of the adapter are told when the data are read for the training.
    told = {check for check, _ in dataset.notes}
    findings = [finding for finding in (*check_table(dataset), *copies) if finding.check not in told]
    found = [
        f"{finding.check}: {finding.message}"
        for level in ("FAIL", "WARN")
        for finding in findings
        if finding.level == level
    ]
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        yield f"`dualrefnet check` finds {'; '.join(found[:SHOWN])}{more}"


def check_recipe(recipe: Recipe) -> Dataset:
    """Refuse a recipe whose method, weights or data aren't there; return the data set, with all of its classes."""
    method, weights, data = check_method(recipe), recipe.model.weights, recipe.data
    if method.reads_image and weights not in ("auto", "hub", "none") and not Path(weights).expanduser().is_file():
        raise WeightsError(f"there is no weights file {weights}; give a file, or auto, hub or none (from scratch)")
    whole = load_dataset(data.dataset, data.root, data.description)
    dataset = whole.of_task(data.keep, data.classes)
    if (method.reads_image or data.rows == "with_image") and len(dataset.with_image) == 0:
        raise DataError(f"{dataset.no_image}; `dualrefnet check {data.dataset} --root {dataset.root}` says more")
    if len(dataset.schema.classes) < 2:
        raise DataError(f"{dataset.schema.title} has one class, {dataset.schema.classes[0]}, and nothing to learn")
    check_protocol(dataset, data.protocol, data.fold, data.folds, data.split_file, data.allow_leak)
    return whole
