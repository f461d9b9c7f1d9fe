"""Metrics for people: as a tidy table, in the terminal, and as Markdown. All three show the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dualrefnet.evaluation.bootstrap import interval_suffix
from dualrefnet.evaluation.calibration import at_bound
from dualrefnet.evaluation.metrics import CLASS_MEASURES, HEADLINE_MEASURES, MALIGNANT_MEASURES
from dualrefnet.runtime.availability import ALWAYS_RECORDED, AS_RECORDED, IMAGE_ONLY, METADATA_ONLY

MEASURE_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auc_macro_ovr": "AUC, macro, one versus rest",
    "auc_weighted_ovr": "AUC, weighted, one versus rest",
    "f1_macro": "F1, macro",
    "f1_weighted": "F1, weighted",
    "precision_macro": "precision, macro",
    "precision_weighted": "precision, weighted",
    "recall_macro": "recall, macro",
    "recall_weighted": "recall, weighted",
    "specificity_macro": "specificity, macro",
    "npv_macro": "NPV, macro",
    "kappa": "Cohen's kappa",
    "mcc": "Matthews correlation",
    "ece": "expected calibration error",
    "brier": "Brier score, multi-class",
    "log_loss": "log loss",
    "support": "images",
    "malignant_sensitivity": "malignant: sensitivity",
    "malignant_specificity": "malignant: specificity",
    "malignant_ppv": "malignant: PPV",
    "malignant_npv": "malignant: NPV",
    "malignant_auc": "malignant: AUC",
    "malignant_support": "malignant: images",
}
CLASS_COLUMNS = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "f1": "F1",
    "auc": "AUC",
    "support": "images",
}
COUNTS = ("support", "predicted", "malignant_support")


def metrics_frame(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """Return metrics as a tidy table, one row a value.

    Args:
        metrics: from `compute_metrics` or `metrics_from_confusion`, with or without intervals.

    Returns:
        Columns `measure` (malignant versus benign as `malignant_auc` and so on), `class` (empty for values of the whole
        test set), `value`, `low`, `high` (float64; NaN: undefined, or no interval).
    """
    suffix = _suffix(metrics)
    rows: list[dict[str, Any]] = []

    def add(values: Mapping[str, Any], keys: tuple[str, ...], name: str, prefix: str) -> None:
        for key in keys:
            if key in values:
                low, high = values.get(key + suffix, (None, None))
                rows.append({"measure": prefix + key, "class": name, "value": values[key], "low": low, "high": high})

    add(metrics, HEADLINE_MEASURES, "", "")
    add(metrics.get("malignant", {}), MALIGNANT_MEASURES, "", "malignant_")
    for name, values in metrics["per_class"].items():
        add(values, CLASS_MEASURES, name, "")
    return pd.DataFrame(rows).astype({"value": float, "low": float, "high": float})


def metrics_table(metrics: Mapping[str, Any], title: str = "Test set") -> Group:
    """Return the headline table, the class table and the remarks, for `Console.print`.

    Args:
        metrics: see `metrics_frame`.
        title: stands above the headline table.
    """
    headline, by_class = _cells(metrics)
    interval = _interval_name(metrics)
    first = Table(title=escape(title), title_justify="left")
    first.add_column("measure")
    first.add_column("value", justify="right")
    first.add_column(interval)
    for row in headline:
        first.add_row(*row)
    second = Table(
        title="Each class versus the rest" + (f" (below: {interval})" if _has_intervals(metrics) else ""),
        title_justify="left",
    )
    second.add_column("class")
    for column in CLASS_COLUMNS.values():
        second.add_column(column, justify="right", overflow="fold")
    for name, cells in by_class:
        second.add_row(escape(name), *("\n".join(part for part in cell if part) for cell in cells))
    return Group(first, second, *(Text(f"Note: {remark}.") for remark in metrics["remarks"]))


def calibration_line(calibrated: Mapping[str, Any]) -> str:
    """Say in a line what temperature, conformal sets and referral are worth on the test side.

    Args:
        calibrated: `calibrated` of metrics.json.
    """
    before, after, sets = calibrated["before"]["ece"], calibrated["after"]["ece"], calibrated["conformal"]["marginal"]
    bound = " (the end of its range)" if at_bound(calibrated["temperature"]) else ""
    parts = [
        f"temperature {calibrated['temperature']:.2f}{bound}: calibration error {before:.3f} -> {after:.3f}",
        f"sets of {sets['mean_size']:.1f} classes hold the right one for {sets['coverage']:.0%} ({calibrated['conformal']['promised']:.0%} "
        "promised)",
    ]
    referral = calibrated["referral"]
    if referral is not None and referral["sensitivity"] is not None:
        parts.append(
            f"referral of {referral['referred']:.0%} finds {referral['sensitivity']:.0%} of the cancers ({referral['wanted']:.0%} wanted)"
        )
    return "; ".join(parts)


AVAILABILITY_COLUMNS = (
    "given",
    "balanced accuracy",
    "malignant AUC",
    "cancers referred",
    "benign referred",
    "sets hold",
    "classes in a set",
)
AVAILABILITY_NAMES = {
    AS_RECORDED: "all that was recorded",
    ALWAYS_RECORDED: "image, only what is always recorded",
    IMAGE_ONLY: "image, metadata blank",
    METADATA_ONLY: "metadata, no image",
}


def availability_rows(measured: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what was given, and value and interval of each other of `AVAILABILITY_COLUMNS`: named inputs, then the
    groups.

    Args:
        measured: `availability` of metrics.json.
    """
    named = {AVAILABILITY_NAMES[name]: values for name, values in measured["inputs"].items()}
    groups = {one["name"]: one for one in measured["groups"] if one["group"]["to"] > 0 and len(measured["groups"]) > 1}
    suffix = interval_suffix(0.95)
    rows = []
    for name, values in (named | groups).items():
        cells = []
        for key in (
            "balanced_accuracy",
            "malignant_auc",
            "cancers_referred",
            "benign_referred",
            "coverage",
            "mean_size",
        ):
            value, bounds = values.get(key), values.get(key + suffix)
            text = "–" if value is None else f"{value:.{1 if key == 'mean_size' else 3}f}"
            cells.append((text, f"[{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""))
        rows.append((name, cells))
    return rows


def availability_notes(measured: Mapping[str, Any]) -> list[str]:
    """Return what is weak about the calibration of single groups, a sentence each."""
    notes = []
    for one in measured["groups"]:
        notes += [f"{one['name']}: {remark}." for remark in one["remarks"]]
        if one["referral_threshold"] == 0:
            notes.append(
                f"{one['name']}: too few cancers in validation for a referral threshold, so everybody is referred."
            )
    return notes


def availability_line(measured: Mapping[str, Any]) -> str:
    """Say in a line what becomes of the referral of cancers when metadata, or the image, are missing; empty if nothing
    was measured so.

    Args:
        measured: `availability` of metrics.json.
    """
    parts = [
        f"{AVAILABILITY_NAMES[name]} {values['cancers_referred']:.0%} (and {values['benign_referred']:.0%} of the benign)"
        for name, values in measured["inputs"].items()
        if values.get("cancers_referred") is not None and values.get("benign_referred") is not None
    ]
    return f"cancers referred: {'; '.join(parts)}" if parts else ""


def metrics_markdown(metrics: Mapping[str, Any], title: str = "Test set") -> str:
    """Return the content of `metrics_table` as Markdown.

    Args:
        metrics: see `metrics_frame`.
        title: becomes the heading.
    """
    headline, by_class = _cells(metrics)
    interval = _interval_name(metrics)
    lines = [
        f"## {title}",
        "",
        _row(["measure", "value", interval]),
        "|:--|--:|:--|",
        *(_row(row) for row in headline),
        "",
    ]
    lines += [f"Each class versus the rest{f', with the {interval}' if _has_intervals(metrics) else ''}:", ""]
    lines += [_row(["class", *CLASS_COLUMNS.values()]), "|:--|" + "--:|" * len(CLASS_COLUMNS)]
    lines += [_row([name, *(" ".join(part for part in cell if part) for cell in cells)]) for name, cells in by_class]
    if metrics["remarks"]:
        lines += ["", *(f"- Note: {remark}." for remark in metrics["remarks"])]
    return "\n".join(lines) + "\n"


def _cells(metrics: Mapping[str, Any]) -> tuple[list[list[str]], list[tuple[str, list[tuple[str, str]]]]]:
    """Return the printed headline rows (name, value, interval), and for each class its (value, interval) cells."""
    frame = metrics_frame(metrics)
    places = zip(frame["measure"], frame["class"], strict=True)
    numbers = zip(frame["value"], frame["low"], frame["high"], strict=True)
    printed = {
        (measure, name): (_value(measure, value), _interval(low, high))
        for (measure, name), (value, low, high) in zip(places, numbers, strict=True)
    }
    headline = [[MEASURE_NAMES[measure], *cell] for (measure, name), cell in printed.items() if not name]
    empty = ("–", "")
    by_class = [
        (name, [printed.get((measure, name), empty) for measure in CLASS_COLUMNS]) for name in metrics["per_class"]
    ]
    return headline, by_class


def _value(measure: str, value: float) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.0f}" if measure in COUNTS else f"{value:.3f}"


def _interval(low: float, high: float) -> str:
    return "" if pd.isna(low) else f"[{low:.3f}, {high:.3f}]"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _has_intervals(metrics: Mapping[str, Any]) -> bool:
    return "bootstrap" in metrics


def _suffix(metrics: Mapping[str, Any]) -> str:
    return interval_suffix(metrics["bootstrap"]["level"]) if _has_intervals(metrics) else interval_suffix(0.95)


def _interval_name(metrics: Mapping[str, Any]) -> str:
    level = metrics["bootstrap"]["level"] if _has_intervals(metrics) else 0.95
    return f"{100 * level:g}% interval"
