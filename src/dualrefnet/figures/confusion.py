"""Pictures of the confusion matrix: how many images, and which share of each true class."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.figures.picture import AMOUNTS, INK, PAPER, WIDTH, Picture, new_figure, styled

# Characters in a line of a class's name.
LINE = 15
# Characters that fit side by side below all columns; beyond them, names stand upright.
LEVEL = 40


@styled
def draw_confusion(metrics: Mapping[str, Any], shares: bool = False, malignant: Sequence[str] = (), unit: str = "patients") -> Picture:
    """Draw the confusion matrix: rows the truth, columns the prediction.

    Args:
        metrics: from `compute_metrics`, with or without intervals; the content of metrics.json.
        shares: of the true class (each row sums to 1) instead of numbers of images.
        malignant: the classes that are cancer, for the caption.
        unit: what images of one group share, in words, for the caption.

    Returns:
        `confusion_counts` or `confusion_shares`; `data` has one row a cell: `true`, `predicted`, `images`, `share` (NaN for a
        class without images).
    """
    classes = list(metrics["per_class"])
    counts = np.array(metrics["confusion_matrix"])
    support, given = counts.sum(axis=1), counts.sum(axis=0)
    portion = np.divide(counts, support[:, None], out=np.full(counts.shape, np.nan), where=support[:, None] > 0)
    cells = portion if shares else counts.astype(float)
    top = 1 if shares else max(1, int(counts.max()))
    below = [textwrap.fill(name, LINE) for name in classes]
    beside = [textwrap.fill(f"{name} ({number})", LINE) for name, number in zip(classes, support, strict=True)]
    upright = len(classes) * max(len(line) for name in below for line in name.splitlines()) > LEVEL
    figure, (axis,) = new_figure(WIDTH * min(0.35 + 0.12 * len(classes), 0.92) + (0.7 if upright else 0))
    axis.pcolormesh(np.ma.masked_invalid(cells), cmap=AMOUNTS, vmin=0, vmax=top, edgecolor=PAPER, linewidth=1)
    scale = matplotlib.colormaps[AMOUNTS]
    for (row, column), value in np.ndenumerate(cells):
        text = "–" if np.isnan(value) else f"{value:.2f}" if shares else f"{value:.0f}"
        colour = INK if np.isnan(value) else _on(np.asarray(scale(value / top)))
        # Five digits must fit a cell of an eighth of the width.
        axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=7 if len(classes) > 6 else 8)
    places = np.arange(len(classes)) + 0.5
    axis.set_xticks(places, below, rotation=90 if upright else 0)
    axis.set_yticks(places, beside)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class (images)")
    axis.invert_yaxis()
    axis.grid(False)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)

    data = pd.DataFrame(
        {
            "true": np.repeat(classes, len(classes)),
            "predicted": np.tile(classes, len(classes)),
            "images": counts.ravel(),
            "share": portion.ravel(),
        }
    )
    name, title = ("confusion_shares", "Shares of each true class") if shares else ("confusion_counts", "Confusion matrix")
    present = support > 0
    words = [
        f"{classes[index]}: {counts[index, index]} of {support[index]} right{_mistake(classes, counts[index], int(index))}"
        for index in np.flatnonzero(present)
    ]
    caption = _caption(metrics, classes, malignant, shares, unit, [np.array(classes)[~present], np.array(classes)[given == 0]])
    return Picture(name, title, caption, "; ".join(words), figure, data)


def _caption(
    metrics: Mapping[str, Any], classes: list[str], malignant: Sequence[str], shares: bool, unit: str, missing: list[np.ndarray]
) -> str:
    whose = f" of {metrics['bootstrap']['groups']} {unit}" if "bootstrap" in metrics else ""
    cell = (
        "each cell is the share of the true class that got this answer, so every row sums to 1"
        if shares
        else "each cell is a number of images"
    )
    sentences = [
        f"{metrics['support']} test images{whose}. Rows are the true class with its number of images, columns the predicted one; {cell}, "
        "and what is right lies on the diagonal."
    ]
    if malignant:
        sentences.append(f"Malignant: {', '.join(name for name in classes if name in malignant)}.")
    notes = [f"{what}: {', '.join(names)}" for what, names in zip(("No test image", "Never predicted"), missing, strict=True) if len(names)]
    if notes:
        sentences.append("; ".join(notes) + ".")
    return " ".join(sentences)


def _mistake(classes: list[str], row: np.ndarray, right: int) -> str:
    """Name the most frequent wrong answer."""
    wrong = np.where(np.arange(len(row)) == right, 0, row)
    return f", most often taken for {classes[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""


def _on(colour: NDArray[np.float64]) -> str:
    """Return black or white, whichever is read better on a colour, in both themes of the page."""
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3])
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if luminance > 0.179 else "#ffffff"
