"""Forms from which something was taken: all answers, what the answers say, or the flags that tell which are missing."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.evaluation.changed_inputs import Forms
from dualrefnet.evaluation.intervals import group_codes


def find_gaps(rows: pd.DataFrame, encoder: MetadataEncoder) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which answers are missing and which of the others say "not known" (a missing code that is an answer of its own).

    Args:
        rows: N of the lesion table.
        encoder: the run's; its fields count, and what is missing to it.

    Returns:
        Two arrays (N, F).
    """
    missing = encoder.encode(rows).missing
    not_known = np.zeros_like(missing)
    for index, field in enumerate(encoder.fields):
        not_known[:, index] = rows[field.name].isin(field.missing_codes).to_numpy() & ~missing[:, index]
    return missing, not_known


def replace_answers(rows: pd.DataFrame, encoder: MetadataEncoder, groups: ArrayLike, generator: np.random.Generator) -> pd.DataFrame:
    """Replace every answer by the one that another patient's row gives to the same question.

    Each field is drawn by itself. What is missing stays missing and what is "not known" stays so: nothing else is true in the result.

    Args:
        rows: N of the lesion table.
        encoder: the run's; its fields are replaced.
        groups: (N,) patients.
        generator: draws the rows that answers are taken from.

    Raises:
        ValueError: see `group_codes`.
    """
    codes = group_codes(groups)
    missing, not_known = find_gaps(rows, encoder)
    result = rows.copy()
    for index, field in enumerate(encoder.fields):
        known = np.flatnonzero(~missing[:, index] & ~not_known[:, index])
        values = rows[field.name].to_numpy(copy=True)
        if len(np.unique(codes[known])) < 2:
            # Nobody else has answered; the own answer must not stay, and only the gap remains.
            values[known] = np.nan
        else:
            values[known] = values[_from_others(known, codes, generator)]
        result[field.name] = values
    return result


def hide_flags(encoder: MetadataEncoder, forms: Forms) -> Forms:
    """Return (N, M) encoded forms whose flags say that nothing is missing, whatever stands in the gaps."""
    result = forms.copy()
    result[:, encoder.width - count_flags(encoder) :] = 0
    return result


def count_flags(encoder: MetadataEncoder) -> int:
    """Return how many of an encoder's columns, its last ones, are flags that say what is missing."""
    return encoder.width - (encoder.spans[-1].stop if encoder.spans else 0)


def _from_others(known: NDArray[np.int64], codes: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw for each of the rows `known` one of them that is of another group."""
    drawn = generator.choice(known, len(known))
    while True:
        own = np.flatnonzero(codes[drawn] == codes[known])
        if not len(own):
            return drawn
        drawn[own] = generator.choice(known, len(own))
