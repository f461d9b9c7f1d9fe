"""Any data set of your own: one CSV, a folder of images, and a small YAML file that says what the columns mean.

The other adapters read their CSV and list their images with the functions of this module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dualrefnet.data.schema import (
    Dataset,
    DatasetSchema,
    Kind,
    MetadataField,
    normalise,
    refuse_forbidden_features,
    require_columns,
)
from dualrefnet.errors import DataError

DEFAULT_DESCRIPTION = "dataset.yaml"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# Columns between whose values results are compared.
_SUBGROUPS = re.compile(r"age|sex|gender|race|ethnicity|skin_?(type|tone)|fit[zs]patrick|site|region", re.IGNORECASE)
_BOOLEANS = {"true", "false", "yes", "no", "y", "n", "0", "1", "0.0", "1.0"}


class TableDescription(BaseModel):
    """The YAML file of a `csv_table` data set."""

    model_config = ConfigDict(extra="forbid")

    title: str = "own data"  # name for people
    table: str = "table.csv"  # the CSV, relative to the data set's folder
    images: str = "."  # the folder to which the paths in the `image` column are relative
    image: str = "image"  # column with the image's file name or path
    label: str = "label"  # column with the class
    # column with the patient's id (strongly advised: without it one patient may be in several splits)
    patient: str | None = None
    lesion: str | None = None  # column with the lesion's id
    classes: tuple[str, ...] = ()  # the labels in the order of the model's outputs; empty: those in the table, sorted
    malignant: tuple[str, ...] = ()  # the classes that are cancer
    class_names: dict[str, str] = Field(default_factory=dict)  # label -> what it stands for
    metadata: tuple[MetadataField, ...] = Field(default_factory=tuple)  # the metadata fields
    licence: str = ""  # of the data


def read_description(path: Path) -> TableDescription:
    """Read the YAML file; raise a DataError if it is missing, isn't YAML, or has unknown keys or wrong values."""
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise DataError(f"there is no description {path}; docs/bring-your-own-data.md shows how to write one") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that doesn't exist.
        raise DataError(f"{path} isn't YAML: {str(error).splitlines()[0]}") from None
    try:
        return TableDescription.model_validate(values)
    except ValidationError as error:
        # A misspelt key is also a missing one: report the misspelling.
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        where = ".".join(map(str, first["loc"])) or "the file"
        reason = first["msg"]
        if first["type"] == "extra_forbidden":
            legal = TableDescription.model_fields if len(first["loc"]) == 1 else MetadataField.model_fields
            reason = f"unknown key; the keys there are {', '.join(legal)}"
        raise DataError(f"{path}: {where}: {reason}") from None


def load(root: Path, description_file: Path | None = None) -> Dataset:
    """Read the table in `root` that the YAML file (default: `dataset.yaml` in `root`) describes.

    Raises:
        DataError: the description or the table is not what it must be.
    """
    description = read_description(description_file or root / DEFAULT_DESCRIPTION)
    file, folder = root / description.table, (root / description.images).resolve()
    raw = read_text_csv(file)
    optional = [column for column in (description.patient, description.lesion) if column]
    ids, fields = [description.image, description.label, *optional], [field.name for field in description.metadata]
    used = [name for name in fields if name in ids]
    if used:
        raise DataError(
            f"{', '.join(used)} can't be a metadata field: it is the image, label, patient or lesion column"
        )
    require_columns(raw, ids + fields, str(file))
    if len(raw) == 0:
        raise DataError(f"{file} has no rows")
    images = raw[description.image]
    if images.isna().any():
        raise DataError(f"{int(images.isna().sum())} rows of {file} name no image")
    schema = DatasetSchema(
        name="csv_table",
        title=description.title,
        classes=description.classes or tuple(sorted(raw[description.label].dropna().unique())),
        malignant=description.malignant,
        class_names=description.class_names,
        fields=description.metadata,
        group_by="lesion_id" if description.lesion and not description.patient else "patient_id",
        licence=description.licence,
    )
    table, value_warnings = normalise(
        raw.assign(
            image_id=images.str.replace(r"\.\w+$", "", regex=True),
            image_path=images.map(lambda name: str(folder / name) if (folder / name).is_file() else None),
            label=raw[description.label],
            patient_id=raw[description.patient] if description.patient else None,
            lesion_id=raw[description.lesion] if description.lesion else None,
        ),
        schema,
    )
    notes = []
    if not description.patient:
        notes.append("no column names the patient: images of one person may be in several splits")
    others = other_columns(raw, ids + fields)
    return Dataset(table, schema, root, value_warnings, notes, others, (folder,), shared_lesions(table))


def describe(table: pd.DataFrame, columns: list[str]) -> tuple[MetadataField, ...]:
    """Guess the metadata fields of a table.

    A column with only yes/no values is boolean; one of numbers with more than ten values is numeric; others are
    categorical, their values learned from the training rows. Results are compared between the values of age, sex, skin
    type, ethnicity and body site, if a column is called so.

    Raises:
        DataError: a column is missing, holds the label, identifies the patient, or is free text (over 50 values).
    """
    refuse_forbidden_features(columns)
    require_columns(table, columns, "the table")
    fields = []
    for name in columns:
        values = table[name].dropna()
        words = {str(value).strip().lower() for value in values}
        numeric = len(values) > 0 and bool(pd.to_numeric(values, errors="coerce").notna().all())
        kind: Kind = "categorical"
        if words and words <= _BOOLEANS:
            kind = "boolean"
        elif numeric and values.nunique() > 10:
            kind = "numeric"
        elif values.nunique() > 50:
            raise DataError(f"{name!r} has {values.nunique()} different values: free text or an id, no metadata field")
        fields.append(MetadataField(name=name, kind=kind, subgroup=_SUBGROUPS.fullmatch(name) is not None))
    return tuple(fields)


def read_csv(path: Path, **options: object) -> pd.DataFrame:
    """Read a user's CSV; a DataError says what is wrong with it."""
    try:
        return pd.read_csv(path, **options)  # type: ignore[call-overload, no-any-return]
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} can't be read as CSV: {str(error).strip().splitlines()[-1]}") from None


def read_text_csv(path: Path) -> pd.DataFrame:
    """Read a CSV whose cells are all text, or missing where they are empty: `NA` may be a category."""
    return read_csv(path, dtype=str, keep_default_na=False, na_values=[""])


def other_columns(published: pd.DataFrame, known: Iterable[str]) -> pd.DataFrame:
    """Return the columns of a published table that aren't among the `known` ones; index 0..n-1."""
    return published.drop(columns=list(known), errors="ignore").reset_index(drop=True)


def index_images(folders: Iterable[Path]) -> dict[str, str]:
    """Map the stem of every image file in `folders` (not below them) to its path; refuse two files of one stem."""
    paths: dict[str, str] = {}
    for folder in folders:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            stem, suffix = os.path.splitext(entry.name)
            # A folder, or a link that leads nowhere, is no image.
            if suffix.lower() not in IMAGE_SUFFIXES or entry.name.startswith(".") or not entry.is_file():
                continue
            if stem in paths:
                raise DataError(f"two images are called {stem}: {paths[stem]} and {entry.path}; keep one of them")
            paths[stem] = entry.path
    return paths


def shared_lesions(table: pd.DataFrame) -> tuple[str, ...]:
    """Return the lesion ids that several patients use."""
    owners = table.groupby("lesion_id")["patient_id"].nunique()
    return tuple(map(str, owners.index[owners > 1]))
