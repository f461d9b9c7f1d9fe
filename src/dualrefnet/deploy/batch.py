"""Prediction of many images into one CSV, resumable, in memory that doesn't grow with their number.

Rows are predicted in chunks. Each finished chunk is a file in the folder `OUT.chunks`; `--resume` skips those that are
there, and at the end they are joined. A chunk holds whole batches: the last digit of a prediction may depend on the
other images of its batch, and an interrupted result must equal an uninterrupted one to the byte.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

import dualrefnet
from dualrefnet.data.csv_table import DEFAULT_DESCRIPTION, open_csv, read_description
from dualrefnet.data.images import (
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    ImageIndex,
    NamedImages,
    files_in,
    image_path,
    is_image,
    list_files,
)
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import DataError, ImageError
from dualrefnet.files import (
    atomic_path,
    escape_cell,
    locked,
    make_folder,
    read_json,
    refuse_special,
    sha256_of_file,
    sha256_of_json,
    write_json,
)
from dualrefnet.progress import progress_bar, warn
from dualrefnet.runtime.prediction import Prediction

if TYPE_CHECKING:
    import pandas as pd

BATCH = 32
# Batches in a chunk: what a killed process loses at most, and what a Ray actor is given at once.
CHUNK = 16
# Files of a run or a bundle that change its predictions; others, such as metrics.json, may be written again meanwhile.
_DECISIVE = (
    *("model.json", "model.safetensors", "calibration.json", "out_of_scope.safetensors"),
    *("bundle.json", "model.onnx", "model.int8.onnx"),
)
_NO_IMAGES = "{} has no column {}, so every row is predicted without an image; if a column names them, call it so"
_AFTER = ("malignancy", "refer", "out_of_scope", "warnings", "error")


@dataclass(frozen=True)
class Case:
    """One row to predict."""

    name: str  # in the result
    path: Path | None  # of the image; None: missing
    metadata: Mapping[str, str] = field(default_factory=dict)
    error: str = ""  # why it can't be predicted, if that is known already


class Cases(Protocol):
    """Rows to predict, in an order that doesn't change."""

    total: int
    fingerprint: dict[str, str]

    def __iter__(self) -> Iterator[Case]: ...


# Number of the chunk, and its rows; a chunk's CSV without header.
Chunk = tuple[int, list[Case]]
# An image, None, or why the case can't be predicted.
Prepared = NDArray[np.uint8] | str | None
Work = Callable[[Iterator[Chunk]], Iterator[tuple[int, bytes]]]


class MetadataTable:
    """A CSV with metadata, read row by row."""

    def __init__(self, path: Path, fields: Sequence[str], image_columns: Sequence[str]) -> None:
        """Read the header, and warn of columns that the model doesn't read."""
        self.path = path
        self.columns = [name.strip() for name in next(self._read(), [])]
        if not any(self.columns):
            raise DataError(f"{path} is empty")
        twice = {name for name in self.columns if self.columns.count(name) > 1}
        if twice:
            raise DataError(f"{path} has two columns called {', '.join(sorted(twice))}; keep one")
        self.image_column = next((name for name in image_columns if name in self.columns), None)
        self.fields = {name: self.columns.index(name) for name in fields if name in self.columns}
        ignored = [name for name in self.columns if name not in self.fields and name != self.image_column]
        if fields and ignored and not self.fields:
            raise DataError(f"{path} has none of the model's fields: {', '.join(fields)}")
        if ignored:
            warn(f"columns of {path} that the model doesn't read: {', '.join(ignored)}")

    def rows(self) -> Iterator[tuple[str, dict[str, str], str]]:
        """Give each row's image ("" if it has none), its values (an empty cell is missing), and its error."""
        place = self.columns.index(self.image_column) if self.image_column else len(self.columns)
        for cells in islice(self._read(), 1, None):
            image, values, error = (cells[place] if place < len(cells) else ""), {}, ""
            if len(cells) == len(self.columns):
                values = {name: cells[index] for name, index in self.fields.items() if cells[index]}
            else:
                error = f"the row has {len(cells)} cells and the header of {self.path.name} {len(self.columns)}"
            yield image, values, error

    def _read(self) -> Iterator[list[str]]:
        with open_csv(self.path) as reader:
            # An empty line gives no cells.
            yield from filter(None, reader)


