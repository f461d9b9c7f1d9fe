"""The tables of a suite: tidy CSV files, and printed tables with their notes as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from dualrefnet.display.format import (
    CLASS_COLUMNS,
    COST_COLUMNS,
    MEASURE_NAMES,
    SIGNIFICANT,
    Cell,
    PrintedTable,
    billions,
    class_difference_table,
    escape_markdown,
    interval,
    millions,
    number,
    p_value,
)
from dualrefnet.evaluation.bootstrap import images_of
from dualrefnet.files import write_csv, write_text
from dualrefnet.models.registry import METHODS
from dualrefnet.suite.grid import Key, Suite
from dualrefnet.suite.results import (
    LABEL_LEAKING,
    SuiteResults,
    System,
    aggregate,
    caveats,
    other_experiment,
    printed_value,
)

# What a table is for: the results, the results by class, or how they came about.
Kind = Literal["results", "classes", "details"]

DAGGER = "†"
LESS_IS_BETTER = ("ece", "brier", "log_loss")

# Cells without a result that a printed table names; all of them are in missing.csv.
NAMED = 12

_CLASS_TABLES = {"pad_ufes_20": "2a", "isic_2019": "2b"}


def write_tables(suite_dir: Path, found: SuiteResults | None = None) -> list[Path]:
    """Write `SUITE_DIR/tables/`: a CSV for each table with rows, table.md and table.tex; return the files."""
    found = found or aggregate(suite_dir)
    folder, written = suite_dir / "tables", []
    for name in ("systems", "comparisons", "per_class", "class_comparisons", "splits", "missing"):
        path, rows = folder / f"{name}.csv", getattr(found, name)
        if len(rows):
            write_csv(path, with_flags_as_text(rows).drop(columns="unit", errors="ignore"))
            written.append(path)
        else:
            # One without rows must not leave an older file behind.
            path.unlink(missing_ok=True)
    suite, tables = found.suite, [table for _, table in printed_tables(found)]
    head = [f"{text}\n" for text in (f"# {escape_markdown(suite.title)}", escape_markdown(suite.description)) if text]
    write_text(folder / "table.md", "\n".join([*head, *(table.markdown() for table in tables)]))
    comment = f"% {suite.title}\n% \\usepackage{{booktabs}}; the intervals are 95% intervals.\n"
    latex = [table.latex(f"{suite.name}-{place}") for place, table in enumerate(tables, 1)]
    write_text(folder / "table.tex", "\n".join([comment, *latex]))
    return [*written, folder / "table.md", folder / "table.tex"]


def with_flags_as_text(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows of systems as a file holds them: their flags in one text, the number of runs among them."""
    return rows.assign(flags=[_flags(row) for row in rows.to_dict("records")]) if "flags" in rows else rows


def _flags(row: dict[Any, Any]) -> str:
    runs = [f"{row['runs']} of {row['planned']} runs"] if row["runs"] < row["planned"] else []
    return "; ".join([*runs, *row["flags"]])


def printed_tables(found: SuiteResults) -> list[tuple[Kind, PrintedTable]]:
    """Return the tables in their order: what is missing comes first, so that nobody overlooks it."""
    tables: list[tuple[Kind, PrintedTable]] = []
    if len(found.missing):
        tables.append(("details", _missing_table(found)))
    if len(found.systems):
        for _, rows in found.systems.groupby(["dataset", "protocol"], sort=False):
            tables += _group_tables(found, rows)
    if len(found.splits):
        for (dataset, protocol), rows in found.splits.groupby(["dataset", "protocol"], sort=False):
            tables.append(("results", _split_table(str(dataset), str(protocol), rows)))
    return tables


