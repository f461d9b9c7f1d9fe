"""ROC and precision-recall curves of each class against the rest, with bands.

The bands are pointwise percentile intervals of a bootstrap over patients, drawn as in `intervals`: the same seed and
number
of samples give the same resamples. Images are sorted by score once; a resample only changes how often each counts.
Conventions, the same for the point estimate and for every resample:

- images with the same score share a threshold, so the order of the rows changes nothing;
- ROC: the sensitivity at a false positive rate is the highest that the curve through all thresholds has there; between
two
  thresholds the curve is straight, so its area is the AUC of `metrics` (ties count one half);
- precision-recall: the precision at a recall is that of the highest threshold whose recall is at least as high (at
recall 0:
  above 0). This is a step function, and its area is the average precision (AP), the sum of (R_n - R_n-1) P_n.

Sources: Fawcett 2006; Davis and Goadrich 2006 (why precision must not be interpolated in a straight line).
"""

# also: The reliability diagram of the top label: of the images with a confidence of about 80%, are 80% right?
# also: Pictures of what the probabilities are worth: ROC and precision-recall curves, and reliability.

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray

from dualrefnet.display.figure import FAINT, INK, PAPER, PRIMARY, WIDTH, ReportFigure, class_colours, new_figure, styled
from dualrefnet.evaluation.bootstrap import draw_counts, group_codes, percentile_interval, wilson_interval
from dualrefnet.evaluation.metrics import (
    DEFAULT_BINS,
    check_classes,
    check_predictions,
    equal_width_bins,
    expected_calibration_error,
    reliability_curve,
)

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
            Columns `class`, `curve` (`roc` or `precision_recall`), `part`, `x`, `y`, `low`, `high` (NaN where there is
            none).
            `part` is `curve` (101 rows), `area` (y: AUC or average precision), `decision` (for the most probable class)
            or
            `chance` (precision-recall only; y: the precision of guessing).
        """
        nan, rows = float("nan"), []
        for one in self.of:
            for kind, curve in (("roc", one.roc), ("precision_recall", one.precision_recall)):
                key = (one.name, kind)
                rows += [(*key, "curve", *point) for point in zip(GRID, curve.y, curve.low, curve.high, strict=True)]
                rows += [
                    (*key, "area", nan, curve.area, *curve.interval),
                    (*key, "decision", *curve.decision, nan, nan),
                ]
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
        called, found = (
            np.pad(np.cumsum(counts, axis=1)[:, self.ends], ((0, 0), (1, 0)))
            for counts in (weights, weights * self.positive)
        )
        defined = np.flatnonzero((found[:, -1] > 0) & (called[:, -1] > found[:, -1]))
        result = {"roc": np.full((len(times), STEPS + 1), np.nan), "auc": np.full(len(times), np.nan)}
        result |= {"precision_recall": result["roc"].copy(), "ap": result["auc"].copy()}
        for row in defined:
            yes, no = found[row, -1], called[row, -1] - found[row, -1]
            true, false = found[row], called[row] - found[row]
            precision = true[1:] / np.maximum(called[row, 1:], 1)
            result["roc"][row] = _highest(false, true, _HUNDREDTHS * no) / yes
            result["precision_recall"][row] = precision[
                np.searchsorted(true[1:] * STEPS, np.maximum(_HUNDREDTHS * yes, 1))
            ]
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
    point: dict[str, Floats],
    resampled: dict[str, Floats],
    kind: str,
    area: str,
    decision: tuple[float, float],
    level: float,
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


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram's numbers.

    Attributes:
        table: of `reliability_curve`, and `patients` (number in the bin), `accuracy_low` and `accuracy_high` (NaN where
            there
            is no interval).
        ece: expected calibration error over the same bins.
        images: number in the test set.
        groups: number of patients in the test set.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage of the intervals.
    """

    table: pd.DataFrame
    ece: float
    images: int
    groups: int
    samples: int
    seed: int
    level: float


