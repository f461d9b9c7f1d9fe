"""Where two systems of a suite differ: the photographs that one gets right and the other wrong, from their predictions alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualrefnet.data.image_store import fill_store
from dualrefnet.data.pipeline import read_dataset
from dualrefnet.errors import DataError, RecipeError
from dualrefnet.evaluation.printed_table import Cell, PrintedTable
from dualrefnet.evaluation.tables import MEASURE_NAMES
from dualrefnet.explain.disagreement import KINDS, Disagreement, find_disagreement
from dualrefnet.figures.picture import Picture
from dualrefnet.figures.suite_cases import draw_cases
from dualrefnet.figures.suite_lines import KEY, described
from dualrefnet.progress import warn
from dualrefnet.recipe import load_recipe
from dualrefnet.report.section import Section
from dualrefnet.run import Run
from dualrefnet.suite.aggregate import LABEL_LEAKING, Aggregate
from dualrefnet.suite.collect import Key, System
from dualrefnet.suite.grid import expand
from dualrefnet.suite.notes import LESS_IS_BETTER

BASELINE = "no_metadata"
# How the names of the pictures of photographs begin.
PICTURES = "cases"
# Photographs of each kind of disagreement, and their side at most.
CASES, SIDE = 6, 224


@dataclass(frozen=True)
class Pair:
    """One run of each of two systems, trained and tested on the same images.

    Attributes:
        runs: the two.
        names: of the systems.
        where: data set and protocol.
        rule: why these two, in sentences.
    """

    runs: tuple[Run, Run]
    names: tuple[str, str]
    where: tuple[str, str]
    rule: str


@dataclass(frozen=True)
class Photographs:
    """Whether photographs are shown, and where they come from.

    Attributes:
        shown: False leaves them out.
        root: where the data lie now, if not where the recipe says.
        cache: where prepared images lie.
    """

    shown: bool
    root: Path | None
    cache: Path | None


def pair_sections(found: Aggregate, folder: Path, photographs: Photographs, samples: int) -> Iterator[Section]:
    """Set two systems of each data set and protocol side by side.

    The models may be gone (`--discard-models`), so none is asked: where two models look, the page of a run says (`--against`).

    Args:
        found: the tidy tables.
        folder: of the suite.
        photographs: whether they are shown, and where they are.
        samples: bootstrap samples.

    Raises:
        RecipeError: one root for two data sets.
    """
    pairs = list(choose_pairs(found, folder))
    datasets = sorted({pair.where[0] for pair in pairs})
    if photographs.root is not None and photographs.shown and len(datasets) > 1:
        raise RecipeError(f"--root is the folder of one data set, and the suite has {' and '.join(datasets)}; set DUALREFNET_DATA instead")
    for number, pair in enumerate(pairs, 1):
        disagreement = find_disagreement(*pair.runs, CASES, samples)
        lead, items = list(_sentences(pair, disagreement)), [_table(pair, disagreement)]
        pictures: list[Picture] = []
        if photographs.shown and len(disagreement.chosen):
            try:
                shown = read_photographs(pair.runs[0], disagreement.chosen["image_id"].tolist(), photographs)
                pictures = list(_pictures(pair, disagreement, shown, number if len(pairs) > 1 else None))
            except DataError as error:
                lead.append("The photographs themselves are left out: they could not be read where this page was written.")
                warn(f"no photographs of {pair.where[0]} in the report: {error}")
        key, title = "differ", "Where two systems differ"
        if len(pairs) > 1:
            key, title = f"{key}-{number}", f"{title}: {pair.where[0]}, protocol {pair.where[1]}"
        yield Section(key, title, lead, [*items, *pictures])


def choose_pairs(found: Aggregate, folder: Path) -> Iterator[Pair]:
    """Choose two systems of each data set and protocol: the reference, and the one that is most unlike it.

    First is the reference; of several, or of all systems where there is none, the one that is best in the suite's first
    measure. Second is the image-only baseline; without one the system that is farthest from the first in that measure.
    Systems whose metadata know the diagnosis are passed over.
    """
    suite, systems = found.collection.suite, {system.key: system for system in found.collection.systems}
    if not systems:
        return
    measure = suite.measures[0]
    rows = described(found.systems, found.comparisons, measure)
    rows = rows[rows["pooled"].notna() & ~rows["flags"].str.contains(LABEL_LEAKING, regex=False)]
    folders = {
        (Key(cell.dataset, cell.protocol, cell.method, cell.backbone, cell.variant), cell.fold, cell.seed): cell.run
        for cell in expand(suite)
    }
    measured, better = MEASURE_NAMES.get(measure, measure), -1 if measure in LESS_IS_BETTER else 1
    for (dataset, protocol), group in rows.groupby(["dataset", "protocol"], sort=False):
        members: list[dict[str, Any]] = group.to_dict("records")  # type: ignore[assignment]
        references = [row for row in members if row["is_reference"]]
        first = max(references or members, key=lambda row: better * row["pooled"])
        common = {_key(row): _common(systems[_key(first)], systems[_key(row)], folders) for row in members}
        others = [row for row in members if common[_key(row)]]
        if not others:
            continue
        second = _most_unlike(first, others)
        fold, seed, *names = common[_key(second)][0]
        titles = _short_names(first, second)
        best = f"the one with the best {measured}"
        why = f"the system with the best {measured} (the {'reference has no result' if suite.reference else 'suite names no reference'})"
        if references:
            why = "the reference" + (f" (of {len(references)} {best})" if len(references) > 1 else "")
        other = "the baseline without metadata" if second["method"] == BASELINE else f"the system farthest from it in {measured}"
        which = (f"fold {fold}, " if protocol == "grouped-cv" else "") + f"seed {seed}"
        rule = f"{titles[0]} is {why}; {titles[1]} is {other}. Of each, one training is looked at: {which}."
        yield Pair((Run(folder / "runs" / names[0]), Run(folder / "runs" / names[1])), titles, (str(dataset), str(protocol)), rule)


def read_photographs(run: Run, image_ids: Sequence[str], photographs: Photographs) -> dict[str, NDArray[np.uint8]]:
    """Read a few photographs as a run's model reads them.

    Args:
        run: whose recipe prepares them.
        image_ids: which.
        photographs: where they are.

    Returns:
        Image id -> (S, S, 3), S at most `SIDE`.

    Raises:
        DataError: the data set, or one of the photographs, isn't there or can't be read.
    """
    recipe = load_recipe(run.recipe, {"data.root": str(photographs.root)} if photographs.root is not None else {})
    dataset = read_dataset(recipe)
    wanted = dataset.with_image[dataset.with_image["image_id"].isin(image_ids)]
    # A store of its own for these few: that of the whole data set may be gone, and takes long to fill.
    store = fill_store(wanted, recipe.image, min(SIDE, recipe.image.size), photographs.cache) if len(wanted) else None
    there = set(store.image_ids) - set(store.broken) if store else set()
    if store is None or there != set(image_ids):
        raise DataError(f"{len(set(image_ids) - there)} of {len(image_ids)} photographs can't be read in {dataset.root}")
    return dict(zip(image_ids, store.read(store.rows_of(image_ids)), strict=True))


def _common(one: System, other: System, folders: Mapping[tuple[Key, int, int], str]) -> list[tuple[int, int, str, str]]:
    """Return (fold, seed, the run of each) of what both have, lowest first; nothing if they can't be set side by side."""
    if one.key == other.key or one.pool is None or other.pool is None or one.pool.fingerprint != other.pool.fingerprint:
        return []
    both = {(run.fold, run.seed) for run in one.runs} & {(run.fold, run.seed) for run in other.runs}
    runs = [(fold, seed, folders[one.key, fold, seed], folders[other.key, fold, seed]) for fold, seed in sorted(both)]
    # Two systems of one recipe share their runs.
    return [each for each in runs if each[2] != each[3]]


