"""ROC and precision-recall curves of each class against the rest, with bands.

The bands are pointwise percentile intervals of a bootstrap over patients, drawn as in `intervals`: the same seed and number
of samples give the same resamples. Images are sorted by score once; a resample only changes how often each counts.
Conventions, the same for the point estimate and for every resample:

- images with the same score share a threshold, so the order of the rows changes nothing;
- ROC: the sensitivity at a false positive rate is the highest that the curve through all thresholds has there; between two
  thresholds the curve is straight, so its area is the AUC of `metrics` (ties count one half);
- precision-recall: the precision at a recall is that of the highest threshold whose recall is at least as high (at recall 0:
  above 0). This is a step function, and its area is the average precision (AP), the sum of (R_n - R_n-1) P_n.

Sources: Fawcett 2006; Davis and Goadrich 2006 (why precision must not be interpolated in a straight line).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.inputs import check_classes, check_predictions
from dualrefnet.evaluation.intervals import draw_counts, group_codes, percentile_interval

Floats = NDArray[np.float64]

# Curves are given at a false positive rate, or a recall, of 0, 0.01, ..., 1.
STEPS = 100
_HUNDREDTHS = np.arange(STEPS + 1.0)
GRID = _HUNDREDTHS / STEPS
# The name of the curves of malignant versus benign, beside those of the classes.
ALL_MALIGNANT = "all malignant"


@dataclass(frozen=True)
class Curve:
    """One curve over `GRID`.

    Attributes:
        y: (101,), sensitivity or precision.
        low: (101,), lower bound of the band; NaN if every resample was skipped.
        high: (101,), upper bound.
        area: AUC or average precision.
        interval: (low, high) of the area; NaN if every resample was skipped.
        decision: (x, y) of the decision for the most probable class, which needn't lie on the curve; y is NaN for the
            precision of a class that was never predicted.
    """

    y: Floats
    low: Floats
    high: Floats
    area: float
    interval: tuple[float, float]
    decision: tuple[float, float]


@dataclass(frozen=True)
class OneVersusRest:
    """The curves of one class versus the rest.

    Attributes:
        name: of the class, or `ALL_MALIGNANT`.
        positives: number of its images.
        prevalence: their share of the test set; the precision of guessing.
        roc: sensitivity over the false positive rate (1 - specificity).
        precision_recall: precision over recall.
        samples_without: resamples that were skipped since the class, or everything else, was missing.
    """

    name: str
    positives: int
    prevalence: float
    roc: Curve
    precision_recall: Curve
    samples_without: int


@dataclass(frozen=True)
class Curves:
    """The curves of a test set.

    Attributes:
        of: those that exist, in the order of the classes, malignant versus benign last.
        classes: all classes, with curves or without.
        malignant: the classes that are cancer.
        images: number in the test set.
        groups: number of patients in the test set.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage of bands and intervals.
        remarks: which curves are missing, and which bands are too narrow.
    """

    of: tuple[OneVersusRest, ...]
    classes: tuple[str, ...]
    malignant: tuple[str, ...]
    images: int
    groups: int
    samples: int
    seed: int
    level: float
    remarks: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """Return all curves as one tidy table.

        Returns:
            Columns `class`, `curve` (`roc` or `precision_recall`), `part`, `x`, `y`, `low`, `high` (NaN where there is none).
            `part` is `curve` (101 rows), `area` (y: AUC or average precision), `decision` (for the most probable class) or
            `chance` (precision-recall only; y: the precision of guessing).
        """
        nan, rows = float("nan"), []
        for one in self.of:
            for kind, curve in (("roc", one.roc), ("precision_recall", one.precision_recall)):
                key = (one.name, kind)
                rows += [(*key, "curve", *point) for point in zip(GRID, curve.y, curve.low, curve.high, strict=True)]
                rows += [(*key, "area", nan, curve.area, *curve.interval), (*key, "decision", *curve.decision, nan, nan)]
                if kind == "precision_recall":
                    rows.append((*key, "chance", nan, one.prevalence, nan, nan))
        table = pd.DataFrame(rows, columns=["class", "curve", "part", "x", "y", "low", "high"])
        return table.astype({"x": float, "y": float, "low": float, "high": float})


@dataclass(frozen=True)
class Thresholds:
    """One score against one yes-or-no truth, sorted once.

    Attributes:
        groups: (N,), group of every image, from the highest score to the lowest.
        positive: (N,), where the truth is yes.
        ends: (T,), place of the last image at or above each threshold.
    """

    groups: NDArray[np.int64]
    positive: NDArray[np.bool_]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, score: Floats, positive: NDArray[np.bool_], groups: NDArray[np.int64]) -> Thresholds:
        """Sort the images by score; all (N,)."""
        order = np.argsort(-score, kind="stable")
        return cls(groups[order], positive[order], np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1))

    def measure(self, times: Floats) -> dict[str, Floats]:
        """Return `roc` and `precision_recall` (S, 101), `auc` and `ap` (S,); NaN for a resample with one side empty.

        Args:
            times: (S, G), how often each group was drawn.
        """
        weights = times[:, self.groups]
        # Images at or above each threshold, (S, T + 1), with those above all thresholds in front: none.
        # Whole numbers, so that no comparison below can miss by a rounding error.
        called, found = (np.pad(np.cumsum(counts, axis=1)[:, self.ends], ((0, 0), (1, 0))) for counts in (weights, weights * self.positive))
        defined = np.flatnonzero((found[:, -1] > 0) & (called[:, -1] > found[:, -1]))
        result = {"roc": np.full((len(times), STEPS + 1), np.nan), "auc": np.full(len(times), np.nan)}
        result |= {"precision_recall": result["roc"].copy(), "ap": result["auc"].copy()}
        for row in defined:
            yes, no = found[row, -1], called[row, -1] - found[row, -1]
            true, false = found[row], called[row] - found[row]
            precision = true[1:] / np.maximum(called[row, 1:], 1)
            result["roc"][row] = _highest(false, true, _HUNDREDTHS * no) / yes
            result["precision_recall"][row] = precision[np.searchsorted(true[1:] * STEPS, np.maximum(_HUNDREDTHS * yes, 1))]
            result["auc"][row] = (np.diff(false) * (true[1:] + true[:-1])).sum() / (2 * yes * no)
            result["ap"][row] = (np.diff(true) * precision).sum() / yes
        return result


def class_curves(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    classes: Sequence[str],
    malignant: Sequence[str] = (),
    samples: int = 500,
    seed: int = 0,
    level: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
) -> Curves:
    """Compute ROC and precision-recall curves with pointwise bands.

    Args:
        labels: (N,), indices into `classes`.
        probabilities: (N, C), rows sum to 1.
        groups: (N,), the patient of every image; each image of an unknown patient needs a name of its own.
        classes: names in the order of the columns.
        malignant: the classes that are cancer, for the curves `ALL_MALIGNANT` (score: the sum of their probabilities;
            decision: whether the most probable class is one of them); empty: no such curves.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage.
        progress: called with (samples done, samples in all).

    Returns:
        The curves; a class that has no images, or all of them, has none, and `remarks` says so.

    Raises:
        ValueError: see `check_predictions`, `check_classes` and `check_draw`.
    """
    classes, malignant = list(classes), list(malignant)
    check_classes(classes, malignant)
    truth, scores = check_predictions(labels, probabilities, len(classes))
    codes = check_draw(groups, len(truth), samples, level)
    patients, predicted = int(codes.max()) + 1, scores.argmax(axis=1)
    # Truth, score and decision of each yes-or-no question.
    questions = {name: (truth == index, scores[:, index], predicted == index) for index, name in enumerate(classes)}
    if malignant:
        cancer = np.isin(classes, malignant)
        questions[ALL_MALIGNANT] = (cancer[truth], scores[:, cancer].sum(axis=1), cancer[predicted])
    askable = {name: values for name, values in questions.items() if 0 < values[0].sum() < len(truth)}
    ranked = {name: Thresholds.of(score, positive, codes) for name, (positive, score, _) in askable.items()}

    drawn: dict[str, list[dict[str, Floats]]] = {name: [] for name in askable}
    for times in draw_counts(patients, samples, seed, progress):
        for name, thresholds in ranked.items():
            drawn[name].append(thresholds.measure(times))
    curves = []
    for name, (positive, _, decided) in askable.items():
        point = ranked[name].measure(np.ones((1, patients)))
        resampled = {key: np.concatenate([chunk[key] for chunk in drawn[name]]) for key in point}
        hits, yes, named = int((positive & decided).sum()), int(positive.sum()), int(decided.sum())
        roc_decision = ((named - hits) / (len(truth) - yes), hits / yes)
        pr_decision = (hits / yes, hits / named if named else float("nan"))
        roc = _curve(point, resampled, "roc", "auc", roc_decision, level)
        precision_recall = _curve(point, resampled, "precision_recall", "ap", pr_decision, level)
        skipped = int(np.isnan(resampled["auc"]).sum())
        curves.append(OneVersusRest(name, yes, yes / len(truth), roc, precision_recall, skipped))
    remarks = _remarks(classes, truth, curves, bool(malignant) and ALL_MALIGNANT not in askable, samples)
    return Curves(tuple(curves), tuple(classes), tuple(malignant), len(truth), patients, samples, seed, level, remarks)


def check_draw(groups: ArrayLike, images: int, samples: int, level: float) -> NDArray[np.int64]:
    """Check what a bootstrap over patients needs, and return the groups as numbers 0..G-1.

    Raises:
        ValueError: see `group_codes`; `groups` isn't (images,), `samples` is below 1, or `level` is outside 0..1.
    """
    codes = group_codes(groups)
    if codes.shape != (images,):
        raise ValueError(f"groups must have the shape {(images,)}, one for each image, not {codes.shape}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    return codes


def _highest(x: Floats, y: Floats, wanted: Floats) -> Floats:
    """Return the upper end of the curve through (x, y), both ascending counts, where x is `wanted` / STEPS."""
    reached = np.searchsorted(x * STEPS, wanted, side="right") - 1
    after = np.minimum(reached + 1, len(x) - 1)
    # At the last point there is nothing to go on to.
    share = (wanted / STEPS - x[reached]) / np.maximum(x[after] - x[reached], 1)
    result: Floats = y[reached] + share * (y[after] - y[reached])
    return result


def _curve(
    point: dict[str, Floats], resampled: dict[str, Floats], kind: str, area: str, decision: tuple[float, float], level: float
) -> Curve:
    kept = resampled[kind][~np.isnan(resampled[area])]
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(kept, tails, axis=0) if len(kept) else np.full((2, STEPS + 1), np.nan)
    interval = percentile_interval(resampled[area], level) or (float("nan"), float("nan"))
    return Curve(point[kind][0], low, high, float(point[area][0]), interval, decision)


def _remarks(
    classes: list[str], truth: NDArray[np.int64], curves: list[OneVersusRest], no_malignant: bool, samples: int
) -> tuple[str, ...]:
    counts = np.bincount(truth, minlength=len(classes))
    absent = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    remarks = []
    if absent:
        remarks.append(f"no image of {', '.join(absent)} in the test set, so no curve")
    if len(absent) == len(classes) - 1:
        remarks.append("the test set holds one class only: there is nothing to tell it from, so no curve")
    if no_malignant:
        remarks.append("no curve of malignant versus benign, as one of the two never occurs")
    vanished = [f"{curve.name} ({curve.samples_without})" for curve in curves if curve.samples_without]
    if vanished:
        remarks.append(
            f"missing from some of the {samples} resamples, and skipped in those: {', '.join(vanished)}; these bands are too narrow"
        )
    return tuple(remarks)