class ImageCases:
    """Image files and folders, and a table of metadata that is joined by the image's path.

    Folders are walked again for each pass; what a table says of the images is held in memory, about 300 bytes an image.
    """

    def __init__(self, sources: Sequence[Path], metadata: Path | None, predictor: Predictor) -> None:
        """List the images of files and folders; none of them is opened."""
        self._sources = sources
        self._fields: tuple[str, ...] = ()
        self._metadata: dict[str, tuple[str, ...]] = {}
        digest, self.total = hashlib.sha256(), 0
        for path in walk_images(sources):
            digest.update(os.fsencode(path) + b"\0")
            self.total += 1
        if not self.total:
            suffixes = " ".join(IMAGE_SUFFIXES)
            raise DataError(f"no image is in {', '.join(map(str, sources))}; known suffixes: {suffixes}")
        if metadata:
            self._join(MetadataTable(metadata, [field.name for field in predictor.fields], IMAGE_COLUMNS))
            without = self.total - len(self._metadata)
            if without:
                warn(f"{without} of {self.total} images have no row in {metadata}: all of their metadata are missing")
        self.fingerprint = {"images": digest.hexdigest(), "metadata": sha256_of_file(metadata) if metadata else ""}

    def __iter__(self) -> Iterator[Case]:
        for path in walk_images(self._sources):
            values = zip(self._fields, self._metadata.get(str(path), ()), strict=False)
            yield Case(str(path), path, {name: value for name, value in values if value})

    def _join(self, table: MetadataTable) -> None:
        if table.image_column is None:
            raise DataError(
                f"{table.path} names no images: it needs a column image (file name or id); it has: "
                f"{', '.join(table.columns)}"
            )
        self._fields = tuple(table.fields)
        images = NamedImages(self._sources)
        for number, (image, values, error) in enumerate(table.rows(), start=1):
            if error:
                raise DataError(f"{table.path}, row {number}: {error}")
            path = images.find(image)
            if path in self._metadata:
                raise DataError(f"{table.path} has two rows for image {path}; keep one")
            if path is not None:
                # Most values are those of other rows.
                self._metadata[path] = tuple(sys.intern(values.get(name, "")) for name in self._fields)


class TableCases:
    """A CSV with a row a case: one column is the image's path (as `dataset.yaml` names it, else `image`), others
    metadata.
    """

    def __init__(self, path: Path, predictor: Predictor) -> None:
        """Read the CSV once, to count its rows and to check that all of it can be read."""
        self._folder = path.parent
        self._described: tuple[Path, ...] = ()
        columns: tuple[str, ...] = IMAGE_COLUMNS[:1]
        if (path.parent / DEFAULT_DESCRIPTION).is_file():
            description = read_description(path.parent / DEFAULT_DESCRIPTION)
            self._described = description.image_folders(path.parent)
            columns = (description.image, *columns)
        self._table = MetadataTable(path, [field.name for field in predictor.fields], columns)
        self._reads, self._needs = predictor.reads_image, predictor.needs_image
        if self._table.image_column is None and self._needs:
            raise DataError(
                f"{path} has no column {columns[0]}, and this model needs images: name their files there, or use "
                "a model that does without (metadata.imputation=token, or model.method=metadata_only); the columns "
                f"are: {', '.join(self._table.columns)}"
            )
        if self._table.image_column is None and self._reads:
            warn(_NO_IMAGES.format(path, columns[0]))
        self.total = sum(1 for _ in self._table.rows())
        if not self.total:
            raise DataError(f"{path} has no rows")
        self.fingerprint = {"table": sha256_of_file(path)}

    def __iter__(self) -> Iterator[Case]:
        images_in = lru_cache(maxsize=8)(lambda folder: ImageIndex(files_in([folder])))
        named: NamedImages | None = None
        for number, (image, values, error) in enumerate(self._table.rows(), start=1):
            if not error and not image and self._needs:
                values, error = {}, "the row names no image, and this model needs one"
            path = None
            if image and self._reads and not error:
                try:
                    found = (_find_below(folder, image, images_in) for folder in (self._folder, *self._described))
                    path = next(filter(None, found), None)
                    if path is None:
                        named = named or NamedImages(self._described)
                        path = Path(named.find(image) or self._folder / image)
                except DataError as ambiguous:
                    error = str(ambiguous)
            yield Case(image or str(number), path, values, error)


