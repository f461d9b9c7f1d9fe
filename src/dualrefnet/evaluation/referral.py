"""Referral: who should be seen by a dermatologist, given that hardly any cancer may be missed?

The malignancy score of an image is the sum of the probabilities of the malignant classes. An image is referred if its
score
reaches a threshold: the largest one with which the wanted share of the validation side's cancers is referred. On other
patients the share comes out above or below what was wanted, about as often the one as the other.
"""

# also: Selective prediction: how right is a model that may keep silent about the images of which it is least sure?
# also: Picture of referral: what a lower or a higher threshold on the malignancy score would find and spare.
# also: Picture of a model that may keep silent: how right the answers are, the fewer it gives.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray

from dualrefnet.display.figure import COLOURS, FAINT, INK, PRIMARY, ReportFigure, new_figure, styled
from dualrefnet.evaluation.bootstrap import (
    NAN,
    beside,
    divide,
    draw_counts,
    group_codes,
    measure_ratios,
    percentile_interval,
)
from dualrefnet.evaluation.curves import check_draw
from dualrefnet.evaluation.metrics import check_predictions

Floats = NDArray[np.float64]


# Thresholds of the picture: 0, 0.01, ..., 1.
STEPS = 100


@dataclass(frozen=True)
class ReferralCurve:
    """Sensitivity and specificity over the threshold.

    Attributes:
        table: columns `threshold` (0, 0.01, ..., 1), `sensitivity`, `specificity`, `referred`, each with `_low` and
            `_high`.
        chosen: the threshold in use.
        chosen_interval: of the threshold over the patients from whom it was chosen; None if it wasn't computed.
        sensitivity: at the threshold in use.
        specificity: there.
        target: the sensitivity for which it was chosen.
        images: number in the test set.
        malignant: number of them that are cancers.
        groups: number of patients.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage of the bands.
    """

    table: pd.DataFrame
    chosen: float
    chosen_interval: tuple[float, float] | None
    sensitivity: float
    specificity: float
    target: float
    images: int
    malignant: int
    groups: int
    samples: int
    seed: int
    level: float


