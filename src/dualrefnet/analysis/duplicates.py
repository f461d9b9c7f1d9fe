"""Near-duplicates: images that are still the same after re-encoding, resizing, mirroring or turning by 90 degrees.

A fingerprint is a perceptual hash (pHash of the library imagehash: the signs of the low frequencies of the cosine
transform, 256 bits) of each of the eight orientations, and the image in grey at 32 x 32 pixels, for a second look at
what the hash finds. Copies that were cropped by more than a few per cent, or turned by other angles, are not found.

Why 256 bits of pHash: lesion images look alike, a dark spot in the middle. Measured on 1,036 images of PAD-UFES-20 and
8,824 of ISIC-2019 (dermoscopic, 256 px), of 1,000 of each 11 copies (JPEG of quality 50 to 90, resized to 0.4 to 0.85,
and both): at most 28 bits of a copy differ (dHash: 46), and the 64-bit pHash can't separate as much.

Files are compared, not preprocessed images: colour constancy and CLAHE change a resized copy (of copies at quality 60
and 0.7 of the size .80 are then found, of those at 0.4 .51; PAD-UFES-20 at 192 px).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import imagehash
import numpy as np
import pandas as pd
import PIL
from numpy.typing import NDArray
from PIL import Image

import dualrefnet
from dualrefnet.data.images import decode_image
from dualrefnet.data.store import default_cache, map_ahead
from dualrefnet.errors import DualRefNetError, ImageError
from dualrefnet.files import atomic_path, sha256_of_json
from dualrefnet.progress import warn
from dualrefnet.runtime.images import MAX_BYTES

# 16 x 16 low frequencies of a 64 x 64 image.
HASH_SIDE, REDUCED_SIDE, SMALL_SIDE = 16, 64, 32
ORIENTATIONS = 8
# Of 256 bits. Copies differ in at most 28. Of 537,000 pairs of different patients of PAD-UFES-20 the nearest differ in
# 66. Of 38.9 million pairs of different lesions of ISIC-2019, in their own orientation, 27 differ in at most 48.
MAX_DISTANCE = 48
# Copies of quality 60 and better correlate at .98 and more. Of those 27 pairs of ISIC-2019 15 reach .95; those that
# were looked at show one lesion published twice, mostly with other colours; the 12 others show different lesions. Of 78
# pairs within 48 bits after turning one reaches .95, and it is one lesion published upside down. From 50 bits on, wrong
# pairs reach .95.
MIN_CORRELATION = 0.95
# Grey values: an image with less contrast correlates with anything.
MIN_CONTRAST = 1.0
# Rows compared at once: few enough for the arrays to stay in the cache.
BLOCK = 16


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of N images: 1.3 KB each."""

    image_ids: tuple[str, ...]
    hashes: NDArray[np.uint64]  # (N, 8, 4) the 256 bits of each orientation, the image's own first
    small: NDArray[np.uint8]  # (N, 32, 32) grey
    sha256: tuple[str, ...]  # of the bytes of the file
    unreadable: dict[str, str]  # image id -> why it has no fingerprint


