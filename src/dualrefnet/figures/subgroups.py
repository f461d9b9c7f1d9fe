"""Pictures of subgroups: a measure of every level with its interval, and how far each is from the others; one panel a field."""

from __future__ import annotations

import textwrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dualrefnet.errors import DataError
from dualrefnet.evaluation.compared_sides import MINIMUM_IMAGES, MINIMUM_PATIENTS, NAMES
from dualrefnet.evaluation.subgroups import Subgroups
from dualrefnet.figures.picture import FAINT, INK, PAPER, PRIMARY, SECONDARY, Picture, new_figure, shortened, styled

# Inches: a line of a panel, its title, and what stands above and below the panels.
SLOT, TITLE, BELOW = 0.19, 0.27, 0.75
# Letters of a level and of a panel's title.
LETTERS, TITLE_LETTERS = 22, 28
# Levels without numbers that a panel names one by one.
NAMED = 3


@styled
def draw_subgroups(subgroups: Subgroups, measure: str, unit: str = "patients") -> Picture:
    """Draw a measure of every level with its interval, and a line at that of the whole test side.

    Args:
        subgroups: from `measure_subgroups`.
        measure: one of `compared_sides.NAMES`.
        unit: what was resampled, in words, for the caption.

    Raises:
        DataError: no level has a value of it.
    """
    rows = _rows(subgroups, measure, "value")
    figure, axes, panels = _figure(subgroups, rows)
    name, overall = NAMES[measure], subgroups.overall[measure]
    for axis, field in zip(axes, panels, strict=True):
        axis.axvline(overall, color=FAINT, linestyle="--", linewidth=1)
        _draw(axis, rows[rows["field"] == field], "value", "low", "high", subgroups.descriptions[field], ".2f")
    axes[-1].set_xlabel(name)
    handles = [Line2D([], [], color=FAINT, linestyle="--", linewidth=1, label=f"whole test set: {overall:.2f}")]
    figure.legend(handles=handles, loc="outside lower center")
    caption = (
        f"Mark: {name} of the level (in brackets: its test images); line: {_interval(subgroups, unit)}. {_classes(rows)}"
        f"{_without(rows)}A difference from the dashed line may come from which cases a level holds."
    )
    return Picture(f"subgroups_{_slug(measure)}", f"Subgroups: {name}", caption, _alt(rows, "value", "low", "high", ".2f"), figure, rows)


