"""The section on trust: what the probabilities are worth once they are calibrated."""

# also: The section on subgroups: do results hold for everyone?
# also: The section on pictures that aren't like those of the training.
# also: The sections of a run's page that say what its score leans on, and what is left of it when inputs are missing.
# also: The section of a page that says whether the data and their split can be trusted.

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dualrefnet.analysis.audit import Audit, printed_tables
from dualrefnet.analysis.availability import (
    WITH_IMAGE,
    WITHOUT_IMAGE,
    MissingMetadata,
    draw_missing_metadata,
    draw_missing_patterns,
)
from dualrefnet.analysis.out_of_distribution import (
    CLOSE_LESION,
    EVERYDAY,
    FALSE_ALARMS,
    FEW_SOURCES,
    LESIONS,
    SKIN,
    OutOfScopeMeasured,
    draw_out_of_scope,
)
from dualrefnet.analysis.shortcuts import (
    BALANCED,
    Shortcuts,
    draw_shortcuts,
    missing_metadata_table,
    missing_pattern_table,
    shortcut_sentences,
    shortcut_table,
)
from dualrefnet.analysis.subgroups import (
    MINIMUM_IMAGES,
    MINIMUM_PATIENTS,
    NAMES,
    NOT_RECORDED,
    Subgroups,
    draw_subgroup_gaps,
    draw_subgroups,
)
from dualrefnet.display.figure import ReportFigure
from dualrefnet.display.format import CI, Cell, PrintedTable, bounds_of, number, pair, percent, signed
from dualrefnet.display.page import Section
from dualrefnet.evaluation.calibration import Calibration
from dualrefnet.evaluation.curves import compute_reliability, draw_reliability
from dualrefnet.evaluation.referral import draw_referral, draw_selective, measure_selective, referral_curve
from dualrefnet.report.performance import Measured
from dualrefnet.runtime.calibration import malignancy

_ERRORS = {
    "ece": "expected calibration error",
    "adaptive_ece": "the same, bins of equal size",
    "brier": "Brier score, multi-class",
    "log_loss": "log loss",
}


def calibrated_section(measured: Measured, samples: int = 500, seed: int = 0) -> Section:
    """Return what temperature, sets of classes, referral and silence are worth on the test side; no data set is needed.

    Args:
        measured: a run, evaluated since calibration was measured.
        samples: bootstrap samples of the bands in the pictures.
        seed: of their draw.

    Raises:
        RunError: the run is older than `calibration.json`.
    """
    calibration, unit = measured.run.calibration, f"{measured.group}s"
    values = measured.metrics["calibrated"]
    lead = [
        _temperature(calibration, values),
        *_sets(calibration, values["conformal"], unit, measured.run.recipe.training.selection),
    ]
    lead += [_referral(calibration, values["referral"], unit), _silence(values["selective"])]
    lead += [f"{remark[0].upper()}{remark[1:]}." for remark in calibration.remarks if "in every set" not in remark]
    warmed = calibration.probabilities(measured.probabilities)
    reliability = compute_reliability(measured.labels, warmed, measured.groups, samples=samples, seed=seed)
    after = replace(
        draw_reliability(reliability, unit), name="reliability_calibrated", title="Reliability at the temperature"
    )
    selective = measure_selective(
        measured.labels, warmed, measured.groups, measured.classes, samples=samples, seed=seed
    )
    pictures: list[PrintedTable | ReportFigure] = [after, draw_selective(selective, unit)]
    ill = calibration.cancer[measured.labels]
    if calibration.referral is not None and 0 < ill.sum() < len(ill):
        curve = referral_curve(
            ill,
            malignancy(warmed, calibration.cancer),
            measured.groups,
            calibration.referral,
            calibration.sensitivity,
            calibration.referral_interval,
            samples,
            seed,
        )
        pictures.append(draw_referral(curve, unit))
    tables = [_error_table(values), _set_table(calibration, values["conformal"]), _silence_table(values["selective"])]
    availability = measured.metrics.get("availability")
    if availability is not None:
        lead.append(
            "All this is of inputs as they were recorded. An answer uses the temperature, the set and the referral threshold that were "
            "fitted for what is given; the summary says what each is worth."
        )
    return Section("calibrated", "Probabilities that mean something", lead, [*tables, *pictures])


