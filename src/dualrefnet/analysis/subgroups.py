"""The levels of a metadata field between which results are compared: categories, yes and no, bands of numbers."""

# also: One part of a test side against another: which measures have enough patients, and how far they are apart.
# also: Do results hold for everyone? Every level of a field (women, men) against all other images for which the field
# is recorded.
# also: Pictures of subgroups: a measure of every level with its interval, and how far each is from the others; one
# panel a field.

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.data.schema import DatasetSchema, MetadataField
from dualrefnet.display.figure import FAINT, INK, PAPER, PRIMARY, SECONDARY, ReportFigure, new_figure, styled, truncate
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import Bootstrap, group_codes, percentile_interval, wilson_interval
from dualrefnet.evaluation.metrics import WeightedMetrics, check_predictions
from dualrefnet.progress import progress_bar

NOT_RECORDED = "not recorded"


# Bands of every number that counts years: first year of each but the first.
AGES = (40, 60, 80)


def field_levels(values: pd.Series, field: MetadataField) -> tuple[pd.Series, list[str]]:
    """Return the level of every row, and all levels in their order: those that occur and those that the field declares.

    Years are divided into bands (below 40, 40-59, 60-79, 80 and over), other numbers at the thirds of these rows. What
    is missing, or
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
        names = (
            [f"below {edges[0]:g}{unit}", *between, f"{edges[-1]:g}{unit} and over"]
            if edges
            else ["all"] * (len(known) > 0)
        )
    place = np.searchsorted(edges, numbers.to_numpy(), side="right")
    levels = pd.Series(
        [NOT_RECORDED if missing else names[at] for at, missing in zip(place, numbers.isna(), strict=True)],
        numbers.index,
    )
    return levels, names


Floats = NDArray[np.float64]


Bounds = tuple[float, float]


NAN = float("nan")


NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "auc_macro_ovr": "AUC, mean of classes",
    "malignant.sensitivity": "sensitivity for cancer",
    "malignant.specificity": "specificity for cancer",
    "malignant.auc": "AUC of cancer or not",
    "overconfidence": "overconfidence",
    "ece": "expected calibration error",
}


# The error grows as images get fewer: resamples lie above it, and a small level's gap would always look bad.
WITHOUT_INTERVAL = ("ece",)


# Averages over classes, and the value of each class of which they are made.
_AVERAGES = {"balanced_accuracy": "sensitivity", "auc_macro_ovr": "auc"}


# Shares of images: how many of which.
_SHARES = ("accuracy", "malignant.sensitivity", "malignant.specificity")


# A level with fewer has no numbers; and fewer patients of a class on one side: it isn't compared.
MINIMUM_IMAGES, MINIMUM_PATIENTS, MINIMUM_OF_CLASS = 20, 10, 5


class Part(WeightedMetrics):
    """Images whose overconfidence is measured, too."""

    def measure(self, weights: Floats) -> dict[str, Floats]:
        """Return the measures of `WeightedMetrics`, and `overconfidence`: mean confidence less accuracy."""
        values = super().measure(weights)
        total = weights @ self.confusion.sum(axis=1)
        surplus = weights @ self.errors.gaps.sum(axis=1)
        values["overconfidence"] = np.divide(-surplus, total, out=np.full(len(total), np.nan), where=total > 0)
        return values


@dataclass(frozen=True)
class Whole:
    """All images of a test side.

    Attributes:
        labels: (N,).
        scores: (N, C).
        codes: (N,), patients 0..G-1.
        size: G.
        classes: names.
        malignant: names.
    """

    labels: NDArray[np.int64]
    scores: Floats
    codes: NDArray[np.int64]
    size: int
    classes: list[str]
    malignant: list[str]

    @classmethod
    def of(cls, predictions: pd.DataFrame, codes: NDArray[np.int64], schema: DatasetSchema) -> Whole:
        """Take rows of `predictions.csv`; `codes`: (N,), patients 0..G-1."""
        position = {name: index for index, name in enumerate(schema.classes)}
        labels = predictions["label"].map(position).to_numpy(dtype=np.int64)
        truth, scores = check_predictions(
            labels, predictions[[f"prob_{name}" for name in schema.classes]].to_numpy(dtype=float)
        )
        return cls(truth, scores, codes, int(codes.max()) + 1, list(schema.classes), list(schema.malignant))

    @property
    def measures(self) -> list[str]:
        """Keys of `NAMES` that these classes have."""
        return [name for name in NAMES if self.malignant or not name.startswith("malignant.")]

    @property
    def cancer(self) -> NDArray[np.bool_]:
        """Which images show a cancer, (N,)."""
        return np.isin(self.classes, self.malignant)[self.labels]

    def part(self, mask: NDArray[np.bool_]) -> Part:
        """Return some of the images, ready for resamples of all patients."""
        return Part(self.labels[mask], self.scores[mask], self.codes[mask], self.classes, self.malignant, self.size)

    def patients(self, mask: NDArray[np.bool_]) -> int:
        """Return the number of patients of some images."""
        return len(np.unique(self.codes[mask]))

    def support(self, mask: NDArray[np.bool_]) -> dict[str, object]:
        """Return what `Subgroups.levels` says of some images."""
        images, patients = int(mask.sum()), self.patients(mask)
        gone = sorted(set(self.labels) - set(self.labels[mask])) if images else []
        return {
            "images": images,
            "patients": patients,
            "malignant": int(self.cancer[mask].sum()) if self.malignant else NAN,
            "measured": images >= MINIMUM_IMAGES and patients >= MINIMUM_PATIENTS,
            "missing": ", ".join(self.classes[index] for index in gone),
        }


class Side:
    """One side of a comparison: which measures have enough patients, and what the resamples gave.

    Args:
        test: the test side.
        mask: (N,), the images of this side.
        drawn: what `draw` gave for `test.part(mask)`.
        level: coverage of the intervals.
    """

    def __init__(self, test: Whole, mask: NDArray[np.bool_], drawn: dict[str, Floats], level: float) -> None:
        self.drawn, self.level, self.test = drawn, level, test
        self.point = test.part(mask).measure(np.ones((1, test.size)))
        self.patients = test.patients(mask)
        self.enough = int(mask.sum()) >= MINIMUM_IMAGES and self.patients >= MINIMUM_PATIENTS
        self.of_class = [test.patients(mask & (test.labels == index)) for index in range(len(test.classes))]
        self.ill, self.well = test.patients(mask & test.cancer), test.patients(mask & ~test.cancer)

    def about(self, measure: str) -> int:
        """Return the number of patients that a measure is about; of the rarer kind if there are two."""
        kinds = {
            "malignant.sensitivity": self.ill,
            "malignant.specificity": self.well,
            "malignant.auc": min(self.ill, self.well),
        }
        return kinds.get(measure, self.patients)

    def bounds(self, measure: str, value: float, drawn: Floats) -> Bounds:
        """Return the interval; NaN where all resamples agree and the measure is no share."""
        if measure in _SHARES and value in (0, 1):
            return wilson_interval(int(value) * self.about(measure), self.about(measure), self.level)
        return (NAN, NAN) if _agree(drawn) else percentile_interval(drawn, self.level) or (NAN, NAN)


def compare(one: Side, other: Side | None, measure: str, level: float, counted: bool) -> dict[str, object]:
    """Return value, interval and gap of one measure of one level: what a row of `Subgroups.table` says.

    Args:
        one: the level.
        other: the images with which it is compared; None: there are none.
        measure: a key of `NAMES`.
        level: coverage of the gap's interval.
        counted: whether no comparison of the same images stands above.
    """
    classes = one.test.classes
    result: dict[str, object] = dict.fromkeys(("value", "low", "high", "others", "gap", "gap_low", "gap_high"), NAN)
    result |= {"flagged": False, "counted": counted, "classes": ""}
    if measure in _AVERAGES:
        shared = [
            name
            for name, here, there in zip(classes, one.of_class, other.of_class if other else one.of_class, strict=True)
            if min(here, there) >= MINIMUM_OF_CLASS
        ]
        result["classes"] = ", ".join(shared)
        if len(shared) < 2:
            return result
        keys = [f"per_class.{name}.{_AVERAGES[measure]}" for name in shared]
    elif one.about(measure) < MINIMUM_OF_CLASS:
        return result
    else:
        keys = [measure]
    mine, values = _stack(one.drawn, keys), float(_stack(one.point, keys).mean())
    result["value"] = values
    if measure in WITHOUT_INTERVAL:
        return result
    result["low"], result["high"] = one.bounds(measure, values, _mean(mine))
    if other is None or not other.enough or other.about(measure) < MINIMUM_OF_CLASS:
        return result
    theirs, others = _stack(other.drawn, keys), float(_stack(other.point, keys).mean())
    gap = values - others
    result |= {"others": others, "gap": gap}
    if _agree(_mean(mine)) or _agree(_mean(theirs)):
        low, high = one.bounds(measure, values, _mean(mine))
        other_low, other_high = other.bounds(measure, others, _mean(theirs))
        bounds = (gap - np.hypot(values - low, other_high - others), gap + np.hypot(high - values, others - other_low))
    else:
        # Class by class: one that vanished from a resample on either side is left out on both.
        bounds = percentile_interval(_mean(mine - theirs), level) or (NAN, NAN)
    result["gap_low"], result["gap_high"] = float(bounds[0]), float(bounds[1])
    result["flagged"] = bool(bounds[0] > 0 or bounds[1] < 0)
    return result


def _stack(values: dict[str, Floats], keys: list[str]) -> Floats:
    return np.stack([values[key] for key in keys])


def _mean(values: Floats) -> Floats:
    """Average (K, S) over the defined values of each resample; NaN if there are none."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=0)
    result: Floats = np.divide(
        np.where(defined, values, 0).sum(axis=0), count, out=np.full(values.shape[1], np.nan), where=count > 0
    )
    return result


