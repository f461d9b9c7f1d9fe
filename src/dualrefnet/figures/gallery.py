"""The gallery: photographs with what the model says of them, where it looked, and which answers of the form counted."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from dualrefnet.explain.gallery import RIGHT, ShownCase
from dualrefnet.explain.players import MISSING
from dualrefnet.figures.gradcam import overlay
from dualrefnet.figures.picture import FAINT, INK, PRIMARY, SECONDARY, WIDTH, Picture, file_stem, new_figure, shortened, styled

# Inches a case is high, and letters in a line beside the photographs.
ROW, LETTERS = 1.3, 34
MOST_CLASSES = 3
# Letters of a class's name at most: in front of its bar, and above the heat. Share of the column's width that such a letter takes.
NAME, HEAT_NAME, LETTER = 12, 9, 0.042


@styled
def draw_gallery(cases: Sequence[ShownCase], label: str, name: str) -> Picture:
    """Draw the cases of one class, one a row: photograph, heat of the predicted class, and what was said.

    Args:
        cases: of the class, in the order in which they are drawn; at least one.
        label: the class.
        name: what it stands for, or nothing.
    """
    figure, axes = new_figure(ROW * len(cases), len(cases), 3, WIDTH, width_ratios=(1.0, 1.0, 1.75))
    letters = max(len(shortened(name, NAME)) for case in cases for name, _ in _top(case))
    for case, (*pictures, words) in zip(cases, zip(*[iter(axes)] * 3, strict=True), strict=True):
        shown = (case.picture, overlay(case.picture, case.heats[case.chosen.predicted]))
        titles = (case.chosen.kind, f"heat for {shortened(case.chosen.predicted, HEAT_NAME)}")
        for axis, picture, title in zip(pictures, shown, titles, strict=True):
            axis.imshow(picture, interpolation="none")
            axis.set_title(title, fontsize=7, fontweight="normal")
            axis.set_axis_off()
        _say(words, case, max(0.24, 0.03 + LETTER * letters))
    title = f"Photographs of {label}" + (f" ({name})" if name else "")
    right = sum(case.chosen.kind == RIGHT for case in cases)
    caption = (
        f"Test photographs of {label} as the model sees them: {right} that it was surest of and right, {len(cases) - right} that it was "
        "surest of and wrong, a patient once each."
    )
    alt = "; ".join(f"{case.chosen.kind}: called {case.chosen.predicted} with {_top(case)[0][1]:.0%}" for case in cases)
    return Picture(f"gallery_{file_stem(label)}", title, caption, alt, figure, gallery_table(cases))


def gallery_table(cases: Sequence[ShownCase]) -> pd.DataFrame:
    """Return one row a case: image_id, label, predicted, kind, prob_<CLASS>..., and the answers that counted."""
    rows = []
    for case in cases:
        chosen = case.chosen
        row: dict[str, object] = {"image_id": chosen.image_id, "label": chosen.label, "predicted": chosen.predicted, "kind": chosen.kind}
        row |= {f"prob_{name}": value for name, value in chosen.probabilities.items()}
        rows.append(row | {"answers": "; ".join(f"{name} = {answer}: {value:+.3f}" for name, answer, value in case.answers)})
    return pd.DataFrame(rows)


def _say(axis: Axes, case: ShownCase, left: float) -> None:
    """Write a case's probabilities, whose bars begin at `left`, and answers into an empty axis, from the top down, in inches."""
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(ROW, 0)
    place, longest = 0.1, 0.74 - left
    for name, value in _top(case):
        predicted, right = name == case.chosen.predicted, name == case.chosen.label
        colour = (PRIMARY if right else SECONDARY) if predicted else FAINT
        axis.barh(place, longest * value, 0.11, left=left, color=colour)
        axis.text(0.0, place, shortened(name, NAME), va="center", fontsize=7, fontweight="bold" if predicted else "normal")
        # The share stands behind its bar, and says which class is the true one.
        axis.text(left + 0.02 + longest * value, place, f"{value:.0%}" + (" true" if right else ""), va="center", fontsize=7, color=INK)
        place += 0.15
    place += 0.02
    for name, answer, value in case.answers:
        said = f"fields missing: {answer}" if name == MISSING else f"{name} = {answer}"
        sign = "−" if value < 0 else "+"
        lines = textwrap.wrap(f"{sign}{abs(100 * value):.0f}  {said}", LETTERS, subsequent_indent="     ")
        for line in lines:
            axis.text(0.0, place, line, va="center", fontsize=7)
            place += 0.115


def _top(case: ShownCase) -> list[tuple[str, float]]:
    """Return the likeliest classes and the true one, the likeliest first."""
    ordered = sorted(case.chosen.probabilities.items(), key=lambda item: -item[1])
    top = ordered[:MOST_CLASSES]
    if case.chosen.label not in dict(top):
        top[-1] = (case.chosen.label, case.chosen.probabilities[case.chosen.label])
    return top
