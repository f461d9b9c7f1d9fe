"""Any data set of your own: one CSV, a folder of images, and a small YAML file that says what the columns mean.

The other adapters read their CSV with the functions of this module.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dualrefnet.data.images import NamedImages, image_id
from dualrefnet.data.schema import (
    Dataset,
    DatasetSchema,
    Kind,
    MetadataField,
    normalise,
    refuse_forbidden_features,
    require_columns,
    unnamed_patients,
    usual_spelling,
)
from dualrefnet.errors import DataError, RecipeError
from dualrefnet.files import parse_yaml, read_yaml_text, sha256_of_file
from dualrefnet.progress import warn
from dualrefnet.recipe import ClassName
from dualrefnet.runtime.metadata import by_fold, fold, read_cell, read_number

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_DESCRIPTION = "dataset.yaml"
SEPARATORS = ",;\t|"
# Columns between whose values results are compared.
_SUBGROUPS = re.compile(r"age|sex|gender|race|ethnicity|skin_?(type|tone)|fit[zs]patrick|site|region", re.IGNORECASE)
_BOOLEANS = {"true", "false", "yes", "no", "y", "n", "0", "1"}
_WITH_UNIT = re.compile(r"[<>~]? ?[+-]?\d[\d.,' ]*[^\W\d_]{0,5}\.?")


class TableDescription(BaseModel):
    """The YAML file of a `csv_table` data set."""

    model_config = ConfigDict(extra="forbid")

    title: str = "own data"  # name for people
    table: str = "table.csv"  # the CSV, relative to the data set's folder
    # the folder to which the paths in the `image` column are relative, or the several parts of it
    images: str | tuple[str, ...] = "."
    image: str = "image"  # column with the image's file name or path
    # column with the class, or a column for each class that holds 1 in the rows of that class, else 0
    label: str | Annotated[tuple[str, ...], Field(min_length=2)] = "label"
    # column with the patient's id (strongly advised: without it one patient may be in several splits)
    patient: str | None = None
    lesion: str | None = None  # column with the lesion's id
    split: str | None = None  # column with train, val or test, for `data.protocol: own`
    # the labels in the order of the model's outputs; empty: those in the table, sorted, or the columns of `label`
    classes: tuple[ClassName, ...] = ()
    malignant: tuple[ClassName, ...] = ()  # the classes that are cancer
    class_names: dict[ClassName, str] = Field(default_factory=dict)  # label -> what it stands for
    metadata: tuple[MetadataField, ...] = Field(default_factory=tuple)  # the metadata fields
    licence: str = ""  # of the data

    def image_folders(self, root: Path) -> tuple[Path, ...]:
        parts = [self.images] if isinstance(self.images, str) else self.images
        return tuple(dict.fromkeys((root / part).resolve() for part in parts))


def read_description(path: Path) -> TableDescription:
    if not path.exists():
        raise DataError(f"there is no description {path}; docs/bring-your-own-data.md shows how to write one")
    try:
        values: Any = parse_yaml(read_yaml_text(path), path) or {}
    except RecipeError as error:
        raise DataError(str(error)) from None
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
    """Read the table in `root` that the YAML file (default: `dataset.yaml` in `root`) describes."""
    description = read_description(description_file or root / DEFAULT_DESCRIPTION)
    file, folders = root / description.table, description.image_folders(root)
    raw = read_csv(file)
    optional = [column for column in (description.patient, description.lesion, description.split) if column]
    one_hot = () if isinstance(description.label, str) else description.label
    labels = one_hot or (str(description.label),)
    ids, fields = [description.image, *labels, *optional], [field.name for field in description.metadata]
    used = [name for name in fields if name in ids]
    if used:
        raise DataError(
            f"{', '.join(used)} can't be a metadata field: it is the image, label, patient, lesion or split column"
        )
    require_columns(raw, ids + fields, str(file))
    label = read_one_hot(raw, one_hot, description.image, str(file)) if one_hot else raw[labels[0]]
    names = raw[description.image].map(read_cell)
    if names.isna().any():
        raise DataError(f"{int(names.isna().sum())} rows of {file} name no image")
    # Columns that group the images: an empty one names nobody.
    named = [column for column in optional if raw[column].map(read_cell).notna().any()]
    classes = description.classes or one_hot or classes_of(label)
    usual = by_fold({name: name for name in classes})

    def spelt(name: str) -> str:
        return name if name in classes else usual.get(fold(name), name)

    schema = DatasetSchema(
        name="csv_table",
        title=description.title,
        classes=classes,
        malignant=tuple(map(spelt, description.malignant)),
        class_names={spelt(name): text for name, text in description.class_names.items()},
        fields=description.metadata,
        group_by=(
            "patient_id" if description.patient in named else "lesion_id" if description.lesion in named else "image_id"
        ),
        licence=description.licence,
    )
    table, notes = normalise(
        raw.assign(
            image_id=names.map(image_id),
            image_path=find_images(raw[description.image], folders),
            label=label,
            patient_id=raw[description.patient] if description.patient else None,
            lesion_id=raw[description.lesion] if description.lesion else None,
        ),
        schema,
    )
    table["same_file"] = same_files(table["image_path"])
    if schema.unit != "patient":
        advice = f"name the patients' column in {DEFAULT_DESCRIPTION} (patient:), or in `fit` (group=)"
        notes.append(("patients", f"{unnamed_patients(schema.unit)}; {advice}"))
    shared = shared_lesions(table)
    if shared:
        advice = (
            "their patients are kept in one split; if each patient's lesions are counted anew, name no lesion column"
        )
        notes.append(("shared_lesions", f"{len(shared)} lesion ids are used by several patients: {advice}"))
    others = other_columns(raw, ids + fields)
    own_split = raw[description.split].reset_index(drop=True) if description.split else None
    return Dataset(table, schema, root, notes, others, folders, shared, own_split)


def read_one_hot(table: pd.DataFrame, columns: Sequence[str], image: str, what: str) -> pd.Series:
    """Return the class of each row, of which one of the columns holds 1 (or True) and the others 0 (or False)."""
    import pandas as pd

    # Other text becomes NaN, which is no label.
    cells = table[list(columns)].replace({"True": "1", "False": "0"})
    values = cells.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    wrong = ~np.isin(values, (0, 1)).all(axis=1) | (values.sum(axis=1) != 1)
    if wrong.any():
        place, first = int(wrong.argmax()) + 1, table[image][wrong].iloc[0]
        raise DataError(
            f"{int(wrong.sum())} rows of {what} don't have exactly one label, the first: {first} (row {place}); one of "
            f"the columns {', '.join(columns)} must hold 1 and the others 0"
        )
    return pd.Series(np.array(columns, dtype=object)[values.argmax(axis=1)], index=table.index)


def classes_of(labels: pd.Series) -> tuple[str, ...]:
    """Return the classes of a column of labels, sorted, each in its most frequent spelling."""
    return tuple(sorted(usual_spelling(labels.map(read_cell)).dropna().unique()))


def same_files(paths: pd.Series) -> pd.Series:
    """Return the hash of every file that has a byte-identical copy among the others, None for the rest."""
    left = hashes = paths.dropna()
    # What is cheap to know first: few files are as long as another, or begin like it.
    for property_of in (os.path.getsize, _beginning, sha256_of_file):
        hashes = left.map(_if_readable(property_of)).dropna()
        left = left[hashes.index[hashes.duplicated(keep=False)]]
    return hashes[left.index].reindex(paths.index)


def _beginning(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(2**16)


def _if_readable(property_of: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(path: str) -> Any:
        try:
            return property_of(path)
        except OSError:  # It is named where it is decoded.
            return None

    return read


def find_images(names: pd.Series, folders: Sequence[Path]) -> pd.Series:
    """Return the file that each name means, a path below one of the folders or its end; None if there is none."""
    import pandas as pd

    index, paths = None, []
    for name in names:
        files = [str(folder / name) for folder in folders if os.path.isfile(folder / name)]
        if len(files) != 1:
            index = index or NamedImages(folders)
            files = [path] if (path := index.find(name)) else []
        paths.append(files[0] if files else None)
    return pd.Series(paths, index=names.index, dtype=object)


def describe(table: pd.DataFrame, columns: list[str]) -> tuple[MetadataField, ...]:
    """Guess the metadata fields of a table; refuse a column of free text (over 50 values) or of unclear numbers."""
    refuse_forbidden_features(columns)
    require_columns(table, columns, "the table")
    fields = []
    for name in columns:
        values = table[name].map(read_cell).dropna().astype(str)
        numbers, different = values.map(_is_number).astype(bool), values.nunique()
        kind: Kind = "categorical"
        if different and set(values.str.lower()) <= _BOOLEANS:
            kind = "boolean"
        elif different > 10 and numbers.all():
            kind = "numeric"
        elif different > 10 and 2 * (numbers | values.map(lambda text: bool(_WITH_UNIT.fullmatch(text)))).sum() > len(
            values
        ):
            raise DataError(
                f"{name!r} holds numbers, but {int((~numbers).sum())} values aren't plain ones: write them without "
                "unit and thousands separator, and leave empty what isn't known"
            )
        elif different > 50:
            raise DataError(f"{name!r} has {different} different values: free text or an id, no metadata field")
        fields.append(MetadataField(name=name, kind=kind, subgroup=_SUBGROUPS.fullmatch(name) is not None))
    return tuple(fields)


def _is_number(text: str) -> bool:
    try:
        read_number(text)
    except ValueError:
        return False
    return True


@contextmanager
def open_csv(path: Path) -> Iterator[Iterator[list[str]]]:
    """Give the rows of a user's CSV in UTF-8, UTF-16 or (aloud) Windows-1252, with any of the usual separators."""
    try:
        encoding = _encoding(path)
        with path.open(encoding=encoding, newline="") as file:
            first = file.readline()
            chosen = re.match("sep=(.)", first)  # A line of Excel's own.
            if chosen is None:
                file.seek(0)
            separator = chosen[1] if chosen else max(SEPARATORS, key=re.sub('"[^"]*"', "", first).count)
            yield csv.reader(file, delimiter=separator, strict=True)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (csv.Error, UnicodeError, OSError) as error:
        raise DataError(f"{path} can't be read as CSV: {getattr(error, 'strerror', None) or error}") from None


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return "utf-16"
    try:
        with path.open(encoding="utf-8-sig") as text:
            if any("\0" in line for line in text):
                raise csv.Error("it holds NUL bytes; save it as UTF-8 CSV")
    except UnicodeDecodeError:
        warn(f"{path.name} isn't UTF-8 and is read as Windows-1252: look at letters such as é, or save it as UTF-8")
        return "cp1252"
    return "utf-8-sig"


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV whose cells are text, NaN where they are empty."""
    import pandas as pd

    # Equal cells are one string: a million rows of words that repeat would take gigabytes.
    known: dict[str, str] = {}
    with open_csv(path) as reader:
        rows = [[known.setdefault(cell, cell) for cell in row] for row in reader if any(cell.strip() for cell in row)]
    if not rows:
        raise DataError(f"{path} is empty")
    if len(rows) == 1:
        raise DataError(f"{path} has no rows")
    header, *body = rows
    if all(len(row) == len(header) + 1 for row in body):
        # R writes row names without a header; other programs end every row with a separator.
        header = [*header, ""] if not any(row[-1] for row in body) else ["", *header]
    long = next((number for number, row in enumerate(body, start=1) if len(row) > len(header)), None)
    if long is not None:
        raise DataError(f"row {long} of {path} has {len(body[long - 1])} cells, and the header {len(header)}")
    names = [name.strip() or f"Unnamed: {number}" for number, name in enumerate(header)]
    cells = [[cell or np.nan for cell in row] + [np.nan] * (len(header) - len(row)) for row in body]
    table = pd.DataFrame(cells, columns=names, dtype=object)
    empty = [name for name in names if name.startswith("Unnamed: ") and table[name].isna().all()]
    require_columns(table, names, str(path))
    return table.drop(columns=empty)


def other_columns(published: pd.DataFrame, known: Iterable[str]) -> pd.DataFrame:
    """Return the columns of a published table that aren't among the `known` ones; index 0..n-1."""
    return published.drop(columns=list(known), errors="ignore").reset_index(drop=True)


def shared_lesions(table: pd.DataFrame) -> tuple[str, ...]:
    owners = table.groupby("lesion_id")["patient_id"].nunique()
    return tuple(map(str, owners.index[owners > 1]))
