"""Tables of forms, read row by row: a CSV of a million patients takes no more memory than one of ten."""

# also: The list of what shall be predicted: counted before the work begins, gone through lazily, and recognised when it
# is resumed.
# also: The table of a long prediction: rows are added as they come, a killed process loses the last of them, and the
# next one goes on.
# also: Prediction of many photographs into one CSV, with memory that doesn't grow, and resumable.
# also: What a person sees of a prediction that takes hours: how many are done, how fast, how long it will take; on
# standard error.

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import dualrefnet
from dualrefnet.data.adapters import IMAGE_SUFFIXES
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import DataError, ImageError
from dualrefnet.files import read_json, sha256_of_file, sha256_of_json, write_json
from dualrefnet.progress import console, remark, warn
from dualrefnet.runtime.prediction import Prediction

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
            DataError: there is no key column, an image has two rows, a row has too many cells, or no column is one of
                the fields.
        """
        self.table = FormsTable(path, fields)
        key = next((name for name in KEY_COLUMNS if name in self.table.columns), None)
        if key is None:
            raise DataError(
                f"{path} names no images: it needs a column image (file name or id); it has: {', '.join(self.table.columns)}"
            )
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
            (twice,) = self._database.execute(
                "SELECT key FROM forms GROUP BY key HAVING count(*) > 1 LIMIT 1"
            ).fetchone()
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

    The list is kept in a temporary file that vanishes with the process: a folder may hold more names than memory
    should.
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
            raise DataError(
                f"no image is in {', '.join(map(str, sources))}; known suffixes: {' '.join(IMAGE_SUFFIXES)}"
            )
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


# Seconds after which rows are on the disk even if the machine loses its power.
SYNC_AFTER = 5.0


def csv_lines(rows: Iterable[Sequence[str]]) -> bytes:
    """Return rows as CSV; names that aren't UTF-8 are written with escapes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", errors="backslashreplace")


