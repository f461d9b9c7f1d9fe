"""The same as the command line in a few lines of Python, for notebooks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dualrefnet.data.csv_table import DEFAULT_DESCRIPTION, TableDescription, classes_of, describe
from dualrefnet.data.schema import require_columns
from dualrefnet.errors import DataError, in_python
from dualrefnet.files import write_text, write_yaml
from dualrefnet.progress import note
from dualrefnet.recipe import CROSS_FITTED, Recipe, load_recipe
from dualrefnet.run import Run, new_folder, refuse_taken
from dualrefnet.training.preflight import check_start


@in_python
def train(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **overrides: Any,
) -> Run:
    """Train and evaluate a recipe.

    Args:
        recipe: a YAML file, the name of a shipped recipe, a mapping or a `Recipe`.
        out: the run folder; None: `runs/<name of the recipe>`, with the time behind it if a finished run is there.
        resume: go on with an unfinished run.
        overwrite: replace the run in the folder.
        overrides: dotted keys with `__` for the dot, such as `training__epochs=3`.

    Returns:
        The finished run: `run.metrics`, `run.predictions`, `run.history`, `Predictor.load(run)`.

    Raises:
        DualRefNetError: with what to do about it.
    """
    checked = load_recipe(recipe, {key.replace("__", "."): value for key, value in overrides.items()})
    return _train(checked, Path(out) if out else new_folder(checked.name, resume, overwrite), resume, overwrite)


@in_python
def fit(
    dataframe: pd.DataFrame,
    *,
    image: str,
    label: str | Sequence[str],
    group: str | None = None,
    metadata: Sequence[str] = (),
    malignant: Sequence[str] = (),
    out: str | Path | None = None,
    folds: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **overrides: Any,
) -> Run:
    """Train DualRefNet on a table of one's own, with sensible defaults, which are printed.

    Args:
        dataframe: one row an image.
        image: column with the image's path.
        label: column with the class; or several, each called as a class and holding 1 in its rows, else 0.
        group: column that names the patient; a patient's images stay in one split.
        metadata: columns that describe the patient or the lesion; their kinds are guessed from the values.
        malignant: the classes that are cancer, for sensitivity and specificity of "malignant".
        out: the run folder; None: `runs/fit`, with the time behind it if a finished run is there. The table is kept
            beside it in `<out>-data/`, so that the run can be repeated.
        folds: cross-fit, 5 is usual: one model a fold of the patients, together an ensemble, so that every patient is
            tested once, by the model that hasn't seen them; takes as many times as long.
        resume: go on with an unfinished run.
        overwrite: replace the run in the folder.
        overrides: of the recipe, such as `training__epochs=3`.

    Returns:
        The finished run.

    Raises:
        DataError: a column is missing, can't be a feature, or images don't exist.
        DualRefNetError: see the subclasses.
    """
    out = Path(out) if out else new_folder("fit", resume, overwrite)
    labels = [str(name) for name in _names(label)]
    used = (image, *labels, group, *_names(metadata))
    table = dataframe.rename(columns=str)
    columns = [str(column) for column in dict.fromkeys(used) if column is not None]
    require_columns(table, columns, "the table")
    table = table[columns]
    image, group = str(image), None if group is None else str(group)
    unnamed = ~table[image].map(lambda path: isinstance(path, str | os.PathLike) and str(path) != "")
    if unnamed.any():
        raise DataError(f"{int(unnamed.sum())} rows of the table name no image in the column {image}")
    fields = describe(table, [str(name) for name in _names(metadata)])
    for field in fields:
        note(f"{field.name}: {field.kind}")
    refuse_taken(out, resume, overwrite)
    paths = [os.path.abspath(path) for path in table[image]]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else "."
    description = TableDescription(
        title=out.name,
        images=folder,
        image=image,
        label=labels[0] if len(labels) == 1 else tuple(labels),
        patient=group,
        malignant=tuple(map(str, _names(malignant))),
        metadata=fields,
        classes=classes_of(table[labels[0]]) if len(labels) == 1 else tuple(labels),
    )
    data = out.with_name(out.name + "-data")
    table = table.drop(columns=image).assign(**{image: [os.path.relpath(path, folder) for path in paths]})
    # About 10,000 image views: enough to fine-tune, and some minutes on a CPU.
    epochs = max(5, min(30, round(10_000 / max(len(dataframe), 1))))
    recipe = {
        "name": re.sub(r"[^A-Za-z0-9_.-]+", "-", out.name).strip("-_.")[:100] or "fit",
        "data": {"dataset": "csv_table", "root": str(data), "protocol": "grouped"},
        # Without flags of what is missing, which may tell the class: a model that shall answer with whatever is given.
        "metadata": {"tier": "M2", "imputation": "token"} if fields else {"tier": "M0"},
        "modality_dropout": {"fields": 0.3, "pattern": 0.3, "metadata": 0.25, "image": 0.25} if fields else {},
        "model": {"method": "dualrefnet", "backbone": "efficientnet_lite0", "views": 8, "dropout": 0.2},
        "loss": {"classification": 1.0, "penalty_strength": 0.003, "class_weights": "logit_adjustment"},
        "training": {"epochs": epochs, "selection": "last"},
    }
    changed = {} if folds is None else {"data.protocol": CROSS_FITTED, "data.folds": folds}
    chosen = load_recipe(recipe, changed | {key.replace("__", "."): value for key, value in overrides.items()})
    # As the names of files and classes are, for the reader of data sets; it isn't a result.
    write_text(data / description.table, table.to_csv(index=False))
    write_yaml(data / DEFAULT_DESCRIPTION, description.model_dump(mode="json", exclude_none=True))
    apart = f"no {group} in two splits" if group else "images divided one by one, since no group was given"
    note(
        f"{len(description.classes)} classes; {apart}; {chosen.model.backbone} at {chosen.image.size} px, "
        f"{chosen.training.epochs} epoch{'s' * (chosen.training.epochs != 1)}"
    )
    return _train(chosen, out, resume, overwrite)


def _train(recipe: Recipe, out: Path, resume: bool, overwrite: bool) -> Run:
    dataset = check_start(recipe, out, resume, overwrite)
    # Torch takes seconds to import.
    from dualrefnet.training.train import train_recipe

    return train_recipe(recipe, out, resume, overwrite=overwrite, dataset=dataset)


def _names(given: Sequence[Any]) -> list[Any]:
    """Return one name or several as a list."""
    return [given] if isinstance(given, str | int) else list(given)