def _temperature(calibration: Calibration, values: Mapping[str, Any]) -> str:
    bounds = calibration.temperature_interval
    text = f"The validation images ask for a temperature of {calibration.temperature:.2f}"
    text += f" [{bounds[0]:.2f} to {bounds[1]:.2f}]" if bounds else ""
    if bounds and bounds[0] <= 1 <= bounds[1]:
        text += "; above 1 it lowers the model's confidence, and as 1 lies in the interval, it isn't clear that any change is needed"
    elif calibration.temperature > 1:
        text += ": the model was too sure of itself, and its confidence is lowered"
    else:
        text += ": the model was less sure than it could be, and its confidence is raised"
    before, after = values["before"]["ece"], values["after"]["ece"]
    text += f". On the test images the expected calibration error is {before:.3f} without and {after:.3f} with it"
    chance = values["after"].get("ece_by_chance")
    if chance:
        text += f"; by chance alone it would be {chance[0]:.3f} on average and below {chance[1]:.3f} in 95 of 100 cases if every "
        text += "probability were true, so that " + (
            "no miscalibration shows" if after <= chance[1] else "they aren't all true"
        )
    return f"{text}."


def _sets(calibration: Calibration, values: Mapping[str, Any], unit: str, selection: str) -> list[str]:
    one, each, promised = values["marginal"], values["by_class"], calibration.coverage
    text = (
        f"Instead of one class the model can name a set that shall hold the right one for {promised:.0%} of the images. On the test "
        f"images it does for {percent(one, 'coverage')}{_kept(one['promise'], promised)}. A set has {one['mean_size']:.1f} classes on "
        f"average, and {percent(one, 'singletons')} of the sets name a single one."
    )
    text += f" {one['filled']} sets would have been empty and hold the likeliest class." if one["filled"] else ""
    known = {name: share for name, share in one["per_class"].items() if share["coverage"] is not None}
    worst = min(known, key=lambda name: float(known[name]["coverage"]))
    text += f" The promise is for all classes together, not for each: least often it holds {worst}, {percent(known[worst], 'coverage')}."
    second = (
        f"With a threshold for each class the sets hold the right class for {percent(each, 'coverage')}{_kept(each['promise'], promised)} "
        f"and have {each['mean_size']:.1f} classes on average."
    )
    always = [name for name, threshold in calibration.class_thresholds.items() if threshold == 0]
    if always:
        images = ", ".join(f"{name} ({calibration.per_class[name]})" for name in always)
        second += f" In all of them is {images}: so few validation images (in brackets) can't promise {promised:.0%} within the class."
    chose = "the" if selection == "last" else "the epoch and the"
    third = (
        f"The promise is approximate: the {calibration.images:,} validation images from which it comes also chose {chose} "
        f"temperature, and it takes images for independent, which several photographs of one {unit.removesuffix('s')} aren't. It holds "
        f"for {unit} like these only."
    )
    return [text, second, third]


def _kept(promise: str | None, promised: float) -> str:
    where = {
        "within": "lies in the interval",
        "missed": "lies above the interval: the promise isn't kept",
        "exceeded": "lies below it",
    }
    return "" if promise is None else f" ({promised:.0%} {where[promise]})"


def _referral(calibration: Calibration, values: Mapping[str, Any] | None, unit: str) -> str:
    if values is None:
        return "There is no threshold of referral: the data set names no malignant class, or no validation image shows one."
    bounds = calibration.referral_interval
    where = f" [{bounds[0]:.2f} to {bounds[1]:.2f}, had other validation {unit} come]" if bounds else ""
    text = (
        f"Referral: an image is referred to a dermatologist if its malignancy score is at least {calibration.referral:.2f}{where}, the "
        f"largest threshold that finds {values['wanted']:.0%} of the validation side's cancers."
    )
    if values["malignant"] == 0:
        return f"{text} No test image shows a cancer, so it can't be said what it finds; {percent(values, 'referred')} are referred."
    text += (
        f" Of {values['malignant']:,} test images of cancers it refers {percent(values, 'sensitivity')} and misses {values['missed']:,}; "
        f"of {values['benign']:,} benign ones it spares {percent(values, 'specificity')}. In all, {percent(values, 'referred')} are "
        "referred."
    )
    if values["reached"]:
        return f"{text} The {values['wanted']:.0%} is reached on the test images."
    inside = values.get(f"sensitivity{CI}", [1, 0])
    chance = ", though it lies in the interval" if inside[0] <= values["wanted"] <= inside[1] else ""
    return (
        f"{text} The {values['wanted']:.0%} isn't reached on the test images{chance}: a threshold chosen so falls short on other {unit} "
        "about as often as not."
    )


