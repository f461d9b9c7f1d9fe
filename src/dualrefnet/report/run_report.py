"""Write the report, the explanations and the probes of a run: figures and tables as files, and one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dualrefnet.analysis.audit import audit_split
from dualrefnet.analysis.duplicates import fingerprint_files
from dualrefnet.analysis.missing_metadata import (
    MissingMetadata,
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
from dualrefnet.analysis.shortcuts import (
    Shortcuts,
    draw_shortcuts,
    probe_shortcuts,
    shortcut_sentences,
    shortcut_table,
)
from dualrefnet.analysis.subgroups import Subgroups, subgroups_of_run
from dualrefnet.display.figure import ReportFigure, save_figure
from dualrefnet.display.format import PrintedTable
from dualrefnet.display.page import Section, render_page
from dualrefnet.errors import DependencyError, RunError
from dualrefnet.files import write_csv, write_json, write_text
from dualrefnet.progress import note
from dualrefnet.report import ReportOptions
from dualrefnet.report.performance import (
    class_section,
    curve_sections,
    history_section,
    read_measured,
    summary_section,
)
from dualrefnet.report.provenance import provenance_section, run_names, run_notes, run_title
from dualrefnet.report.trust import (
    audit_section,
    calibration_section,
    conformal_section,
    missing_metadata_section,
    out_of_distribution_section,
    shortcuts_section,
    subgroups_section,
)
from dualrefnet.run import Run
from dualrefnet.runtime.availability import missingness_shortcut

PAGE = "report.html"
SAMPLES = 1000
# Files of the figures that show images or the metadata of a single patient, and columns that describe a single image.
PERSONAL = ("gallery_*", "gradcam.*", "shap_waterfall_*", "reconstruction.*", "disagreement.*")
SINGLE = ["image_id", "answer"]
# Runs that one figure can hold beside the first.
MOST_AGAINST = 3


def write_explanations(
    run: Run,
    out: Path | None = None,
    against: Run | None = None,
    options: ReportOptions | None = None,
    root: Path | None = None,
    cache: Path | None = None,
    device: str | None = None,
) -> list[Path]:
    """Explain the predictions of a run's model: figures and their numbers as files in `out` (None: `explanations` in
    the run folder), which are returned. `against` is a second run to compare it with; `root` the data's folder, if it
    has moved.

    Raises:
        RunError: a run isn't finished, the two can't be compared, or images of patients are to be left out and are
            in `out` already.
        DataError: an option is invalid for these data.
    """
    options, out = options or ReportOptions(), out or run.path / "explanations"
    _check(run, against, options, out)
    files = []
    for section in _model_sections(run, against, options, root, cache, device):
        files += [path for picture in section.pictures for path in save_figure(picture, out)]
        if section.pictures:
            note(f"{section.title}: {', '.join(picture.name for picture in section.pictures)}")
    return files


def write_report(
    run: Run,
    out: Path | None = None,
    against: Run | None = None,
    options: ReportOptions | None = None,
    explained: bool = True,
    root: Path | None = None,
    cache: Path | None = None,
    device: str | None = None,
) -> Path:
    """Write the report of a run, one HTML page, and its figures and their numbers in `pictures/` beside it; return the
    page.

    `out` is a folder (None: `report` in the run folder). `explained` includes the sections that need the model and the
    data; without them the extra `explain` isn't needed. The rest and the errors are as in `write_explanations`.
    """
    options, out = options or ReportOptions(), out or run.path / "report"
    _check(run, against, options, out / "pictures")
    if against is not None and not explained:
        raise RunError("a comparison needs both models, so --against needs the explanations")
    measured = read_measured(run)
    of_model: Iterator[Section] = iter(())
    if explained:
        of_model = _model_sections(run, against, options, root, cache, device, examined=True)
    samples, seed = run.recipe.evaluation.bootstrap or SAMPLES, run.recipe.seed

    def sections() -> Iterator[Section]:
        yield summary_section(measured)
        yield class_section(measured)
        yield from curve_sections(measured, samples, seed)
        yield calibration_section(measured, samples, seed)
        if run.calibration_file.is_file():
            yield conformal_section(measured, samples, seed)
        else:
            note(f"the run has no calibration; `dualrefnet evaluate {run.path}` adds it")
        yield history_section(measured)
        yield from of_model
        yield provenance_section(run)

    done = []
    for section in sections():
        for picture in section.pictures:
            save_figure(picture, out / "pictures")
        done.append(section)
        note(f"done: {section.title}")
    title, subtitle = run_title(run)
    notes, shortcut = run_notes(run), missingness_shortcut(measured.metrics)
    if shortcut is not None:
        notes.insert(0, f"Not to be used where metadata may be missing: {shortcut}.")
    of_patients = explained and options.photographs and not measured.metrics["drawn"]
    write_text(out / PAGE, render_page(title, subtitle, notes, done, of_patients))
    return out / PAGE


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


def _open(run: Run, root: Path | None, cache: Path | None, device: str | None) -> OpenedRun:
    return open_run(run, root, cache=cache, device=torch.device(device) if device else None)


def _model_sections(
    run: Run,
    against: Run | None,
    options: ReportOptions,
    root: Path | None,
    cache: Path | None,
    device: str | None,
    examined: bool = False,
) -> Iterator[Section]:
    """Open the runs, check the options, and return the sections, each computed when it is requested."""
    # These need captum and shap; the sections on the predictions don't.
    from dualrefnet.report.explanations import comparison_section, explanation_sections

    opened = _open(run, root, cache, device)
    second = _open(against, root, cache, device) if against is not None else None
    explanations = explanation_sections(opened, options)
    if not opened.dataset.schema.synthetic and options.photographs:
        note("the result shows images of patients: treat it as patient data, or use --no-photographs")

    def sections() -> Iterator[Section]:
        yield from explanations
        if examined:
            yield from _examination_sections(opened, options)
        if second is not None:
            yield comparison_section(opened, second, options)

    return sections() if options.photographs else map(_anonymous, sections())


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


def _examination_sections(opened: OpenedRun, options: ReportOptions) -> Iterator[Section]:
    unit = opened.dataset.schema.unit
    subgroups = _subgroups(opened, SAMPLES, options.seed)
    if subgroups is not None:
        yield subgroups_section(subgroups, f"{unit}s")
    yield shortcuts_section(probe_shortcuts(opened, options.masks, samples=SAMPLES, seed=options.seed))
    if opened.reads_metadata:
        yield missing_metadata_section(measure_missing_metadata(opened, samples=SAMPLES, seed=options.seed))
    found = _out_of_distribution(opened, options.masks, SAMPLES, options.seed, options.images)
    if found is not None:
        yield out_of_distribution_section(found, unit)
    # Of the files, not of the stored images, which colour constancy and CLAHE have changed.
    used = opened.dataset.with_image[opened.dataset.with_image["image_id"].isin(opened.split["image_id"])]
    fingerprints = fingerprint_files(used) if len(used) else None
    # Without the forests, which take minutes; the command `audit` has them.
    protocol = opened.recipe.data.protocol
    audit = audit_split(opened.dataset, opened.split, fingerprints, forests=False, protocol=protocol)
    yield audit_section(audit)


def _subgroups(opened: OpenedRun, samples: int, seed: int) -> Subgroups | None:
    if any(field.subgroup for field in opened.dataset.schema.fields):
        return subgroups_of_run(opened, samples, seed)
    note("no field of the data set is marked `subgroup: true`: no subgroup results")
    return None


def _out_of_distribution(
    opened: OpenedRun, masks: Path | None, samples: int, seed: int, images: int = 500
) -> OutOfDistributionMeasured | None:
    if not opened.model.reads_image:
        return None
    if not opened.run.out_of_scope_file.is_file():
        note(f"the run has no out-of-distribution score; `dualrefnet evaluate {opened.run.path}` adds it")
        return None
    return measure_out_of_distribution(opened, masks, images, samples, seed)


def write_probes(
    run: Run,
    against: Sequence[Run] = (),
    out: Path | None = None,
    masks: Path | None = None,
    permutations: int = 10,
    draws: int = 5,
    samples: int = 1000,
    seed: int = 0,
    root: Path | None = None,
    cache: Path | None = None,
    device: str | None = None,
) -> list[PrintedTable]:
    """Probe a run: tables as CSV, settings as JSON, and figures if matplotlib is installed; return the tables to print.

    `against`: up to three others with the same test images; `out`: folder (None: `probes` in the run folder);
    `permutations` across patients, `draws` random selections of fields for each share.

    Raises:
        RunError: a run isn't finished, is given twice or has other test images, or there are too many.
        DataError: `masks` isn't a folder with masks of test images.
    """
    out = out or run.path / "probes"
    _check_probes(run, against)
    opened = _open(run, root, cache, device)
    shortcuts = probe_shortcuts(opened, masks, permutations, samples, seed)
    write_csv(out / "shortcuts.csv", shortcuts.table)
    write_json(out / "shortcuts.json", _shortcuts_json(shortcuts))
    note("done: shortcut probes")
    subgroups = _subgroups(opened, samples, seed)
    if subgroups is not None:
        write_csv(out / "subgroups.csv", subgroups.frame())
        count, expected = subgroups.flagged, subgroups.by_chance
        note(f"subgroups: {count} of {subgroups.looked_at} gaps exclude 0, about {expected:.0f} expected by chance")
    scores = _out_of_distribution(opened, masks, samples, seed)
    if scores is not None:
        write_csv(out / "out_of_scope.csv", scores.table)
        note("done: out-of-distribution")
    runs = [opened, *(open_run(other, root, cache=cache, device=opened.device) for other in against)]
    names = [one.run.path.resolve().name for one in runs]
    if len(set(names)) < len(names):
        names = [str(one.run.path) for one in runs]
    found = []
    for name, one in zip(names, runs, strict=True):
        found.append(measure_missing_metadata(one, draws=draws, samples=samples, seed=seed, name=name))
        note(f"done: missing metadata, {name}")
    write_csv(out / "availability.csv", pd.concat([one.curve.assign(run=one.name) for one in found], ignore_index=True))
    write_csv(out / "patterns.csv", pd.concat([one.patterns.assign(run=one.name) for one in found], ignore_index=True))
    tables = [shortcut_table(shortcuts), missing_metadata_table(found[0]), missing_pattern_table(found[0])]
    differences = []
    for other in found[1:]:
        table = compare_missing_metadata(found[0], other)
        tables.append(missing_difference_table(table, found[0].name, other.name))
        differences.append(table.assign(run=found[0].name, against=other.name))
    if differences:
        write_csv(out / "availability-differences.csv", pd.concat(differences, ignore_index=True))
    _draw_probes(shortcuts, found, out / "pictures")
    return tables


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


def _draw_probes(shortcuts: Shortcuts, found: list[MissingMetadata], folder: Path) -> None:
    try:
        for picture in (draw_shortcuts(shortcuts), draw_missing_metadata(found), draw_missing_patterns(found)):
            save_figure(picture, folder)
    except DependencyError as error:
        note(f"no figures: {error}")
