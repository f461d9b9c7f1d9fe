"""Results by subgroup: every category of a metadata field against all other images for which the field is recorded."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.data.schema import DatasetSchema, MetadataField
from dualrefnet.display.figure import (
    FAINT,
    INK,
    PAPER,
    PRIMARY,
    SECONDARY,
    ReportFigure,
    label_rows,
    new_figure,
    styled,
    truncate,
)
from dualrefnet.display.format import interval, number
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import NAN, Bootstrap, Floats, divide, percentile_interval, wilson_interval
from dualrefnet.evaluation.metrics import WeightedMetrics, check_predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_RECORDED = "not recorded"
LEVEL = 0.95
# Bands of every number that counts years: first year of each but the first.
AGES = (40, 60, 80)
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
# The error grows as images get fewer: resamples lie above it, and a small category's gap would always look bad.
WITHOUT_INTERVAL = ("ece",)
# Averages over classes, and the metric of each class that they average.
AVERAGES = {"balanced_accuracy": "sensitivity", "auc_macro_ovr": "auc"}
PROPORTIONS = ("accuracy", "malignant.sensitivity", "malignant.specificity")
# A category with fewer has no results; and with fewer patients of a class on either side it isn't compared.
MINIMUM_IMAGES, MINIMUM_PATIENTS, MINIMUM_OF_CLASS = 20, 10, 5


def field_categories(values: pd.Series, field: MetadataField) -> tuple[pd.Series, list[str]]:
    """Return the category of every row, and all categories in order; missing and unknown values come last.

    Years are divided into bands, other numbers at the terciles of these rows.
    """
    if field.kind == "numeric":
        numbers = values.astype(float)
        missing, (edges, order) = numbers.isna(), _bands(numbers.dropna(), field)
        band = np.searchsorted(edges, numbers[~missing].to_numpy(), side="right")
        categories = pd.Series(NOT_RECORDED, values.index, dtype=object)
        categories[~missing] = np.array(order, dtype=object)[band]
    else:
        missing = values.isna() | values.isin(field.missing_codes)
        categories = values.where(~missing, other=NOT_RECORDED).astype(str).replace(field.aliases)
        if field.kind == "boolean":
            categories = categories.replace({"True": "yes", "False": "no"})
        known = list(dict.fromkeys(field.aliases.get(name, name) for name in field.categories))
        order = [*known, *sorted(set(categories) - set(known) - {NOT_RECORDED})]
    return categories, [*order, NOT_RECORDED] if missing.any() else order


def _bands(known: pd.Series, field: MetadataField) -> tuple[list[float], list[str]]:
    """Return the edges between the bands, and the names of the bands, one more than edges."""
    if field.unit == "years":
        between = [f"{low} to {high - 1} years" for low, high in pairwise(AGES)]
        return list(AGES), [f"below {AGES[0]} years", *between, f"{AGES[-1]} years and over"]
    # Where many values are equal, two terciles may share an edge, or the first band be empty.
    edges = np.unique(np.quantile(known, [1 / 3, 2 / 3])).tolist() if len(known) else []
    edges = [edge for edge in edges if edge > known.min()]
    if not edges:
        return [], ["all"] * (len(known) > 0)
    unit = f" {field.unit}" if field.unit else ""
    between = [f"{low:g} to below {high:g}{unit}" for low, high in pairwise(edges)]
    return edges, [f"below {edges[0]:g}{unit}", *between, f"{edges[-1]:g}{unit} and over"]


@dataclass(frozen=True)
class Subgroups:
    """Results by category.

    `levels` has a row a category, also those that the schema names and no image has. `table` has one a measured
    category and measure; `others` is the value of the images that it is compared with, `gap` the difference, `flagged`
    if 0 lies outside its interval; `counted` is false where the same comparison stands above (men with women). NaN:
    undefined, or too few.
    """

    levels: pd.DataFrame
    table: pd.DataFrame
    overall: dict[str, float]  # measure -> value of the whole test split
    descriptions: dict[str, str]  # field -> what it means, in plain words
    images: int  # of the test split
    groups: int  # its patients
    samples: int
    seed: int

    @property
    def looked_at(self) -> int:
        return int((self.table["counted"] & self.table["gap_low"].notna()).sum())

    @property
    def flagged(self) -> int:
        """Number of them whose interval doesn't hold 0."""
        return int((self.table["counted"] & self.table["flagged"]).sum())

    @property
    def by_chance(self) -> float:
        """How many would be flagged, on average, if results were the same for all."""
        return (1 - LEVEL) * self.looked_at

    def frame(self) -> pd.DataFrame:
        """Return one tidy table: one row a category and measure, one row for a category without results."""
        return self.levels.merge(self.table, on=["field", "level"], how="left", sort=False)