def _silence(values: Mapping[str, Any]) -> str:
    rows = {row["percent"]: row for row in values["table"]}
    words = [
        f"{percent(rows[share], 'accuracy')} of the answers are right at {share}% answered" for share in (100, 80, 50)
    ]
    return f"If the model may keep silent where it is least sure: {'; '.join(words)}. Which share it would answer elsewhere isn't known."


def _error_table(values: Mapping[str, Any]) -> PrintedTable:
    rows = []
    for key, name in _ERRORS.items():
        row = [Cell(name)]
        for side in ("before", "after"):
            chance = values[side].get(f"{key}_by_chance")
            small = f"chance: to {chance[1]:.3f}" if chance else bounds_of(values[side], key, ".3f")
            # The resampled errors over bins lie too high for an interval that a reader could use.
            row.append(Cell(f"{values[side][key]:.3f}", "" if key.endswith("ece") and not chance else small))
        row.append(Cell(signed(values["difference"][key]), bounds_of(values["difference"], key, "+.3f")))
        rows.append(row)
    notes = (
        "Of all four, less is better. In brackets: 95% intervals, given the temperature.",
        "chance: how high the error over bins may be (95 of 100 cases) on so many images although every probability is true.",
    )
    return PrintedTable(
        "Probabilities without and with the temperature", ("measure", "without", "with", "change"), rows, notes
    )


def _set_table(calibration: Calibration, values: Mapping[str, Any]) -> PrintedTable:
    def cells(name: str, images: int, parts: list[Mapping[str, Any]]) -> list[Cell]:
        row = [Cell(name, f"{images:,} images")]
        for part in parts:
            row.append(Cell(number(part["coverage"]), bounds_of(part, "coverage", ".2f")))
            row.append(Cell("–" if part["mean_size"] is None else f"{part['mean_size']:.1f}"))
        return row

    kinds = [values["marginal"], values["by_class"]]
    images = {name: part["images"] for name, part in kinds[0]["per_class"].items()}
    rows = [cells("all", sum(images.values()), kinds)]
    rows += [cells(name, images[name], [kind["per_class"][name] for kind in kinds]) for name in calibration.classes]
    columns = ("true class", "one threshold: holds it", "classes", "by class: holds it", "classes")
    return PrintedTable(f"Sets that shall hold the right class for {calibration.coverage:.0%}", columns, rows)


def _silence_table(values: Mapping[str, Any]) -> PrintedTable:
    rows = []
    for row in values["table"]:
        answered = ", ".join(f"{name} {count:,}" for name, count in row["answered"].items())
        accuracies = [Cell(number(row[key]), bounds_of(row, key, ".2f")) for key in ("accuracy", "balanced_accuracy")]
        rows.append([Cell(f"{row['percent']}%", answered), Cell(f"{row['threshold']:.2f}"), *accuracies])
    columns = ("answered (images by class)", "least confidence", "accuracy", "balanced accuracy")
    return PrintedTable("Answering the surest images only", columns, rows)


_OVERCONFIDENCE = (
    "Overconfidence: mean confidence less the share that is right; below 0 the model is less sure than it could be."
)


# Measures of the table of levels, and those of which gaps are drawn, the first that have any.
_LEVEL_MEASURES = (
    "balanced_accuracy",
    "accuracy",
    "malignant.sensitivity",
    "malignant.specificity",
    "malignant.auc",
    "overconfidence",
)


_GAPS = ("balanced_accuracy", "malignant.sensitivity", "overconfidence")


