"""Referral: who should be seen by a dermatologist, given that hardly any cancer may be missed?

The malignancy score of an image is the sum of the probabilities of the malignant classes. An image is referred if its score
reaches a threshold: the largest one with which the wanted share of the validation side's cancers is referred. On other
patients the share comes out above or below what was wanted, about as often the one as the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.curves import check_draw
from dualrefnet.evaluation.intervals import draw_counts, percentile_interval
from dualrefnet.evaluation.ratios import measure_ratios

Floats = NDArray[np.float64]

# Thresholds of the picture: 0, 0.01, ..., 1.
STEPS = 100


@dataclass(frozen=True)
class ReferralCurve:
    """Sensitivity and specificity over the threshold.

    Attributes:
        table: columns `threshold` (0, 0.01, ..., 1), `sensitivity`, `specificity`, `referred`, each with `_low` and `_high`.
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
    malignant: NDArray[np.bool_], score: Floats, sensitivity: float, groups: NDArray[np.int64], samples: int, seed: int, level: float
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
        `malignant`, `benign`, `missed` (cancers that aren't referred), `spared` (benign ones that aren't) as numbers of images;
        `reached` (whether the sensitivity is at least the target; None without a cancer).
    """
    amounts = np.stack([referred, ~referred, referred], axis=1)
    about = np.stack([malignant, ~malignant, np.ones(len(malignant), dtype=bool)], axis=1)
    sensitivity, specificity, share = measure_ratios(amounts, about, groups, samples, seed, level)
    result = sensitivity.to_json("sensitivity", level) | specificity.to_json("specificity", level) | share.to_json("referred", level)
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
        table.iloc[:-1].copy(), chosen, chosen_interval, float(at_chosen["sensitivity"]), float(at_chosen["specificity"]), target,
        len(score), int(malignant.sum()), int(codes.max()) + 1, samples, seed, level,
    )  # fmt: skip
