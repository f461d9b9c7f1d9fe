"""Write the page of a suite: what its runs say together, for people who have only a browser."""

# also: What a reader of a suite's page must know first: what was compared, what the intervals allow to say, and what
# spoils it.
# also: Where two systems of a suite differ: the photographs that one gets right and the other wrong, from their
# predictions alone.
# also: Photographs that one system of a suite gets right and another wrong, with what both said.

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from dualrefnet.analysis.cases import KINDS, Disagreement, find_disagreement
from dualrefnet.data.loader import read_dataset
from dualrefnet.data.store import fill_store
from dualrefnet.display.figure import WIDTH, ReportFigure, new_figure, save_figure, styled
from dualrefnet.display.format import MEASURE_NAMES, Cell, PrintedTable
from dualrefnet.display.page import Section, render_page
from dualrefnet.errors import DataError, RecipeError, RunError
from dualrefnet.files import write_text
from dualrefnet.models.registry import METHODS
from dualrefnet.progress import progress_bar, remark, warn
from dualrefnet.recipe import load_recipe
from dualrefnet.report import provenance
from dualrefnet.report.provenance import (
    FROZEN_ENCODER,
    MISSINGNESS,
    MISSINGNESS_REVEALS_CLASS,
    RANDOM_ENCODER,
    SYNTHETIC,
    TERMS,
    protocol_name,
    terms_table,
)
from dualrefnet.report.suite_figures import KEY, described, draw_ablation, draw_systems, names, sizes, units
from dualrefnet.run import Run
from dualrefnet.suite.grid import expand
from dualrefnet.suite.results import LABEL_LEAKING, Aggregate, Key, System, aggregate, flags_of, reads_image
from dualrefnet.suite.tables import LESS_IS_BETTER, SIGNIFICANT, printed_tables

PAGE = "report.html"


# Measures that get a picture; the tables have all of them.
DRAWN = 3


# Measure -> the one that it equals by definition.
SAME = {"recall_macro": "balanced_accuracy", "recall_weighted": "accuracy"}


SUITE_WORDS = (
    ("system", "a method with its image encoder and its metadata, trained once or several times"),
    (
        "fold, seed",
        "one of several divisions into patients to train on and to test on; one of several starts of the same training",
    ),
    (
        "M0, M1, M2, M3",
        "metadata that are read: none; what is recorded of everybody; all fields; those and missingness flags (research)",
    ),
    (
        "Holm's correction",
        "of many comparisons some would differ by chance: p is raised so that a false one among all is unlikely",
    ),
)


# How the titles begin of tables that few readers look up.
BY_CLASS, HOW = "By class", ("How each row was made", "INCOMPLETE")


def write_suite_report(
    folder: Path,
    out: Path | None = None,
    photographs: bool = True,
    root: Path | None = None,
    cache: Path | None = None,
    samples: int = 1000,
) -> Path:
    """Write the page of a suite, and its pictures and numbers in `pictures/` beside it.

    Only what the runs left is read, and for a few photographs the data; no model is asked, so `--discard-models`
    doesn't matter.

    Args:
        folder: of the suite, whether all its runs are finished or not.
        out: folder; None: `report` in the suite folder.
        photographs: show some that two systems differ on; without them the data aren't needed.
        root: where the data lie now, if not where the recipes say.
        cache: where prepared images lie; None: the user's cache folder.
        samples: bootstrap samples.

    Returns:
        The page.

    Raises:
        RunError: it isn't the folder of a suite, or nothing of it is finished.
        RecipeError: one root for two data sets.
    """
    out = out or folder / "report"
    with progress_bar("bootstrap") as show:
        found = aggregate(folder, samples, show)
    _check(found, folder)

    def sections() -> Iterator[Section]:
        yield glance_section(found, folder)
        yield from _picture_section(found)
        yield from pair_sections(found, folder, Photographs(photographs, root, cache), samples)
        yield from _table_sections(found)

    # What an earlier call showed mustn't stay where a later one leaves it out.
    for left in (out / "pictures").glob(f"{PICTURES}*"):
        left.unlink()
    made, shows = [], False
    for section in sections():
        for picture in section.pictures:
            save_figure(picture, out / "pictures")
            shows = shows or picture.name.startswith(PICTURES)
        made.append(section)
        remark(f"done: {section.title}")
    shows = shows and not all(run.metrics.get("drawn") for system in found.collection.systems for run in system.runs)
    if shows:
        remark(
            "the report shows photographs of patients: treat it as patient data, or leave them out with --no-photographs"
        )
    suite = found.collection.suite
    write_text(out / PAGE, render_page(suite.title, suite.description, suite_notes(found), made, shows))
    return out / PAGE