class ResultFile:
    """A CSV whose rows come in order, in batches of a fixed size; use it as a context.

    Rows are kept in whole batches only: what a model says of a photograph may differ in the last digit with the
    photographs beside it,
    and a result that was interrupted shall be the same to the byte as one that wasn't.

    Attributes:
        out: the file, once it is finished.
        partial: where the rows are until then.
        kept: rows of an earlier process that stay.
        failed: rows, of all that are there, whose last column (`error`) isn't empty.
    """

    def __init__(
        self, out: Path, columns: Sequence[str], made_of: Mapping[str, Any], total: int, batch: int, resume: bool
    ) -> None:
        """Begin, or go on.

        Args:
            out: the file to write.
            columns: its header; the last column is `error`.
            made_of: what the rows depend on, for JSON; a file that was made of something else isn't gone on with.
            total: rows when it is finished.
            batch: rows in a batch.
            resume: go on with what an earlier process left; begin if it left nothing.

        Raises:
            DataError: an earlier process left rows and `resume` is False, they were made of something else, another
                process is
                writing, or there is nothing to go on with but a finished file.
        """
        self.out, self.total, self.batch = out, total, batch
        self.partial = out.with_name(f"{out.name}.partial")
        self._description = out.with_name(f"{out.name}.partial.json")
        self._header = csv_lines([columns])
        self.kept = self.failed = 0
        made_of = {**made_of, "rows": total, "batch": batch}
        if out.is_dir():
            raise DataError(f"{out} is a folder; name a file, such as {out / 'predictions.csv'}")
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.partial.exists() and not resume:
            raise DataError(
                f"{self.partial} is what an unfinished prediction left: --resume goes on with it; to begin anew, remove it and "
                f"{self._description}"
            )
        if self.partial.exists():
            self._compare(made_of)
        elif resume and out.exists():
            raise DataError(f"{out} is finished and nothing is left to resume; without --resume it is made again")
        else:
            write_json(self._description, made_of)
        self._file = self._locked()
        try:
            self._keep_whole_batches()
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What couldn't be written for want of space can't be flushed either.
        with suppress(OSError):
            self._file.close()

    def append(self, lines: bytes, failed: int) -> None:
        """Add the rows of one batch, made by `csv_lines`; `failed` of them hold an error.

        Raises:
            DataError: the disk is full.
        """
        try:
            self._file.write(lines)
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_AFTER:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise self._in_words(error) from error
        self.failed += failed

    def finish(self) -> None:
        """Give the file its name, once all rows are there."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._in_words(error) from error
        os.replace(self.partial, self.out)
        self._description.unlink(missing_ok=True)

    def _compare(self, made_of: Mapping[str, Any]) -> None:
        if not self._description.is_file():
            raise DataError(
                f"{self._description} is missing, so it isn't known what {self.partial} was made of; remove that and begin anew"
            )
        before = read_json(self._description)
        changed = [name for name in {**before, **made_of} if before.get(name) != made_of.get(name)]
        if changed:
            raise DataError(
                f"{self.partial} can't be resumed, since this has changed: {', '.join(changed)}; call as before, or remove it and "
                f"{self._description} to begin anew"
            )

    def _locked(self) -> BinaryIO:
        file = self.partial.open("r+b" if self.partial.exists() else "x+b")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no flock; there the user must see to it.
            pass
        except OSError as error:
            file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise DataError(
                f"another process is writing {self.partial}; wait for it, or choose another --out"
            ) from None
        return file

    def _keep_whole_batches(self) -> None:
        """Find the end of the last whole batch, cut off what comes after it, and count the rows before it."""
        end, rows, errors, quotes = len(self._header), 0, 0, 0
        header = self._file.readline()
        if header != self._header:
            # Killed before the first row was written.
            end = 0
        else:
            position = end
            for line in self._file:
                position += len(line)
                quotes += line.count(b'"')
                if quotes % 2 or not line.endswith(b"\n"):
                    # Inside a quoted cell, or cut short.
                    continue
                rows += 1
                errors += not line.endswith(b",\n")
                if rows % self.batch == 0 or rows == self.total:
                    end, self.kept, self.failed = position, rows, errors
        self._file.seek(end)
        self._file.truncate()
        if end == 0:
            self._file.write(self._header)
            self._file.flush()

    def _in_words(self, error: OSError) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DataError(
                f"the disk is full; what is done is kept in {self.partial}: free some space and run again with --resume"
            )
        return error


BATCH = 32


# What of a run or a bundle changes its answers. Others, such as metrics.json, may be written again meanwhile.
_DECISIVE = (
    *("model.json", "model.safetensors", "calibration.json", "out_of_scope.safetensors"),
    *("bundle.json", "model.onnx", "model.int8.onnx"),
)


_AFTER = ("malignancy", "refer", "out_of_scope", "warnings", "error")


# Gives the batches of the rows from a number on, in order.
Work = Callable[[Cases, int], Iterator["Batch"]]


# A photograph, none, or why there is none.
_Prepared = NDArray[np.uint8] | str | None


@dataclass(frozen=True)
class ModelFolder:
    """A run or an exported bundle, and how it shall be loaded: what another process needs to load the same.

    Attributes:
        path: the folder.
        device: `cpu`, `cuda`, ...
        variant: of a bundle: `float32` or `int8`.
    """

    path: Path
    device: str = "cpu"
    variant: str = "float32"

    def load(self) -> Predictor:
        """Load the model."""
        return Predictor.load(self.path, self.device, self.variant)

    @property
    def made_of(self) -> dict[str, str]:
        """What tells its answers from those of another model."""
        files = {name: sha256_of_file(self.path / name) for name in _DECISIVE if (self.path / name).is_file()}
        return {
            "model": sha256_of_json(files),
            "device": self.device,
            "variant": self.variant,
            "dualrefnet": dualrefnet.__version__,
        }


@dataclass(frozen=True)
class Batch:
    """The rows of one batch of the result.

    Attributes:
        lines: CSV.
        failed: rows with an error.
    """

    lines: bytes
    failed: int


@dataclass(frozen=True)
class Summary:
    """What became of the rows.

    Attributes:
        classified: rows with a prediction.
        failed: rows with an error.
        resumed: how many of both were there before.
    """

    classified: int
    failed: int
    resumed: int


def columns(classes: Sequence[str]) -> list[str]:
    """Return the header of the result."""
    return ["image", "predicted", "likely", *(f"prob_{name}" for name in classes), *_AFTER]


def find_files(sources: Sequence[Path]) -> list[Path]:
    """Return the image files that are meant; see `dualrefnet.deploy.batch.walk_images`, which holds none of them in
    memory.
    """
    return list(walk_images(sources))


def predict_to_csv(
    model: ModelFolder,
    classes: Sequence[str],
    cases: Cases,
    out: Path,
    work: Work,
    *,
    batch: int = BATCH,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Classify every row of a list.

    Args:
        model: what predicts; a result is only gone on with by the same.
        classes: its classes.
        cases: the rows.
        out: CSV to write: image, predicted, likely, prob_<CLASS>..., malignancy, refer, out_of_scope, warnings, error.
        work: does it: `predict_here`, or what `dualrefnet.deploy.ray_batch.ray_work` returns.
        batch: rows that the model sees at once.
        resume: go on with what an interrupted call left.
        progress: called with (rows done, rows in all).

    Raises:
        DataError: see `dualrefnet.deploy.batch.ResultFile`.
    """
    with ResultFile(out, columns(classes), {**model.made_of, **cases.made_of}, cases.total, batch, resume) as result:
        done = result.kept
        if progress:
            progress(done, cases.total)
        for rows in work(cases, done) if done < cases.total else ():
            result.append(rows.lines, rows.failed)
            done = min(done + batch, cases.total)
            if progress:
                progress(done, cases.total)
        if done < cases.total:
            raise DataError(f"the list had {cases.total} rows and now ends after {done}; it was changed meanwhile")
        result.finish()
    return Summary(cases.total - result.failed, result.failed, result.kept)


