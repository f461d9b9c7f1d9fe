"""How much a trained run loses as metadata are missing, with and without the image.

Fields are removed at random, down to none, and in the patterns in which the training rows miss them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.perturbations import Floats, keep_fields, predict_with_metadata, predict_without_image
from dualrefnet.data.schema import DatasetSchema
from dualrefnet.display.figure import COLOURS, INK, MARKERS, ReportFigure, label_rows, new_figure, styled
from dualrefnet.display.format import MEASURE_NAMES, Cell, PrintedTable, interval, number
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import Bootstrap, images_of, percentile_interval
from dualrefnet.evaluation.comparison import PooledBootstrap, pooled_bootstrap

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
    """Fields that are missing together."""

    name: str
    removed: tuple[str, ...]  # in the schema's order
    training_share: float  # of the training rows that miss exactly these; NaN for a pattern that isn't one of theirs

    @property
    def fields(self) -> str:
        """The removed fields in one text, which tells patterns apart."""
        return "; ".join(self.removed)


def find_patterns(rows: pd.DataFrame, schema: DatasetSchema) -> list[Pattern]:
    """Return patterns of missing fields, from all to none: those of 1% of the training rows, and some named ones."""
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
    """How a run does with missing metadata: `curve` by the share of values kept, `patterns` by fields removed.

    Both have a row an input (`photograph`: `with image`, `without image`) and measure, with the difference from all
    fields.
    """

    name: str
    curve: pd.DataFrame
    patterns: pd.DataFrame
    chance: float  # balanced accuracy of guessing
    bootstrap: PooledBootstrap  # the value of every input in every resample
    image_ids: tuple[str, ...]
    groups: tuple[str, ...]  # their patients
    fields: int  # of the schema, of which shares are kept, also those that the run doesn't read
    unit: str  # what was resampled, `patient` or `lesion`
    samples: int
    draws: int  # random choices of which the mean is taken
    seed: int  # of choices and bootstrap


def measure_missing_metadata(
    opened: OpenedRun, draws: int = 5, samples: int = 1000, seed: int = 0, name: str | None = None
) -> MissingMetadata:
    """Measure a trained run on its test split with fewer and fewer fields, with and without the image."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    rows, groups, schema = opened.rows("test"), opened.patients("test"), opened.dataset.schema
    names = [field.name for field in schema.fields]
    recorded = rows[names].notna().to_numpy()
    orders = draw_orders(opened, draws, seed)
    # Nothing and everything can be chosen in one way only.
    kept = {
        _input(share): [keep_share(recorded, order, share) for order in (orders[:1] if share in (0, 1) else orders)]
        for share in SHARES
    }
    patterns = find_patterns(opened.rows("train"), schema)
    kept |= {_input(removed=pattern.fields): [recorded & ~np.isin(names, pattern.removed)] for pattern in patterns}
    predictions = _predict(opened, rows, kept)
    labels = pd.Index(opened.classes).get_indexer(pd.Index(rows["label"]))
    resamples = Bootstrap(groups, samples, seed, LEVEL, "intervals")
    full = pooled_bootstrap(labels, predictions, resamples, opened.classes)
    # Only the measures that are looked at are kept in memory for comparisons.
    bootstrap = replace(full, points=_slim(full.points), drawn=_slim(full.drawn))
    counts = {key: float(np.mean([part.sum(axis=1).mean() for part in parts])) for key, parts in kept.items()}
    curve, by_pattern = [], []
    for image in (WITH_IMAGE, WITHOUT_IMAGE):
        if image + _input() not in predictions:
            continue
        for share in SHARES:
            key = _input(share)
            start = {"photograph": image, "share": share, "answers_kept": counts[key], "draws": len(kept[key])}
            curve += _measured(bootstrap, image, key, start)
        for pattern in patterns:
            key = _input(removed=pattern.fields)
            start = {"photograph": image, "pattern": pattern.name, "removed": pattern.fields}
            start |= {"training_share": pattern.training_share, "answers_kept": counts[key]}
            by_pattern += _measured(bootstrap, image, key, start)
    return MissingMetadata(
        name or opened.model.title,
        pd.DataFrame(curve),
        pd.DataFrame(by_pattern),
        1 / len(np.unique(labels)),
        bootstrap,
        tuple(rows["image_id"]),
        tuple(map(str, groups)),
        len(names),
        schema.unit,
        samples,
        draws,
        seed,
    )


