"""Write the report, the explanations and the probes of a run: figures and tables as files, and one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from dualrefnet.analysis.audit import Audit, audit_split
from dualrefnet.analysis.duplicates import fingerprint_files
from dualrefnet.analysis.evaluate import NOT_MEASURED
from dualrefnet.analysis.missing_metadata import (
    compare_missing_metadata,
    draw_missing_metadata,
    draw_missing_patterns,
    measure_missing_metadata,
    missing_difference_table,
    missing_metadata_table,
    missing_pattern_table,
)
from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.analysis.out_of_distribution import OutOfDistributionMeasured, measure_out_of_distribution
from dualrefnet.analysis.shortcuts import Shortcuts, draw_shortcuts, probe_shortcuts, shortcut_sentences, shortcut_table
from dualrefnet.analysis.subgroups import subgroups_of_run
from dualrefnet.data.protocols import FOLD, member_split
from dualrefnet.display.figure import ReportFigure, file_stem, save_figure
from dualrefnet.display.format import PrintedTable, sentence
from dualrefnet.display.page import Section, render_page
from dualrefnet.errors import DataError, DependencyError, RunError
from dualrefnet.files import make_folder, write_csv, write_json, write_text
from dualrefnet.models.inference import resolve_device
from dualrefnet.progress import note, warn
from dualrefnet.report import ReportOptions
from dualrefnet.report.performance import class_section, curve_section, history_section, read_measured, summary_section
from dualrefnet.report.provenance import provenance_section, run_names, run_notes, run_title
from dualrefnet.report.trust import (
    audit_section,
    calibration_section,
    conformal_section,
    images_section,
    missing_metadata_section,
    out_of_distribution_section,
    shortcuts_section,
    subgroups_section,
)
from dualrefnet.report.verdict import make_verdict
from dualrefnet.run import Run

PAGE = "report.html"
SAMPLES = 1000
# Files of the figures that show images or the metadata of a single patient, and columns that describe a single image.
PERSONAL = ("gallery_*", "gradcam.*", "shap_waterfall_*", "reconstruction.*", "cases_*")
SINGLE = ["image_id", "answer"]
# Runs that one figure can hold beside the first.
MOST_AGAINST = 3

# A section's name for its error, and how it is made.
Part: TypeAlias = tuple[str, Callable[[], Section]]


def write_explanations(
    run: Run, out: Path | None = None, against: Run | None = None, options: ReportOptions | None = None
) -> list[Path]:
    """Explain the predictions of a run's model, beside those of `against`: figures and their numbers as files."""
    options, out = options or ReportOptions(), out or run.path / "explanations"
    _check(run, against, options, out)
    parts, files = _model_parts(run, against, options), []
    make_folder(out)
    for section in _made(parts, options):
        files += [path for figure in section.figures for path in save_figure(figure, out)]
    return files


def write_report(
    run: Run,
    out: Path | None = None,
    against: Run | None = None,
    options: ReportOptions | None = None,
    explained: bool = True,
) -> Path:
    """Write the report of a run, one HTML page, and its figures and their numbers in `pictures/` beside it.

    A section that can't be made says why in its place. Sections of the model and the data are left out unless
    `explained`; these need the extra `explain`.
    """
    options, out = options or ReportOptions(), out or run.path / "report"
    _check(run, against, options, out / "pictures")
    if against is not None and not explained:
        raise RunError("a comparison needs both models, so --against needs the explanations")
    measured = read_measured(run)
    samples, seed = run.recipe.evaluation.bootstrap or SAMPLES, run.recipe.seed
    parts: list[Part] = [
        ("Summary", lambda: summary_section(measured)),
        ("Classes", lambda: class_section(measured)),
        ("Curves", lambda: curve_section(measured, samples, seed)),
        ("Calibration", lambda: calibration_section(measured, samples, seed)),
        ("Training", lambda: history_section(measured)),
    ]
    if run.calibration_file.is_file():
        parts.insert(-1, ("Conformal", lambda: conformal_section(measured, samples, seed)))
    else:
        note(f"the run has no calibration; `dualrefnet evaluate {run.path}` adds it")
    if explained:
        parts += _model_parts(run, against, options, examined=True)
    parts.append(("Provenance", lambda: provenance_section(run)))
    make_folder(out)
    done = []
    for section in _made(parts, options):
        for figure in section.figures:
            save_figure(figure, out / "pictures")
        done.append(section)
    title, subtitle = run_title(run)
    of_patients = explained and options.photographs and not measured.metrics["drawn"]
    verdict = make_verdict(measured.metrics, len(measured.classes), done)
    said = " ".join(line.text for line in verdict.lines)
    notes = [text for text in run_notes(run) if text not in said]
    write_text(out / PAGE, render_page(title, subtitle, notes, done, of_patients, verdict))
    return out / PAGE