def _group_tables(found: SuiteResults, rows: pd.DataFrame) -> Iterator[tuple[Kind, PrintedTable]]:
    suite, measures = found.suite, found.suite.measures
    columns = [MEASURE_NAMES.get(measure, measure) for measure in measures]
    cells, compared = _by_key(rows), _by_key(found.comparisons)
    keys = list(dict.fromkeys(key for key, _ in cells))
    names = {key: _row_name(key, cells[key, measures[0]], suite, keys) for key in keys}
    where = f"{keys[0].dataset}, protocol {keys[0].protocol}"
    best = {measure: _best(rows[rows["measure"] == measure], measure) for measure in measures}

    def table(
        title: str,
        heads: Collection[str],
        line: Callable[[Key], list[Cell]],
        members: Collection[Key] = keys,
        notes: tuple[str, ...] = (),
        left: int = 2,
    ) -> PrintedTable:
        lines = [[*names[key], *line(key)] for key in members]
        return PrintedTable(f"{title} ({where})", (suite.rows, "backbone", *heads), lines, notes, left)

    def values(key: Key) -> list[Cell]:
        row = cells[key, measures[0]]
        line = []
        for measure in measures:
            differs = (key, measure) in compared and compared[key, measure]["p_holm"] < SIGNIFICANT
            value = cells[key, measure]
            line.append(_value_cell(value, value["pooled"] == best[measure], "*" if differs else ""))
        unfinished = f" of {row['planned']}" if row["runs"] < row["planned"] else ""
        return [*line, Cell(f"{row['runs']}{unfinished}")]

    def spread(key: Key) -> list[Cell]:
        line = [cells[key, measure] for measure in measures]
        sds = ["" if pd.isna(row["sd"]) else f" ± {row['sd']:.3f}" for row in line]
        return [Cell(number(row["mean"]) + sd) for row, sd in zip(line, sds, strict=True)]

    def differences(key: Key) -> list[Cell]:
        first = compared[key, measures[0]]
        line = [_difference_cell(compared[key, measure]) for measure in measures]
        return [*line, Cell(first["note"] or first["reference"])]

    def origin(key: Key) -> list[Cell]:
        row = cells[key, measures[0]]
        cost = (Cell(millions(row["parameters"])), Cell(billions(row["multiply_adds"])))
        return [Cell(row["encoder"].replace("_", "-")), Cell(row["weights"]), Cell(_flags(row)), *cost]

    yield "results", table(suite.title, [*columns, "runs"], values, notes=_notes(found, rows, keys))
    if rows["sd"].notna().any():
        yield "results", table("Mean ± standard deviation over runs", columns, spread)
    if rows["paper"].notna().any():
        title = "The paper's value (pooled − paper)"
        yield "results", table(title, columns, lambda key: [_paper_cell(cells[key, measure]) for measure in measures])
    rivals = [key for key in keys if (key, measures[0]) in compared]
    if rivals:
        title = f"Difference from {suite.reference_of(keys[0].dataset)} [95% interval], corrected p"
        yield "results", table(title, [*columns, "compared with"], differences, rivals)
    yield "details", table("How each row was made", ["encoder", "started from", "notes", *COST_COLUMNS], origin, left=5)
    if len(found.per_class):
        for values_of, members in found.per_class.groupby(list(Key._fields), sort=False):
            key = Key(*map(str, values_of))
            if key in names:
                yield from _class_tables(key, f"{_title(names[key])}, {where}", members)
    if len(found.class_comparisons):
        family = int(found.class_comparisons.groupby("measure")["p"].count().max())
        titles = {" ".join(part for part in key[2:] if part): _title(name) for key, name in names.items()}
        for values_of, members in found.class_comparisons.groupby([*Key._fields, "reference"], sort=False):
            *key_values, reference = map(str, values_of)
            if Key(*key_values) in names:
                pair = (_title(names[Key(*key_values)]), titles[reference])
                ends = [name.rpartition(" ") for name in pair]
                if ends[0][2] == ends[1][2] and ends[0][0] != ends[1][0]:
                    # One encoder for both.
                    pair = (ends[0][0], ends[1][0])
                title = f"By class, difference from {pair[1]}: {pair[0]}, {where}"
                yield "classes", class_difference_table(members, pair, title, family)


def _title(name: list[Cell]) -> str:
    return " ".join(cell.text for cell in name if cell.text)


def _by_key(table: pd.DataFrame) -> dict[tuple[Key, str], dict[str, Any]]:
    records: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    return {(Key(*(row[name] for name in Key._fields)), row["measure"]): row for row in records}


