"""Write explanations and reports: pictures as files, and one page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dualrefnet.errors import RunError
from dualrefnet.evaluation.opened_run import OpenedRun, open_run
from dualrefnet.figures.picture import save_picture
from dualrefnet.files import write_text
from dualrefnet.progress import remark
from dualrefnet.report.measured import class_section, glance_section, probability_section, read_measured, training_section
from dualrefnet.report.page import render_page
from dualrefnet.report.provenance import provenance_section, run_names, run_notes, run_title
from dualrefnet.report.section import Section
from dualrefnet.report.wishes import Wishes
from dualrefnet.run import Run

PAGE = "report.html"


def write_explanations(
    run: Run,
    out: Path | None = None,
    against: Run | None = None,
    wishes: Wishes | None = None,
    root: Path | None = None,
    cache: Path | None = None,
    device: str | None = None,
) -> list[Path]:
    """Ask a run's model for explanations, and write their pictures and numbers.

    Args:
        run: a finished run.
        out: folder; None: `explanations` in the run folder.
        against: a second run to set beside it.
        wishes: how many images, which class, which masks.
        root: where the data lie now, if not where the recipe says.
        cache: where image stores lie.
        device: where to compute; None: a GPU if there is one.

    Returns:
        The files.

    Raises:
        RunError: a run isn't finished, or the two can't be compared.
        DataError: a wish can't be met.
    """
    wishes, out = wishes or Wishes(), out or run.path / "explanations"
    _check(run, against)
    opened = _open(run, root, cache, device)
    files = []
    for section in _explained(opened, against, wishes, root, cache, device):
        files += [path for picture in section.pictures for path in save_picture(picture, out)]
        remark(f"{section.title}: {', '.join(picture.name for picture in section.pictures)}")
    return files


def write_report(
    run: Run,
    out: Path | None = None,
    against: Run | None = None,
    wishes: Wishes | None = None,
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
        wishes: how many images, which class, which masks.
        explained: also ask the model; without it neither the data nor the extra `explain` are needed.
        root: where the data lie now, if not where the recipe says.
        cache: where image stores lie.
        device: where to compute; None: a GPU if there is one.

    Returns:
        The page.

    Raises:
        RunError: a run isn't finished, or the two can't be compared.
        DataError: a wish can't be met.
    """
    wishes, out = wishes or Wishes(), out or run.path / "report"
    _check(run, against)
    if against is not None and not explained:
        raise RunError("a second run is compared by what both models see: --against needs the explanations")
    measured = read_measured(run)
    samples, seed = run.recipe.evaluation.bootstrap or 1000, run.recipe.seed

    def sections() -> Iterator[Section]:
        yield glance_section(measured)
        yield class_section(measured, samples, seed)
        yield probability_section(measured, samples, seed)
        yield training_section(measured)
        if explained:
            yield from _explained(_open(run, root, cache, device), against, wishes, root, cache, device)
        yield provenance_section(run)

    made = []
    for section in sections():
        for picture in section.pictures:
            save_picture(picture, out / "pictures")
        made.append(section)
        remark(f"done: {section.title}")
    title, subtitle = run_title(run)
    write_text(out / PAGE, render_page(title, subtitle, run_notes(run), made, explained and wishes.photographs))
    return out / PAGE


def _explained(
    opened: OpenedRun, against: Run | None, wishes: Wishes, root: Path | None, cache: Path | None, device: str | None
) -> Iterator[Section]:
    # These need captum and shap; a page of what the predictions say does without.
    from dualrefnet.report.compared import compared_section
    from dualrefnet.report.explained import explained_sections

    if not opened.dataset.schema.drawn and wishes.photographs:
        remark("the result shows photographs of patients: treat it as patient data, or leave them out with --no-photographs")
    yield from explained_sections(opened, wishes)
    if against is not None:
        yield compared_section(opened, _open(against, root, cache, device), wishes)


def _open(run: Run, root: Path | None, cache: Path | None, device: str | None) -> OpenedRun:
    return open_run(run, root, cache=cache, device=torch.device(device) if device else None)


def _check(run: Run, against: Run | None) -> None:
    for one in (run, against):
        if one is not None and not one.finished:
            raise RunError(f"{one.path} isn't a finished run; train it, or go on with --resume")
    if against is not None:
        run_names(run, against)
