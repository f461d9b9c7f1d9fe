"""The picture of the probes: what a model reaches with each part of its input."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.lines import Line2D

from dualrefnet.evaluation.tables import MEASURE_NAMES
from dualrefnet.figures.picture import FAINT, INK, PAPER, PRIMARY, SECONDARY, Picture, new_figure, styled
from dualrefnet.probes.shortcuts import WHOLE, WHOLE_OUTLINED, Shortcuts

# Inches: a line of a label, between two rows, and all that isn't a row. Letters of a line of a label.
LINE, GAP, REST, LETTERS = 0.125, 0.09, 0.95, 27


@styled
def draw_shortcuts(shortcuts: Shortcuts, measure: str = "balanced_accuracy") -> Picture:
    """Draw what the model reaches with each input, with 95% intervals, chance, and what was trained for the input.

    Args:
        shortcuts: from `probe_shortcuts`.
        measure: `balanced_accuracy`, `auc_macro_ovr` or `malignant.auc`.

    Raises:
        ValueError: the measure wasn't taken.
    """
    table = shortcuts.table[shortcuts.table["measure"] == measure]
    if table.empty:
        raise ValueError(f"the probes have no {measure}; they have: {', '.join(shortcuts.table['measure'].unique())}")
    references = table[table["trained"]].set_index("probe")
    drawn = table[~table["trained"]].reset_index(drop=True)
    labels = [textwrap.fill(text, LETTERS) for text in drawn["input"]]
    heights = [LINE * (label.count("\n") + 1) + GAP for label in labels]
    places, below = [], 0.0
    for height, probe in zip(heights, drawn["probe"], strict=True):
        # The photographs with an outline begin a block of their own.
        below += 2 * GAP if probe == WHOLE_OUTLINED else 0.0
        places.append(below + height / 2)
        below += height
    figure, (axis,) = new_figure(below + REST)
    chance = float(drawn["chance"].iloc[0])
    axis.axvline(chance, color=INK, linestyle=":", linewidth=1)
    for place, row in zip(places, drawn.to_dict("records"), strict=True):
        colour = SECONDARY if row["probe"] in (WHOLE, WHOLE_OUTLINED) else PRIMARY
        axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.4)
        axis.plot(row["value"], place, "s" if colour == SECONDARY else "o", color=colour, markersize=4.5)
        if row["trained_probe"]:
            axis.plot(references.loc[row["trained_probe"], "value"], place, "D", color=INK, markerfacecolor="none", markersize=4.5)
        if row["probe"] == WHOLE_OUTLINED:
            axis.axhline(place - heights[drawn["probe"].tolist().index(WHOLE_OUTLINED)] / 2 - GAP, color=FAINT, linewidth=0.8)
    axis.set_ylim(below, 0)
    axis.set_yticks(places, labels)
    axis.tick_params(axis="y", length=0, labelsize=7)
    axis.grid(visible=False, axis="y")
    axis.locator_params(axis="x", nbins=5)
    numbers = axis.secondary_yaxis("right")
    numbers.set_yticks(places, [f"{value:.2f}" for value in drawn["value"]])
    numbers.tick_params(length=0, labelsize=7)
    numbers.spines["right"].set_visible(False)
    name = MEASURE_NAMES[measure.replace("malignant.", "malignant_")]
    axis.set_xlabel(name)
    handles = [
        Line2D([], [], linestyle="", marker="s", color=SECONDARY, markersize=4.5, label="whole input"),
        Line2D([], [], linestyle="", marker="o", color=PRIMARY, markersize=4.5, label="changed input"),
        Line2D([], [], linestyle=":", color=INK, linewidth=1, label="guessing"),
    ]
    if len(references):
        handles.append(Line2D([], [], linestyle="", marker="D", color=INK, markerfacecolor=PAPER, markersize=4.5, label="trained for it"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handletextpad=0.3, columnspacing=1)
    caption = (
        f"What the trained model reaches on {drawn['images'].iloc[0]:,} test photographs of {drawn['patients'].iloc[0]:,} "
        f"{shortcuts.unit}s when parts of its input are taken away or are another {shortcuts.unit}'s (mean of {shortcuts.permutations} "
        f"exchanges); lines: 95% intervals from {shortcuts.samples:,} resamples of the {shortcuts.unit}s (seed {shortcuts.seed}). What "
        "lies far right of guessing without the lesion came from somewhere else."
    )
    if len(references):
        caption += " Hollow diamonds: a logistic regression that was trained on that input alone."
    if (drawn["probe"] == WHOLE_OUTLINED).any():
        outlined = drawn[drawn["probe"] == WHOLE_OUTLINED].iloc[0]
        caption += f" Below the line: the {outlined['images']:,} photographs with an outline of the lesion."
    words = [_words(row, references) for row in drawn.to_dict("records")]
    alt = f"{name}; guessing {chance:.2f}. {'; '.join(words)}"
    columns = ["probe", "input", "trained", "measure", "chance", "value", "low", "high", "lead", "lead_low", "lead_high", "images"]
    stem = "shortcuts" if measure == "balanced_accuracy" else f"shortcuts_{measure.replace('.', '_')}"
    return Picture(stem, "What the score leans on", caption, alt, figure, table[columns].reset_index(drop=True))


def _words(row: Mapping[Any, Any], references: pd.DataFrame) -> str:
    text = f"{row['input']}: {row['value']:.2f}"
    if not pd.isna(row["low"]):
        text += f" [{row['low']:.2f}, {row['high']:.2f}]"
    if row["trained_probe"]:
        text += f", trained for it {references.loc[row['trained_probe'], 'value']:.2f}"
    return text