def _agree(drawn: Floats) -> bool:
    """Return whether all resamples give the same value, or none."""
    defined = drawn[~np.isnan(drawn)]
    return not len(defined) or bool(np.ptp(defined) < 1e-12)


@dataclass(frozen=True)
class Subgroups:
    """Results by level.

    Attributes:
        levels: one row a level: `field`, `level`, `images`, `patients`, `malignant` (images; NaN if no class is),
            `measured`
            (whether it has numbers), `missing` (classes of the test side that it lacks, separated by commas).
            Categories that the
            schema names and no image has are there with 0 images.
        table: one row a measured level and measure: `field`, `level`, `measure`, `value`, `low`, `high`, `others` (the
            value of all
            the images that it is compared with), `gap` (value - others), `gap_low`, `gap_high`, `flagged` (0 lies
            outside the gap's
            interval), `counted` (False: a comparison of the same images stands above, such as women with men for men
            with women),
            `classes` (over which the measure runs).
            NaN: undefined, too few patients, or no interval.
        overall: measure -> value of the whole test side.
        descriptions: field -> its question in plain words.
        images: number in the test side.
        groups: number of patients.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage of the intervals.
    """

    levels: pd.DataFrame
    table: pd.DataFrame
    overall: dict[str, float]
    descriptions: dict[str, str]
    images: int
    groups: int
    samples: int
    seed: int
    level: float

    @property
    def looked_at(self) -> int:
        """Number of gaps with an interval."""
        return int((self.table["counted"] & self.table["gap_low"].notna()).sum())

    @property
    def flagged(self) -> int:
        """Number of them whose interval doesn't hold 0."""
        return int((self.table["counted"] & self.table["flagged"]).sum())

    @property
    def by_chance(self) -> float:
        """How many would be flagged, on average, if results were the same for all."""
        return (1 - self.level) * self.looked_at

    def frame(self) -> pd.DataFrame:
        """Return everything as one tidy table: one row a level and measure, one row for a level without numbers."""
        return self.levels.merge(self.table, on=["field", "level"], how="left", sort=False)


