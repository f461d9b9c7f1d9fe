"""What stands below the printed tables: what the numbers mean, what the protocol leaks, what is wrong with the
paper's.
"""

# also: Write the tables of a suite: tidy CSVs, and one page as Markdown and as LaTeX.

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualrefnet.display.format import CLASS_COLUMNS, MEASURE_NAMES, Cell, PrintedTable, escape_markdown
from dualrefnet.files import write_csv, write_text
from dualrefnet.models.registry import METHODS
from dualrefnet.progress import progress_bar
from dualrefnet.suite.paper import caveats
from dualrefnet.suite.results import LABEL_LEAKING, Aggregate, Key, System, aggregate

DAGGER = "†"


LESS_IS_BETTER = ("ece", "brier", "log_loss")


_CLASS_TABLES = {"pad_ufes_20": "2a", "isic_2019": "2b"}


def group_notes(found: Aggregate, members: list[Key]) -> tuple[str, ...]:
    """Return the notes below the main table of one data set and protocol.

    Args:
        found: the tidy tables.
        members: the systems of the table.
    """
    suite = found.collection.suite
    systems = [system for system in found.collection.systems if system.key in members]
    rows = found.systems[
        found.systems["dataset"].eq(members[0].dataset) & found.systems["protocol"].eq(members[0].protocol)
    ]
    sizes = rows.loc[rows["images"] > 0, ["images", "groups"]].drop_duplicates().to_numpy()
    kind = "lesions" if members[0].dataset == "isic_2019" else "patients"
    tested = " or ".join(f"{images} images of {groups} {kind}" for images, groups in sizes) or "nothing yet"
    notes = [
        "Value [95% interval]: the test predictions of all folds put together, measured once a seed, averaged over seeds. "
        f"The interval comes from {found.samples} bootstrap samples of {kind} and takes the trained models as given. Tested on: {tested}.",
        "Bold: the best value of the column; that is no statement about significance.",
    ]
    if rows["sd"].notna().any():
        notes.append("Mean ± standard deviation: over runs (folds × seeds), each measured on its own test fold.")
    drawn = rows[rows["pooled"].notna()].groupby("measure", sort=False)["low"].count()
    bare = [MEASURE_NAMES.get(measure, measure) for measure in suite.measures if not drawn.get(measure, True)]
    if bare:
        notes.append(f"No interval is drawn of: {'; '.join(bare)}.")
    compared = found.comparisons[found.comparisons["dataset"].isin([members[0].dataset])]
    if len(compared):
        family = int((found.comparisons["measure"] == suite.measures[0]).sum())
        notes.append(
            f"*: differs from {suite.reference}, p < .05 after Holm's correction for {family} comparisons a measure; p two-sided, from the "
            "same bootstrap samples for both."
        )
    if rows["encoder"].eq("frozen").any():
        notes.append(
            "Frozen encoder: what it makes of every image was computed once, and the rest was trained on that: no augmentation, and the "
            "auxiliary task has no effect. It compares ways of fusion, not whole systems."
        )
    notes += [f"{message}." for system in systems for message in _leaks(system)][:2]
    methods = dict.fromkeys(key.method for key in members)
    for method in methods:
        known = METHODS.get(method)
        if known and known.reconstruction:
            notes.append(f"{DAGGER} {known.title} is reconstructed in part: {known.reconstruction}.")
    if rows["paper"].notna().any():
        tables = [system.paper.get("table") or suite.table or "" for system in systems]
        notes += [note for table in dict.fromkeys(tables) for note in caveats(members[0].dataset, table, methods)]
    return tuple(dict.fromkeys(notes))


def class_notes(key: Key) -> tuple[str, ...]:
    """Return the notes below a table by class."""
    return tuple(caveats(key.dataset, _CLASS_TABLES.get(key.dataset, ""), [key.method]))