def _made(parts: Sequence[Part], options: ReportOptions) -> Iterator[Section]:
    """Make the sections; one that can't be made of these data says why."""
    for name, make in parts:
        try:
            section = make()
        except (DataError, RunError, ValueError) as error:
            warn(f"no section {name}: {error}")
            section = Section(file_stem(name.lower()), name, [sentence(f"this section could not be made: {error}")])
        note(f"done: {section.title}")
        yield section if options.photographs else _anonymous(section)


def _check(run: Run, against: Run | None, options: ReportOptions, pictures: Path) -> None:
    """Refuse at once, and not after minutes, what can't be done."""
    _check_finished([run] if against is None else [run, against])
    if against is not None:
        from dualrefnet.analysis.disagreement import find_disagreement

        run_names(run, against)
        find_disagreement(run, against, seed=options.seed)
    if not options.photographs:
        found = sorted(path.name for pattern in PERSONAL for path in pictures.glob(pattern))
        if found:
            raise RunError(f"{pictures} holds {found[0]}, which may show patients; remove it, or choose another --out")


def _check_finished(runs: Sequence[Run]) -> None:
    for run in runs:
        if not run.finished:
            raise RunError(f"{run.path} isn't a finished run; train it, or continue with --resume")
        if run.recipe.data.protocol == "all":
            raise RunError(f"{run.path} is {NOT_MEASURED}")


def _open(run: Run, options: ReportOptions) -> OpenedRun:
    return open_run(run, options.root, cache=options.cache, device=resolve_device(options.device))


def _model_parts(run: Run, against: Run | None, options: ReportOptions, examined: bool = False) -> list[Part]:
    """Open the runs, check the options, and return the sections to make."""
    # These need captum and shap; the sections on the predictions don't.
    from dualrefnet.report.explanations import comparison_section, explanation_parts

    opened = _open(run, options)
    second = _open(against, options) if against is not None else None
    parts = explanation_parts(opened, options)
    if not opened.dataset.schema.synthetic and options.photographs:
        note("the result shows images of patients: treat it as patient data, or use --no-photographs")
    if examined:
        parts += _examination_parts(opened, options)
    if second is not None:
        parts.append(("Comparison", lambda: comparison_section(opened, second, options)))
    return parts


def _anonymous(section: Section) -> Section:
    """Remove what identifies an image or a patient's metadata from the data of the figures."""
    items: list[PrintedTable | ReportFigure] = []
    for item in section.items:
        if isinstance(item, ReportFigure) and "image_id" in item.data:
            data = item.data.drop(columns=SINGLE, errors="ignore")
            # Sorted: the order of the rows could tell which of them are of one image.
            item = replace(item, data=data.sort_values(list(data.columns), ignore_index=True))
        items.append(item)
    return replace(section, items=items)


def _examination_parts(opened: OpenedRun, options: ReportOptions) -> list[Part]:
    masks, seed, unit = options.masks, options.seed, opened.dataset.schema.unit
    parts: list[Part] = [
        ("Shortcut probes", lambda: shortcuts_section(probe_shortcuts(opened, masks, samples=SAMPLES, seed=seed)))
    ]
    if _has_subgroups(opened):
        parts.insert(0, ("Subgroups", lambda: subgroups_section(subgroups_of_run(opened, SAMPLES, seed), f"{unit}s")))
    if opened.reads_metadata:
        measure = partial(measure_missing_metadata, opened, samples=SAMPLES, seed=seed)
        parts.append(("Missing metadata", lambda: missing_metadata_section(measure())))
    if _has_score(opened):
        found = partial(_out_of_distribution, opened, options)
        parts.append(("Out-of-distribution", lambda: out_of_distribution_section(found(), unit)))
    parts.append(("Images", lambda: images_section(opened, options)))
    return [*parts, ("Data audit", lambda: audit_section(_audit(opened)))]


def _audit(opened: OpenedRun) -> Audit:
    # Of the files, not of the stored images, which colour constancy and CLAHE have changed.
    used = opened.dataset.with_image[opened.dataset.with_image["image_id"].isin(opened.split["image_id"])]
    fingerprints = fingerprint_files(used, cache=opened.cache) if len(used) else None
    # Without the forests, which take minutes; the command `audit` has them.
    split, protocol = opened.split, opened.recipe.data.protocol
    if FOLD in split:
        # Of the first member's, for example.
        split = member_split(split, 0, chooses=True)
    return audit_split(opened.dataset, split, fingerprints, forests=False, protocol=protocol)


