"""The lesion table, one row an image, and its schema: what every data set looks like once its adapter has read it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dualrefnet.errors import DataError, RecipeError
from dualrefnet.recipe import suggestion
from dualrefnet.runtime.metadata import MetadataError, by_fold, fold, normalise_value, parse_number, read_cell

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["numeric", "boolean", "categorical"]
FieldTier = Literal["M1", "M2"]
Unit = Literal["patient", "lesion", "image"]

ID_COLUMNS = ("image_id", "image_path", "label", "patient_id", "lesion_id")
BOOLEAN_VALUES = ("False", "True")

# Columns of published tables that hold the label, or what a physician did because of it. A feature with such a name
# is refused: `biopsed` alone says "cancer" for 1,089 of 1,089 cancers of PAD-UFES-20.
LABEL_DERIVED_NAMES = frozenset(
    """biopsed biopsied biopsy diagnostic diagnosis dx dx_type label target class malignant benign_malignant
    diagnosis_confirm_type histopathology pathology melanocytic outcome""".split()  # noqa: SIM905
)
IDENTIFIER_NAMES = frozenset(["patient_id", "lesion_id", "image_id", "img_id", "image", "image_path", "isic_id", "id"])


class MetadataField(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # column of the lesion table
    kind: Kind  # numeric, boolean (`True` / `False`) or categorical
    unit: str | None = None  # unit of a numeric field, such as `years` or `mm`
    tier: FieldTier = "M2"  # M1 if it is recorded for every patient, M2 if it may be missing
    # legal values of a categorical field, in column order; empty: learned from the training rows
    categories: tuple[str, ...] = ()
    missing_codes: tuple[str, ...] = ()  # strings that stand for "not known", such as `UNK`
    aliases: dict[str, str] = Field(default_factory=dict)  # spellings of one value, such as BRASIL -> BRAZIL
    minimum: float | None = None  # smallest plausible number
    maximum: float | None = None  # largest plausible number
    description: str = ""  # the field in plain words, as a question or a noun
    subgroup: bool = False  # compare results between its values

    @model_validator(mode="after")
    def _may_be_a_feature(self) -> MetadataField:
        refuse_forbidden_features([self.name])
        return self


def numeric_field(name: str, description: str, **options: Any) -> MetadataField:
    return MetadataField(name=name, kind="numeric", description=description, **options)


def categorical_field(name: str, categories: tuple[str, ...], description: str, **options: Any) -> MetadataField:
    return MetadataField(name=name, kind="categorical", categories=categories, description=description, **options)


class DatasetSchema(BaseModel):
    """What the columns of a lesion table mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # the adapter's name
    title: str  # name for people
    classes: tuple[str, ...]  # labels in the order of the model's outputs
    malignant: tuple[str, ...] = ()  # the classes that are cancer
    class_names: dict[str, str] = Field(default_factory=dict)  # label -> what it stands for
    fields: tuple[MetadataField, ...] = ()  # the metadata fields
    # the column whose groups stay within one split; image_id: neither patients nor lesions are named
    group_by: Literal["patient_id", "lesion_id", "image_id"] = "patient_id"
    licence: str = ""  # under which the data may be used
    citation: str = ""  # what to cite
    official_rows: int | None = None  # number of rows of the official release; None if there is none
    # Metadata are missing where a lesion was not biopsied, and such lesions are benign.
    missingness_reveals_class: bool = False
    synthetic: bool = False  # True if the images are made by a program; every table and page says so

    @model_validator(mode="after")
    def _consistent(self) -> DatasetSchema:
        for what, values in (("class", self.classes), ("metadata field", [field.name for field in self.fields])):
            repeated = sorted(value for value, count in Counter(values).items() if count > 1)
            if repeated:
                raise DataError(f"{what} named twice: {', '.join(repeated)}")
        for key, labels in (("malignant", self.malignant), ("class_names", self.class_names)):
            unknown = sorted(set(labels) - set(self.classes))
            if unknown:
                raise DataError(f"{key} names no class: {', '.join(unknown)}; classes: {', '.join(self.classes)}")
        return self

    @property
    def unit(self) -> Unit:
        """The independent unit: it stays within one split, and the bootstrap resamples it."""
        units: dict[str, Unit] = {"patient_id": "patient", "lesion_id": "lesion", "image_id": "image"}
        return units[self.group_by]

    def field(self, name: str) -> MetadataField:
        return {field.name: field for field in self.fields}[name]


