"""Near-duplicates: one picture under several ids, on two sides of a split or as two patients.

Two pictures are near-duplicates if their hashes are near in one of eight orientations and, as a second look, their small
grey versions correlate. What was measured is said in `fingerprints` and beside the limits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.audit.audited_rows import AuditedRows
from dualrefnet.audit.fingerprints import ORIENTATIONS, Fingerprints, orientations
from dualrefnet.findings import MAX_EXAMPLES, Finding

# Of 256 bits. Copies differ in at most 28. Of 537,000 pairs of different patients of PAD-UFES-20 the nearest differ in 66.
# Of 38.9 million pairs of different lesions of ISIC-2019, as they lie, 27 differ in at most 48.
MAX_DISTANCE = 48
# Copies of quality 60 and better correlate at .98 and more. Of those 27 pairs of ISIC-2019 15 reach .95; those that were looked
# at show one lesion published twice, mostly with other colours; the 12 others show different lesions. Of 78 pairs within 48 bits
# after turning one reaches .95, and it is one lesion published upside down. From 50 bits on, wrong pairs reach .95.
MIN_CORRELATION = 0.95
# Grey levels: a picture with less contrast correlates with anything.
MIN_CONTRAST = 1.0
# A copy in training can raise a measure by no more than its share: one in a hundred is less than what any interval here spans.
# ISIC-2019 divided by its lesion ids has .5%, lesions published twice under two ids.
TOLERATED_SHARE = 0.01
# Rows compared at once: few enough for the arrays to stay in the cache.
BLOCK = 16

Progress = Callable[[int, int], None]
PAIR_COLUMNS = ["first", "second", "distance", "correlation", "turned"]


def near_pairs(fingerprints: Fingerprints, workers: int | None = None, progress: Progress | None = None) -> pd.DataFrame:
    """Compare every picture with every other: 25,331 pictures take about six seconds on two cores, and memory stays flat.

    Args:
        fingerprints: of N pictures.
        workers: threads; None: one a core, at most 16.
        progress: called with (pictures compared, pictures in all).

    Returns:
        `first`, `second` (image ids), `distance` (bits), `correlation`, `turned` (mirrored or turned); the nearest first.
    """
    count = len(fingerprints.image_ids)
    # (8, 4, N): each word of a hash in one run of memory.
    words = np.ascontiguousarray(fingerprints.hashes.transpose(1, 2, 0))
    found = []
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        starts = range(0, count, BLOCK)
        for start, candidates in zip(starts, pool.map(lambda start: list(_candidates(words, start)), starts), strict=True):
            for first, second, orientation, distance in candidates:
                correlation = _correlation(fingerprints.small[first], orientations(fingerprints.small[second])[orientation])
                if correlation >= MIN_CORRELATION:
                    found.append((first, second, distance, correlation, orientation > 0))
            if progress is not None:
                progress(min(start + BLOCK, count), count)
    pairs = pd.DataFrame(found, columns=PAIR_COLUMNS)
    # A picture that is its own mirror image is found in several orientations.
    pairs = pairs.sort_values(["distance", "first", "second"], kind="stable").drop_duplicates(["first", "second"], ignore_index=True)
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
        The pairs with `group` (number), `sides`, `labels` and `other` (what differs by the ids: `patient`, `lesion`, `unnamed` or empty); a
        table `class` (`all` or a label), `images` (of the test side, compared), `copies` (those with a near-duplicate in train or
        validation) and `share`;
        and the findings.
    """
    table = rows.table.assign(side=rows.sides, audited_group=rows.groups).set_index("image_id")
    pairs = pairs[pairs["first"].isin(table.index) & pairs["second"].isin(table.index)].reset_index(drop=True)
    one, two = table.loc[pairs["first"]].reset_index(), table.loc[pairs["second"]].reset_index()
    group = {image_id: number for number, members in enumerate(group_pairs(pairs)) for image_id in members}
    told = pairs.assign(
        group=pairs["first"].map(group).astype(int), sides=one["side"] + "/" + two["side"], labels=one["label"] + "/" + two["label"],
        other=np.select(
            [_differ(one, two, "patient_id"), _differ(one, two, "lesion_id"), one["audited_group"] != two["audited_group"]],
            ["patient", "lesion", "unnamed"], "",
        ),
    )  # fmt: skip
    leaking = (one["side"] == "test") != (two["side"] == "test")
    copies = pd.concat([one.loc[leaking & (one["side"] == "test"), "image_id"], two.loc[leaking & (two["side"] == "test"), "image_id"]])
    test = table[(table["side"] == "test") & table.index.isin(compared)]
    torn = test.index.isin(copies)
    counted = [("all", len(test), int(torn.sum()))]
    counted += [(label, int((test["label"] == label).sum()), int(torn[test["label"] == label].sum())) for label in rows.classes]
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
        message = f"near-duplicates, {len(pairs):,} pairs, are all of one patient and lesion" if len(pairs) else "no near-duplicates"
        return Finding("PASS", "near_duplicates_other", message)
    words = {"patient": "of different patients", "lesion": "of different lesions", "unnamed": "of which an image names neither"}
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
