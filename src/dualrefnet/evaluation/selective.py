"""Selective prediction: how right is a model that may keep silent about the images of which it is least sure?

Images are answered from the highest confidence (probability of the likeliest class) down. At a share of g of the images, those
at or above the highest threshold are answered that answers at least g; images of the same confidence share a threshold. The area
under the risk-coverage curve (AURC; Geifman and El-Yaniv 2017) is the mean, over all thresholds and weighted by the images that
each adds, of the share of wrong answers among those answered: 0 is perfect. A model whose confidence says nothing has its error
rate everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.inputs import check_predictions
from dualrefnet.evaluation.intervals import draw_counts, group_codes, percentile_interval
from dualrefnet.evaluation.ratios import NAN, beside, divide

Floats = NDArray[np.float64]

# Shares of a table, in percent.
TABLE = (100, 90, 80, 70, 50)
# Shares of a curve, in percent.
CURVE = tuple(range(1, 101))


@dataclass(frozen=True)
class Selective:
    """What selective prediction gives on a test set.

    Attributes:
        table: one row a share: `percent` (asked for), `images` (answered), `share` (of all images), `threshold` (lowest confidence
            answered), `accuracy` and `balanced_accuracy` among the answered, each with `_low` and `_high` (NaN: none), and
            `answered:<CLASS>`, the number of images of each class that are answered. Balanced accuracy is NaN where no image of a
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
            `end` (S, P), the number of the threshold; `accuracy`, `balanced_accuracy` (S, P), the latter over the classes among
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
    drawn = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in ("accuracy", "balanced_accuracy", "aurc") if chunks}

    last = ends[point["end"][0].astype(np.int64)]
    answered = point["answered"][0]
    table = pd.DataFrame({"percent": wanted, "images": last + 1, "share": (last + 1) / len(truth), "threshold": ranked.confidence[last]})
    silent = ((answered == 0) & (np.bincount(truth, minlength=len(classes)) > 0)).any(axis=1)
    for measure in ("accuracy", "balanced_accuracy"):
        values = point[measure][0]
        table[measure] = np.where(silent, np.nan, values) if measure == "balanced_accuracy" else values
        bounds = [percentile_interval(drawn[measure][:, place], level) if drawn else None for place in range(len(wanted))]
        missing = table[measure].isna()
        table[f"{measure}_low"] = [NAN if pair is None or gone else pair[0] for pair, gone in zip(bounds, missing, strict=True)]
        table[f"{measure}_high"] = [NAN if pair is None or gone else pair[1] for pair, gone in zip(bounds, missing, strict=True)]
    for index, name in enumerate(classes):
        table[f"answered:{name}"] = answered[:, index].astype(np.int64)
    interval = percentile_interval(drawn["aurc"], level) if drawn else None
    return Selective(table, float(point["aurc"][0]), interval, tuple(classes), len(truth), patients, samples, seed, level)