def _row_name(key: Key, row: dict[str, Any], suite: Suite, keys: list[Key]) -> list[Cell]:
    method = METHODS.get(key.method)
    title = method.title if method else key.method
    parts = [title, key.variant]
    if suite.rows == "variant":
        several = len({other.method for other in keys}) > 1
        parts = [key.variant or "unchanged", title if several else ""]
    text = ", ".join(part for part in parts if part)
    text += " (LABEL-LEAKING IMPUTATION)" if LABEL_LEAKING in row["flags"] else ""
    backbone = "–" if method and not method.reads_image else key.backbone.replace("+", " + ")
    return [Cell(text, mark=DAGGER if method and method.reconstruction else ""), Cell(backbone)]


def _best(rows: pd.DataFrame, measure: str) -> float:
    """Return the best value of a column; NaN (nothing is bold) if there are not two to choose from."""
    values = rows.loc[[LABEL_LEAKING not in flags for flags in rows["flags"]], "pooled"].dropna()
    if len(values) < 2:
        return float("nan")
    return float(values.min() if measure in LESS_IS_BETTER else values.max())


def _value_cell(row: dict[str, Any], bold: bool = False, mark: str = "") -> Cell:
    return Cell(number(row["pooled"]), interval(row["low"], row["high"], ".3f"), bold, mark)


def _difference_cell(row: dict[str, Any]) -> Cell:
    small = f"{interval(row['low'], row['high'], '.3f')} {p_value(row['p_holm'])}"
    return Cell(number(row["difference"], "+.3f"), small.strip())


def _paper_cell(row: dict[str, Any]) -> Cell:
    small = "" if pd.isna(row["difference"]) else f"({number(row['difference'], '+.3f')})"
    if not small and row["paper_average"] and not pd.isna(row["pooled"]):
        small = f"({row['paper_average']} average)"
    return Cell(number(row["paper"]), small)


def _class_tables(key: Key, title: str, rows: pd.DataFrame) -> Iterator[tuple[Kind, PrintedTable]]:
    columns = ("class", "images", *(CLASS_COLUMNS[measure] for measure in dict.fromkeys(rows["measure"])))
    lines, paper = [], []
    for name, group in rows.groupby("class", sort=False):
        cells: list[dict[str, Any]] = group.assign(paper_average="").to_dict("records")  # type: ignore[assignment]
        head = [Cell(str(name)), Cell(str(cells[0]["images"]))]
        lines.append([*head, *map(_value_cell, cells)])
        paper.append([*head, *map(_paper_cell, cells)])
    yield "classes", PrintedTable(f"By class: {title}", columns, lines)
    if rows["paper"].notna().any():
        notes = tuple(caveats(key.dataset, _CLASS_TABLES.get(key.dataset, ""), [key.method]))
        yield "classes", PrintedTable(f"By class, the paper's value (pooled − paper): {title}", columns, paper, notes)


def _split_table(dataset: str, protocol: str, rows: pd.DataFrame) -> PrintedTable:
    splits = list(dict.fromkeys(rows["split"]))
    lines = []
    for name, cells in [*rows.groupby("class", sort=False), ("total", rows)]:
        line = [Cell(str(name))]
        for split in splits:
            chosen = cells[cells["split"] == split]
            images, paper = int(chosen["images"].sum()), chosen["paper"].sum(min_count=1)
            small = "" if pd.isna(paper) else f"({int(paper)})" if paper == images else f"≠ ({int(paper)})"
            line.append(Cell(str(images), small))
        lines.append(line)
    known, unequal = int((rows["equal"] != "").sum()), int((rows["equal"] == "NO").sum())
    counts = f"{unequal} of {known} counts are NOT" if unequal else f"all {known} counts are"
    notes = (f"{counts[0].upper()}{counts[1:]} those of the paper's Table 1.", *caveats(dataset, "1", []))
    title = f"Images, in brackets the paper's: {dataset}, protocol {protocol}"
    return PrintedTable(title, ("class", *splits), lines, notes if known else ())


