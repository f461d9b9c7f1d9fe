"""Sections that explain a model: gallery, Grad-CAM, SHAP, t-SNE, super-resolution, comparison with a second run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from dualrefnet.analysis.cases import ChosenCase, ShownCase, choose_cases, draw_gallery, show_cases
from dualrefnet.analysis.disagreement import find_disagreement
from dualrefnet.analysis.embedding import compare_embeddings, draw_embedding, draw_separation, embed, separation_table
from dualrefnet.analysis.gradcam import (
    ALL_IMAGES,
    FEWEST_PLACES,
    draw_gradcam,
    draw_localisation,
    localise,
    map_sides,
    too_coarse,
)
from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.reconstruction import draw_reconstruction, reconstruct
from dualrefnet.analysis.shap import (
    MISSING_FLAGS,
    MetadataShap,
    describe_shap,
    draw_beeswarm,
    draw_importance,
    draw_waterfall,
    explain_metadata,
)
from dualrefnet.display.figure import ReportFigure
from dualrefnet.display.format import PrintedTable, class_difference_table, estimate, listed
from dualrefnet.display.page import Section
from dualrefnet.errors import DataError
from dualrefnet.progress import note
from dualrefnet.report import ReportOptions
from dualrefnet.report.provenance import run_names
from dualrefnet.report.suite_report import case_figures, read_images
from dualrefnet.report.verdict import judge_flags, judge_localisation

# Metadata values beside an image of the gallery, cases of each kind of disagreement, and bootstrap samples.
GALLERY_VALUES, CASES, SAMPLES = 3, 3, 1000


class Explanations:
    """The sections about a model; what several of them show is computed once."""

    def __init__(self, opened: OpenedRun, options: ReportOptions) -> None:
        if options.label is not None and options.label not in opened.classes:
            raise DataError(f"there is no class {options.label}; the classes are {', '.join(opened.classes)}")
        fewest = min(options.images, options.shap_images)
        if fewest < len(opened.classes):
            raise DataError(f"{fewest} images are too few for {len(opened.classes)} classes; request more")
        self.opened, self.options = opened, options
        self.masks = opened.masks(options.masks) if opened.model.reads_image else {}

    @cached_property
    def cases(self) -> list[ChosenCase]:
        opened, test = self.opened, self.opened.run.predictions.query("split == 'test'")
        return choose_cases(test, opened.groups.loc[test["image_id"]], opened.classes, self.options.each)

    @cached_property
    def gallery_shap(self) -> MetadataShap | None:
        if not self.opened.reads_metadata or not self.options.photographs:
            return None
        image_ids = [case.image_id for case in self.cases]
        return explain_metadata(self.opened, image_ids=image_ids, seed=self.options.seed)

    @cached_property
    def shown(self) -> list[ShownCase]:
        """The cases of the gallery with their Grad-CAM; none without images of patients."""
        if not self.options.photographs:
            return []
        values = {}
        if self.gallery_shap is not None:
            for row, (image_id, case) in enumerate(zip(self.gallery_shap.image_ids, self.cases, strict=True)):
                values[image_id] = self.gallery_shap.top_groups(row, case.predicted, GALLERY_VALUES)
        return show_cases(self.opened, self.cases, self.options.label, values, self.masks)

    def gallery(self) -> Section:
        schema = self.opened.dataset.schema
        by_class = {label: [case for case in self.shown if case.chosen.label == label] for label in self.opened.classes}
        figures = [
            draw_gallery(cases, label, schema.class_names.get(label, ""), schema.unit)
            for label, cases in by_class.items()
            if cases
        ]
        beside = [] if too_coarse(self.opened) else ["Grad-CAM of the predicted class"]
        beside.append("the highest probabilities")
        if any(case.attributions for case in self.shown):
            beside.append("the metadata with the largest SHAP values, in percentage points")
        intro = [
            "The most confident correct and incorrect predictions of each class, selected by probability only. "
            f"Beside each image: {listed(beside)}."
        ]
        return Section("gallery", "Gallery", intro, figures)

    def gradcam(self) -> Section:
        opened, options = self.opened, self.options
        intro = ["Grad-CAM shows which regions of the image are evidence for a class, given the metadata of the case."]
        if too_coarse(opened):
            places = " and ".join(dict.fromkeys(f"{side} x {side}" for side in map_sides(opened)))
            intro.append(
                f"At {opened.recipe.image.size} px the map has {places} places, too coarse to show where the model "
                f"looks. Train with a larger image.size for at least {FEWEST_PLACES} x {FEWEST_PLACES}."
            )
            return Section("gradcam", "Grad-CAM", intro)
        figures: list[ReportFigure] = []
        # Of each class the most confident correct case, which comes first, or else the most confident incorrect one.
        first: dict[str, ShownCase] = {}
        for case in self.shown:
            first.setdefault(case.chosen.label, case)
        if first:
            other = "the true class, or the second likeliest if the prediction is correct"
            other = f"class {options.label}" if options.label else other
            choice = f"The most confident case of each class, correct if there is one; the last column is {other}."
            figures.append(draw_gradcam(list(first.values()), choice, options.label, len(opened.model.encoders)))
        if not self.masks:
            intro.append("Without lesion masks (--masks) the saliency inside the lesion is not measured.")
            return Section("gradcam", "Grad-CAM", intro, figures)
        found = localise(opened, options.masks, options.images, SAMPLES, options.seed)
        figures.append(draw_localisation(found))
        summary = found.summary
        row = summary[(summary["class"] == ALL_IMAGES) & (summary["measure"] == "energy")].iloc[0]
        return Section("gradcam", "Grad-CAM", intro, figures, findings=judge_localisation(row.to_dict()))

    def shap(self) -> Section:
        opened, options, gallery = self.opened, self.options, self.gallery_shap
        results = [
            explain_metadata(opened, images=options.shap_images, by=by, seed=options.seed) for by in ("field", "column")
        ]
        figures = [draw_importance(result) for result in results]
        if gallery is not None:
            # The first malignant case, or the first if no class is malignant.
            malignant = [opened.classes[label] in opened.dataset.schema.malignant for label in gallery.labels]
            case = malignant.index(True) if any(malignant) else 0
            predicted = opened.classes[int(gallery.prediction[case].argmax())]
            figures.append(draw_waterfall(gallery, gallery.image_ids[case], predicted))
        figures += [
            draw_beeswarm(results[0], label) for label in ([options.label] if options.label else opened.classes)
        ]
        intro = [
            "SHAP values: how much each metadata field changes the probability of a class while the image stays the "
            "same, in percentage points. They show what the model uses, not what causes a disease.",
            *describe_shap(results),
        ]
        findings = judge_flags(results[0].importance, MISSING_FLAGS)
        return Section("shap", "SHAP", intro, figures, findings=findings)

    def tsne(self) -> Section:
        found = embed(self.opened, self.options.images, SAMPLES, self.options.seed)
        intro = [
            "t-SNE of the fused features, the input of the classification layers, and of the hidden activations that "
            "the last one reads. The scores are measured on these vectors, as distances in the figure are distorted."
        ]
        return Section("tsne", "t-SNE", intro, [draw_embedding(found)])

    def superresolution(self) -> Section:
        found = reconstruct(self.opened, min(self.options.images, 200), seed=self.options.seed)
        psnr, flat = found.table["psnr"].mean(), found.table["psnr_flat"].mean()
        intro = [
            "In training a decoder reconstructs the image at twice its resolution from the encoder's last feature map; "
            f"predictions don't use it. Its PSNR, {psnr:.1f} dB, is {'better' if psnr > flat else 'no better'} than "
            f"that of the mean colour, {flat:.1f} dB."
        ]
        figures = [draw_reconstruction(found)] if self.options.photographs else []
        return Section("super-resolution", "Super-resolution", intro, figures)


def explanation_parts(opened: OpenedRun, options: ReportOptions) -> list[tuple[str, Callable[[], Section]]]:
    """Return the sections to make; invalid options are refused at once."""
    found, parts = Explanations(opened, options), []
    if not opened.model.reads_image:
        note("this method reads no image: no Grad-CAM, no gallery")
    elif options.photographs:
        parts += [("Gallery", found.gallery), ("Grad-CAM", found.gradcam)]
    else:
        parts += [("Grad-CAM", found.gradcam)]
    if opened.reads_metadata:
        parts.append(("SHAP", found.shap))
    else:
        note("this method reads no metadata: no SHAP")
    parts.append(("t-SNE", found.tsne))
    if opened.recipe.rebuilds_image:
        parts.append(("Super-resolution", found.superresolution))
    return parts


def comparison_section(first: OpenedRun, second: OpenedRun, options: ReportOptions) -> Section:
    """Compare two runs on the test images they share: accuracy, disagreement, separation of the classes."""
    names = run_names(first.run, second.run)
    found = find_disagreement(first.run, second.run, CASES, SAMPLES, options.seed)
    comparison = compare_embeddings(first, second, names, options.images, SAMPLES, options.seed)
    figures: list[ReportFigure] = [draw_embedding(comparison.first, comparison.second), draw_separation(comparison)]
    if options.photographs and first.model.reads_image and len(found.chosen):
        images = read_images(first.run, found.chosen["image_id"].tolist(), options)
        figures += case_figures((first.run, second.run), found, images, names)
    low, high = found.difference.low, found.difference.high
    verdict = f"{names[0] if low > 0 else names[1]} is better on these data"
    if low <= 0 <= high:
        verdict = "no significant difference"
    alone = found.only_a + found.only_b
    left_out = f" ({alone:,} images tested by only one of them are left out)" if alone else ""
    difference = estimate(found.difference.value, low, high, "+.3f")
    intro = [
        f"On the {len(found.table):,} test images that both share{left_out}, the balanced accuracy is "
        f"{found.balanced_accuracy_a:.3f} for {names[0]}, {found.balanced_accuracy_b:.3f} for {names[1]}; difference "
        f"{difference}, p = {found.difference.p:.3f}: {verdict}."
    ]
    title = f"By class: {names[0]} and {names[1]}"
    table = class_difference_table(found.per_class, names, title, len(first.classes))
    items: list[PrintedTable | ReportFigure] = [table, *figures, separation_table(comparison)]
    return Section("comparison", f"Comparison with {names[1]}", intro, items)
