"""Arrays that are computed once from every picture of an image store: features of a frozen encoder, super-resolved targets.

A derived store is a folder with one file of numbers for each part, row n belonging to row n of the image store. While it is
filled the folder ends in `.partial` and `done.json` counts the rows that are there, so a killed filling goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualrefnet.data.disk import Lock, disk_error, reserve
from dualrefnet.data.image_store import ImageStore
from dualrefnet.errors import DataError
from dualrefnet.files import read_json, sha256_of_json, write_json

FORMAT = 1

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
                _fill(partial, source, parts, compute, batch, progress)
                write_json(partial / "settings.json", dict(settings))
                os.replace(partial, final)
    for part, shape in parts.items():
        if not (final / part).is_file() or (final / part).stat().st_size != count * shape.row_bytes:
            raise DataError(f"the store {final} is damaged; delete that folder, and it is filled again")
    return store


def _fill(
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
