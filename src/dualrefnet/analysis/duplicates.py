"""Fingerprints of pictures, by which copies of a picture are found after it was re-encoded, resized or turned.

A fingerprint is a perceptual hash (pHash of the library imagehash: the signs of the low frequencies of the cosine
transform, 256 bits) and the picture in grey at 32 x 32 pixels, for a second look at what the hash finds. The hash is
taken of all eight orientations, so that mirrored pictures and pictures turned by 90 degrees are found too. Copies that
were cropped by more than a few per cent, or turned by other angles, are not found.

Why 256 bits of pHash: lesion photographs look alike, a dark spot in the middle. Measured on 1,036 photographs of
PAD-UFES-20 and 8,824 of ISIC-2019 (dermoscopic, 256 px), of 1,000 of each 11 copies (JPEG of quality 50 to 90, resized
to
0.4 to 0.85, and both): at most 28 bits of a copy differ (dHash: 46), and the 64-bit pHash can't tell as much apart.

Files are compared, not the pictures that are prepared for a model: colour constancy and CLAHE make another picture of a
resized copy
(of copies at quality 60 and 0.7 of the size .80 are then found, of those at 0.4 .51; PAD-UFES-20 at 192 px).
"""

# also: Near-duplicates: one picture under several ids, on two sides of a split or as two patients.

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import imagehash
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from dualrefnet.analysis.label_leakage import AuditedRows
from dualrefnet.data.check import MAX_EXAMPLES, Finding
from dualrefnet.data.images import MAX_BYTES, decode_image
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
    reduced = np.asarray(
        Image.fromarray(image).convert("L").resize((REDUCED_SIDE, REDUCED_SIDE), Image.Resampling.LANCZOS)
    )
    hashes = [imagehash.phash(Image.fromarray(turned), HASH_SIDE).hash for turned in orientations(reduced)]
    factor = REDUCED_SIDE // SMALL_SIDE
    small = reduced.reshape(SMALL_SIDE, factor, SMALL_SIDE, factor).mean(axis=(1, 3)).round().astype(np.uint8)
    return np.packbits(np.stack(hashes).reshape(ORIENTATIONS, -1), axis=1).view(np.uint64), small