def _input(share: float = 1, removed: str = "") -> str:
    """Return what an input is called behind `WITH_IMAGE` or `WITHOUT_IMAGE`; a pattern without fields is share 1."""
    return f": without {removed}" if removed else f": share {share:g}"


def draw_orders(opened: OpenedRun, draws: int, seed: int) -> NDArray[np.float64]:
    """Draw in which order each row loses its values, (draws, N, F + 1) in 0..1, the same for every run."""
    table = opened.dataset.table
    numbers = np.random.default_rng(seed).random((draws, len(table), len(opened.dataset.schema.fields) + 1))
    places = pd.Index(table["image_id"]).get_indexer(pd.Index(opened.rows("test")["image_id"]))
    return np.asarray(numbers[:, places])


def keep_share(recorded: NDArray[np.bool_], order: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """Return which recorded values (N, F) are kept; a larger share keeps those of a smaller one.

    Of `order` (N, F + 1) the last number rounds: half a value is one for half of the rows, so that on average exactly
    the share is kept.
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
    versions = [examples.metadata]
    found: dict[str, list[Floats]] = {}
    if opened.reads_metadata:
        versions = [
            opened.metadata.encode(keep_fields(rows, names, part)).values for parts in kept.values() for part in parts
        ]
        found[WITHOUT_IMAGE] = predict_without_image(opened, examples, versions, "predicting without image")
    if opened.model.reads_image:
        predicted = predict_with_metadata(opened, examples, versions, "predicting with fewer fields")
        found[WITH_IMAGE] = predicted.probabilities
    result = {}
    for image, given in found.items():
        remaining = iter(given)
        for key, parts in kept.items():
            # A run that reads no metadata predicts the same whatever is kept of them.
            result[image + key] = [next(remaining) for _ in parts] if opened.reads_metadata else given
    return result


def _slim(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {key: {measure: of_key[measure] for measure in MEASURES} for key, of_key in values.items()}


def _measured(bootstrap: PooledBootstrap, image: str, key: str, start: dict[str, Any]) -> list[dict[str, Any]]:
    rows, own, full = [], image + key, image + _input()
    for measure in MEASURES:
        value, difference = bootstrap.value(own, measure), bootstrap.difference(own, full, measure)
        rows.append(start | {"measure": measure} | value.columns() | difference.columns("difference"))
    return rows


def compare_missing_metadata(first: MissingMetadata, second: MissingMetadata) -> pd.DataFrame:
    """Compare two runs at every share and pattern, on the same images, values and resamples.

    A run that reads no image predicts the same with one as without: that is compared with the other's with an image.
    """
    for attribute in ("image_ids", "groups", "samples", "draws", "seed"):
        if getattr(first, attribute) != getattr(second, attribute):
            raise DataError(f"{first.name} and {second.name} can't be compared in pairs: their {attribute} differ")
    inputs = [(_input(share), share, "", "") for share in SHARES]
    named = first.patterns.drop_duplicates("removed")
    inputs += [
        (_input(removed=removed), np.nan, name, removed)
        for removed, name in zip(named["removed"], named["pattern"], strict=True)
    ]
    rows = []
    for image in (WITH_IMAGE, WITHOUT_IMAGE):
        for key, share, pattern, removed in inputs:
            # Each run's own name of the input.
            own = [
                (image if WITH_IMAGE + key in run.bootstrap.points else WITHOUT_IMAGE) + key for run in (first, second)
            ]
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
    starts = {
        row["share"]: [Cell(f"{row['share']:.0%}"), Cell(f"{row['answers_kept']:.1f}")]
        for row in measured.curve.to_dict("records")
    }
    title = f"Balanced accuracy by share of metadata kept: {measured.name}"
    return _table(measured, measured.curve, "share", title, ("values kept", "mean number"), starts)


def missing_pattern_table(measured: MissingMetadata) -> PrintedTable:
    starts = {}
    for row in measured.patterns.to_dict("records"):
        share = "" if pd.isna(row["training_share"]) else f"{row['training_share']:.0%}"
        starts[row["removed"]] = [Cell(row["pattern"]), Cell(share), Cell(f"{row['answers_kept']:.1f}")]
    title = f"Balanced accuracy by missing fields: {measured.name}"
    note = "Share of training: of the training rows in which exactly these fields are missing."
    columns = ("metadata", "share of training", "mean number")
    return _table(measured, measured.patterns, "removed", title, columns, starts, (note,))


def _table(
    measured: MissingMetadata,
    table: pd.DataFrame,
    key: str,
    title: str,
    columns: tuple[str, ...],
    starts: Mapping[Any, list[Cell]],
    notes: tuple[str, ...] = (),
) -> PrintedTable:
    """Return a row for each value of the column `key`: the cells that it starts with, then a measure an input."""
    table = table[table["measure"] == MEASURES[0]]
    rows = []
    for value, start in starts.items():
        of_value = table[table[key] == value].to_dict("records")
        rows.append([*start, *(Cell.estimate(one["value"], one["low"], one["high"]) for one in of_value)])
    note = (
        f"{len(measured.image_ids):,} test images, {measured.fields} fields; mean of {measured.draws} random choices "
        f"(seed {measured.seed}). In brackets: 95% intervals from resampling {measured.unit}s. Chance: "
        f"{measured.chance:.3f}."
    )
    return PrintedTable(title, (*columns, *table["photograph"].unique()), rows, (*notes, note))


def missing_difference_table(differences: pd.DataFrame, first: str, second: str) -> PrintedTable:
    """Return how far one run is above another, by what is given; see `compare_missing_metadata`."""
    rows = []
    table = differences[differences["measure"] == MEASURES[0]]
    # All fields and none are shares too.
    twice = [name for name, share in ((NO_FIELDS, 0), (ALL_FIELDS, 1)) if (table["share"] == share).any()]
    for row in table[~table["pattern"].isin(twice)].to_dict("records"):
        given = row["pattern"] or f"{row['share']:.0%} of the values"
        difference = Cell.estimate(row["difference"], row["low"], row["high"], "+.3f", "+.3f")
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
def draw_missing_metadata(runs: Sequence[MissingMetadata]) -> ReportFigure:
    """Draw balanced accuracy against the share of the values kept; of several runs a panel an input."""
    from matplotlib.ticker import PercentFormatter

    data, first = _to_draw(runs, [run.curve for run in runs]), runs[0]
    panels = list(data["photograph"].unique()) if len(runs) > 1 else [""]
    figure, axes = new_figure(1.9 * len(panels) + 0.75, len(panels), 1, sharex=True, sharey=True)
    handles, texts = {}, []
    for axis, panel in zip(axes, panels, strict=True):
        axis.axhline(first.chance, color=INK, linestyle=":", linewidth=1)
        of_panel = data[data["photograph"] == panel] if panel else data
        for (run, image), line in of_panel.groupby(["run", "photograph"], sort=False):
            # Of one run a colour tells the input, of several the run.
            every, name = ([one.name for one in runs], run) if panel else ([WITH_IMAGE, WITHOUT_IMAGE], image)
            place = every.index(str(name))
            look: Any = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 3.5}
            axis.fill_between(line["share"], line["low"], line["high"], color=COLOURS[place], alpha=0.2, linewidth=0)
            (handles[str(name)],) = axis.plot(line["share"], line["value"], **look)
            points = zip(line["share"], line["value"], strict=True)
            texts.append(f"{run} {image}: {', '.join(f'{value:.2f} at {share:.0%}' for share, value in points)}")
        axis.set_title(panel)
        axis.set_ylabel(MEASURE_NAMES[MEASURES[0]])
    axes[-1].set_xlabel("share of the recorded metadata")
    axes[-1].xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2)
    caption = (
        f"{_images(first)}: a random share of the recorded values is kept (mean of {first.draws} choices, the same for "
        f"all runs, seed {first.seed}). Bands: 95% intervals from {first.samples:,} resamples of the "
        f"{first.unit}s; dotted: chance. In practice fields are missing together, see the patterns."
    )
    columns = ["run", "photograph", "share", "answers_kept", "draws", "measure", "value", "low", "high"]
    alt = f"{'; '.join(texts)}. Chance {first.chance:.2f}."
    return ReportFigure("availability", "Missing metadata", caption, alt, figure, data[columns])


@styled
def draw_missing_patterns(runs: Sequence[MissingMetadata]) -> ReportFigure:
    """Draw balanced accuracy for patterns of missing fields, with and without image, of up to four runs."""
    data, first = _to_draw(runs, [run.patterns for run in runs]), runs[0]
    series = list(data[["run", "photograph"]].drop_duplicates().itertuples(index=False, name=None))
    patterns = data.drop_duplicates("removed").sort_values("answers_kept", ascending=False, kind="stable")
    labels = [textwrap.fill(text, LETTERS) for text in patterns["pattern"]]
    heights = [max(LINE * (label.count("\n") + 1), SLOT * len(series)) + GAP for label in labels]
    figure, (axis,) = new_figure(sum(heights) + REST + SLOT * ((len(series) + 1) // 2))
    axis.axvline(first.chance, color=INK, linestyle=":", linewidth=1)
    middles = dict(zip(patterns["removed"], np.cumsum(heights) - np.array(heights) / 2, strict=True))
    handles, texts = {}, []
    for row in data.to_dict("records"):
        place = series.index((row["run"], row["photograph"]))
        y = middles[row["removed"]] + SLOT * (place - (len(series) - 1) / 2)
        axis.plot([row["low"], row["high"]], [y, y], color=COLOURS[place], linewidth=1.3)
        label = f"{row['run']}, {row['photograph']}" if len(runs) > 1 else row["photograph"]
        (handles[label],) = axis.plot(row["value"], y, MARKERS[place], color=COLOURS[place], markersize=4.2)
        values = f"{number(row['value'], '.2f')} {interval(row['low'], row['high'])}"
        texts.append(f"{row['run']}, {row['photograph']}, {row['pattern']}: {values}")
    axis.set_ylim(sum(heights), 0)
    label_rows(axis, list(middles.values()), labels)
    axis.set_xlabel(MEASURE_NAMES[MEASURES[0]])
    columns = 1 if len(runs) > 1 else 2
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)
    known = patterns[patterns["training_share"].notna()]
    shares = zip(known["training_share"], known["pattern"], strict=True)
    caption = (
        f"{_images(first)}, without the fields of a pattern; lines: 95% intervals from {first.samples:,} "
        f"resamples of the {first.unit}s (seed {first.seed}); dotted: chance. Share of the training rows: "
        f"{'; '.join(f'{share:.0%}: {name}' for share, name in shares)}."
    )
    names = ["run", "photograph", "pattern", "removed", "training_share", "answers_kept"]
    data = data[[*names, "measure", "value", "low", "high"]]
    return ReportFigure("patterns", "Patterns of missing metadata", caption, "; ".join(texts), figure, data)


def _to_draw(runs: Sequence[MissingMetadata], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    if not 1 <= len(runs) <= MOST:
        raise ValueError(f"one figure holds 1 to {MOST} runs, not {len(runs)}")
    every = pd.concat([table.assign(run=run.name) for run, table in zip(runs, tables, strict=True)], ignore_index=True)
    return every[every["measure"] == MEASURES[0]].reset_index(drop=True)


def _images(run: MissingMetadata) -> str:
    return images_of(len(run.image_ids), run.bootstrap.groups, run.unit)