class _Metrics(WeightedMetrics):
    def measure(self, weights: Floats) -> dict[str, Floats]:
        """Return the metrics of `WeightedMetrics`, and `overconfidence`: mean confidence minus accuracy."""
        surplus, total = weights @ self.errors.gaps.sum(axis=1), weights @ self.confusion.sum(axis=1)
        return super().measure(weights) | {"overconfidence": divide(-surplus, total)}


class _Part:
    """Some images of the test split; `_Metrics` of them and of every resample of all patients are filled in later."""

    point: dict[str, Floats]
    drawn: dict[str, Floats]

    def __init__(
        self,
        mask: NDArray[np.bool_],
        target: NDArray[np.int64],
        scores: Floats,
        bootstrap: Bootstrap,
        schema: DatasetSchema,
    ) -> None:
        self.mask, self.target, self.scores, self.bootstrap, self.schema = mask, target, scores, bootstrap, schema
        self.cancer = np.isin(schema.classes, schema.malignant)[target]
        self.total = self._count(mask)
        self.enough = int(mask.sum()) >= MINIMUM_IMAGES and self.total >= MINIMUM_PATIENTS
        self.of_class = [self._count(mask & (target == index)) for index in range(len(self.schema.classes))]
        malignant, benign = self._count(mask & self.cancer), self._count(mask & ~self.cancer)
        # Measure -> number of patients that it is about; of the rarer kind if there are two.
        self.patients = dict.fromkeys(NAMES, self.total)
        self.patients |= {"malignant.sensitivity": malignant, "malignant.specificity": benign}
        self.patients["malignant.auc"] = min(malignant, benign)

    def _count(self, mask: NDArray[np.bool_]) -> int:
        return len(np.unique(self.bootstrap.codes[mask]))

    def support(self) -> dict[str, object]:
        images, target = int(self.mask.sum()), self.target
        missing = sorted(set(target) - set(target[self.mask])) if images else []
        return {
            "images": images,
            "patients": self.total,
            "malignant": int(self.cancer[self.mask].sum()) if self.schema.malignant else NAN,
            "measured": self.enough,
            "missing": ", ".join(self.schema.classes[index] for index in missing),
        }

    def metrics(self) -> _Metrics:
        target, scores, codes = self.target[self.mask], self.scores[self.mask], self.bootstrap.codes[self.mask]
        return _Metrics(target, scores, codes, self.schema.classes, self.schema.malignant, self.bootstrap.groups)

    def values(self, keys: list[str]) -> tuple[float, Floats]:
        """Return the mean of K metrics, and those of every resample, (K, S)."""
        return float(np.stack([self.point[key] for key in keys]).mean()), np.stack([self.drawn[key] for key in keys])

    def interval(self, measure: str, value: float, drawn: Floats) -> tuple[float, float]:
        """Return the interval; NaN where all resamples agree and the measure is no proportion."""
        if measure in PROPORTIONS and value in (0, 1):
            patients = self.patients[measure]
            return wilson_interval(int(value) * patients, patients, LEVEL)
        return (NAN, NAN) if _agree(drawn) else percentile_interval(drawn, LEVEL) or (NAN, NAN)


def _compare(one: _Part, other: _Part | None, measure: str) -> dict[str, object]:
    """Return one measure of a category and its gap to others, as columns of `Subgroups.table`."""
    result: dict[str, object] = dict.fromkeys(("value", "low", "high", "others", "gap", "gap_low", "gap_high"), NAN)
    result |= {"flagged": False, "classes": ""}
    keys = [measure]
    if measure in AVERAGES:
        patients = zip(one.schema.classes, one.of_class, (other or one).of_class, strict=True)
        shared = [name for name, here, there in patients if min(here, there) >= MINIMUM_OF_CLASS]
        result["classes"] = ", ".join(shared)
        keys = [f"per_class.{name}.{AVERAGES[measure]}" for name in shared]
        if len(keys) < 2:
            return result
    elif one.patients[measure] < MINIMUM_OF_CLASS:
        return result
    value, mine = one.values(keys)
    result["value"] = value
    if measure in WITHOUT_INTERVAL:
        return result
    low, high = one.interval(measure, value, _mean(mine))
    result |= {"low": low, "high": high}
    if other is None or not other.enough or other.patients[measure] < MINIMUM_OF_CLASS:
        return result
    others, theirs = other.values(keys)
    gap = value - others
    if _agree(_mean(mine)) or _agree(_mean(theirs)):
        # Newcombe 1998, method 10: the difference of two independent proportions from their Wilson intervals.
        other_low, other_high = other.interval(measure, others, _mean(theirs))
        bounds = (gap - np.hypot(value - low, other_high - others), gap + np.hypot(high - value, others - other_low))
    else:
        # Class by class: one that vanished from a resample on either side is left out on both.
        bounds = percentile_interval(_mean(mine - theirs), LEVEL) or (NAN, NAN)
    result |= {"others": others, "gap": gap, "gap_low": float(bounds[0]), "gap_high": float(bounds[1])}
    return result | {"flagged": bool(bounds[0] > 0 or bounds[1] < 0)}


