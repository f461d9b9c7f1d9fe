"""What an input is worth to a model that was trained for it: a logistic regression on that input alone.

A trained network that is asked without a photograph meets an input that it may never have seen, and can do worse than the input
deserves. The regression tells the two apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dualrefnet.evaluation.changed_inputs import Floats, Forms

# More than enough for standardised columns; a fit that needs more has converged for all that counts here.
ITERATIONS = 2000


def train_for(train: NDArray[np.float32], labels: NDArray[np.int64], test: NDArray[np.float32], classes: int) -> Floats:
    """Fit a logistic regression, classes balanced and columns standardised, and return its probabilities.

    Args:
        train: (N, D) of the training side.
        labels: (N,) class indices.
        test: (T, D).
        classes: C.

    Returns:
        (T, C), 0 for a class without a training row.
    """
    fitted = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=ITERATIONS)).fit(
        train.astype(np.float64), labels
    )
    result = np.zeros((len(test), classes))
    result[:, fitted.classes_] = fitted.predict_proba(test.astype(np.float64))
    return result


def with_gaps_told(train: Forms, test: Forms) -> tuple[Forms, Forms]:
    """Return encoded forms without NaN: 0 in its place, and a further column for each that has one, which tells where."""
    gappy = np.isnan(train).any(axis=0) | np.isnan(test).any(axis=0)
    filled = [np.concatenate([np.nan_to_num(forms), np.isnan(forms[:, gappy]).astype(np.float32)], axis=1) for forms in (train, test)]
    return filled[0], filled[1]
