"""One page for the whole paper: tables and figures laid out as printed, ours above its numbers, each with a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from dualrefnet.data.adapters import SCHEMAS
from dualrefnet.display.figure import ReportFigure, file_stem, save_figure
from dualrefnet.display.format import Cell, PrintedTable, interval, number, p_value, sentence
from dualrefnet.display.page import Section, render_page
from dualrefnet.errors import DataError, RunError
from dualrefnet.evaluation.bootstrap import NAN, Difference, Estimate
from dualrefnet.files import write_text
from dualrefnet.models.backbones import BACKBONES
from dualrefnet.models.registry import METHODS
from dualrefnet.progress import note, warn
from dualrefnet.report import ReportOptions
from dualrefnet.report.suite_figures import draw_ablation, draw_systems
from dualrefnet.report.suite_report import pair_sections
from dualrefnet.run import Run
from dualrefnet.suite.paper import (
    BEST,
    MEASURE,
    PARTS,
    UNMEASURED,
    Claim,
    Verdict,
    claims,
    summarise,
    system_of,
    verdict_on_claim,
    verdict_on_number,
)
from dualrefnet.suite.results import SuiteResults, System, aggregate, caveats, paper, reported, reported_class
from dualrefnet.suite.tables import printed_tables

PAGE, PICTURES = "paper.html", "pictures"
# Verdict -> the sign behind a number.
SIGNS: dict[Verdict, str] = {"reproduced": "=", "within the interval": "≈", "contradicted": "≠", UNMEASURED: ""}
LEGEND = (
    "Ours with its 95% interval, below it the paper's number. = the same when rounded; ≈ the paper's number is in our "
    "interval; ≠ it isn't; no sign: can't be measured here."
)
TITLES = {
    "table1": "Table 1: splits",
    "table2": "Table 2: DualRefNet by class",
    "table3a": "Table 3a: methods on PAD-UFES-20",
    "table3b": "Table 3b: methods on ISIC-2019",
    "table4": "Table 4: published systems",
    "ablations": "Ablations of the text",
    "figure1e": "Figure 1e: parts of DualRefNet",
    "figure7": "Figure 7: transformers",
}
# Measure -> what the paper calls it, and the key of ours.
METRICS = {"ACC": "accuracy", "BACC": "balanced_accuracy", "AUC": "auc_macro_ovr"}
CLASS_ROWS = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "PPV": "ppv",
    "NPV": "npv",
    "precision": "ppv",
    "F1": "f1",
    "class-wise accuracy": "sensitivity",
}
CLASS_TABLES = {"pad_ufes_20": "2a", "isic_2019": "2b"}


@dataclass
class _Part:
    """A table or figure on the page: what was found, and the verdicts on its numbers."""

    name: str
    found: SuiteResults
    verdicts: list[Verdict] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    def cell(self, row: pd.Series | None, printed: float | None, digits: int) -> Cell:
        """Return our number above the paper's, and keep the verdict."""
        ours = Estimate(NAN) if row is None else Estimate(row["pooled"], row["low"], row["high"])
        system = None if row is None else system_of(self.found, row)
        limits = system.departures if system is not None else ()
        self.limits += [text for text in limits if text not in self.limits]
        verdict: Verdict = UNMEASURED
        if printed is not None and not np.isnan(printed):
            verdict = UNMEASURED if limits else verdict_on_number(printed, ours, digits)
            self.verdicts.append(verdict)
        form = f".{digits}f"
        below = [interval(ours.low, ours.high, form), "" if printed is None else f"paper {number(printed, form)}"]
        return Cell(number(ours.value, form), "\n".join(part for part in below if part), mark=SIGNS[verdict])

    def row(self, dataset: str, measure: str, **of: str) -> pd.Series | None:
        """Return the measured row of a system; a smoke test has one data set in place of both."""
        rows = self.found.systems
        rows = rows[rows["measure"] == measure] if len(rows) else rows
        for name, value in {**of, "dataset": dataset}.items():
            if name != "dataset" or not self.found.suite.smoke:
                rows = rows[rows[name] == value] if len(rows) else rows
        return rows.iloc[0] if len(rows) and rows["pooled"].notna().any() else None

    def finished(self) -> str:
        planned = sum(system.planned for system in self.found.members)
        return f"{sum(len(system.runs) for system in self.found.members)} of {planned}" if planned else "–"

    def notes(self, *known: str) -> tuple[str, ...]:
        """Return the notes of a table: why nothing can be judged comes first."""
        limits = [f"Not the paper's experiment: {'; '.join(self.limits)}."] if self.limits else []
        return tuple(dict.fromkeys([*limits, LEGEND, *known]))


