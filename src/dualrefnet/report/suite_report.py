"""The report of a suite: what its runs say together, from their predictions alone (no model is loaded)."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from dualrefnet.analysis.disagreement import KINDS, Disagreement, find_disagreement
from dualrefnet.data.loader import read_dataset
from dualrefnet.data.schema import unnamed_patients
from dualrefnet.data.store import fill_store
from dualrefnet.display.figure import ReportFigure, new_figure, save_figure, styled
from dualrefnet.display.format import (
    MEASURE_NAMES,
    SIGNIFICANT,
    Cell,
    PrintedTable,
    estimate,
    listed,
    number,
    protocol_name,
    sentence,
)
from dualrefnet.display.page import Section, render_page
from dualrefnet.errors import DataError, RecipeError, RunError
from dualrefnet.files import write_text
from dualrefnet.models.backbones import BACKBONES
from dualrefnet.progress import note, warn
from dualrefnet.recipe import load_recipe
from dualrefnet.report import ReportOptions, provenance
from dualrefnet.report.suite_figures import by_flag, describe, draw_ablation, draw_systems, names, sizes, units
from dualrefnet.run import Run
from dualrefnet.suite.results import (
    FROZEN,
    LABEL_LEAKING,
    LEAKING_SPLIT,
    RANDOM,
    SYNTHETIC,
    UNGROUPED,
    FinishedRun,
    SuiteResults,
    System,
    aggregate,
    reads_image,
)
from dualrefnet.suite.tables import LESS_IS_BETTER, printed_tables

# Measures that get a figure; the tables have all of them.
DRAWN = 3
# Measure -> the one that it equals by definition.
SAME = {"recall_macro": "balanced_accuracy", "recall_weighted": "accuracy"}
# Systems that a sentence names one by one.
LISTED = 16
# Flag of a system -> what it means.
NOTES = {
    LABEL_LEAKING: provenance.LABEL_LEAKING,
    LEAKING_SPLIT: "The split leaks: test images show patients or lesions of the training split, so the numbers are "
    "too high for new patients",
    UNGROUPED: unnamed_patients("image"),
    SYNTHETIC: provenance.SYNTHETIC,
    FROZEN: provenance.FROZEN_ENCODER,
    RANDOM: provenance.RANDOM_ENCODER,
}

TERMS = (
    ("system", "a method with its image encoder and its metadata, trained once or several times"),
    ("fold, seed", "one of several divisions of the images into training and test; one of several repeats"),
    ("M0, M1, M2, M3", "metadata: none; what is recorded of everybody; all fields; those and missingness flags"),
    ("Holm's correction", "adjusts p for many comparisons, so that a false one among all of them is unlikely"),
)

BASELINE = "no_metadata"
# Images of each kind of disagreement, and their size at most.
CASES, SIZE = 6, 224
# Names of the figures that show images begin so.
CASE_FIGURES = "cases"
# Cases in a row, letters of a line above an image; inches: an image, such a line, and the gap between two rows.
COLUMNS, LETTERS, IMAGE, LINE, GAP = 3, 21, 1.27, 0.118, 0.12


class Pair(NamedTuple):
    """One run of each of two systems, trained and tested on the same images; `rule` says why these two."""

    runs: tuple[Run, Run]
    names: tuple[str, str]
    dataset: str
    protocol: str
    rule: str


def write_suite_report(
    folder: Path,
    out: Path | None = None,
    photographs: bool = True,
    root: Path | None = None,
    cache: Path | None = None,
    samples: int = 1000,
) -> Path:
    """Write the report of a suite, and its figures with their data in `pictures/`; return the page.

    Only what the runs left is read, and the data for a few images; so `--discard-models` does not matter.
    """
    out = out or folder / "report"
    found = aggregate(folder, samples)
    if not len(found.splits) and not any(system.runs for system in found.members):
        failed = int((found.missing["state"] == "failed").sum())
        why = f" ({failed} failed: {folder / 'failures'} says why)" if failed else ""
        raise RunError(
            f"nothing of the suite in {folder} is finished{why}: there is nothing to show yet. "
            f"`dualrefnet suite {folder / 'suite.yaml'} --out {folder}` goes on"
        )
    sections = [
        _summary_section(found),
        *_figure_section(found),
        *pair_sections(found, ReportOptions(photographs=photographs, root=root, cache=cache), samples),
        *_table_sections(found),
    ]
    # Images that an earlier call showed must not stay where a later one leaves them out.
    for left in (out / "pictures").glob(f"{CASE_FIGURES}*"):
        left.unlink()
    figures = [figure for section in sections for figure in section.figures]
    for figure in figures:
        save_figure(figure, out / "pictures")
    shows = any(figure.name.startswith(CASE_FIGURES) for figure in figures)
    shows = shows and not all(SYNTHETIC in system.flags for system in found.members if system.runs)
    if shows:
        note("the report shows images of patients: treat it as patient data, or leave them out with --no-photographs")
    page = render_page(found.suite.title, found.suite.description, suite_notes(found), sections, shows)
    write_text(out / "report.html", page)
    return out / "report.html"


def suite_notes(found: SuiteResults) -> list[str]:
    """Return what limits the validity of the suite's numbers, each once, with the systems that it is about."""
    notes = []
    leaking = [str(name) for name in dict.fromkeys(found.splits.get("dataset", []))]
    if found.members:
        rows = describe(found.systems, found.comparisons, found.suite.measures[0])
        partial = rows[rows["runs"] < rows["planned"]]
        if len(partial):
            states = Counter(found.missing.loc[found.missing["run"] != "", "state"])
            notes.append(
                f"Incomplete: {rows['runs'].sum():,} of {rows['planned'].sum():,} runs are finished "
                f"({', '.join(f'{count} {state}' for state, count in states.items())}), and the numbers can change. "
                f"Runs are missing of: {names(partial, rows)}."
            )
        flags = {NOTES.get(flag, flag): some for flag, some in by_flag(rows).items()}
        reads_missingness = rows[
            [any(provenance.reads_missingness(run.recipe) for run in system.runs) for system in found.members]
        ]
        if len(reads_missingness):
            flags[provenance.MISSINGNESS] = reads_missingness
        notes += [sentence(f"{note} ({names(some, rows)})") for note, some in flags.items()]
    elif "paper" in set(found.splits["protocol"]):
        # Of counted splits nothing is trained, so that no system has a flag.
        notes.append(f"{NOTES[LEAKING_SPLIT]} ({', '.join(leaking)}).")
    splits = int((found.missing["run"] == "").sum())
    if splits:
        notes.append(f"Not counted yet: {splits} split{'s' * (splits > 1)} of the suite.")
    return notes


