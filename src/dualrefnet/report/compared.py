"""The section of a run's page that sets it beside a second run."""

from __future__ import annotations

from dualrefnet.evaluation.opened_run import OpenedRun
from dualrefnet.explain.disagreement import Disagreement, find_disagreement
from dualrefnet.explain.embedding import compare_embeddings
from dualrefnet.explain.gallery import ChosenCase, ShownCase, show_cases
from dualrefnet.explain.separation import MEASURES
from dualrefnet.figures.disagreement import draw_disagreement
from dualrefnet.figures.embedding import draw_embedding, draw_separation
from dualrefnet.figures.picture import Picture
from dualrefnet.progress import progress_bar
from dualrefnet.report.explained import SAMPLES
from dualrefnet.report.provenance import run_names
from dualrefnet.report.section import Section
from dualrefnet.report.wishes import Wishes

# Cases of each of the two kinds of disagreement.
CASES = 3


def compared_section(first: OpenedRun, second: OpenedRun, wishes: Wishes) -> Section:
    """Compare two runs on the test images of both: which is better, where they differ, and which separates the classes better.

    Raises:
        RunError: they share no test image, or differ in labels, classes or patients.
    """
    names = run_names(first.run, second.run)
    found = find_disagreement(first.run, second.run, CASES, SAMPLES, wishes.seed)
    with progress_bar("features of both") as show:
        comparison = compare_embeddings(first, second, wishes.images, SAMPLES, wishes.seed, names, show)
    pictures: list[Picture] = [draw_embedding(comparison.first, comparison.second), draw_separation(comparison)]
    if wishes.photographs and first.model.reads_image and len(found.chosen):
        ours = _shown(first, found, "predicted_a")
        theirs = _shown(second, found, "predicted_b") if second.model.reads_image else [None] * len(ours)
        pictures.append(draw_disagreement(found, list(zip(ours, theirs, strict=True)), names))
    difference = found.difference
    verdict = f"{names[0] if difference.low > 0 else names[1]} is better on these data"
    if difference.low <= 0 <= difference.high:
        verdict = "the interval holds 0, so it can't be told which is better"
    alone = found.only_a + found.only_b
    left_out = f" ({alone:,} images that only one of them was tested on are left out)" if alone else ""
    numbers = f"{difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]".replace("-", "−")
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
    for image_id, label, predicted in zip(found.chosen["image_id"], found.chosen["label"], found.chosen[column], strict=True):
        scores = {name: float(predictions.loc[image_id, f"prob_{name}"]) for name in opened.classes}
        cases.append(ChosenCase(image_id, label, predicted, column, scores))
    with progress_bar("Grad-CAM of the cases") as show:
        return show_cases(opened, cases, progress=show)
