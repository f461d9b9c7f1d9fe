"""Photographs that one system of a suite gets right and another wrong, with what both said."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.figures.picture import WIDTH, Picture, new_figure, styled

COLUMNS, LETTERS = 3, 21
# Inches: a photograph, a line above it, and what lies between two rows.
PHOTOGRAPH, LINE, GAP = 1.27, 0.118, 0.12


@styled
def draw_cases(
    cases: pd.DataFrame, photographs: Mapping[str, NDArray[np.uint8]], names: tuple[str, str], first_right: bool, name: str
) -> Picture:
    """Draw cases that one system gets right and the other wrong: each photograph below what was said of it.

    Args:
        cases: `image_id`, `label`, and of both systems (`_a`, `_b`) `predicted`, `p_predicted` and `p_true`, the probabilities of
            the predicted and of the true class; in the order in which they are drawn, at least one.
        photographs: image id -> (S, S, 3).
        names: of the two systems.
        first_right: whether it is the first system that is right, or the second.
        name: of the picture's files.
    """
    records = cases.to_dict("records")
    words = [_words(record, names) for record in records]
    rows = -(-len(records) // COLUMNS)
    lines = [max(len(said) for said in words[COLUMNS * row : COLUMNS * (row + 1)]) for row in range(rows)]
    height = rows * (PHOTOGRAPH + GAP) + LINE * sum(lines)
    figure, axes = new_figure(height, rows, COLUMNS, WIDTH)
    for axis in axes:
        axis.set_axis_off()
    for axis, record, lines_above in zip(axes, records, words, strict=False):
        axis.imshow(photographs[record["image_id"]], interpolation="none")
        # The words stand on the photograph, also where the row has room to spare.
        axis.set_anchor("N")
        axis.set_title("\n".join(lines_above), fontsize=7, fontweight="normal", pad=3)
    winner, loser = names if first_right else names[::-1]
    shown = "the photograph" if len(records) == 1 else f"the {len(records)} photographs"
    caption = (
        f"Shown: {shown} right with {winner} and wrong with {loser} on whose true class their probabilities differ most, classes in "
        "turn, each patient once: chosen by numbers, not by looks. Above each, prepared as the models read it: the true class, and what "
        "each system said with which probability; where it is wrong, also the probability that it gave the true class."
    )
    said = [[f"{which} says {', '.join(_answers(record, end))}" for which, end in zip(names, "ab", strict=True)] for record in records]
    alt = "; ".join(f"true {record['label']}: {', '.join(both)}" for record, both in zip(records, said, strict=True))
    return Picture(name, f"Right with {winner}, wrong with {loser}", caption, alt, figure, _table(records, names))


def _words(record: Mapping[Any, Any], names: tuple[str, str]) -> list[str]:
    """Return the lines above a photograph."""
    lines = textwrap.wrap(f"true: {record['label']}", LETTERS)
    for which, end in zip(names, "ab", strict=True):
        # A line doesn't end between a class and its probability, unless the two are too long for one.
        answers = [part if len(part) >= LETTERS else part.replace(" ", "\N{NO-BREAK SPACE}") for part in _answers(record, end)]
        lines += textwrap.wrap(f"{which}: {', '.join(answers)}", LETTERS)
    return lines


def _answers(record: Mapping[Any, Any], end: str) -> list[str]:
    """Return the predicted class with its probability, and if that is wrong the true one with its own."""
    said, label = record[f"predicted_{end}"], record["label"]
    answer = f"{said} {record[f'p_predicted_{end}']:.0%}"
    return [answer] if said == label else [answer, f"{label} {record[f'p_true_{end}']:.0%}"]


def _table(records: list[dict[Any, Any]], names: tuple[str, str]) -> pd.DataFrame:
    """Return one row a photograph and system."""
    return pd.DataFrame([
        {
            "image_id": record["image_id"], "label": record["label"], "system": which, "predicted": record[f"predicted_{end}"],
            "probability": record[f"p_predicted_{end}"], "probability_of_true_class": record[f"p_true_{end}"],
        }
        for record in records
        for which, end in zip(names, "ab", strict=True)
    ])  # fmt: skip