def measure_subgroups(
    predictions: pd.DataFrame,
    rows: pd.DataFrame,
    groups: pd.Series,
    schema: DatasetSchema,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
) -> Subgroups:
    """Measure every level of every field with `subgroup`, and how far it is from the others.

    Args:
        predictions: rows of `predictions.csv`, of the test side: `image_id`, `label` and `prob_<CLASS>`.
        rows: the lesion table's rows; those of other images don't matter.
        groups: image id -> patient (of ISIC-2019: lesion).
        schema: of the lesion table.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage of the intervals.
        progress: called with (samples done, samples in all).

    Raises:
        DataError: no field is marked with `subgroup`, or rows or groups of images are missing.
        ValueError: see `check_predictions` and `group_codes`.
    """
    fields = [field for field in schema.fields if field.subgroup]
    if not fields:
        raise DataError(
            f"no metadata field of {schema.title} is marked with `subgroup: true`: there is nothing to compare"
        )
    ids = predictions["image_id"]
    absent = set(ids) - (set(rows["image_id"]) & set(groups.index))
    if absent:
        raise DataError(
            f"{len(absent)} predicted images aren't in the lesion table or the split; are these the data of the run?"
        )
    rows = rows.set_index("image_id").loc[ids]
    test = Whole.of(predictions, group_codes(groups.loc[ids].to_numpy()), schema)

    level_rows, sides, counted = [], [], []
    seen: set[frozenset[bytes]] = set()
    for field in fields:
        values, order = field_levels(rows[field.name], field)
        recorded = (values != NOT_RECORDED).to_numpy()
        for name in order:
            mine = (values == name).to_numpy()
            theirs = ~mine & recorded
            level_rows.append({"field": field.name, "level": name, **test.support(mine)})
            sides.append((mine, theirs))
            pair = frozenset([mine.tobytes(), theirs.tobytes()])
            counted.append(pair not in seen)
            if level_rows[-1]["measured"]:
                seen.add(pair)
    levels = pd.DataFrame(level_rows)
    chosen = np.flatnonzero(levels["measured"])
    parts = [test.part(mask) for index in chosen for mask in sides[index] if mask.any()]
    bootstrap = Bootstrap(test.codes, len(test.codes), samples, seed, level, progress)
    drawn = iter(bootstrap.resample_each({number: part.measure for number, part in enumerate(parts)}).values())

    records = []
    for index in chosen:
        one = Side(test, sides[index][0], next(drawn), level)
        other = Side(test, sides[index][1], next(drawn), level) if sides[index][1].any() else None
        key = {"field": levels["field"][index], "level": levels["level"][index]}
        records += [
            {**key, "measure": measure, **compare(one, other, measure, level, counted[index])}
            for measure in test.measures
        ]
    columns = [
        "field",
        "level",
        "measure",
        "value",
        "low",
        "high",
        "others",
        "gap",
        "gap_low",
        "gap_high",
        "flagged",
        "counted",
        "classes",
    ]
    table = pd.DataFrame(records, columns=columns).astype({"flagged": bool, "counted": bool})
    whole = test.part(np.ones(len(test.labels), dtype=bool)).measure(np.ones((1, test.size)))
    overall = {measure: float(whole[measure][0]) for measure in test.measures}
    descriptions = {field.name: field.description or field.name for field in fields}
    return Subgroups(levels, table, overall, descriptions, len(ids), test.size, samples, seed, level)


