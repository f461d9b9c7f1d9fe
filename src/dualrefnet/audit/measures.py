"""The few measures an audit takes of models that see no picture, with intervals over patients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

from dualrefnet.evaluation.intervals import draw, draw_counts, group_codes, percentile_interval
from dualrefnet.evaluation.resampling import Resampler

FOLDS = 5
LEVEL = 0.95
MEASURES = {"balanced_accuracy": "balanced_accuracy", "auc": "auc_macro_ovr", "malignant_auc": "malignant.auc"}

# Makes a fresh, unfitted classifier of scikit-learn.
Learner = Callable[[], Any]


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval over patients; NaN where it is undefined."""

    value: float
    low: float
    high: float


def predict_in_folds(
    learner: Learner, features: NDArray[np.float64], labels: NDArray[np.int64], groups: NDArray[Any] | None, classes: int, seed: int
) -> NDArray[np.float64]:
    """Predict every row by a model that was fitted without the row's fold.

    Args:
        learner: makes a classifier.
        features: (N, M).
        labels: (N,).
        groups: (N,) patients, kept together; None: folds of images.
        classes: C.
        seed: of the folds.

    Returns:
        (N, C) probabilities.
    """
    probabilities = np.zeros((len(labels), classes))
    with one_thread():
        for train, test in _folds(features, labels, groups, seed):
            model = learner().fit(features[train], labels[train])
            probabilities[np.ix_(test, model.classes_)] = model.predict_proba(features[test])
    return probabilities


def one_thread() -> Any:
    """Return a context in which linear algebra uses one thread.

    The matrices of forms are small: threads would spend their time waiting for each other, ten times as long on a busy machine.
    """
    return threadpool_limits(limits=1)


def enough_for_folds(labels: NDArray[np.int64], groups: NDArray[Any]) -> bool:
    """Whether two classes are there, one of them in each of the folds, and as many groups as folds."""
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) > 1 and int(counts.max()) >= FOLDS and len(set(groups)) >= FOLDS


def measure(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    groups: NDArray[Any],
    classes: tuple[str, ...],
    malignant: tuple[str, ...],
    samples: int,
    seed: int,
) -> dict[str, Interval]:
    """Return `balanced_accuracy`, `auc` (macro, one class against the rest) and `malignant_auc` with intervals.

    Args:
        labels: (N,).
        probabilities: (N, C).
        groups: (N,) patients.
        classes: C names.
        malignant: those that are cancer; if empty, `malignant_auc` is NaN.
        samples: bootstrap samples.
        seed: of the draw.
    """
    resampler = Resampler(labels, probabilities, group_codes(groups), list(classes), list(malignant))
    point = resampler.measure(np.ones((resampler.group_count, 1)))
    drawn = draw([resampler], samples, seed)[0]
    result = {}
    for name, key in MEASURES.items():
        interval = percentile_interval(drawn[key], LEVEL) if key in drawn else None
        result[name] = Interval(float(point[key][0]), *interval) if interval is not None else Interval(np.nan, np.nan, np.nan)
    return result


def recall_samples(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], groups: NDArray[Any], classes: int, samples: int, seed: int
) -> tuple[float, NDArray[np.float64]]:
    """Return the balanced accuracy and that of every bootstrap sample of patients, (samples,).

    The same `groups` and `seed` draw the same patients, so that differences of two models' samples are paired.
    """
    codes = group_codes(groups)
    count, cell = int(codes.max()) + 1, labels * classes + predicted
    cells = np.bincount(codes * classes**2 + cell, minlength=count * classes**2).reshape(count, classes**2).astype(float)
    drawn = [_balanced(times @ cells, classes) for times in draw_counts(count, samples, seed)]
    return float(_balanced(cells.sum(axis=0, keepdims=True), classes)[0]), np.concatenate(drawn)


def _balanced(cells: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    matrices = cells.reshape(-1, classes, classes)
    support = matrices.sum(axis=2)
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    recall = np.divide(hits, support, out=np.zeros_like(support), where=support > 0)
    return np.asarray(recall.sum(axis=1) / (support > 0).sum(axis=1))


def _folds(features: NDArray[np.float64], labels: NDArray[np.int64], groups: NDArray[Any] | None, seed: int) -> list[tuple[Any, Any]]:
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer images than folds is missing from some of them, and its images count as wrong there.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        return list(splitter.split(features, labels, groups))
