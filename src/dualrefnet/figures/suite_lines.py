"""The systems of a suite as the lines of a picture: what they are called, where they stand, and what must be said of them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

import pandas as pd

from dualrefnet.errors import RunError
from dualrefnet.models.backbones import BACKBONES
from dualrefnet.models.registry import METHODS
from dualrefnet.suite.aggregate import LABEL_LEAKING
from dualrefnet.suite.collect import Key, reads_image

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
        The rows with `panel`, `label` (of a line of the panel), `series` (which of several marks in a line; empty if every
        line has one) and its number `place`, `name` (for captions), and `is_reference`.

    Raises:
        RunError: the suite doesn't have the measure.
    """
    if systems.empty or not (systems["measure"] == measure).any():
        raise RunError(f"the suite doesn't measure {measure}; it measures: {', '.join(dict.fromkeys(systems.get('measure', [])))}")
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
    return " or ".join(f"{row['images']} images of {row['groups']} {_unit(row['dataset'])}" for row in found.to_dict("records"))


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