def _missing_table(found: SuiteResults) -> PrintedTable:
    missing = found.missing.sort_values("state", key=lambda state: state != "failed", kind="stable")
    rows = [[Cell(str(value)) for value in row] for row in missing[["cell", "state", "error"]].to_numpy()[:NAMED]]
    more = (f"and {len(missing) - NAMED} more: missing.csv",) if len(missing) > NAMED else ()
    planned = sum(system.planned for system in found.members)
    finished = sum(len(system.runs) for system in found.members)
    title = f"INCOMPLETE: {finished} of {planned} runs are finished; without a result are"
    return PrintedTable(title, ("cell", "state", "error"), rows, more, left=3)


def _notes(found: SuiteResults, rows: pd.DataFrame, keys: list[Key]) -> tuple[str, ...]:
    """Return the notes below the main table of one data set and protocol."""
    suite, dataset = found.suite, keys[0].dataset
    tested = rows[rows["images"] > 0].drop_duplicates(["images", "groups"])
    sizes = [images_of(row["images"], row["groups"], row["unit"], "images") for row in tested.to_dict("records")]
    units = " or ".join(dict.fromkeys(f"{unit}s" for unit in tested["unit"])) or "groups"
    notes = [
        "Value [95% interval]: the test predictions of all folds pooled, measured once per seed, averaged over seeds. "
        f"The interval comes from {found.samples} bootstrap samples of {units}, for the models as trained. "
        f"Tested on: {' or '.join(sizes) or 'nothing yet'}.",
        "Bold: the best value of the column, regardless of significance.",
    ]
    if rows["sd"].notna().any():
        notes.append("Mean ± standard deviation: over runs (folds × seeds), each measured on its own test fold.")
    intervals = rows[rows["pooled"].notna()].groupby("measure", sort=False)["low"].count()
    bare = [MEASURE_NAMES.get(measure, measure) for measure in suite.measures if not intervals.get(measure, True)]
    if bare:
        notes.append(f"No interval is available for: {'; '.join(bare)}.")
    if (found.comparisons["dataset"] == dataset).any():
        family = int((found.comparisons["measure"] == suite.measures[0]).sum())
        notes.append(
            f"*: differs from {suite.reference_of(dataset)}, p < .05 after Holm's correction for {family} comparisons "
            "per measure; two-sided p from the same bootstrap samples for both."
        )
    if rows["encoder"].eq("frozen").any():
        notes.append(
            "Frozen encoder: the features of every image were computed once, without augmentation, and the auxiliary "
            "task has no effect. Fusion methods are compared, not full models."
        )
    systems = [system for system in found.members if system.key in keys]
    notes += list(dict.fromkeys(note for system in systems for note in _leakage_notes(system)))[:2]
    methods = dict.fromkeys(key.method for key in keys)
    for known in (METHODS[method] for method in methods if method in METHODS):
        if known.reconstruction:
            notes.append(f"{DAGGER} {known.title} is reconstructed in part: {known.reconstruction}.")
    if rows["paper"].notna().any():
        for table in dict.fromkeys(system.paper.table or suite.table or "" for system in systems):
            notes += caveats(dataset, table, methods)
    departing = [
        system.departures
        for system in systems
        if system.departures and any(printed_value(system, measure, suite) for measure in suite.measures)
    ]
    if departing:
        notes.append(other_experiment(dict.fromkeys(text for some in departing for text in some)))
    return tuple(dict.fromkeys(notes))


def _leakage_notes(system: System) -> Iterator[str]:
    """Yield what the training splits of a system's runs reveal of their test splits."""
    for unit in ("patient", "lesion"):
        shares = [share for run in system.runs if (share := (run.metrics.get("leakage") or {}).get(unit))]
        if not shares:
            continue
        train, either = (float(np.mean([share[key] for share in shares])) for key in ("train", "train_or_val"))
        if either:
            yield (
                f"LEAK: {train:.1%} of the test images show a {unit} that is also in train ({either:.1%} with "
                "validation), so the numbers are too optimistic."
            )
        else:
            yield f"No test image shows a {unit} of train or validation."