def _summary_section(found: SuiteResults) -> Section:
    """Return what was compared, and the result in the suite's first measure."""
    intro = []
    if len(found.systems):
        rows = describe(found.systems, found.comparisons, found.suite.measures[0])
        intro.append(
            f"{len(rows)} system{'s' * (len(rows) > 1)}; {rows['runs'].sum():,} of {rows['planned'].sum():,} runs are "
            f"finished. In brackets: 95% intervals over {units(rows)}, for the models as trained."
        )
        for (dataset, protocol), members in rows.groupby(["dataset", "protocol"], sort=False):
            tested = members[members["images"] > 0]
            unit = tested["unit"].iloc[0] if len(tested) else "group"
            on = f"tested on {sizes(tested)}" if len(tested) else "no result yet"
            intro.append(f"{dataset}, {protocol_name(str(protocol), unit)}: {on}.")
            intro.append(" ".join(_verdict(found, members)))
    if len(found.splits):
        for (dataset, protocol), rows in found.splits.groupby(["dataset", "protocol"], sort=False):
            known, equal = int((rows["equal"] != "").sum()), int((rows["equal"] == "yes").sum())
            beside = f" {equal} of {known} counts are those of the paper's Table 1." if known else ""
            counts = [f"{int(part['images'].sum()):,} {name}" for name, part in rows.groupby("split", sort=False)]
            name = protocol_name(str(protocol))
            intro.append(f"Images of {dataset}, {name}: {', '.join(counts)}.{beside}")
    return Section("summary", "Summary", intro, folded=False)