def write_paper_report(out: Path, options: ReportOptions | None = None, samples: int = 1000) -> Path:
    """Write the page about all suites of the paper that the folder holds, and its figures; return the page."""
    options = options or ReportOptions()
    parts: dict[str, _Part] = {}
    for name in PARTS:
        if (out / name / "suite.yaml").is_file():
            parts[name] = _Part(name, aggregate(out / name, samples, f"bootstrap of {name}"))
    if not parts:
        raise RunError(f"{out} holds no suite of the paper; `dualrefnet paper --out {out}` trains them")
    results = {name: part.found for name, part in parts.items()}
    judged = claims(results)
    sections = [section for part in parts.values() for section in _MAKERS[part.name](part, options)]
    compact: list[Claim] = []
    explained: list[Section] = []
    if "table2" in parts:
        compact, explained = _explained(results["table2"], options)
    judged += compact
    sections = [_summary(parts, judged), _claims(judged), *sections, *explained]
    for left in (out / PICTURES).glob("*"):
        left.unlink()
    figures = [figure for section in sections for figure in section.figures]
    for figure in figures:
        save_figure(figure, out / PICTURES)
    smoke = any(found.suite.smoke for found in results.values())
    title = "Multimodal dual-stage feature refinement for robust skin lesion classification"
    subtitle = "Khurshid, Singh, Vatsa, Scientific Reports 2025: its tables and figures, measured here."
    notes = [
        "The paper's splits leak: half of the test images of PAD-UFES-20 show a patient of training, 64 % of those of "
        "ISIC-2019 a lesion of training. Equal numbers are no evidence for new patients.",
        "The paper's numbers come from one training each, without intervals; those of others are copied from their "
        "publications, with other test sets. Here every cell is trained.",
    ]
    if smoke:
        notes.insert(
            0, "A SMOKE TEST on synthetic images, with random weights and one epoch: its numbers mean nothing."
        )
    shows = options.photographs and not smoke and any("cases" in f.name or "gradcam" in f.name for f in figures)
    write_text(out / PAGE, render_page(title, subtitle, notes, sections, shows))
    return out / PAGE


def _summary(parts: Mapping[str, _Part], judged: Sequence[Claim]) -> Section:
    rows = []
    for name, title in TITLES.items():
        part = parts.get(name)
        if part is None:
            rows.append([Cell(title), Cell("–"), Cell("not trained yet")])
        else:
            verdicts = part.verdicts or [claim.verdict for claim in judged if claim.part == name]
            rows.append([Cell(title), Cell(part.finished()), Cell(summarise(verdicts))])
    counts = Counter(claim.verdict for claim in judged)
    intro = [
        f"Of {len(judged)} claims about differences, {counts['reproduced']} are reproduced, "
        f"{counts['within the interval']} lie within the interval, {counts['contradicted']} are contradicted, and "
        f"{counts[UNMEASURED]} can't be measured here."
    ]
    table = PrintedTable("Verdicts", ("table or figure", "runs", "numbers (of figures: claims)"), rows, left=3)
    return Section("summary", "Summary", intro, [table], folded=False)