def _check(found: Aggregate, folder: Path) -> None:
    """Refuse a suite of which there is nothing to show."""
    if len(found.splits) or any(system.runs for system in found.collection.systems):
        return
    failed = int((found.collection.missing["state"] == "failed").sum())
    why = f" ({failed} failed: {folder / 'failures'} says why)" if failed else ""
    raise RunError(
        f"nothing of the suite in {folder} is finished{why}: there is nothing to show yet. "
        f"`dualrefnet suite {folder / 'suite.yaml'} --out {folder}` goes on"
    )


def _picture_section(found: Aggregate) -> Iterator[Section]:
    """Yield the section with all systems, if any has a value."""
    suite = found.collection.suite
    systems, comparisons = found.systems, found.comparisons
    different = [measure for measure in suite.measures if SAME.get(measure) not in suite.measures]
    valued = [
        measure
        for measure in different
        if len(systems) and systems.loc[systems["measure"] == measure, "pooled"].notna().any()
    ]
    if not valued:
        return
    items: list[PrintedTable | ReportFigure] = []
    for measure in valued[:DRAWN]:
        items.append(draw_systems(systems, comparisons, measure))
        if suite.rows == "variant" and comparisons.loc[comparisons["measure"] == measure, "difference"].notna().any():
            items.append(draw_ablation(systems, comparisons, measure))
    lead = [
        "Every system with its 95% interval. Lines that overlap don't say that two systems are alike: tested on the same photographs, "
        "their difference has an interval of its own, which the tables give."
    ]
    equal = [
        f"{_name(measure)} equals {_name(SAME[measure])} by definition"
        for measure in suite.measures
        if measure not in different
    ]
    left = [*(f"{_name(measure)} (in the tables)" for measure in valued[DRAWN:]), *equal]
    empty = [_name(measure) for measure in different if measure not in valued]
    if left:
        lead.append(f"Not drawn: {'; '.join(left)}.")
    if empty:
        lead.append(f"Without any value: {', '.join(empty)}.")
    yield Section("systems", "All systems", lead, items)


