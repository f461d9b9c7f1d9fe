"""ROC, precision-recall and reliability curves with bands over patients, computed and drawn.

Bands are pointwise percentile intervals. Conventions, the same for the test set and for every resample:

- images with the same score share a threshold, so the order of the rows changes nothing;
- ROC: the sensitivity at a false positive rate is the highest that the curve through all thresholds has there; between
  two thresholds the curve is straight, so its area is the AUC of `metrics` (ties count one half);
- precision-recall: the precision at a recall is that of the highest threshold whose recall is at least as high (at
  recall 0: above 0). This is a step function, and its area is the average precision (AP), the sum of (R_n - R_n-1) P_n.

Sources: Fawcett 2006; Davis and Goadrich 2006 (why precision must not be interpolated in a straight line).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dualrefnet.display.figure import FAINT, INK, PAPER, PRIMARY, WIDTH, ReportFigure, class_colours, new_figure, styled
from dualrefnet.display.format import interval
from dualrefnet.evaluation.bootstrap import NAN, Bootstrap, Estimate, Floats, divide
from dualrefnet.evaluation.metrics import (
    DEFAULT_BINS,
    CalibrationErrors,
    Ranking,
    check_classes,
    check_predictions,
    equal_width_bins,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["roc", "precision_recall"]
KINDS: tuple[Kind, Kind] = ("roc", "precision_recall")

# Curves are given at a false positive rate, or a recall, of 0, 0.01, ..., 1.
STEPS = 100
_HUNDREDTHS = np.arange(STEPS + 1.0)
GRID = _HUNDREDTHS / STEPS

# The name of the curves of malignant versus benign, beside those of the classes.
ALL_MALIGNANT = "all malignant"

# Images in a bin below which its accuracy says little.
FEW = 10


@dataclass(frozen=True)
class Curve:
    """One curve over `GRID`, (101,), with its band; `decision` (x, y) of the most probable class needn't lie on it."""

    y: Floats
    low: Floats
    high: Floats
    area: Estimate
    decision: tuple[float, float]


@dataclass(frozen=True)
class OneVersusRest:
    """The curves of one class versus the rest, or of `ALL_MALIGNANT`."""

    name: str
    positives: int  # number of its images
    prevalence: float  # their share, which is the precision of guessing
    roc: Curve
    precision_recall: Curve
    samples_without: int  # resamples that were skipped since the class, or everything else, was missing


