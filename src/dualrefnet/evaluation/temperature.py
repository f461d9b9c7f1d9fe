"""Temperature scaling: one number, found on the validation side, that makes a model as sure of itself as it may be.

Every probability is raised to the power 1/T and the row is scaled to sum 1 (Guo et al. 2017): T above 1 takes sureness away,
T below 1 adds some. The likeliest class stays the likeliest. The logarithm of a probability is the logit up to a constant of the
row, and the constant cancels out, so the probabilities are all that is needed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.inputs import check_predictions
from dualrefnet.evaluation.intervals import draw_counts, percentile_interval
from dualrefnet.runtime.probabilities import softmax, to_logits

Floats = NDArray[np.float64]

# Beyond these a temperature says that the validation side is too small or the model useless, not how sure it may be.
LOWEST, HIGHEST = 0.05, 20.0
# Halvings of the range of log T: the last is far below what a float can tell.
STEPS = 60
# Temperatures between which the intervals interpolate.
_GRID = np.exp(np.linspace(np.log(LOWEST), np.log(HIGHEST), 241))


def fit_temperature(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the temperature at which the log loss is smallest.

    The log loss is convex in 1/T, so its slope changes sign once, and halving the range finds where.

    Args:
        labels: (N,), class indices.
        probabilities: (N, C), rows sum to 1.

    Returns:
        A number in `LOWEST`..`HIGHEST`. 1 if every image is right: then the log loss falls for ever as T falls to 0, which says
        that there are too few images, not that the model may be sure of everything.

    Raises:
        ValueError: see `check_predictions`.
    """
    truth, scores = check_predictions(labels, probabilities)
    logits = to_logits(scores)
    if all_right(truth, scores):
        return 1.0
    low, high = np.log([LOWEST, HIGHEST])
    for _ in range(STEPS):
        middle = (low + high) / 2
        # A positive slope over 1/T: the smallest log loss lies at a smaller 1/T, a higher T.
        low, high = (middle, high) if _slopes(truth, logits, float(np.exp(middle))).mean() > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def all_right(labels: NDArray[np.int64], probabilities: Floats) -> bool:
    """Return whether every image's class has the largest probability (shared or not): then no temperature can be found."""
    return bool((probabilities[np.arange(len(labels)), labels] == probabilities.max(axis=1)).all())


def at_bound(temperature: float) -> bool:
    """Return whether a temperature stands at an end of its range: the probabilities then say little."""
    return not LOWEST * 1.001 < temperature < HIGHEST / 1.001


def temperature_interval(
    labels: ArrayLike, probabilities: ArrayLike, groups: NDArray[np.int64], samples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float] | None:
    """Return the percentile interval of the temperature over resampled patients.

    A resample in which every image is right has none and is skipped. Between the temperatures of a fine grid the slope of the log
    loss counts as straight.

    Args:
        labels: (N,), class indices.
        probabilities: (N, C), rows sum to 1.
        groups: (N,), patient of every image, 0..G-1.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage.

    Returns:
        (low, high); None if every resample was skipped.

    Raises:
        ValueError: see `check_predictions`.
    """
    truth, scores = check_predictions(labels, probabilities)
    logits, size = to_logits(scores), int(groups.max()) + 1
    slopes = np.stack([np.bincount(groups, _slopes(truth, logits, temperature), size) for temperature in _GRID], axis=1)
    wrong = np.bincount(groups, scores[np.arange(len(truth)), truth] < scores.max(axis=1), size)
    found = []
    for times in draw_counts(size, samples, seed):
        found.append(np.where(times @ wrong > 0, _zeros(times @ slopes), np.nan))
    return percentile_interval(np.concatenate(found), level)


def _zeros(slopes: Floats) -> Floats:
    """Return for each row the temperature of `_GRID` at which a falling slope passes 0, straight between two of the grid."""
    positive = slopes > 0
    # The first that isn't positive; none: the highest temperature.
    after = np.where(positive.all(axis=1), len(_GRID) - 1, (~positive).argmax(axis=1))
    before = np.maximum(after - 1, 0)
    rows, places = np.arange(len(slopes)), np.log(_GRID)
    above, below = slopes[rows, before], slopes[rows, after]
    crossing = (above > 0) & (below <= 0)
    share = np.divide(above, above - below, out=np.ones(len(slopes)), where=crossing)
    return np.asarray(np.exp(places[before] + share * (places[after] - places[before])))


def _slopes(truth: NDArray[np.int64], logits: Floats, temperature: float) -> Floats:
    """Return each image's slope of the log loss over 1/T: the mean logit, weighted by probability, less that of its class."""
    return np.asarray((softmax(logits / temperature) * logits).sum(axis=1) - logits[np.arange(len(truth)), truth])