def subgroups_section(subgroups: Subgroups, unit: str = "patients") -> Section:
    """Return whether results hold for everyone.

    Args:
        subgroups: from `measure_subgroups`.
        unit: what was resampled, in words.
    """
    levels, table = subgroups.levels, subgroups.table
    few = levels[~levels["measured"]]
    lead = [
        f"The {subgroups.images:,} test images are divided by {_listed(list(subgroups.descriptions))}. Every level is compared with all "
        "others for which the question is answered; images without an answer are a level of their own. Measures of classes are compared "
        "over the classes that both sides have from enough patients.",
        f"{len(few)} of {len(levels)} levels have fewer than {MINIMUM_IMAGES} images or {MINIMUM_PATIENTS} {unit} and therefore no "
        f"numbers; whether results hold for them this test set can't tell (in brackets: images): {_by_field(few)}."
        if len(few)
        else "Every level has enough images for numbers.",
        _flagged(subgroups),
        "A gap says that results differ, not why: cases may be harder or photographs worse, or the training images fewer.",
    ]
    items: list[PrintedTable | ReportFigure] = [_level_table(subgroups, unit)]
    flagged = table[table["flagged"] & table["counted"]]
    if len(flagged):
        items.append(_gap_table(flagged))
    known = {measure: table[table["measure"] == measure] for measure in subgroups.overall}
    if known["balanced_accuracy"]["value"].notna().any():
        items.append(draw_subgroups(subgroups, "balanced_accuracy", unit))
    items += [
        draw_subgroup_gaps(subgroups, name, unit)
        for name in _GAPS
        if name in known and known[name]["gap"].notna().any()
    ]
    return Section("subgroups", "Does it hold for everyone?", lead, items)


def _flagged(subgroups: Subgroups) -> str:
    count = subgroups.flagged
    text = (
        f"{subgroups.looked_at:,} gaps were looked at; if there were none at all, about {subgroups.by_chance:.0f} of them would stand out "
        f"by chance alone. 0 lies outside the 95% interval of {count:,}"
    )
    found = subgroups.table[subgroups.table["flagged"] & subgroups.table["counted"]]
    where = [
        f"{field} = {level} ({len(part)})" for (field, level), part in found.groupby(["field", "level"], sort=False)
    ]
    if not count:
        return f"{text}."
    silent = (
        ""
        if not (found["level"] == NOT_RECORDED).any()
        else (
            f' "{NOT_RECORDED[0].upper()}{NOT_RECORDED[1:]}" stands out: whether a question was asked goes along with the case, and a model '
            "may lean on that."
        )
    )
    return f"{text}: {_listed(where)}.{silent}"


def _by_field(levels: pd.DataFrame) -> str:
    names: dict[str, list[str]] = {}
    for row in levels.to_dict("records"):
        names.setdefault(row["field"], []).append(f"{row['level']} ({row['images']})")
    return "; ".join(f"{field} {', '.join(found)}" for field, found in names.items())


def _level_table(subgroups: Subgroups, unit: str) -> PrintedTable:
    measures = [name for name in _LEVEL_MEASURES if name in subgroups.overall]
    at = {(row["field"], row["level"], row["measure"]): row for row in subgroups.table.to_dict("records")}
    rows = []
    for level in subgroups.levels.to_dict("records"):
        # Of a few patients it would tell what they have.
        lacks = f", no {level['missing']}" if level["missing"] and level["measured"] else ""
        row = [
            Cell(
                f"{level['field']} = {level['level']}",
                f"{level['images']:,} images, {level['patients']:,} {unit}{lacks}",
            )
        ]
        for measure in measures:
            found = at.get((level["field"], level["level"], measure))
            row.append(
                Cell("–") if found is None else Cell(number(found["value"]), pair(found["low"], found["high"], ".2f"))
            )
        rows.append(row)
    notes = [
        "–: too few images or patients.",
        "Balanced accuracy runs over the classes that the level and the others have from enough patients.",
        _OVERCONFIDENCE,
    ]
    return PrintedTable(
        "Results by level, with 95% intervals", ("level", *(NAMES[name] for name in measures)), rows, tuple(notes)
    )


def _gap_table(flagged: pd.DataFrame) -> PrintedTable:
    rows = []
    for row in flagged.to_dict("records"):
        name = NAMES[row["measure"]]
        cells = [Cell(f"{row['field']} = {row['level']}"), Cell(name, f"of {row['classes']}" if row["classes"] else "")]
        cells += [Cell(number(row["value"])), Cell(number(row["others"]))]
        rows.append([*cells, Cell(signed(row["gap"]), pair(row["gap_low"], row["gap_high"], "+.2f"))])
    columns = ("level", "measure", "level's", "the others'", "gap")
    return PrintedTable("Gaps that stand out", columns, rows, (_OVERCONFIDENCE,), left=2)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


Row = Mapping[Hashable, Any]


