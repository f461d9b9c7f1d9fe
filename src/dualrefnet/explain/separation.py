"""How well classes are apart in a space of features: silhouette and nearest neighbours, with intervals over patients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import config_context
from sklearn.metrics import pairwise_distances_chunked, silhouette_samples

from dualrefnet.evaluation.comparison import PooledBootstrap
from dualrefnet.evaluation.intervals import CHUNK, group_codes

NEIGHBOURS = 5
# Measure -> what it is called.
MEASURES = {
    "silhouette": "silhouette (mean over images)",
    "silhouette_balanced": "silhouette (mean over classes)",
    "knn_balanced_accuracy": f"balanced accuracy of the {NEIGHBOURS} nearest neighbours",
}
LEVEL = 0.95
# MiB of distances at a time.
MEMORY = 128

Floats = NDArray[np.float64]


def measure_separation(
    spaces: Mapping[str, Floats], labels: NDArray[np.int64], groups: ArrayLike, samples: int = 1000, seed: int = 0
) -> PooledBootstrap:
    """Measure how well the classes are apart in one or more spaces, each with the same resamples of patients.

    The silhouette (Rousseeuw 1987) of an image says whether it is nearer to its own class than to the nearest other one, from
    -1 to 1, by the mean Euclidean distance; that of a class's only image is 0. Neighbours are those of `neighbours_right`.
    Both are computed once for every image, and the intervals resample these numbers by patient: no neighbour is sought anew.

    Args:
        spaces: name -> (N, D), one point an image, the same images in the same order in all.
        labels: (N,), class indices: at least two classes, one with two images.
        groups: (N,), the patient of every image; at least two.
        samples: bootstrap samples of patients.
        seed: of the draw.

    Returns:
        `MEASURES` of every space. A class of which no image was drawn is left out of that sample.
    """
    codes = group_codes(groups)
    patients = int(codes.max()) + 1
    points: dict[str, dict[str, float]] = {}
    drawn: dict[str, dict[str, Floats]] = {}
    for name, space in spaces.items():
        with config_context(working_memory=MEMORY):
            sums = _class_sums(labels, codes, silhouette_samples(space, labels), neighbours_right(space, labels, codes))
        points[name] = {measure: float(value[0]) for measure, value in _measure(sums, np.ones((1, patients))).items()}
        parts = [_measure(sums, times) for times in _resamples(patients, samples, seed)]
        drawn[name] = {measure: np.concatenate([part[measure] for part in parts]) for measure in MEASURES}
    return PooledBootstrap(points, drawn, patients, len(labels), samples, LEVEL)


def neighbours_right(points: Floats, labels: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say of each image whether most of its nearest images from other patients have its class.

    Args:
        points: (N, D).
        labels: (N,), class indices.
        groups: (N,), number of the patient; there are at least two.

    Returns:
        (N,). Of classes with the same number of neighbours, that of the nearest one counts.
    """
    count = min(NEIGHBOURS, len(points) - 1)

    def vote(distances: Floats, start: int) -> NDArray[np.bool_]:
        rows = np.arange(len(distances))
        own = groups[start : start + len(distances)]
        distances[own[:, None] == groups] = np.inf
        nearest = np.argpartition(distances, count - 1, axis=1)[:, :count]
        away = np.take_along_axis(distances, nearest, axis=1)
        order = np.argsort(away, axis=1, kind="stable")
        # Infinite: fewer images than `count` are of other patients.
        known = np.isfinite(np.take_along_axis(away, order, axis=1))
        given = labels[np.take_along_axis(nearest, order, axis=1)]
        votes = np.zeros((len(distances), labels.max() + 1), dtype=int)
        np.add.at(votes, (rows[:, None], given), known)
        winner = known & (votes[rows[:, None], given] == votes.max(axis=1, keepdims=True))
        right: NDArray[np.bool_] = given[rows, winner.argmax(axis=1)] == labels[start : start + len(distances)]
        return right

    return np.concatenate(list(pairwise_distances_chunked(points, reduce_func=vote)))


def _class_sums(labels: NDArray[np.int64], codes: NDArray[np.int64], *values: NDArray[Any]) -> list[Floats]:
    """Return (G, C) numbers of each patient's images of each class, and the same sums of each of the values."""
    groups, classes = int(codes.max()) + 1, int(labels.max()) + 1
    flat = codes * classes + labels
    return [
        np.bincount(flat, weights, groups * classes).reshape(groups, classes).astype(np.float64)
        for weights in (np.ones(len(labels)), *values)
    ]


def _measure(sums: list[Floats], times: Floats) -> dict[str, Floats]:
    """Return every measure of resamples, (S,) each.

    Args:
        sums: counts, silhouettes and right neighbours, (G, C) each.
        times: (S, G), how often each patient was drawn.
    """
    counts, silhouettes, right = (times @ part for part in sums)

    def over_classes(totals: Floats) -> Floats:
        # A class that wasn't drawn is left out of that sample.
        shares = np.divide(totals, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
        return np.asarray(np.nanmean(shares, axis=1), dtype=np.float64)

    return {
        "silhouette": silhouettes.sum(axis=1) / counts.sum(axis=1),
        "silhouette_balanced": over_classes(silhouettes),
        "knn_balanced_accuracy": over_classes(right),
    }


def _resamples(groups: int, samples: int, seed: int) -> Iterator[Floats]:
    """Draw patients with replacement: how often each was drawn, (at most `CHUNK`, G) at a time."""
    generator = np.random.default_rng(seed)
    for done in range(0, samples, CHUNK):
        yield generator.multinomial(groups, np.full(groups, 1 / groups), size=min(CHUNK, samples - done)).astype(np.float64)