def predict_batches(
    predictor: Predictor, cases: Iterator[Case], batch: int = BATCH, workers: int | None = None
) -> Iterator[Batch]:
    """Classify rows, in order; photographs of the next batches are decoded by threads while the model works on one.

    Args:
        predictor: the model.
        cases: the rows; never more than three batches of them are taken ahead.
        batch: rows that the model sees at once.
        workers: threads that decode; None: one a core.
    """
    prepared = _prepare_ahead(predictor, cases, window=2 * batch, workers=workers or min(16, os.cpu_count() or 1))
    while chunk := list(islice(prepared, batch)):
        yield _classify(predictor, chunk, len(predictor.classes))


def predict_here(
    predictor: Predictor, cases: Cases, first: int, *, batch: int = BATCH, workers: int | None = None
) -> Iterator[Batch]:
    """Do the work of `predict_to_csv` on this machine; see `predict_batches`."""
    return predict_batches(predictor, cases.start_at(first), batch, workers)


def _prepare_ahead(
    predictor: Predictor, cases: Iterator[Case], window: int, workers: int
) -> Iterator[tuple[Case, _Prepared]]:
    """Give rows with their photographs, or why there is none; `window` rows are being prepared at any time."""

    def prepare(case: Case) -> _Prepared:
        if case.error:
            return case.error
        try:
            predictor.check_metadata(case.form)
            return predictor.prepare(case.path) if predictor.reads_image else None
        except (DataError, ImageError) as error:
            return str(error)

    waiting: deque[tuple[Case, Future[_Prepared]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for case in cases:
            waiting.append((case, pool.submit(prepare, case)))
            if len(waiting) > window:
                first, image = waiting.popleft()
                yield first, image.result()
        while waiting:
            first, image = waiting.popleft()
            yield first, image.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _classify(predictor: Predictor, chunk: list[tuple[Case, _Prepared]], classes: int) -> Batch:
    good = [(case, image) for case, image in chunk if not isinstance(image, str)]
    predictions = iter(predictor.predict_arrays([image for _, image in good], [case.form for case, _ in good]))
    rows = []
    for case, image in chunk:
        if isinstance(image, str):
            rows.append([case.name, "", "", *[""] * classes, *[""] * (len(_AFTER) - 1), " ".join(image.split())])
        else:
            rows.append([case.name, *_cells(next(predictions))])
    return Batch(csv_lines(rows), len(chunk) - len(good))


def _cells(prediction: Prediction) -> list[str]:
    def written(value: Any, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        prediction.label,
        " ".join(prediction.likely),
        *(f"{value:.6f}" for value in prediction.probabilities.values()),
        written(prediction.malignancy, 6),
        "" if prediction.refer is None else str(prediction.refer),
        written(prediction.out_of_scope, 3),
        "; ".join(prediction.warnings),
        "",
    ]


# Seconds over which the speed is taken, and between two lines where there is no terminal.
WINDOW = 30.0


EVERY = 60.0


class Pace:
    """The speed of the last half minute; what an earlier process did counts for nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def after(self, done: int, total: int) -> str:
        """Note that `done` of `total` are done; return the speed and the time left, empty until both can be told."""
        now = self._clock()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()
        then, before = self._seen[0]
        if now <= then or done <= before:
            return ""
        speed = (done - before) / (now - then)
        left = timedelta(seconds=round((total - done) / speed))
        return f"{speed:,.{0 if speed >= 10 else 1}f} images/s, {left} left"


@contextmanager
def show_pace(description: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that takes (done, in all): it moves a bar on a terminal, and writes a line a minute elsewhere."""
    pace = Pace()
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None, said="")
        said_at = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal said_at
            said = pace.after(done, total)
            progress.update(task, completed=done, total=total, said=said)
            if not console.is_terminal and time.monotonic() - said_at > EVERY:
                said_at = time.monotonic()
                remark(f"{description}: {done:,} of {total:,}, {said}")

        yield update
