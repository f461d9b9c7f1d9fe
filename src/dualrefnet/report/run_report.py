"""What the caller of an explanation or a report may choose."""

# also: The section of a run's page that sets it beside a second run.
# also: The sections of a run's page that examine it: for whom it holds, what it leans on, what gaps cost, whether its
# data can be trusted.
# also: Write explanations and reports: pictures as files, and one page.
# also: Write the probes of a trained run: tables as CSV, what they were made with as JSON, and pictures where
# matplotlib is there.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dualrefnet.analysis.audit import audit_split
from dualrefnet.analysis.availability import MissingMetadata, compare_missing_metadata
from dualrefnet.analysis.availability import measure_missing_metadata as measure_availability
from dualrefnet.analysis.cases import (
    ChosenCase,
    Disagreement,
    ShownCase,
    draw_disagreement,
    find_disagreement,
    show_cases,
)
from dualrefnet.analysis.duplicates import fingerprint_files
from dualrefnet.analysis.embedding import MEASURES, compare_embeddings, draw_embedding, draw_separation
from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.analysis.out_of_distribution import measure_out_of_scope
from dualrefnet.analysis.shortcuts import (
    Shortcuts,
    missing_difference_table,
    missing_metadata_table,
    missing_pattern_table,
    probe_shortcuts,
    shortcut_sentences,
    shortcut_table,
)
from dualrefnet.analysis.subgroups import subgroups_of_run
from dualrefnet.display.figure import ReportFigure, save_figure
from dualrefnet.display.format import PrintedTable
from dualrefnet.display.page import Section, render_page
from dualrefnet.errors import DependencyError, RunError
from dualrefnet.files import write_csv, write_json, write_text
from dualrefnet.progress import progress_bar, progress_steps, remark
from dualrefnet.report import ReportOptions
from dualrefnet.report.performance import (
    class_section,
    glance_section,
    probability_section,
    read_measured,
    training_section,
)
from dualrefnet.report.provenance import provenance_section, run_names, run_notes, run_title
from dualrefnet.report.trust import (
    audited_section,
    availability_section,
    calibrated_section,
    out_of_scope_section,
    shortcuts_section,
    subgroups_section,
)
from dualrefnet.run import Run

# Cases of each of the two kinds of disagreement.
CASES = 3


def compared_section(first: OpenedRun, second: OpenedRun, options: ReportOptions) -> Section:
    """Compare two runs on the test images of both: which is better, where they differ, and which separates the classes
    better.

    Raises:
        RunError: they share no test image, or differ in labels, classes or patients.
    """
    names = run_names(first.run, second.run)
    found = find_disagreement(first.run, second.run, CASES, SAMPLES, options.seed)
    with progress_bar("features of both") as show:
        comparison = compare_embeddings(first, second, options.images, SAMPLES, options.seed, names, show)
    pictures: list[ReportFigure] = [draw_embedding(comparison.first, comparison.second), draw_separation(comparison)]
    if options.photographs and first.model.reads_image and len(found.chosen):
        ours = _shown(first, found, "predicted_a")
        theirs = _shown(second, found, "predicted_b") if second.model.reads_image else [None] * len(ours)
        pictures.append(draw_disagreement(found, list(zip(ours, theirs, strict=True)), names))
    difference = found.difference
    verdict = f"{names[0] if difference.low > 0 else names[1]} is better on these data"
    if difference.low <= 0 <= difference.high:
        verdict = "the interval holds 0, so it can't be told which is better"
    alone = found.only_a + found.only_b
    left_out = f" ({alone:,} images that only one of them was tested on are left out)" if alone else ""
    numbers = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]".replace("-", "−")
    lead = [
        f"Both runs on the {len(found.table):,} test photographs that they share{left_out}: balanced accuracy "
        f"{found.balanced_accuracy_a:.3f} of {names[0]} and {found.balanced_accuracy_b:.3f} of {names[1]}; difference {numbers}, "
        f"p = {difference.p:.3f}: {verdict}.",
        *(comparison.sentence(measure) for measure in MEASURES),
    ]
    return Section("against", f"Beside {names[1]}", lead, list(pictures))


def _shown(opened: OpenedRun, found: Disagreement, column: str) -> list[ShownCase]:
    predictions = opened.run.predictions.set_index("image_id")
    cases = []
    for image_id, label, predicted in zip(
        found.chosen["image_id"], found.chosen["label"], found.chosen[column], strict=True
    ):
        scores = {name: float(predictions.loc[image_id, f"prob_{name}"]) for name in opened.classes}
        cases.append(ChosenCase(image_id, label, predicted, column, scores))
    with progress_bar("Grad-CAM of the cases") as show:
        return show_cases(opened, cases, progress=show)