def _find_below(folder: Path, name: str, images_in: Callable[[Path], ImageIndex]) -> Path | None:
    """Return the file of that name in a folder, None if there is none; see `ImageIndex.find`."""
    path, named = folder / name, folder / image_path(name)
    if path.is_file():
        return path
    found = images_in(named.parent).find(named.name) if named.parent.is_dir() else None
    return None if found is None else Path(found)


def walk_images(sources: Iterable[Path]) -> Iterator[Path]:
    """Go through image files: sorted within each folder, then those of the folders in it; hidden ones are left out."""
    for source in sources:
        if source.is_dir():
            yield from map(Path, filter(is_image, list_files(source)))
        elif source.is_file():
            yield source
        else:
            raise DataError(f"there is no file or folder {source}")


@dataclass(frozen=True)
class ModelFolder:
    """A run or an exported bundle and how to load it, for another process too."""

    path: Path
    device: str = "cpu"
    variant: str = "float32"

    def load(self) -> Predictor:
        return Predictor.load(self.path, self.device, self.variant)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What its predictions depend on."""
        files = {name: sha256_of_file(self.path / name) for name in _DECISIVE if (self.path / name).is_file()}
        version = dualrefnet.__version__
        return {"model": sha256_of_json(files), "device": self.device, "variant": self.variant, "dualrefnet": version}


@dataclass(frozen=True)
class Summary:
    """Numbers of rows: with a prediction, with an error, and of both those of an earlier process."""

    classified: int
    failed: int
    resumed: int


def predict_to_csv(
    model: ModelFolder,
    classes: Sequence[str],
    cases: Cases,
    out: Path,
    work: Work,
    *,
    batch: int = BATCH,
    resume: bool = False,
) -> Summary:
    """Classify every case; `work` is `predict_chunks` or `ray_work`. `resume` skips chunks that were finished."""
    rows, folder = batch * CHUNK, out.with_name(f"{out.name}.chunks")
    head = csv_lines([["image", "predicted", "likely", *(f"prob_{name}" for name in classes), *_AFTER]])
    with _locked(folder, out), progress_bar("predicting") as show:
        about = {**model.fingerprint, **cases.fingerprint, "rows": cases.total, "batch": batch}
        if resume and out.is_file() and not (folder / "about.json").is_file():
            summary = _finished(out, head, cases.total)
            shutil.rmtree(folder)
            return summary
        _open_folder(folder, about, resume)
        files = [folder / f"{number:08}.csv" for number in range(-(-cases.total // rows))]
        finished = {number for number, file in enumerate(files) if file.is_file()}
        done = resumed = sum(min(rows, cases.total - number * rows) for number in finished)
        show(done, cases.total)
        for number, lines in work(_unfinished(cases, rows, finished)) if len(finished) < len(files) else ():
            # Without this a machine that loses its power may keep a finished file's name, and not its content.
            with atomic_path(files[number]) as temporary, temporary.open("wb") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            done += min(rows, cases.total - number * rows)
            show(done, cases.total)
        if done < cases.total:
            raise DataError(f"there were {cases.total} rows and now are fewer; the list was changed meanwhile")
        failed = _join_chunks(files, out, head)
        shutil.rmtree(folder)
    return Summary(cases.total - failed, failed, resumed)


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Keep a second call out of the folder of chunks, which is made."""
    refuse_special(out)
    busy = f"another process is writing {out}; wait until it ends, or choose another --out"
    with locked(make_folder(folder) / "lock", busy):
        yield


