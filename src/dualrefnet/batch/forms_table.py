"""Tables of forms, read row by row: a CSV of a million patients takes no more memory than one of ten."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from dualrefnet.data.adapters import IMAGE_SUFFIXES
from dualrefnet.errors import DataError

KEY_COLUMNS = ("image", "image_id", "img_id", "isic_id", "file", "filename")
Form = dict[str, str]

# KiB of the table of forms that SQLite holds in memory; the rest lies in a temporary file.
_CACHE = 32 * 1024


def form_key(name: Path | str) -> str:
    """Return what joins an image and its form: the file's name without folder and image suffix."""
    path = Path(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


class FormsTable:
    """A CSV with a row of answers for every patient.

    Attributes:
        path: the file.
        columns: its header.
        known: the columns that the model reads, in its order.
        ignored: those that it doesn't; whoever knows what else is read takes it out.
    """

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        """Read the header.

        Raises:
            DataError: the file is missing, empty, not UTF-8 text, or two of its columns have one name.
        """
        self.path = path
        self.columns: list[str] = []
        for cells in self._read():
            self.columns = cells
            break
        if not any(self.columns):
            raise DataError(f"{path} is empty")
        twice = {name for name in self.columns if self.columns.count(name) > 1}
        if twice:
            raise DataError(f"{path} has two columns called {', '.join(sorted(twice))}; keep one")
        self.known = [name for name in fields if name in self.columns]
        self.ignored = [name for name in self.columns if name not in self.known]
        self._places = [self.columns.index(name) for name in self.known]

    def rows(self) -> Iterator[list[str]]:
        """Go through the rows' cells; empty lines are no rows.

        Raises:
            DataError: the file is no CSV, or not UTF-8.
        """
        rows = self._read()
        next(rows)
        yield from rows

    def form(self, cells: Sequence[str]) -> Form:
        """Return the answers of a row; an empty cell is no answer.

        Raises:
            DataError: the row has more or fewer cells than the header.
        """
        if len(cells) != len(self.columns):
            raise DataError(f"the row has {len(cells)} cells and the header of {self.path.name} {len(self.columns)}")
        return {name: cells[place] for name, place in zip(self.known, self._places, strict=True) if cells[place]}

    def _read(self) -> Iterator[list[str]]:
        if not self.path.is_file():
            raise DataError(f"there is no file {self.path}")
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            try:
                # An empty line gives no cells.
                yield from filter(None, reader)
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(f"{self.path} can't be read as CSV after line {reader.line_num}: {error}") from None


class FormsIndex:
    """The forms of a CSV by image, in a temporary file that vanishes with the process.

    Attributes:
        table: the CSV.
    """

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        """Read the whole CSV once.

        Args:
            path: it has a key column (`image`: file name or id) and columns of answers.
            fields: what the model reads.

        Raises:
            DataError: there is no key column, an image has two rows, a row has too many cells, or no column is one of the fields.
        """
        self.table = FormsTable(path, fields)
        key = next((name for name in KEY_COLUMNS if name in self.table.columns), None)
        if key is None:
            raise DataError(f"{path} names no images: it needs a column image (file name or id); it has: {', '.join(self.table.columns)}")
        if fields and not self.table.known:
            raise DataError(f"{path} has none of the model's fields: {', '.join(fields)}")
        self.table.ignored.remove(key)
        self._place = self.table.columns.index(key)
        # No name: SQLite takes a file in the folder for temporary ones, and removes its name at once.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute(f"PRAGMA cache_size = -{_CACHE}")
        self._database.execute("CREATE TABLE forms (key TEXT, answers TEXT)")
        self._database.execute("BEGIN")
        self._database.executemany("INSERT INTO forms VALUES (?, ?)", self._rows())
        self._database.execute("COMMIT")
        try:
            self._database.execute("CREATE UNIQUE INDEX place ON forms (key)")
        except sqlite3.IntegrityError:
            (twice,) = self._database.execute("SELECT key FROM forms GROUP BY key HAVING count(*) > 1 LIMIT 1").fetchone()
            raise DataError(f"{path} has two rows for image {twice}; keep one") from None

    def find(self, image: Path | str) -> Form | None:
        """Return the form of an image; None if the table has none."""
        # Names that aren't UTF-8 have no form: SQLite can't even be asked for them.
        key = form_key(image).encode("utf-8", errors="replace").decode()
        found = self._database.execute("SELECT answers FROM forms WHERE key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def _rows(self) -> Iterator[tuple[str, str]]:
        for number, cells in enumerate(self.table.rows(), start=1):
            try:
                form = self.table.form(cells)
            except DataError as error:
                raise DataError(f"{self.table.path}, row {number}: {error}") from None
            yield form_key(cells[self._place]), json.dumps(form, ensure_ascii=False)
