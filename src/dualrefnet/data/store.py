"""Large files that are filled over time: take the space first, let one process fill, say what a full disk means."""

# also: The image store: every photograph decoded and preprocessed once, in one file of bytes that is memory-mapped.
# also: Arrays that are computed once from every picture of an image store: features of a frozen encoder, super-resolved
# targets.

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.images import decode_image
from dualrefnet.errors import DataError, ImageError
from dualrefnet.files import read_json, sha256_of_json, write_csv, write_json
from dualrefnet.recipe import ImageSection
from dualrefnet.runtime.preprocessing import preprocess

CACHE_VARIABLE = "DUALREFNET_CACHE"


def default_cache() -> Path:
    """Return the folder for stores: `$DUALREFNET_CACHE`, else `dualrefnet` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualrefnet"


def reserve(path: Path, size: int, extra: int = 0) -> bool:
    """Make a file of `size` bytes whose space on the disk is taken; return False if it was there already.

    Args:
        path: the file.
        size: bytes.
        extra: further bytes that will be needed beside it.

    Raises:
        DataError: the disk has no room; nothing half made stays.
    """
    have = path.stat().st_size if path.exists() else 0
    if have == size:
        return False
    free = shutil.disk_usage(path.parent).free
    if free + have < size + extra:
        raise DataError(
            f"the image store needs {size / 2**30:.2f} GiB in {path.parent.parent} and {free / 2**30:.2f} GiB are free; "
            f"free some space, or set {CACHE_VARIABLE} to a folder on a larger disk"
        )
    try:
        with path.open("wb") as file:
            # Space that is only promised (a sparse file) would end in a crash of the map when the disk is full.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise disk_error(error, path.parent) from error
    return True


def disk_error(error: OSError, folder: Path) -> Exception:
    """Return the error in the user's words if the disk is full, else the error itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"the disk is full: {folder.parent} has no room for the image store; what is done is kept, free some space and run again"
        )
    return error