def subgroups_of_run(opened: OpenedRun, samples: int = 1000, seed: int = 0) -> Subgroups:
    """Measure the subgroups of a run's test side; see `measure_subgroups`."""
    predictions = opened.run.predictions
    test = predictions[predictions["split"] == "test"]
    with progress_bar("subgroups") as show:
        return measure_subgroups(
            test, opened.rows("test"), opened.groups, opened.dataset.schema, samples, seed, progress=show
        )


# Inches: a line of a panel, its title, and what stands above and below the panels.
SLOT, TITLE, BELOW = 0.19, 0.27, 0.75


# Letters of a level and of a panel's title.
LETTERS, TITLE_LETTERS = 22, 28


# Levels without numbers that a panel names one by one.
NAMED = 3


@styled
def draw_subgroups(subgroups: Subgroups, measure: str, unit: str = "patients") -> ReportFigure:
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
    return ReportFigure(
        f"subgroups_{_slug(measure)}",
        f"Subgroups: {name}",
        caption,
        _alt(rows, "value", "low", "high", ".2f"),
        figure,
        rows,
    )


@styled
def draw_subgroup_gaps(subgroups: Subgroups, measure: str, unit: str = "patients") -> ReportFigure:
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
    return ReportFigure(f"subgroup_gaps_{_slug(measure)}", f"Subgroups: gaps in {name}", caption, alt, figure, rows)


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
    axis.set_yticks(range(len(shown)), [f"{truncate(str(row['level']), LETTERS)} ({row['images']})" for row in shown])
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
    return f"{100 * subgroups.level:g}% interval from {subgroups.samples} resamples of the {subgroups.groups} {unit} (seed {subgroups.seed})"


def _classes(rows: pd.DataFrame) -> str:
    """Say over which classes an average runs, if it is one."""
    known = rows.loc[rows["drawn"], "classes"]
    return (
        "Each level's average runs over the classes that it and the others have from enough patients. "
        if known.ne("").any()
        else ""
    )


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
