"""Figures of a suite: every system with its interval, and the difference of each from the reference."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from dualrefnet.display.figure import COLOURS, FAINT, INK, PAPER, ReportFigure, new_figure, styled
from dualrefnet.display.format import MEASURE_NAMES, SIGNIFICANT, estimate, number
from dualrefnet.errors import RunError
from dualrefnet.evaluation.bootstrap import images_of
from dualrefnet.models.backbones import backbone_title
from dualrefnet.models.registry import METHODS
from dualrefnet.suite.grid import Key
from dualrefnet.suite.results import LABEL_LEAKING, reads_image
from dualrefnet.suite.tables import LESS_IS_BETTER, with_flags_as_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

KEY = list(Key._fields)
# Inches: between two marks, between the lines of a label, of a line of a panel's title, and below the panels.
SLOT, LINE, TITLE, BELOW = 0.165, 0.125, 0.17, 0.95
# Letters of a line: of a label, of a panel's title, of an axis.
LABEL, TITLE_LETTERS, AXIS_LETTERS = 25, 40, 34
# Marks that one line of a panel can hold, and systems that a caption names one by one.
STYLES = ((COLOURS[0], "o"), (COLOURS[4], "s"), (COLOURS[2], "^"), (COLOURS[3], "v"))
NAMED = 6
_HATCHED: dict[str, Any] = {"facecolor": "none", "edgecolor": FAINT, "hatch": "////", "linewidth": 0}
_PAPER: dict[str, Any] = {"color": INK, "fillstyle": "none", "markersize": 4.5, "markeredgewidth": 0.9}


class Panel(NamedTuple):
    """Systems that share axes: `rows` with their place `y` in slots, and (y, label, reference?) of each line in
    `ticks`.
    """

    title: str
    rows: pd.DataFrame
    ticks: list[tuple[float, str, bool]]
    height: float


def describe(systems: pd.DataFrame, comparisons: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the systems' rows of one measure with their names."""
    if systems.empty or not (systems["measure"] == measure).any():
        measures = ", ".join(dict.fromkeys(systems.get("measure", [])))
        raise RunError(f"the suite doesn't measure {measure}; it measures: {measures}")
    rows = systems[systems["measure"] == measure].reset_index(drop=True)
    titles = rows["method"].map(lambda name: METHODS[name].title if name in METHODS else name)
    backbones = pd.Series(map(_backbone, rows["method"], rows["backbone"]))
    variants, data = rows["variant"], ["dataset", "protocol"]
    methods = rows.groupby("variant")["method"].nunique()
    rows["series"] = ""
    if 1 < len(methods) <= len(STYLES) and (methods > 1).all():
        rows["label"], rows["series"] = titles, variants.where(variants != "", "unchanged")
    elif (variants != "").all() and not rows.duplicated([*data, "backbone", "variant"]).any():
        rows["label"] = variants
    else:
        rows["label"] = titles.where((variants == "") | (variants == titles), titles + ", " + variants)
    rows["place"] = pd.factorize(rows["series"])[0]
    leaking = rows["flags"].map(lambda flags: LABEL_LEAKING in flags)
    rows["label"] += leaking.map({True: " (LABEL-LEAKING IMPUTATION)", False: ""})
    parts = []
    if rows[data].drop_duplicates().shape[0] > 1:
        parts.append(rows["dataset"] + ", protocol " + rows["protocol"])
    if backbones.nunique() > 1 and rows["label"].nunique() == 1:
        # One method on several encoders: these are the lines.
        parts.append(rows["label"])
        rows["label"] = backbones
    elif backbones.nunique() > 1:
        parts.append(backbones)
    rows["panel"] = pd.concat(parts, axis=1).agg(", ".join, axis=1) if parts else ""
    name = (rows["label"] + " " + rows["series"]).str.strip()
    rows["name"] = name.where(~name.duplicated(keep=False), name + " (" + rows["panel"] + ")")
    references = set(zip(comparisons["dataset"], comparisons["protocol"], comparisons["reference"], strict=True))
    keys = rows[KEY].itertuples(index=False, name=None)
    rows["is_reference"] = [(*key[:2], " ".join(filter(None, key[2:]))) in references for key in keys]
    return rows


def _backbone(method: str, backbone: str) -> str:
    if not reads_image(method):
        return "no image encoder"
    return " + ".join(backbone_title(name) for name in backbone.split("+"))


def sizes(rows: pd.DataFrame) -> str:
    """Return how many images and patients (or lesions) the systems were tested on."""
    found = rows.drop_duplicates(["dataset", "images", "groups"])
    return " or ".join(
        images_of(row["images"], row["groups"], row["unit"], "images") for row in found.to_dict("records")
    )


def units(rows: pd.DataFrame) -> str:
    return " or ".join(f"{unit}s" for unit in dict.fromkeys(rows["unit"]) if unit) or "groups"


