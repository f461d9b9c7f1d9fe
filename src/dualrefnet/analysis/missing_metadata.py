"""How much a trained run loses as metadata are missing, with and without the image.

Fields are removed at random, down to none, and in the patterns in which the training rows miss them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.perturbations import (
    Floats,
    Metadata,
    keep_fields,
    predict_with_metadata,
    predict_without_image,
)
from dualrefnet.data.schema import DatasetSchema
from dualrefnet.display.figure import COLOURS, INK, MARKERS, ReportFigure, new_figure, styled
from dualrefnet.display.format import MEASURE_NAMES, Cell, PrintedTable, interval, number
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import percentile_interval
from dualrefnet.evaluation.comparison import PooledBootstrap, pooled_bootstrap
from dualrefnet.progress import progress_bar

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MEASURES = ("balanced_accuracy", "auc_macro_ovr")
WITH_IMAGE, WITHOUT_IMAGE = "with image", "without image"
LEVEL = 0.95
# Patterns of a smaller share of the training rows are left out.
LEAST = 0.01
ALL_FIELDS, NO_FIELDS, ALWAYS_FIELDS = "all recorded fields", "no metadata", "only the always recorded fields, M1"
# Fields that a pattern's name lists before it says "...".
NAMED = 3


@dataclass(frozen=True)
class Pattern:
    """Fields that are missing together; `training_share` of the training rows miss exactly these (NaN: not one of
    theirs).
    """

    name: str
    removed: tuple[str, ...]
    training_share: float

    @property
    def fields(self) -> str:
        """The removed fields in one text, which tells patterns apart."""
        return "; ".join(self.removed)


def find_patterns(rows: pd.DataFrame, schema: DatasetSchema) -> list[Pattern]:
    """Return patterns of missing fields, from all fields to none.

    These are: nothing missing; what 1% of the training `rows` or more miss; all but the fields of tier M1; all but
    those that make subgroups (age, sex and so on); everything missing. Patterns that remove the same fields are one.
    """
    names = [field.name for field in schema.fields]
    missing = rows[names].isna()
    found: dict[tuple[str, ...], Pattern] = {(): Pattern(ALL_FIELDS, (), float((~missing.any(axis=1)).mean()))}
    shown, counts = np.unique(missing.to_numpy(), axis=0, return_counts=True)
    for place in np.argsort(-counts, kind="stable"):
        removed = tuple(name for name, gone in zip(names, shown[place], strict=True) if gone)
        if removed and counts[place] / len(rows) >= LEAST:
            found[removed] = Pattern(_list_missing(removed), removed, float(counts[place] / len(rows)))
    subgroups = [field.name for field in schema.fields if field.subgroup]
    wanted = [(ALWAYS_FIELDS, [field.name for field in schema.fields if field.tier == "M1"])]
    wanted += [(f"only {', '.join(subgroups)}", subgroups), (NO_FIELDS, [])]
    for name, kept in wanted:
        if name != NO_FIELDS and not kept:
            continue
        removed = tuple(field for field in names if field not in kept)
        known = found.get(removed)
        if known is None:
            found[removed] = Pattern(name, removed, np.nan)
        elif removed:
            found[removed] = replace(known, name=f"{known.name} ({name})")
    short = [pattern.name for pattern in found.values()]
    for removed, pattern in found.items():
        if short.count(pattern.name) > 1:
            found[removed] = replace(pattern, name=_list_missing(removed, len(removed)))
    return sorted(found.values(), key=lambda pattern: len(pattern.removed))


def _list_missing(removed: tuple[str, ...], named: int = NAMED) -> str:
    listed = ", ".join(removed[:named]) + (", ..." if len(removed) > named else "")
    return f"{len(removed)} field{'s' if len(removed) > 1 else ''} missing: {listed}"


@dataclass(frozen=True)
class MissingMetadata:
    """How a run does with missing metadata.

    `curve`, one row an input (`photograph`: `with image`, `without image`), share and measure: photograph, share (of
    the recorded values that were kept), answers_kept (on average), draws, measure, value (mean over draws), low, high;
    difference, difference_low, difference_high from all fields with the same input. `patterns`, one row an input,
    pattern and measure: the same with pattern (its name), removed (the fields, with `; ` between) and training_share in
    place of share and draws. `bootstrap`: the value of every input in every resample. `fields`: of the schema, of which
    shares are kept, also those that the run doesn't read.
    """

    name: str
    curve: pd.DataFrame
    patterns: pd.DataFrame
    chance: float
    bootstrap: PooledBootstrap
    image_ids: tuple[str, ...]
    groups: tuple[str, ...]
    fields: int
    unit: str
    draws: int
    samples: int
    seed: int


def measure_missing_metadata(
    opened: OpenedRun,
    shares: Sequence[float] = SHARES,
    draws: int = 5,
    samples: int = 1000,
    seed: int = 0,
    name: str | None = None,
) -> MissingMetadata:
    """Measure a trained run on its test split with fewer and fewer fields, with and without the image.

    `shares` of the recorded values are kept (ascending, the last is 1), in `draws` random choices. Of a single-modality
    method only what it reads is removed.
    """
    shares = list(shares)
    if not shares or shares[-1] != 1 or shares[0] < 0 or any(one >= other for one, other in pairwise(shares)):
        raise ValueError(f"shares must ascend within 0..1 and end with 1, not {shares}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    rows, schema = opened.rows("test"), opened.dataset.schema
    names = [field.name for field in schema.fields]
    recorded = rows[names].notna().to_numpy()
    orders = draw_orders(opened, draws, seed)
    kept: dict[str, list[NDArray[np.bool_]]] = {}
    for share in shares:
        # Nothing and everything can be chosen in one way only.
        kept[_share(share)] = [
            keep_share(recorded, order, share) for order in (orders[:1] if share in (0, 1) else orders)
        ]
    patterns = find_patterns(opened.rows("train"), schema)
    for pattern in patterns:
        kept[_without(pattern.fields)] = [recorded & ~np.isin(names, pattern.removed)]
    predictions = _predict(opened, rows, kept)
    image_ids = tuple(rows["image_id"])
    groups = opened.groups.loc[list(image_ids)].to_numpy(dtype=object)
    labels = rows["label"].map({label: index for index, label in enumerate(opened.classes)}).to_numpy(dtype=np.int64)
    with progress_bar("intervals") as show:
        full = pooled_bootstrap(labels, predictions, groups, opened.classes, samples, seed, LEVEL, progress=show)
    # Only the measures that are looked at are kept in memory for comparisons.
    bootstrap = replace(full, points=_slim(full.points), drawn=_slim(full.drawn))
    counts = {key: float(np.mean([part.sum(axis=1).mean() for part in parts])) for key, parts in kept.items()}
    curve, by_pattern = [], []
    for image in (WITH_IMAGE, WITHOUT_IMAGE):
        if _key(image, _share(1)) not in predictions:
            continue
        for share in shares:
            key = _share(share)
            start = {"photograph": image, "share": share, "answers_kept": counts[key], "draws": len(kept[key])}
            curve += _measured(bootstrap, image, key, start)
        for pattern in patterns:
            key = _without(pattern.fields)
            start = {"photograph": image, "pattern": pattern.name, "removed": pattern.fields}
            start |= {"training_share": pattern.training_share, "answers_kept": counts[key]}
            by_pattern += _measured(bootstrap, image, key, start)
    return MissingMetadata(
        name or opened.model.title,
        pd.DataFrame(curve),
        pd.DataFrame(by_pattern),
        chance=1 / len(np.unique(labels)),
        bootstrap=bootstrap,
        image_ids=image_ids,
        groups=tuple(map(str, groups)),
        fields=len(names),
        unit=schema.unit,
        draws=draws,
        samples=samples,
        seed=seed,
    )


def draw_orders(opened: OpenedRun, draws: int, seed: int) -> NDArray[np.float64]:
    """Draw in which order each row of the data set loses its values, the same for every run: (draws, N, F + 1) in 0..1;
    the last number says how a part of a value is rounded.
    """
    table = opened.dataset.table
    numbers = np.random.default_rng(seed).random((draws, len(table), len(opened.dataset.schema.fields) + 1))
    places = pd.Index(table["image_id"]).get_indexer(pd.Index(opened.rows("test")["image_id"]))
    return np.asarray(numbers[:, places])


def keep_share(recorded: NDArray[np.bool_], order: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """Return (N, F), which of the recorded values are kept; a larger share keeps those of a smaller one.

    By `draw_orders`, the values with the smallest numbers are kept longest, and the last number rounds: half a value is
    one for half of the rows, so that on average exactly the share is kept.
    """
    rank = np.where(recorded, order[:, :-1], np.inf).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    wanted = np.floor(share * recorded.sum(axis=1) + order[:, -1])
    return np.asarray(recorded & (rank < wanted[:, None]))


def _predict(
    opened: OpenedRun, rows: pd.DataFrame, kept: Mapping[str, Sequence[NDArray[np.bool_]]]
) -> dict[str, list[Floats]]:
    """Return the probabilities with what is kept of each row's values, one array a draw."""
    examples = opened.image_examples("test")
    names = [field.name for field in opened.dataset.schema.fields]
    versions: list[Metadata] = []
    if opened.reads_metadata:
        with progress_bar("removing fields") as show:
            total = sum(map(len, kept.values()))
            for part in (part for parts in kept.values() for part in parts):
                versions.append(opened.metadata.encode(keep_fields(rows, names, part)).values)
                show(len(versions), total)
    else:
        versions = [examples.metadata]
    found: dict[str, list[Floats]] = {}
    if opened.model.reads_image:
        with progress_bar("predicting with fewer fields") as show:
            found[WITH_IMAGE] = predict_with_metadata(opened, examples, versions, show).probabilities
    if opened.reads_metadata:
        with progress_bar("predicting without image") as show:
            found[WITHOUT_IMAGE] = predict_without_image(opened, versions, show)
    result = {}
    for image, given in found.items():
        remaining = iter(given)
        for key, parts in kept.items():
            # A run that reads no metadata predicts the same whatever is kept of them.
            result[_key(image, key)] = [next(remaining) for _ in parts] if opened.reads_metadata else given
    return result