def _mean(values: Floats) -> Floats:
    """Average (K, S) over the defined values of each resample; NaN if there are none."""
    return divide(np.nansum(values, axis=0), (~np.isnan(values)).sum(axis=0).astype(float))


def _agree(drawn: Floats) -> bool:
    """Whether all resamples give the same value, or none."""
    defined = drawn[~np.isnan(drawn)]
    return not len(defined) or bool(np.ptp(defined) < 1e-12)


def measure_subgroups(
    predictions: pd.DataFrame,
    rows: pd.DataFrame,
    groups: pd.Series,
    schema: DatasetSchema,
    samples: int = 1000,
    seed: int = 0,
) -> Subgroups:
    """Measure every category of every field with `subgroup`, and how far it is from the others.

    `predictions` are rows of `predictions.csv`, of the test split; `groups`: image id -> patient or lesion
    (`schema.unit`).
    """
    fields = [field for field in schema.fields if field.subgroup]
    if not fields:
        raise DataError(f"no metadata field of {schema.title} is marked with `subgroup: true`: nothing to compare")
    ids = predictions["image_id"]
    missing = set(ids) - (set(rows["image_id"]) & set(groups.index))
    if missing:
        raise DataError(
            f"{len(missing)} predicted images aren't in the lesion table or the split; are these the data of the run?"
        )
    rows = rows.set_index("image_id").loc[ids]
    labels = predictions["label"].map({name: index for index, name in enumerate(schema.classes)})
    columns = predictions[[f"prob_{name}" for name in schema.classes]]
    bootstrap = Bootstrap(groups.loc[ids].to_numpy(), samples, seed, LEVEL, "subgroups")
    target, scores = check_predictions(labels.to_numpy(dtype=np.int64), columns.to_numpy(dtype=float))

    def part(mask: NDArray[np.bool_]) -> _Part:
        return _Part(mask, target, scores, bootstrap, schema)

    categories, pairs, seen = [], [], set()
    for field in fields:
        values, order = field_categories(rows[field.name], field)
        recorded = (values != NOT_RECORDED).to_numpy()
        for name in order:
            mine = (values == name).to_numpy()
            theirs = ~mine & recorded
            one = part(mine)
            categories.append({"field": field.name, "level": name, **one.support()})
            if one.enough:
                pair = frozenset([mine.tobytes(), theirs.tobytes()])
                pairs.append((field.name, name, one, part(theirs) if theirs.any() else None, pair not in seen))
                seen.add(pair)
    parts = [one for pair in pairs for one in pair[2:4] if isinstance(one, _Part)]
    models = {index: one.metrics() for index, one in enumerate(parts)}
    drawn = bootstrap.resample_each({index: model.measure for index, model in models.items()})
    for index, one in enumerate(parts):
        one.point, one.drawn = models[index].measure(bootstrap.unit_weights), drawn[index]
    total = part(np.ones(len(ids), dtype=bool)).metrics().measure(bootstrap.unit_weights)
    measures = [name for name in NAMES if schema.malignant or not name.startswith("malignant.")]
    records = [
        {"field": field, "level": name, "measure": measure, **_compare(one, other, measure), "counted": counted}
        for field, name, one, other, counted in pairs
        for measure in measures
    ]
    named = ["field", "level", "measure", "value", "low", "high", "others"]
    named += ["gap", "gap_low", "gap_high", "flagged", "counted", "classes"]
    table = pd.DataFrame(records, columns=named).astype({"flagged": bool, "counted": bool})
    overall = {measure: float(total[measure][0]) for measure in measures}
    descriptions = {field.name: field.description or field.name for field in fields}
    size = bootstrap.groups
    return Subgroups(pd.DataFrame(categories), table, overall, descriptions, len(ids), size, samples, seed)


def subgroups_of_run(opened: OpenedRun, samples: int = 1000, seed: int = 0) -> Subgroups:
    test = opened.run.predictions.query("split == 'test'")
    rows = opened.rows("test")
    groups = pd.Series(opened.patients("test"), rows["image_id"])
    return measure_subgroups(test, rows, groups, opened.dataset.schema, samples, seed)


# Inches: a line of a panel, its title, and what stands above and below the panels.
LINE, TITLE, BELOW = 0.19, 0.27, 0.75
# Letters of a category and of a panel's title.
LETTERS, TITLE_LETTERS = 22, 28


