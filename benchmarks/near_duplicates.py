"""How long does it take to compare every image of a data set with every other? `near_pairs` against a plain loop over
the
images.

The fingerprints are random, with copies planted among them that differ in a few bits: both must find exactly these. The
plain loop is what one writes down first: for each image, one row of NumPy's bit counts against all others in all eight
orientations.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from dualrefnet.analysis.duplicates import MAX_DISTANCE, ORIENTATIONS, SMALL_SIDE, Fingerprints, near_pairs
from record import RESULTS, compare, how, interleaved, record

COPIES, CHANGED_BITS = 50, 20
BASE = "plain loop"


def random_fingerprints(count: int, seed: int = 0) -> Fingerprints:
    """Return fingerprints of images that don't resemble each other, but for the last `COPIES`, which copy the first
    ones.
    """
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**63, (count, ORIENTATIONS, 4), dtype=np.uint64)
    small = generator.integers(0, 256, (count, SMALL_SIDE, SMALL_SIDE)).astype(np.uint8)
    hashes[-COPIES:], small[-COPIES:] = hashes[:COPIES], small[:COPIES]
    for row in range(count - COPIES, count):
        for bit in generator.choice(256, CHANGED_BITS, replace=False):
            hashes[row, 0, bit // 64] ^= np.uint64(1 << int(bit % 64))
    ids = tuple(f"{row:06}" for row in range(count))
    return Fingerprints(ids, hashes, small, ids, {})


def plain_loop(fingerprints: Fingerprints) -> int:
    """Return the number of pairs within the distance, as they lie or turned."""
    hashes, found = fingerprints.hashes, 0
    for row in range(len(hashes) - 1):
        distance = np.bitwise_count(hashes[row + 1 :] ^ hashes[row, 0]).sum(axis=2)
        found += int((distance.min(axis=1) <= MAX_DISTANCE).sum())
    return found


def main(
    count: Annotated[
        int, typer.Option(min=2 * COPIES, help="Number of images; 25,331 are those of ISIC-2019.")
    ] = 25_331,
    rounds: int = 2,
    out: Path = RESULTS,
) -> None:
    """Measure and check; about five minutes on two cores."""
    fingerprints = random_fingerprints(count)
    if len(near_pairs(fingerprints)) != COPIES or plain_loop(fingerprints) != COPIES:
        raise SystemExit(f"both must find the {COPIES} copies and nothing else")
    cores = os.cpu_count() or 1
    cases = {
        BASE: lambda: plain_loop(fingerprints),
        "near_pairs, 1 thread": lambda: near_pairs(fingerprints, 1),
        f"near_pairs, {cores} threads": lambda: near_pairs(fingerprints, cores),
    }
    # The check was the warm-up.
    seconds = interleaved(cases, rounds, warmup=0)
    pairs = count * (count - 1) // 2
    note = (
        f"{count:,} random fingerprints in eight orientations, {pairs:,} pairs, {COPIES} copies found by both; "
        f"{how(rounds, BASE)}"
    )
    record("near_duplicates", compare(seconds, "s", BASE), note, out)


if __name__ == "__main__":
    typer.run(main)
