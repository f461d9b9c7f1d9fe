"""Patterns of missing answers: those that the training rows show, and those that a practice may have."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from dualrefnet.data.schema import DatasetSchema

# Patterns of fewer training rows aren't asked about.
LEAST = 0.01
EVERYTHING, NOTHING, ALWAYS = "all answers that are there", "no form", "only what is always recorded, M1"
# Fields that a name lists before it says "...".
NAMED = 3


@dataclass(frozen=True)
class Pattern:
    """Fields that are missing together.

    Attributes:
        name: for people.
        removed: the fields, in the schema's order.
        training_share: of the training rows that miss exactly these; NaN for a pattern that isn't one of theirs.
    """

    name: str
    removed: tuple[str, ...]
    training_share: float

    @property
    def fields(self) -> str:
        """The removed fields in one text, which tells patterns apart."""
        return "; ".join(self.removed)


def find_patterns(rows: pd.DataFrame, schema: DatasetSchema) -> list[Pattern]:
    """Return the patterns to ask about, from the whole form to no form.

    Args:
        rows: of the training side.
        schema: which fields there are, which of them are always recorded and which make subgroups.

    Returns:
        The whole form; what the training rows miss, the most frequent first, if 1% of them or more do; the fields of tier M1 alone; the
        fields that make subgroups (age, sex and so on) alone; no form. Patterns that remove the same fields are one.
    """
    names = [field.name for field in schema.fields]
    gaps = rows[names].isna()
    found: dict[tuple[str, ...], Pattern] = {(): Pattern(EVERYTHING, (), float((~gaps.any(axis=1)).mean()))}
    shown, counts = np.unique(gaps.to_numpy(), axis=0, return_counts=True)
    for place in np.argsort(-counts, kind="stable"):
        removed = tuple(name for name, gap in zip(names, shown[place], strict=True) if gap)
        if removed and counts[place] / len(rows) >= LEAST:
            found[removed] = Pattern(_missing(removed), removed, float(counts[place] / len(rows)))
    subgroups = [field.name for field in schema.fields if field.subgroup]
    wanted = [
        (ALWAYS, [field.name for field in schema.fields if field.tier == "M1"]),
        (f"only {', '.join(subgroups)}", subgroups),
        (NOTHING, []),
    ]
    for name, kept in wanted:
        removed = tuple(field for field in names if field not in kept)
        if name != NOTHING and not kept:
            continue
        if removed in found:
            known = found[removed]
            found[removed] = Pattern(f"{known.name} ({name})" if removed else known.name, removed, known.training_share)
        else:
            found[removed] = Pattern(name, removed, np.nan)
    # Names are for people, but must tell patterns apart.
    short = [pattern.name for pattern in found.values()]
    for removed, pattern in found.items():
        if short.count(pattern.name) > 1:
            found[removed] = replace(pattern, name=_missing(removed, len(removed)))
    # What keeps most comes first.
    return sorted(found.values(), key=lambda pattern: len(pattern.removed))


def _missing(removed: tuple[str, ...], named: int = NAMED) -> str:
    listed = ", ".join(removed[:named]) + (", ..." if len(removed) > named else "")
    return f"{len(removed)} field{'s' if len(removed) > 1 else ''} missing: {listed}"
