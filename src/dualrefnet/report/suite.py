"""Write the page of a suite: what its runs say together, for people who have only a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from dualrefnet.errors import RunError
from dualrefnet.evaluation.printed_table import Cell, PrintedTable
from dualrefnet.evaluation.tables import MEASURE_NAMES
from dualrefnet.figures.picture import Picture, save_picture
from dualrefnet.figures.suite import draw_ablation, draw_systems
from dualrefnet.files import write_text
from dualrefnet.progress import progress_bar, remark
from dualrefnet.report.page import render_page
from dualrefnet.report.provenance import WORDS
from dualrefnet.report.section import Section
from dualrefnet.report.suite_glance import glance_section, suite_notes
from dualrefnet.report.suite_pair import PICTURES, Photographs, pair_sections
from dualrefnet.suite.aggregate import Aggregate, aggregate
from dualrefnet.suite.tables import printed_tables

PAGE = "report.html"
# Measures that get a picture; the tables have all of them.
DRAWN = 3
# Measure -> the one that it equals by definition.
SAME = {"recall_macro": "balanced_accuracy", "recall_weighted": "accuracy"}
SUITE_WORDS = (
    ("system", "a method with its image encoder and its metadata, trained once or several times"),
    ("fold, seed", "one of several divisions into patients to train on and to test on; one of several starts of the same training"),
    ("M0, M1, M2, M3", "metadata that are read: none; what is recorded of everybody; all fields; those and missingness flags (research)"),
    ("Holm's correction", "of many comparisons some would differ by chance: p is raised so that a false one among all is unlikely"),
)  # fmt: skip
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

    Only what the runs left is read, and for a few photographs the data; no model is asked, so `--discard-models` doesn't matter.

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
            save_picture(picture, out / "pictures")
            shows = shows or picture.name.startswith(PICTURES)
        made.append(section)
        remark(f"done: {section.title}")
    shows = shows and not all(run.metrics.get("drawn") for system in found.collection.systems for run in system.runs)
    if shows:
        remark("the report shows photographs of patients: treat it as patient data, or leave them out with --no-photographs")
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
    valued = [measure for measure in different if len(systems) and systems.loc[systems["measure"] == measure, "pooled"].notna().any()]
    if not valued:
        return
    items: list[PrintedTable | Picture] = []
    for measure in valued[:DRAWN]:
        items.append(draw_systems(systems, comparisons, measure))
        if suite.rows == "variant" and comparisons.loc[comparisons["measure"] == measure, "difference"].notna().any():
            items.append(draw_ablation(systems, comparisons, measure))
    lead = [
        "Every system with its 95% interval. Lines that overlap don't say that two systems are alike: tested on the same photographs, "
        "their difference has an interval of its own, which the tables give."
    ]
    equal = [f"{_name(measure)} equals {_name(SAME[measure])} by definition" for measure in suite.measures if measure not in different]
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
    yield Section("tables", "Tables", ["`dualrefnet tables` writes the same tables as CSV, Markdown and LaTeX."], list(main))
    if by_class:
        yield Section("classes", "Class by class", [f"{len(by_class)} tables, of every system."], list(by_class), folded=True)
    words = PrintedTable("Words", ("word", "meaning"), [[Cell(word), Cell(meaning)] for word, meaning in (*SUITE_WORDS, *WORDS)], left=2)
    text = yaml.safe_dump(found.collection.suite.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    lead = ["Save the suite below as a file and give it to `dualrefnet suite` to repeat it."]
    yield Section("made", "How this was made, and what the words mean", lead, [*how, words], text, folded=True)


def _name(measure: str) -> str:
    return MEASURE_NAMES.get(measure, measure)