@styled
def draw_subgroup_gaps(subgroups: Subgroups, measure: str, unit: str = "patients") -> Picture:
    """Draw how far every level is from the others with the interval, and a line at zero.

    Args:
        subgroups: from `measure_subgroups`.
        measure: one of `compared_sides.NAMES`.
        unit: what was resampled, in words, for the caption.

    Raises:
        DataError: no level has a gap of it.
    """
    rows = _rows(subgroups, measure, "gap")
    figure, axes, panels = _figure(subgroups, rows)
    name = NAMES[measure]
    for axis, field in zip(axes, panels, strict=True):
        axis.axvline(0, color=INK, linewidth=0.8)
        _draw(axis, rows[rows["field"] == field], "gap", "gap_low", "gap_high", subgroups.descriptions[field], "+.2f")
    axes[-1].set_xlabel(f"gap in {name}\n← lower than the others     higher →")
    if rows["flagged"].any():
        handles = [
            Line2D([], [], color=PRIMARY, marker="o", markerfacecolor=PAPER, markersize=4.5, label="could be none"),
            Line2D([], [], color=SECONDARY, marker="D", markersize=4.5, label="0 lies outside"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    caption = (
        f"How far the {name} of a level (in brackets: its test images) is from that of all others for which the field is recorded; "
        f'"not recorded" is compared with all that are. Line: {_interval(subgroups, unit)}, the same for both sides. '
        f"{_classes(rows)}{_without(rows)}A gap says that results differ, not why."
    )
    alt = _alt(rows, "gap", "gap_low", "gap_high", "+.2f")
    return Picture(f"subgroup_gaps_{_slug(measure)}", f"Subgroups: gaps in {name}", caption, alt, figure, rows)


def _rows(subgroups: Subgroups, measure: str, value: str) -> pd.DataFrame:
    """Return the levels with their numbers of one measure, those without included."""
    table = subgroups.table[subgroups.table["measure"] == measure]
    if table.empty or table[value].isna().all():
        raise DataError(f"no level of a subgroup has enough images for {measure}: there is nothing to draw")
    rows = subgroups.levels.merge(table, on=["field", "level"], how="left", sort=False)
    return rows.assign(flagged=rows["flagged"].eq(True), drawn=rows[value].notna())


def _figure(subgroups: Subgroups, rows: pd.DataFrame) -> tuple[Figure, list[Axes], list[str]]:
    """Return a panel for each field that has a level to draw."""
    drawn = rows.groupby("field", sort=False)["drawn"].sum()
    panels = [str(field) for field, count in drawn.items() if count]
    heights = [SLOT * (drawn[field] + 0.6) for field in panels]
    titles = [TITLE * (1 + 0.5 * _title(subgroups.descriptions[field]).count("\n")) for field in panels]
    figure, axes = new_figure(sum(heights) + sum(titles) + BELOW, len(panels), sharex=True, height_ratios=heights)
    return figure, axes, panels


def _draw(axis: Axes, rows: pd.DataFrame, value: str, low: str, high: str, title: str, form: str) -> None:
    shown = rows[rows["drawn"]].to_dict("records")
    for place, row in enumerate(shown):
        flagged = row["flagged"] and value == "gap"
        colour, marker = (SECONDARY, "D") if flagged else (PRIMARY, "o")
        axis.plot([row[low], row[high]], [place, place], color=colour, linewidth=1.3)
        face = PAPER if value == "gap" and not flagged else colour
        axis.plot(row[value], place, marker, color=colour, markerfacecolor=face, markersize=4.5)
    axis.set_ylim(len(shown) - 0.2, -0.8)
    axis.set_yticks(range(len(shown)), [f"{shortened(str(row['level']), LETTERS)} ({row['images']})" for row in shown])
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.locator_params(axis="x", nbins=6)
    numbers = axis.secondary_yaxis("right")
    numbers.set_yticks(range(len(shown)), [_signed(row[value], form) for row in shown])
    numbers.tick_params(length=0, labelsize=7)
    numbers.spines["right"].set_visible(False)
    axis.set_title(_title(title))


def _title(text: str) -> str:
    return "\n".join(textwrap.wrap(text, TITLE_LETTERS)[:2])


def _interval(subgroups: Subgroups, unit: str) -> str:
    return (
        f"{100 * subgroups.level:g}% interval from {subgroups.samples} resamples of the {subgroups.groups} {unit} (seed {subgroups.seed})"
    )


def _classes(rows: pd.DataFrame) -> str:
    """Say over which classes an average runs, if it is one."""
    known = rows.loc[rows["drawn"], "classes"]
    return "Each level's average runs over the classes that it and the others have from enough patients. " if known.ne("").any() else ""


def _without(rows: pd.DataFrame) -> str:
    """Say which levels aren't drawn, and why."""
    parts = []
    for field, part in rows[~rows["drawn"]].groupby("field", sort=False):
        names = [f"{row['level']} ({row['images']})" for row in part.to_dict("records")]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED + 1 else ""
        parts.append(f"{field}: {', '.join(names[:NAMED] if more else names)}{more}")
    if not parts:
        return ""
    return (
        f"Not drawn, for fewer than {MINIMUM_IMAGES} images or {MINIMUM_PATIENTS} patients, or too few of the cases that the measure is "
        f"about: {'; '.join(parts)}. "
    )


def _alt(rows: pd.DataFrame, value: str, low: str, high: str, form: str) -> str:
    words = []
    for row in rows[rows["drawn"]].to_dict("records"):
        bounds = "" if pd.isna(row[low]) else f" [{_signed(row[low], form)}, {_signed(row[high], form)}]"
        words.append(f"{row['field']} {row['level']} {_signed(row[value], form)}{bounds}")
    return "; ".join(words)


def _signed(value: Any, form: str) -> str:
    return format(value, form).replace("-", "−")


def _slug(measure: str) -> str:
    return measure.replace(".", "_")