SAMPLES = 1000


def examined_sections(opened: OpenedRun, options: ReportOptions) -> Iterator[Section]:
    """Return the sections, which are computed one by one as they are asked for; what makes no sense for the run is
    said and left out.
    """
    group = opened.dataset.schema.unit
    if any(field.subgroup for field in opened.dataset.schema.fields):
        yield subgroups_section(subgroups_of_run(opened, SAMPLES, options.seed), f"{group}s")
    else:
        remark("no field of the data set is marked `subgroup: true`: results aren't divided")
    yield shortcuts_section(probe_shortcuts(opened, options.masks, samples=SAMPLES, seed=options.seed))
    if opened.reads_metadata:
        yield availability_section(measure_availability(opened, samples=SAMPLES, seed=options.seed))
    if opened.model.reads_image and opened.run.out_of_scope_file.is_file():
        with progress_bar("pictures without a lesion") as show:
            measured = measure_out_of_scope(opened, options.masks, options.images, SAMPLES, options.seed, show)
        yield out_of_scope_section(measured, group)
    elif opened.model.reads_image:
        remark(f"the run has no out-of-scope check; `dualrefnet evaluate {opened.run.path}` makes it")
    yield _audit(opened)


def _audit(opened: OpenedRun) -> Section:
    with progress_steps() as show:
        # Of the files, not of the stored pictures: what colour constancy and CLAHE made of a smaller copy looks like
        # another picture.
        used = opened.dataset.with_image[opened.dataset.with_image["image_id"].isin(opened.split["image_id"])]
        fingerprints = (
            fingerprint_files(used, progress=lambda done, total: show("reading images", done, total))
            if len(used)
            else None
        )
        # Growing forests takes minutes; the command `audit` does.
        audit = audit_split(
            opened.dataset,
            opened.split,
            fingerprints,
            forests=False,
            progress=show,
            protocol=opened.recipe.data.protocol,
        )
    return audited_section(audit)


PAGE = "report.html"


# Files of the pictures that show photographs or the answers of a single patient; and the columns that tell of a single
# image.
PERSONAL = ("gallery_*", "gradcam.*", "shap_waterfall_*", "reconstruction.*", "disagreement.*")


SINGLE = ["image_id", "answer"]


def write_explanations(
    run: Run,
    out: Path | None = None,
    against: Run | None = None,
    options: ReportOptions | None = None,
    root: Path | None = None,
    cache: Path | None = None,
    device: str | None = None,
) -> list[Path]:
    """Ask a run's model for explanations, and write their pictures and numbers.

    Args:
        run: a finished run.
        out: folder; None: `explanations` in the run folder.
        against: a second run to set beside it.
        options: how many images, which class, which masks.
        root: where the data lie now, if not where the recipe says.
        cache: where image stores lie.
        device: where to compute; None: a GPU if there is one.

    Returns:
        The files.

    Raises:
        RunError: a run isn't finished, the two can't be compared, or photographs are to be left out and lie in `out`
            already.
        DataError: a wish can't be met.
    """
    options, out = options or ReportOptions(), out or run.path / "explanations"
    _check(run, against, options, out)
    files = []
    for section in _explained(run, against, options, root, cache, device):
        files += [path for picture in section.pictures for path in save_figure(picture, out)]
        if section.pictures:
            remark(f"{section.title}: {', '.join(picture.name for picture in section.pictures)}")
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
    """Write the page of a run, and its pictures and numbers in `pictures/` beside it.

    Args:
        run: a finished run.
        out: folder; None: `report` in the run folder.
        against: a second run to set beside it.
        options: how many images, which class, which masks.
        explained: also ask the model; without it neither the data nor the extra `explain` are needed.
        root: where the data lie now, if not where the recipe says.
        cache: where image stores lie.
        device: where to compute; None: a GPU if there is one.

    Returns:
        The page.

    Raises:
        RunError: a run isn't finished, the two can't be compared, or photographs are to be left out and lie in `out`
            already.
        DataError: a wish can't be met.
    """
    options, out = options or ReportOptions(), out or run.path / "report"
    _check(run, against, options, out / "pictures")
    if against is not None and not explained:
        raise RunError("a second run is compared by what both models see: --against needs the explanations")
    measured = read_measured(run)
    asked = _explained(run, against, options, root, cache, device, examined=True) if explained else iter(())
    samples, seed = run.recipe.evaluation.bootstrap or 1000, run.recipe.seed

    def sections() -> Iterator[Section]:
        yield glance_section(measured)
        yield class_section(measured, samples, seed)
        yield probability_section(measured, samples, seed)
        if run.calibration_file.is_file():
            yield calibrated_section(measured, samples, seed)
        else:
            remark(f"the run is older than the calibration of probabilities; `dualrefnet evaluate {run.path}` adds it")
        yield training_section(measured)
        yield from asked
        yield provenance_section(run)

    made = []
    for section in sections():
        for picture in section.pictures:
            save_figure(picture, out / "pictures")
        made.append(section)
        remark(f"done: {section.title}")
    title, subtitle = run_title(run)
    of_patients = explained and options.photographs and not measured.metrics["drawn"]
    write_text(out / PAGE, render_page(title, subtitle, run_notes(run), made, of_patients))
    return out / PAGE