def _has_subgroups(opened: OpenedRun) -> bool:
    if any(field.subgroup for field in opened.dataset.schema.fields):
        return True
    note("no field of the data set is marked `subgroup: true`: no subgroup results")
    return False


def _has_score(opened: OpenedRun) -> bool:
    if opened.model.reads_image and not opened.run.out_of_scope_file.is_file():
        note(f"the run has no out-of-distribution score; `dualrefnet evaluate {opened.run.path}` adds it")
        return False
    return opened.model.reads_image


def _out_of_distribution(opened: OpenedRun, options: ReportOptions) -> OutOfDistributionMeasured:
    return measure_out_of_distribution(opened, options.masks, options.images, SAMPLES, options.seed)


def write_probes(
    run: Run,
    against: Sequence[Run] = (),
    out: Path | None = None,
    options: ReportOptions | None = None,
    permutations: int = 10,
    draws: int = 5,
) -> list[PrintedTable]:
    """Probe a run: tables as CSV, settings as JSON, and figures if matplotlib is installed; return tables to print."""
    options, out = options or ReportOptions(), out or run.path / "probes"
    seed = options.seed
    _check_probes(run, against)
    make_folder(out)
    opened = _open(run, options)
    shortcuts = probe_shortcuts(opened, options.masks, permutations, SAMPLES, seed)
    write_csv(out / "shortcuts.csv", shortcuts.table)
    write_json(out / "shortcuts.json", _shortcuts_json(shortcuts))
    note("done: shortcut probes")
    if _has_subgroups(opened):
        subgroups = subgroups_of_run(opened, SAMPLES, seed)
        write_csv(out / "subgroups.csv", subgroups.frame())
        count, expected = subgroups.flagged, subgroups.by_chance
        note(f"subgroups: {count} of {subgroups.looked_at} gaps exclude 0, about {expected:.0f} expected by chance")
    if _has_score(opened):
        write_csv(out / "out_of_scope.csv", _out_of_distribution(opened, options).table)
        note("done: out-of-distribution")
    runs = [opened, *(open_run(other, options.root, cache=options.cache, device=opened.device) for other in against)]
    names = [one.run.path.resolve().name for one in runs]
    if len(set(names)) < len(names):
        names = [str(one.run.path) for one in runs]
    found = []
    for name, one in zip(names, runs, strict=True):
        found.append(measure_missing_metadata(one, draws=draws, samples=SAMPLES, seed=seed, name=name))
        note(f"done: missing metadata, {name}")
    for name, tables in {
        "availability": [one.curve for one in found],
        "patterns": [one.patterns for one in found],
    }.items():
        named = [table.assign(run=one.name) for one, table in zip(found, tables, strict=True)]
        write_csv(out / f"{name}.csv", pd.concat(named, ignore_index=True))
    printed = [shortcut_table(shortcuts), missing_metadata_table(found[0]), missing_pattern_table(found[0])]
    differences = []
    for other in found[1:]:
        table = compare_missing_metadata(found[0], other)
        printed.append(missing_difference_table(table, found[0].name, other.name))
        differences.append(table.assign(run=found[0].name, against=other.name))
    if differences:
        write_csv(out / "availability-differences.csv", pd.concat(differences, ignore_index=True))
    try:
        for figure in (draw_shortcuts(shortcuts), draw_missing_metadata(found), draw_missing_patterns(found)):
            save_figure(figure, out / "pictures")
    except DependencyError as error:
        note(f"no figures: {error}")
    return printed


def _check_probes(run: Run, against: Sequence[Run]) -> None:
    """Refuse at once, and not after minutes, what can't be done."""
    if len(against) > MOST_AGAINST:
        raise RunError(f"{len(against)} runs are too many for one figure: give --against at most {MOST_AGAINST} times")
    if len({one.path.resolve() for one in (run, *against)}) < len(against) + 1:
        raise RunError("a run can't be compared with itself; name other runs with --against")
    _check_finished([run, *against])
    own, *others = (one.split.query("split == 'test'").reset_index(drop=True) for one in (run, *against))
    for other, split in zip(against, others, strict=True):
        if not split.equals(own):
            raise RunError(f"{other.path} has other test images than {run.path}, so the two can't be compared in pairs")


def _shortcuts_json(shortcuts: Shortcuts) -> dict[str, Any]:
    rows = shortcuts.table.astype(object).where(shortcuts.table.notna(), None).to_dict("records")
    return {
        "method": shortcuts.title,
        "unit": shortcuts.unit,
        "permutations": shortcuts.permutations,
        "train_images": shortcuts.train_images,
        "samples": shortcuts.samples,
        "seed": shortcuts.seed,
        "remarks": list(shortcuts.remarks),
        "in_words": shortcut_sentences(shortcuts),
        "probes": rows,
    }
