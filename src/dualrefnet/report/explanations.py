"""The sections of a run's page that ask its model: where it looks, which answers count, what it separates, what it
rebuilds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dualrefnet.analysis.cases import RIGHT, ChosenCase, ShownCase, choose_cases, draw_gallery, show_cases
from dualrefnet.analysis.embedding import draw_embedding, embed
from dualrefnet.analysis.gradcam import ALL_IMAGES, GradCamCase, draw_gradcam, draw_localisation, localise
from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.reconstruction import draw_reconstruction, reconstruct
from dualrefnet.analysis.shap import MetadataShap, draw_beeswarm, draw_importance, draw_waterfall, explain_metadata
from dualrefnet.display.figure import ReportFigure
from dualrefnet.display.page import Section
from dualrefnet.errors import DataError
from dualrefnet.progress import progress_bar, remark
from dualrefnet.report import ReportOptions

# Answers beside a photograph, and bootstrap samples of what is measured here.
ANSWERS, SAMPLES = 3, 1000


def explained_sections(opened: OpenedRun, options: ReportOptions) -> Iterator[Section]:
    """Return the sections, which are computed one by one as they are asked for; what is wrong with the options is said
    at once.

    Raises:
        DataError: `options.label` is no class, fewer images are wished than there are classes, or `options.masks` isn't
            a folder with
            masks of test images.
    """
    if options.label is not None and options.label not in opened.classes:
        raise DataError(f"there is no class {options.label}; the classes are {', '.join(opened.classes)}")
    if min(options.images, options.shap_images) < len(opened.classes):
        raise DataError(
            f"{min(options.images, options.shap_images)} images can't show {len(opened.classes)} classes; ask for more"
        )
    return _sections(opened, options, opened.masks(options.masks) if opened.model.reads_image else {})


def _sections(opened: OpenedRun, options: ReportOptions, masks: dict[str, Path]) -> Iterator[Section]:
    cases = _cases(opened, options.each)
    answers = _shap(opened, options, cases) if opened.reads_metadata and options.photographs else None
    shown: list[ShownCase] = []
    if opened.model.reads_image and options.photographs:
        with progress_bar("Grad-CAM of the gallery") as show:
            counted = (
                {}
                if answers is None
                else {
                    image_id: answers.top_groups(row, case.predicted, ANSWERS)
                    for row, (image_id, case) in enumerate(zip(answers.image_ids, cases, strict=True))
                }
            )
            shown = show_cases(opened, cases, options.label, counted, masks, show)
        yield _gallery_section(opened, shown)
    if opened.model.reads_image:
        yield _where_section(opened, options, shown, masks)
    else:
        remark("this method reads no photograph: no Grad-CAM, no gallery")
    if opened.reads_metadata:
        yield _form_section(opened, options, answers)
    else:
        remark("this method reads no metadata: no SHAP")
    yield _features_section(opened, options)
    if opened.recipe.rebuilds_image:
        yield _auxiliary_section(opened, options)


def _cases(opened: OpenedRun, each: int) -> list[ChosenCase]:
    predictions = opened.run.predictions
    test = predictions[predictions["split"] == "test"]
    return choose_cases(test, opened.groups.loc[test["image_id"]], opened.classes, each)


def _shap(opened: OpenedRun, options: ReportOptions, cases: list[ChosenCase]) -> MetadataShap:
    with progress_bar("SHAP of the gallery") as show:
        return explain_metadata(opened, image_ids=[case.image_id for case in cases], seed=options.seed, progress=show)


def _gallery_section(opened: OpenedRun, shown: list[ShownCase]) -> Section:
    names = opened.dataset.schema.class_names
    by_class = {label: [case for case in shown if case.chosen.label == label] for label in opened.classes}
    pictures = [draw_gallery(cases, label, names.get(label, "")) for label, cases in by_class.items() if cases]
    lead = [
        "The answers that the model was surest of, chosen by probability and not by looks. The wrong ones deserve as much attention as the "
        "right ones: nothing in the probability warned of them.",
        "Beside each photograph: the places that speak for the predicted class (Grad-CAM; the brighter, the more) and the highest "
        "probabilities"
        + (
            ", then the answers of the form that moved the predicted class's probability most, in percentage points (SHAP)."
            if any(case.attributions for case in shown)
            else "."
        ),
    ]
    return Section("gallery", "The surest right and the surest wrong", lead, list(pictures))


def _where_section(
    opened: OpenedRun, options: ReportOptions, shown: list[ShownCase], masks: dict[str, Path]
) -> Section:
    lead = [
        "Grad-CAM shows which places of a photograph speak for a class, given this patient's form. It shows where the evidence lies, not "
        "whether it is good evidence."
    ]
    pictures: list[ReportFigure] = []
    heat_cases = [_heat_case(case, options.label) for case in _one_a_class(shown)]
    if heat_cases:
        other = (
            f"class {options.label}"
            if options.label
            else "the true class, or the second likeliest where the answer was right"
        )
        choice = f"Shown are the surest answer of each class, right where one was; the last column is {other}."
        pictures.append(draw_gradcam(heat_cases, choice, len(opened.model.encoders)))
    if masks:
        with progress_bar("Grad-CAM against masks") as show:
            found = localise(opened, options.masks, options.images, SAMPLES, options.seed, show)
        pictures.append(draw_localisation(found))
        overall = found.summary[found.summary["class"] == ALL_IMAGES].set_index("measure")
        row = overall.loc["energy"]
        better = (
            "more"
            if row["difference_low"] > 0
            else "less"
            if row["difference_high"] < 0
            else "neither clearly more nor clearly less"
        )
        lead.append(
            f"Where the lesions were outlined, {row['value']:.0%} [{row['low']:.0%} to {row['high']:.0%}] of the heat lies in the lesion: "
            f"{better} than a round spot in the middle of every picture would have there ({row['baseline']:.0%}), since photographs are "
            f"centred on the lesion. Even heat would have {row['area']:.0%}."
        )
    else:
        lead.append(
            "There are no outlines of these lesions, so how much of the heat lies in the lesion can't be measured (--masks)."
        )
    return Section("where", "Where it looks", lead, list(pictures))


def _form_section(opened: OpenedRun, options: ReportOptions, gallery: MetadataShap | None) -> Section:
    lead = [
        "How far each answer of the form moves the probability of a class while the photograph stays the same (SHAP values). They tell "
        "what the model uses, not what causes a disease.",
    ]
    results = []
    for by in ("field", "column"):
        with progress_bar(f"SHAP by {by}") as show:
            results.append(
                explain_metadata(opened, images=options.shap_images, by=by, seed=options.seed, progress=show)
            )
    by_field, by_column = results
    pictures = [draw_importance(by_field), draw_importance(by_column)]
    if gallery is not None:
        malignant = [label for label in opened.classes if label in opened.dataset.schema.malignant] or list(
            opened.classes
        )
        first = next((row for row, label in enumerate(gallery.labels) if opened.classes[label] in malignant), 0)
        predicted = opened.classes[int(gallery.prediction[first].argmax())]
        pictures.append(draw_waterfall(gallery, gallery.image_ids[first], predicted))
    labels = [options.label] if options.label else list(opened.classes)
    return Section(
        "form",
        "Which answers of the form count",
        lead,
        [*pictures, *(draw_beeswarm(by_field, label) for label in labels)],
    )


def _features_section(opened: OpenedRun, options: ReportOptions) -> Section:
    with progress_bar("features") as show:
        found = embed(opened, options.images, SAMPLES, options.seed, opened.run.path.resolve().name, show)
    lead = [
        "The vector that is classified, in which photograph and form are fused, laid out so that neighbours stay neighbours (t-SNE). The "
        "numbers are measured among the vectors themselves: a picture like this can be made to look better or worse than they are."
    ]
    return Section("features", "What its features separate", lead, [draw_embedding(found)])


def _auxiliary_section(opened: OpenedRun, options: ReportOptions) -> Section:
    with progress_bar("rebuilding") as show:
        found = reconstruct(opened, min(options.images, 200), seed=options.seed, progress=show)
    mean = found.table[["psnr", "psnr_flat", "ssim", "ssim_flat"]].mean()
    said = "better" if mean["psnr"] > mean["psnr_flat"] else "no better"
    lead = [
        "In training a decoder must rebuild a picture of twice the side from the encoder's last map, so that the map keeps what is in "
        f"the picture; for predictions it isn't used. By PSNR it is {said} than an area of the target's mean colour: {mean['psnr']:.1f} "
        f"against {mean['psnr_flat']:.1f} dB."
    ]
    if options.photographs:
        return Section("auxiliary", "What the auxiliary task rebuilds", lead, [draw_reconstruction(found)])
    return Section("auxiliary", "What the auxiliary task rebuilds", lead)


def _heat_case(case: ShownCase, asked: str | None) -> GradCamCase:
    chosen = case.chosen
    other = asked or (chosen.label if chosen.label != chosen.predicted else chosen.second)
    return GradCamCase(
        chosen.kind, case.image, case.saliency, chosen.probabilities, chosen.label, chosen.predicted, other, case.mask
    )


def _one_a_class(shown: list[ShownCase]) -> list[ShownCase]:
    """Return of each class the surest right case, or if there is none the surest wrong one."""
    table = pd.DataFrame(
        {"label": [case.chosen.label for case in shown], "wrong": [case.chosen.kind != RIGHT for case in shown]}
    )
    return [
        shown[place] for place in table.sort_values("wrong", kind="stable").drop_duplicates("label").sort_index().index
    ]
