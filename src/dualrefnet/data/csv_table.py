"""Anybody's data set: one CSV, a folder of images, and a small YAML file that says what the columns mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dualrefnet.data.adapters import Dataset, other_columns, read_csv
from dualrefnet.data.schema import DatasetSchema, Kind, MetadataField, normalise, refuse_forbidden_features
from dualrefnet.errors import DataError

DEFAULT_DESCRIPTION = "dataset.yaml"
# Names of columns between whose values anybody would compare results.
_SUBGROUPS = re.compile(r"age|sex|gender|race|ethnicity|skin_?(type|tone)|fit[zs]patrick|site|region", re.IGNORECASE)


class TableDescription(BaseModel):
    """The YAML file of a `csv_table` data set.

    Attributes:
        title: name for people.
        table: the CSV, relative to the data set's folder.
        images: the folder to which the paths in the `image` column are relative.
        image: column with the image's file name or path.
        label: column with the class.
        patient: column that names the patient (strongly advised: without it a patient may be on both sides).
        lesion: column that names the lesion.
        classes: the labels in the order of the model's outputs; empty: those in the table, sorted.
        malignant: the classes that are cancer.
        class_names: label -> what it stands for, for people.
        metadata: the metadata fields.
        licence: of the data.
    """

    model_config = ConfigDict(extra="forbid")

    title: str = "own data"
    table: str = "table.csv"
    images: str = "."
    image: str = "image"
    label: str = "label"
    patient: str | None = None
    lesion: str | None = None
    classes: tuple[str, ...] = ()
    malignant: tuple[str, ...] = ()
    class_names: dict[str, str] = Field(default_factory=dict)
    metadata: tuple[MetadataField, ...] = Field(default_factory=tuple)
    licence: str = ""


def read_description(path: Path) -> TableDescription:
    """Read the YAML file.

    Raises:
        DataError: it is missing, unreadable, isn't YAML, or has unknown keys or wrong values.
    """
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
        # A misspelt key is also a missing one: say the first.
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        where = ".".join(map(str, first["loc"])) or "the file"
        legal = TableDescription.model_fields if len(first["loc"]) == 1 else MetadataField.model_fields
        said = (
            f"unknown key; the keys there are {', '.join(legal)}"
            if first["type"] == "extra_forbidden"
            else first["msg"]
        )
        raise DataError(f"{path}: {where}: {said}") from None


def load(root: Path, description_file: Path | None = None) -> Dataset:
    """Read a described table.

    Args:
        root: the data set's folder.
        description_file: the YAML file; None: `dataset.yaml` in `root`.

    Raises:
        DataError: the description or the table is not what it must be.
    """
    description = read_description(description_file or root / DEFAULT_DESCRIPTION)
    raw = read_csv(root / description.table, dtype=str, keep_default_na=False, na_values=[""])
    named = [description.image, description.label, description.patient, description.lesion]
    used = [field.name for field in description.metadata if field.name in named]
    if used:
        raise DataError(
            f"{', '.join(used)} can't be a metadata field: the column is the image, the label, the patient or the lesion"
        )
    named += [field.name for field in description.metadata]
    absent = [column for column in named if column and column not in raw.columns]
    if absent:
        raise DataError(
            f"{root / description.table} has no column {', '.join(absent)}; it has: {', '.join(raw.columns)}"
        )
    if len(raw) == 0:
        raise DataError(f"{root / description.table} has no rows")
    if raw[description.image].isna().any():
        raise DataError(f"{int(raw[description.image].isna().sum())} rows of {root / description.table} name no image")
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
    others = other_columns(raw, [name for name in named if name])
    folder = (root / description.images).resolve()
    files = [folder / name for name in raw[description.image]]
    raw["image_path"] = [str(file) if file.is_file() else None for file in files]
    table, remarks = normalise(
        raw.assign(
            image_id=raw[description.image].str.replace(r"\.\w+$", "", regex=True),
            label=raw[description.label],
            patient_id=raw[description.patient] if description.patient else None,
            lesion_id=raw[description.lesion] if description.lesion else None,
        ),
        schema,
    )
    if not description.patient:
        remarks.append("no column names the patient: photographs of one person may stand on both sides of a split")
    return Dataset(table, schema, root, remarks, others)


def describe(table: pd.DataFrame, columns: list[str]) -> tuple[MetadataField, ...]:
    """Guess the metadata fields of a table: what a person would say who looked at the columns.

    A column of numbers with more than ten values is numeric; one with only yes/no values is boolean; others are
    categorical, their values learned from the training rows. Results are compared between the values of age, sex, skin
    type,
    ethnicity and body site, if a column is called so.

    Raises:
        DataError: a column is missing, holds the answer or names the patient, or is free text (more than 50 values).
    """
    fields = []
    kind: Kind
    refuse_forbidden_features(columns)
    for name in columns:
        if name not in table.columns:
            raise DataError(f"the table has no column {name!r}; it has: {', '.join(map(str, table.columns))}")
        values = table[name].dropna()
        words = {str(value).strip().lower() for value in values}
        numbers = pd.to_numeric(values, errors="coerce")
        numeric = len(values) > 0 and bool(numbers.notna().all())
        if words and words <= {"true", "false", "yes", "no", "y", "n", "0", "1", "0.0", "1.0"}:
            kind = "boolean"
        elif numeric and values.nunique() > 10:
            kind = "numeric"
        elif values.nunique() > 50:
            raise DataError(
                f"{name!r} has {values.nunique()} different values: free text or an id, not a metadata field"
            )
        else:
            kind = "categorical"
        fields.append(MetadataField(name=name, kind=kind, subgroup=_SUBGROUPS.fullmatch(name) is not None))
    return tuple(fields)
