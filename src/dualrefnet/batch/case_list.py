"""The list of what shall be predicted: counted before the work begins, gone through lazily, and recognised when it is resumed."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from dualrefnet.batch.forms_table import FormsIndex, FormsTable
from dualrefnet.data.adapters import IMAGE_SUFFIXES
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import DataError
from dualrefnet.files import sha256_of_file
from dualrefnet.progress import warn

IMAGE_COLUMN = "image"


@dataclass(frozen=True)
class Case:
    """One row to predict.

    Attributes:
        name: what the result calls it.
        path: its photograph; None: there is none.
        form: its answers.
        error: why it can't be predicted; empty if nothing is known against it.
    """

    name: str
    path: Path | None
    form: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


class Cases(Protocol):
    """Rows to predict, in an order that doesn't change."""

    @property
    def total(self) -> int:
        """How many there are."""

    @property
    def made_of(self) -> dict[str, str]:
        """What tells this list from another one: names and hashes."""

    def start_at(self, first: int) -> Iterator[Case]:
        """Go through the rows from the one with this number, counted from 0."""


class FileCases:
    """Image files and folders, and a table of forms beside them.

    The list is kept in a temporary file that vanishes with the process: a folder may hold more names than memory should.
    """

    def __init__(self, sources: Sequence[Path], metadata: Path | None, predictor: Predictor) -> None:
        """List the files; none of them is opened.

        Args:
            sources: files, and folders that are searched with what is below them.
            metadata: CSV with a key column (`image`: file name or id) and columns of answers, or None.
            predictor: the model that says which answers it reads.

        Raises:
            DataError: there is no image, a source doesn't exist, or the CSV isn't what it must be.
        """
        self._forms = FormsIndex(metadata, [item.name for item in predictor.fields]) if metadata else None
        if self._forms is not None:
            _say_ignored(self._forms.table)
        self._files = sqlite3.connect("", isolation_level=None)
        self._files.execute("CREATE TABLE files (number INTEGER PRIMARY KEY, path BLOB)")
        self._files.execute("BEGIN")
        digest, self._total, without = hashlib.sha256(), 0, 0
        for path in walk_images(sources):
            name = os.fsencode(path)
            digest.update(name + b"\0")
            self._files.execute("INSERT INTO files VALUES (?, ?)", (self._total, name))
            self._total += 1
            without += self._forms is not None and self._forms.find(path) is None
        self._files.execute("COMMIT")
        if not self._total:
            raise DataError(f"no image is in {', '.join(map(str, sources))}; known suffixes: {' '.join(IMAGE_SUFFIXES)}")
        if without:
            warn(f"{without} of {self._total} images have no row in {metadata}: all of their metadata are missing")
        self._made_of = {"images": digest.hexdigest(), "metadata": sha256_of_file(metadata) if metadata else ""}

    @property
    def total(self) -> int:
        """How many files there are."""
        return self._total

    @property
    def made_of(self) -> dict[str, str]:
        """Hashes of the files' names, in order, and of the table's content."""
        return self._made_of

    def start_at(self, first: int) -> Iterator[Case]:
        """Go through the files from the one with this number, counted from 0."""
        for (name,) in self._files.execute("SELECT path FROM files WHERE number >= ? ORDER BY number", (first,)):
            path = Path(os.fsdecode(name))
            yield Case(str(path), path, (self._forms.find(path) if self._forms else None) or {})


class TableCases:
    """A CSV with a row a patient: the column `image` is the photograph's path, the others are the form."""

    def __init__(self, path: Path, predictor: Predictor) -> None:
        """Read the CSV once, to count its rows and to see that all of it can be read.

        Args:
            path: the CSV; paths in it are absolute, or relative to its folder.
            predictor: the model that says what it reads.

        Raises:
            DataError: the file is no such CSV, has no rows, or has no column `image` and the model needs photographs.
        """
        names = [item.name for item in predictor.fields]
        self._table = FormsTable(path, names)
        columns = self._table.columns
        self._place = columns.index(IMAGE_COLUMN) if IMAGE_COLUMN in columns else None
        self._reads, self._needs = predictor.reads_image, predictor.needs_image
        if self._place is None and self._needs:
            raise DataError(
                f"{path} has no column {IMAGE_COLUMN}, and this model needs photographs: name their files there, or take a model that "
                f"answers without (metadata.imputation=token, or model.method=metadata_only); the columns are: {', '.join(columns)}"
            )
        if self._place is not None:
            self._table.ignored.remove(IMAGE_COLUMN)
        if names and self._table.ignored and not self._table.known:
            raise DataError(f"{path} has none of the model's fields: {', '.join(names)}")
        _say_ignored(self._table)
        self._total = sum(1 for _ in self._table.rows())
        if not self._total:
            raise DataError(f"{path} has no rows")
        self._made_of = {"table": sha256_of_file(path)}

    @property
    def total(self) -> int:
        """How many rows there are."""
        return self._total

    @property
    def made_of(self) -> dict[str, str]:
        """The hash of the table's content."""
        return self._made_of

    def start_at(self, first: int) -> Iterator[Case]:
        """Go through the rows from the one with this number, counted from 0."""
        for number, cells in enumerate(islice(self._table.rows(), first, None), start=first + 1):
            yield self._case(number, cells)

    def _case(self, number: int, cells: list[str]) -> Case:
        image = cells[self._place] if self._place is not None and self._place < len(cells) else ""
        # Without a name the row is called by its number.
        name = image or str(number)
        try:
            form = self._table.form(cells)
        except DataError as error:
            return Case(name, None, {}, str(error))
        if not image and self._needs:
            return Case(name, None, {}, "the row names no photograph, and this model needs one")
        return Case(name, self._table.path.parent / image if image and self._reads else None, form)


def walk_images(sources: Sequence[Path]) -> Iterator[Path]:
    """Go through the image files that are meant: sorted within each folder, then those of the folders in it.

    Hidden files and folders are left out, and links to folders aren't followed.

    Raises:
        DataError: a source doesn't exist, or a folder can't be read.
    """
    for source in sources:
        if source.is_dir():
            yield from _below(source)
        elif source.is_file():
            yield source
        else:
            raise DataError(f"there is no file or folder {source}")


def _below(top: Path) -> Iterator[Path]:
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        # The names of one folder are sorted by SQLite, which puts on disk what would be too much for memory.
        names = sqlite3.connect("", isolation_level=None)
        names.execute("CREATE TABLE names (name BLOB)")
        names.execute("BEGIN")
        folders = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.name)
                    elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file():
                        names.execute("INSERT INTO names VALUES (?)", (os.fsencode(entry.name),))
        except OSError as error:
            raise DataError(f"the folder {folder} can't be read: {error.strerror}") from None
        for (name,) in names.execute("SELECT name FROM names ORDER BY name"):
            yield folder / os.fsdecode(name)
        names.close()
        waiting += [folder / name for name in sorted(folders, reverse=True)]


def _say_ignored(table: FormsTable) -> None:
    if table.ignored:
        warn(f"columns of {table.path} that the model doesn't read: {', '.join(table.ignored)}")
