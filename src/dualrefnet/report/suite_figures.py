"""The systems of a suite as the lines of a picture: what they are called, where they stand, and what must be said of
them.
"""

# also: Pictures of a suite: every system with its interval, and how far each is from the reference.

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dualrefnet.display.figure import COLOURS, FAINT, INK, PAPER, ReportFigure, new_figure, styled
from dualrefnet.display.format import MEASURE_NAMES
from dualrefnet.errors import RunError
from dualrefnet.models.encoders import BACKBONES
from dualrefnet.models.registry import METHODS
from dualrefnet.suite.results import LABEL_LEAKING, Key, reads_image
from dualrefnet.suite.tables import LESS_IS_BETTER, SIGNIFICANT

# Inches: between two marks one below the other, and between the lines of a label.
SLOT, LINE = 0.165, 0.125


# Letters of a line of a label; marks that one line of a panel can hold; systems that a caption names one by one.
LABEL, SERIES, NAMED = 25, 4, 6


KEY = list(Key._fields)


_RUNS = re.compile(r"\d+ of \d+ runs")


@dataclass(frozen=True)
class Panel:
    """Systems that share one pair of axes.

    Attributes:
        title: what they share; empty if there is one panel only.
        rows: with their place `y` from the top, in slots.
        ticks: (y, label, whether it is the reference's), one a line of the panel.
        height: in slots.
    """

    title: str
    rows: pd.DataFrame
    ticks: list[tuple[float, str, bool]]
    height: float