def _most_unlike(first: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the image-only baseline that has most in common with the first system, or the system with the most distant value."""
    baselines = [row for row in others if row["method"] == BASELINE]
    if baselines:
        return min(baselines, key=lambda row: (row["variant"] != first["variant"], row["backbone"] != first["backbone"]))
    return max(others, key=lambda row: abs(float(row["pooled"] - first["pooled"])))


def _key(row: Mapping[str, Any]) -> Key:
    return Key(*(row[name] for name in KEY))


def _short_names(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str]:
    """Return the systems' names without the panel that both stand in, if they can be told apart without it."""
    one, other = (f"{row['label']} {row['series']}".strip() for row in (first, second))
    return (one, other) if one != other else (str(first["name"]), str(second["name"]))


def _sentences(pair: Pair, found: Disagreement) -> Iterator[str]:
    (a, b), counts, gap = pair.names, found.counts, found.difference
    yield pair.rule
    yield (
        f"Of the {len(found.table):,} test photographs both are right on {counts['both_right']:,}, {a} alone on "
        f"{counts['only_a_right']:,}, {b} alone on {counts['only_b_right']:,}, and none on {counts['both_wrong']:,}."
    )
    interval = f"difference {gap.difference:+.3f} [{gap.low:+.3f} to {gap.high:+.3f}]".replace("-", "−")
    yield (
        f"Balanced accuracy on them: {found.balanced_accuracy_a:.3f} of {a}, {found.balanced_accuracy_b:.3f} of {b}, {interval}. "
        "It is the result of these two trainings only; the tables have that of all."
    )


def _table(pair: Pair, found: Disagreement) -> PrintedTable:
    a, b = pair.names
    kinds, table = list(KINDS.values()), found.table
    rows = []
    for name, members in [*table.groupby("label"), ("all", table)]:
        counts = members["kind"].value_counts()
        rows.append([Cell(str(name)), Cell(f"{len(members):,}"), *(Cell(f"{int(counts.get(kind, 0)):,}") for kind in kinds)])
    columns = ("class", "images", "both right", f"{a} alone", f"{b} alone", "both wrong")
    return PrintedTable(f"Who is right: {a} and {b}", columns, rows)


def _pictures(pair: Pair, found: Disagreement, shown: Mapping[str, NDArray[np.uint8]], number: int | None) -> Iterator[Picture]:
    cases = found.chosen
    for run, end in zip(pair.runs, "ab", strict=True):
        scores = run.predictions.set_index("image_id")
        asked = zip(cases["image_id"], cases[f"predicted_{end}"], strict=True)
        cases = cases.assign(**{f"p_predicted_{end}": [float(scores.loc[image_id, f"prob_{said}"]) for image_id, said in asked]})
    for kind, first_right in (("only_a_right", True), ("only_b_right", False)):
        chosen = cases[cases["kind"] == kind]
        if len(chosen):
            name = f"{PICTURES}{number or ''}_{'first' if first_right else 'second'}_right"
            yield draw_cases(chosen, shown, pair.names, first_right, name)
