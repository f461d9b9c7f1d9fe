"""Sections on a run's performance: metrics, confusion matrix, curves, training history; no data and no model needed."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dualrefnet.analysis.reconstruction import draw_reconstruction_history
from dualrefnet.display.figure import (
    COLOURS,
    INK,
    MARKERS,
    PAPER,
    SEQUENTIAL_CMAP,
    WIDTH,
    ReportFigure,
    new_figure,
    styled,
)
from dualrefnet.display.format import CLASS_COLUMNS, MEASURE_NAMES, Cell, PrintedTable, availability_table, number
from dualrefnet.display.page import Section
from dualrefnet.evaluation.bootstrap import Bootstrap, images_of
from dualrefnet.evaluation.curves import KINDS, class_curves, draw_curves
from dualrefnet.report.verdict import judge_leak, judge_missingness
from dualrefnet.run import Run, TestSplit
from dualrefnet.suite.results import caveats, departures, other_experiment, reported, reported_class
from dualrefnet.training.loop import selection_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADLINE = (
    "balanced_accuracy",
    "accuracy",
    "auc_macro_ovr",
    "f1_macro",
    "kappa",
    "malignant_sensitivity",
    "malignant_specificity",
    "malignant_auc",
    "ece",
    "brier",
)
CLASS_MEASURES = ("sensitivity", "specificity", "ppv", "npv", "auc")
# The paper gives no AUC of a class.
PAPER_MEASURES = CLASS_MEASURES[:-1]
CLASS_HEAD = ("class", *(CLASS_COLUMNS[measure] for measure in CLASS_MEASURES))
# Table 3 and Table 2 of the paper.
PAPER_TABLES = {"pad_ufes_20": ("3a", "2a"), "isic_2019": ("3b", "2b")}
# A class with fewer test images is pointed out.
FEW_IMAGES = 20


@dataclass(frozen=True)
class Measured:
    """A finished run, read from its folder."""

    run: Run
    metrics: dict[str, Any]
    classes: tuple[str, ...]
    malignant: tuple[str, ...]
    test: TestSplit

    @property
    def unit(self) -> str:
        return f"{self.run.unit}s"

    @cached_property
    def departures(self) -> list[str]:
        """In what the run isn't the experiment that the paper's numbers are of."""
        return departures(self.run.recipe, self.run.split)


def read_measured(run: Run) -> Measured:
    description = run.model
    return Measured(run, run.metrics, tuple(description["classes"]), tuple(description["malignant"]), run.test)


def summary_section(measured: Measured) -> Section:
    """Return the headline measures, beside the paper's where the experiment is the paper's."""
    metrics = measured.metrics
    tables = [_headline_table(measured)]
    if len(metrics.get("availability", {}).get("inputs", ())) > 1:
        tables.append(availability_table(metrics["availability"]))
    leaked = measured.run.recipe.metadata.imputation == "label_leaking"
    findings = [*judge_leak(metrics["leakage"], measured.run.unit, leaked), *judge_missingness(metrics)]
    return Section("summary", "Metrics", [], tables, findings=findings)


def _headline_table(measured: Measured) -> PrintedTable:
    metrics, recipe, test = measured.metrics, measured.run.recipe, measured.test
    values = metrics | {f"malignant_{key}": value for key, value in metrics.get("malignant", {}).items()}
    measures = [measure for measure in HEADLINE if measure in values]
    table = PAPER_TABLES.get(recipe.data.dataset, ("", ""))[0] if recipe.data.protocol == "paper" else ""
    paper = {}
    for measure in measures if table else ():
        found = reported(recipe.data.dataset, table, recipe.model.method, recipe.model.backbone, measure)
        if found and found.comparable(measure):
            paper[measure] = found.value
    rows = [[Cell(MEASURE_NAMES[measure]), Cell.of(values, measure)] for measure in measures]
    notes = [
        f"{images_of(len(test.labels), len(set(test.groups)), measured.unit)}. In brackets: 95% interval from "
        f"a bootstrap over {measured.unit}.",
        "Expected calibration error and Brier score: lower is better.",
    ]
    if not paper or measured.departures:
        notes += [other_experiment(measured.departures)] if paper else []
        return PrintedTable("Test set", ("measure", "this run"), rows, tuple(notes))
    rows = [[*row, Cell(number(paper.get(measure)))] for row, measure in zip(rows, measures, strict=True)]
    notes += caveats(recipe.data.dataset, table, {recipe.model.method})
    return PrintedTable("Test set", ("measure", "this run", "the paper"), rows, tuple(notes))


def class_section(measured: Measured) -> Section:
    recipe, per_class = measured.run.recipe, measured.metrics["per_class"]
    names = measured.run.model["dataset"].get("class_names", {})
    rows, paper_rows = [], []
    for label, values in per_class.items():
        images = f"{values['support']:,} image{'s' if values['support'] != 1 else ''}"
        title = Cell(label, ", ".join(part for part in (names.get(label), images) if part))
        rows.append([title, *(Cell.of(values, measure) for measure in CLASS_MEASURES)])
        paper = [
            reported_class(recipe.data.dataset, recipe.model.method, recipe.model.backbone, label, measure)
            for measure in PAPER_MEASURES
        ]
        if not measured.departures and any(value is not None for value in paper):
            pairs = zip(PAPER_MEASURES, paper, strict=True)
            cells = (Cell(number(values[measure]), f"paper {number(value)}") for measure, value in pairs)
            paper_rows.append([Cell(label), *cells])
    few = [label for label, values in per_class.items() if values["support"] < FEW_IMAGES]
    notes = (f"Fewer than {FEW_IMAGES} test images, so imprecise: {', '.join(few)}.",) if few else ()
    tables = [PrintedTable("Each class versus the rest, with 95% intervals", CLASS_HEAD, rows, notes)]
    if paper_rows:
        known = caveats(recipe.data.dataset, PAPER_TABLES[recipe.data.dataset][1], {recipe.model.method})
        tables.append(PrintedTable("Comparison with the paper's Table 2", CLASS_HEAD[:-1], paper_rows, tuple(known)))
    intro = [
        "Sensitivity and specificity are the fractions of a class's images, and of all other images, that are "
        "classified correctly. PPV and NPV depend on how frequent each class is in this test set."
    ]
    matrix = draw_confusion(measured.metrics, measured.malignant, measured.unit)
    return Section("classes", "Classes and confusion matrix", intro, [tables[0], matrix, *tables[1:]])


def curve_section(measured: Measured, samples: int, seed: int) -> Section:
    test, bootstrap = measured.test, Bootstrap(measured.test.groups, samples, seed, label="curves")
    curves = class_curves(test.labels, test.probabilities, bootstrap, measured.classes, measured.malignant)
    figures = [draw_curves(curves, kind, measured.unit) for kind in KINDS]
    return Section("curves", "ROC and precision-recall", [], figures)


def history_section(measured: Measured) -> Section:
    history, selection = measured.run.history, measured.run.recipe.training.selection
    epoch = selected_epoch(history, selection)
    criterion = "lowest loss" if selection == "loss" else f"highest {selection.replace('_', ' ')}"
    kept = f"epoch {epoch}, which has the {criterion} on the validation split, was kept"
    if selection == "last":
        kept = "the last one was kept, so the validation split served calibration only"
    intro = [f"{_epochs(history)}: {kept}. The test split was not used for any choice."]
    figures = [draw_history(history, epoch)]
    if "val_psnr" in history.columns:
        figures.append(draw_reconstruction_history(history))
    return Section("training", "Training history", intro, figures)


# Characters in a line of a class's name.
LINE = 15
# Characters that fit side by side below all columns; beyond them, names stand upright.
LEVEL = 40


@styled
def draw_confusion(metrics: Mapping[str, Any], malignant: Sequence[str] = (), unit: str = "patients") -> ReportFigure:
    """Draw the confusion matrix, counts and shares: rows are true classes, columns predicted ones."""
    import matplotlib

    classes = list(metrics["per_class"])
    counts = np.array(metrics["confusion_matrix"])
    support = counts.sum(axis=1)
    portion = np.divide(counts, support[:, None], out=np.full(counts.shape, np.nan), where=support[:, None] > 0)
    below = [textwrap.fill(name, LINE) for name in classes]
    beside = [textwrap.fill(f"{name} ({images})", LINE) for name, images in zip(classes, support, strict=True)]
    upright = len(classes) * max(len(line) for name in below for line in name.splitlines()) > LEVEL
    figure, (axis,) = new_figure(WIDTH * min(0.4 + 0.12 * len(classes), 1) + (0.7 if upright else 0))
    axis.pcolormesh(np.ma.masked_invalid(portion), cmap=SEQUENTIAL_CMAP, vmin=0, vmax=1, edgecolor=PAPER, linewidth=1)
    scale = matplotlib.colormaps[SEQUENTIAL_CMAP]
    # Five digits must fit a cell of an eighth of the width.
    size = 7 if len(classes) > 6 else 8
    for (row, column), share in np.ndenumerate(portion):
        colour = INK if np.isnan(share) else _text_colour(scale(float(share)))
        text = f"{counts[row, column]}\n{share:.0%}" if counts[row, column] else "0"
        axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=size)
    axis.set_xticks(np.arange(len(classes)) + 0.5, below, rotation=90 if upright else 0)
    axis.set_yticks(np.arange(len(classes)) + 0.5, beside)
    axis.set(xlabel="predicted class", ylabel="true class (images)")
    axis.invert_yaxis()
    axis.grid(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)

    data = pd.DataFrame({"true": np.repeat(classes, len(classes)), "predicted": np.tile(classes, len(classes))})
    data = data.assign(images=counts.ravel(), share=portion.ravel())
    groups = metrics["bootstrap"]["groups"] if "bootstrap" in metrics else metrics["support"]
    caption = images_of(metrics["support"], groups, unit if "bootstrap" in metrics else "image")
    caption += ". Rows: true class, with its number of images; columns: predicted class. Each cell: images, and their "
    caption += "share of the true class, by which it is coloured."
    if malignant:
        caption += f" Malignant: {', '.join(name for name in classes if name in malignant)}."
    for what, present in (("No test image", support), ("Never predicted", counts.sum(axis=0))):
        if not present.all():
            caption += f" {what}: {', '.join(np.array(classes)[present == 0])}."
    alt = []
    for index in np.flatnonzero(support):
        wrong = counts[index] * (np.arange(len(classes)) != index)
        text = f"{classes[index]}: {counts[index, index]} of {support[index]} correct"
        alt.append(text + f", most often taken for {classes[wrong.argmax()]} ({wrong.max()})" * bool(wrong.any()))
    return ReportFigure("confusion", "Confusion matrix", caption, "; ".join(alt), figure, data)


def _text_colour(colour: Sequence[float]) -> str:
    """Return black or white, whichever contrasts more with a colour (relative luminance, WCAG 2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return "#000000" if np.dot([0.2126, 0.7152, 0.0722], linear) > 0.179 else "#ffffff"


CLASSIFICATION, BALANCED_ACCURACY, NORMS = "classification loss", "balanced accuracy", "relative L1 norm"
HEADS = "loss of auxiliary heads"
# Further terms of the loss, each on a scale of its own.
TERMS = {"train_total": "total loss", "train_reconstruction": "reconstruction loss", "train_penalty": "weight penalty"}


def selected_epoch(history: pd.DataFrame, selection: str) -> int:
    """Return the epoch whose parameters were kept, as training chose it."""
    if selection != "last" and f"val_{selection}" not in history:
        raise ValueError(f"the history has no column val_{selection}")
    best = max(history.to_dict("records"), key=lambda row: selection_value(row, selection))  # type: ignore[arg-type]
    return int(best["epoch"])


@styled
def draw_history(history: pd.DataFrame, selected: int) -> ReportFigure:
    """Draw the losses, the balanced accuracy on validation and, if recorded, the norms of the penalised layers."""
    if selected not in set(history["epoch"]):
        raise ValueError(f"the history has no epoch {selected}")
    panels = _panels(history)
    kept = float(history.loc[history["epoch"] == selected, "val_balanced_accuracy"].iloc[0])
    rows = -(-len(panels) // 2)
    figure, axes = new_figure(1.7 * rows, rows, 2)
    for axis in axes[len(panels) :]:
        axis.remove()
    tables, alt = [], []
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        for index, (name, values) in enumerate(series.items()):
            place = index if title in (HEADS, NORMS) else ("training", "validation").index(name)
            axis.plot(history["epoch"], values, color=COLOURS[place], marker=MARKERS[place], markersize=2.5, label=name)
            tables.append(pd.DataFrame({"panel": title, "series": name, "epoch": history["epoch"], "value": values}))
            alt.append(f"{title}, {name}: from {values.iloc[0]:.3g} to {values.iloc[-1]:.3g}")
        if title == BALANCED_ACCURACY:
            axis.plot(selected, kept, "o", color=INK, markersize=5, label=f"{kept:.3f}")
        _label_panel(axis, title, history["epoch"], selected)
    data = pd.concat(tables, ignore_index=True).assign(kept=lambda table: table["epoch"] == selected)
    caption = (
        f"{_epochs(history)}; dotted line: epoch {selected}, whose parameters were kept, and its balanced accuracy "
        "on the validation split (dot). Training losses are epoch means with dropout and augmentation, validation "
        "losses are without; a validation loss that rises while the training loss falls indicates overfitting."
    )
    if NORMS in panels:
        caption += " L1 norms of the last two layers, relative to the first epoch; near 0 indicates a collapse."
    alt = [f"{_epochs(history)}; kept is epoch {selected} with a balanced accuracy of {kept:.3f} on validation", *alt]
    return ReportFigure("history", "Training history", caption, "; ".join(alt), figure, data)


def _epochs(history: pd.DataFrame) -> str:
    return f"{len(history)} epoch{'s' if len(history) != 1 else ''}"


def _panels(history: pd.DataFrame) -> dict[str, dict[str, pd.Series]]:
    """Return panel -> line -> values, of what this run's history holds."""
    panels = {
        CLASSIFICATION: {"training": history["train_classification"], "validation": history["val_loss"]},
        BALANCED_ACCURACY: {"validation": history["val_balanced_accuracy"]},
    }
    heads = history.filter(regex="^train_classification_")
    if len(heads.columns):
        panels[HEADS] = {name.removeprefix("train_classification_"): heads[name] for name in map(str, heads)}
    terms = {title: {"training": history[name]} for name, title in TERMS.items() if name in history}
    # A total of one term would say the same twice.
    if HEADS in panels or len(terms) > 1:
        panels |= terms
    norms = history.filter(regex="^l1_")
    if len(norms.columns):
        panels[NORMS] = {name.removeprefix("l1_"): norms[name] / norms[name].iloc[0] for name in map(str, norms)}
    return panels


def _label_panel(axis: Axes, title: str, epochs: pd.Series, selected: int) -> None:
    """Mark the kept epoch, and write title and legend above the panel, where they can hide no line."""
    from matplotlib.ticker import MaxNLocator

    axis.axvline(selected, color=INK, linestyle=":", linewidth=1)
    legend_rows = -(-len(axis.get_legend_handles_labels()[1]) // 2)
    spacing = {"borderaxespad": 0.1, "handlelength": 1.2, "handletextpad": 0.5, "columnspacing": 1, "borderpad": 0}
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, **spacing)
    axis.set_title(title, pad=3 + 12 * legend_rows)
    axis.set_xlabel("epoch")
    axis.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
