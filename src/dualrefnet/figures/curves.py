"""Pictures of what the probabilities are worth: ROC and precision-recall curves, and reliability."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dualrefnet.evaluation.curves import ALL_MALIGNANT, GRID, Curve, Curves, OneVersusRest
from dualrefnet.evaluation.reliability import Reliability
from dualrefnet.figures.picture import FAINT, INK, PAPER, PRIMARY, WIDTH, Picture, class_colours, new_figure, styled

# Images in a bin below which its accuracy says little.
FEW = 10
# Characters in a line of a panel's title.
LINE = 15


@styled
def draw_roc(curves: Curves, unit: str = "patients") -> Picture:
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
    return Picture("roc", "ROC curves", caption, _alt(words, curves), figure, data)


@styled
def draw_precision_recall(curves: Curves, unit: str = "patients") -> Picture:
    """Draw the precision-recall curve of each class, one panel a class.

    Args:
        curves: from `class_curves`.
        unit: what was resampled, in words, for the caption.
    """
    figure, panels = _panels(curves, "recall (sensitivity)", "precision")
    words = []
    for axis, one in zip(panels, curves.of, strict=True):
        axis.axhline(one.prevalence, color=FAINT, linestyle="--", linewidth=1)
        _draw_curve(axis, one, one.precision_recall, _colour(curves, one), f"AP {_area(one.precision_recall)}", steps=True)
        x, y = one.precision_recall.decision
        decision = "never predicted" if np.isnan(y) else f"precision {y:.2f} at a recall of {x:.2f}"
        words.append(f"{one.name}: AP {_area(one.precision_recall)}, {decision}, guessing {one.prevalence:.2f}")
    caption = (
        "Each class against all others (in brackets: its images): of the images that are called so, how many are (precision), and how "
        "many of the class are found (recall). AP, the average precision, is the area below the curve; guessing reaches the class's share "
        f"of the images. The dot is the decision for the most probable class; it needn't lie on the curve. {_drawn(curves, unit)}"
    )
    data = curves.frame().query("curve == 'precision_recall'").reset_index(drop=True)
    return Picture("precision_recall", "Precision-recall curves", caption, _alt(words, curves), figure, data)


@styled
def draw_reliability(reliability: Reliability, unit: str = "patients") -> Picture:
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
            part["confidence"], part["accuracy"], reach, fmt="none", ecolor=PRIMARY, elinewidth=0.7 if few else 1.4, alpha=0.6 if few else 1
        )
        upper.plot(
            part["confidence"], part["accuracy"], "o", color=PRIMARY, markerfacecolor=fill, markersize=3.5 if few else 5, label=label
        )
    upper.set(xlim=(0, 1), ylim=(-0.03, 1.03), ylabel="share right")
    upper.set_title(f"expected calibration error {reliability.ece:.3f}")
    figure.legend(loc="outside upper center", ncols=2)
    lower.bar(table["low"], table["count"], width=table["high"] - table["low"], align="edge", color=PRIMARY, edgecolor=PAPER)
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
    return Picture("reliability", "Reliability of the probabilities", caption, alt, figure, table)


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
