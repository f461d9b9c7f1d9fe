"""The levels of a metadata field between which results are compared: categories, yes and no, bands of numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd

from dualrefnet.data.schema import MetadataField

NOT_RECORDED = "not recorded"
# Bands of every number that counts years: first year of each but the first.
AGES = (40, 60, 80)


def field_levels(values: pd.Series, field: MetadataField) -> tuple[pd.Series, list[str]]:
    """Return the level of every row, and all levels in their order: those that occur and those that the field declares.

    Years are divided into bands (below 40, 40-59, 60-79, 80 and over), other numbers at the thirds of these rows. What is missing, or
    was asked and isn't known, is a level of its own, the last.

    Args:
        values: column of a lesion table.
        field: what the column means.
    """
    if field.kind == "numeric":
        levels, order = _bands(values, field)
    else:
        unknown = values.isna() | values.isin(field.missing_codes)
        words = values.where(~unknown, other=NOT_RECORDED).astype(str).replace(field.aliases)
        if field.kind == "boolean":
            words = words.replace({"True": "yes", "False": "no"})
        known = list(dict.fromkeys(field.aliases.get(name, name) for name in field.categories))
        levels, order = words, [*known, *sorted(set(words) - set(known) - {NOT_RECORDED})]
    return levels, [*order, NOT_RECORDED] if (levels == NOT_RECORDED).any() else order


def _bands(values: pd.Series, field: MetadataField) -> tuple[pd.Series, list[str]]:
    numbers = values.astype(float)
    known = numbers.dropna()
    if field.unit == "years":
        edges = [float(edge) for edge in AGES]
        between = [f"{low} to {high - 1} years" for low, high in pairwise(AGES)]
        names = [f"below {AGES[0]} years", *between, f"{AGES[-1]} years and over"]
    else:
        # Where many values are equal, two thirds may share an edge, or the first be empty.
        edges = [float(edge) for edge in np.unique(np.quantile(known, [1 / 3, 2 / 3]))] if len(known) else []
        edges = [edge for edge in edges if edge > known.min()]
        unit = f" {field.unit}" if field.unit else ""
        between = [f"{low:g} to below {high:g}{unit}" for low, high in pairwise(edges)]
        names = [f"below {edges[0]:g}{unit}", *between, f"{edges[-1]:g}{unit} and over"] if edges else ["all"] * (len(known) > 0)
    place = np.searchsorted(edges, numbers.to_numpy(), side="right")
    levels = pd.Series([NOT_RECORDED if missing else names[at] for at, missing in zip(place, numbers.isna(), strict=True)], numbers.index)
    return levels, names
