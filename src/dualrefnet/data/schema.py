"""The lesion table and its schema: what every data set looks like once its adapter has read it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dualrefnet.errors import DataError
from dualrefnet.runtime.metadata import MetadataError, by_fold, fold, normalise_value, parse_number

Kind = Literal["numeric", "boolean", "categorical"]
FieldTier = Literal["M1", "M2"]

ID_COLUMNS = ("image_id", "image_path", "label", "patient_id", "lesion_id")
BOOLEAN_VALUES = ("False", "True")

# Names under which the answer, or what a physician did because of the answer, is found in published tables.
# A feature with such a name is refused: `biopsed` alone says "cancer" for 1,089 of 1,089 cancers of PAD-UFES-20.
LABEL_DERIVED_NAMES = frozenset(
    """biopsed biopsied biopsy diagnostic diagnosis dx dx_type label target class malignant benign_malignant
    diagnosis_confirm_type histopathology pathology melanocytic outcome""".split()  # noqa: SIM905
)
IDENTIFIER_NAMES = frozenset(["patient_id", "lesion_id", "image_id", "img_id", "image", "image_path", "isic_id", "id"])


class MetadataField(BaseModel):
    """One question of the patient's form.

    Attributes:
        name: column of the lesion table.
        kind: numeric, boolean (`True` / `False`) or categorical.
        unit: unit of a numeric field, such as `years` or `mm`.
        tier: M1 if it is recorded for every patient, M2 if it may be missing.
        categories: legal values of a categorical field, in column order; empty: learned from the training rows.
        missing_codes: strings that stand for "asked, not known", such as `UNK`.
        aliases: spellings of one value, such as BRASIL -> BRAZIL.
        minimum: smallest believable number.
        maximum: largest believable number.
        description: the question in plain words, for forms and documents.
        subgroup: compare results between its values: do they hold for everyone?
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Kind
    unit: str | None = None
    tier: FieldTier = "M2"
    categories: tuple[str, ...] = ()
    missing_codes: tuple[str, ...] = ()
    aliases: dict[str, str] = Field(default_factory=dict)
    minimum: float | None = None
    maximum: float | None = None
    description: str = ""
    subgroup: bool = False

    @model_validator(mode="after")
    def _may_be_a_feature(self) -> MetadataField:
        refuse_forbidden_features([self.name])
        return self