@dataclass(frozen=True)
class Curves:
    """The curves of a test set, in the order of the classes, malignant versus benign last."""

    of: tuple[OneVersusRest, ...]
    classes: tuple[str, ...]  # all of them, with curves or without
    malignant: tuple[str, ...]
    bootstrap: Bootstrap
    notes: tuple[str, ...]  # which curves are missing, and which bands are too narrow

    def frame(self, kind: Kind) -> pd.DataFrame:
        """Return the curves of one kind as a tidy table; `part` is `curve`, `area`, `decision` or `chance`."""
        rows: list[tuple[object, ...]] = []
        for one in self.of:
            curve: Curve = getattr(one, kind)
            parts = [("curve", *point) for point in zip(GRID, curve.y, curve.low, curve.high, strict=True)]
            parts.append(("area", NAN, curve.area.value, curve.area.low, curve.area.high))
            parts.append(("decision", *curve.decision, NAN, NAN))
            if kind == "precision_recall":
                parts.append(("chance", NAN, one.prevalence, NAN, NAN))
            rows += [(one.name, kind, *part) for part in parts]
        table = pd.DataFrame(rows, columns=["class", "curve", "part", "x", "y", "low", "high"])
        return table.astype({"x": float, "y": float, "low": float, "high": float})


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: a row of `table` for each bin of equal width, and the expected calibration error."""

    table: pd.DataFrame
    ece: float
    bootstrap: Bootstrap


def curve_statistics(ranking: Ranking, weights: Floats) -> dict[str, Floats]:
    """Return `roc`, `precision_recall` (S, 101), `auc`, `ap` (S,); NaN where a resample lacks either target value."""
    true, false = ranking.counts(weights)
    positives, negatives = true[:, -1], false[:, -1]
    result: dict[str, Floats] = {kind: np.full((len(weights), STEPS + 1), NAN) for kind in KINDS}
    result |= {"auc": ranking.auc(weights), "ap": np.full(len(weights), NAN)}
    for row in np.flatnonzero((positives > 0) & (negatives > 0)):
        precision = true[row, 1:] / np.maximum(true[row, 1:] + false[row, 1:], 1)
        result["roc"][row] = _highest(false[row], true[row], _HUNDREDTHS * negatives[row]) / positives[row]
        reached = np.searchsorted(true[row, 1:] * STEPS, np.maximum(_HUNDREDTHS * positives[row], 1))
        result["precision_recall"][row] = precision[reached]
        result["ap"][row] = (np.diff(true[row]) * precision).sum() / positives[row]
    return result


def class_curves(
    labels: ArrayLike,
    probabilities: ArrayLike,
    bootstrap: Bootstrap,
    classes: Sequence[str],
    malignant: Sequence[str] = (),
) -> Curves:
    """Compute ROC and precision-recall curves with pointwise bands; `notes` names what has no curve."""
    check_classes(classes, malignant)
    target, scores = check_predictions(labels, probabilities, len(classes))
    predicted = scores.argmax(axis=1)
    # Target, score and decision of each binary problem.
    problems = {name: (target == index, scores[:, index], predicted == index) for index, name in enumerate(classes)}
    if malignant:
        cancer = np.isin(classes, malignant)
        problems[ALL_MALIGNANT] = (cancer[target], scores[:, cancer].sum(axis=1), cancer[predicted])
    problems = {name: problem for name, problem in problems.items() if 0 < problem[0].sum() < len(target)}
    rankings = {name: Ranking.of(score, positive, bootstrap.codes) for name, (positive, score, _) in problems.items()}

    measures = {name: partial(curve_statistics, ranking) for name, ranking in rankings.items()}
    point = {name: measure(bootstrap.unit_weights) for name, measure in measures.items()}
    resampled = bootstrap.resample_each(measures)

    def curve(name: str, kind: str, area: str, decision: tuple[float, float]) -> Curve:
        defined = resampled[name][kind][~np.isnan(resampled[name][area])]
        tails = [(1 - bootstrap.level) / 2, (1 + bootstrap.level) / 2]
        low, high = np.quantile(defined, tails, axis=0) if len(defined) else np.full((2, STEPS + 1), NAN)
        estimate = bootstrap.estimate(float(point[name][area][0]), resampled[name][area])
        return Curve(point[name][kind][0], low, high, estimate, decision)

    curves = []
    for name, (positive, _, decided) in problems.items():
        hits, positives, called = int((positive & decided).sum()), int(positive.sum()), int(decided.sum())
        recall = hits / positives
        roc = curve(name, "roc", "auc", ((called - hits) / (len(target) - positives), recall))
        precision_recall = curve(name, "precision_recall", "ap", (recall, hits / called if called else NAN))
        without = int(np.isnan(resampled[name]["auc"]).sum())
        curves.append(OneVersusRest(name, positives, positives / len(target), roc, precision_recall, without))
    absent = [name for index, name in enumerate(classes) if not (target == index).any()]
    notes = [f"no curve of {', '.join(absent)}, as the test set has no such image"] if absent else []
    if len(absent) == len(classes) - 1:
        notes.append("no curve of the one class that the test set holds")
    if malignant and ALL_MALIGNANT not in problems:
        notes.append("no curve of malignant versus benign, as one of the two never occurs")
    skipped = [f"{one.name} ({one.samples_without})" for one in curves if one.samples_without]
    if skipped:
        notes.append(f"missing from some resamples, so that the bands are too narrow: {', '.join(skipped)}")
    return Curves(tuple(curves), tuple(classes), tuple(malignant), bootstrap, tuple(notes))


def compute_reliability(
    labels: ArrayLike, probabilities: ArrayLike, bootstrap: Bootstrap, bins: int = DEFAULT_BINS
) -> Reliability:
    """Compute the reliability of the top label, with an interval of each bin's accuracy over patients.

    A bin with the images of a single patient, some of them right, has no interval: all resamples would agree.
    """
    target, scores = check_predictions(labels, probabilities)
    errors, confidence = CalibrationErrors(target, scores, bootstrap.codes, bootstrap.groups, bins), scores.max(axis=1)
    in_bin = np.eye(bins, dtype=bool)[equal_width_bins(confidence, bins)]
    right = np.broadcast_to((scores.argmax(axis=1) == target)[:, None], in_bin.shape)
    estimates, count, patients = bootstrap.ratios(right, in_bin), in_bin.sum(axis=0), (errors.counts > 0).sum(axis=0)
    edges, accuracy = np.linspace(0, 1, bins + 1), np.array([one.value for one in estimates])
    single = (patients == 1) & ~np.isin(accuracy, [0, 1])
    table = pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "confidence": divide(confidence @ in_bin, count),
            "accuracy": accuracy,
            "count": count,
            "patients": patients,
            "accuracy_low": np.where(single, NAN, [one.low for one in estimates]),
            "accuracy_high": np.where(single, NAN, [one.high for one in estimates]),
        }
    )
    return Reliability(table, float(errors.ece(bootstrap.unit_weights)[0]), bootstrap)


@styled
def draw_curves(curves: Curves, kind: Kind, unit: str = "patients") -> ReportFigure:
    """Draw the ROC or precision-recall curve of each class, one panel a class; `unit`: what was resampled, plural."""
    if kind == "roc":
        title, axes, area = "ROC curves", ("false positive rate", "sensitivity"), "AUC"
        caption = (
            "Each class against all others (in brackets: its images). AUC is the area under the curve: 1 is perfect, "
            "0.5 is guessing."
        )
    else:
        title, axes, area = "Precision-recall curves", ("recall (sensitivity)", "precision"), "AP"
        caption = (
            "Each class against all others (in brackets: its images). AP, the average precision, is the area under the "
            "curve; guessing reaches the prevalence of the class."
        )
    figure, panels = _panels(curves, *axes)
    parts = []
    for axis, one in zip(panels, curves.of, strict=True):
        curve: Curve = getattr(one, kind)
        steps = kind == "precision_recall"
        axis.plot([0, 1], [one.prevalence] * 2 if steps else [0, 1], color=FAINT, linestyle="--", linewidth=1)
        colour = INK if one.name == ALL_MALIGNANT else class_colours(curves.classes)[one.name]
        axis.fill_between(
            GRID, curve.low, curve.high, step="pre" if steps else None, color=colour, alpha=0.3, linewidth=0
        )
        axis.plot(GRID, curve.y, color=colour, drawstyle="steps-pre" if steps else "default")
        axis.plot(*curve.decision, "o", color=INK, markersize=4, clip_on=False)
        axis.set_title(_title(one), pad=13, fontsize=8)
        value = f"{area} {curve.area.value:.2f} {interval(curve.area.low, curve.area.high)}".strip()
        axis.annotate(value, (0, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points", fontsize=7)
        x, y = curve.decision
        decision = "never predicted" if np.isnan(y) else f"{axes[1]} {y:.2f} at a {axes[0]} of {x:.2f}"
        parts.append(f"{one.name}: {value}, {decision}")
    caption += f" The dot is the decision for the most probable class. {curves.bootstrap.describe(unit)}"
    if curves.of and curves.of[-1].name == ALL_MALIGNANT:
        caption += f'; "{ALL_MALIGNANT}" is {", ".join(curves.malignant)} together'
    alt = "; ".join([*parts, *curves.notes])
    return ReportFigure(kind, title, "; ".join([caption, *curves.notes]) + ".", alt, figure, curves.frame(kind))


@styled
def draw_reliability(reliability: Reliability, unit: str = "patients") -> ReportFigure:
    """Draw the reliability diagram, with the number of images of each bin below; `unit`: what was resampled, plural."""
    table = reliability.table
    figure, (upper, lower) = new_figure(WIDTH, 2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1)
    for few, fill, label in ((False, PRIMARY, f"{FEW} images or more"), (True, PAPER, f"fewer than {FEW} images")):
        part = table[(table["count"] > 0) & ((table["count"] < FEW) == few)]
        point = part["confidence"], part["accuracy"]
        bounds = np.array([part["accuracy"] - part["accuracy_low"], part["accuracy_high"] - part["accuracy"]])
        line, alpha, size = (0.7, 0.6, 3.5) if few else (1.4, 1, 5)
        upper.errorbar(*point, bounds, fmt="none", ecolor=PRIMARY, elinewidth=line, alpha=alpha)
        upper.plot(*point, "o", color=PRIMARY, markerfacecolor=fill, markersize=size, label=label)
    upper.set(xlim=(0, 1), ylim=(-0.03, 1.03), ylabel="accuracy")
    upper.set_title(f"expected calibration error {reliability.ece:.3f}")
    figure.legend(loc="outside upper center", ncols=2)
    width = table["high"] - table["low"]
    lower.bar(table["low"], table["count"], width=width, align="edge", color=PRIMARY, edgecolor=PAPER)
    lower.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    caption = (
        f"Accuracy over confidence in {len(table)} bins; below the dashed line the model is overconfident. The "
        "expected calibration error is the mean distance from the line, weighted by images. "
        f"{reliability.bootstrap.describe(unit)}."
    )
    bins = [
        f"confidence {row.confidence:.2f}: accuracy {row.accuracy:.2f} of {row.count}"
        for row in table[table["count"] > 0].itertuples(index=False)
    ]
    alt = f"Expected calibration error {reliability.ece:.3f}. {'; '.join(bins)}"
    return ReportFigure("reliability", "Reliability diagram", caption, alt, figure, table)


def _highest(x: Floats, y: Floats, wanted: Floats) -> Floats:
    """Return the upper end of the curve through (x, y), both ascending counts, where x is `wanted` / STEPS."""
    reached = np.searchsorted(x * STEPS, wanted, side="right") - 1
    after = np.minimum(reached + 1, len(x) - 1)
    # At the last point there is nothing to go on to.
    fraction = (wanted / STEPS - x[reached]) / np.maximum(x[after] - x[reached], 1)
    return np.asarray(y[reached] + fraction * (y[after] - y[reached]))


def _panels(curves: Curves, x: str, y: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with one empty square panel a curve; a sentence where there is no curve at all."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    number = len(curves.of)
    if not number:
        figure, (axis,) = new_figure(0.8)
        axis.set_axis_off()
        axis.text(0, 0.5, textwrap.fill("; ".join(curves.notes), 60), va="center")
        return figure, []
    columns = 2 if number in (1, 2, 4) else 3
    rows = -(-number // columns)
    more_lines = max(_title(one).count("\n") for one in curves.of)
    # Square panels under a title, its area and a gap; the legend and the labels of the axes once.
    figure, axes = new_figure(0.65 + rows * ((WIDTH - 0.5) / columns + 0.2 + 0.13 * more_lines), rows, columns)
    ticks, names = [0, 0.5, 1], ["0", "0.5", "1"]
    for place, axis in enumerate(axes[:number]):
        axis.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal", xticks=ticks, yticks=ticks)
        axis.set_xticklabels(names if place + columns >= number else [])
        axis.set_yticklabels(names if place % columns == 0 else [])
    for axis in axes[number:]:
        axis.remove()
    figure.supxlabel(x, fontsize=8)
    figure.supylabel(y, fontsize=8)
    handles = [
        Patch(facecolor=INK, alpha=0.3, label=f"{100 * curves.bootstrap.level:g}% interval"),
        Line2D([], [], color=INK, marker="o", markersize=5, linestyle="none", label="decision"),
        Line2D([], [], color=FAINT, linestyle="--", linewidth=1, label="guessing"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure, axes[:number]


def _title(one: OneVersusRest) -> str:
    return textwrap.fill(f"{one.name} ({one.positives})", 15)