def orientations(image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return the eight orientations of a square image (S, S), its own first."""
    return [np.ascontiguousarray(np.rot90(face, turns)) for face in (image, image[:, ::-1]) for turns in range(4)]


def fingerprint(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Return the hashes (8, 4) and the small grey version (32, 32) of one image, (H, W, 3) RGB."""
    size = (REDUCED_SIDE, REDUCED_SIDE)
    reduced = np.asarray(Image.fromarray(image).convert("L").resize(size, Image.Resampling.LANCZOS))
    hashes = [imagehash.phash(Image.fromarray(turned), HASH_SIDE).hash for turned in orientations(reduced)]
    factor = REDUCED_SIDE // SMALL_SIDE
    small = reduced.reshape(SMALL_SIDE, factor, SMALL_SIDE, factor).mean(axis=(1, 3)).round().astype(np.uint8)
    return np.packbits(np.stack(hashes).reshape(ORIENTATIONS, -1), axis=1).view(np.uint64), small


def fingerprint_files(table: pd.DataFrame, workers: int | None = None, cache: Path | None = None) -> Fingerprints:
    """Read every image of a table (`image_id`, `image_path`) once, with `workers` threads; None is one a core.

    Decoding takes nearly all of the time, so fingerprints are kept in the cache, by the SHA-256 of the file's bytes.
    """
    ids, paths = [str(value) for value in table["image_id"]], list(table["image_path"])
    versions = [dualrefnet.__version__, PIL.__version__, imagehash.__version__]
    file = (cache or default_cache()) / "fingerprints" / f"{sha256_of_json([*versions, *map(str, paths)])}.npz"
    before = _kept(file)
    kept, unreadable = [], {}
    results = map_ahead(partial(_read, before=before), paths, workers, label="reading images")
    for image_id, result in zip(ids, results, strict=True):
        if isinstance(result, str):
            unreadable[image_id] = result
        else:
            kept.append((image_id, *result))
    found = Fingerprints(
        tuple(image_id for image_id, *_ in kept),
        np.array([hashes for _, _, hashes, _ in kept], dtype=np.uint64).reshape(-1, ORIENTATIONS, 4),
        np.array([small for *_, small in kept], dtype=np.uint8).reshape(-1, SMALL_SIDE, SMALL_SIDE),
        tuple(sha256 for _, sha256, _, _ in kept),
        unreadable,
    )
    if not before.keys() >= set(found.sha256):
        try:
            with atomic_path(file) as temporary, temporary.open("wb") as out:
                np.savez(out, sha256=np.array(found.sha256), hashes=found.hashes, small=found.small)
        except DualRefNetError as error:
            warn(f"the next audit reads all images again: {error}")
    return found


Fingerprint = tuple[NDArray[np.uint64], NDArray[np.uint8]]


def _kept(file: Path) -> dict[str, Fingerprint]:
    """Return the fingerprints of an earlier call, by the hash of the bytes; none if there are none that can be read."""
    try:
        with np.load(file) as parts:
            each = zip(parts["hashes"], parts["small"], strict=True)
            return dict(zip(parts["sha256"].tolist(), each, strict=True))
    except (OSError, ValueError, KeyError, BadZipFile):
        return {}


def _read(path: str, before: dict[str, Fingerprint]) -> tuple[str, NDArray[np.uint64], NDArray[np.uint8]] | str:
    """Return the hash of the bytes and the fingerprint, or why the file can't be read."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        digest = hashlib.sha256(data).hexdigest()
        return digest, *(before.get(digest) or fingerprint(decode_image(data)))
    except OSError as error:
        return str(error.strerror)
    except ImageError as error:
        return str(error)


def near_pairs(fingerprints: Fingerprints, workers: int | None = None) -> pd.DataFrame:
    """Compare all pairs of images (25,331 take six seconds on two cores) and return those alike, the nearest first."""
    small = fingerprints.small
    # (8, 4, N): each word of a hash in one run of memory.
    words = np.ascontiguousarray(fingerprints.hashes.transpose(1, 2, 0))
    starts, found = range(0, len(small), BLOCK), []
    for candidates in map_ahead(
        lambda start: list(_candidates(words, start)), starts, workers, label="comparing images"
    ):
        for first, second, orientation, distance in candidates:
            correlation = _correlation(small[first], orientations(small[second])[orientation])
            if correlation >= MIN_CORRELATION:
                found.append((first, second, distance, correlation, orientation > 0))
    pairs = pd.DataFrame(found, columns=["first", "second", "distance", "correlation", "turned"])
    # An image that is its own mirror image is found in several orientations.
    pairs = pairs.sort_values(["distance", "first", "second"], kind="stable")
    pairs = pairs.drop_duplicates(["first", "second"], ignore_index=True)
    ids = np.array(fingerprints.image_ids, dtype=object)
    return pairs.assign(first=ids[pairs["first"].to_numpy(dtype=int)], second=ids[pairs["second"].to_numpy(dtype=int)])


def _candidates(words: NDArray[np.uint64], start: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row, later row, orientation of the later one, distance) of near hashes of the rows from `start`."""
    block = words[0, :, start : start + BLOCK]
    for orientation in range(ORIENTATIONS):
        distance = np.zeros((block.shape[1], words.shape[2] - start), dtype=np.uint16)
        for word in range(words.shape[1]):
            distance += np.bitwise_count(block[word][:, None] ^ words[orientation, word, start:][None, :])
        for first, second in np.argwhere(distance <= MAX_DISTANCE).tolist():
            if second > first:
                yield start + first, start + second, orientation, int(distance[first, second])


def _correlation(one: NDArray[np.uint8], two: NDArray[np.uint8]) -> float:
    if one.std() < MIN_CONTRAST or two.std() < MIN_CONTRAST:
        return 0.0
    return float(np.corrcoef(one.ravel(), two.ravel())[0, 1])


def group_pairs(pairs: pd.DataFrame) -> list[list[str]]:
    """Return the groups of images that pairs link, directly or through others; in the order of their first pair."""
    group: dict[str, list[str]] = {}
    for first, second in zip(pairs["first"], pairs["second"], strict=True):
        one, two = group.setdefault(first, [first]), group.setdefault(second, [second])
        if one is not two:
            one += two
            group.update(dict.fromkeys(two, one))
    # Every image of a group points at the same list.
    return list({id(members): members for members in group.values()}.values())
