"""Sections on how far a run can be trusted: calibration, subgroups, shortcuts, missing metadata, images, data audit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dualrefnet.analysis.audit import Audit, printed_tables
from dualrefnet.analysis.image_statistics import draw_class_counts, draw_statistics, measure_images, statistics_table
from dualrefnet.analysis.missing_metadata import (
    WITH_IMAGE,
    WITHOUT_IMAGE,
    MissingMetadata,
    draw_missing_metadata,
    draw_missing_patterns,
    missing_metadata_table,
    missing_pattern_table,
)
from dualrefnet.analysis.opened_run import OpenedRun, sample_rows
from dualrefnet.analysis.out_of_distribution import (
    EVERYDAY,
    FALSE_ALARMS,
    FEW_SOURCES,
    LESIONS,
    OutOfDistributionMeasured,
    draw_out_of_distribution,
)
from dualrefnet.analysis.shortcuts import BALANCED, Shortcuts, draw_shortcuts, shortcut_sentences, shortcut_table
from dualrefnet.analysis.subgroups import (
    MINIMUM_IMAGES,
    MINIMUM_PATIENTS,
    NAMES,
    Subgroups,
    draw_subgroup_gaps,
    draw_subgroups,
)
from dualrefnet.display.figure import ReportFigure
from dualrefnet.display.format import Cell, PrintedTable, estimate, interval_of, listed, number, sentence
from dualrefnet.display.page import LEVELS, Section
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.calibration import Calibration
from dualrefnet.evaluation.curves import compute_reliability, draw_reliability
from dualrefnet.evaluation.referral import draw_referral, draw_selective, measure_selective, referral_curve
from dualrefnet.report import ReportOptions
from dualrefnet.report.performance import Measured
from dualrefnet.report.verdict import (
    WORST_FIRST,
    judge_audit,
    judge_calibration,
    judge_decisions,
    judge_out_of_distribution,
    judge_shortcuts,
    judge_subgroups,
)
from dualrefnet.runtime.calibration import malignancy

Row = Mapping[Any, Any]

ERRORS = {
    "ece": "expected calibration error",
    "adaptive_ece": "adaptive calibration error (bins of equal size)",
    "brier": "Brier score, multi-class",
    "log_loss": "log loss",
}


def calibration_section(measured: Measured, samples: int, seed: int) -> Section:
    """Return reliability diagram and calibration errors, without and with the temperature if the run has one."""

    def reliability(probabilities: Any) -> ReportFigure:
        bootstrap = Bootstrap(measured.test.groups, samples, seed)
        return draw_reliability(compute_reliability(measured.test.labels, probabilities, bootstrap), measured.unit)

    findings = judge_calibration(measured.metrics)
    if not measured.run.calibration_file.is_file():
        figure = reliability(measured.test.probabilities)
        return Section("calibration", "Calibration", [], [figure], findings=findings)
    calibration, values = measured.run.calibration, measured.metrics["calibrated"]
    low, high = calibration.temperature_interval or (None, None)
    effect = f"it {'lowers' if calibration.temperature > 1 else 'raises'} the confidence of the model"
    if low is not None and high is not None and low <= 1 <= high:
        effect = "as the interval includes 1, no change of confidence is clearly needed"
    temperature = estimate(calibration.temperature, low, high, ".2f")
    intro = [f"The temperature fitted on the validation split is {temperature}; {effect}."]
    after = reliability(calibration.probabilities(measured.test.probabilities))
    after = replace(after, title="Reliability after temperature scaling")
    return Section("calibration", "Calibration", intro, [after, _error_table(values)], findings=findings)


def _error_table(values: Row) -> PrintedTable:
    rows = []
    for key, name in ERRORS.items():
        row = [Cell(name)]
        for when in ("before", "after"):
            chance = values[when].get(f"{key}_by_chance")
            small = f"chance: to {chance[1]:.3f}" if chance else interval_of(values[when], key, ".3f")
            # Bootstrap samples bias binned errors upwards, so their interval would mislead.
            row.append(Cell(number(values[when][key]), "" if key.endswith("ece") and not chance else small))
        rows.append([*row, Cell.of(values["difference"], key, "+.3f", "+.3f")])
    notes = (
        "Lower is better. In brackets: 95% intervals, given the temperature.",
        "chance: 95th percentile of the binned error of a perfectly calibrated model on as many images.",
    )
    return PrintedTable("Calibration errors", ("measure", "before", "after", "change"), rows, notes)


def conformal_section(measured: Measured, samples: int, seed: int) -> Section:
    """Return what conformal sets, referral and selective prediction achieve on the test split."""
    calibration, values = measured.run.calibration, measured.metrics["calibrated"]
    calibrated = calibration.probabilities(measured.test.probabilities)
    bootstrap = Bootstrap(measured.test.groups, samples, seed)
    selective = measure_selective(measured.test.labels, calibrated, bootstrap, measured.classes)
    figures = [draw_selective(selective, measured.unit)]
    malignant = calibration.cancer[measured.test.labels]
    if calibration.referral is not None and 0 < malignant.sum() < len(malignant):
        threshold = (calibration.referral, calibration.sensitivity, calibration.referral_interval)
        scores = malignancy(calibrated, calibration.cancer)
        curve = referral_curve(malignant, scores, bootstrap, *threshold)
        figures.append(draw_referral(curve, measured.unit))
    table, findings = _set_table(measured, calibration, values["conformal"]), judge_decisions(measured.metrics)
    return Section("conformal", "Conformal sets and referral", [], [table, *figures], findings=findings)


def _set_table(measured: Measured, calibration: Calibration, values: Row) -> PrintedTable:
    marginal, by_class = values["marginal"], values["by_class"]
    images = {name: part["images"] for name, part in marginal["per_class"].items()}
    parts = [("all", sum(images.values()), marginal, by_class)]
    parts += [(name, count, marginal["per_class"][name], by_class["per_class"][name]) for name, count in images.items()]
    rows = []
    for name, count, *both in parts:
        cells = [cell for part in both for cell in (Cell.of(part, "coverage"), Cell(number(part["mean_size"], ".1f")))]
        rows.append([Cell(name, f"{count:,} images"), *cells])
    columns = ("true class", "coverage", "size", "coverage, class-conditional", "size, class-conditional")
    chosen = "temperature" if measured.run.recipe.training.selection == "last" else "epoch and the temperature"
    notes = [
        "Coverage is marginal: it holds over all classes together; the class-conditional sets use a threshold a class.",
        f"It is approximate: the {calibration.images:,} validation images also served to choose the {chosen}, and "
        "images of one person are not independent.",
        *map(sentence, calibration.remarks),
    ]
    if marginal["filled"]:
        notes.append(f"{marginal['filled']} empty sets were replaced by the likeliest class.")
    if "availability" in measured.metrics:
        notes.append("Inputs as recorded; predictions with missing inputs use thresholds of their own (see Metrics).")
    return PrintedTable(f"Conformal sets, target coverage {calibration.coverage:.0%}", columns, rows, tuple(notes))


OVERCONFIDENCE = "Overconfidence: mean confidence minus accuracy."
# Measures of the table of categories, and those of which gaps are drawn.
CATEGORY_MEASURES = (
    "balanced_accuracy",
    "accuracy",
    "malignant.sensitivity",
    "malignant.specificity",
    "malignant.auc",
    "overconfidence",
)
GAP_MEASURES = ("balanced_accuracy", "malignant.sensitivity", "overconfidence")


def subgroups_section(subgroups: Subgroups, unit: str = "patients") -> Section:
    table = subgroups.table
    flagged = table[table["flagged"] & table["counted"]]
    intro = [
        f"The {subgroups.images:,} test images by {listed(list(subgroups.descriptions))}; each category is compared "
        "with all others. A gap shows that results differ, not why."
    ]
    items: list[PrintedTable | ReportFigure] = [_category_table(subgroups, unit)]
    if len(flagged):
        items.append(_gap_table(flagged))
    known = {measure: table[table["measure"] == measure] for measure in subgroups.overall}
    if known["balanced_accuracy"]["value"].notna().any():
        items.append(draw_subgroups(subgroups, "balanced_accuracy", unit))
    drawn = [name for name in GAP_MEASURES if name in known and known[name]["gap"].notna().any()]
    items += [draw_subgroup_gaps(subgroups, name, unit) for name in drawn]
    return Section("subgroups", "Subgroups", intro, items, findings=judge_subgroups(subgroups))


def _category_table(subgroups: Subgroups, unit: str) -> PrintedTable:
    measures = [name for name in CATEGORY_MEASURES if name in subgroups.overall]
    found = {(row["field"], row["level"], row["measure"]): row for row in subgroups.table.to_dict("records")}
    rows = []
    measured = subgroups.levels["measured"].astype(bool)
    for level in subgroups.levels[measured].to_dict("records"):
        missing = f", no {level['missing']}" if level["missing"] else ""
        size = f"{level['images']:,} images, {level['patients']:,} {unit}{missing}"
        row = [Cell(f"{level['field']} = {level['level']}", size)]
        for measure in measures:
            one = found.get((level["field"], level["level"], measure), {})
            row.append(Cell.estimate(one.get("value"), one.get("low"), one.get("high")))
        rows.append(row)
    few: dict[str, list[str]] = {}
    for level in subgroups.levels[~measured].to_dict("records"):
        few.setdefault(level["field"], []).append(f"{level['level']} ({level['images']})")
    small = "; ".join(f"{field} {', '.join(names)}" for field, names in few.items())
    notes = (
        f"Not measured, fewer than {MINIMUM_IMAGES} images or {MINIMUM_PATIENTS} {unit} (images): {small or 'none'}.",
        f"Balanced accuracy is over the classes for which the category and the others have enough {unit}.",
        OVERCONFIDENCE,
    )
    columns = ("category", *(NAMES[name] for name in measures))
    return PrintedTable("Results by category, with 95% intervals", columns, rows, notes)


def _gap_table(flagged: pd.DataFrame) -> PrintedTable:
    rows = []
    for row in flagged.to_dict("records"):
        measure = Cell(NAMES[row["measure"]], f"of {row['classes']}" if row["classes"] else "")
        values = [Cell(number(row["value"])), Cell(number(row["others"]))]
        gap = Cell.estimate(row["gap"], row["gap_low"], row["gap_high"], "+.3f", "+.2f")
        rows.append([Cell(f"{row['field']} = {row['level']}"), measure, *values, gap])
    columns = ("category", "measure", "category", "others", "gap")
    return PrintedTable("Gaps whose interval excludes 0", columns, rows, (OVERCONFIDENCE,), left=2)


def out_of_distribution_section(measured: OutOfDistributionMeasured, unit: str = "patient") -> Section:
    rows: dict[str, Row] = {row["group"]: row for row in measured.table.to_dict("records")}
    lesions, everyday = rows[LESIONS], rows[EVERYDAY]
    intro = [
        f"The out-of-distribution score flags {_estimate(lesions, 'flagged')} of {lesions['pictures']:,} test images "
        f"(target {FALSE_ALARMS:.0%}) and {_estimate(everyday, 'flagged')} of {everyday['pictures']:,} images without "
        f"a lesion (AUROC {_estimate(everyday, 'auroc', '.3f')})."
    ]
    table = [
        [
            Cell(row["group"]),
            Cell(f"{row['pictures']:,}", f"of {row['sources']}"),
            Cell.estimate(row["auroc"], row["auroc_low"], row["auroc_high"], ".3f", ".3f"),
            Cell.estimate(row["flagged"], row["flagged_low"], row["flagged_high"], ".1%", ".1%"),
        ]
        for row in measured.table.to_dict("records")
    ]
    notes = (
        f"Second line of the images: their {unit}s, files or drawing programs. In brackets: 95% intervals from "
        f"{measured.samples:,} resamples of these; none for fewer than {FEW_SOURCES}. Wilson's where all or none are "
        "flagged.",
        f"Fitted on {measured.training:,} training images, limit from {measured.validation:,} validation images, seed "
        f"{measured.seed}. The score was chosen with other images without a lesion.",
        "An image without a warning need not show a lesion, and lesions of unknown classes may not be flagged.",
    )
    columns = ("group", "images", "AUROC", "flagged")
    found = PrintedTable("Flagged images", columns, table, notes)
    findings = judge_out_of_distribution(measured)
    items = (found, draw_out_of_distribution(measured))
    return Section("out-of-distribution", "Out-of-distribution", intro, items, findings=findings)


def _estimate(row: Row, name: str = "value", form: str = ".1%") -> str:
    low, high = (row[end if name == "value" else f"{name}_{end}"] for end in ("low", "high"))
    return estimate(row[name], low, high, form)


def shortcuts_section(shortcuts: Shortcuts) -> Section:
    """Return what the score depends on, by probes with parts of the input removed or permuted across patients."""
    table, figure = shortcut_table(shortcuts), draw_shortcuts(shortcuts)
    sentences, findings = shortcut_sentences(shortcuts), judge_shortcuts(shortcuts)
    return Section("shortcuts", "Shortcut probes", sentences, [table, figure], findings=findings)


def missing_metadata_section(availability: MissingMetadata) -> Section:
    table = availability.curve[availability.curve["measure"] == BALANCED]
    least = table["share"].min()
    kept = "no metadata" if least == 0 else f"{least:.0%} of the fields"
    parts = []
    for name in (WITH_IMAGE, WITHOUT_IMAGE):
        rows = {row["share"]: row for row in table[table["photograph"] == name].to_dict("records")}
        if rows:
            full, fewest = _estimate(rows[1.0], form=".2f"), _estimate(rows[least], form=".2f")
            parts.append(f"{name} {full} with all metadata, {fewest} with {kept}")
    intro = [
        f"Balanced accuracy {'; '.join(parts)} (chance: {availability.chance:.2f}).",
        "The curve removes single fields at random; the patterns remove fields that are missing together in training, "
        "where missingness itself may reveal the class.",
    ]
    figures = [draw_missing_metadata([availability]), draw_missing_patterns([availability])]
    tables = [missing_pattern_table(availability), missing_metadata_table(availability)]
    return Section("missing-metadata", "Missing metadata", intro, [*tables, *figures])


# What is checked -> the ids of its findings, in the order of the table.
CHECKS = (
    ("No patient crosses the split", ("patients_on_two_sides",)),
    ("No lesion crosses the split", ("lesions_on_two_sides",)),
    ("No near-duplicate crosses the split", ("near_duplicates",)),
    ("Every image has one label", ("near_duplicates_other", "identical_other_label", "identical_same_label")),
    ("Missingness does not reveal the class", ("missing_block", "missing_mask")),
    ("No single column reveals the class", ("proxy",)),
    ("Metadata do not identify the patient", ("nearest_form", "reidentification", "form_alone")),
)
# The findings say what the other tables of an audit hold.
AUDIT_TABLES = ("missing_models", "proxies", "form_alone")


def images_section(opened: OpenedRun, options: ReportOptions) -> Section:
    """Return the classes of each part of the split, and what preprocessing does to brightness and colour cast."""
    table = opened.dataset.with_image
    table = table[table["image_id"].isin(opened.split["image_id"])].reset_index(drop=True)
    items: list[PrintedTable | ReportFigure] = [draw_class_counts(opened.split, opened.classes)]
    intro = ["Images of each class in the run's own split, and their brightness and colour cast."]
    if len(table):
        labels = pd.Categorical(table["label"], categories=opened.classes).codes.astype(np.int64)
        chosen = table.iloc[sample_rows(labels, options.images, options.seed)]
        measured = measure_images(chosen, opened.recipe.image)
        items += [draw_statistics(measured, opened.classes), statistics_table(measured, opened.classes)]
        if len(chosen) < len(table):
            intro.append(
                f"Measured on {len(chosen):,} of {len(table):,} images, each class in proportion, seed {options.seed}."
            )
    return Section("images", "Images", intro, items)


def audit_section(audit: Audit) -> Section:
    """Return the verdicts of a data audit, and the tables of missingness, label-leaking columns and metadata alone."""
    counts = {level: sum(finding.level == level for finding in audit.findings) for level in WORST_FIRST}
    intro = [
        f"The {sum(audit.images.values()):,} images of {audit.dataset} (train {audit.images['train']:,}, validation "
        f"{audit.images['val']:,}, test {audit.images['test']:,}) were checked for data leakage: of "
        f"{len(audit.findings)} findings, {counts['FAIL']} invalidate the results and {counts['WARN']} are warnings."
    ]
    rows = []
    for check, ids in CHECKS:
        findings = [finding for finding in audit.findings if finding.check in ids]
        worst = next((level for level in WORST_FIRST if any(finding.level == level for finding in findings)), None)
        if worst is not None:
            messages = dict.fromkeys(finding.message for finding in findings if finding.level == worst)
            verdict = Cell(LEVELS[worst], bold=worst != "PASS")
            rows.append([Cell(check), verdict, Cell(" ".join(map(sentence, messages)))])
    compared = [sentence(finding.message) for finding in audit.findings if finding.check == "images_compared"]
    notes = tuple(compared or ["Images were not compared with each other."])
    verdicts = PrintedTable("Checks", ("check", "verdict", "finding"), rows, notes, left=3)
    printed = printed_tables(audit)
    tables = [printed[name] for name in AUDIT_TABLES if name in printed]
    return Section("audit", "Data audit", intro, [verdicts, *tables], findings=judge_audit(audit))