def _table_sections(found: Aggregate) -> Iterator[Section]:
    """Yield the printed tables: what all readers want open, the rest folded."""
    tables = printed_tables(found)
    main = [table for table in tables if not table.title.startswith((BY_CLASS, *HOW))]
    by_class = [table for table in tables if table.title.startswith(BY_CLASS)]
    how = [table for table in tables if table.title.startswith(HOW)]
    yield Section(
        "tables", "Tables", ["`dualrefnet tables` writes the same tables as CSV, Markdown and LaTeX."], list(main)
    )
    if by_class:
        yield Section(
            "classes", "Class by class", [f"{len(by_class)} tables, of every system."], list(by_class), folded=True
        )
    text = yaml.safe_dump(found.collection.suite.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    lead = ["Save the suite below as a file and give it to `dualrefnet suite` to repeat it."]
    yield Section(
        "made",
        "How this was made, and what the words mean",
        lead,
        [*how, terms_table((*SUITE_WORDS, *TERMS))],
        text,
        folded=True,
    )


def _name(measure: str) -> str:
    return MEASURE_NAMES.get(measure, measure)


# Systems that a sentence names one by one; the pictures and tables have all of them.
LISTED = 16


LEAKING_SPLIT = "leaking split: the same patients or lesions in training and test"


# Flag of a system -> what it means, for a reader who doesn't know the word.
MEANINGS = {
    LABEL_LEAKING: provenance.LABEL_LEAKING,
    LEAKING_SPLIT: (
        "The split leaks: test photographs show patients or lesions that training has seen, so the numbers are too good for new patients"
    ),
    "drawn data, not clinical": SYNTHETIC,
    "frozen encoder": f"{FROZEN_ENCODER}: ways of fusion are compared, not whole systems",
    "encoder from random weights": RANDOM_ENCODER,
}


def glance_section(found: Aggregate, folder: Path) -> Section:
    """Return what was compared and what can be said of it, in the suite's first measure.

    Args:
        found: the tidy tables.
        folder: of the suite.
    """
    lead = []
    if len(found.systems):
        rows = described(found.systems, found.comparisons, found.collection.suite.measures[0])
        planned, finished = (int(rows[name].sum()) for name in ("planned", "runs"))
        systems = f"{len(rows)} systems are compared" if len(rows) > 1 else "One system is measured"
        lead.append(
            f"{systems}; {finished:,} of {planned:,} runs are finished. A run is one training, measured on photographs kept apart."
        )
        several = rows[["dataset", "protocol"]].drop_duplicates().shape[0] > 1
        for (dataset, protocol), members in rows.groupby(["dataset", "protocol"], sort=False):
            title = _title(found, folder, str(dataset))
            kind = protocol_name(str(protocol), units(members).removesuffix("s"))
            tested = (
                f"tested on {sizes(members[members['images'] > 0])}"
                if (members["images"] > 0).any()
                else "no result yet"
            )
            sentences = [
                f"{title}, {kind}: {tested}.",
                *(sentence for sentence in _verdicts(found, members) if sentence),
            ]
            lead += [" ".join(sentences)] if several else sentences
        if rows["low"].notna().any():
            lead.append(
                f"In brackets stands the 95% interval: had other {units(rows)} come, the number would likely lie in it. It takes the "
                "trained models as given; trained again they would change too."
            )
    for (dataset, protocol), rows in (
        found.splits.groupby(["dataset", "protocol"], sort=False) if len(found.splits) else ()
    ):
        known, equal = int((rows["equal"] != "").sum()), int((rows["equal"] == "yes").sum())
        beside = f" {equal} of {known} counts are those of the paper's Table 1." if known else ""
        kind = protocol_name(str(protocol))
        sides = ", ".join(f"{int(side['images'].sum()):,} {name}" for name, side in rows.groupby("split", sort=False))
        lead.append(f"Photographs of {dataset}, {kind}: {sides}.{beside}")
    return Section("glance", "At a glance", lead)


def suite_notes(found: Aggregate) -> list[str]:
    """Return what a reader must know before believing a number of the suite, each once, with the systems that it is
    about.
    """
    systems = found.collection.systems
    notes: dict[str, list[Key]] = {}
    for system in systems:
        for flag in flags_of(system):
            if flag != f"{len(system.runs)} of {system.planned} runs":
                notes.setdefault(MEANINGS.get(flag, f"{flag[0].upper()}{flag[1:]}"), []).append(system.key)
        if _reads_gaps(system):
            notes.setdefault(MISSINGNESS, []).append(system.key)
    rows = (
        described(found.systems, found.comparisons, found.collection.suite.measures[0]) if systems else pd.DataFrame()
    )
    result = [*_incomplete(found, rows), *(f"{note} ({_who(keys, rows)})." for note, keys in notes.items())]
    # Of counted splits nothing is trained, so that no system has a flag.
    leaking = [dataset for dataset, protocol in found.collection.splits if protocol == "paper"]
    if leaking and MEANINGS[LEAKING_SPLIT] not in notes:
        result.append(f"{MEANINGS[LEAKING_SPLIT]} ({', '.join(leaking)}).")
    return result


def _verdicts(found: Aggregate, rows: pd.DataFrame) -> Iterator[str]:
    """Yield what the first measure says of the systems of one data set and protocol, and not more."""
    measure, with_value = found.collection.suite.measures[0], rows[rows["pooled"].notna()]
    name = MEASURE_NAMES.get(measure, measure)
    references = with_value[with_value["is_reference"]]
    pairs = found.comparisons[found.comparisons["measure"] == measure]
    family = int(pairs["p_holm"].notna().sum())
    pairs = rows.merge(pairs[[*KEY, "difference", "p_holm", "note"]], on=KEY, suffixes=("_from_paper", ""))
    if len(references):
        each = _and([f"{row['name']} with {_value(row)}" for row in references.to_dict("records")])
        several = f"s in {name}: {each}. Each other system is compared with the one of them that is most like it."
        yield f"The reference{several if len(references) > 1 else f' in {name}: {each}.'}"
    elif len(with_value) > 1 and not len(pairs):
        reference = found.collection.suite.reference
        why = f"{reference}, the reference, is not among them" if reference else "The suite names no reference"
        yield f"{why}, so no difference is tested."
    leaking = pairs["flags"].str.contains(LABEL_LEAKING, regex=False)
    tested = pairs[pairs["p_holm"].notna() & ~leaking]
    if len(tested):
        yield from _tested(tested, name, measure in LESS_IS_BETTER)
        yield f"A difference counts where p < {SIGNIFICANT} after Holm's correction for {family} comparison{'s' * (family > 1)}."
    if leaking.any():
        yield f"Left out here, because the diagnosis is in its metadata: {_listed(pairs[leaking])}."
    for note, members in pairs[pairs["note"] != ""].groupby("note", sort=False):
        yield f"{str(note)[0].upper()}{str(note)[1:]} ({_listed(members)})."
    if not family and (pairs["note"] == "").any():
        yield f"No interval is drawn of {name}, so no difference is tested."
    yield _best(measure, with_value[~with_value["flags"].str.contains(LABEL_LEAKING, regex=False)], tested)


def _tested(rows: pd.DataFrame, name: str, less: bool) -> Iterator[str]:
    """Yield which systems differ from their reference, and which can't be told from it."""
    differs = rows["p_holm"] < SIGNIFICANT
    worse = rows["difference"] > 0 if less else rows["difference"] < 0
    unknown = "can't be told from the reference with these data, which doesn't mean that there is no difference"
    if not differs.any() or len(rows) == 1:
        which = rows["name"].iloc[0] if len(rows) == 1 else f"Each of the {len(rows)} systems compared"
        verdict = f"is {'worse' if worse.iloc[0] else 'better'} than the reference in {name}, by {rows['difference'].abs().iloc[0]:.3f}"
        yield f"{which} {verdict if differs.any() else unknown}."
        return
    sides = []
    for kind, chosen in (("worse", rows[differs & worse]), ("better", rows[differs & ~worse])):
        gaps = [f"{gap:.3f}" for gap in sorted(chosen["difference"].abs())]
        by = f" by {' to '.join(dict.fromkeys((gaps[0], gaps[-1])))}" if gaps else ""
        sides.append(
            f"{len(chosen) or 'none'} {'is' if len(chosen) < 2 else 'are'} {kind}{by}{f': {_listed(chosen)}' if by else ''}"
        )
    yield f"In {name}, of {len(rows)} systems compared with the reference, {'; '.join(sides)}."
    rest = rows[~differs]
    if len(rest):
        yield f"The other {len(rest) if len(rest) > 1 else 'one'} {unknown}: {_listed(rest)}."


def _best(measure: str, rows: pd.DataFrame, tested: pd.DataFrame) -> str:
    """Name the system with the best value, and say how little or how much that means."""
    records: list[dict[str, Any]] = rows.to_dict("records")  # type: ignore[assignment]
    less, name = measure in LESS_IS_BETTER, MEASURE_NAMES.get(measure, measure)
    if not records:
        return ""
    best = max(records, key=lambda row: -row["pooled"] if less else row["pooled"])
    if len(records) == 1:
        return "" if best["is_reference"] else f"{best['name']}: {name} {_value(best)}."
    says = f"The {'lowest' if less else 'highest'} {name} is that of {best['name']}, {_value(best)}"
    if best["is_reference"]:
        return f"{says}."
    p = tested.loc[tested["name"] == best["name"], "p_holm"].tolist()
    if not p:
        return f"{says}; whether it is better than another isn't tested."
    return f"{says}, " + (
        "better than the reference." if p[0] < SIGNIFICANT else "which can't be told from the reference either."
    )


def _incomplete(found: Aggregate, rows: pd.DataFrame) -> Iterator[str]:
    """Say which runs and splits there are no results of."""
    missing = found.collection.missing
    if not len(missing):
        return
    runs = missing[missing["run"] != ""]
    if len(runs):
        planned, finished = (int(rows[name].sum()) for name in ("planned", "runs"))
        states = ", ".join(f"{count} {state}" for state, count in Counter(runs["state"]).items())
        partial, without = rows[rows["runs"] < rows["planned"]], rows[rows["runs"] == 0]
        keys = [Key(*key) for key in partial[KEY].itertuples(index=False, name=None)]
        yield (
            f"Incomplete: {finished:,} of {planned:,} runs are finished ({states}). Runs are missing of: {_who(keys, rows)}."
            + (f" No run at all is there of: {_listed(without)}." if len(without) else "")
            + " The numbers can change when the others are there; which they are stands at the end of the page."
        )
    splits = len(missing) - len(runs)
    if splits:
        yield f"Not counted yet: {splits} split{'s' * (splits > 1)} of the suite."


def _who(keys: Sequence[Key], rows: pd.DataFrame) -> str:
    """Name systems, or say that it is all of them."""
    reading = {system for system in map(tuple, rows[KEY].to_numpy()) if reads_image(system[2])}
    if len(rows) > 1 and len(keys) == len(rows):
        return "all systems"
    if len(keys) > 1 and set(keys) == reading:
        return "all systems that read images"
    return names(rows[[tuple(key) in set(keys) for key in rows[KEY].to_numpy()]])


def _reads_gaps(system: System) -> bool:
    method = METHODS.get(system.key.method)
    reads = method is not None and method.reads_metadata and system.key.dataset in MISSINGNESS_REVEALS_CLASS
    return reads and any(run.recipe.metadata.tier in ("M2", "M3") for run in system.runs)


def _title(found: Aggregate, folder: Path, dataset: str) -> str:
    """Return a data set's name for people, from a run; without one that of its adapter."""
    for cell in expand(found.collection.suite):
        run = Run(folder / "runs" / cell.run)
        if cell.dataset == dataset and run.finished:
            return str(run.model.get("dataset", {}).get("title", dataset))
    return dataset


def _listed(rows: pd.DataFrame) -> str:
    found = list(dict.fromkeys(rows["name"]))
    return _and(found) if len(found) <= LISTED else f"{', '.join(found[:LISTED])} and {len(found) - LISTED} more"


def _and(parts: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _value(row: Mapping[Any, Any]) -> str:
    return f"{row['pooled']:.3f}" + ("" if pd.isna(row["low"]) else f" [{row['low']:.3f} to {row['high']:.3f}]")


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

    The models may be gone (`--discard-models`), so none is asked: where two models look, the page of a run says
    (`--against`).

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
        raise RecipeError(
            f"--root is the folder of one data set, and the suite has {' and '.join(datasets)}; set DUALREFNET_DATA instead"
        )
    for number, pair in enumerate(pairs, 1):
        disagreement = find_disagreement(*pair.runs, CASES, samples)
        lead, items = list(_sentences(pair, disagreement)), [_table(pair, disagreement)]
        pictures: list[ReportFigure] = []
        if photographs.shown and len(disagreement.chosen):
            try:
                shown = read_photographs(pair.runs[0], disagreement.chosen["image_id"].tolist(), photographs)
                pictures = list(_pictures(pair, disagreement, shown, number if len(pairs) > 1 else None))
            except DataError as error:
                lead.append(
                    "The photographs themselves are left out: they could not be read where this page was written."
                )
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
        other = (
            "the baseline without metadata"
            if second["method"] == BASELINE
            else f"the system farthest from it in {measured}"
        )
        which = (f"fold {fold}, " if protocol == "grouped-cv" else "") + f"seed {seed}"
        rule = f"{titles[0]} is {why}; {titles[1]} is {other}. Of each, one training is looked at: {which}."
        yield Pair(
            (Run(folder / "runs" / names[0]), Run(folder / "runs" / names[1])),
            titles,
            (str(dataset), str(protocol)),
            rule,
        )


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
        raise DataError(
            f"{len(set(image_ids) - there)} of {len(image_ids)} photographs can't be read in {dataset.root}"
        )
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
    """Return the image-only baseline that has most in common with the first system, or the system with the most
    distant value.
    """
    baselines = [row for row in others if row["method"] == BASELINE]
    if baselines:
        return min(
            baselines, key=lambda row: (row["variant"] != first["variant"], row["backbone"] != first["backbone"])
        )
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
    interval = f"difference {gap.value:+.3f} [{gap.low:+.3f} to {gap.high:+.3f}]".replace("-", "−")
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
        rows.append(
            [Cell(str(name)), Cell(f"{len(members):,}"), *(Cell(f"{int(counts.get(kind, 0)):,}") for kind in kinds)]
        )
    columns = ("class", "images", "both right", f"{a} alone", f"{b} alone", "both wrong")
    return PrintedTable(f"Who is right: {a} and {b}", columns, rows)


def _pictures(
    pair: Pair, found: Disagreement, shown: Mapping[str, NDArray[np.uint8]], number: int | None
) -> Iterator[ReportFigure]:
    cases = found.chosen
    for run, end in zip(pair.runs, "ab", strict=True):
        scores = run.predictions.set_index("image_id")
        asked = zip(cases["image_id"], cases[f"predicted_{end}"], strict=True)
        cases = cases.assign(
            **{f"p_predicted_{end}": [float(scores.loc[image_id, f"prob_{said}"]) for image_id, said in asked]}
        )
    for kind, first_right in (("only_a_right", True), ("only_b_right", False)):
        chosen = cases[cases["kind"] == kind]
        if len(chosen):
            name = f"{PICTURES}{number or ''}_{'first' if first_right else 'second'}_right"
            yield draw_cases(chosen, shown, pair.names, first_right, name)


COLUMNS, LETTERS = 3, 21


# Inches: a photograph, a line above it, and what lies between two rows.
PHOTOGRAPH, LINE, GAP = 1.27, 0.118, 0.12


@styled
def draw_cases(
    cases: pd.DataFrame,
    photographs: Mapping[str, NDArray[np.uint8]],
    names: tuple[str, str],
    first_right: bool,
    name: str,
) -> ReportFigure:
    """Draw cases that one system gets right and the other wrong: each photograph below what was said of it.

    Args:
        cases: `image_id`, `label`, and of both systems (`_a`, `_b`) `predicted`, `p_predicted` and `p_true`, the
            probabilities of
            the predicted and of the true class; in the order in which they are drawn, at least one.
        photographs: image id -> (S, S, 3).
        names: of the two systems.
        first_right: whether it is the first system that is right, or the second.
        name: of the picture's files.
    """
    records = cases.to_dict("records")
    words = [_words(record, names) for record in records]
    rows = -(-len(records) // COLUMNS)
    lines = [max(len(said) for said in words[COLUMNS * row : COLUMNS * (row + 1)]) for row in range(rows)]
    height = rows * (PHOTOGRAPH + GAP) + LINE * sum(lines)
    figure, axes = new_figure(height, rows, COLUMNS, WIDTH)
    for axis in axes:
        axis.set_axis_off()
    for axis, record, lines_above in zip(axes, records, words, strict=False):
        axis.imshow(photographs[record["image_id"]], interpolation="none")
        # The words stand on the photograph, also where the row has room to spare.
        axis.set_anchor("N")
        axis.set_title("\n".join(lines_above), fontsize=7, fontweight="normal", pad=3)
    winner, loser = names if first_right else names[::-1]
    shown = "the photograph" if len(records) == 1 else f"the {len(records)} photographs"
    caption = (
        f"Shown: {shown} right with {winner} and wrong with {loser} on whose true class their probabilities differ most, classes in "
        "turn, each patient once: chosen by numbers, not by looks. Above each, prepared as the models read it: the true class, and what "
        "each system said with which probability; where it is wrong, also the probability that it gave the true class."
    )
    said = [
        [f"{which} says {', '.join(_answers(record, end))}" for which, end in zip(names, "ab", strict=True)]
        for record in records
    ]
    alt = "; ".join(f"true {record['label']}: {', '.join(both)}" for record, both in zip(records, said, strict=True))
    return ReportFigure(
        name, f"Right with {winner}, wrong with {loser}", caption, alt, figure, _suite_cases_table(records, names)
    )


def _words(record: Mapping[Any, Any], names: tuple[str, str]) -> list[str]:
    """Return the lines above a photograph."""
    lines = textwrap.wrap(f"true: {record['label']}", LETTERS)
    for which, end in zip(names, "ab", strict=True):
        # A line doesn't end between a class and its probability, unless the two are too long for one.
        answers = [
            part if len(part) >= LETTERS else part.replace(" ", "\N{NO-BREAK SPACE}") for part in _answers(record, end)
        ]
        lines += textwrap.wrap(f"{which}: {', '.join(answers)}", LETTERS)
    return lines


def _answers(record: Mapping[Any, Any], end: str) -> list[str]:
    """Return the predicted class with its probability, and if that is wrong the true one with its own."""
    said, label = record[f"predicted_{end}"], record["label"]
    answer = f"{said} {record[f'p_predicted_{end}']:.0%}"
    return [answer] if said == label else [answer, f"{label} {record[f'p_true_{end}']:.0%}"]


def _suite_cases_table(records: list[dict[Any, Any]], names: tuple[str, str]) -> pd.DataFrame:
    """Return one row a photograph and system."""
    return pd.DataFrame(
        [
            {
                "image_id": record["image_id"],
                "label": record["label"],
                "system": which,
                "predicted": record[f"predicted_{end}"],
                "probability": record[f"p_predicted_{end}"],
                "probability_of_true_class": record[f"p_true_{end}"],
            }
            for record in records
            for which, end in zip(names, "ab", strict=True)
        ]
    )