def out_of_scope_section(measured: OutOfScopeMeasured, group: str = "patient") -> Section:
    """Return the section.

    Args:
        measured: from `measure_out_of_scope`.
        group: what a group of test photographs is called, `patient` or `lesion`.
    """
    rows: dict[str, Row] = {row["group"]: row for row in measured.table.to_dict("records")}
    lesions, everyday = rows[LESIONS], rows[EVERYDAY]
    lead = [
        "A classifier answers whatever picture it is given, a cup of coffee as well. So each picture is compared with the photographs that "
        "the model was trained on, by what its image encoder makes of it, and the predictor warns of what is unlike them.",
        f"Of {lesions['pictures']:,} test photographs of lesions {_share(lesions)} were warned of without need ({FALSE_ALARMS:.0%} were "
        f"meant to be). Of {everyday['pictures']:,} pictures without a lesion, from {everyday['sources']} files and drawing programs, "
        f"{_share(everyday)} were warned of. Of all pairs of such a picture and a lesion, {everyday['auroc']:.1%}"
        f"{_interval(everyday, 'auroc', '.1%')} were put in the right order (AUROC; 50% is chance).",
    ]
    if measured.skin_auroc is not None:
        value, low, high = measured.skin_auroc
        skin, close = rows[SKIN], rows[CLOSE_LESION]
        between = "" if np.isnan(low) else f" [{low:.2f} to {high:.2f}]"
        told = "tells" if low > 0.5 else "doesn't reliably tell"
        lead.append(
            f"The hardest case is skin without a lesion. Of squares of skin cut out beside the lesion, {_share(skin)} were warned of, of "
            f"squares of the same size around the lesion {_share(close)}: part of that is enlargement. The score {told} the two apart "
            f"(AUROC {value:.2f}{between}). A photograph of healthy skin will often pass without a warning."
        )
    lead.append(
        "No warning doesn't mean that the picture shows a lesion, and least of all that the answer is right: a lesion of a kind that the "
        "model never saw may look familiar to it."
    )
    return Section(
        "out_of_scope", "Pictures that show no lesion", lead, [_table(measured, group), draw_out_of_scope(measured)]
    )


def _table(measured: OutOfScopeMeasured, group: str) -> PrintedTable:
    rows = [
        [
            Cell(row["group"]),
            Cell(f"{row['pictures']:,}", f"of {row['sources']}"),
            Cell("") if np.isnan(row["auroc"]) else Cell(f"{row['auroc']:.3f}", _interval(row, "auroc", ".3f").strip()),
            Cell(f"{row['flagged']:.1%}", _interval(row, "flagged", ".1%").strip()),
        ]
        for row in measured.table.to_dict("records")
    ]
    notes = (
        f"Small in the second column: how many {group}s, files or drawing programs the pictures are of. In brackets: 95% of "
        f"{measured.samples:,} resamples of {group}s and sources; none for fewer than {FEW_SOURCES} sources. Where all or none were warned "
        "of, Wilson's interval.",
        "The first three groups after the lesions are photographs, documents and areas that nobody would take for skin; the score was "
        "chosen with others of their kind.",
        f"Fitted on {measured.training:,} training photographs, limit from {measured.validation:,} validation photographs, seed "
        f"{measured.seed}.",
    )
    return PrintedTable("Pictures and warnings", ("group", "pictures", "AUROC", "warned of"), rows, notes)


def _share(row: Row) -> str:
    return f"{row['flagged']:.1%}{_interval(row, 'flagged', '.1%')}"