def orientations(picture: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return the eight ways to lay a square picture (S, S), the picture as it is first."""
    return [np.ascontiguousarray(np.rot90(side, turns)) for side in (picture, picture[:, ::-1]) for turns in range(4)]


def fingerprint_files(
    table: pd.DataFrame, workers: int | None = None, progress: Progress | None = None
) -> Fingerprints:
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
    ids: list[str],
    read: Callable[[int], tuple[str, NDArray[np.uint8] | ImageError]],
    workers: int | None,
    progress: Progress | None,
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
        tuple(kept),
        np.array(hashes, dtype=np.uint64).reshape(-1, ORIENTATIONS, 4),
        np.array(small, dtype=np.uint8).reshape(-1, SMALL_SIDE, SMALL_SIDE),
        tuple(digests),
        unreadable,
    )


def _in_threads(work: Callable[[int], Result], count: int, workers: int | None) -> Iterator[Result]:
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        try:
            yield from pool.map(work, range(count))
        except BaseException:
            # Without this, Ctrl-C would wait until all other images are read.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# Of 256 bits. Copies differ in at most 28. Of 537,000 pairs of different patients of PAD-UFES-20 the nearest differ in
# 66.
# Of 38.9 million pairs of different lesions of ISIC-2019, as they lie, 27 differ in at most 48.
MAX_DISTANCE = 48


# Copies of quality 60 and better correlate at .98 and more. Of those 27 pairs of ISIC-2019 15 reach .95; those that
# were looked
# at show one lesion published twice, mostly with other colours; the 12 others show different lesions. Of 78 pairs
# within 48 bits
# after turning one reaches .95, and it is one lesion published upside down. From 50 bits on, wrong pairs reach .95.
MIN_CORRELATION = 0.95


# Grey levels: a picture with less contrast correlates with anything.
MIN_CONTRAST = 1.0


# A copy in training can raise a measure by no more than its share: one in a hundred is less than what any interval here
# spans.
# ISIC-2019 divided by its lesion ids has .5%, lesions published twice under two ids.
TOLERATED_SHARE = 0.01


# Rows compared at once: few enough for the arrays to stay in the cache.
BLOCK = 16


PAIR_COLUMNS = ["first", "second", "distance", "correlation", "turned"]


def near_pairs(
    fingerprints: Fingerprints, workers: int | None = None, progress: Progress | None = None
) -> pd.DataFrame:
    """Compare every picture with every other: 25,331 pictures take about six seconds on two cores, and memory stays
    flat.

    Args:
        fingerprints: of N pictures.
        workers: threads; None: one a core, at most 16.
        progress: called with (pictures compared, pictures in all).

    Returns:
        `first`, `second` (image ids), `distance` (bits), `correlation`, `turned` (mirrored or turned); the nearest
        first.
    """
    count = len(fingerprints.image_ids)
    # (8, 4, N): each word of a hash in one run of memory.
    words = np.ascontiguousarray(fingerprints.hashes.transpose(1, 2, 0))
    found = []
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        starts = range(0, count, BLOCK)
        for start, candidates in zip(
            starts, pool.map(lambda start: list(_candidates(words, start)), starts), strict=True
        ):
            for first, second, orientation, distance in candidates:
                correlation = _correlation(
                    fingerprints.small[first], orientations(fingerprints.small[second])[orientation]
                )
                if correlation >= MIN_CORRELATION:
                    found.append((first, second, distance, correlation, orientation > 0))
            if progress is not None:
                progress(min(start + BLOCK, count), count)
    pairs = pd.DataFrame(found, columns=PAIR_COLUMNS)
    # A picture that is its own mirror image is found in several orientations.
    pairs = pairs.sort_values(["distance", "first", "second"], kind="stable").drop_duplicates(
        ["first", "second"], ignore_index=True
    )
    ids = np.array(fingerprints.image_ids, dtype=object)
    return pairs.assign(first=ids[pairs["first"].to_numpy(dtype=int)], second=ids[pairs["second"].to_numpy(dtype=int)])


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


def near_duplicate_findings(
    rows: AuditedRows, pairs: pd.DataFrame, compared: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame, list[Finding]]:
    """Say which near-duplicates a split tears apart, and which show one picture as two patients or lesions.

    Args:
        rows: of the split.
        pairs: as `near_pairs` returns them; pairs of which an image isn't in the split are left out.
        compared: ids of the images that have a fingerprint.

    Returns:
        The pairs with `group` (number), `sides`, `labels` and `other` (what differs by the ids: `patient`, `lesion`,
        `unnamed` or empty); a
        table `class` (`all` or a label), `images` (of the test side, compared), `copies` (those with a near-duplicate
        in train or
        validation) and `share`;
        and the findings.
    """
    table = rows.table.assign(side=rows.sides, audited_group=rows.groups).set_index("image_id")
    pairs = pairs[pairs["first"].isin(table.index) & pairs["second"].isin(table.index)].reset_index(drop=True)
    one, two = table.loc[pairs["first"]].reset_index(), table.loc[pairs["second"]].reset_index()
    group = {image_id: number for number, members in enumerate(group_pairs(pairs)) for image_id in members}
    told = pairs.assign(
        group=pairs["first"].map(group).astype(int),
        sides=one["side"] + "/" + two["side"],
        labels=one["label"] + "/" + two["label"],
        other=np.select(
            [
                _differ(one, two, "patient_id"),
                _differ(one, two, "lesion_id"),
                one["audited_group"] != two["audited_group"],
            ],
            ["patient", "lesion", "unnamed"],
            "",
        ),
    )
    leaking = (one["side"] == "test") != (two["side"] == "test")
    copies = pd.concat(
        [one.loc[leaking & (one["side"] == "test"), "image_id"], two.loc[leaking & (two["side"] == "test"), "image_id"]]
    )
    test = table[(table["side"] == "test") & table.index.isin(compared)]
    torn = test.index.isin(copies)
    counted = [("all", len(test), int(torn.sum()))]
    counted += [
        (label, int((test["label"] == label).sum()), int(torn[test["label"] == label].sum())) for label in rows.classes
    ]
    by_class = pd.DataFrame(counted, columns=["class", "images", "copies"])
    by_class["share"] = by_class["copies"] / by_class["images"].where(by_class["images"] > 0)
    findings = [_torn(told[leaking.to_numpy()], by_class), _other(told)]
    return told, by_class, findings


def _torn(pairs: pd.DataFrame, by_class: pd.DataFrame) -> Finding:
    copies, share = int(by_class["copies"][0]), float(by_class["share"][0])
    if not copies:
        return Finding("PASS", "near_duplicates", "no test image has a near-duplicate in train or validation")
    classes = ", ".join(f"{row['class']} {row['copies']}" for _, row in by_class[1:].iterrows() if row["copies"])
    message = f"{copies:,} test images ({share:.1%}) have a near-duplicate in train or validation: {classes}"
    return Finding("FAIL" if share > TOLERATED_SHARE else "WARN", "near_duplicates", message, _examples(pairs), copies)


def _other(pairs: pd.DataFrame) -> Finding:
    chosen = pairs[pairs["other"] != ""]
    if not len(chosen):
        message = (
            f"near-duplicates, {len(pairs):,} pairs, are all of one patient and lesion"
            if len(pairs)
            else "no near-duplicates"
        )
        return Finding("PASS", "near_duplicates_other", message)
    words = {
        "patient": "of different patients",
        "lesion": "of different lesions",
        "unnamed": "of which an image names neither",
    }
    counts = {what: int((chosen["other"] == what).sum()) for what in words}
    said = ", ".join(f"{count:,} {words[what]}" for what, count in counts.items() if count)
    unlike = int((chosen["labels"].str.partition("/")[0] != chosen["labels"].str.partition("/")[2]).sum())
    labels = f", {unlike:,} of them under different labels" if unlike else ""
    message = f"{len(pairs):,} pairs of near-duplicates, of these {said} (one picture published twice?){labels}"
    return Finding("WARN", "near_duplicates_other", message, _examples(chosen), len(chosen))


def _examples(pairs: pd.DataFrame) -> tuple[str, ...]:
    return tuple(f"{row.first} ~ {row.second} ({row.sides})" for row in pairs.head(MAX_EXAMPLES).itertuples())


def _differ(one: pd.DataFrame, two: pd.DataFrame, column: str) -> pd.Series:
    """Return which pairs differ in an id; a missing id differs from none."""
    return one[column].notna() & two[column].notna() & (one[column] != two[column])


def _candidates(words: NDArray[np.uint64], start: int) -> Iterator[tuple[int, int, int, int]]:
    """Give (row, later row, orientation of the later one, distance) of near hashes of the rows from `start`."""
    block = words[0, :, start : start + BLOCK]
    for orientation in range(ORIENTATIONS):
        distance = np.zeros((block.shape[1], words.shape[2] - start), dtype=np.uint16)
        for word in range(words.shape[1]):
            distance += np.bitwise_count(block[word][:, None] ^ words[orientation, word, start:][None, :])
        here, there = np.nonzero(distance <= MAX_DISTANCE)
        for first, second in zip(here, there, strict=True):
            if second > first:
                yield start + int(first), start + int(second), orientation, int(distance[first, second])


def _correlation(one: NDArray[np.uint8], two: NDArray[np.uint8]) -> float:
    if one.std() < MIN_CONTRAST or two.std() < MIN_CONTRAST:
        return 0.0
    return float(np.corrcoef(one.ravel(), two.ravel())[0, 1])
