"""The gallery: photographs with what the model says of them, where it looked, and which answers of the form counted."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from dualrefnet.explain.gallery import RIGHT, ShownCase
from dualrefnet.figures.gradcam import overlay
from dualrefnet.figures.picture import FAINT, INK, PRIMARY, SECONDARY, WIDTH, Picture, new_figure, styled

# Inches a case is high, and letters in a line beside the photographs.
ROW, LETTERS = 1.42, 31
MOST_CLASSES = 3


@styled
def draw_gallery(cases: Sequence[ShownCase], label: str, name: str) -> Picture:
    """Draw the cases of one class, one a row: photograph, heat of the predicted class, and what was said.

    Args:
        cases: of the class, in the order in which they are drawn; at least one.
        label: the class.
        name: what it stands for, or nothing.
    """
    figure, axes = new_figure(ROW * len(cases), len(cases), 3, WIDTH, width_ratios=(1.0, 1.0, 1.75))
    for case, (*pictures, words) in zip(cases, zip(*[iter(axes)] * 3, strict=True), strict=True):
        shown = (case.picture, overlay(case.picture, case.heats[case.chosen.predicted]))
        for axis, picture, title in zip(pictures, shown, (case.chosen.kind, f"heat for {case.chosen.predicted}"), strict=True):
            axis.imshow(picture, interpolation="none")
            axis.set_title(title, fontsize=7, fontweight="normal")
            axis.set_axis_off()
        _say(words, case)
    title = f"Photographs of {label}" + (f" ({name})" if name else "")
    right = sum(case.chosen.kind == RIGHT for case in cases)
    caption = (
        f"Test photographs of {label}, as the model sees them: those that it was surest of and right ({right}), and those that "
        f"it was surest of and wrong ({len(cases) - right}); a patient once each. Beside them the places that speak for the predicted class (Grad-CAM; the "
        "brighter, the more) and the highest probabilities."
    )
    if any(case.answers for case in cases):
        caption += (
            " Below: the answers of the form that moved the predicted class's probability most, in percentage points (SHAP, with the "
            "photograph kept)."
        )
    alt = "; ".join(f"{case.chosen.kind}: called {case.chosen.predicted} with {_top(case)[0][1]:.0%}" for case in cases)
    return Picture(f"gallery_{label}", title, caption, alt, figure, gallery_table(cases))


def gallery_table(cases: Sequence[ShownCase]) -> pd.DataFrame:
    """Return one row a case: image_id, label, predicted, kind, prob_<CLASS>..., and the answers that counted."""
    rows = []
    for case in cases:
        chosen = case.chosen
        row: dict[str, object] = {"image_id": chosen.image_id, "label": chosen.label, "predicted": chosen.predicted, "kind": chosen.kind}
        row |= {f"prob_{name}": value for name, value in chosen.probabilities.items()}
        rows.append(row | {"answers": "; ".join(f"{name} = {answer}: {value:+.3f}" for name, answer, value in case.answers)})
    return pd.DataFrame(rows)


def _say(axis: Axes, case: ShownCase) -> None:
    """Write a case's probabilities and answers into an empty axis, from the top down, in inches."""
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(ROW, 0)
    place = 0.1
    for name, value in _top(case):
        predicted, right = name == case.chosen.predicted, name == case.chosen.label
        colour = (PRIMARY if right else SECONDARY) if predicted else FAINT
        axis.barh(place, 0.5 * value, 0.11, left=0.24, color=colour)
        axis.text(0.0, place, name, va="center", fontsize=7, fontweight="bold" if predicted else "normal")
        # The share stands behind its bar, and says which class is the true one.
        axis.text(0.26 + 0.5 * value, place, f"{value:.0%}" + (" true" if right else ""), va="center", fontsize=7, color=INK)
        place += 0.15
    place += 0.02
    for name, answer, value in case.answers:
        lines = textwrap.wrap(
            f"{100 * value:+.0f}  {name} = {answer}".replace("-", "−", 1 if value < 0 else 0), LETTERS, subsequent_indent="     "
        )
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