class DatasetSchema(BaseModel):
    """What the columns of a lesion table mean.

    Attributes:
        name: the adapter's name.
        title: name for people.
        classes: labels in the order of the model's outputs.
        malignant: the classes among them that are cancer.
        class_names: label -> what it stands for, for people.
        fields: the metadata fields.
        group_by: the column that must not cross a split.
        licence: under which the data may be used.
        citation: what to cite.
        official_rows: number of rows of the official release; None if there is none.
        drawn: True if a program drew the images; every table and page says so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    classes: tuple[str, ...]
    malignant: tuple[str, ...] = ()
    class_names: dict[str, str] = Field(default_factory=dict)
    fields: tuple[MetadataField, ...] = ()
    group_by: Literal["patient_id", "lesion_id"] = "patient_id"
    licence: str = ""
    citation: str = ""
    official_rows: int | None = None
    drawn: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> DatasetSchema:
        names = [field.name for field in self.fields]
        for what, values in (("class", list(self.classes)), ("metadata field", names)):
            doubles = {value for value in values if values.count(value) > 1}
            if doubles:
                raise DataError(f"{what} named twice: {', '.join(sorted(doubles))}")
        for key, labels in (("malignant", set(self.malignant)), ("class_names", set(self.class_names))):
            unknown = labels - set(self.classes)
            if unknown:
                raise DataError(
                    f"{key} names no class: {', '.join(sorted(unknown))}; classes: {', '.join(self.classes)}"
                )
        return self

    @property
    def unit(self) -> Literal["patient", "lesion"]:
        """What must not cross a split and is resampled, in a word."""
        return "lesion" if self.group_by == "lesion_id" else "patient"

    def field(self, name: str) -> MetadataField:
        """Return the field of that name.

        Raises:
            KeyError: there is none.
        """
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)


def refuse_forbidden_features(names: list[str]) -> None:
    """Refuse columns that hold the answer or name the patient.

    Raises:
        DataError: one of `names` is derived from the label, decided after the diagnosis, or an identifier.
    """
    for name in names:
        word = re.sub(r"\W+", "_", name.strip().lower())
        if word in LABEL_DERIVED_NAMES:
            raise DataError(
                f"{name!r} can't be a metadata field: it holds the diagnosis or was decided because of it "
                "(at prediction time it isn't known); remove it from the metadata fields"
            )
        if word in IDENTIFIER_NAMES:
            raise DataError(f"{name!r} can't be a metadata field: it identifies a person or a file; remove it")


def groups(table: pd.DataFrame, schema: DatasetSchema) -> pd.Series:
    """Return the group of every row that must stay on one side of a split.

    Rows without an id in `schema.group_by` are groups of their own (`image:<image_id>`).
    """
    ids = table[schema.group_by]
    return ids.where(ids.notna(), "image:" + table["image_id"].astype(str)).astype(str).rename("group")


def normalise(table: pd.DataFrame, schema: DatasetSchema) -> tuple[pd.DataFrame, list[str]]:
    """Bring a raw table to the lesion table's types, and check it.

    Numbers become float64 with NaN for missing; booleans and categories become strings with NaN for missing, missing
    codes (`UNK`) kept as they are, since the metadata encoder decides what they mean.

    Args:
        table: raw rows; the id columns must be there.
        schema: what the columns mean.

    Returns:
        The lesion table (columns in the schema's order, index 0..n-1) and a list of remarks for the user: values that
        can't be believed (infinite, outside the range) were made missing.

    Raises:
        DataError: a column is missing, the table is empty, an image_id or label is missing, doubled or unknown, or a
            numeric column holds text.
    """
    wanted = [*ID_COLUMNS, *(field.name for field in schema.fields)]
    absent = [column for column in wanted if column not in table.columns]
    if absent:
        raise DataError(
            f"columns missing from the table of {schema.title}: {', '.join(absent)}; it has: {', '.join(map(str, table.columns))}"
        )
    if len(table) == 0:
        raise DataError(f"the table of {schema.title} has no rows")
    result = table[wanted].reset_index(drop=True).copy()
    for column in ("image_id", "label"):
        if result[column].isna().any():
            raise DataError(f"{int(result[column].isna().sum())} rows of {schema.title} have no {column}")
        result[column] = result[column].astype(str)
    for column in ("patient_id", "lesion_id"):
        # `P1` and `P1 ` are one person: read as two, they would stand on both sides of a split.
        ids = result[column].map(lambda value: str(value).strip(), na_action="ignore")
        result[column] = ids.where(ids != "", other=np.nan)
    doubled = result.loc[result["image_id"].duplicated(), "image_id"]
    if len(doubled):
        raise DataError(
            f"{len(doubled)} image ids stand in more than one row, the first: {doubled.iloc[0]}; remove the duplicates"
        )
    unknown = sorted(set(result["label"]) - set(schema.classes))
    if unknown:
        raise DataError(
            f"unknown labels: {', '.join(unknown[:8])}; the classes of {schema.title} are {', '.join(schema.classes)}"
        )
    remarks: list[str] = []
    for field in schema.fields:
        result[field.name], said = normalise_field(result[field.name], field)
        remarks.extend(said)
    return result, remarks


def normalise_field(values: pd.Series, field: MetadataField) -> tuple[pd.Series, list[str]]:
    """Bring one metadata column to its type; see `normalise`.

    Raises:
        DataError: a numeric column holds text that is no number and no missing code.
    """
    cells = values.astype(object).where(values.notna(), None)
    if field.kind == "numeric":
        return _numbers(cells, field)
    known = [*field.categories, *field.aliases, *field.missing_codes]
    # Other spellings of a category; two that differ in case alone stay apart.
    spellings = by_fold({word: word for word in known})

    def category(value: object) -> str | None:
        word = normalise_value(value, field)
        return (word if word in known else spellings.get(fold(word), word)) or None

    text = cells.map(lambda value: None if value is None else category(value))
    return text.astype(object).where(text.notna(), np.nan), []


def _numbers(cells: pd.Series, field: MetadataField) -> tuple[pd.Series, list[str]]:
    answers, not_numbers = [], 0
    for cell in cells:
        try:
            answers.append(parse_number(cell, field))
        except MetadataError:
            not_numbers += 1
    if not_numbers:
        raise DataError(f"{field.name} must be a number, and {not_numbers} rows hold text; is it the right column?")
    numbers = pd.Series(
        [np.nan if answer.value is None else float(answer.value) for answer in answers], index=cells.index, dtype=float
    )
    odd = [answer.invalid for answer in answers if answer.invalid]
    return numbers, [odd_remark(field, reason, count) for reason, count in sorted(Counter(odd).items())]


def odd_remark(field: MetadataField, odd: str, count: int) -> str:
    """Say how many answers to a field don't count, and why; see `dualrefnet.runtime.metadata.Answer`."""
    if odd == "infinite":
        return f"{field.name}: {count} infinite values are treated as missing"
    if odd == "outside":
        limits = f"{'' if field.minimum is None else f'{field.minimum:g}'}..{'' if field.maximum is None else f'{field.maximum:g}'}"
        return f"{field.name}: {count} values outside {limits} are treated as missing"
    return f"{field.name}: {count} values are none of the known categories, treated as missing"