def _claims(judged: Sequence[Claim]) -> Section:
    rows = []
    for claim in judged:
        small = f"{interval(claim.ours.low, claim.ours.high, '.3f')}\n{p_value(claim.ours.p)}".strip()
        title = SCHEMAS[claim.dataset].title if claim.dataset in SCHEMAS else claim.dataset
        rows.append(
            [
                Cell(claim.text, f"{title}; {TITLES.get(claim.part, claim.part)}"),
                Cell(number(claim.ours.value, "+.3f"), small),
                Cell(number(claim.printed, "+.3f")),
                Cell(claim.verdict, bold=claim.verdict == "contradicted"),
            ]
        )
    limits = dict.fromkeys(text for claim in judged for text in claim.limits)
    intro = [
        "Differences in favour of the claim, in balanced accuracy unless it says otherwise; 95% interval of the paired "
        "bootstrap, p after the Holm correction of the suite. Reproduced: the whole interval is above zero. "
        "Contradicted: it is below zero, or below the paper's difference. Otherwise it holds zero.",
        *([f"Not the paper's experiment: {'; '.join(limits)}."] if limits else []),
    ]
    table = PrintedTable("Claims about differences", ("claim", "ours", "paper", "verdict"), rows)
    return Section("claims", "Claims", intro, [table], folded=False)


def _table1(part: _Part, options: ReportOptions) -> Iterator[Section]:
    rows = part.found.splits
    if len(rows):
        known = rows[rows["equal"] != ""]
        part.verdicts = ["reproduced" if equal == "yes" else "contradicted" for equal in known["equal"]]
        if not len(known):
            part.limits.append("the splits are of the sample")
    yield Section("table1", TITLES["table1"], [], [table for _, table in printed_tables(part.found)])


def _table2(part: _Part, options: ReportOptions) -> Iterator[Section]:
    tables = []
    for dataset, backbone in BEST.items():
        table = CLASS_TABLES[dataset]
        classes = list(paper()["per_class"][dataset][backbone])
        rows = part.found.per_class
        if len(rows):
            rows = rows[rows["method"] == "dualrefnet"]
            rows = rows if part.found.suite.smoke else rows[rows["dataset"] == dataset]
        lines = []
        for title, measure in CLASS_ROWS.items():
            line = [Cell(title)]
            for name in classes:
                chosen = rows[(rows["class"] == name) & (rows["measure"] == measure)] if len(rows) else rows
                printed = reported_class(dataset, "dualrefnet", backbone, name, measure)
                line.append(part.cell(chosen.iloc[0] if len(chosen) else None, printed, 2))
            lines.append(line)
        heading = f"Table {table}: {SCHEMAS[dataset].title}, {BACKBONES[backbone].title}"
        notes = part.notes(*caveats(dataset, table, ["dualrefnet"]))
        tables.append(PrintedTable(heading, ("", *classes), lines, notes))
    differences = [
        table for kind, table in printed_tables(part.found) if kind == "classes" and "difference" in table.title
    ]
    yield Section("table2", TITLES["table2"], [], [*tables, *differences])


def _table3(part: _Part, options: ReportOptions) -> Iterator[Section]:
    table, dataset = ("3a", "pad_ufes_20") if part.name == "table3a" else ("3b", "isic_2019")
    methods = paper()["results"][dataset][table]
    backbones = list(next(iter(methods.values())))
    lines = []
    for method in methods:
        for metric, measure in METRICS.items():
            line = [Cell(f"{METHODS[method].title}, {metric}")]
            for backbone in backbones:
                printed = reported(dataset, table, method, backbone, measure)
                row = part.row(dataset, measure, method=method, backbone=backbone)
                line.append(part.cell(row, printed.value if printed else None, 3))
            lines.append(line)
    heads = ("", *(BACKBONES[name].title for name in backbones))
    notes = part.notes(*caveats(dataset, table, list(methods)))
    yield Section(part.name, TITLES[part.name], [], [PrintedTable("ACC, BACC and AUC by encoder", heads, lines, notes)])


