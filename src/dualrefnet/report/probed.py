"""The sections of a run's page that say what its score leans on, and what is left of it when inputs are missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dualrefnet.figures.availability import draw_availability, draw_patterns
from dualrefnet.figures.shortcuts import draw_shortcuts
from dualrefnet.probes.availability import WITH, WITHOUT, Availability
from dualrefnet.probes.shortcuts import Shortcuts
from dualrefnet.probes.tables import BALANCED, availability_table, pattern_table, shortcut_sentences, shortcut_table
from dualrefnet.report.section import Section


def shortcuts_section(shortcuts: Shortcuts) -> Section:
    """Return what the score leans on: the probes as sentences, table and picture."""
    lead = [
        "A model can reach its score without looking at the lesion: by what surrounds it, by the form, or by which answers were not "
        "recorded. Here the trained model is asked again about the same photographs with parts taken away or exchanged between "
        f"{shortcuts.unit}s.",
        *shortcut_sentences(shortcuts),
    ]
    return Section("shortcuts", "What the score leans on", lead, [shortcut_table(shortcuts), draw_shortcuts(shortcuts)])


def availability_section(availability: Availability) -> Section:
    """Return what the model reaches with fewer answers and without the photograph."""
    table = availability.curve[availability.curve["measure"] == BALANCED]
    values = {(row["photograph"], row["share"]): row for row in table.to_dict("records")}
    ends = [(name, (table["photograph"] == name).any()) for name in (WITH, WITHOUT)]
    least = table["share"].min()
    said = [
        f"{name} {_value(values[name, 1.0])} with the whole form and {_value(values[name, least])} with {_kept(least)}"
        for name, there in ends
        if there
    ]
    lead = [
        f"Balanced accuracy {'; '.join(said)}; guessing reaches {availability.chance:.2f}.",
        "In the curve single answers are removed at random. In the patterns they are missing together, as they are in training: there a "
        "gap can itself have told the class, and then it misleads where answers are missing for another reason.",
    ]
    pictures = [draw_availability([availability]), draw_patterns([availability])]
    return Section("availability", "With fewer answers", lead, [pattern_table(availability), *pictures, availability_table(availability)])


def _value(row: Mapping[Any, Any]) -> str:
    return f"{row['value']:.2f} [{row['low']:.2f} to {row['high']:.2f}]"


def _kept(share: float) -> str:
    return "no answer" if share == 0 else f"{share:.0%} of the answers"