def _explained(
    run: Run,
    against: Run | None,
    options: ReportOptions,
    root: Path | None,
    cache: Path | None,
    device: str | None,
    examined: bool = False,
) -> Iterator[Section]:
    """Open the runs, see whether the options can be met, and return the sections, which are computed one by one."""
    # These need captum and shap; a page of what the predictions say does without.
    from dualrefnet.report.explanations import explained_sections

    opened = _open(run, root, cache, device)
    second = _open(against, root, cache, device) if against is not None else None
    explanations = explained_sections(opened, options)
    if not opened.dataset.schema.drawn and options.photographs:
        remark(
            "the result shows photographs of patients: treat it as patient data, or leave them out with --no-photographs"
        )

    def sections() -> Iterator[Section]:
        yield from explanations
        if examined:
            yield from examined_sections(opened, options)
        if second is not None:
            yield compared_section(opened, second, options)

    return sections() if options.photographs else map(_without_single_images, sections())


def _without_single_images(section: Section) -> Section:
    """Take out of the pictures' numbers what names an image or tells a patient's answer."""
    items = [
        replace(item, data=_anonymous(item.data)) if isinstance(item, ReportFigure) else item for item in section.items
    ]
    return replace(section, items=items)


def _anonymous(data: pd.DataFrame) -> pd.DataFrame:
    if "image_id" not in data:
        return data
    kept = data.drop(columns=SINGLE, errors="ignore")
    # Sorted: the order of the rows could tell which of them are of one image.
    return kept.sort_values(list(kept.columns), ignore_index=True)


def _open(run: Run, root: Path | None, cache: Path | None, device: str | None) -> OpenedRun:
    return open_run(run, root, cache=cache, device=torch.device(device) if device else None)


def _check(run: Run, against: Run | None, options: ReportOptions, pictures: Path) -> None:
    for one in (run, against):
        if one is not None and not one.finished:
            raise RunError(f"{one.path} isn't a finished run; train it, or go on with --resume")
    if against is not None:
        run_names(run, against)
        # Says at once, and not after minutes, if they can't be compared.
        find_disagreement(run, against, seed=options.seed)
    if not options.photographs:
        there = sorted(path.name for pattern in PERSONAL for path in pictures.glob(pattern))
        if there:
            raise RunError(
                f"{pictures} holds {there[0]}, perhaps with photographs; remove it, or name another folder with --out"
            )


# Runs that one picture can hold beside the first.
MOST_AGAINST = 3