def split_notes(dataset: str, rows: pd.DataFrame) -> tuple[str, ...]:
    """Return the notes below the counts of a split."""
    known, unequal = int((rows["equal"] != "").sum()), int((rows["equal"] == "NO").sum())
    if not known:
        return ()
    said = (
        f"all {known} counts are those of Table 1"
        if not unequal
        else f"{unequal} of {known} counts are NOT those of Table 1 (≠)"
    )
    return (f"Beside the paper: {said}.", *caveats(dataset, "1", []))


def _leaks(system: System) -> list[str]:
    """Say what the training sides of a system's runs give away of their test sides."""
    result = []
    for name in ("patient", "lesion"):
        shares = [shares for run in system.runs if (shares := (run.metrics.get("leakage") or {}).get(name))]
        if not shares:
            continue
        train, seen = (float(np.mean([share[side] for share in shares])) for side in ("train", "train_or_val"))
        if seen:
            result.append(
                f"LEAK: {train:.1%} of the test images show a {name} that is also in train ({seen:.1%} with validation), so the "
                "numbers are too good"
            )
        else:
            result.append(f"No test image shows a {name} of train or validation")
    return result


SIGNIFICANT = 0.05


# Cells without a result that the page names; all of them are in missing.csv.
NAMED = 12


def write_tables(suite_dir: Path) -> list[Path]:
    """Write `SUITE_DIR/tables/`: systems, comparisons, per_class, splits and missing as CSV (each if it has rows),
    table.md, table.tex.

    Args:
        suite_dir: folder of a suite, whether all its cells are finished or not.

    Returns:
        The files written.

    Raises:
        RunError: it isn't the folder of a suite, or the suite names a measure that doesn't exist.
    """
    with progress_bar("bootstrap") as show:
        found = aggregate(suite_dir, progress=show)
    folder = suite_dir / "tables"
    written = []
    for name in ("systems", "comparisons", "per_class", "splits"):
        written += _write_rows(folder / f"{name}.csv", getattr(found, name))
    written += _write_rows(folder / "missing.csv", found.collection.missing)
    suite, tables = found.collection.suite, printed_tables(found)
    head = [
        f"# {escape_markdown(suite.title)}\n",
        *([f"{escape_markdown(suite.description)}\n"] if suite.description else []),
    ]
    write_text(folder / "table.md", "\n".join([*head, *(table.markdown() for table in tables)]))
    comment = f"% {suite.title}\n% \\usepackage{{booktabs}}; the intervals are 95% intervals.\n"
    latex = [table.latex(f"{suite.name}-{number}") for number, table in enumerate(tables, 1)]
    write_text(folder / "table.tex", "\n".join([comment, *latex]))
    return [*written, folder / "table.md", folder / "table.tex"]


def _write_rows(path: Path, table: pd.DataFrame) -> list[Path]:
    """Write a table that has rows; one without must not leave an older file behind."""
    if not len(table):
        path.unlink(missing_ok=True)
        return []
    write_csv(path, table)
    return [path]


def printed_tables(found: Aggregate) -> list[PrintedTable]:
    """Return the tables of the page in their order: what is missing comes first, so that nobody overlooks it."""
    tables = [_missing_table(found)] if len(found.collection.missing) else []
    if len(found.systems):
        for _, rows in found.systems.groupby(["dataset", "protocol"], sort=False):
            tables += _group_tables(found, rows)
    for (dataset, protocol), rows in (
        found.splits.groupby(["dataset", "protocol"], sort=False) if len(found.splits) else ()
    ):
        tables.append(_split_table(str(dataset), str(protocol), rows))
    return tables