def described(systems: pd.DataFrame, comparisons: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the systems' rows of one measure with what they are called.

    Args:
        systems: `Aggregate.systems`.
        comparisons: `Aggregate.comparisons`.
        measure: one of the suite's.

    Returns:
        The rows with `panel`, `label` (of a line of the panel), `series` (which of several marks in a line; empty if
        every
        line has one) and its number `place`, `name` (for captions), and `is_reference`.

    Raises:
        RunError: the suite doesn't have the measure.
    """
    if systems.empty or not (systems["measure"] == measure).any():
        raise RunError(
            f"the suite doesn't measure {measure}; it measures: {', '.join(dict.fromkeys(systems.get('measure', [])))}"
        )
    rows = systems[systems["measure"] == measure].reset_index(drop=True)
    titles = rows["method"].map(lambda name: METHODS[name].title if name in METHODS else name)
    backbones = pd.Series([_backbone(*pair) for pair in zip(rows["method"], rows["backbone"], strict=True)])
    variants, data = rows["variant"], ["dataset", "protocol"]
    kinds = rows.groupby("variant")["method"].nunique()
    rows["series"] = ""
    if 1 < len(kinds) <= SERIES and (kinds > 1).all():
        rows["label"], rows["series"] = titles, variants.where(variants != "", "unchanged")
    elif (variants != "").all() and not rows.duplicated([*data, "backbone", "variant"]).any():
        rows["label"] = variants
    else:
        both = (variants != "") & (variants != titles)
        rows["label"] = titles.where(~both, titles + ", " + variants)
    rows["place"] = rows["series"].map({name: place for place, name in enumerate(dict.fromkeys(rows["series"]))})
    leaking = rows["flags"].str.contains(LABEL_LEAKING, regex=False)
    rows["label"] = rows["label"].where(~leaking, rows["label"] + " (LABEL-LEAKING IMPUTATION)")
    parts = []
    if rows[data].drop_duplicates().shape[0] > 1:
        parts.append(rows["dataset"] + ", protocol " + rows["protocol"])
    if backbones.nunique() > 1:
        if rows["label"].nunique() == 1:
            # One method on several encoders: these are the lines.
            parts.append(rows["label"])
            rows["label"] = backbones
        else:
            parts.append(backbones)
    rows["panel"] = pd.concat(parts, axis=1).agg(", ".join, axis=1) if parts else ""
    name = rows["label"].where(rows["series"] == "", rows["label"] + " " + rows["series"])
    rows["name"] = name.where(~name.duplicated(keep=False), name + " (" + rows["panel"] + ")")
    references = set(zip(comparisons["dataset"], comparisons["protocol"], comparisons["reference"], strict=True))
    # So `comparisons` names a reference.
    known = [(key[0], key[1], " ".join(part for part in key[2:] if part)) for key in rows[KEY].itertuples(index=False)]
    rows["is_reference"] = [key in references for key in known]
    return rows


def _backbone(method: str, backbone: str) -> str:
    if not reads_image(method):
        return "no image encoder"
    return " + ".join(BACKBONES[name].title if name in BACKBONES else name for name in backbone.split("+"))


def panels_of(rows: pd.DataFrame) -> list[Panel]:
    """Give every system its place."""
    panels, several = [], rows["place"].nunique() > 1
    for title, group in rows.groupby("panel", sort=False):
        parts, ticks, top = [], [], 0.0
        for label, members in group.groupby("label", sort=False):
            members = members.sort_values("place", kind="stable")
            lines = wrapped(str(label), LABEL)
            height = max(len(members), LINE / SLOT * (lines.count("\n") + 1)) + (0.6 if several else 0.1)
            middle = top + height / 2
            parts.append(members.assign(y=[middle + place - (len(members) - 1) / 2 for place in range(len(members))]))
            ticks.append((middle, lines, bool(members["is_reference"].any())))
            top += height
        panels.append(Panel(str(title), pd.concat(parts), ticks, top))
    return panels


def sizes(rows: pd.DataFrame) -> str:
    """Say how many images and patients the systems were tested on."""
    found = rows.drop_duplicates(["dataset", "images", "groups"])
    return " or ".join(
        f"{row['images']} images of {row['groups']} {_unit(row['dataset'])}" for row in found.to_dict("records")
    )


def units(rows: pd.DataFrame) -> str:
    """Say what the intervals resample."""
    return " or ".join(dict.fromkeys(map(_unit, rows["dataset"])))


def _unit(dataset: str) -> str:
    # ISIC-2019 doesn't name its patients.
    return "lesions" if dataset == "isic_2019" else "patients"


def remarks(rows: pd.DataFrame) -> list[str]:
    """Return what a reader must know before believing the marks, and of which systems."""
    flags: dict[str, list[int]] = {}
    for place, text in enumerate(rows["flags"]):
        # This one has a semicolon of its own.
        known = [LABEL_LEAKING] if LABEL_LEAKING in text else []
        for flag in [*known, *(part for part in text.replace(LABEL_LEAKING, "").split("; ") if part)]:
            if not _RUNS.fullmatch(flag):
                flags.setdefault(flag, []).append(place)
    result = [f"{flag[0].upper()}{flag[1:]} ({_or_all(rows.iloc[places], rows)})" for flag, places in flags.items()]
    partial = rows[rows["runs"] < rows["planned"]]
    counts = partial[["runs", "planned"]].drop_duplicates().to_numpy()
    if len(counts) == 1:
        result.append(f"Hatched: only {counts[0][0]} of {counts[0][1]} runs are finished ({_or_all(partial, rows)})")
    elif len(counts):
        each = ", ".join(f"{row['name']}: {row['runs']} of {row['planned']}" for row in partial.to_dict("records"))
        result.append(f"Hatched: not all runs are finished ({each})")
    return result


def names(rows: pd.DataFrame) -> str:
    """Name systems, if there are many the first few of them."""
    found = list(dict.fromkeys(rows["name"]))
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more


def _or_all(some: pd.DataFrame, rows: pd.DataFrame) -> str:
    if len(rows) > 1 and len(some) == len(rows):
        return "all systems"
    if len(some) > 1 and len(some) == rows["method"].map(reads_image).sum() and some["method"].map(reads_image).all():
        return "all systems that read images"
    return names(some)


def wrapped(text: str, width: int) -> str:
    """Break a text into lines of at most `width` letters."""
    return "\n".join(textwrap.wrap(text, width))


# Inches: a line of a panel's title, and what stands below the panels.
TITLE, BELOW = 0.17, 0.95


# Letters of a line of a panel's title and of an axis.
TITLE_LETTERS, AXIS_LETTERS = 40, 34


# Of the marks in a line.
STYLES = ((COLOURS[0], "o"), (COLOURS[4], "s"), (COLOURS[2], "^"), (COLOURS[3], "v"))


_HATCHED: dict[str, Any] = {
    "facecolor": "none",
    "edgecolor": FAINT,
    "hatch": "////",
    "linewidth": 0,
    "hatch_linewidth": 0.5,
}


@styled
def draw_systems(systems: pd.DataFrame, comparisons: pd.DataFrame, measure: str) -> ReportFigure:
    """Draw a measure of every system with its 95% interval, and the paper's number where there is one.

    Args:
        systems: `Aggregate.systems`.
        comparisons: `Aggregate.comparisons`; says which systems are references.
        measure: one of the suite's.

    Raises:
        RunError: the suite doesn't have the measure, or no system has a value of it.
    """
    rows = described(systems, comparisons, measure).assign(filled=True)
    drawn, without = rows[rows["pooled"].notna()], rows[rows["pooled"].isna()]
    if drawn.empty:
        raise RunError(f"no system of the suite has a value of {measure} yet: there is nothing to draw")
    alike = pd.Series(
        [not average or measure.endswith(f"_{average}") for average in drawn["paper_average"]], index=drawn.index
    )
    otherwise = drawn[drawn["paper"].notna() & ~alike]
    drawn = drawn.assign(paper=drawn["paper"].where(alike))
    any_paper = bool(drawn["paper"].notna().any())
    panels = panels_of(drawn)
    figure, axes = _figure(drawn, panels)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, "pooled", ".3f")
        axis.plot(
            panel.rows["paper"], panel.rows["y"], "D", color=INK, fillstyle="none", markersize=4.5, markeredgewidth=0.9
        )
    name = _measure_name(measure)
    axes[-1].set_xlabel(
        f"{wrapped(name, AXIS_LETTERS)}\n({'lower' if measure in LESS_IS_BETTER else 'higher'} is better)"
    )
    paper = Line2D(
        [], [], linestyle="", marker="D", color=INK, fillstyle="none", markersize=4.5, label="the paper's number"
    )
    _legend(figure, drawn, [paper] if any_paper else [])
    interval = (
        f"line: its 95% interval from resampling {units(drawn)}" if drawn["low"].notna().any() else "without intervals"
    )
    caption = _caption(
        f"Mark: {name} of the test predictions of all folds together, averaged over seeds; {interval} ({sizes(drawn)})",
        "Hollow diamond: the number that the paper prints, which has no interval" if any_paper else "",
        f"Averaged in another way, and therefore not drawn, is the paper's number of {names(otherwise)}"
        if len(otherwise)
        else "",
        f"Bold and shaded: the reference, {_references(drawn)}" if drawn["is_reference"].any() else "",
        *remarks(drawn),
        f"Without a value: {names(without)}" if len(without) else "",
    )
    alt = "; ".join(
        f"{row['name']} {_interval(row, 'pooled', '.3f')}"
        + ("" if pd.isna(row["paper"]) else f", paper {row['paper']:.3f}")
        for row in drawn.to_dict("records")
    )
    data = drawn[[*KEY, "measure", "pooled", "low", "high", "paper", "is_reference", "runs", "planned", "flags"]]
    return ReportFigure(
        f"systems_{_slug(measure)}", f"All systems: {name}", caption, alt, figure, data.reset_index(drop=True)
    )


@styled
def draw_ablation(systems: pd.DataFrame, comparisons: pd.DataFrame, measure: str) -> ReportFigure:
    """Draw how far every system is from the reference, with intervals and a line at zero.

    Args:
        systems: `Aggregate.systems`.
        comparisons: `Aggregate.comparisons`.
        measure: one of the suite's.

    Raises:
        RunError: the suite doesn't have the measure, or nothing is compared by it.
    """
    every = described(systems, comparisons, measure)
    compared = comparisons[comparisons["measure"] == measure]
    rows = compared.merge(
        every.drop(columns=["measure", "low", "high", "difference"]), on=KEY, how="left", validate="one_to_one"
    )
    rows = rows.assign(is_reference=False, filled=rows["p_holm"] < SIGNIFICANT)
    drawn, without = rows[rows["difference"].notna()], rows[rows["difference"].isna()]
    if drawn.empty:
        raise RunError(f"no system of the suite is compared with a reference by {measure}: there is nothing to draw")
    panels = panels_of(drawn)
    figure, axes = _figure(drawn, panels)
    for axis, panel in zip(axes, panels, strict=True):
        axis.axvline(0, color=INK, linewidth=0.8)
        _draw_panel(axis, panel, "difference", "+.3f")
    tests = int(compared["p"].notna().sum())
    name, less = _measure_name(measure), measure in LESS_IS_BETTER
    ends = ("better", "worse") if less else ("worse", "better")
    axes[-1].set_xlabel(f"{wrapped(f'difference in {name}', AXIS_LETTERS)}\n← {ends[0]}     {ends[1]} →")
    _legend(figure, drawn, [])
    caption = _caption(
        f"How far a system's {name} is from that of the reference ({_references(every)}) on the same test images "
        f"({sizes(drawn)}); line: 95% interval from resampling {units(drawn)}, the same for both",
        f"{'Left' if less else 'Right'} of zero: better than the reference",
        f"Filled: differs from the reference (p < {SIGNIFICANT} after Holm's correction for {tests} comparison{'s' * (tests > 1)}); "
        "hollow: which is better can't be told",
        *remarks(drawn),
        f"Not compared: {names(without)}" if len(without) else "",
    )
    alt = "; ".join(
        f"{row['name']} {_interval(row, 'difference', '+.3f')}"
        + ("" if pd.isna(row["p_holm"]) else f", p {row['p_holm']:.3f}")
        for row in drawn.to_dict("records")
    )
    data = drawn[[*KEY, "reference", "measure", "difference", "low", "high", "p_holm", "runs", "planned", "flags"]]
    return ReportFigure(
        f"ablation_{_slug(measure)}",
        f"Distance from the reference: {name}",
        caption,
        alt,
        figure,
        data.reset_index(drop=True),
    )


def _figure(rows: pd.DataFrame, panels: list[Panel]) -> tuple[Figure, list[Axes]]:
    """Return a figure with one pair of axes a panel, high enough for its rows."""
    heights = [SLOT * panel.height for panel in panels]
    titles = sum(TITLE * len(wrapped(panel.title, TITLE_LETTERS).splitlines()) + 0.08 for panel in panels)
    return new_figure(
        sum(heights) + titles + BELOW + SLOT * rows["place"].nunique(), len(panels), sharex=True, height_ratios=heights
    )


def _draw_panel(axis: Axes, panel: Panel, value: str, form: str) -> None:
    """Draw marks, intervals, labels at the left, numbers at the right, and what is behind them."""
    for row in panel.rows.to_dict("records"):
        colour, marker = STYLES[row["place"]]
        axis.plot([row["low"], row["high"]], [row["y"], row["y"]], color=colour, linewidth=1.3)
        axis.plot(
            row[value],
            row["y"],
            marker,
            color=colour,
            markersize=4.2,
            markerfacecolor=colour if row["filled"] else PAPER,
        )
        if row["runs"] < row["planned"]:
            band = axis.axhspan(row["y"] - 0.5, row["y"] + 0.5, zorder=0.4)
            band.set(**_HATCHED)
        if row["is_reference"]:
            axis.axhspan(row["y"] - 0.5, row["y"] + 0.5, color=FAINT, alpha=0.35, linewidth=0, zorder=0.3)
    axis.set_ylim(panel.height, 0)
    axis.set_yticks([y for y, _, _ in panel.ticks], [label for _, label, _ in panel.ticks])
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.locator_params(axis="x", nbins=6)
    for text, (_, _, reference) in zip(axis.get_yticklabels(), panel.ticks, strict=True):
        text.set_fontweight("bold" if reference else "normal")
    numbers = axis.secondary_yaxis("right")
    numbers.set_yticks(panel.rows["y"].tolist(), [_signed(row, form) for row in panel.rows[value]])
    numbers.tick_params(length=0, labelsize=7)
    numbers.spines["right"].set_visible(False)
    axis.set_title(wrapped(panel.title, TITLE_LETTERS))


def _legend(figure: Figure, rows: pd.DataFrame, handles: list[Line2D]) -> None:
    """Explain the marks below the panels, where there is something to explain."""
    series = rows.drop_duplicates("place").sort_values("place")
    shown: list[Line2D | Patch] = []
    if len(series) > 1:
        for name, place in zip(series["series"], series["place"], strict=True):
            colour, marker = STYLES[place]
            shown.append(Line2D([], [], color=colour, marker=marker, markersize=4.2, label=name))
    shown += handles
    if (rows["runs"] < rows["planned"]).any():
        shown.append(Patch(**_HATCHED, label="runs are missing"))
    if shown:
        figure.legend(handles=shown, loc="outside lower center", ncols=2 if len(shown) in (2, 4) else 3)


def _references(rows: pd.DataFrame) -> str:
    return ", ".join(dict.fromkeys(rows.loc[rows["is_reference"], "label"]))


def _caption(*sentences: str) -> str:
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def _measure_name(measure: str) -> str:
    return MEASURE_NAMES.get(measure.replace("malignant.", "malignant_"), measure)


def _interval(row: Mapping[Any, Any], value: str, form: str) -> str:
    bounds = "" if pd.isna(row["low"]) else f" [{_signed(row['low'], form)}, {_signed(row['high'], form)}]"
    return _signed(row[value], form) + bounds


def _signed(value: float, form: str) -> str:
    return format(value, form).replace("-", "−")


def _slug(measure: str) -> str:
    return re.sub(r"\W+", "_", measure)