def _verdict(found: SuiteResults, rows: pd.DataFrame) -> Iterator[str]:
    """Yield the result of one data set and protocol: the reference, what differs from it, and the best system."""
    measure = found.suite.measures[0]
    name, less = MEASURE_NAMES.get(measure, measure), measure in LESS_IS_BETTER
    rows = rows.assign(value=list(map(estimate, rows["pooled"], rows["low"], rows["high"])))
    valid = rows[rows["pooled"].notna() & ~rows["flags"].map(lambda flags: LABEL_LEAKING in flags)]
    references = valid[valid["is_reference"]]
    if len(references):
        each = [f"{row['name']} with {row['value']}" for row in references.to_dict("records")]
        yield f"Reference in {name}: {listed(each)}."
    pairs = found.comparisons[found.comparisons["measure"] == measure]
    others = pairs.drop(columns=["measure", "low", "high"])
    pairs = rows.drop(columns="difference").merge(others, on=rows.columns[:5].tolist())
    tested = pairs[pairs["p_holm"].notna() & pairs["name"].isin(valid["name"])]
    if len(tested):
        differs, worse = tested["p_holm"] < SIGNIFICANT, (tested["difference"] > 0) == less
        kinds = {"worse": tested[differs & worse], "better": tested[differs & ~worse]}
        kinds["not significantly different"] = tested[~differs]
        parts = [
            f"{len(some)} {kind} ({names(some, most=LISTED)})" if len(some) else f"none {kind}"
            for kind, some in kinds.items()
        ]
        family = int(found.comparisons.loc[found.comparisons["measure"] == measure, "p_holm"].notna().sum())
        yield (
            f"Of {len(tested)} systems compared with it: {'; '.join(parts)} "
            f"(p < {SIGNIFICANT} after Holm's correction, {family} comparisons)."
        )
    else:
        yield "No difference from a reference was tested."
    for text, some in pairs[pairs["note"] != ""].groupby("note", sort=False):
        yield sentence(f"{text} ({names(some, most=LISTED)})")
    if len(valid) > 1:
        best = valid.sort_values("pooled", ascending=less, kind="stable").to_dict("records")[0]
        yield f"{'Lowest' if less else 'Highest'} {name}: {best['name']}, {best['value']}."


def _figure_section(found: SuiteResults) -> Iterator[Section]:
    """Yield the section with all systems, if any has a value."""
    suite, systems, comparisons = found.suite, found.systems, found.comparisons
    different = [measure for measure in suite.measures if SAME.get(measure) not in suite.measures]
    valued = set(systems.loc[systems["pooled"].notna(), "measure"]) if len(systems) else set()
    drawn = [measure for measure in different if measure in valued][:DRAWN]
    if not drawn:
        return
    items = []
    for measure in drawn:
        items.append(draw_systems(systems, comparisons, measure))
        if suite.rows == "variant" and comparisons.loc[comparisons["measure"] == measure, "difference"].notna().any():
            items.append(draw_ablation(systems, comparisons, measure))
    intro = [
        "Every system with its 95% interval. Overlapping intervals do not mean that two systems are equal: differences "
        "on the same test images have intervals of their own, in the tables."
    ]
    yield Section("systems", "All systems", intro, items, folded=False)


