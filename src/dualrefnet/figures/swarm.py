"""Layout of a beeswarm: where points of about the same value stand, and how low or high their colour is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def shade(amount: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return 0..1 from the 5th to the 95th percentile of what is known, or over all of it where these are one."""
    known = amount[~np.isnan(amount)].astype(float)
    if not len(known):
        return np.full(len(amount), np.nan)
    low, high = np.percentile(known, [5, 95])
    if low == high:
        low, high = known.min(), known.max()
    return np.clip((amount - low) / (high - low), 0, 1) if high > low else np.where(np.isnan(amount), np.nan, 0.5)


def swarm(values: NDArray[np.float32], width: float) -> NDArray[np.float64]:
    """Return heights within -0.4..0.4 at which points of about the same value stand beside each other, from the middle outwards."""
    bins = np.round(values / width).astype(int)
    heights = np.zeros(len(values))
    for each in np.unique(bins):
        members = np.flatnonzero(bins == each)
        heights[members] = [(step + 1) // 2 * (-1) ** step for step in range(len(members))]
    return heights * min(0.09, 0.4 / max(1.0, float(np.abs(heights).max())))