def compute_reliability(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    bins: int = DEFAULT_BINS,
    samples: int = 500,
    seed: int = 0,
    level: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
) -> Reliability:
    """Compute the reliability of the top label, with an interval of each bin's accuracy from a bootstrap over patients.

    A resample without images in a bin is skipped for it. Where all of a bin's images are right, or none, all resamples
    agree,
    which would feign certainty: there the interval is Wilson's, each patient counting as one case. For the same reason
    a
    bin with the images of a single patient, some of them right, has no interval.

    Args:
        labels: (N,), class indices.
        probabilities: (N, C), rows sum to 1.
        groups: (N,), the patient of every image; each image of an unknown patient needs a name of its own.
        bins: number of bins of equal width.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage.
        progress: called with (samples done, samples in all).

    Raises:
        ValueError: see `check_predictions` and `check_draw`; or `bins` is below 1.
    """
    truth, scores = check_predictions(labels, probabilities)
    codes = check_draw(groups, len(truth), samples, level)
    table, size = reliability_curve(truth, scores, bins), int(codes.max()) + 1
    cells = codes * bins + equal_width_bins(scores.max(axis=1), bins)
    counts = np.bincount(cells, minlength=size * bins).reshape(size, bins).astype(np.float64)
    right = np.bincount(cells, scores.argmax(axis=1) == truth, size * bins).reshape(size, bins)
    drawn = np.full((samples, bins), np.nan)
    done = 0
    for times in draw_counts(size, samples, seed, progress):
        seen = times @ counts
        np.divide(times @ right, seen, out=drawn[done : done + len(times)], where=seen > 0)
        done += len(times)
    table["patients"] = (counts > 0).sum(axis=0)
    intervals = []
    for accuracy, patients, column in zip(table["accuracy"], table["patients"], drawn.T, strict=True):
        if accuracy in (0, 1):
            interval = wilson_interval(int(accuracy) * patients, patients, level)
        else:
            interval = (percentile_interval(column, level) if patients > 1 else None) or (np.nan, np.nan)
        intervals.append(interval)
    table[["accuracy_low", "accuracy_high"]] = intervals
    return Reliability(table, expected_calibration_error(truth, scores, bins), len(truth), size, samples, seed, level)


# Images in a bin below which its accuracy says little.
FEW = 10


# Characters in a line of a panel's title.
LINE = 15


@styled
def draw_roc(curves: Curves, unit: str = "patients") -> ReportFigure:
    """Draw the ROC curve of each class, one panel a class.

    Args:
        curves: from `class_curves`.
        unit: what was resampled, in words, for the caption.
    """
    figure, panels = _panels(curves, "false positive rate", "sensitivity")
    words = []
    for axis, one in zip(panels, curves.of, strict=True):
        axis.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1)
        _draw_curve(axis, one, one.roc, _colour(curves, one), f"AUC {_area(one.roc)}", steps=False)
        x, y = one.roc.decision
        words.append(f"{one.name}: AUC {_area(one.roc)}, sensitivity {y:.2f} at a false positive rate of {x:.2f}")
    caption = (
        "Each class against all others (in brackets: its images): a lower threshold on its probability finds more of the class "
        "(sensitivity) and calls more of the others so, too (false positive rate). AUC is the area below the curve: 1 is perfect, 0.5 is "
        f"guessing. The dot is the decision for the most probable class; it needn't lie on the curve. {_drawn(curves, unit)}"
    )
    data = curves.frame().query("curve == 'roc'").reset_index(drop=True)
    return ReportFigure("roc", "ROC curves", caption, _alt(words, curves), figure, data)


@styled
def draw_precision_recall(curves: Curves, unit: str = "patients") -> ReportFigure:
    """Draw the precision-recall curve of each class, one panel a class.

    Args:
        curves: from `class_curves`.
        unit: what was resampled, in words, for the caption.
    """
    figure, panels = _panels(curves, "recall (sensitivity)", "precision")
    words = []
    for axis, one in zip(panels, curves.of, strict=True):
        axis.axhline(one.prevalence, color=FAINT, linestyle="--", linewidth=1)
        _draw_curve(
            axis, one, one.precision_recall, _colour(curves, one), f"AP {_area(one.precision_recall)}", steps=True
        )
        x, y = one.precision_recall.decision
        decision = "never predicted" if np.isnan(y) else f"precision {y:.2f} at a recall of {x:.2f}"
        words.append(f"{one.name}: AP {_area(one.precision_recall)}, {decision}, guessing {one.prevalence:.2f}")
    caption = (
        "Each class against all others (in brackets: its images): of the images that are called so, how many are (precision), and how "
        "many of the class are found (recall). AP, the average precision, is the area below the curve; guessing reaches the class's share "
        f"of the images. The dot is the decision for the most probable class; it needn't lie on the curve. {_drawn(curves, unit)}"
    )
    data = curves.frame().query("curve == 'precision_recall'").reset_index(drop=True)
    return ReportFigure("precision_recall", "Precision-recall curves", caption, _alt(words, curves), figure, data)


