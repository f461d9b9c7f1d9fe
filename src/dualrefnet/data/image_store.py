"""The image store: every photograph decoded and preprocessed once, in one file of bytes that is memory-mapped.

A store is a folder named by the fingerprint of its sources and settings:

- `images.u8`: (N, S, S, 3) bytes, row n at offset n S S 3;
- `status.u8`: N bytes, 0 not yet, 1 there, 2 broken;
- `index.json`: image ids in row order, S, the settings;
- `broken.csv`: images that could not be decoded, and why.

While it is filled the folder ends in `.partial`; a killed filling goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.decode import decode_image
from dualrefnet.data.disk import Lock, default_cache, disk_error, reserve
from dualrefnet.errors import DataError, ImageError
from dualrefnet.files import read_json, sha256_of_json, write_csv, write_json
from dualrefnet.recipe import ImageSection
from dualrefnet.runtime.preprocessing import preprocess

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
    return ImageStore(path, tuple(index["image_ids"]), index["side"], dict(zip(broken["image_id"], broken["reason"], strict=True)))


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
        reasons = _fill(partial, list(table["image_path"]), ids, status, section, side, workers or os.cpu_count() or 1, progress)
        write_csv(partial / "broken.csv", pd.DataFrame({"image_id": list(reasons), "reason": list(reasons.values())}, dtype=object))
        write_json(partial / "index.json", {"format": FORMAT, "side": side, "settings": section.model_dump(mode="json"), "image_ids": ids})
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
