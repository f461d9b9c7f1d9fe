"""Predictions with ties, and resamples laid out image by image, with which the weighted metrics are compared."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.bootstrap import Bootstrap, Difference
from dualrefnet.evaluation.comparison import pooled_bootstrap
from dualrefnet.evaluation.metrics import DEFAULT_BINS, CalibrationErrors, compute_metrics

Floats = NDArray[np.float64]
CLASSES = ["A", "B", "C"]


def predictions(
    seed: int, images: int, count: int = 3, skill: int = 4, levels: int = 6
) -> tuple[NDArray[np.int64], Floats]:
    """Draw labels, every class among them, and probabilities: the fewer levels, the more ties."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(count, size=images)
    labels[:count] = np.arange(count)[:images]
    scores = generator.integers(1, levels, size=(images, count)).astype(float)
    scores[np.arange(images), labels] += generator.integers(0, skill + 1, size=images)
    return labels, scores / scores.sum(axis=1, keepdims=True)


def truthful(seed: int, images: int, count: int = 3, overconfidence: float = 1.0) -> tuple[NDArray[np.int64], Floats]:
    """Draw labels from probabilities, and return these to the given power."""
    generator = np.random.default_rng(seed)
    scores = generator.dirichlet(np.full(count, 0.7), images)
    labels = (generator.random(images)[:, None] > scores.cumsum(axis=1)[:, :-1]).sum(axis=1)
    scores = np.maximum(scores, 1e-9) ** overconfidence
    return labels, scores / scores.sum(axis=1, keepdims=True)


def lay_out(groups: ArrayLike, samples: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """Draw groups one by one, as `Bootstrap` does, and return the rows of all their images: slow and plain."""
    generator, names = np.random.default_rng(seed), list(dict.fromkeys(np.asarray(groups).tolist()))
    rows = [np.flatnonzero(np.asarray(groups) == name) for name in names]
    drawn = [generator.integers(len(names), size=len(names)) for _ in range(samples)]
    return [np.concatenate([rows[index] for index in indices]) for indices in drawn]


def intervals_of(metrics: Mapping[str, Any], suffix: str = "_ci95") -> dict[str, list[float]]:
    """Every interval of metrics.json under keys like `accuracy` and `per_class.MEL.auc`."""
    parts = {"": metrics, "malignant.": metrics.get("malignant", {})}
    parts |= {f"per_class.{name}.": values for name, values in metrics["per_class"].items()}
    return {
        prefix + key.removesuffix(suffix): values[key]
        for prefix, values in parts.items()
        for key in values
        if key.endswith(suffix)
    }


def paired_difference(
    labels: ArrayLike, a: Floats, b: Floats, bootstrap: Bootstrap, classes: Sequence[str], measure: str
) -> Difference:
    """How far model A is above model B on the same resamples."""
    return pooled_bootstrap(labels, {"a": [a], "b": [b]}, bootstrap, classes).difference("a", "b", measure)


def ece(labels: ArrayLike, scores: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """Expected calibration error of the images themselves."""
    return float(CalibrationErrors(np.asarray(labels), np.asarray(scores), bins=bins).ece(np.ones((1, 1)))[0])


def adaptive_ece(labels: ArrayLike, scores: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """The same over bins of equal mass."""
    return float(CalibrationErrors(np.asarray(labels), np.asarray(scores), bins=bins).adaptive_ece(np.ones((1, 1)))[0])


def brier(labels: ArrayLike, scores: Floats) -> float:
    """Brier score."""
    return float(compute_metrics(labels, scores, [str(index) for index in range(scores.shape[1])])["brier"])
