"""The section on trust: what the probabilities are worth once they are calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dualrefnet.evaluation.calibrated import Calibration
from dualrefnet.evaluation.printed_table import Cell, PrintedTable
from dualrefnet.evaluation.referral import referral_curve
from dualrefnet.evaluation.reliability import compute_reliability
from dualrefnet.evaluation.selective import measure_selective
from dualrefnet.figures.curves import draw_reliability
from dualrefnet.figures.picture import Picture
from dualrefnet.figures.referral import draw_referral
from dualrefnet.figures.selective import draw_selective
from dualrefnet.report.measured import Measured
from dualrefnet.report.numbers import CI, bounds_of, number, percent, signed
from dualrefnet.report.section import Section
from dualrefnet.runtime.probabilities import malignancy

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
    lead = [_temperature(calibration, values), *_sets(calibration, values["conformal"], unit, measured.run.recipe.training.selection)]
    lead += [_referral(calibration, values["referral"], unit), _silence(values["selective"])]
    lead += [f"{remark[0].upper()}{remark[1:]}." for remark in calibration.remarks if "in every set" not in remark]
    warmed = calibration.probabilities(measured.probabilities)
    reliability = compute_reliability(measured.labels, warmed, measured.groups, samples=samples, seed=seed)
    after = replace(draw_reliability(reliability, unit), name="reliability_calibrated", title="Reliability at the temperature")
    selective = measure_selective(measured.labels, warmed, measured.groups, measured.classes, samples=samples, seed=seed)
    pictures: list[PrintedTable | Picture] = [after, draw_selective(selective, unit)]
    ill = calibration.cancer[measured.labels]
    if calibration.referral is not None and 0 < ill.sum() < len(ill):
        curve = referral_curve(
            ill, malignancy(warmed, calibration.cancer), measured.groups, calibration.referral, calibration.sensitivity,
            calibration.referral_interval, samples, seed,
        )  # fmt: skip
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
        text += "probability were true, so that " + ("no miscalibration shows" if after <= chance[1] else "they aren't all true")
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
    where = {"within": "lies in the interval", "missed": "lies above the interval: the promise isn't kept", "exceeded": "lies below it"}
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
    words = [f"{percent(rows[share], 'accuracy')} of the answers are right at {share}% answered" for share in (100, 80, 50)]
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
    return PrintedTable("Probabilities without and with the temperature", ("measure", "without", "with", "change"), rows, notes)


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