def _finished(out: Path, head: bytes, total: int) -> Summary:
    with out.open("rb") as file:
        same = file.readline() == head
    with out.open(encoding="utf-8", newline="") as text:
        errors = [row[-1] != "" for row in islice(csv.reader(text), 1, None)] if same else []
    if len(errors) != total:
        raise DataError(f"{out} is finished, of other rows or classes; without --resume it is made again")
    return Summary(total - sum(errors), sum(errors), total)


def _open_folder(folder: Path, about: Mapping[str, Any], resume: bool) -> None:
    """Begin a folder of chunks, or check that an earlier one was made of the same."""
    file = folder / "about.json"
    if not file.is_file():
        for leftover in folder.glob("*.csv"):
            leftover.unlink()
        write_json(file, about)
        return
    if not resume:
        raise DataError(f"{folder} is of an unfinished prediction: --resume goes on with it; remove it to begin anew")
    before = read_json(file)
    changed = [name for name in {**before, **about} if before.get(name) != about.get(name)]
    if changed:
        raise DataError(
            f"{folder} can't be resumed, since this has changed: {', '.join(changed)}; call it as before, or remove "
            "it to begin anew"
        )


def _unfinished(cases: Cases, rows: int, finished: set[int]) -> Iterator[Chunk]:
    stream, number = islice(cases, cases.total), 0
    while chunk := list(islice(stream, rows)):
        if number not in finished:
            yield number, chunk
        number += 1


def _join_chunks(files: Sequence[Path], out: Path, head: bytes) -> int:
    """Write the result, atomically; return how many rows have an error."""
    failed = 0
    with atomic_path(out) as temporary, temporary.open("wb") as whole:
        whole.write(head)
        for file in files:
            with file.open(encoding="utf-8", newline="") as text:
                failed += sum(row[-1] != "" for row in csv.reader(text))
            with file.open("rb") as chunk:
                shutil.copyfileobj(chunk, whole)
        whole.flush()
        os.fsync(whole.fileno())
    return failed


def predict_table(predictor: Predictor, table: pd.DataFrame) -> pd.DataFrame:
    """Classify the rows of a DataFrame: its file in the column `image`, metadata in others; see `Predictor.predict`."""
    import pandas as pd

    fields = [field.name for field in predictor.fields if field.name in table.columns]
    named = IMAGE_COLUMNS[0] in table.columns
    if not named and predictor.needs_image:
        raise DataError(f"the table has no column {IMAGE_COLUMNS[0]}; it has: {', '.join(map(str, table.columns))}")
    if not named and predictor.reads_image:
        warn(_NO_IMAGES.format("the table", IMAGE_COLUMNS[0]))
    ignored = [str(name) for name in table.columns if name not in (*fields, IMAGE_COLUMNS[0])]
    if ignored:
        warn(f"columns of the table that the model doesn't read: {', '.join(ignored)}")
    records = table.astype(object).where(table.notna(), None).to_dict("records")
    cases = []
    for number, record in enumerate(records, start=1):
        image = record.get(IMAGE_COLUMNS[0])
        values = {name: record[name] for name in fields if record[name] is not None}
        lost = "the row names no image, and this model needs one" if image is None and predictor.needs_image else ""
        cases.append(Case(str(image or number), None if image is None else Path(image), values, lost))
    rows: list[dict[str, Any]] = []
    for start in range(0, len(cases), BATCH):
        part = cases[start : start + BATCH]
        found = _answers(predictor, part, [_prepare(predictor, case) for case in part])
        rows += [_row(case, one) for case, one in zip(part, found, strict=True)]
    names = ["image", "predicted", "likely", *(f"prob_{name}" for name in predictor.classes), *_AFTER]
    return pd.DataFrame(rows, index=table.index, columns=names)


def _row(case: Case, found: Prediction | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"image": case.name, "error": found}
    probabilities = {f"prob_{name}": value for name, value in found.probabilities.items()}
    values = {"image": case.name, "predicted": found.label, "likely": " ".join(found.likely), **probabilities}
    values |= {name: getattr(found, name) for name in ("malignancy", "refer", "out_of_scope")}
    return values | {"warnings": "; ".join(found.warnings), "error": ""}