def names(some: pd.DataFrame, rows: pd.DataFrame | None = None, most: int = NAMED) -> str:
    """Name systems; if there are many the first few of them, and if they are all of `rows` none."""
    if rows is not None and len(some) > 1:
        if len(some) == len(rows):
            return "all systems"
        if some["method"].map(reads_image).all() and len(some) == rows["method"].map(reads_image).sum():
            return "all systems that read images"
    found = list(dict.fromkeys(some["name"]))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def by_flag(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    flags = dict.fromkeys(flag for flags in rows["flags"] for flag in flags)
    return {flag: rows[[flag in flags for flags in rows["flags"]]] for flag in flags}


@styled
def draw_systems(systems: pd.DataFrame, comparisons: pd.DataFrame, measure: str) -> ReportFigure:
    """Draw a measure of every system with its 95% interval, and the paper's number where there is one."""
    from matplotlib.lines import Line2D

    rows = describe(systems, comparisons, measure).assign(filled=True)
    drawn, without = rows[rows["pooled"].notna()], rows[rows["pooled"].isna()]
    if drawn.empty:
        raise RunError(f"no system of the suite has a value of {measure} yet: there is nothing to draw")
    alike = pd.Series([measure.endswith(average) for average in drawn["paper_average"]], index=drawn.index)
    otherwise = drawn[drawn["paper"].notna() & ~alike]
    drawn = drawn.assign(paper=drawn["paper"].where(alike))
    printed = bool(drawn["paper"].notna().any())
    legend = [Line2D([], [], linestyle="", marker="D", label="the paper's number", **_PAPER)] if printed else []
    figure, panels = _interval_plot(drawn, "pooled", ".3f", legend)
    for axis, panel in panels:
        axis.plot(panel.rows["paper"], panel.rows["y"], "D", **_PAPER)
    name = _measure_name(measure)
    better = "lower" if measure in LESS_IS_BETTER else "higher"
    axis.set_xlabel(f"{_wrapped(name, AXIS_LETTERS)}\n({better} is better)")
    line = f"line: 95% interval over {units(drawn)}" if drawn["low"].notna().any() else "without intervals"
    caption = _caption(
        f"Mark: {name} of the pooled test predictions of all folds, averaged over seeds; {line} ({sizes(drawn)})",
        "Hollow diamond: the number printed in the paper, without an interval" if printed else "",
        f"Not drawn, because it is averaged differently: the paper's number of {names(otherwise)}"
        if len(otherwise)
        else "",
        f"Bold and shaded: the reference, {_references(drawn)}" if drawn["is_reference"].any() else "",
        *_notes(drawn),
        f"Without a value: {names(without)}" if len(without) else "",
    )
    paper = ["" if pd.isna(value) else f", paper {value:.3f}" for value in drawn["paper"]]
    alt = _alt(drawn, "pooled", ".3f", paper)
    columns = [*KEY, "measure", "pooled", "low", "high", "paper", "is_reference", "runs", "planned", "flags"]
    return ReportFigure(
        f"systems_{_slug(measure)}", f"All systems: {name}", caption, alt, figure, _data(drawn, columns)
    )


@styled
def draw_ablation(systems: pd.DataFrame, comparisons: pd.DataFrame, measure: str) -> ReportFigure:
    """Draw the difference of every system from the reference, with its 95% interval and a line at zero."""
    every = describe(systems, comparisons, measure)
    compared = comparisons[comparisons["measure"] == measure]
    others = every.drop(columns=["measure", "low", "high", "difference"])
    rows = compared.merge(others, on=KEY, how="left", validate="one_to_one")
    rows = rows.assign(is_reference=False, filled=rows["p_holm"] < SIGNIFICANT)
    drawn, without = rows[rows["difference"].notna()], rows[rows["difference"].isna()]
    if drawn.empty:
        raise RunError(f"no system of the suite is compared with a reference by {measure}: there is nothing to draw")
    figure, panels = _interval_plot(drawn, "difference", "+.3f")
    for axis, _ in panels:
        axis.axvline(0, color=INK, linewidth=0.8)
    name, less = _measure_name(measure), measure in LESS_IS_BETTER
    ends = ("better", "worse") if less else ("worse", "better")
    axis.set_xlabel(f"{_wrapped(f'difference in {name}', AXIS_LETTERS)}\n← {ends[0]}     {ends[1]} →")
    tests = int(compared["p"].notna().sum())
    caption = _caption(
        f"Difference in {name} from the reference ({_references(every)}) on the same test images ({sizes(drawn)}); "
        f"line: 95% interval of the paired bootstrap over {units(drawn)}",
        f"Filled: p < {SIGNIFICANT} after Holm's correction for {tests} comparison{'s' * (tests > 1)}; hollow: not "
        "significant",
        *_notes(drawn),
        f"Not compared: {names(without)}" if len(without) else "",
    )
    alt = _alt(drawn, "difference", "+.3f", ["" if pd.isna(p) else f", p {p:.3f}" for p in drawn["p_holm"]])
    columns = [*KEY, "reference", "measure", "difference", "low", "high", "p_holm", "runs", "planned", "flags"]
    title = f"Difference from the reference: {name}"
    return ReportFigure(f"ablation_{_slug(measure)}", title, caption, alt, figure, _data(drawn, columns))


def _interval_plot(
    rows: pd.DataFrame, value: str, form: str, legend: Sequence[Line2D] = ()
) -> tuple[Figure, list[tuple[Axes, Panel]]]:
    """Draw marks, intervals, labels at the left and numbers at the right, one panel below the other."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels = _panels(rows)
    series = rows.drop_duplicates("place").sort_values("place")
    heights = [SLOT * panel.height for panel in panels]
    titles = sum(TITLE * len(_wrapped(panel.title, TITLE_LETTERS).splitlines()) + 0.08 for panel in panels)
    height = sum(heights) + titles + BELOW + SLOT * len(series)
    figure, axes = new_figure(height, len(panels), sharex=True, height_ratios=heights)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, value, form)
    shown: list[Line2D | Patch] = []
    if len(series) > 1:
        for name, (colour, marker) in zip(series["series"], STYLES, strict=False):
            shown.append(Line2D([], [], color=colour, marker=marker, markersize=4.2, label=name))
    shown += legend
    if (rows["runs"] < rows["planned"]).any():
        shown.append(Patch(**_HATCHED, label="runs are missing"))
    if shown:
        figure.legend(handles=shown, loc="outside lower center", ncols=2 if len(shown) in (2, 4) else 3)
    return figure, list(zip(axes, panels, strict=True))


def _panels(rows: pd.DataFrame) -> list[Panel]:
    panels, several = [], rows["place"].nunique() > 1
    for title, group in rows.groupby("panel", sort=False):
        parts, ticks, top = [], [], 0.0
        for label, members in group.groupby("label", sort=False):
            members = members.sort_values("place", kind="stable")
            text = _wrapped(str(label), LABEL)
            height = max(len(members), LINE / SLOT * (text.count("\n") + 1)) + (0.6 if several else 0.1)
            middle = top + height / 2
            parts.append(members.assign(y=[middle + place - (len(members) - 1) / 2 for place in range(len(members))]))
            ticks.append((middle, text, bool(members["is_reference"].any())))
            top += height
        panels.append(Panel(str(title), pd.concat(parts), ticks, top))
    return panels


def _draw_panel(axis: Axes, panel: Panel, value: str, form: str) -> None:
    for row in panel.rows.to_dict("records"):
        colour, marker = STYLES[row["place"]]
        face = colour if row["filled"] else PAPER
        axis.plot([row["low"], row["high"]], [row["y"], row["y"]], color=colour, linewidth=1.3)
        axis.plot(row[value], row["y"], marker, color=colour, markersize=4.2, markerfacecolor=face)
        if row["runs"] < row["planned"]:
            axis.axhspan(row["y"] - 0.5, row["y"] + 0.5, zorder=0.4).set(**_HATCHED)
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
    numbers.set_yticks(panel.rows["y"].tolist(), [number(each, form) for each in panel.rows[value]])
    numbers.tick_params(length=0, labelsize=7)
    numbers.spines["right"].set_visible(False)
    axis.set_title(_wrapped(panel.title, TITLE_LETTERS))


def _notes(rows: pd.DataFrame) -> list[str]:
    """Return what limits the validity of the marks, and of which systems."""
    notes = [f"{flag[0].upper()}{flag[1:]} ({names(some, rows)})" for flag, some in by_flag(rows).items()]
    partial = rows[rows["runs"] < rows["planned"]]
    if len(partial):
        each = [f"{row.name}: {row.runs} of {row.planned}" for row in partial.itertuples(index=False)]
        notes.append(f"Hatched: not all runs are finished ({', '.join(each)})")
    return notes


def _references(rows: pd.DataFrame) -> str:
    return ", ".join(dict.fromkeys(rows.loc[rows["is_reference"], "label"]))


def _caption(*sentences: str) -> str:
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def _alt(rows: pd.DataFrame, value: str, form: str, ends: list[str]) -> str:
    each = zip(rows["name"], rows[value], rows["low"], rows["high"], ends, strict=True)
    return "; ".join(f"{name} {estimate(middle, low, high, form)}{end}" for name, middle, low, high, end in each)


def _data(rows: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return with_flags_as_text(rows)[columns].reset_index(drop=True)


def _measure_name(measure: str) -> str:
    return MEASURE_NAMES.get(measure.replace("malignant.", "malignant_"), measure)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _slug(measure: str) -> str:
    return re.sub(r"\W+", "_", measure)