def _interval(row: Row, name: str, how: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if np.isnan(low) else f" [{low:{how}}, {high:{how}}]"


def shortcuts_section(shortcuts: Shortcuts) -> Section:
    """Return what the score leans on: the probes as sentences, table and picture."""
    lead = [
        "A model can reach its score without looking at the lesion: by what surrounds it, by the form, or by which answers were not "
        "recorded. Here the trained model is asked again about the same photographs with parts taken away or exchanged between "
        f"{shortcuts.unit}s.",
        *shortcut_sentences(shortcuts),
    ]
    return Section("shortcuts", "What the score leans on", lead, [shortcut_table(shortcuts), draw_shortcuts(shortcuts)])


def availability_section(availability: MissingMetadata) -> Section:
    """Return what the model reaches with fewer answers and without the photograph."""
    table = availability.curve[availability.curve["measure"] == BALANCED]
    values = {(row["photograph"], row["share"]): row for row in table.to_dict("records")}
    ends = [(name, (table["photograph"] == name).any()) for name in (WITH_IMAGE, WITHOUT_IMAGE)]
    least = table["share"].min()
    said = [
        f"{name} {_value(values[name, 1.0])} with the whole form and {_value(values[name, least])} with {_probed_kept(least)}"
        for name, there in ends
        if there
    ]
    lead = [
        f"Balanced accuracy {'; '.join(said)}; guessing reaches {availability.chance:.2f}.",
        "In the curve single answers are removed at random. In the patterns they are missing together, as they are in training: there a "
        "gap can itself have told the class, and then it misleads where answers are missing for another reason.",
    ]
    pictures = [draw_missing_metadata([availability]), draw_missing_patterns([availability])]
    return Section(
        "availability",
        "With fewer answers",
        lead,
        [missing_pattern_table(availability), *pictures, missing_metadata_table(availability)],
    )


def _value(row: Mapping[Any, Any]) -> str:
    return f"{row['value']:.2f} [{row['low']:.2f} to {row['high']:.2f}]"


def _probed_kept(share: float) -> str:
    return "no answer" if share == 0 else f"{share:.0%} of the answers"


# What is examined -> the finding ids that answer it, in plain words and in the order of the table.
QUESTIONS = (
    ("Are patients on one side only?", ("patients_on_two_sides",)),
    ("Are lesions on one side only?", ("lesions_on_two_sides",)),
    ("Are copies of a photograph on one side only?", ("near_duplicates",)),
    (
        "Is every photograph there under one id and one label?",
        ("near_duplicates_other", "identical_other_label", "identical_same_label"),
    ),
    ("Is what is missing silent about the class?", ("missing_block", "missing_mask")),
    ("Does no single column give the class away?", ("proxy",)),
    ("Are forms silent about who the patient is?", ("nearest_form", "reidentification", "form_alone")),
)


WORDS = {"PASS": "yes", "WARN": "not quite", "FAIL": "no"}


ORDER = ("FAIL", "WARN", "PASS")


# Of the tables these are for a page; the sentences of the verdicts say what the others hold.
TABLES = ("missing_models", "proxies", "form_alone")


def audited_section(audit: Audit) -> Section:
    """Return the verdicts, and the tables of what is missing, of single columns and of the form alone."""
    total = sum(audit.images.values())
    verdicts = {level: sum(finding.level == level for finding in audit.findings) for level in ORDER}
    lead = [
        f"{total:,} images of {audit.dataset} and their division into training ({audit.images['train']:,}), validation "
        f"({audit.images['val']:,}) and test ({audit.images['test']:,}) were examined for what makes numbers look better than they are: "
        f"the same {audit.group} or picture on two sides, and metadata that give the answer away. Of {len(audit.findings)} findings "
        f"{verdicts['FAIL']} forbid believing the numbers, and {verdicts['WARN']} are worth knowing."
    ]
    lead += [
        f"{finding.message[0].upper()}{finding.message[1:]}." for finding in audit.findings if finding.level == "FAIL"
    ]
    blocks = audit.tables.get("missing_blocks")
    if blocks is not None and np.isfinite(blocks["malignant_missing"].iloc[0]):
        first = blocks.iloc[0]
        lead.append(
            f"Most often missing is the block “{first['block']}”: in {first['rows']:,} rows ({first['share']:.0%}), of which "
            f"{first['malignant_missing']:.0%} are cancers; of the other rows {first['malignant_present']:.0%} are."
        )
    printed = printed_tables(audit)
    chosen = [printed[name] for name in TABLES if name in printed]
    return Section("audit", "Can the data be trusted?", lead, [_verdicts(audit), *chosen])


def _verdicts(audit: Audit) -> PrintedTable:
    rows = []
    for question, checks in QUESTIONS:
        answers = sorted(
            (finding for finding in audit.findings if finding.check in checks),
            key=lambda finding: ORDER.index(finding.level),
        )
        if answers:
            worst = answers[0].level
            said = "; ".join(dict.fromkeys(finding.message for finding in answers if finding.level == worst))
            rows.append([Cell(question), Cell(WORDS[worst], bold=worst != "PASS"), Cell(said)])
    compared = [finding.message for finding in audit.findings if finding.check == "images_compared"]
    notes = [f"{message[0].upper()}{message[1:]}." for message in compared] or [
        "Photographs were not compared with each other."
    ]
    return PrintedTable("What was asked of the data", ("Question", "Answer", "Why"), rows, tuple(notes), left=3)