@styled
def draw_reliability(reliability: Reliability, unit: str = "patients") -> ReportFigure:
    """Draw the reliability diagram of the top label, with the number of images of each bin below.

    Args:
        reliability: from `compute_reliability`.
        unit: what was resampled, in words, for the caption.
    """
    table = reliability.table
    figure, (upper, lower) = new_figure(WIDTH, 2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1)
    for few, fill, label in ((False, PRIMARY, f"{FEW} images or more"), (True, PAPER, f"fewer than {FEW} images")):
        part = table[(table["count"] > 0) & ((table["count"] < FEW) == few)]
        reach = np.array([part["accuracy"] - part["accuracy_low"], part["accuracy_high"] - part["accuracy"]])
        upper.errorbar(
            part["confidence"],
            part["accuracy"],
            reach,
            fmt="none",
            ecolor=PRIMARY,
            elinewidth=0.7 if few else 1.4,
            alpha=0.6 if few else 1,
        )
        upper.plot(
            part["confidence"],
            part["accuracy"],
            "o",
            color=PRIMARY,
            markerfacecolor=fill,
            markersize=3.5 if few else 5,
            label=label,
        )
    upper.set(xlim=(0, 1), ylim=(-0.03, 1.03), ylabel="share right")
    upper.set_title(f"expected calibration error {reliability.ece:.3f}")
    figure.legend(loc="outside upper center", ncols=2)
    lower.bar(
        table["low"], table["count"], width=table["high"] - table["low"], align="edge", color=PRIMARY, edgecolor=PAPER
    )
    lower.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    caption = (
        f"{reliability.images} test images of {reliability.groups} {unit}, in {len(table)} bins by the probability of their predicted "
        "class: how many of each bin are right? On the dashed line a probability is what it says; below it the model is too sure of "
        f"itself. Bars hold {100 * reliability.level:g}% of {reliability.samples} resamples of the {unit} (seed {reliability.seed}); where "
        "all or none are right, they are Wilson's intervals. The expected calibration error is the mean distance from the line, weighted "
        "by images."
    )
    words = [
        f"confidence {row.confidence:.2f}: {row.accuracy:.2f} of {row.count} right"
        for row in table[table["count"] > 0].itertuples(index=False)
    ]
    alt = f"Expected calibration error {reliability.ece:.3f}. {'; '.join(words)}"
    return ReportFigure("reliability", "Reliability of the probabilities", caption, alt, figure, table)


def _panels(curves: Curves, x: str, y: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with one empty square panel a curve; a sentence where there is no curve at all."""
    number = len(curves.of)
    if not number:
        figure, (axis,) = new_figure(0.8)
        axis.set_axis_off()
        axis.text(0, 0.5, textwrap.fill("; ".join(curves.remarks), 60), va="center")
        return figure, []
    columns = 2 if number in (1, 2, 4) else 3
    rows = -(-number // columns)
    more_lines = max(_title(one).count("\n") for one in curves.of)
    # Square panels under a title, its area and a gap; the legend and the labels of the axes once.
    figure, axes = new_figure(0.65 + rows * ((WIDTH - 0.5) / columns + 0.2 + 0.13 * more_lines), rows, columns)
    ticks = [0, 0.5, 1]
    for place, axis in enumerate(axes):
        if place >= number:
            axis.remove()
            continue
        axis.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal", xticks=ticks, yticks=ticks)
        axis.set_xticklabels(["0", "0.5", "1"] if place + columns >= number else [])
        axis.set_yticklabels(["0", "0.5", "1"] if place % columns == 0 else [])
    figure.supxlabel(x, fontsize=8)
    figure.supylabel(y, fontsize=8)
    handles = [
        Patch(facecolor=INK, alpha=0.3, label=f"{100 * curves.level:g}% interval"),
        Line2D([], [], color=INK, marker="o", markersize=5, linestyle="none", label="decision"),
        Line2D([], [], color=FAINT, linestyle="--", linewidth=1, label="guessing"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure, axes[:number]


def _draw_curve(axis: Axes, one: OneVersusRest, curve: Curve, colour: str, area: str, steps: bool) -> None:
    axis.fill_between(GRID, curve.low, curve.high, step="pre" if steps else None, color=colour, alpha=0.3, linewidth=0)
    axis.plot(GRID, curve.y, color=colour, drawstyle="steps-pre" if steps else "default")
    axis.plot(*curve.decision, "o", color=INK, markersize=4, clip_on=False)
    axis.set_title(_title(one), pad=13, fontsize=8)
    axis.annotate(area, (0, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points", fontsize=7)


def _title(one: OneVersusRest) -> str:
    return textwrap.fill(f"{one.name} ({one.positives})", LINE)


def _colour(curves: Curves, one: OneVersusRest) -> str:
    return INK if one.name == ALL_MALIGNANT else class_colours(curves.classes)[one.name]


def _area(curve: Curve) -> str:
    low, high = curve.interval
    return f"{curve.area:.2f}" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]")


def _drawn(curves: Curves, unit: str) -> str:
    """Say how many images there are, how the bands were made, and what is missing."""
    text = (
        f"{curves.images} test images of {curves.groups} {unit}; bands and brackets hold {100 * curves.level:g}% of {curves.samples} "
        f"resamples of the {unit} (seed {curves.seed})"
    )
    if curves.of and curves.of[-1].name == ALL_MALIGNANT:
        text += f'; "{ALL_MALIGNANT}" adds up {", ".join(curves.malignant)}'
    return "; ".join([text, *curves.remarks]) + "."


def _alt(words: list[str], curves: Curves) -> str:
    return "; ".join([*words, *curves.remarks])
