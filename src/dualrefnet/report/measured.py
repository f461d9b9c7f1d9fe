"""The sections of a run's page that its predictions and its history fill: no model and no photograph is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.evaluation.curves import class_curves
from dualrefnet.evaluation.intervals import interval_suffix
from dualrefnet.evaluation.printed_table import Cell, PrintedTable
from dualrefnet.evaluation.reliability import compute_reliability
from dualrefnet.evaluation.tables import (
    AVAILABILITY_COLUMNS,
    CLASS_COLUMNS,
    MEASURE_NAMES,
    availability_line,
    availability_notes,
    availability_rows,
)
from dualrefnet.figures.confusion import draw_confusion
from dualrefnet.figures.curves import draw_precision_recall, draw_reliability, draw_roc
from dualrefnet.figures.history import draw_history, selected_epoch
from dualrefnet.figures.picture import Picture
from dualrefnet.figures.reconstruction import draw_reconstruction_history
from dualrefnet.progress import progress_bar
from dualrefnet.report.section import Section
from dualrefnet.run import Run
from dualrefnet.runtime.availability import missingness_shortcut
from dualrefnet.suite.paper import caveats, reported, reported_class

HEADLINE = (
    "balanced_accuracy", "accuracy", "auc_macro_ovr", "f1_macro", "kappa", "malignant_sensitivity", "malignant_specificity",
    "malignant_auc", "ece", "brier",
)  # fmt: skip
CLASS_MEASURES = ("sensitivity", "specificity", "ppv", "npv")
# Table 2 and Table 3 of the paper.
PAPER_TABLES = {"pad_ufes_20": ("3a", "2a"), "isic_2019": ("3b", "2b")}
# A class with fewer test images is pointed out.
FEW_IMAGES = 20


@dataclass(frozen=True)
class Measured:
    """A run's test side, read from its folder.

    Attributes:
        run: the folder.
        metrics: content of metrics.json.
        classes: labels in the order of the outputs.
        malignant: those that are cancer.
        names: label -> what it stands for; empty if the data set doesn't say.
        labels: (N,) of the test images.
        probabilities: (N, C).
        groups: (N,) patients (lesions of ISIC-2019).
        group: what a group is called.
    """

    run: Run
    metrics: dict[str, Any]
    classes: tuple[str, ...]
    malignant: tuple[str, ...]
    names: dict[str, str]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    groups: NDArray[np.object_]
    group: str


def read_measured(run: Run) -> Measured:
    """Read a finished run.

    Raises:
        RunError: it isn't finished.
    """
    metrics, description, predictions = run.metrics, run.model, run.predictions
    classes = tuple(description["classes"])
    test = predictions[predictions["split"] == "test"].reset_index(drop=True)
    position = {name: index for index, name in enumerate(classes)}
    groups = run.split.set_index("image_id")["patient_id"].loc[test["image_id"]].to_numpy(dtype=object)
    return Measured(
        run, metrics, classes, tuple(description["malignant"]), description["dataset"].get("class_names", {}),
        test["label"].map(position).to_numpy(dtype=np.int64), test[[f"prob_{name}" for name in classes]].to_numpy(dtype=float), groups,
        "lesion" if run.recipe.data.dataset == "isic_2019" else "patient",
    )  # fmt: skip


def glance_section(measured: Measured) -> Section:
    """Return what a reader with one minute must know."""
    metrics, matrix = measured.metrics, np.array(measured.metrics["confusion_matrix"])
    total, right = int(matrix.sum()), int(np.trace(matrix))
    lead = [
        f"On {total:,} test photographs of {len(set(measured.groups)):,} {measured.group}s the likeliest class was the right one "
        f"{right:,} times: {_percent(metrics, 'accuracy')}. Counting every class alike, however rare, it is "
        f"{_percent(metrics, 'balanced_accuracy')} (balanced accuracy; guessing gives {1 / len(measured.classes):.0%})."
    ]
    cancer = np.isin(measured.classes, measured.malignant)
    if "malignant" in metrics and 0 < cancer.sum() < len(cancer):
        found, ill = int(matrix[cancer][:, cancer].sum()), int(matrix[cancer].sum())
        cleared, well = int(matrix[~cancer][:, ~cancer].sum()), int(matrix[~cancer].sum())
        lead.append(
            f"Of {ill:,} photographs of cancers ({', '.join(measured.malignant)}) {found:,} were given a class that is a cancer, if not "
            f"always the right one: {_percent(metrics['malignant'], 'sensitivity')}. Of {well:,} of benign lesions {cleared:,} were given "
            f"a benign class: {_percent(metrics['malignant'], 'specificity')}."
        )
    tables: list[PrintedTable | Picture] = [_headline_table(measured)]
    if "availability" in metrics:
        lead.append(availability_line(metrics["availability"]).capitalize() + ".")
        reason = missingness_shortcut(metrics)
        if reason is not None:
            lead.append(f"NOT TO BE USED WHERE METADATA MAY BE MISSING: {reason}.")
        if len(metrics["availability"]["inputs"]) > 1:
            tables.append(_availability_table(metrics["availability"]))
    lead.append(f"In brackets stands the 95% interval: had other {measured.group}s come, the number would likely lie in it.")
    return Section("glance", "At a glance", lead, tables)


def class_section(measured: Measured, samples: int, seed: int) -> Section:
    """Return the class-wise table, the confusion matrices and the curves."""
    metrics, unit = measured.metrics, f"{measured.group}s"
    with progress_bar("curves") as show:
        curves = class_curves(
            measured.labels, measured.probabilities, measured.groups, measured.classes, samples=samples, seed=seed, progress=show,
            malignant=measured.malignant,
        )  # fmt: skip
    lead = [
        "Sensitivity: of the photographs of a class, the share that is given it. Specificity: of all others, the share that isn't. PPV: "
        "of the photographs that are given the class, the share that has it. NPV: of those that aren't, the share that hasn't. PPV and "
        "NPV hold for test sets with as many cases of each class as this one."
    ]
    tables = [_class_table(measured), *_paper_class_table(measured)]
    pictures = [draw_confusion(metrics, shares, measured.malignant, unit) for shares in (False, True)]
    return Section("classes", "Class by class", lead, [*tables, *pictures, draw_roc(curves, unit), draw_precision_recall(curves, unit)])


def probability_section(measured: Measured, samples: int, seed: int) -> Section:
    """Return the reliability diagram."""
    lead = [
        "A probability of 80% should come true in 80 of 100 cases. The diagram compares the probability of the likeliest class with how "
        f"often it was right; the expected calibration error, the mean distance between the two, is {measured.metrics['ece']:.2f}."
    ]
    reliability = compute_reliability(measured.labels, measured.probabilities, measured.groups, samples=samples, seed=seed)
    picture = draw_reliability(reliability, f"{measured.group}s")
    return Section("probabilities", "Can the probabilities be believed?", lead, [picture])


def training_section(measured: Measured) -> Section:
    """Return the history of the training."""
    history, recipe = measured.run.history, measured.run.recipe
    epoch = selected_epoch(history, recipe.training.selection)
    criterion = {"loss": "lowest loss"}.get(recipe.training.selection, f"highest {recipe.training.selection.replace('_', ' ')}")
    kept = f"epoch {epoch}, the one with the {criterion} on the validation images"
    if recipe.training.selection == "last":
        kept = "the last one, so that the validation images served calibration alone"
    lead = [f"{len(history)} epochs; kept is {kept}. The test images had no part in any choice."]
    pictures = [draw_history(history, epoch)]
    if "val_psnr" in history.columns:
        pictures.append(draw_reconstruction_history(history))
    return Section("training", "How it was trained", lead, list(pictures))


def _headline_table(measured: Measured) -> PrintedTable:
    metrics, recipe = measured.metrics, measured.run.recipe
    ours, ours_paper = _flat(metrics), {}
    table = PAPER_TABLES.get(recipe.data.dataset, ("", ""))[0] if recipe.data.protocol == "paper" else ""
    for measure in HEADLINE:
        found = reported(recipe.data.dataset, table, recipe.model.method, recipe.model.backbone, measure) if table else None
        if found is not None and found.comparable(measure):
            ours_paper[measure] = found.value
    rows = []
    for measure in HEADLINE:
        if measure in ours:
            value, bounds = ours[measure]
            row = [Cell(MEASURE_NAMES[measure]), Cell(_number(value), _interval(bounds))]
            rows.append([*row, Cell(_number(ours_paper.get(measure)))] if ours_paper else row)
    columns = ("measure", "this run", "the paper") if ours_paper else ("measure", "this run")
    notes = ["Of the last two, calibration error and Brier score, less is better."]
    notes += caveats(recipe.data.dataset, table, {recipe.model.method}) if ours_paper else []
    return PrintedTable("Measures on the test set", columns, rows, tuple(notes))


def _availability_table(measured: Mapping[str, Any]) -> PrintedTable:
    rows = [[Cell(name), *(Cell(*cell) for cell in cells)] for name, cells in availability_rows(measured)]
    notes = (
        "The same test images. Sets and referral use the thresholds that were fitted on validation for what is given.",
        "In the lines by share of fields, the fields that are left were drawn without regard to the class; a case with too few recorded "
        "fields isn't among them.",
        *availability_notes(measured),
    )
    return PrintedTable("With less than was recorded", AVAILABILITY_COLUMNS, rows, notes)


def _class_table(measured: Measured) -> PrintedTable:
    rows = []
    suffix = interval_suffix(0.95)
    for name, values in measured.metrics["per_class"].items():
        cells = [Cell(_number(values[measure]), _interval(values.get(measure + suffix))) for measure in CLASS_MEASURES]
        images = f"{values['support']:,} image{'s' if values['support'] != 1 else ''}"
        rows.append([Cell(name, ", ".join(part for part in (measured.names.get(name), images) if part)), *cells])
    columns = ("class", *(CLASS_COLUMNS[measure] for measure in CLASS_MEASURES))
    few = [name for name, values in measured.metrics["per_class"].items() if values["support"] < FEW_IMAGES]
    notes = (f"Fewer than {FEW_IMAGES} images: {', '.join(few)}. One image more or less changes their numbers much.",) if few else ()
    return PrintedTable("Each class versus the rest, with 95% intervals", columns, rows, notes)


def _paper_class_table(measured: Measured) -> list[PrintedTable]:
    """Return Table 2 beside this run's values, if the run follows the paper's protocol and the paper has it."""
    recipe = measured.run.recipe
    if recipe.data.protocol != "paper":
        return []
    rows, found = [], False
    for name, values in measured.metrics["per_class"].items():
        row = [Cell(name)]
        for measure in CLASS_MEASURES:
            paper = reported_class(recipe.data.dataset, recipe.model.method, recipe.model.backbone, name, measure)
            found = found or paper is not None
            row.append(Cell(_number(values[measure]), f"paper {_number(paper)}"))
        rows.append(row)
    if not found:
        return []
    notes = caveats(recipe.data.dataset, PAPER_TABLES[recipe.data.dataset][1], {recipe.model.method})
    columns = ("class", *(CLASS_COLUMNS[measure] for measure in CLASS_MEASURES))
    return [PrintedTable("Beside the paper's Table 2", columns, rows, tuple(notes))]


def _flat(metrics: Mapping[str, Any]) -> dict[str, tuple[float | None, list[float] | None]]:
    """Return every headline measure with its interval; malignant versus benign as `malignant_auc` and so on."""
    suffix = interval_suffix(0.95)
    parts = [("", metrics), ("malignant_", metrics.get("malignant", {}))]
    return {
        prefix + key: (value, values.get(key + suffix))
        for prefix, values in parts
        for key, value in values.items()
        if prefix + key in HEADLINE
    }


def _percent(values: Mapping[str, Any], measure: str) -> str:
    value, bounds = values[measure], values.get(measure + interval_suffix(0.95))
    if value is None:
        return "undefined"
    return f"{value:.0%}" + (f" [{bounds[0]:.0%} to {bounds[1]:.0%}]" if bounds else "")


def _number(value: float | None) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:.3f}"


def _interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"