class Lock:
    """One process fills a store; another one that wants the same store waits for it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX)
        except ImportError:  # Windows has no flock; two fillings at once then write the same bytes twice.
            pass

    def __exit__(self, *_: object) -> None:
        self._file.close()


PENDING, READY, BROKEN = 0, 1, 2


# The layout of the folder and the meaning of the settings; part of the fingerprint.
FORMAT = 1


Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageStore:
    """A filled store.

    Attributes:
        path: its folder.
        image_ids: ids in row order.
        side: S, pixels.
        broken: image id -> why it could not be read.
    """

    path: Path
    image_ids: tuple[str, ...]
    side: int
    broken: dict[str, str]

    def rows_of(self, image_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the row of every id.

        Raises:
            KeyError: an id isn't in the store.
        """
        position = {image_id: row for row, image_id in enumerate(self.image_ids)}
        return np.array([position[image_id] for image_id in image_ids], dtype=np.int64)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images of `rows` as (len(rows), S, S, 3)."""
        # Mapped for this call only: pages of a long-lived map count as this process's memory, and a data set has more
        # of them than a small machine has RAM. Mapping costs microseconds, and the bytes stay in the system's cache.
        shape = (len(self.image_ids), self.side, self.side, 3)
        images = np.memmap(self.path / "images.u8", dtype=np.uint8, mode="r", shape=shape)
        return np.asarray(images[rows])


def open_store(path: Path) -> ImageStore:
    """Open a filled store.

    Raises:
        DataError: it is damaged.
    """
    try:
        index = read_json(path / "index.json")
        whole = (path / "images.u8").stat().st_size == len(index["image_ids"]) * index["side"] ** 2 * 3
        whole = whole and (path / "broken.csv").is_file()
    except (FileNotFoundError, ValueError):
        whole = False
    if not whole:
        raise DataError(f"the image store {path} is damaged; delete that folder, and it is filled again")
    broken = pd.read_csv(path / "broken.csv", dtype=str, keep_default_na=False)
    return ImageStore(
        path, tuple(index["image_ids"]), index["side"], dict(zip(broken["image_id"], broken["reason"], strict=True))
    )


def fingerprint(table: pd.DataFrame, section: ImageSection, side: int) -> str:
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


def fill_store(
    table: pd.DataFrame,
    section: ImageSection,
    side: int | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ImageStore:
    """Return the store of the table's images, filling what is missing.

    Args:
        table: rows with `image_id` and an existing `image_path`.
        section: preprocessing settings.
        side: S; None: `section.size`.
        cache: where stores lie; None: `default_cache()`.
        workers: threads; None: one a core.
        progress: called with (images done, images in all).

    Raises:
        DataError: no rows, a file has vanished, or the disk has no room.
    """
    if len(table) == 0:
        raise DataError("there is no image to prepare: no row of the table has its image on this disk")
    side = side or section.size
    folder = (cache or default_cache()) / "stores"
    final = folder / f"{fingerprint(table, section, side)}-{side}px"
    if final.is_dir():
        return open_store(final)
    partial = final.with_name(final.name + ".partial")
    folder.mkdir(parents=True, exist_ok=True)
    ids = [str(value) for value in table["image_id"]]
    with Lock(final.with_name(final.name + ".lock")):
        if final.is_dir():
            return open_store(final)
        partial.mkdir(exist_ok=True)
        status = _reserve(partial, len(ids), side)
        reasons = _fill(
            partial, list(table["image_path"]), ids, status, section, side, workers or os.cpu_count() or 1, progress
        )
        write_csv(
            partial / "broken.csv",
            pd.DataFrame({"image_id": list(reasons), "reason": list(reasons.values())}, dtype=object),
        )
        write_json(
            partial / "index.json",
            {"format": FORMAT, "side": side, "settings": section.model_dump(mode="json"), "image_ids": ids},
        )
        os.replace(partial, final)
    return open_store(final)


def _reserve(partial: Path, count: int, side: int) -> NDArray[np.uint8]:
    """Take the disk space before any work, and return what an earlier, killed filling has done (N bytes)."""
    status = partial / "status.u8"
    if reserve(partial / "images.u8", count * side * side * 3, extra=count):
        status.unlink(missing_ok=True)
    if not status.exists() or status.stat().st_size != count:
        status.write_bytes(bytes(count))
    return np.fromfile(status, dtype=np.uint8)


def _fill(
    partial: Path,
    paths: list[str],
    ids: list[str],
    status: NDArray[np.uint8],
    section: ImageSection,
    side: int,
    workers: int,
    progress: Progress | None,
) -> dict[str, str]:
    """Fill the pending rows; return image id -> reason for the broken ones."""
    # Broken files are tried again: their reason has to be told, and they may have been mended.
    todo = [row for row in range(len(ids)) if status[row] != READY]
    done, reasons = len(ids) - len(todo), {}
    row_bytes = side * side * 3

    def work(row: int) -> NDArray[np.uint8] | ImageError:
        try:
            return preprocess(decode_image(paths[row]), section, side)
        except ImageError as error:
            return error

    try:
        with (
            (partial / "images.u8").open("r+b") as images,
            (partial / "status.u8").open("r+b") as states,
            ThreadPoolExecutor(workers) as pool,
        ):
            waiting = iter(todo)
            running: dict[Future[NDArray[np.uint8] | ImageError], int] = {}
            try:
                while True:
                    # A few images ahead of the writer, never all of them: memory stays flat for any number of images.
                    for row in waiting:
                        running[pool.submit(work, row)] = row
                        if len(running) >= 4 * workers:
                            break
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        row, result = running.pop(future), future.result()
                        if isinstance(result, ImageError):
                            reasons[ids[row]] = str(result)
                        else:
                            images.seek(row * row_bytes)
                            images.write(result.tobytes())
                            # The picture before its mark: a kill between the two costs one picture, never a wrong one.
                            images.flush()
                        states.seek(row)
                        states.write(bytes([BROKEN if isinstance(result, ImageError) else READY]))
                        states.flush()
                        done += 1
                        if progress:
                            progress(done, len(ids))
            finally:
                for future in running:
                    future.cancel()
    # Out here, since closing a file writes what it still holds and may find the disk full once more.
    except OSError as error:
        raise disk_error(error, partial) from error
    return {image_id: reasons[image_id] for image_id in ids if image_id in reasons}


Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """One array of a derived store.

    Attributes:
        dtype: NumPy's name, such as `float32`.
        shape: of one row.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class DerivedStore:
    """A filled store.

    Attributes:
        path: its folder.
        count: rows, as many as the image store has.
        parts: its arrays.
    """

    path: Path
    count: int
    parts: dict[str, Part]

    def read(self, rows: NDArray[np.int64]) -> Arrays:
        """Return every part's `rows`, each (len(rows), *shape)."""
        return {name: self._map(name)[rows] for name in self.parts}

    def _map(self, name: str) -> NDArray[Any]:
        # Mapped for one call only, as in the image store: pages of a long-lived map count as this process's memory.
        part = self.parts[name]
        return np.memmap(self.path / name, dtype=part.dtype, mode="r", shape=(self.count, *part.shape))


