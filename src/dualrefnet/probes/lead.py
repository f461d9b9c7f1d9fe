"""What probes reach: values, differences and the share of a lead over chance, all from the same resamples of patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.evaluation.changed_inputs import Floats
from dualrefnet.evaluation.comparison import PooledBootstrap, pooled_bootstrap
from dualrefnet.evaluation.intervals import percentile_interval
from dualrefnet.evaluation.opened_run import OpenedRun
from dualrefnet.progress import progress_bar

MEASURES = ("balanced_accuracy", "auc_macro_ovr", "malignant.auc")
LEVEL = 0.95


def measure_probes(
    opened: OpenedRun,
    labels: NDArray[np.int64],
    groups: NDArray[np.object_],
    answers: Mapping[str, Sequence[Floats]],
    whole: str,
    samples: int,
    seed: int,
) -> pd.DataFrame:
    """Measure every probe, and set it beside the whole.

    Args:
        opened: the run that was asked.
        labels: (N,) class indices.
        groups: (N,) patients.
        answers: probe -> one (N, C) array of probabilities a repeat; the value is the mean over repeats.
        whole: the probe that others are compared with.
        samples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        One row a probe and measure; see `Shortcuts.table`.

    Raises:
        ValueError: see `pooled_bootstrap`.
    """
    with progress_bar("intervals") as show:
        bootstrap = pooled_bootstrap(labels, answers, groups, opened.classes, samples, seed, LEVEL, opened.dataset.schema.malignant, show)
    # A resample without any image of a class is one of fewer classes.
    present = np.sum([~np.isnan(bootstrap.drawn[whole][f"per_class.{name}.sensitivity"]) for name in opened.classes], axis=0)
    rows = []
    for name, repeats in answers.items():
        for measure in MEASURES:
            if measure not in bootstrap.points[name]:
                continue
            balanced = measure == "balanced_accuracy"
            chance = 1 / len(np.unique(labels)) if balanced else 0.5
            value, difference = bootstrap.value(name, measure), bootstrap.difference(name, whole, measure)
            lead = _lead(bootstrap, name, whole, measure, chance, 1 / present if balanced else np.full(len(present), 0.5))
            rows.append(
                {
                    **{"probe": name, "compared_with": whole, "measure": measure, "chance": chance},
                    **{"value": value.value, "low": value.low, "high": value.high, "difference": difference.difference},
                    **{"difference_low": difference.low, "difference_high": difference.high},
                    **dict(zip(("lead", "lead_low", "lead_high"), lead, strict=True)),
                    **{"images": bootstrap.images, "patients": bootstrap.groups, "repeats": len(repeats)},
                }
            )
    return pd.DataFrame(rows)


def _lead(
    bootstrap: PooledBootstrap, name: str, whole: str, measure: str, chance: float, drawn_chance: Floats
) -> tuple[float, float, float]:
    """Return the share of the whole's lead over chance that a probe keeps, with its interval; NaN if there may be no lead."""
    over = bootstrap.drawn[whole][measure] - drawn_chance
    interval = percentile_interval(over, LEVEL)
    if interval is None or interval[0] <= 0:
        return np.nan, np.nan, np.nan
    share = (bootstrap.points[name][measure] - chance) / (bootstrap.points[whole][measure] - chance)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.where(over > 0, (bootstrap.drawn[name][measure] - drawn_chance) / over, np.nan)
    low, high = percentile_interval(drawn, LEVEL) or (np.nan, np.nan)
    return share, low, high
