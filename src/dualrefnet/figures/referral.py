"""Picture of referral: what a lower or a higher threshold on the malignancy score would find and spare."""

from __future__ import annotations

from typing import Literal

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dualrefnet.evaluation.referral import ReferralCurve
from dualrefnet.figures.picture import COLOURS, FAINT, INK, PRIMARY, Picture, new_figure, styled

_LINES: tuple[tuple[str, str, str, Literal["-", "--"]], ...] = (
    ("sensitivity", "cancers referred", PRIMARY, "-"),
    ("specificity", "benign lesions spared", COLOURS[4], "--"),
)


@styled
def draw_referral(curve: ReferralCurve, unit: str = "patients") -> Picture:
    """Draw sensitivity and specificity over the threshold, and the threshold in use.

    Args:
        curve: from `referral_curve`.
        unit: what was resampled, in words, for the caption.
    """
    table = curve.table
    figure, (axis,) = new_figure(3.2)
    if curve.chosen_interval is not None:
        axis.axvspan(*curve.chosen_interval, color=FAINT, alpha=0.35, linewidth=0)
    for name, _, colour, line in _LINES:
        axis.fill_between(table["threshold"], table[f"{name}_low"], table[f"{name}_high"], color=colour, alpha=0.25, linewidth=0)
        axis.plot(table["threshold"], table[name], line, color=colour)
    axis.axhline(curve.target, color=INK, linestyle=":", linewidth=1)
    axis.axvline(curve.chosen, color=INK, linewidth=1)
    for value, colour in ((curve.sensitivity, PRIMARY), (curve.specificity, COLOURS[4])):
        axis.plot(curve.chosen, value, "o", color=colour, markeredgecolor=INK, markersize=5)
    axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="threshold: refer if the malignancy score is at least", ylabel="share")
    handles = [Line2D([], [], color=colour, linestyle=line, label=label) for _, label, colour, line in _LINES]
    handles += [
        Line2D([], [], color=INK, linestyle=":", linewidth=1, label=f"wanted: {curve.target:.0%} of cancers"),
        Line2D([], [], color=INK, linewidth=1, label=f"in use: {curve.chosen:.2f}"),
    ]
    shown: list[Line2D | Patch] = [*handles]
    grey = ""
    if curve.chosen_interval is not None:
        shown.append(Patch(facecolor=FAINT, alpha=0.35, label="its 95% interval"))
        grey = f" Grey: where it could have come to lie with other validation {unit}."
    figure.legend(handles=shown, loc="outside upper center", ncols=2)
    caption = (
        f"The lower the threshold, the more cancers are referred and the fewer benign lesions are spared. {curve.images} test images of "
        f"{curve.groups} {unit}, {curve.malignant} of them cancers; bands hold {100 * curve.level:g}% of {curve.samples} resamples of the "
        f"{unit} (seed {curve.seed}). The upright line is the threshold in use, chosen on the validation side.{grey}"
    )
    alt = (
        f"At the threshold in use, {curve.chosen:.2f}, {curve.sensitivity:.2f} of the cancers are referred (wanted {curve.target:.2f}) and "
        f"{curve.specificity:.2f} of the benign lesions are spared"
    )
    return Picture("referral", "Referral: cancers found and benign lesions spared", caption, alt, figure, table)