def _group_tables(found: Aggregate, rows: pd.DataFrame) -> Iterator[PrintedTable]:
    """Yield the tables of one data set and protocol."""
    suite = found.collection.suite
    measures = suite.measures
    columns = [MEASURE_NAMES.get(measure, measure) for measure in measures]
    by_cell, compared = _by_cell(rows), _by_cell(found.comparisons)
    members = list(dict.fromkeys(key for key, _ in by_cell))
    names = {key: _row_name(key, found, members) for key in members}
    where = f"{members[0].dataset}, protocol {members[0].protocol}"

    def table(
        title: str, heads: list[str], cells: dict[Key, list[Cell]], notes: tuple[str, ...] = (), left: int = 2
    ) -> PrintedTable:
        lines = [[*names[key], *line] for key, line in cells.items()]
        return PrintedTable(f"{title} ({where})", (suite.rows, "backbone", *heads), lines, notes, left)

    best = {measure: _best(rows[rows["measure"] == measure], measure) for measure in measures}
    main: dict[Key, list[Cell]] = {}
    for key in members:
        cells = [by_cell[key, measure] for measure in measures]
        marks = ["*" if compared.get((key, measure), _NOTHING)["p_holm"] < SIGNIFICANT else "" for measure in measures]
        main[key] = [
            _value_cell(cell, cell["pooled"] == best[cell["measure"]], mark)
            for cell, mark in zip(cells, marks, strict=True)
        ]
        main[key].append(
            Cell(
                str(cells[0]["runs"]) + (f" of {cells[0]['planned']}" if cells[0]["runs"] < cells[0]["planned"] else "")
            )
        )
    yield table(suite.title, [*columns, "runs"], main, group_notes(found, members))

    if rows["sd"].notna().any():
        yield table(
            "Mean ± standard deviation over runs",
            columns,
            {k: [Cell(_spread(by_cell[k, m])) for m in measures] for k in members},
        )
    if rows["paper"].notna().any():
        papers = {key: [_paper_cell(by_cell[key, measure]) for measure in measures] for key in members}
        yield table("The paper's value (pooled − paper)", columns, papers)
    rivals = {key: compared[key, measures[0]] for key in members if (key, measures[0]) in compared}
    if rivals:
        differences = {
            key: [
                *(_comparison_cell(compared[key, measure]) for measure in measures),
                Cell(first["note"] or first["reference"]),
            ]
            for key, first in rivals.items()
        }
        yield table(
            f"Difference from {suite.reference} [95% interval], corrected p", [*columns, "compared with"], differences
        )
    how = {
        key: [Cell(row["encoder"].replace("_", "-")), Cell(row["weights"]), Cell(row["flags"])]
        for key in members
        for row in [by_cell[key, measures[0]]]
    }
    yield table("How each row was made", ["encoder", "started from", "remarks"], how, left=5)
    if len(found.per_class):
        classes = _by_cell(found.per_class)
        for key in members:
            chosen = found.per_class[[tuple(row) == key for row in found.per_class[list(Key._fields)].to_numpy()]]
            if any(key == other for other, _ in classes):
                yield from _class_tables(
                    key, f"{' '.join(cell.text for cell in names[key] if cell.text)}, {where}", chosen
                )


# Stands for a comparison that wasn't made.
_NOTHING = {"p_holm": float("nan")}


def _by_cell(table: pd.DataFrame) -> dict[tuple[Key, str], dict[str, Any]]:
    records: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    return {(Key(*(row[name] for name in Key._fields)), row["measure"]): row for row in records}


def _class_tables(key: Key, title: str, rows: pd.DataFrame) -> Iterator[PrintedTable]:
    columns = ("class", "images", *(CLASS_COLUMNS[measure] for measure in dict.fromkeys(rows["measure"])))
    lines, paper = [], []
    for name, group in rows.groupby("class", sort=False):
        cells: list[dict[str, Any]] = group.to_dict("records")  # type: ignore[assignment]
        head = [Cell(str(name)), Cell(str(cells[0]["images"]))]
        lines.append([*head, *map(_value_cell, cells)])
        paper.append([*head, *(Cell(_value(cell["paper"]), _bracketed(cell["difference"])) for cell in cells)])
    yield PrintedTable(f"By class: {title}", columns, lines)
    if rows["paper"].notna().any():
        yield PrintedTable(f"By class, the paper's value (pooled − paper): {title}", columns, paper, class_notes(key))