def fill_derived_store(
    source: ImageStore,
    name: str,
    settings: Mapping[str, Any],
    parts: Mapping[str, Part],
    compute: Callable[[NDArray[np.uint8]], Arrays],
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> DerivedStore:
    """Return the store of what `compute` makes of each picture, computing what is missing.

    Args:
        source: the pictures.
        name: what the numbers are, for the folder's name.
        settings: plain JSON values on which the numbers depend, besides the pictures.
        parts: the arrays of one picture.
        compute: maps (B, S, S, 3) pictures to the parts, each (B, *shape).
        batch: pictures computed at once.
        progress: called with (pictures done, pictures in all).

    Raises:
        DataError: the disk has no room, or an earlier store is damaged.
    """
    parts = dict(parts)
    key = sha256_of_json({"format": FORMAT, "source": source.path.name, "settings": dict(settings)})[:20]
    folder = source.path.parent.parent / "derived"
    final = folder / f"{name}-{key}"
    count = len(source.image_ids)
    store = DerivedStore(final, count, parts)
    partial = final.with_name(final.name + ".partial")
    folder.mkdir(parents=True, exist_ok=True)
    if not final.is_dir():
        with Lock(final.with_name(final.name + ".lock")):
            if not final.is_dir():
                partial.mkdir(exist_ok=True)
                _derived_store_fill(partial, source, parts, compute, batch, progress)
                write_json(partial / "settings.json", dict(settings))
                os.replace(partial, final)
    for part, shape in parts.items():
        if not (final / part).is_file() or (final / part).stat().st_size != count * shape.row_bytes:
            raise DataError(f"the store {final} is damaged; delete that folder, and it is filled again")
    return store


def _derived_store_fill(
    partial: Path,
    source: ImageStore,
    parts: dict[str, Part],
    compute: Callable[[NDArray[np.uint8]], Arrays],
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fill the rows that an earlier, killed filling has left."""
    count = len(source.image_ids)
    counter = partial / "done.json"
    fresh = [reserve(partial / name, count * part.row_bytes) for name, part in parts.items()]
    done = read_json(counter) if counter.is_file() and not any(fresh) else 0
    try:
        for start in range(done, count, batch):
            rows = np.arange(start, min(start + batch, count))
            values = compute(source.read(rows))
            for name, part in parts.items():
                array = np.ascontiguousarray(values[name], dtype=part.dtype)
                if array.shape != (len(rows), *part.shape):
                    raise ValueError(f"{name} must be {(len(rows), *part.shape)}, not {array.shape}")
                with (partial / name).open("r+b") as file:
                    file.seek(start * part.row_bytes)
                    file.write(array.tobytes())
            # The numbers before their count: a kill between the two costs one batch, never a wrong one.
            write_json(counter, int(rows[-1]) + 1)
            if progress:
                progress(int(rows[-1]) + 1, count)
    except OSError as error:
        raise disk_error(error, partial) from error