def _slim(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {key: {measure: of_key[measure] for measure in MEASURES} for key, of_key in values.items()}


def _measured(bootstrap: PooledBootstrap, image: str, key: str, start: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row a measure, `start` first."""
    rows, own, full = [], _key(image, key), _key(image, _share(1))
    for measure in MEASURES:
        value, difference = bootstrap.value(own, measure), bootstrap.difference(own, full, measure)
        row = start | {"measure": measure, "value": value.value, "low": value.low, "high": value.high}
        row |= {"difference": difference.value}
        rows.append(row | {"difference_low": difference.low, "difference_high": difference.high})
    return rows


def _share(share: float) -> str:
    return f"share {share:g}"


def _without(removed: str) -> str:
    return f"without {removed}" if removed else _share(1)


def _key(image: str, key: str) -> str:
    return f"{image}: {key}"


def compare_missing_metadata(first: MissingMetadata, second: MissingMetadata) -> pd.DataFrame:
    """Compare two runs at every share and pattern, on the same images, with the same values and the same resamples.

    A run that reads no image predicts the same with one as without: that is compared with the other's with an image.
    Return one row an input and measure: photograph, share (NaN for a pattern), pattern and removed (empty for a share),
    measure, first, second, difference (first - second), low, high.

    Raises:
        DataError: they weren't measured on the same images, or with other draws, samples or seed.
    """
    for what, attributes in (
        ("test images", ("image_ids",)),
        ("patients", ("groups",)),
        ("draws, samples and seed", ("draws", "samples", "seed")),
    ):
        if any(getattr(first, attribute) != getattr(second, attribute) for attribute in attributes):
            raise DataError(
                f"{first.name} and {second.name} don't have the same {what}, so they can't be compared in pairs"
            )
    inputs = [(_share(share), share, "", "") for share in first.curve["share"].unique()]
    named = first.patterns.drop_duplicates("removed")
    inputs += [
        (_without(removed), np.nan, name, removed)
        for removed, name in zip(named["removed"], named["pattern"], strict=True)
    ]
    rows = []
    for image in (WITH_IMAGE, WITHOUT_IMAGE):
        for key, share, pattern, removed in inputs:
            own = []
            for run in (first, second):
                reads_image = (run.curve["photograph"] == WITH_IMAGE).any()
                own.append(_key(image if reads_image else WITHOUT_IMAGE, key))
            if own[0] not in first.bootstrap.points or own[1] not in second.bootstrap.points:
                continue
            for measure in MEASURES:
                values = first.bootstrap.points[own[0]][measure], second.bootstrap.points[own[1]][measure]
                drawn = first.bootstrap.drawn[own[0]][measure] - second.bootstrap.drawn[own[1]][measure]
                low, high = percentile_interval(drawn, LEVEL) or (np.nan, np.nan)
                row = {"photograph": image, "share": share, "pattern": pattern, "removed": removed, "measure": measure}
                row |= {"first": values[0], "second": values[1], "difference": values[0] - values[1]}
                rows.append(row | {"low": low, "high": high})
    return pd.DataFrame(rows)


def missing_metadata_table(measured: MissingMetadata) -> PrintedTable:
    """Return balanced accuracy by the share of the recorded values that are kept."""
    return _table(
        measured,
        measured.curve,
        "share",
        f"Balanced accuracy by share of metadata kept: {measured.name}",
        ("values kept", "mean number"),
        lambda row: [Cell(f"{row['share']:.0%}"), Cell(f"{row['answers_kept']:.1f}")],
    )


def missing_pattern_table(measured: MissingMetadata) -> PrintedTable:
    """Return balanced accuracy by patterns of missing fields."""
    note = "Share of training: of the training rows in which exactly these fields are missing."

    def start(row: Mapping[str, Any]) -> list[Cell]:
        share = "" if pd.isna(row["training_share"]) else f"{row['training_share']:.0%}"
        return [Cell(row["pattern"]), Cell(share), Cell(f"{row['answers_kept']:.1f}")]

    title = f"Balanced accuracy by missing fields: {measured.name}"
    columns = ("metadata", "share of training", "mean number")
    return _table(measured, measured.patterns, "removed", title, columns, start, (note,))


def _table(
    measured: MissingMetadata,
    table: pd.DataFrame,
    key: str,
    title: str,
    columns: tuple[str, ...],
    start: Callable[[Mapping[str, Any]], list[Cell]],
    notes: tuple[str, ...] = (),
) -> PrintedTable:
    table = table[table["measure"] == MEASURES[0]]
    inputs = [name for name in (WITH_IMAGE, WITHOUT_IMAGE) if (table["photograph"] == name).any()]
    values: dict[Any, Any] = {(row["photograph"], row[key]): row for row in table.to_dict("records")}
    rows = []
    for row in table.drop_duplicates(key).to_dict("records"):
        measures = [values[name, row[key]] for name in inputs]
        cells = [Cell(number(one["value"]), interval(one["low"], one["high"])) for one in measures]
        rows.append([*start({str(name): value for name, value in row.items()}), *cells])
    note = (
        f"{len(measured.image_ids):,} test images, {measured.fields} fields; mean of {measured.draws} random choices "
        f"(seed {measured.seed}). In brackets: 95% intervals from resampling {measured.unit}s. Chance: "
        f"{measured.chance:.3f}."
    )
    return PrintedTable(title, (*columns, *inputs), rows, (*notes, note))


def missing_difference_table(differences: pd.DataFrame, first: str, second: str) -> PrintedTable:
    """Return how far one run is above another, by what is given; see `compare_missing_metadata`."""
    rows = []
    table = differences[differences["measure"] == MEASURES[0]]
    # All fields and none are shares too.
    twice = [name for name, share in ((NO_FIELDS, 0), (ALL_FIELDS, 1)) if (table["share"] == share).any()]
    for row in table[~table["pattern"].isin(twice)].to_dict("records"):
        given = row["pattern"] or f"{row['share']:.0%} of the values"
        difference = Cell(number(row["difference"], "+.3f"), interval(row["low"], row["high"], "+.3f"))
        values = [Cell(number(row[name])) for name in ("first", "second")]
        rows.append([Cell(f"{row['photograph']}, {given}"), *values, difference])
    note = "An interval without 0 tells the two apart; one in twenty does so by chance."
    title = f"Balanced accuracy: {first} and {second}"
    return PrintedTable(title, ("input", first, second, "difference"), rows, (note,))


# Inches: a line of a label, a mark, between two rows, and all that isn't a row. Letters of a line of a label.
LINE, SLOT, GAP, REST, LETTERS = 0.125, 0.15, 0.1, 1.0, 30
# Runs in one figure.
MOST = 4


@styled
def draw_missing_metadata(runs: Sequence[MissingMetadata], measure: str = "balanced_accuracy") -> ReportFigure:
    """Draw a measure against the share of the recorded values that are kept, with 95% bands.

    One run is one panel with a line with and one without image; of several runs, at most four on the same test images,
    there is a panel for each of the two.
    """
    from matplotlib.ticker import PercentFormatter

    data, chance = _to_draw(runs, [run.curve for run in runs], measure)
    panels = [name for name in (WITH_IMAGE, WITHOUT_IMAGE) if (data["photograph"] == name).any()]
    panels = panels if len(runs) > 1 else [""]
    figure, axes = new_figure(1.9 * len(panels) + 0.75, len(panels), 1, sharex=True, sharey=True)
    handles = {}
    for axis, panel in zip(axes, panels, strict=True):
        axis.axhline(chance, color=INK, linestyle=":", linewidth=1)
        of_panel = data[data["photograph"] == panel] if panel else data
        for (run, image), line in of_panel.groupby(["run", "photograph"], sort=False):
            # Of one run a colour tells the input, of several the run.
            place = (
                [one.name for one in runs].index(str(run)) if panel else (WITH_IMAGE, WITHOUT_IMAGE).index(str(image))
            )
            look: Any = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 3.5}
            axis.fill_between(line["share"], line["low"], line["high"], color=COLOURS[place], alpha=0.2, linewidth=0)
            (handles[run if panel else image],) = axis.plot(line["share"], line["value"], **look)
        axis.set_title(panel)
        axis.set_ylabel(MEASURE_NAMES[measure].replace(", one versus rest", ""))
    axes[-1].set_xlabel("share of the recorded metadata")
    axes[-1].xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(list(handles.values()), list(map(str, handles)), loc="outside lower center", ncols=2)
    first = runs[0]
    caption = (
        f"{_images(first)}: a random share of the recorded values is kept (mean of {first.draws} choices, the same for "
        f"all runs, seed {first.seed}). Bands: 95% intervals from {first.samples:,} resamples of the {first.unit}s; "
        "dotted: chance. In practice fields are missing together, see the patterns."
    )
    texts = []
    for (run, image), line in data.groupby(["run", "photograph"], sort=False):
        points = zip(line["share"], line["value"], strict=True)
        texts.append(f"{run} {image}: {', '.join(f'{value:.2f} at {share:.0%}' for share, value in points)}")
    stem = "availability" if measure == "balanced_accuracy" else f"availability_{measure}"
    columns = ["run", "photograph", "share", "answers_kept", "draws", "measure", "value", "low", "high"]
    alt = f"{'; '.join(texts)}. Chance {chance:.2f}."
    return ReportFigure(stem, "Missing metadata", caption, alt, figure, data[columns])


@styled
def draw_missing_patterns(runs: Sequence[MissingMetadata], measure: str = "balanced_accuracy") -> ReportFigure:
    """Draw a measure of runs for patterns of missing fields, with and without image, with 95% intervals."""
    data, chance = _to_draw(runs, [run.patterns for run in runs], measure)
    series = list(data[["run", "photograph"]].drop_duplicates().itertuples(index=False, name=None))
    patterns = data.drop_duplicates("removed").sort_values("answers_kept", ascending=False, kind="stable")
    labels = [textwrap.fill(text, LETTERS) for text in patterns["pattern"]]
    heights = [max(LINE * (label.count("\n") + 1), SLOT * len(series)) + GAP for label in labels]
    figure, (axis,) = new_figure(sum(heights) + REST + SLOT * ((len(series) + 1) // 2))
    axis.axvline(chance, color=INK, linestyle=":", linewidth=1)
    middles, below, handles = [], 0.0, {}
    for removed, height in zip(patterns["removed"], heights, strict=True):
        middles.append(below + height / 2)
        for place, (run, image) in enumerate(series):
            rows = data[(data["removed"] == removed) & (data["run"] == run) & (data["photograph"] == image)]
            y = below + height / 2 + SLOT * (place - (len(series) - 1) / 2)
            for row in rows.to_dict("records"):
                axis.plot([row["low"], row["high"]], [y, y], color=COLOURS[place], linewidth=1.3)
                label = f"{run}, {image}" if len(runs) > 1 else image
                (handles[label],) = axis.plot(row["value"], y, MARKERS[place], color=COLOURS[place], markersize=4.2)
        below += height
    axis.set_ylim(below, 0)
    axis.set_yticks(middles, labels)
    axis.tick_params(axis="y", length=0, labelsize=7)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(MEASURE_NAMES[measure].replace(", one versus rest", ""))
    columns = 1 if len(runs) > 1 else 2
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)
    first, known = runs[0], patterns[patterns["training_share"].notna()]
    shares = zip(known["training_share"], known["pattern"], strict=True)
    caption = (
        f"{_images(first)}, without the fields of a pattern; lines: 95% intervals from {first.samples:,} resamples of "
        f"the {first.unit}s (seed {first.seed}); dotted: chance. Share of the training rows: "
        f"{'; '.join(f'{share:.0%}: {name}' for share, name in shares)}."
    )
    texts = [
        f"{row['run']}, {row['photograph']}, {row['pattern']}: {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        for row in data.to_dict("records")
    ]
    stem = "patterns" if measure == "balanced_accuracy" else f"patterns_{measure}"
    names = ["run", "photograph", "pattern", "removed", "training_share", "answers_kept"]
    data = data[[*names, "measure", "value", "low", "high"]]
    return ReportFigure(stem, "Patterns of missing metadata", caption, "; ".join(texts), figure, data)


def _to_draw(
    runs: Sequence[MissingMetadata], tables: Sequence[pd.DataFrame], measure: str
) -> tuple[pd.DataFrame, float]:
    """Return the rows of all runs for one measure, and its value by chance."""
    if not 1 <= len(runs) <= MOST:
        raise ValueError(f"one figure holds 1 to {MOST} runs, not {len(runs)}")
    parts = [table[table["measure"] == measure].assign(run=run.name) for run, table in zip(runs, tables, strict=True)]
    return pd.concat(parts, ignore_index=True), runs[0].chance if measure == "balanced_accuracy" else 0.5


def _images(run: MissingMetadata) -> str:
    return f"{len(run.image_ids):,} test images of {run.bootstrap.groups:,} {run.unit}s"
