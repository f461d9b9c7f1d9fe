"""Arrays that are computed once and memory-mapped afterwards.

The image store holds every image decoded and preprocessed; a derived store what is computed from each of these images:
features of a frozen encoder, super-resolved targets. A store fills in a folder of its own, its disk space taken first
and by one process at a time; an interrupted filling goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dualrefnet.data.images import decode_image
from dualrefnet.errors import DataError, ImageError
from dualrefnet.files import FULL, locked, make_folder, read_csv, read_json, sha256_of_json, write_csv, write_json
from dualrefnet.progress import progress_bar
from dualrefnet.recipe import ImageSection
from dualrefnet.runtime.preprocessing import preprocess

if TYPE_CHECKING:
    import pandas as pd

CACHE_VARIABLE = "DUALREFNET_CACHE"
# The layout of the folder and the meaning of the settings; part of the fingerprint.
FORMAT = 1
PENDING, READY, BROKEN = 0, 1, 2

Arrays = dict[str, NDArray[Any]]
Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


def default_cache() -> Path:
    """Return the folder for stores: `$DUALREFNET_CACHE`, else `dualrefnet` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    try:
        return (
            Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualrefnet"
        )
    except RuntimeError:
        raise DataError(f"there is no home folder for the cache; set {CACHE_VARIABLE} to a folder") from None


@dataclass(frozen=True)
class ImageStore:
    path: Path
    image_ids: tuple[str, ...]  # in row order
    side: int  # S, pixels
    broken: dict[str, str]  # image id -> why it could not be read

    def rows_of(self, image_ids: Sequence[str]) -> NDArray[np.int64]:
        position = {image_id: row for row, image_id in enumerate(self.image_ids)}
        return np.array([position[image_id] for image_id in image_ids], dtype=np.int64)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return _read(self.path / "images.u8", "uint8", (len(self.image_ids), self.side, self.side, 3), rows)


@dataclass(frozen=True)
class Part:
    """One array of a derived store."""

    dtype: str  # NumPy's name, such as `float32`
    shape: tuple[int, ...]  # of one row

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class DerivedStore:
    path: Path
    count: int  # rows, as many as the image store has
    parts: dict[str, Part]

    def read(self, rows: NDArray[np.int64]) -> Arrays:
        """Return every part's `rows`, each (len(rows), *shape)."""
        return {
            name: _read(self.path / name, part.dtype, (self.count, *part.shape), rows)
            for name, part in self.parts.items()
        }


def _read(path: Path, dtype: str, shape: tuple[int, ...], rows: NDArray[np.int64]) -> NDArray[Any]:
    # Mapped for this call only: pages of a long-lived map count as this process's memory, and a data set has more of
    # them than a small machine has RAM. Mapping costs microseconds, and the bytes stay in the system's cache.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=shape)[rows])


