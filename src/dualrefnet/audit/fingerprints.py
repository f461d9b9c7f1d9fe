"""Fingerprints of pictures, by which copies of a picture are found after it was re-encoded, resized or turned.

A fingerprint is a perceptual hash (pHash of the library imagehash: the signs of the low frequencies of the cosine
transform, 256 bits) and the picture in grey at 32 x 32 pixels, for a second look at what the hash finds. The hash is
taken of all eight orientations, so that mirrored pictures and pictures turned by 90 degrees are found too. Copies that
were cropped by more than a few per cent, or turned by other angles, are not found.

Why 256 bits of pHash: lesion photographs look alike, a dark spot in the middle. Measured on 1,036 photographs of
PAD-UFES-20 and 8,824 of ISIC-2019 (dermoscopic, 256 px), of 1,000 of each 11 copies (JPEG of quality 50 to 90, resized to
0.4 to 0.85, and both): at most 28 bits of a copy differ (dHash: 46), and the 64-bit pHash can't tell as much apart.

Files are compared, not the pictures that are prepared for a model: colour constancy and CLAHE make another picture of a resized copy
(of copies at quality 60 and 0.7 of the size .80 are then found, of those at 0.4 .51; PAD-UFES-20 at 192 px).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import imagehash
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from dualrefnet.data.decode import MAX_BYTES, decode_image
from dualrefnet.errors import ImageError

# 16 x 16 low frequencies of a 64 x 64 picture.
HASH_SIDE, REDUCED_SIDE, SMALL_SIDE = 16, 64, 32
ORIENTATIONS = 8

Progress = Callable[[int, int], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of N pictures: 1.3 KB each.

    Attributes:
        image_ids: (N,).
        hashes: (N, 8, 4) the 256 bits of each orientation; the first is the picture as it lies.
        small: (N, 32, 32) grey.
        sha256: (N,) hash of the bytes of the file.
        unreadable: image id -> why it has no fingerprint.
    """

    image_ids: tuple[str, ...]
    hashes: NDArray[np.uint64]
    small: NDArray[np.uint8]
    sha256: tuple[str, ...]
    unreadable: dict[str, str]


def fingerprint(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Return the hashes (8, 4) and the small grey version (32, 32) of one picture, (H, W, 3) RGB."""
    reduced = np.asarray(Image.fromarray(image).convert("L").resize((REDUCED_SIDE, REDUCED_SIDE), Image.Resampling.LANCZOS))
    hashes = [imagehash.phash(Image.fromarray(turned), HASH_SIDE).hash for turned in orientations(reduced)]
    factor = REDUCED_SIDE // SMALL_SIDE
    small = reduced.reshape(SMALL_SIDE, factor, SMALL_SIDE, factor).mean(axis=(1, 3)).round().astype(np.uint8)
    return np.packbits(np.stack(hashes).reshape(ORIENTATIONS, -1), axis=1).view(np.uint64), small


def orientations(picture: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return the eight ways to lay a square picture (S, S), the picture as it is first."""
    return [np.ascontiguousarray(np.rot90(side, turns)) for side in (picture, picture[:, ::-1]) for turns in range(4)]


def fingerprint_files(table: pd.DataFrame, workers: int | None = None, progress: Progress | None = None) -> Fingerprints:
    """Read every image of a table once.

    Args:
        table: rows with `image_id` and `image_path`.
        workers: threads; None: one a core, at most 16.
        progress: called with (images done, images in all).
    """
    ids, paths = [str(value) for value in table["image_id"]], list(table["image_path"])

    def work(row: int) -> tuple[str, NDArray[np.uint8] | ImageError]:
        try:
            with Path(paths[row]).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            return hashlib.sha256(data).hexdigest(), decode_image(data)
        except OSError as error:
            return "", ImageError(str(error.strerror))
        except ImageError as error:
            return "", error

    return _collect(ids, work, workers, progress)


def _collect(
    ids: list[str], read: Callable[[int], tuple[str, NDArray[np.uint8] | ImageError]], workers: int | None, progress: Progress | None
) -> Fingerprints:
    def work(row: int) -> tuple[str, tuple[NDArray[np.uint64], NDArray[np.uint8]] | ImageError]:
        sha256, picture = read(row)
        return sha256, picture if isinstance(picture, ImageError) else fingerprint(picture)

    kept, hashes, small, digests, unreadable = [], [], [], [], {}
    for row, (sha256, found) in enumerate(_in_threads(work, len(ids), workers)):
        if isinstance(found, ImageError):
            unreadable[ids[row]] = str(found)
        else:
            kept.append(ids[row])
            hashes.append(found[0])
            small.append(found[1])
            digests.append(sha256)
        if progress is not None:
            progress(row + 1, len(ids))
    return Fingerprints(
        tuple(kept), np.array(hashes, dtype=np.uint64).reshape(-1, ORIENTATIONS, 4),
        np.array(small, dtype=np.uint8).reshape(-1, SMALL_SIDE, SMALL_SIDE), tuple(digests), unreadable,
    )  # fmt: skip


def _in_threads(work: Callable[[int], Result], count: int, workers: int | None) -> Iterator[Result]:
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        try:
            yield from pool.map(work, range(count))
        except BaseException:
            # Without this, Ctrl-C would wait until all other images are read.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
