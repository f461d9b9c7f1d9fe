"""How numbers of a page are written: three decimals, a real minus sign, intervals in brackets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from dualrefnet.evaluation.intervals import interval_suffix

CI = interval_suffix(0.95)


def percent(values: Mapping[str, Any], key: str) -> str:
    """Return a share of metrics.json in percent with its interval."""
    if values[key] is None:
        return "an unknown share"
    bounds = values.get(key + CI)
    return f"{values[key]:.0%}" + (f" [{bounds[0]:.0%} to {bounds[1]:.0%}]" if bounds else "")


def bounds_of(values: Mapping[str, Any], key: str, form: str) -> str:
    """Return the interval of a value of metrics.json; empty if it has none."""
    bounds = values.get(key + CI)
    return pair(bounds[0], bounds[1], form) if bounds else ""


def pair(low: float, high: float, form: str) -> str:
    """Return an interval in brackets; empty if there is none."""
    return "" if pd.isna(low) else f"[{low:{form}}, {high:{form}}]".replace("-", "−")


def number(value: float | None) -> str:
    """Return a value with three decimals; a dash if it is undefined."""
    return "–" if value is None or pd.isna(value) else f"{value:.3f}".replace("-", "−")


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return f"{value:+.3f}".replace("-", "−")
