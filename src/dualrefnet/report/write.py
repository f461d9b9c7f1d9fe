"""Write explanations and reports: pictures as files, and one page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from dualrefnet.errors import RunError
from dualrefnet.evaluation.opened_run import OpenedRun, open_run
from dualrefnet.explain.disagreement import find_disagreement
from dualrefnet.figures.picture import Picture, save_picture
from dualrefnet.files import write_text
from dualrefnet.progress import remark
from dualrefnet.report.measured import class_section, glance_section, probability_section, read_measured, training_section
from dualrefnet.report.page import render_page
from dualrefnet.report.provenance import provenance_section, run_names, run_notes, run_title
from dualrefnet.report.section import Section
from dualrefnet.report.trusted import calibrated_section
from dualrefnet.report.wishes import Wishes
from dualrefnet.run import Run

PAGE = "report.html"
# Files of the pictures that show photographs or the answers of a single patient; and the columns that tell of a single image.
PERSONAL = ("gallery_*", "gradcam.*", "shap_waterfall_*", "reconstruction.*", "disagreement.*")
SINGLE = ["image_id", "answer"]


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
        RunError: a run isn't finished, the two can't be compared, or photographs are to be left out and lie in `out` already.
        DataError: a wish can't be met.
    """
    wishes, out = wishes or Wishes(), out or run.path / "explanations"
    _check(run, against, wishes, out)
    files = []
    for section in _explained(run, against, wishes, root, cache, device):
        files += [path for picture in section.pictures for path in save_picture(picture, out)]
        if section.pictures:
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
        RunError: a run isn't finished, the two can't be compared, or photographs are to be left out and lie in `out` already.
        DataError: a wish can't be met.
    """
    wishes, out = wishes or Wishes(), out or run.path / "report"
    _check(run, against, wishes, out / "pictures")
    if against is not None and not explained:
        raise RunError("a second run is compared by what both models see: --against needs the explanations")
    measured = read_measured(run)
    asked = _explained(run, against, wishes, root, cache, device, examined=True) if explained else iter(())
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
            save_picture(picture, out / "pictures")
        made.append(section)
        remark(f"done: {section.title}")
    title, subtitle = run_title(run)
    of_patients = explained and wishes.photographs and not measured.metrics["drawn"]
    write_text(out / PAGE, render_page(title, subtitle, run_notes(run), made, of_patients))
    return out / PAGE


def _explained(
    run: Run, against: Run | None, wishes: Wishes, root: Path | None, cache: Path | None, device: str | None, examined: bool = False
) -> Iterator[Section]:
    """Open the runs, see whether the wishes can be met, and return the sections, which are computed one by one."""
    # These need captum and shap; a page of what the predictions say does without.
    from dualrefnet.report.compared import compared_section
    from dualrefnet.report.examined import examined_sections
    from dualrefnet.report.explained import explained_sections

    opened = _open(run, root, cache, device)
    second = _open(against, root, cache, device) if against is not None else None
    explanations = explained_sections(opened, wishes)
    if not opened.dataset.schema.drawn and wishes.photographs:
        remark("the result shows photographs of patients: treat it as patient data, or leave them out with --no-photographs")

    def sections() -> Iterator[Section]:
        yield from explanations
        if examined:
            yield from examined_sections(opened, wishes)
        if second is not None:
            yield compared_section(opened, second, wishes)

    return sections() if wishes.photographs else map(_without_single_images, sections())


def _without_single_images(section: Section) -> Section:
    """Take out of the pictures' numbers what names an image or tells a patient's answer."""
    items = [replace(item, data=_anonymous(item.data)) if isinstance(item, Picture) else item for item in section.items]
    return replace(section, items=items)


def _anonymous(data: pd.DataFrame) -> pd.DataFrame:
    if "image_id" not in data:
        return data
    kept = data.drop(columns=SINGLE, errors="ignore")
    # Sorted: the order of the rows could tell which of them are of one image.
    return kept.sort_values(list(kept.columns), ignore_index=True)


def _open(run: Run, root: Path | None, cache: Path | None, device: str | None) -> OpenedRun:
    return open_run(run, root, cache=cache, device=torch.device(device) if device else None)


def _check(run: Run, against: Run | None, wishes: Wishes, pictures: Path) -> None:
    for one in (run, against):
        if one is not None and not one.finished:
            raise RunError(f"{one.path} isn't a finished run; train it, or go on with --resume")
    if against is not None:
        run_names(run, against)
        # Says at once, and not after minutes, if they can't be compared.
        find_disagreement(run, against, seed=wishes.seed)
    if not wishes.photographs:
        there = sorted(path.name for pattern in PERSONAL for path in pictures.glob(pattern))
        if there:
            raise RunError(f"{pictures} holds {there[0]}, perhaps with photographs; remove it, or name another folder with --out")