def draw_subgroups(subgroups: Subgroups, measure: str, unit: str = "patients") -> ReportFigure:
    """Draw a measure of `NAMES` of every category with its interval, and a line at that of the whole test split."""
    name = NAMES[measure]
    text = "Dot: {0} of the category (in brackets: its test images); line: {1}. {2}Dashed: the whole test split."
    return _draw(subgroups, measure, unit, "value", f"Subgroups: {name}", text)


def draw_subgroup_gaps(subgroups: Subgroups, measure: str, unit: str = "patients") -> ReportFigure:
    """Draw how far every category is from the others with the interval, and a line at zero; see `draw_subgroups`."""
    name = NAMES[measure]
    text = (
        "Difference in {0} between a category (in brackets: its test images) and all other images for which the field "
        "is recorded. Line: {1}. {2}A gap shows that results differ, not why."
    )
    return _draw(subgroups, measure, unit, "gap", f"Subgroups: gaps in {name}", text)


@styled
def _draw(subgroups: Subgroups, measure: str, unit: str, value: str, title: str, text: str) -> ReportFigure:
    """Draw the column `value` of a measure, a panel for each field that has a category with it."""
    from matplotlib.lines import Line2D

    table = subgroups.table[subgroups.table["measure"] == measure]
    if table[value].isna().all():
        raise DataError(f"no category of a subgroup has enough images for {measure}: there is nothing to draw")
    rows = subgroups.levels.merge(table, on=["field", "level"], how="left", sort=False)
    rows = rows.assign(flagged=rows["flagged"].eq(True), drawn=rows[value].notna())
    gaps, (name, overall) = value == "gap", (NAMES[measure], subgroups.overall[measure])
    low, high, form = ("gap_low", "gap_high", "+.2f") if gaps else ("low", "high", ".2f")
    shown = {str(field): part for field, part in rows[rows["drawn"]].groupby("field", sort=False)}
    titles = ["\n".join(textwrap.wrap(subgroups.descriptions[field], TITLE_LETTERS)[:2]) for field in shown]
    heights = [LINE * (len(part) + 0.6) for part in shown.values()]
    height = sum(heights) + sum(TITLE * (1 + 0.5 * title.count("\n")) for title in titles) + BELOW
    figure, axes = new_figure(height, len(shown), sharex=True, height_ratios=heights)
    alt = []
    for axis, part, heading in zip(axes, shown.values(), titles, strict=True):
        axis.axvline(0 if gaps else overall, **_line(gaps))
        _draw_panel(axis, part, value, low, high, form)
        axis.set_title(heading)
        alt += [
            f"{row['field']} {row['level']} {number(row[value], form)} {interval(row[low], row[high], form)}".strip()
            for row in part.to_dict("records")
        ]
    axes[-1].set_xlabel(f"gap in {name}\n← lower than the others     higher →" if gaps else name)
    handles = [Line2D([], [], label=f"whole test split: {overall:.2f}", **_line(gaps))]
    if gaps:
        style: dict[str, Any] = {"marker": "o", "markerfacecolor": PAPER, "markersize": 4.5}
        handles = [Line2D([], [], color=PRIMARY, label="0 inside the interval", **style)]
        style = {"marker": "D", "markersize": 4.5}
        handles.append(Line2D([], [], color=SECONDARY, label="0 outside", **style))
    if not gaps or rows["flagged"].any():
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    drawn = f"{100 * LEVEL:g}% interval from {subgroups.samples} resamples of the {subgroups.groups} {unit} "
    classes = rows.loc[rows["drawn"], "classes"].ne("").any()
    extent = f"Averages run over the classes for which both have enough {unit}. " if classes else ""
    caption = text.format(name, f"{drawn}(seed {subgroups.seed})", extent)
    stem = f"{'subgroup_gaps' if gaps else 'subgroups'}_{measure.replace('.', '_')}"
    return ReportFigure(stem, title, caption, "; ".join(alt), figure, rows)


def _line(gaps: bool) -> dict[str, Any]:
    return {"color": INK, "linewidth": 0.8} if gaps else {"color": FAINT, "linestyle": "--", "linewidth": 1}


def _draw_panel(axis: Axes, part: pd.DataFrame, value: str, low: str, high: str, form: str) -> None:
    shown = part.to_dict("records")
    for place, row in enumerate(shown):
        flagged = row["flagged"] and value == "gap"
        colour, marker = (SECONDARY, "D") if flagged else (PRIMARY, "o")
        axis.plot([row[low], row[high]], [place, place], color=colour, linewidth=1.3)
        face = PAPER if value == "gap" and not flagged else colour
        axis.plot(row[value], place, marker, color=colour, markerfacecolor=face, markersize=4.5)
    axis.set_ylim(len(shown) - 0.2, -0.8)
    labels = [f"{truncate(str(row['level']), LETTERS)} ({row['images']})" for row in shown]
    label_rows(axis, range(len(shown)), labels, [number(row[value], form) for row in shown])
