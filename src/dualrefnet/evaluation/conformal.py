"""Conformal sets: instead of one class, as few classes as are needed for the right one to be among them as often as promised.

Split conformal prediction with the score of least ambiguous sets (LAC; Sadinle, Lei and Wasserman 2019): on n calibration images
take the probability that the model gave the true class; a class is in the set of a new image if its probability reaches the
ceil((n + 1) coverage)-th largest of those n. If calibration and new images are exchangeable, the right class is in the set with
at least that probability, whatever the model. One threshold for all classes promises this over all images together, and may
leave a rare class out often; a threshold for each class, from its own calibration images (Mondrian; Vovk 2012), promises it
within every class, with larger sets.

Where n is too small for the promise, (n + 1) coverage > n, no threshold can keep it, and the class is in every set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.ratios import Ratio, measure_ratios
from dualrefnet.runtime.probabilities import prediction_sets

Floats = NDArray[np.float64]


def conformal_threshold(true_probabilities: ArrayLike, coverage: float, draws: int = 1) -> float:
    """Return the probability that a class must reach to be in a set; 0 (all classes) if there are too few images.

    Args:
        true_probabilities: (n * draws,), what each calibration image's true class was given; may be empty.
        coverage: how often the right class shall be in the set, between 0 and 1.
        draws: inputs of each image, such as several choices of its metadata; they count as one.

    Raises:
        ValueError: `coverage` isn't between 0 and 1.

    >>> conformal_threshold([0.9, 0.5, 0.8, 0.6], 0.6)  # ceil(5 x .6) = 3rd largest
    0.6
    >>> conformal_threshold([0.9, 0.5, 0.8, 0.6], 0.9)  # ceil(5 x .9) = 5, and there are four
    0.0
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must lie between 0 and 1, not {coverage}")
    values = np.sort(np.asarray(true_probabilities, dtype=np.float64))[::-1]
    images = len(values) // draws
    return float(values[_rank(images, coverage) * draws - 1]) if can_promise(images, coverage) else 0.0


def can_promise(images: int, coverage: float) -> bool:
    """Return whether so many calibration images are enough for a promise: 9 for 90%, 19 for 95%."""
    return _rank(images, coverage) <= images


def class_thresholds(labels: NDArray[np.int64], probabilities: Floats, coverage: float, draws: int = 1) -> tuple[float, ...]:
    """Return the threshold of each class from its own images; 0 (in every set) for a class with too few of them."""
    count = probabilities.shape[1]
    return tuple(conformal_threshold(probabilities[labels == index, index], coverage, draws) for index in range(count))


def measure_sets(
    labels: NDArray[np.int64],
    probabilities: Floats,
    thresholds: float | Sequence[float],
    groups: NDArray[np.int64],
    classes: Sequence[str],
    coverage: float,
    samples: int,
    seed: int,
    level: float,
) -> dict[str, Any]:
    """Measure sets on images that had no part in the thresholds.

    Args:
        labels: (N,).
        probabilities: (N, C), as those from which the thresholds come.
        thresholds: one for all classes, or one for each.
        groups: (N,), patient of every image, 0..G-1.
        classes: names.
        coverage: what was promised.
        samples: bootstrap samples; 0: no intervals.
        seed: of the draw.
        level: coverage of the intervals.

    Returns:
        `coverage` (share of images whose set holds the right class), `mean_size`, `singletons` (share of sets of one class), each
        with its interval; `filled` (number of sets that would have been empty); `promise` (`within` if the promised coverage lies
        in the interval, `missed` if the interval lies below it, `exceeded` if above; None without an interval); `sizes` (number
        of images with a set of 1, 2, ... classes); `per_class` (class -> `coverage`, `mean_size`, `images`).
    """
    sets = prediction_sets(probabilities, thresholds)
    size, held = sets.sum(axis=1), sets[np.arange(len(labels)), labels]
    everything = np.ones((len(labels), 1), dtype=bool)
    mine = labels[:, None] == np.arange(len(classes))
    about = np.hstack([everything, everything, mine])
    right = np.hstack([held[:, None], size[:, None] == 1, np.tile(held[:, None], len(classes))])
    whole, singletons, *by_class = measure_ratios(right, about, groups, samples, seed, level)
    sizes = measure_ratios(
        np.tile(size[:, None], len(classes) + 1), np.hstack([everything, mine]), groups, samples, seed, level, shares=False
    )
    result = whole.to_json("coverage", level) | sizes[0].to_json("mean_size", level) | singletons.to_json("singletons", level)
    result["filled"] = int((probabilities < np.asarray(thresholds)).all(axis=1).sum())
    result["promise"] = _promise(whole, coverage)
    result["sizes"] = np.bincount(size, minlength=len(classes) + 1)[1:].tolist()
    result["per_class"] = {
        name: one.to_json("coverage", level) | its_size.to_json("mean_size", level) | {"images": one.count}
        for name, one, its_size in zip(classes, by_class, sizes[1:], strict=True)
    }
    return result


def _rank(images: int, coverage: float) -> int:
    # 10 x .9 must not become 9.000000000000002.
    return math.ceil((images + 1) * coverage - 1e-9)


def _promise(ratio: Ratio, coverage: float) -> str | None:
    if np.isnan(ratio.low):
        return None
    if ratio.high < coverage:
        return "missed"
    return "exceeded" if ratio.low > coverage else "within"