def _table4(part: _Part, options: ReportOptions) -> Iterator[Section]:
    methods = paper()["results"]["pad_ufes_20"]["4"]
    lines = []
    for method in methods:
        line = [Cell(METHODS[method].title)]
        for measure in ("accuracy", "precision", "recall", "f1"):
            average = "" if measure == "accuracy" else "_weighted" if method in paper()["weighted"] else "_macro"
            printed = reported("pad_ufes_20", "4", method, "", measure + average)
            row = part.row("pad_ufes_20", measure + average, method=method)
            cell = part.cell(row, printed.value if printed else None, 3)
            line.append(replace(cell, small=f"{cell.small}\n{average[1:]}".strip()))
        lines.append(line)
    notes = part.notes(*caveats("pad_ufes_20", "4", list(methods)))
    table = PrintedTable("Averages as in the paper", ("system", "accuracy", "precision", "recall", "F1"), lines, notes)
    yield Section("table4", TITLES["table4"], [], [table])


def _ablations(part: _Part, options: ReportOptions) -> Iterator[Section]:
    lookups = {
        system.key.variant: system.paper for system in part.found.members if system.paper.table or system.paper.metrics
    }
    lines = []
    for variant, lookup in lookups.items():
        line = [Cell(variant)]
        for dataset, backbone in BEST.items():
            table = lookup.table if lookup.table == "text" else {"pad_ufes_20": "3a", "isic_2019": "3b"}[dataset]
            printed = reported(dataset, table or "text", "dualrefnet", backbone, MEASURE, lookup.metrics.get(MEASURE))
            digits = 4 if lookup.table == "text" else 3
            line.append(
                part.cell(part.row(dataset, MEASURE, variant=variant), printed.value if printed else None, digits)
            )
        lines.append(line)
    heads = ("DualRefNet", *(f"{SCHEMAS[dataset].title}, {BACKBONES[name].title}" for dataset, name in BEST.items()))
    notes = part.notes(*(text for dataset in BEST for text in caveats(dataset, "text", ["dualrefnet"])))
    title = "Balanced accuracy of other metadata encoders and another fusion"
    yield Section("ablations", TITLES["ablations"], [], [PrintedTable(title, heads, lines, notes)])


def _figure(part: _Part, options: ReportOptions) -> Iterator[Section]:
    """Yield the systems of a figure with intervals, and their differences from the reference."""
    found = part.found
    intro = ["The paper prints its values in the figure only, so ours stand alone; its claims are judged above."]
    drawn: list[ReportFigure] = []
    for draw in (draw_systems, draw_ablation):
        try:
            figure = draw(found.systems, found.comparisons, MEASURE)
            drawn.append(replace(figure, name=f"{part.name}_{figure.name}"))
        except RunError as error:
            intro.append(sentence(str(error)))
    yield Section(part.name, TITLES[part.name], intro, drawn)


def _figure7(part: _Part, options: ReportOptions) -> Iterator[Section]:
    yield from _figure(part, options)
    for section in pair_sections(part.found, options, 1000):
        items = [
            replace(item, name=f"figure7_{item.name}") if isinstance(item, ReportFigure) else item
            for item in section.items
        ]
        title = f"Figure 7: {section.title.lower()}"
        yield replace(section, key=f"figure7-{section.key}", title=title, items=items, folded=True)


_MAKERS: dict[str, Callable[[_Part, ReportOptions], Iterator[Section]]] = {
    "table1": _table1,
    "table2": _table2,
    "table3a": _table3,
    "table3b": _table3,
    "table4": _table4,
    "ablations": _ablations,
    "figure1e": _figure,
    "figure7": _figure7,
}