def _split_table(dataset: str, protocol: str, rows: pd.DataFrame) -> PrintedTable:
    sides = list(dict.fromkeys(rows["split"]))
    lines = []
    for name, cells in [*rows.groupby("class", sort=False), ("total", rows)]:
        line = [Cell(str(name))]
        for side in sides:
            chosen = cells[cells["split"] == side]
            images, paper = int(chosen["images"].sum()), chosen["paper"].sum(min_count=1)
            small = "" if pd.isna(paper) else f"({int(paper)})" if paper == images else f"≠ ({int(paper)})"
            line.append(Cell(str(images), small))
        lines.append(line)
    columns = ("class", *sides)
    return PrintedTable(
        f"Images, in brackets the paper's: {dataset}, protocol {protocol}", columns, lines, split_notes(dataset, rows)
    )


def _missing_table(found: Aggregate) -> PrintedTable:
    missing = found.collection.missing.sort_values("state", key=lambda state: state != "failed", kind="stable")
    rows = [[Cell(str(value)) for value in row] for row in missing[["cell", "state", "error"]].to_numpy()[:NAMED]]
    more = (f"and {len(missing) - NAMED} more: missing.csv",) if len(missing) > NAMED else ()
    planned = sum(system.planned for system in found.collection.systems)
    finished = sum(len(system.runs) for system in found.collection.systems)
    title = f"INCOMPLETE: {finished} of {planned} runs are finished; without a result are"
    return PrintedTable(title, ("cell", "state", "error"), rows, more, left=3)


def _row_name(key: Key, found: Aggregate, members: list[Key]) -> list[Cell]:
    """Return the cells of the first two columns."""
    method = METHODS.get(key.method)
    title = method.title if method else key.method
    if found.collection.suite.rows == "variant":
        several = len({member.method for member in members}) > 1
        text = (key.variant or "unchanged") + (f", {title}" if several else "")
    else:
        text = title + (f", {key.variant}" if key.variant else "")
    row = next(row for (other, _), row in _by_cell(found.systems).items() if other == key)
    text += " (LABEL-LEAKING IMPUTATION)" if LABEL_LEAKING in row["flags"] else ""
    backbone = "–" if method and not method.reads_image else key.backbone.replace("+", " + ")
    return [Cell(text, mark=DAGGER if method and method.reconstruction else ""), Cell(backbone)]


def _best(rows: pd.DataFrame, measure: str) -> float:
    """Return the best value of a column; NaN (nothing is bold) if there are not two to choose from."""
    values = rows.loc[~rows["flags"].str.contains(LABEL_LEAKING, regex=False), "pooled"].dropna()
    if len(values) < 2:
        return float("nan")
    return float(values.min() if measure in LESS_IS_BETTER else values.max())


def _value_cell(row: dict[str, Any], bold: bool = False, mark: str = "") -> Cell:
    return Cell(_value(row["pooled"]), _interval(row["low"], row["high"]), bold, mark)


def _comparison_cell(row: dict[str, Any]) -> Cell:
    p = row["p_holm"]
    significance = "" if pd.isna(p) else " p < 0.001" if p < 0.001 else f" p = {p:.3f}"
    return Cell(_signed(row["difference"]), _interval(row["low"], row["high"]) + significance)


def _paper_cell(row: dict[str, Any]) -> Cell:
    incomparable = pd.isna(row["difference"]) and row["paper_average"] and not pd.isna(row["pooled"])
    return Cell(
        _value(row["paper"]), f"({row['paper_average']} average)" if incomparable else _bracketed(row["difference"])
    )


def _spread(row: dict[str, Any]) -> str:
    return _value(row["mean"]) + ("" if pd.isna(row["sd"]) else f" ± {row['sd']:.3f}")


def _value(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}"


def _interval(low: float, high: float) -> str:
    return "" if pd.isna(low) else f"[{low:.3f}, {high:.3f}]".replace("-", "−")


def _signed(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:+.3f}".replace("-", "−")


def _bracketed(value: float) -> str:
    return "" if pd.isna(value) else f"({_signed(value)})"