def fill_store(
    table: pd.DataFrame,
    section: ImageSection,
    side: int | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ImageStore:
    """Return the store of the table's images, filling what is missing; the side is `section.size` unless given."""
    import pandas as pd

    size = side or section.size
    folder = (cache or default_cache()) / "stores" / f"{_fingerprint(table, section, size)}-{size}px"

    def fill(partial: Path) -> None:
        broken = _fill_images(partial, table, section, size, workers, progress)
        reasons = {"image_id": list(broken), "reason": list(broken.values())}
        write_csv(partial / "broken.csv", pd.DataFrame(reasons, dtype=object))
        index = {"format": FORMAT, "side": size, "settings": section.model_dump(mode="json")}
        write_json(partial / "index.json", {**index, "image_ids": table["image_id"].astype(str).tolist()})

    _fill_once(folder, fill)
    return open_store(folder)


def delete_if_changed(store: ImageStore, table: pd.DataFrame, section: ImageSection, workers: int | None) -> list[str]:
    """Read every image again; if some differ from the store, delete it and all derived ones, and name them."""

    def differs(row: int) -> bool:
        was_broken = store.image_ids[row] in store.broken
        try:
            image = preprocess(decode_image(table["image_path"].iloc[row]), section, store.side)
        except ImageError:
            return not was_broken
        return was_broken or not np.array_equal(image, store.read(np.array([row]))[0])

    results = map_ahead(differs, range(len(table)), workers or os.cpu_count(), label="comparing images")
    changed = [image_id for image_id, different in zip(store.image_ids, results, strict=True) if different]
    if changed:
        shutil.rmtree(store.path)
        shutil.rmtree(store.path.parent.parent / "derived", ignore_errors=True)
    return changed


def open_store(path: Path) -> ImageStore:
    try:
        index = read_json(path / "index.json")
        broken = read_csv(path / "broken.csv", dtype=str, keep_default_na=False)
        if (path / "images.u8").stat().st_size != len(index["image_ids"]) * index["side"] ** 2 * 3:
            raise ValueError
    except (FileNotFoundError, ValueError):
        raise DataError(f"the store {path} is damaged; delete that folder, and it is filled again") from None
    reasons = dict(zip(broken["image_id"], broken["reason"], strict=True))
    return ImageStore(path, tuple(index["image_ids"]), index["side"], reasons)


def _fingerprint(table: pd.DataFrame, section: ImageSection, side: int) -> str:
    """Name a store by what it is made from: ids, sizes and times of the files, and the settings."""
    sources = []
    for image_id, path in zip(table["image_id"], table["image_path"], strict=True):
        try:
            state = os.stat(path)
        except FileNotFoundError:
            raise DataError(f"the image of {image_id} has vanished: {path}") from None
        sources.append([image_id, state.st_size, state.st_mtime_ns])
    # The side says all about the size: 448 of a native x2 target is the same store as a 448 px input.
    settings = section.model_dump(mode="json", exclude={"size"})
    return sha256_of_json({"format": FORMAT, "side": side, "settings": settings, "sources": sources})[:20]


def _fill_images(
    partial: Path, table: pd.DataFrame, section: ImageSection, side: int, workers: int | None, progress: Progress | None
) -> dict[str, str]:
    """Fill the rows that an interrupted filling has left; return image id -> reason for the broken ones."""
    ids, paths = table["image_id"].astype(str).tolist(), table["image_path"].tolist()
    count, row_bytes, marks = len(ids), side * side * 3, partial / "status.u8"
    if _reserve(partial / "images.u8", count * row_bytes, extra=count):
        marks.unlink(missing_ok=True)
    if not marks.exists() or marks.stat().st_size != count:
        marks.write_bytes(bytes(count))
    # Broken files are tried again: their reason has to be reported, and they may have been fixed.
    todo = np.flatnonzero(np.fromfile(marks, dtype=np.uint8) != READY).tolist()
    broken: dict[str, str] = {}

    def work(row: int) -> NDArray[np.uint8] | ImageError:
        try:
            return preprocess(decode_image(paths[row]), section, side)
        except ImageError as error:
            return error

    with (
        (partial / "images.u8").open("r+b") as images,
        marks.open("r+b") as status,
        closing(map_ahead(work, todo, workers or os.cpu_count())) as results,
    ):
        for done, (row, result) in enumerate(zip(todo, results, strict=True), start=count - len(todo) + 1):
            if isinstance(result, ImageError):
                broken[ids[row]] = str(result)
            else:
                images.seek(row * row_bytes)
                images.write(result.tobytes())
                # The image before its mark: a kill between the two costs one image, never a wrong one.
                images.flush()
            status.seek(row)
            status.write(bytes([BROKEN if isinstance(result, ImageError) else READY]))
            status.flush()
            if progress:
                progress(done, count)
    return broken


def fill_derived_store(
    source: ImageStore,
    name: str,
    settings: Mapping[str, Any],
    parts: Mapping[str, Part],
    compute: Callable[[NDArray[np.uint8]], Arrays],
    batch: int = 32,
    progress: Progress | None = None,
) -> DerivedStore:
    """Return the store of what `compute` makes of (B, S, S, 3) images; `settings` are what it depends on."""
    count = len(source.image_ids)
    key = sha256_of_json({"format": FORMAT, "source": source.path.name, "settings": dict(settings)})[:20]
    folder = source.path.parent.parent / "derived" / f"{name}-{key}"

    def fill(partial: Path) -> None:
        counter = partial / "done.json"
        fresh = [_reserve(partial / part, count * shape.row_bytes) for part, shape in parts.items()]
        done = read_json(counter) if counter.is_file() and not any(fresh) else 0
        for start in range(done, count, batch):
            rows = np.arange(start, min(start + batch, count))
            values = compute(source.read(rows))
            for part, shape in parts.items():
                array = np.ascontiguousarray(values[part], dtype=shape.dtype)
                if array.shape != (len(rows), *shape.shape):
                    raise ValueError(f"{part} must be {(len(rows), *shape.shape)}, not {array.shape}")
                with (partial / part).open("r+b") as file:
                    file.seek(start * shape.row_bytes)
                    file.write(array.tobytes())
            # The arrays before their count: a kill between the two costs one batch, never a wrong one.
            write_json(counter, start + len(rows))
            if progress:
                progress(start + len(rows), count)
        write_json(partial / "settings.json", dict(settings))

    _fill_once(folder, fill)
    for part, shape in parts.items():
        if not (folder / part).is_file() or (folder / part).stat().st_size != count * shape.row_bytes:
            raise DataError(f"the store {folder} is damaged; delete that folder, and it is filled again")
    return DerivedStore(folder, count, dict(parts))


def _fill_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` complete a partial folder that then becomes `folder`; other processes wait, and find it there."""
    if folder.is_dir():
        return
    partial = folder.with_name(folder.name + ".partial")
    make_folder(folder.parent)
    with locked(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return  # Another process has filled it meanwhile.
        partial.mkdir(exist_ok=True)
        try:
            fill(partial)
        except OSError as error:
            if error.errno not in FULL:
                raise
            kept = "what is done is kept, free some space and run again"
            raise DataError(f"the disk is full: {folder.parent} has no room for the store; {kept}") from error
        os.replace(partial, folder)


def _reserve(path: Path, size: int, extra: int = 0) -> bool:
    """Make a file of `size` bytes, their disk space taken and `extra` left; return False if it was there already."""
    have = path.stat().st_size if path.exists() else 0
    if have == size:
        return False
    free = shutil.disk_usage(path.parent).free
    if free + have < size + extra:
        needed = f"the store needs {size / 2**30:.2f} GiB in {path.parent.parent} and {free / 2**30:.2f} GiB are free"
        raise DataError(f"{needed}; free some space, or set {CACHE_VARIABLE} to a folder on a larger disk")
    try:
        with path.open("wb") as file:
            # Space that is only promised (a sparse file) would end in a crash of the map when the disk is full.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def map_ahead(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | None = None,
    ahead: int | None = None,
    label: str = "",
) -> Generator[Result, None, None]:
    """Yield `work` of each item in order, computed in threads at most `ahead` items before the reader.

    `workers` None: one a core, at most 16; a `label` shows a bar.
    """
    threads = workers or min(16, os.cpu_count() or 1)
    coming: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool, progress_bar(label, bool(label)) as show:
        try:
            for done, item in enumerate(items):
                coming.append(pool.submit(work, item))
                if len(coming) >= (ahead or 4 * threads):
                    yield coming.popleft().result()
                    show(done + 1 - len(coming), len(items))
            while coming:
                yield coming.popleft().result()
                show(len(items) - len(coming), len(items))
        finally:
            for future in coming:
                future.cancel()