def _no_columns() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set as its adapter read it."""

    # the lesion table, one row an image, in the order of the published file; `image_path` is None for a row whose image
    # isn't on this disk
    table: pd.DataFrame
    schema: DatasetSchema
    root: Path  # the folder that was read
    # what the user should know: id of the check that finds it, and one sentence
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    # the published columns that are neither ids nor label nor metadata field, as text, with the index of `table`: never
    # features, but an audit looks at them
    other_columns: pd.DataFrame = dataclasses.field(default_factory=_no_columns)
    image_folders: tuple[Path, ...] = ()  # where its images lie
    shared_lesions: tuple[str, ...] = ()  # published lesion ids that several patients use
    own_split: pd.Series | None = None  # the user's split of each row, with the index of `table`

    def of_task(self, keep: Sequence[str], grouped: Mapping[str, Sequence[str]]) -> Dataset:
        """Return the data set of a recipe's task: `data.keep`, then `data.classes`, if they aren't empty."""
        dataset = self.keep_classes(keep) if keep else self
        return dataset.group_classes(grouped) if grouped else dataset

    def keep_classes(self, keep: Sequence[str]) -> Dataset:
        """Return the rows of some classes (`data.keep`); RecipeError: one doesn't exist, or fewer than two are left."""
        self._refuse_unknown("data.keep", keep)
        if len(set(keep)) < 2:
            raise RecipeError(
                f"data.keep leaves {', '.join(keep)} alone, and a classifier needs two classes: name more"
            )
        kept, schema, others, own = self.table["label"].isin(keep), self.schema, self.other_columns, self.own_split
        return dataclasses.replace(
            self,
            table=self.table[kept].reset_index(drop=True),
            other_columns=others[kept].reset_index(drop=True) if len(others) else others,
            own_split=None if own is None else own[kept].reset_index(drop=True),
            schema=_with_classes(
                schema,
                tuple(name for name in schema.classes if name in keep),
                tuple(name for name in schema.malignant if name in keep),
                {name: text for name, text in schema.class_names.items() if name in keep},
            ),
        )

    def group_classes(self, grouped: Mapping[str, Sequence[str]]) -> Dataset:
        """Return the data set with groups of its classes as classes; one is malignant if all its classes are."""
        schema, members = self.schema, [name for group in grouped.values() for name in group]
        self._refuse_unknown("data.classes", members)
        twice = sorted(name for name, count in Counter(members).items() if count > 1)
        if twice:
            raise RecipeError(f"data.classes has {', '.join(twice)} in two groups; a class belongs to one")
        lost = [name for name in schema.classes if name not in members]
        if lost:
            names = ", ".join(lost)
            raise RecipeError(f"data.classes has no group for {names}: put each into one, or leave it out by data.keep")
        if len(grouped) < 2 or not all(grouped.values()):
            raise RecipeError("data.classes needs at least two groups, none of them empty")
        group_of = {name: group for group, names in grouped.items() for name in names}
        malignant = tuple(group for group, names in grouped.items() if set(names) <= set(schema.malignant))
        mixed = {group_of[name] for name in schema.malignant} != set(malignant)
        return dataclasses.replace(
            self,
            table=self.table.assign(label=self.table["label"].map(group_of)),
            schema=_with_classes(
                schema,
                tuple(grouped),
                () if mixed else malignant,
                {group: ", ".join(schema.class_names.get(name, name) for name in grouped[group]) for group in grouped},
            ),
        )

    def _refuse_unknown(self, key: str, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.schema.classes:
                classes = ", ".join(self.schema.classes)
                known = f"{classes}{suggestion(name, self.schema.classes)}"
                raise RecipeError(f"{key} names {name}, which is no class of {self.schema.title}: {known}")

    @property
    def warnings(self) -> list[str]:
        return [sentence for _, sentence in self.notes]

    @property
    def with_image(self) -> pd.DataFrame:
        return self.table[self.table["image_path"].notna()]

    @property
    def no_image(self) -> str:
        folder = next(iter(self.image_folders), self.root / "images")
        tried = folder / f"{self.table['image_id'].iloc[0]}.jpg"
        return (
            f"no image of the {len(self.table):,} rows is there; the first was looked for at {tried} and other suffixes"
        )


def _with_classes(
    schema: DatasetSchema, classes: tuple[str, ...], malignant: tuple[str, ...], class_names: dict[str, str]
) -> DatasetSchema:
    return schema.model_copy(update={"classes": classes, "malignant": malignant, "class_names": class_names})


def refuse_forbidden_features(names: list[str]) -> None:
    """Raise a DataError if one of `names` is derived from the label, decided after the diagnosis, or an identifier."""
    for name in names:
        word = re.sub(r"\W+", "_", name.strip().lower())
        if word in LABEL_DERIVED_NAMES:
            raise DataError(
                f"{name!r} can't be a metadata field: it holds the diagnosis or was decided because of it "
                "(at prediction time it isn't known); remove it from the metadata fields"
            )
        if word in IDENTIFIER_NAMES:
            raise DataError(f"{name!r} can't be a metadata field: it identifies a person or a file; remove it")


def unnamed_patients(unit: str) -> str:
    """Say what may be in several splits of a data set that names no patients."""
    if unit == "lesion":
        return "no patient is named, only lesions: images of one person may be in several splits"
    return (
        "NOTHING GROUPS THE IMAGES: neither patients nor lesions are named, so images of one person may be in training "
        "and in test, and every number may be too good"
    )


def require_columns(table: pd.DataFrame, columns: list[str], what: str) -> None:
    """Raise a DataError that names the `columns` that `what`, a table, lacks or has twice."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        there = list(map(str, table.columns))
        near = next(filter(None, (suggestion(column, there) for column in missing)), "")
        raise DataError(f"{what} has no column {', '.join(missing)}; it has: {', '.join(there)}{near}")
    repeated = [column for column in columns if (table.columns == column).sum() > 1]
    if repeated:
        raise DataError(f"{what} has several columns called {', '.join(repeated)}; keep one, or rename them")


def groups(table: pd.DataFrame, schema: DatasetSchema) -> pd.Series:
    """Return the group of every row that must stay in one split: all that a patient, a lesion or equal files join.

    A group is called after its (first) patient, else after its lesion, else `image:<image_id>`.
    """
    import pandas as pd

    known = [column for column in ("patient_id", "lesion_id", "same_file") if column in table]
    group = pd.Series(np.arange(len(table), dtype=float), index=table.index)
    while True:
        joined = group
        for column in known:
            joined = joined.groupby(table[column]).transform("min").fillna(joined)
        if joined.equals(group):
            break
        group = joined
    patient, lesion = (table[column].groupby(group).transform("first") for column in ("patient_id", "lesion_id"))
    prefix = "" if schema.group_by == "lesion_id" else "lesion:"
    lesion = lesion.map(lambda name: f"{prefix}{name}", na_action="ignore")
    image = "image:" + table["image_id"].astype(str).groupby(group).transform("first")
    return patient.where(patient.notna(), lesion.where(lesion.notna(), image)).astype(str).rename("group")


def usual_spelling(words: pd.Series) -> pd.Series:
    """Return the words, each in the most frequent of the spellings that differ in case alone."""
    usual: dict[str, str] = {}
    for word, _ in sorted(words.value_counts().items(), key=lambda item: (-item[1], item[0])):
        usual.setdefault(str(word).casefold(), str(word))
    return words.map({word: usual[word.casefold()] for word in words.dropna().unique()})


def normalise(table: pd.DataFrame, schema: DatasetSchema) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Bring a raw table to the lesion table's types, and check it; return it with notes (see `Dataset`).

    Missing codes (`UNK`) are kept: the metadata encoder decides what they mean.
    """
    wanted = [*ID_COLUMNS, *(field.name for field in schema.fields)]
    require_columns(table, wanted, f"the table of {schema.title}")
    if len(table) == 0:
        raise DataError(f"the table of {schema.title} has no rows")
    result = table[wanted].reset_index(drop=True).copy()
    published = result["label"].astype(str)
    result["label"] = result["label"].map(lambda value: read_cell(value, schema.classes))
    for column in ("image_id", "label"):
        if result[column].isna().any():
            raise DataError(
                f"{int(result[column].isna().sum())} rows of {schema.title} have no {column}, the first is row "
                f"{result[column].isna().argmax() + 1}; give it one, or take these rows out"
            )
    for column in ("patient_id", "lesion_id"):
        # `P1` and `p1 ` are one person: read as two, they could be in two splits.
        result[column] = usual_spelling(result[column].map(read_cell).astype(object))
    for column, what in (("image_id", "image ids"), ("image_path", "image files")):
        repeated = result.loc[result[column].duplicated() & result[column].notna(), column]
        if len(repeated):
            raise DataError(
                f"{len(repeated)} {what} are in more than one row, the first: {repeated.iloc[0]}; remove the duplicates"
            )
    spellings = by_fold({name: name for name in schema.classes})
    result["label"] = [
        label if label in schema.classes else spellings.get(fold(label), label) for label in result["label"]
    ]
    unknown = sorted(set(result["label"]) - set(schema.classes))
    if unknown:
        classes = ", ".join(schema.classes)
        raise DataError(f"unknown labels: {', '.join(unknown[:8])}; the classes of {schema.title} are {classes}")
    notes = []
    changed = published != result["label"]
    if changed.any():
        pairs = sorted(set(zip(published[changed], result["label"][changed], strict=True)))
        listed = ", ".join(f"{word!r} is {label}" for word, label in pairs[:8])
        notes.append(("labels", f"{int(changed.sum())} labels are spelt in another way than their class: {listed}"))
    for field in schema.fields:
        result[field.name], warnings = normalise_field(result[field.name], field)
        notes += [("numbers", warning) for warning in warnings]
    return result, notes


def normalise_field(values: pd.Series, field: MetadataField) -> tuple[pd.Series, list[str]]:
    """Bring one metadata column to its type; return warnings of values that were made missing."""
    cells = values.astype(object).where(values.notna(), None)
    if field.kind == "numeric":
        return _normalise_numbers(cells, field)
    known = [*field.categories, *field.aliases, *field.missing_codes]
    # Other spellings of a category; two categories that differ in case alone stay apart.
    spellings = by_fold({word: word for word in known})

    def category(value: object) -> str | None:
        word = normalise_value(value, field, known)
        return word if word is None or word in known else spellings.get(fold(word), word)

    text = cells.map(category)
    text = text.astype(object).where(text.notna(), np.nan)
    return text if field.categories or field.kind == "boolean" else usual_spelling(text), []


def _normalise_numbers(cells: pd.Series, field: MetadataField) -> tuple[pd.Series, list[str]]:
    import pandas as pd

    parsed, text = [], 0
    for cell in cells:
        try:
            parsed.append(parse_number(cell, field))
        except MetadataError:
            text += 1
    if text:
        raise DataError(
            f"{field.name} must be a number, and {text} rows hold text (a unit, a thousands separator?); "
            "is it the right column?"
        )
    numbers = pd.Series([np.nan if one.value is None else one.value for one in parsed], index=cells.index, dtype=float)
    invalid = Counter(one.invalid for one in parsed if one.invalid)
    return numbers, [invalid_warning(field, reason, count) for reason, count in sorted(invalid.items())]


def invalid_warning(field: MetadataField, reason: str, count: int) -> str:
    """Say how many values of a field are treated as missing, and why: `infinite`, `outside` or `unknown`."""
    low, high = ("" if bound is None else f"{bound:g}" for bound in (field.minimum, field.maximum))
    what = {"infinite": "infinite or absurdly large values", "outside": f"values outside {low}..{high}"}
    return f"{field.name}: {count} {what.get(reason, 'values of no known category')} are treated as missing"
