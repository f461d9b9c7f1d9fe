"""Referral and selective prediction over their thresholds, computed and drawn.

Referral: an image whose malignancy score reaches the threshold should be seen by a dermatologist. Selective prediction:
the images of which the model is least confident get no prediction; the area under the risk-coverage curve (AURC;
Geifman et al. 2019) is the mean share of wrong predictions over all coverages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.display.figure import COLOURS, FAINT, INK, PRIMARY, ReportFigure, new_figure, styled
from dualrefnet.display.format import interval, number
from dualrefnet.evaluation.bootstrap import NAN, Bootstrap, Estimate, Floats, divide
from dualrefnet.evaluation.metrics import check_predictions

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Thresholds of the referral curve: 0, 0.01, ..., 1.
STEPS = 100

# Coverages of selective prediction, in percent: of the table in metrics.json, and of the curve.
TABLE = (100, 90, 80, 70, 50)
CURVE = tuple(range(1, 101))

# Selective predictions of fewer images aren't drawn: they say little, and their band would fill the figure.
FEW = 20


@dataclass(frozen=True)
class ReferralCurve:
    """Sensitivity, specificity and the share `referred` over the threshold, 0, 0.01, ..., 1, and at the one in use."""

    table: pd.DataFrame  # `threshold` and each of the three, with `_low` and `_high`
    chosen: float
    chosen_interval: tuple[float, float] | None  # over the patients from whom it was chosen
    sensitivity: float
    specificity: float
    target: float  # the sensitivity for which the threshold in use was chosen
    bootstrap: Bootstrap


def referral_curve(
    malignant: NDArray[np.bool_],
    score: Floats,
    bootstrap: Bootstrap,
    chosen: float,
    target: float,
    chosen_interval: tuple[float, float] | None = None,
) -> ReferralCurve:
    """Compute the curve of images by their malignancy `score`, (N,); `chosen` is the threshold in use."""
    import pandas as pd

    if malignant.all() or not malignant.any():
        raise ValueError("there is nothing to draw: all images are malignant, or none is")
    thresholds = np.append(np.arange(STEPS + 1) / STEPS, chosen)
    referred = score[:, None] >= thresholds
    everything = np.ones(len(score), dtype=bool)
    curves = {
        "sensitivity": (referred, malignant),
        "specificity": (~referred, ~malignant),
        "referred": (referred, everything),
    }
    table = pd.DataFrame({"threshold": thresholds})
    for name, (counted, included) in curves.items():
        estimates = bootstrap.ratios(counted, np.broadcast_to(included[:, None], counted.shape))
        table[[name, f"{name}_low", f"{name}_high"]] = [[one.value, one.low, one.high] for one in estimates]
    sensitivity, specificity = (float(table[name].iloc[-1]) for name in ("sensitivity", "specificity"))
    return ReferralCurve(table.iloc[:-1].copy(), chosen, chosen_interval, sensitivity, specificity, target, bootstrap)


@dataclass(frozen=True)
class Selective:
    """Selective prediction on a test set: one row of `table` a coverage.

    Balanced accuracy is NaN where a class of the test set gets no prediction: leaving out a class must not raise it.
    """

    table: pd.DataFrame
    aurc: Estimate
    classes: tuple[str, ...]
    bootstrap: Bootstrap

    def to_json(self) -> dict[str, Any]:
        level, rows = self.bootstrap.level, []
        for row in self.table.to_dict("records"):
            one = {key: row[key] for key in ("percent", "images", "share", "threshold")}
            for measure in ("accuracy", "balanced_accuracy"):
                one |= Estimate(*(row[measure + end] for end in ("", "_low", "_high"))).to_json(measure, level)
            rows.append(one | {"answered": {name: row[f"answered:{name}"] for name in self.classes}})
        return {**self.aurc.to_json("aurc", level), "table": rows}


def measure_selective(
    labels: ArrayLike,
    probabilities: ArrayLike,
    bootstrap: Bootstrap,
    classes: Sequence[str],
    percents: Sequence[int] = CURVE,
) -> Selective:
    """Measure selective prediction at coverages, whole numbers 1..100, with pointwise bands over patients."""
    import pandas as pd

    target, scores = check_predictions(labels, probabilities, len(classes))
    wanted = np.asarray(percents, dtype=np.int64)
    if not len(wanted) or wanted.min() < 1 or wanted.max() > 100:
        raise ValueError("coverages must be whole numbers from 1 to 100 percent")
    confidence = scores.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    right, confidence = (scores.argmax(axis=1) == target)[order], confidence[order]
    by_class = target[order] == np.arange(len(classes))[:, None]
    ends = np.append(np.flatnonzero(np.diff(confidence)), len(target) - 1)

    def measure(weights: Floats) -> dict[str, Floats]:
        drawn = weights[:, bootstrap.codes[order]]
        # Whole numbers, so that no comparison can miss by a rounding error.
        passed = drawn.cumsum(axis=1)[:, ends]
        correct = (drawn * right).cumsum(axis=1)[:, ends]
        end = np.stack([np.searchsorted(row * 100, wanted * row[-1]) for row in passed])
        rows = np.arange(len(weights))[:, None]
        answered, hits = (
            np.stack([(drawn * chosen).cumsum(axis=1)[:, ends][rows, end] for chosen in columns], axis=2)
            for columns in (by_class, by_class & right)
        )
        recall = np.nan_to_num(divide(hits, answered)).sum(axis=2)
        # Before the first image that was drawn there is no risk, and no step either.
        risk = np.nan_to_num(1 - divide(correct, passed))
        return {
            "end": end,
            "accuracy": divide(correct, passed)[rows, end],
            "balanced_accuracy": divide(recall, (answered > 0).sum(axis=2)),
            "answered": answered,
            "aurc": (np.diff(passed, axis=1, prepend=0) * risk).sum(axis=1) / passed[:, -1],
        }

    point, resampled = measure(bootstrap.unit_weights), bootstrap.resample_each({"": measure})[""]
    last, answered = ends[point["end"][0].astype(np.int64)], point["answered"][0].astype(np.int64)
    table = pd.DataFrame(
        {"percent": wanted, "images": last + 1, "share": (last + 1) / len(target), "threshold": confidence[last]}
    )
    unanswered = ((answered == 0) & by_class.any(axis=1)).any(axis=1)
    for name in ("accuracy", "balanced_accuracy"):
        values = np.where(unanswered & (name == "balanced_accuracy"), NAN, point[name][0])
        estimates = [bootstrap.estimate(*column) for column in zip(values, resampled[name].T, strict=True)]
        table[[name, f"{name}_low", f"{name}_high"]] = [[one.value, one.low, one.high] for one in estimates]
    for index, name in enumerate(classes):
        table[f"answered:{name}"] = answered[:, index]
    aurc = bootstrap.estimate(float(point["aurc"][0]), resampled["aurc"])
    return Selective(table, aurc, tuple(classes), bootstrap)


@styled
def draw_referral(curve: ReferralCurve, unit: str = "patients") -> ReportFigure:
    """Draw sensitivity and specificity over the threshold; `unit`: what was resampled, in the plural."""
    figure, (axis,) = new_figure(3.2)
    curves = (("sensitivity", PRIMARY, "-", curve.sensitivity), ("specificity", COLOURS[4], "--", curve.specificity))
    for measure, colour, line, value in curves:
        _draw_banded(axis, curve.table["threshold"], curve.table, measure, colour, line)
        axis.plot(curve.chosen, value, "o", color=colour, markeredgecolor=INK, markersize=5, zorder=3)
    axis.axhline(curve.target, color=INK, linestyle=":", linewidth=1, label=f"target {curve.target:.0%}")
    axis.axvline(curve.chosen, color=INK, linewidth=1, label=f"in use: {curve.chosen:.2f}")
    if curve.chosen_interval is not None:
        axis.axvspan(*curve.chosen_interval, color=FAINT, alpha=0.35, linewidth=0, zorder=0, label="its 95% interval")
    axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="threshold on the malignancy score", ylabel="proportion")
    figure.legend(loc="outside upper center", ncols=2)
    caption = (
        "A lower threshold refers more malignant lesions (sensitivity) and spares fewer benign ones (specificity). "
        f"The threshold in use was chosen on validation {unit}. {curve.bootstrap.describe(unit)}."
    )
    alt = (
        f"At the threshold in use, {curve.chosen:.2f}, the sensitivity is {curve.sensitivity:.2f} (target "
        f"{curve.target:.2f}) and the specificity {curve.specificity:.2f}"
    )
    return ReportFigure("referral", "Referral: sensitivity and specificity", caption, alt, figure, curve.table)


@styled
def draw_selective(selective: Selective, unit: str = "patients") -> ReportFigure:
    """Draw accuracy and balanced accuracy over a curve of coverages; `unit`: what was resampled, plural."""
    table = selective.table[selective.table["images"] >= min(FEW, selective.bootstrap.images)].reset_index(drop=True)
    figure, axes = new_figure(3.9, 2, 1, sharex=True)
    percent = 100 * table["share"]
    curves = (("accuracy", PRIMARY, "-"), ("balanced_accuracy", COLOURS[4], "--"))
    for axis, (measure, colour, line) in zip(axes, curves, strict=True):
        _draw_banded(axis, percent, table, measure, colour, line)
        lowest = table[[measure, f"{measure}_low"]].min().min()
        floor = 0.0 if np.isnan(lowest) else max(0.0, lowest - 0.05)
        axis.set(xlim=(percent.min() if percent.min() < 100 else 0, 100), ylim=(floor, 1.02))
        axis.margins(x=0)
        axis.set_title(measure.replace("_", " "))
    axes[-1].set_xlabel("coverage, % of the images (the most confident first)")
    aurc = f"{number(selective.aurc.value)} {interval(selective.aurc.low, selective.aurc.high, '.3f')}".strip()
    caption = (
        "Accuracy if only the images are predicted of which the model is most confident; coverages of fewer than "
        f"{FEW} images aren't drawn. AURC, the mean share of wrong predictions over all coverages: {aurc}. "
        f"{selective.bootstrap.describe(unit)}."
    )
    if table["balanced_accuracy"].isna().any():
        caption += " Balanced accuracy ends where no image of some class is predicted."
    points = [
        f"coverage {row.percent}%: accuracy {row.accuracy:.2f}, balanced accuracy {row.balanced_accuracy:.2f}"
        for row in selective.table[selective.table["percent"].isin(TABLE)].itertuples()
    ]
    alt = "; ".join([*points, f"AURC {aurc}"])
    return ReportFigure("selective", "Selective prediction", caption, alt, figure, table)


def _draw_banded(axis: Axes, x: pd.Series, table: pd.DataFrame, measure: str, colour: str, line: str) -> None:
    axis.fill_between(x, table[f"{measure}_low"], table[f"{measure}_high"], color=colour, alpha=0.25, linewidth=0)
    axis.plot(x, table[measure], line, color=colour, label=measure)