def csv_lines(rows: Iterable[Sequence[str]]) -> bytes:
    """Return rows as CSV; names that aren't UTF-8 are written with escapes."""
    text = io.StringIO(newline="")
    # The writer quotes what is part of its line end: with \r\n a carriage return within a name is quoted too.
    writer, lines = csv.writer(text, lineterminator="\r\n"), []
    for row in rows:
        text.seek(0)
        text.truncate()
        writer.writerow([escape_cell(cell) for cell in row])
        lines.append(text.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines).encode("utf-8", errors="backslashreplace")


def predict_chunks(
    predictor: Predictor, chunks: Iterable[Chunk], batch: int = BATCH, workers: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """Classify chunks on this machine: threads (None: one a core) decode two batches while the model predicts one."""
    pool = ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1), thread_name_prefix="decode")

    def decoded() -> Iterator[tuple[int, bool, list[Case], list[Future[Prepared]]]]:
        """Give batches with their chunk's number and whether they end it; two more are being decoded."""
        ahead: deque[tuple[int, bool, list[Case], list[Future[Prepared]]]] = deque()
        for number, cases in chunks:
            for start in range(0, len(cases), batch):
                part = cases[start : start + batch]
                futures = [pool.submit(_prepare, predictor, case) for case in part]
                ahead.append((number, start + batch >= len(cases), part, futures))
                if len(ahead) > 2:
                    yield ahead.popleft()
        yield from ahead

    lines = b""
    try:
        for number, last, cases, futures in decoded():
            lines += _classify(predictor, cases, [future.result() for future in futures])
            if last:
                yield number, lines
                lines = b""
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(predictor: Predictor, case: Case) -> Prepared:
    if case.error:
        return case.error
    try:
        predictor.check_metadata(case.metadata)
        return predictor.prepare(case.path) if predictor.reads_image else None
    except (DataError, ImageError) as error:
        return str(error)


def _answers(predictor: Predictor, cases: list[Case], prepared: list[Prepared]) -> list[Prediction | str]:
    """Return each case's prediction, or why there is none."""
    good = [(case, image) for case, image in zip(cases, prepared, strict=True) if not isinstance(image, str)]
    predictions = iter(_predict(predictor, [image for _, image in good], [case.metadata for case, _ in good]))
    return [image if isinstance(image, str) else next(predictions) for image in prepared]


def _classify(predictor: Predictor, cases: list[Case], prepared: list[Prepared]) -> bytes:
    rows = []
    for case, found in zip(cases, _answers(predictor, cases, prepared), strict=True):
        if isinstance(found, str):
            blank = [""] * (len(predictor.classes) + len(_AFTER) + 1)
            rows.append([case.name, *blank, " ".join(found.split())])
        else:
            rows.append([case.name, *_cells(found)])
    return csv_lines(rows)


def _predict(
    predictor: Predictor, images: list[NDArray[np.uint8] | None], metadata: list[Mapping[str, str]]
) -> list[Prediction | str]:
    """Return predictions, and errors where the model can't predict; one case that it can't must not spoil others."""
    try:
        return [*predictor.predict_arrays(images, metadata)]
    except DataError as error:
        if len(images) == 1:
            return [str(error)]
        pairs = zip(images, metadata, strict=True)
        return [_predict(predictor, [image], [values])[0] for image, values in pairs]


def _cells(prediction: Prediction) -> list[str]:
    malignancy, score = prediction.malignancy, prediction.out_of_scope
    return [
        prediction.label,
        " ".join(prediction.likely),
        *(f"{value:.6f}" for value in prediction.probabilities.values()),
        "" if malignancy is None else f"{malignancy:.6f}",
        "" if prediction.refer is None else str(prediction.refer),
        "" if score is None else f"{score:.3f}",
        "; ".join(prediction.warnings),
        "",
    ]