@dataclass(frozen=True)
class Probed:
    """What was found out about a run.

    Attributes:
        folder: where the files lie.
        tables: for people.
        shortcuts: what the score leans on.
        availability: of the run, and of those it was compared with.
    """

    folder: Path
    tables: list[PrintedTable]
    shortcuts: Shortcuts
    availability: list[MissingMetadata]


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
) -> Probed:
    """Probe a run, and write what was found.

    Args:
        run: a finished run.
        against: up to three others of the same test images, whose curves are set beside it.
        out: folder; None: `probes` in the run folder.
        masks: folder of outlines of the lesions; None: `masks` in the data set's folder, if it is there.
        permutations: exchanges between patients.
        draws: random choices of answers for each share.
        samples: bootstrap samples.
        seed: of all draws.
        root: where the data lie now, if not where the recipe says.
        cache: where image stores lie.
        device: where to compute; None: a GPU if there is one.

    Raises:
        RunError: a run isn't finished, is given twice or has other test images, or there are too many.
        DataError: `masks` isn't a folder with masks of test images.
    """
    out = out or run.path / "probes"
    _write_probes_check(run, against)
    opened = open_run(run, root, cache=cache, device=torch.device(device) if device else None)
    shortcuts = probe_shortcuts(opened, masks, permutations, samples, seed)
    write_csv(out / "shortcuts.csv", shortcuts.table)
    write_json(out / "shortcuts.json", _json(shortcuts))
    tables = [shortcut_table(shortcuts)]
    remark("done: what the score leans on")
    _write_subgroups(opened, out, samples, seed)
    _write_out_of_scope(opened, masks, out, samples, seed)
    found: list[MissingMetadata] = []
    for name, one in _named(opened, against, root, cache):
        found.append(measure_availability(one, draws=draws, samples=samples, seed=seed, name=name))
        remark(f"done: {name} with fewer answers")
    write_csv(out / "availability.csv", pd.concat([one.curve.assign(run=one.name) for one in found], ignore_index=True))
    write_csv(out / "patterns.csv", pd.concat([one.patterns.assign(run=one.name) for one in found], ignore_index=True))
    tables += [missing_metadata_table(found[0]), missing_pattern_table(found[0])]
    differences = []
    for other in found[1:]:
        table = compare_missing_metadata(found[0], other)
        tables.append(missing_difference_table(table, found[0].name, other.name))
        differences.append(table.assign(run=found[0].name, against=other.name))
    if differences:
        write_csv(out / "availability-differences.csv", pd.concat(differences, ignore_index=True))
    _draw(shortcuts, found, out)
    return Probed(out, tables, shortcuts, found)


def _write_subgroups(opened: OpenedRun, out: Path, samples: int, seed: int) -> None:
    """Write the measures by level of every field by which results are compared."""
    if not any(field.subgroup for field in opened.dataset.schema.fields):
        remark("no field of the data set is marked `subgroup: true`: results aren't divided")
        return
    found = subgroups_of_run(opened, samples, seed)
    write_csv(out / "subgroups.csv", found.frame())
    remark(
        f"subgroups: {found.flagged} of {found.looked_at} gaps stand out, about {found.by_chance:.0f} would by chance"
    )


def _write_out_of_scope(opened: OpenedRun, masks: Path | None, out: Path, samples: int, seed: int) -> None:
    """Write how well the run's check of pictures tells lesions from other pictures."""
    if not opened.model.reads_image:
        return
    if not opened.run.out_of_scope_file.is_file():
        remark(f"the run has no out-of-scope check; `dualrefnet evaluate {opened.run.path}` makes it")
        return
    with progress_bar("pictures without a lesion") as show:
        measured = measure_out_of_scope(opened, masks, samples=samples, seed=seed, progress=show)
    write_csv(out / "out_of_scope.csv", measured.table)
    remark("done: pictures that show no lesion")


def _draw(shortcuts: Shortcuts, found: list[MissingMetadata], out: Path) -> None:
    """Write the pictures, or say that they were left out."""
    try:
        from dualrefnet.analysis.availability import draw_missing_metadata, draw_missing_patterns
        from dualrefnet.analysis.shortcuts import draw_shortcuts
        from dualrefnet.display.figure import save_figure
    except DependencyError as error:
        remark(f"the pictures were left out: {error}")
        return
    for picture in (draw_shortcuts(shortcuts), draw_missing_metadata(found), draw_missing_patterns(found)):
        save_figure(picture, out / "pictures")


def _named(
    opened: OpenedRun, against: Sequence[Run], root: Path | None, cache: Path | None
) -> list[tuple[str, OpenedRun]]:
    """Return the runs with names that tell them apart: their folders, or if these are called alike their paths."""
    others = [open_run(run, root, cache=cache, device=opened.device) for run in against]
    paths = [one.run.path for one in (opened, *others)]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return list(zip(names, (opened, *others), strict=True))


def _json(shortcuts: Shortcuts) -> dict[str, Any]:
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


def _write_probes_check(run: Run, against: Sequence[Run]) -> None:
    """Refuse at once, and not after minutes, what can't be done."""
    if len(against) > MOST_AGAINST:
        raise RunError(f"{len(against)} runs are too many for one picture: give --against at most {MOST_AGAINST} times")
    paths = [one.path.resolve() for one in (run, *against)]
    if len(set(paths)) < len(paths):
        raise RunError("a run can't be compared with itself; name other runs with --against")
    for one in (run, *against):
        if not one.finished:
            raise RunError(f"{one.path} isn't a finished run; train it, or go on with --resume")
    own = run.split
    wanted = own[own["split"] == "test"].reset_index(drop=True)
    for other in against:
        split = other.split
        if not split[split["split"] == "test"].reset_index(drop=True).equals(wanted):
            raise RunError(f"{other.path} has other test images than {run.path}, so the two can't be compared in pairs")