def _explained(found: SuiteResults, options: ReportOptions) -> tuple[list[Claim], list[Section]]:
    """Return the figures that need a model, DualRefNet beside AuxNet on each data set, and the claim of Figure 4b."""
    judged, sections = [], []
    for dataset in dict.fromkeys(system.key.dataset for system in found.members):
        systems = {system.key.method: system for system in found.members if system.key.dataset == dataset}
        ours, theirs = systems.get("dualrefnet"), systems.get("auxnet")
        if ours is None or not ours.runs:
            continue
        end = f"-{dataset}" if len({system.key.dataset for system in found.members}) > 1 else ""
        made = _model_sections(ours, theirs, options)
        for name, make in made:
            try:
                section, claim = make()
                judged += [claim] if claim else []
            except (DataError, RunError, ValueError) as error:
                warn(f"no {name} of {dataset}: {error}")
                section = Section("", name, [sentence(f"it could not be made: {error}")])
            note(f"done: {name}, {dataset}")
            key = file_stem(name.split(":")[0].lower()) + end
            items = [
                replace(item, name=f"{item.name}{end}") if isinstance(item, ReportFigure) else item
                for item in section.items
            ]
            sections.append(replace(section, key=key, title=f"{name}{end and f', {dataset}'}", items=items))
    return judged, sections


def _model_sections(
    ours: System, theirs: System | None, options: ReportOptions
) -> list[tuple[str, Callable[[], tuple[Section, Claim | None]]]]:
    # These need captum and shap; the tables don't.
    from dualrefnet.analysis.embedding import compare_embeddings, draw_embedding, draw_separation, separation_table
    from dualrefnet.analysis.opened_run import OpenedRun, open_run
    from dualrefnet.models.inference import resolve_device
    from dualrefnet.report.explanations import Explanations
    from dualrefnet.report.performance import draw_confusion, read_measured
    from dualrefnet.report.trust import images_section

    def opened(run: Run) -> OpenedRun:
        return open_run(run, options.root, cache=options.cache, device=resolve_device(options.device))

    run = ours.runs[0].run

    @cache
    def explained() -> Explanations:
        return Explanations(opened(run), options)

    def confusion() -> tuple[Section, Claim | None]:
        measured = read_measured(run)
        return Section("", "", [], [draw_confusion(measured.metrics, measured.malignant, measured.unit)]), None

    def shap() -> Section:
        # As printed: what each field and column adds for every class.
        section = explained().shap()
        return replace(section, items=[figure for figure in section.figures if "importance" in figure.name])

    def tsne() -> tuple[Section, Claim | None]:
        if theirs is None or not theirs.runs:
            raise RunError("the run of AuxNet isn't finished")
        pair = (explained().opened, opened(theirs.runs[0].run))
        both = compare_embeddings(*pair, ("DualRefNet", "AuxNet"), options.images, 1000, options.seed)
        found = both.difference("within_class_variance", "hidden")
        fewer = Difference(-found.value, -found.high, -found.low, found.p)
        limits = tuple(dict.fromkeys([*ours.departures, *theirs.departures]))
        verdict = UNMEASURED if limits else verdict_on_claim(NAN, fewer)
        text = "R makes the classes more compact: less variance within them, hidden activations"
        claim = Claim("Figure 4b", ours.key.dataset, text, NAN, fewer, verdict, limits)
        figures = [draw_embedding(both.first, both.second), draw_separation(both)]
        items: list[PrintedTable | ReportFigure] = [*figures, separation_table(both)]
        return Section("", "", [], items), claim

    parts: list[tuple[str, Callable[[], tuple[Section, Claim | None]]]] = [
        ("Figure 1b: classes and colours", lambda: (images_section(explained().opened, options), None)),
        ("Confusion matrix", confusion),
        ("Figure 4b: separation of the classes", tsne),
    ]
    if options.photographs:
        parts.append(("Grad-CAM", lambda: (explained().gradcam(), None)))
    parts.append(("Figure 6: SHAP of the metadata", lambda: (shap(), None)))
    return parts
