"""The one check that labels and probabilities pass before anything is computed from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Half-precision outputs and printed decimals miss 1 by less; scores that aren't probabilities miss it by more.
SUM_TOLERANCE = 1e-2


def check_predictions(
    labels: ArrayLike, probabilities: ArrayLike, class_count: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Check labels and probabilities, and return them as int64 and float64 arrays.

    The probabilities keep their values: rows aren't scaled to sum 1, since that could break or make ties between rows.

    Args:
        labels: true class of every image, (N,), whole numbers 0..C-1.
        probabilities: one row an image, (N, C), each row summing to 1.
        class_count: C, where the caller knows it.

    Raises:
        ValueError: a shape is wrong, there are no rows, a label isn't a class, or a row isn't a probability distribution.
    """
    truth = np.asarray(labels)
    scores = np.asarray(probabilities, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(f"probabilities must have the shape (images, classes), not {scores.shape}")
    if truth.shape != (len(scores),):
        raise ValueError(f"labels must have the shape ({len(scores)},), one for each row of probabilities, not {truth.shape}")
    if len(scores) == 0:
        raise ValueError("there are no rows to measure")
    if class_count is not None and scores.shape[1] != class_count:
        raise ValueError(f"probabilities have {scores.shape[1]} columns for {class_count} classes")
    if scores.shape[1] < 2:
        raise ValueError("there must be at least 2 classes")
    if not np.issubdtype(truth.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers (class indices), not {truth.dtype}")
    if truth.min() < 0 or truth.max() >= scores.shape[1]:
        raise ValueError(f"labels must lie in 0..{scores.shape[1] - 1}; they lie in {truth.min()}..{truth.max()}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).any(axis=1).sum())} rows of probabilities hold NaN or infinity")
    if scores.min() < 0 or scores.max() > 1 + SUM_TOLERANCE:
        raise ValueError("probabilities must lie in 0..1; were logits passed? apply a softmax first")
    wrong = np.abs(scores.sum(axis=1) - 1) > SUM_TOLERANCE
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} rows of probabilities don't sum to 1, the first is row {int(wrong.argmax())}; apply a softmax first"
        )
    return truth.astype(np.int64), scores


def check_classes(classes: list[str], malignant: list[str]) -> None:
    """Check the names of the classes.

    Raises:
        ValueError: fewer than 2 classes, a class named twice, or a malignant class that is no class.
    """
    if len(classes) < 2:
        raise ValueError("there must be at least 2 classes")
    if len(set(classes)) != len(classes):
        raise ValueError(f"a class is named twice: {', '.join(classes)}")
    unknown = sorted(set(malignant) - set(classes))
    if unknown:
        raise ValueError(f"malignant names no class: {', '.join(unknown)}; classes: {', '.join(classes)}")
