"""The sections of a run's page that examine it: for whom it holds, what it leans on, what gaps cost, whether its data can be trusted."""

from __future__ import annotations

from collections.abc import Iterator

from dualrefnet.audit.dataset_audit import audit_split
from dualrefnet.audit.fingerprints import fingerprint_files
from dualrefnet.evaluation.opened_run import OpenedRun
from dualrefnet.evaluation.out_of_scope import measure_out_of_scope
from dualrefnet.evaluation.subgroups import subgroups_of_run
from dualrefnet.probes.availability import measure_availability
from dualrefnet.probes.shortcuts import probe_shortcuts
from dualrefnet.progress import progress_bar, progress_steps, remark
from dualrefnet.report.audited import audited_section
from dualrefnet.report.out_of_scope import out_of_scope_section
from dualrefnet.report.probed import availability_section, shortcuts_section
from dualrefnet.report.section import Section
from dualrefnet.report.subgroups import subgroups_section
from dualrefnet.report.wishes import Wishes

SAMPLES = 1000


def examined_sections(opened: OpenedRun, wishes: Wishes) -> Iterator[Section]:
    """Return the sections, which are computed one by one as they are asked for; what makes no sense for the run is said and left out."""
    group = opened.dataset.schema.unit
    if any(field.subgroup for field in opened.dataset.schema.fields):
        yield subgroups_section(subgroups_of_run(opened, SAMPLES, wishes.seed), f"{group}s")
    else:
        remark("no field of the data set is marked `subgroup: true`: results aren't divided")
    yield shortcuts_section(probe_shortcuts(opened, wishes.masks, samples=SAMPLES, seed=wishes.seed))
    if opened.reads_metadata:
        yield availability_section(measure_availability(opened, samples=SAMPLES, seed=wishes.seed))
    if opened.model.reads_image and opened.run.out_of_scope_file.is_file():
        with progress_bar("pictures without a lesion") as show:
            measured = measure_out_of_scope(opened, wishes.masks, wishes.images, SAMPLES, wishes.seed, show)
        yield out_of_scope_section(measured, group)
    elif opened.model.reads_image:
        remark(f"the run has no out-of-scope check; `dualrefnet evaluate {opened.run.path}` makes it")
    yield _audit(opened)


def _audit(opened: OpenedRun) -> Section:
    with progress_steps() as show:
        # Of the files, not of the stored pictures: what colour constancy and CLAHE made of a smaller copy looks like another picture.
        used = opened.dataset.with_image[opened.dataset.with_image["image_id"].isin(opened.split["image_id"])]
        fingerprints = fingerprint_files(used, progress=lambda done, total: show("reading images", done, total)) if len(used) else None
        # Growing forests takes minutes; the command `audit` does.
        audit = audit_split(opened.dataset, opened.split, fingerprints, forests=False, progress=show, protocol=opened.recipe.data.protocol)
    return audited_section(audit)