def referral_threshold(malignant: NDArray[np.bool_], score: Floats, sensitivity: float) -> float | None:
    """Return the largest threshold with which at least the wanted share of the malignant images is referred.

    Args:
        malignant: (N,), whether each image shows a cancer.
        score: (N,), malignancy.
        sensitivity: the wanted share, above 0 and up to 1.

    Returns:
        A threshold; None if no image is malignant.

    Raises:
        ValueError: `sensitivity` isn't in (0, 1].

    >>> referral_threshold(np.array([True, True, True, True, False]), np.array([0.9, 0.2, 0.7, 0.4, 0.8]), 0.75)  # 3 of 4
    0.4
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"the wanted sensitivity must be above 0 and at most 1, not {sensitivity}")
    ill = np.sort(score[malignant])[::-1]
    if not len(ill):
        return None
    return float(ill[math.ceil(len(ill) * sensitivity - 1e-9) - 1])


def threshold_interval(
    malignant: NDArray[np.bool_],
    score: Floats,
    sensitivity: float,
    groups: NDArray[np.int64],
    samples: int,
    seed: int,
    level: float,
) -> tuple[float, float] | None:
    """Return the percentile interval of `referral_threshold` over resampled patients; None if no image is malignant.

    Args:
        malignant: (N,), whether each image shows a cancer.
        score: (N,), malignancy.
        sensitivity: the wanted share.
        groups: (N,), patient of every image, 0..G-1.
        samples: bootstrap samples; resamples without a malignant image are skipped.
        seed: of the draw.
        level: coverage.
    """
    places = np.flatnonzero(malignant)
    places = places[np.argsort(-score[places], kind="stable")]
    if not len(places):
        return None
    descending, drawn = score[places], []
    for times in draw_counts(int(groups.max()) + 1, samples, seed):
        passed = times[:, groups[places]].cumsum(axis=1)
        reached = passed >= passed[:, -1:] * sensitivity - 1e-9
        drawn.append(np.where(passed[:, -1] > 0, descending[reached.argmax(axis=1)], np.nan))
    return percentile_interval(np.concatenate(drawn), level)


def measure_referral(
    malignant: NDArray[np.bool_],
    referred: NDArray[np.bool_],
    groups: NDArray[np.int64],
    target: float,
    samples: int,
    seed: int,
    level: float,
) -> dict[str, Any]:
    """Measure referral on images that had no part in the choice of the threshold.

    Args:
        malignant: (N,), whether each image shows a cancer.
        referred: (N,).
        groups: (N,), patient of every image, 0..G-1.
        target: the wanted sensitivity.
        samples: bootstrap samples; 0: no intervals.
        seed: of the draw.
        level: coverage of the intervals.

    Returns:
        `sensitivity`, `specificity`, `referred` (share of all images), each with its interval, None where undefined;
        `malignant`, `benign`, `missed` (cancers that aren't referred), `spared` (benign ones that aren't) as numbers of
        images;
        `reached` (whether the sensitivity is at least the target; None without a cancer).
    """
    amounts = np.stack([referred, ~referred, referred], axis=1)
    about = np.stack([malignant, ~malignant, np.ones(len(malignant), dtype=bool)], axis=1)
    sensitivity, specificity, share = measure_ratios(amounts, about, groups, samples, seed, level)
    result = (
        sensitivity.to_json("sensitivity", level)
        | specificity.to_json("specificity", level)
        | share.to_json("referred", level)
    )
    result |= {"malignant": int(malignant.sum()), "benign": int((~malignant).sum())}
    result |= {"missed": int((malignant & ~referred).sum()), "spared": int((~malignant & ~referred).sum())}
    result["reached"] = None if not malignant.any() else bool(sensitivity.value >= target - 1e-9)
    return result


def referral_curve(
    malignant: NDArray[np.bool_],
    score: Floats,
    groups: ArrayLike,
    chosen: float,
    target: float,
    chosen_interval: tuple[float, float] | None = None,
    samples: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> ReferralCurve:
    """Compute sensitivity, specificity and the share referred over the threshold, with pointwise bands over patients.

    Args:
        malignant: (N,), whether each image shows a cancer.
        score: (N,), malignancy.
        groups: (N,), patient of every image.
        chosen: the threshold in use.
        target: the sensitivity for which it was chosen.
        chosen_interval: of that threshold.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage.

    Raises:
        ValueError: no image is malignant, or all are; see also `check_draw`.
    """
    codes = check_draw(groups, len(score), samples, level)
    if malignant.all() or not malignant.any():
        raise ValueError("there is nothing to draw: all images are malignant, or none is")
    thresholds = np.append(np.arange(STEPS + 1) / STEPS, chosen)
    referred = score[:, None] >= thresholds
    table, columns = pd.DataFrame({"threshold": thresholds}), {"sensitivity": malignant, "specificity": ~malignant}
    for name, mine in {**columns, "referred": np.ones(len(score), dtype=bool)}.items():
        counted = ~referred if name == "specificity" else referred
        ratios = measure_ratios(counted, np.tile(mine[:, None], len(thresholds)), codes, samples, seed, level)
        table[name] = [ratio.value for ratio in ratios]
        table[f"{name}_low"] = [ratio.low for ratio in ratios]
        table[f"{name}_high"] = [ratio.high for ratio in ratios]
    at_chosen = table.iloc[-1]
    return ReferralCurve(
        table.iloc[:-1].copy(),
        chosen,
        chosen_interval,
        float(at_chosen["sensitivity"]),
        float(at_chosen["specificity"]),
        target,
        len(score),
        int(malignant.sum()),
        int(codes.max()) + 1,
        samples,
        seed,
        level,
    )


# Shares of a table, in percent.
TABLE = (100, 90, 80, 70, 50)


# Shares of a curve, in percent.
CURVE = tuple(range(1, 101))


@dataclass(frozen=True)
class Selective:
    """What selective prediction gives on a test set.

    Attributes:
        table: one row a share: `percent` (asked for), `images` (answered), `share` (of all images), `threshold` (lowest
            confidence
            answered), `accuracy` and `balanced_accuracy` among the answered, each with `_low` and `_high` (NaN: none),
            and
            `answered:<CLASS>`, the number of images of each class that are answered. Balanced accuracy is NaN where no
            image of a
            class of the test set is answered: silence about a class must not raise it.
        aurc: area under the risk-coverage curve.
        aurc_interval: None without resamples.
        classes: names.
        images: number in the test set.
        groups: number of patients.
        samples: bootstrap samples; 0: none.
        seed: of the draw.
        level: coverage of the bands.
    """

    table: pd.DataFrame
    aurc: float
    aurc_interval: tuple[float, float] | None
    classes: tuple[str, ...]
    images: int
    groups: int
    samples: int
    seed: int
    level: float

    def to_json(self) -> dict[str, Any]:
        """Return AURC and table as values that strict JSON knows."""
        rows = []
        for row in self.table.to_dict("records"):
            one = {key: row[key] for key in ("percent", "images", "share", "threshold")}
            for measure in ("accuracy", "balanced_accuracy"):
                one |= beside(measure, row[measure], (row[f"{measure}_low"], row[f"{measure}_high"]), self.level)
            rows.append(one | {"answered": {name: row[f"answered:{name}"] for name in self.classes}})
        return {**beside("aurc", self.aurc, self.aurc_interval, self.level), "table": rows}


@dataclass(frozen=True)
class _Ranked:
    """Images from the highest confidence down.

    Attributes:
        groups: (N,).
        right: (N,), whether the likeliest class is the true one.
        truth: (N,).
        confidence: (N,).
        ends: (T,), place of the last image at or above each threshold.
        count: number of classes.
    """

    groups: NDArray[np.int64]
    right: NDArray[np.bool_]
    truth: NDArray[np.int64]
    confidence: Floats
    ends: NDArray[np.int64]
    count: int

    def measure(self, times: Floats, percents: NDArray[np.int64]) -> dict[str, Floats]:
        """Return what resamples give; `times`: (S, G), how often each group was drawn.

        Returns:
            `end` (S, P), the number of the threshold; `accuracy`, `balanced_accuracy` (S, P), the latter over the
            classes among
            the answered; `answered` (S, P, C); `aurc` (S,).
        """
        weights = times[:, self.groups]
        # Whole numbers, so that no comparison can miss by a rounding error.
        passed = weights.cumsum(axis=1)[:, self.ends]
        correct = (weights * self.right).cumsum(axis=1)[:, self.ends]
        total = passed[:, -1]
        end = np.stack([np.searchsorted(row * 100, percents * row[-1]) for row in passed])
        rows = np.arange(len(times))[:, None]
        answered, hits = np.empty((*end.shape, self.count)), np.empty((*end.shape, self.count))
        for index in range(self.count):
            mine = weights * (self.truth == index)
            answered[:, :, index] = mine.cumsum(axis=1)[:, self.ends][rows, end]
            hits[:, :, index] = (mine * self.right).cumsum(axis=1)[:, self.ends][rows, end]
        sensitivity = divide(hits, answered)
        risk = 1 - divide(correct, passed)
        steps = np.diff(passed, axis=1, prepend=0)
        # Before the first image that was drawn there is no risk, and no step either.
        aurc = (steps * np.nan_to_num(risk)).sum(axis=1) / total
        present = (answered > 0).sum(axis=2).astype(np.float64)
        return {
            "end": end,
            "accuracy": divide(correct, passed)[rows, end],
            "balanced_accuracy": divide(np.nan_to_num(sensitivity).sum(axis=2), present),
            "answered": answered,
            "aurc": aurc,
        }


def measure_selective(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    classes: Sequence[str],
    percents: Sequence[int] = CURVE,
    samples: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> Selective:
    """Measure selective prediction, with pointwise percentile bands of a bootstrap over patients.

    Args:
        labels: (N,), indices into `classes`.
        probabilities: (N, C), rows sum to 1.
        groups: (N,), the patient of every image; each image of an unknown patient needs a name of its own.
        classes: names in the order of the columns.
        percents: shares of the images to be answered, whole numbers 1..100.
        samples: bootstrap samples; 0: no bands.
        seed: of the draw.
        level: coverage of the bands.

    Raises:
        ValueError: see `check_predictions` and `group_codes`; or a share isn't in 1..100.
    """
    truth, scores = check_predictions(labels, probabilities, len(classes))
    codes, wanted = group_codes(groups), np.asarray(percents, dtype=np.int64)
    if not len(wanted) or wanted.min() < 1 or wanted.max() > 100:
        raise ValueError("shares must be whole numbers from 1 to 100 percent")
    confidence = scores.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(confidence[order])), len(truth) - 1)
    right = scores.argmax(axis=1) == truth
    ranked = _Ranked(codes[order], right[order], truth[order], confidence[order], ends, len(classes))
    patients = int(codes.max()) + 1
    point = ranked.measure(np.ones((1, patients)), wanted)
    chunks = [ranked.measure(times, wanted) for times in draw_counts(patients, samples, seed)]
    drawn = {
        key: np.concatenate([chunk[key] for chunk in chunks])
        for key in ("accuracy", "balanced_accuracy", "aurc")
        if chunks
    }

    last = ends[point["end"][0].astype(np.int64)]
    answered = point["answered"][0]
    table = pd.DataFrame(
        {"percent": wanted, "images": last + 1, "share": (last + 1) / len(truth), "threshold": ranked.confidence[last]}
    )
    silent = ((answered == 0) & (np.bincount(truth, minlength=len(classes)) > 0)).any(axis=1)
    for measure in ("accuracy", "balanced_accuracy"):
        values = point[measure][0]
        table[measure] = np.where(silent, np.nan, values) if measure == "balanced_accuracy" else values
        bounds = [
            percentile_interval(drawn[measure][:, place], level) if drawn else None for place in range(len(wanted))
        ]
        missing = table[measure].isna()
        table[f"{measure}_low"] = [
            NAN if pair is None or gone else pair[0] for pair, gone in zip(bounds, missing, strict=True)
        ]
        table[f"{measure}_high"] = [
            NAN if pair is None or gone else pair[1] for pair, gone in zip(bounds, missing, strict=True)
        ]
    for index, name in enumerate(classes):
        table[f"answered:{name}"] = answered[:, index].astype(np.int64)
    interval = percentile_interval(drawn["aurc"], level) if drawn else None
    return Selective(
        table, float(point["aurc"][0]), interval, tuple(classes), len(truth), patients, samples, seed, level
    )


_LINES: tuple[tuple[str, str, str, Literal["-", "--"]], ...] = (
    ("sensitivity", "cancers referred", PRIMARY, "-"),
    ("specificity", "benign lesions spared", COLOURS[4], "--"),
)


@styled
def draw_referral(curve: ReferralCurve, unit: str = "patients") -> ReportFigure:
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
        axis.fill_between(
            table["threshold"], table[f"{name}_low"], table[f"{name}_high"], color=colour, alpha=0.25, linewidth=0
        )
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
    return ReportFigure("referral", "Referral: cancers found and benign lesions spared", caption, alt, figure, table)


# Fewer answers than this say little, and the band would fill the picture.
FEW = 20


# Measure, name, colour and line.
_selective_LINES = (
    ("accuracy", "accuracy", PRIMARY, "-"),
    ("balanced_accuracy", "balanced accuracy", COLOURS[4], "--"),
)


# Shares that the words name, in percent.
_NAMED = (100, 80, 50)


@styled
def draw_selective(selective: Selective, unit: str = "patients") -> ReportFigure:
    """Draw accuracy and balanced accuracy over the share of images that is answered.

    Args:
        selective: from `measure_selective`, over a curve of shares.
        unit: what was resampled, in words, for the caption.
    """
    table = selective.table[selective.table["images"] >= min(FEW, selective.images)]
    figure, axes = new_figure(3.9, 2, 1, sharex=True)
    for axis, (measure, name, colour, line) in zip(axes, _selective_LINES, strict=True):
        _draw(axis, selective, measure, colour, line)
        axis.set_title(name)
    axes[-1].set_xlabel("images answered, %  (the surest first)")
    banded = bool(table["accuracy_low"].notna().any())
    band = f" Bands hold {100 * selective.level:g}% of {selective.samples} resamples of the {unit} (seed {selective.seed})."
    silent = table["balanced_accuracy"].isna().any()
    caption = (
        f"If only the images are answered of which the model is surest, how many of the answers are right? At the right end all "
        f"{selective.images} test images of {selective.groups} {unit} are answered; shares of fewer than {FEW} images aren't drawn."
        + (band if banded else "")
        + (" Balanced accuracy ends where no image of some class is answered any more." if silent else "")
        + f" Mean share of wrong answers over the whole curve (AURC): {_aurc(selective)}; 0 is perfect."
    )
    at = selective.table.set_index("percent")
    words = [
        f"{percent}% answered: accuracy {at['accuracy'][percent]:.2f}, balanced accuracy "
        + ("undefined" if at["balanced_accuracy"].isna()[percent] else f"{at['balanced_accuracy'][percent]:.2f}")
        for percent in _NAMED
        if percent in at.index
    ]
    alt = "; ".join([*words, f"AURC {_aurc(selective)}"])
    return ReportFigure(
        "selective", "Right answers when the model may keep silent", caption, alt, figure, table.reset_index(drop=True)
    )


def _draw(axis: Axes, selective: Selective, measure: str, colour: str, line: str) -> None:
    table = selective.table[selective.table["images"] >= min(FEW, selective.images)]
    percent = 100 * table["share"]
    axis.fill_between(percent, table[f"{measure}_low"], table[f"{measure}_high"], color=colour, alpha=0.25, linewidth=0)
    axis.plot(percent, table[measure], line, color=colour)
    lowest = table[[measure, f"{measure}_low"]].min().min()
    floor = 0.0 if lowest != lowest else max(0.0, lowest - 0.05)
    axis.set(xlim=(percent.min() if percent.min() < 100 else 0, 100), ylim=(floor, 1.02))
    axis.margins(x=0)


def _aurc(selective: Selective) -> str:
    interval = selective.aurc_interval
    return f"{selective.aurc:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")
