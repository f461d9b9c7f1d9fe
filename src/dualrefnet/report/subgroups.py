"""The section on subgroups: do results hold for everyone?"""

from __future__ import annotations

import pandas as pd

from dualrefnet.evaluation.compared_sides import MINIMUM_IMAGES, MINIMUM_PATIENTS, NAMES
from dualrefnet.evaluation.levels import NOT_RECORDED
from dualrefnet.evaluation.printed_table import Cell, PrintedTable
from dualrefnet.evaluation.subgroups import Subgroups
from dualrefnet.figures.picture import Picture
from dualrefnet.figures.subgroups import draw_subgroup_gaps, draw_subgroups
from dualrefnet.report.numbers import number, pair, signed
from dualrefnet.report.section import Section

_OVERCONFIDENCE = "Overconfidence: mean confidence less the share that is right; below 0 the model is less sure than it could be."
# Measures of the table of levels, and those of which gaps are drawn, the first that have any.
_LEVEL_MEASURES = ("balanced_accuracy", "accuracy", "malignant.sensitivity", "malignant.specificity", "malignant.auc", "overconfidence")
_GAPS = ("balanced_accuracy", "malignant.sensitivity", "overconfidence")


def subgroups_section(subgroups: Subgroups, unit: str = "patients") -> Section:
    """Return whether results hold for everyone.

    Args:
        subgroups: from `measure_subgroups`.
        unit: what was resampled, in words.
    """
    levels, table = subgroups.levels, subgroups.table
    few = levels[~levels["measured"]]
    lead = [
        f"The {subgroups.images:,} test images are divided by {_listed(list(subgroups.descriptions))}. Every level is compared with all "
        "others for which the question is answered; images without an answer are a level of their own. Measures of classes are compared "
        "over the classes that both sides have from enough patients.",
        f"{len(few)} of {len(levels)} levels have fewer than {MINIMUM_IMAGES} images or {MINIMUM_PATIENTS} {unit} and therefore no "
        f"numbers; whether results hold for them this test set can't tell (in brackets: images): {_by_field(few)}."
        if len(few) else "Every level has enough images for numbers.",
        _flagged(subgroups),
        "A gap says that results differ, not why: cases may be harder or photographs worse, or the training images fewer.",
    ]  # fmt: skip
    items: list[PrintedTable | Picture] = [_level_table(subgroups, unit)]
    flagged = table[table["flagged"] & table["counted"]]
    if len(flagged):
        items.append(_gap_table(flagged))
    known = {measure: table[table["measure"] == measure] for measure in subgroups.overall}
    if known["balanced_accuracy"]["value"].notna().any():
        items.append(draw_subgroups(subgroups, "balanced_accuracy", unit))
    items += [draw_subgroup_gaps(subgroups, name, unit) for name in _GAPS if name in known and known[name]["gap"].notna().any()]
    return Section("subgroups", "Does it hold for everyone?", lead, items)


def _flagged(subgroups: Subgroups) -> str:
    count = subgroups.flagged
    text = (
        f"{subgroups.looked_at:,} gaps were looked at; if there were none at all, about {subgroups.by_chance:.0f} of them would stand out "
        f"by chance alone. 0 lies outside the 95% interval of {count:,}"
    )
    found = subgroups.table[subgroups.table["flagged"] & subgroups.table["counted"]]
    where = [f"{field} = {level} ({len(part)})" for (field, level), part in found.groupby(["field", "level"], sort=False)]
    if not count:
        return f"{text}."
    silent = "" if not (found["level"] == NOT_RECORDED).any() else (
        f' "{NOT_RECORDED[0].upper()}{NOT_RECORDED[1:]}" stands out: whether a question was asked goes along with the case, and a model '
        "may lean on that."
    )  # fmt: skip
    return f"{text}: {_listed(where)}.{silent}"


def _by_field(levels: pd.DataFrame) -> str:
    names: dict[str, list[str]] = {}
    for row in levels.to_dict("records"):
        names.setdefault(row["field"], []).append(f"{row['level']} ({row['images']})")
    return "; ".join(f"{field} {', '.join(found)}" for field, found in names.items())


def _level_table(subgroups: Subgroups, unit: str) -> PrintedTable:
    measures = [name for name in _LEVEL_MEASURES if name in subgroups.overall]
    at = {(row["field"], row["level"], row["measure"]): row for row in subgroups.table.to_dict("records")}
    rows = []
    for level in subgroups.levels.to_dict("records"):
        # Of a few patients it would tell what they have.
        lacks = f", no {level['missing']}" if level["missing"] and level["measured"] else ""
        row = [Cell(f"{level['field']} = {level['level']}", f"{level['images']:,} images, {level['patients']:,} {unit}{lacks}")]
        for measure in measures:
            found = at.get((level["field"], level["level"], measure))
            row.append(Cell("–") if found is None else Cell(number(found["value"]), pair(found["low"], found["high"], ".2f")))
        rows.append(row)
    notes = [
        "–: too few images or patients.",
        "Balanced accuracy runs over the classes that the level and the others have from enough patients.",
        _OVERCONFIDENCE,
    ]
    return PrintedTable("Results by level, with 95% intervals", ("level", *(NAMES[name] for name in measures)), rows, tuple(notes))


def _gap_table(flagged: pd.DataFrame) -> PrintedTable:
    rows = []
    for row in flagged.to_dict("records"):
        name = NAMES[row["measure"]]
        cells = [Cell(f"{row['field']} = {row['level']}"), Cell(name, f"of {row['classes']}" if row["classes"] else "")]
        cells += [Cell(number(row["value"])), Cell(number(row["others"]))]
        rows.append([*cells, Cell(signed(row["gap"]), pair(row["gap_low"], row["gap_high"], "+.2f"))])
    columns = ("level", "measure", "level's", "the others'", "gap")
    return PrintedTable("Gaps that stand out", columns, rows, (_OVERCONFIDENCE,), left=2)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
