"""Write the probes of a trained run: tables as CSV, what they were made with as JSON, and pictures where matplotlib is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dualrefnet.errors import DependencyError, RunError
from dualrefnet.evaluation.opened_run import OpenedRun, open_run
from dualrefnet.evaluation.out_of_scope import measure_out_of_scope
from dualrefnet.evaluation.printed_table import PrintedTable
from dualrefnet.evaluation.subgroups import subgroups_of_run
from dualrefnet.files import write_csv, write_json
from dualrefnet.probes.availability import Availability, compare_availability, measure_availability
from dualrefnet.probes.shortcuts import Shortcuts, probe_shortcuts
from dualrefnet.probes.tables import availability_table, difference_table, pattern_table, shortcut_sentences, shortcut_table
from dualrefnet.progress import progress_bar, remark
from dualrefnet.run import Run

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
    availability: list[Availability]


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
    _check(run, against)
    opened = open_run(run, root, cache=cache, device=torch.device(device) if device else None)
    shortcuts = probe_shortcuts(opened, masks, permutations, samples, seed)
    write_csv(out / "shortcuts.csv", shortcuts.table)
    write_json(out / "shortcuts.json", _json(shortcuts))
    tables = [shortcut_table(shortcuts)]
    remark("done: what the score leans on")
    _write_subgroups(opened, out, samples, seed)
    _write_out_of_scope(opened, masks, out, samples, seed)
    found: list[Availability] = []
    for name, one in _named(opened, against, root, cache):
        found.append(measure_availability(one, draws=draws, samples=samples, seed=seed, name=name))
        remark(f"done: {name} with fewer answers")
    write_csv(out / "availability.csv", pd.concat([one.curve.assign(run=one.name) for one in found], ignore_index=True))
    write_csv(out / "patterns.csv", pd.concat([one.patterns.assign(run=one.name) for one in found], ignore_index=True))
    tables += [availability_table(found[0]), pattern_table(found[0])]
    differences = []
    for other in found[1:]:
        table = compare_availability(found[0], other)
        tables.append(difference_table(table, found[0].name, other.name))
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
    remark(f"subgroups: {found.flagged} of {found.looked_at} gaps stand out, about {found.by_chance:.0f} would by chance")


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


def _draw(shortcuts: Shortcuts, found: list[Availability], out: Path) -> None:
    """Write the pictures, or say that they were left out."""
    try:
        from dualrefnet.figures.availability import draw_availability, draw_patterns
        from dualrefnet.figures.picture import save_picture
        from dualrefnet.figures.shortcuts import draw_shortcuts
    except DependencyError as error:
        remark(f"the pictures were left out: {error}")
        return
    for picture in (draw_shortcuts(shortcuts), draw_availability(found), draw_patterns(found)):
        save_picture(picture, out / "pictures")


def _named(opened: OpenedRun, against: Sequence[Run], root: Path | None, cache: Path | None) -> list[tuple[str, OpenedRun]]:
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


def _check(run: Run, against: Sequence[Run]) -> None:
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