def _table_sections(found: SuiteResults) -> Iterator[Section]:
    """Yield the printed tables: the results open, the rest folded."""
    tables: dict[str, list[PrintedTable]] = {"results": [], "classes": [], "details": []}
    for kind, table in printed_tables(found):
        tables[kind].append(table)
    intro = ["`dualrefnet tables` writes the same tables as CSV, Markdown and LaTeX."]
    yield Section("tables", "Tables", intro, tables["results"], folded=False)
    if tables["classes"]:
        yield Section("classes", "Per-class metrics", [], tables["classes"])
    text = yaml.safe_dump(found.suite.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    intro = ["To repeat the suite, save the text below as a file and give it to `dualrefnet suite`."]
    items = [*tables["details"], provenance.terms_table((*TERMS, *provenance.TERMS))]
    yield Section("provenance", "Provenance", intro, items, text)


def pair_sections(found: SuiteResults, options: ReportOptions, samples: int) -> Iterator[Section]:
    """Yield the comparison, image by image, of two systems of each data set and protocol."""
    pairs = list(choose_pairs(found))
    datasets = sorted({pair.dataset for pair in pairs})
    if options.root is not None and options.photographs and len(datasets) > 1:
        raise RecipeError(
            f"--root is the folder of one data set, and the suite has {' and '.join(datasets)}; "
            "set DUALREFNET_DATA instead"
        )
    for place, pair in enumerate(pairs, 1):
        found_cases, (a, b) = find_disagreement(*pair.runs, CASES, samples), pair.names
        gap = found_cases.difference
        intro = [
            pair.rule,
            f"Balanced accuracy of these two runs: {number(found_cases.balanced_accuracy_a)} for {a}, "
            f"{number(found_cases.balanced_accuracy_b)} for {b}, difference "
            f"{estimate(gap.value, gap.low, gap.high, '+.3f')}.",
        ]
        items: list[PrintedTable | ReportFigure] = [_agreement_table(found_cases, pair.names)]
        several = len(pairs) > 1
        if options.photographs and len(found_cases.chosen):
            try:
                images = read_images(pair.runs[0], found_cases.chosen["image_id"].tolist(), options)
                prefix = f"{CASE_FIGURES}{place if several else ''}"
                items += case_figures(pair.runs, found_cases, images, pair.names, prefix)
            except DataError as error:
                intro.append("Images are left out: they could not be read.")
                warn(f"no images of {pair.dataset} in the report: {error}")
        title = f"Disagreement of two systems{f': {pair.dataset}, protocol {pair.protocol}' if several else ''}"
        yield Section(f"disagreement{f'-{place}' if several else ''}", title, intro, items, folded=False)


def choose_pairs(found: SuiteResults) -> Iterator[Pair]:
    """Choose two systems of each data set and protocol, none with label-leaking imputation.

    First is the reference, or the best system; second the image-only baseline, or the system farthest from the first.
    Of one method on CNNs and transformers (Figure 7) it is the best of each.
    """
    if not found.members:
        return
    measure = found.suite.measures[0]
    measured, sign = MEASURE_NAMES.get(measure, measure), -1 if measure in LESS_IS_BETTER else 1
    rows = describe(found.systems, found.comparisons, measure).assign(system=pd.Series(found.members))
    rows = rows[rows["pooled"].notna() & ~rows["flags"].map(lambda flags: LABEL_LEAKING in flags)]
    for (dataset, protocol), group in rows.groupby(["dataset", "protocol"], sort=False):
        members: list[dict[str, Any]] = group.to_dict("records")  # type: ignore[assignment]
        references = [row for row in members if row["is_reference"]]
        first, best = max(references or members, key=lambda row: sign * row["pooled"]), f"best in {measured}"
        why = f"the reference{f' ({best} of {len(references)})' if len(references) > 1 else ''}" if references else best
        by_kind = {kind: [row for row in members if _encoder_kind(row) == kind] for kind in ("cnn", "transformer")}
        encoders = all(by_kind.values()) and group[["method", "variant"]].drop_duplicates().shape[0] == 1
        if encoders:
            first, why = max(by_kind["cnn"], key=lambda row: sign * row["pooled"]), f"the CNN that is {best}"
        others = [row for row in members if _common_runs(first["system"], row["system"])]
        transformers = [row for row in others if _encoder_kind(row) == "transformer"] if encoders else []
        baselines = [row for row in others if row["method"] == BASELINE]
        if not others:
            continue
        if transformers:
            second, which = max(transformers, key=lambda row: sign * row["pooled"]), f"the transformer that is {best}"
        elif baselines:
            second = min(baselines, key=lambda row: [row[key] != first[key] for key in ("variant", "backbone")])
            which = "the baseline without metadata"
        else:
            second = max(others, key=lambda row: abs(row["pooled"] - first["pooled"]))
            which = f"the system farthest from it in {measured}"
        one, other = _common_runs(first["system"], second["system"])[0]
        labels = [f"{row['label']} {row['series']}".strip() for row in (first, second)]
        a, b = labels if labels[0] != labels[1] else (first["name"], second["name"])
        rule = f"{a} ({why}) and {b} ({which}): one run of each, fold {one.fold}, seed {one.seed}."
        yield Pair((one.run, other.run), (a, b), str(dataset), str(protocol), rule)


def _encoder_kind(row: Mapping[str, Any]) -> str:
    """Return `cnn` or `transformer`; empty for a method of the metadata alone and for several encoders."""
    spec = BACKBONES.get(row["backbone"])
    return spec.kind if spec is not None and reads_image(row["method"]) else ""


def _common_runs(one: System, other: System) -> list[tuple[FinishedRun, FinishedRun]]:
    """Return runs of the same fold and seed, the lowest first; none if the systems were tested on different images."""
    if one.key == other.key or not one.pool or not other.pool or one.pool.fingerprint != other.pool.fingerprint:
        return []
    theirs = {(run.fold, run.seed): run for run in other.runs}
    ours = sorted(one.runs, key=lambda run: (run.fold, run.seed))
    pairs = [(run, theirs[run.fold, run.seed]) for run in ours if (run.fold, run.seed) in theirs]
    # Two systems of one recipe share their runs.
    return [(run, rival) for run, rival in pairs if run.run.path != rival.run.path]


def read_images(run: Run, image_ids: Sequence[str], options: ReportOptions) -> dict[str, NDArray[np.uint8]]:
    """Return image id -> (S, S, 3), S at most `SIZE`, prepared as the run's model reads them."""
    recipe = load_recipe(run.recipe, {"data.root": str(options.root)} if options.root is not None else {})
    dataset = read_dataset(recipe)
    wanted = dataset.with_image[dataset.with_image["image_id"].isin(image_ids)]
    # A store of its own for these few: that of the whole data set may be gone, and takes long to fill.
    store = fill_store(wanted, recipe.image, min(SIZE, recipe.image.size), options.cache) if len(wanted) else None
    readable = set(store.image_ids) - set(store.broken) if store else set()
    if store is None or readable != set(image_ids):
        missing = len(set(image_ids) - readable)
        raise DataError(f"{missing} of {len(image_ids)} images can't be read in {dataset.root}")
    return dict(zip(image_ids, store.read(store.rows_of(image_ids)), strict=True))


def _agreement_table(found: Disagreement, names: tuple[str, str]) -> PrintedTable:
    rows = []
    for name, members in [*found.table.groupby("label"), ("all", found.table)]:
        counts = [len(members), *(int((members["kind"] == kind).sum()) for kind in KINDS.values())]
        rows.append([Cell(str(name)), *(Cell(f"{count:,}") for count in counts)])
    columns = ("class", "images", "both right", f"only {names[0]}", f"only {names[1]}", "both wrong")
    return PrintedTable(f"Correct predictions: {names[0]} and {names[1]}", columns, rows)


def case_figures(
    runs: tuple[Run, Run],
    found: Disagreement,
    images: Mapping[str, NDArray[np.uint8]],
    names: tuple[str, str],
    prefix: str = CASE_FIGURES,
) -> Iterator[ReportFigure]:
    """Draw the chosen cases: those that only the first run gets right, then those that only the second does."""
    cases = found.chosen
    for run, end in zip(runs, "ab", strict=True):
        scores = run.predictions.set_index("image_id")
        predicted = zip(cases["image_id"], cases[f"predicted_{end}"], strict=True)
        cases[f"p_predicted_{end}"] = [float(scores.loc[image, f"prob_{label}"]) for image, label in predicted]
    for kind, which in (("only_a_right", "first"), ("only_b_right", "second")):
        chosen = cases[cases["kind"] == kind]
        if len(chosen):
            yield draw_cases(chosen, images, names, f"{prefix}_{which}_right")


@styled
def draw_cases(
    cases: pd.DataFrame, images: Mapping[str, NDArray[np.uint8]], names: tuple[str, str], stem: str
) -> ReportFigure:
    """Draw images (S, S, 3) by id that one system classifies correctly and the other not, below both predictions."""
    rows, titles, texts = [], [], []
    for case in cases.to_dict("records"):
        lines, text = textwrap.wrap(f"true: {case['label']}", LETTERS), []
        for name, end in zip(names, "ab", strict=True):
            predicted, probability, true = (case[f"{key}_{end}"] for key in ("predicted", "p_predicted", "p_true"))
            parts = [f"{predicted} {probability:.0%}"]
            parts += [f"{case['label']} {true:.0%}"] if predicted != case["label"] else []
            text.append(f"{name} predicts {', '.join(parts)}")
            # A line does not end between a class and its probability, unless the two are too long for one.
            parts = [part if len(part) >= LETTERS else part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts]
            lines += textwrap.wrap(f"{name}: {', '.join(parts)}", LETTERS)
            rows.append((case["image_id"], case["label"], name, predicted, probability, true))
        titles.append(lines)
        texts.append(f"true {case['label']}: {', '.join(text)}")
    tallest = [max(map(len, titles[start : start + COLUMNS])) for start in range(0, len(titles), COLUMNS)]
    figure, axes = new_figure(len(tallest) * (IMAGE + GAP) + LINE * sum(tallest), len(tallest), COLUMNS)
    for axis in axes:
        axis.set_axis_off()
    for axis, image_id, lines in zip(axes, cases["image_id"], titles, strict=False):
        axis.imshow(images[image_id], interpolation="none")
        # The words stand on the image, also where the row has room to spare.
        axis.set_anchor("N")
        axis.set_title("\n".join(lines), fontsize=7, fontweight="normal", pad=3)
    first = cases["predicted_a"].iloc[0] == cases["label"].iloc[0]
    right, wrong = names if first else names[::-1]
    caption = (
        "Test images on whose true class the probabilities of the two systems differ most, classes in turn, one image "
        "per patient. Above each, as the models read it: the true class and the predictions with their probabilities; "
        "where a prediction is wrong, also the probability of the true class."
    )
    columns = ["image_id", "label", "system", "predicted", "probability", "probability_of_true_class"]
    data = pd.DataFrame(rows, columns=columns)
    return ReportFigure(stem, f"{right} right, {wrong} wrong", caption, "; ".join(texts), figure, data)
