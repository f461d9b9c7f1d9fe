"""The sections of a run's page that its predictions and its history fill: no model and no photograph is needed."""

# also: Pictures of the confusion matrix: how many images, and which share of each true class.
# also: The picture of a training: its losses, its validation and the size of its last layers, epoch by epoch.

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

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
from dualrefnet.display.format import Cell, PrintedTable
from dualrefnet.display.page import Section
from dualrefnet.evaluation.bootstrap import interval_suffix
from dualrefnet.evaluation.curves import (
    KINDS,
    class_curves,
    compute_reliability,
    draw_curves,
    draw_reliability,
)
from dualrefnet.evaluation.tables import (
    AVAILABILITY_COLUMNS,
    CLASS_COLUMNS,
    MEASURE_NAMES,
    availability_line,
    availability_notes,
    availability_rows,
)
from dualrefnet.progress import progress_bar
from dualrefnet.run import Run
from dualrefnet.runtime.availability import missingness_shortcut
from dualrefnet.suite.paper import caveats, reported, reported_class

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
        run,
        metrics,
        classes,
        tuple(description["malignant"]),
        description["dataset"].get("class_names", {}),
        test["label"].map(position).to_numpy(dtype=np.int64),
        test[[f"prob_{name}" for name in classes]].to_numpy(dtype=float),
        groups,
        "lesion" if run.recipe.data.dataset == "isic_2019" else "patient",
    )


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
    tables: list[PrintedTable | ReportFigure] = [_headline_table(measured)]
    if "availability" in metrics:
        lead.append(availability_line(metrics["availability"]).capitalize() + ".")
        reason = missingness_shortcut(metrics)
        if reason is not None:
            lead.append(f"NOT TO BE USED WHERE METADATA MAY BE MISSING: {reason}.")
        if len(metrics["availability"]["inputs"]) > 1:
            tables.append(_availability_table(metrics["availability"]))
    lead.append(
        f"In brackets stands the 95% interval: had other {measured.group}s come, the number would likely lie in it."
    )
    return Section("glance", "At a glance", lead, tables)


def class_section(measured: Measured, samples: int, seed: int) -> Section:
    """Return the class-wise table, the confusion matrices and the curves."""
    metrics, unit = measured.metrics, f"{measured.group}s"
    with progress_bar("curves") as show:
        curves = class_curves(
            measured.labels,
            measured.probabilities,
            measured.groups,
            measured.classes,
            samples=samples,
            seed=seed,
            progress=show,
            malignant=measured.malignant,
        )
    lead = [
        "Sensitivity: of the photographs of a class, the share that is given it. Specificity: of all others, the share that isn't. PPV: "
        "of the photographs that are given the class, the share that has it. NPV: of those that aren't, the share that hasn't. PPV and "
        "NPV hold for test sets with as many cases of each class as this one."
    ]
    tables = [_class_table(measured), *_paper_class_table(measured)]
    pictures = [draw_confusion(metrics, shares, measured.malignant, unit) for shares in (False, True)]
    return Section(
        "classes",
        "Class by class",
        lead,
        [*tables, *pictures, *(draw_curves(curves, kind, unit) for kind in KINDS)],
    )


def probability_section(measured: Measured, samples: int, seed: int) -> Section:
    """Return the reliability diagram."""
    lead = [
        "A probability of 80% should come true in 80 of 100 cases. The diagram compares the probability of the likeliest class with how "
        f"often it was right; the expected calibration error, the mean distance between the two, is {measured.metrics['ece']:.2f}."
    ]
    reliability = compute_reliability(
        measured.labels, measured.probabilities, measured.groups, samples=samples, seed=seed
    )
    picture = draw_reliability(reliability, f"{measured.group}s")
    return Section("probabilities", "Can the probabilities be believed?", lead, [picture])


def training_section(measured: Measured) -> Section:
    """Return the history of the training."""
    history, recipe = measured.run.history, measured.run.recipe
    epoch = selected_epoch(history, recipe.training.selection)
    criterion = {"loss": "lowest loss"}.get(
        recipe.training.selection, f"highest {recipe.training.selection.replace('_', ' ')}"
    )
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
        found = (
            reported(recipe.data.dataset, table, recipe.model.method, recipe.model.backbone, measure) if table else None
        )
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
    notes = (
        (f"Fewer than {FEW_IMAGES} images: {', '.join(few)}. One image more or less changes their numbers much.",)
        if few
        else ()
    )
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


# Characters in a line of a class's name.
LINE = 15


# Characters that fit side by side below all columns; beyond them, names stand upright.
LEVEL = 40


@styled
def draw_confusion(
    metrics: Mapping[str, Any], shares: bool = False, malignant: Sequence[str] = (), unit: str = "patients"
) -> ReportFigure:
    """Draw the confusion matrix: rows the truth, columns the prediction.

    Args:
        metrics: from `compute_metrics`, with or without intervals; the content of metrics.json.
        shares: of the true class (each row sums to 1) instead of numbers of images.
        malignant: the classes that are cancer, for the caption.
        unit: what images of one group share, in words, for the caption.

    Returns:
        `confusion_counts` or `confusion_shares`; `data` has one row a cell: `true`, `predicted`, `images`, `share` (NaN
        for a
        class without images).
    """
    classes = list(metrics["per_class"])
    counts = np.array(metrics["confusion_matrix"])
    support, given = counts.sum(axis=1), counts.sum(axis=0)
    portion = np.divide(counts, support[:, None], out=np.full(counts.shape, np.nan), where=support[:, None] > 0)
    cells = portion if shares else counts.astype(float)
    top = 1 if shares else max(1, int(counts.max()))
    below = [textwrap.fill(name, LINE) for name in classes]
    beside = [textwrap.fill(f"{name} ({number})", LINE) for name, number in zip(classes, support, strict=True)]
    upright = len(classes) * max(len(line) for name in below for line in name.splitlines()) > LEVEL
    figure, (axis,) = new_figure(WIDTH * min(0.35 + 0.12 * len(classes), 0.92) + (0.7 if upright else 0))
    axis.pcolormesh(np.ma.masked_invalid(cells), cmap=SEQUENTIAL_CMAP, vmin=0, vmax=top, edgecolor=PAPER, linewidth=1)
    scale = matplotlib.colormaps[SEQUENTIAL_CMAP]
    for (row, column), value in np.ndenumerate(cells):
        text = "–" if np.isnan(value) else f"{value:.2f}" if shares else f"{value:.0f}"
        colour = INK if np.isnan(value) else _on(np.asarray(scale(value / top)))
        # Five digits must fit a cell of an eighth of the width.
        axis.text(
            column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=7 if len(classes) > 6 else 8
        )
    places = np.arange(len(classes)) + 0.5
    axis.set_xticks(places, below, rotation=90 if upright else 0)
    axis.set_yticks(places, beside)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class (images)")
    axis.invert_yaxis()
    axis.grid(False)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)

    data = pd.DataFrame(
        {
            "true": np.repeat(classes, len(classes)),
            "predicted": np.tile(classes, len(classes)),
            "images": counts.ravel(),
            "share": portion.ravel(),
        }
    )
    name, title = (
        ("confusion_shares", "Shares of each true class") if shares else ("confusion_counts", "Confusion matrix")
    )
    present = support > 0
    words = [
        f"{classes[index]}: {counts[index, index]} of {support[index]} right{_mistake(classes, counts[index], int(index))}"
        for index in np.flatnonzero(present)
    ]
    caption = _caption(
        metrics, classes, malignant, shares, unit, [np.array(classes)[~present], np.array(classes)[given == 0]]
    )
    return ReportFigure(name, title, caption, "; ".join(words), figure, data)


def _caption(
    metrics: Mapping[str, Any],
    classes: list[str],
    malignant: Sequence[str],
    shares: bool,
    unit: str,
    missing: list[np.ndarray],
) -> str:
    whose = f" of {metrics['bootstrap']['groups']} {unit}" if "bootstrap" in metrics else ""
    cell = (
        "each cell is the share of the true class that got this answer, so every row sums to 1"
        if shares
        else "each cell is a number of images"
    )
    sentences = [
        f"{metrics['support']} test images{whose}. Rows are the true class with its number of images, columns the predicted one; {cell}, "
        "and what is right lies on the diagonal."
    ]
    if malignant:
        sentences.append(f"Malignant: {', '.join(name for name in classes if name in malignant)}.")
    notes = [
        f"{what}: {', '.join(names)}"
        for what, names in zip(("No test image", "Never predicted"), missing, strict=True)
        if len(names)
    ]
    if notes:
        sentences.append("; ".join(notes) + ".")
    return " ".join(sentences)


def _mistake(classes: list[str], row: np.ndarray, right: int) -> str:
    """Name the most frequent wrong answer."""
    wrong = np.where(np.arange(len(row)) == right, 0, row)
    return f", most often taken for {classes[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""


def _on(colour: NDArray[np.float64]) -> str:
    """Return black or white, whichever is read better on a colour, in both themes of the page."""
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3])
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if luminance > 0.179 else "#ffffff"


CLASSIFICATION, BALANCED_ACCURACY, NORMS = "classification loss", "balanced accuracy", "relative L1 norm"


HEADS = "loss of further heads"


# Further terms of the loss, each on a scale of its own.
TERMS = {"train_total": "total loss", "train_reconstruction": "reconstruction loss", "train_penalty": "weight penalty"}


def selected_epoch(history: pd.DataFrame, selection: str) -> int:
    """Return the epoch whose parameters were kept, as training chose it.

    Args:
        history: of the run, one row an epoch.
        selection: `balanced_accuracy`, `accuracy` (the highest on validation; a tie goes to the lower loss) or `loss`
            (the
            lowest); the earliest of equal epochs. `last`: the last one.

    Raises:
        ValueError: the history has no such value.
    """
    if selection == "last":
        return int(history["epoch"].iloc[-1])
    if f"val_{selection}" not in history:
        raise ValueError(f"the history has no column val_{selection}")
    best: list[float] | None = None
    epoch = 0
    for row in history.to_dict("records"):
        value = [-row["val_loss"]] if selection == "loss" else [row[f"val_{selection}"], -row["val_loss"]]
        # The comparison of training, also where a value isn't a number.
        if best is None or value > best:
            best, epoch = value, int(row["epoch"])
    return epoch


@styled
def draw_history(history: pd.DataFrame, selected: int) -> ReportFigure:
    """Draw the losses, the balanced accuracy on validation and, where there are any, the norms of the penalised layers.

    Args:
        history: of the run, one row an epoch.
        selected: the epoch whose parameters were kept; see `selected_epoch`.

    Returns:
        The picture; `data` has one row a point: `panel`, `series`, `epoch`, `value`, `kept` (the epoch is `selected`).

    Raises:
        ValueError: `selected` isn't in the history.
    """
    if selected not in set(history["epoch"]):
        raise ValueError(f"the history has no epoch {selected}")
    panels = _series(history)
    kept = float(history.loc[history["epoch"] == selected, "val_balanced_accuracy"].iloc[0])
    rows = -(-len(panels) // 2)
    figure, axes = new_figure(1.7 * rows, rows, 2)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        for index, (name, values) in enumerate(series.items()):
            place = index if title in (HEADS, NORMS) else ("training", "validation").index(name)
            axis.plot(history["epoch"], values, color=COLOURS[place], marker=MARKERS[place], markersize=2.5, label=name)
        if title == BALANCED_ACCURACY:
            axis.plot(selected, kept, "o", color=INK, markersize=5, label=f"{kept:.3f}")
        _finish(axis, title, history["epoch"], selected)
    data = pd.concat(
        [
            pd.DataFrame({"panel": title, "series": name, "epoch": history["epoch"], "value": values})
            for title, series in panels.items()
            for name, values in series.items()
        ],
        ignore_index=True,
    )
    data["kept"] = data["epoch"] == selected
    caption = (
        f"{_epochs(history)} of training; the dotted line is epoch {selected}, whose parameters were kept, and the dot its balanced "
        "accuracy (mean share found of each class) on the validation images. Losses should fall; training losses are means over an epoch, "
        "with dropout and augmentation, validation losses are without. A validation loss that rises while that of training falls says "
        "that the training images are learned by heart."
    )
    if NORMS in panels:
        caption += " The L1 norms of the last two layers (sums of absolute weights) are relative to the first epoch; near 0 is a collapse."
    words = [
        f"{title}, {name}: from {values.iloc[0]:.3g} to {values.iloc[-1]:.3g}"
        for title, series in panels.items()
        for name, values in series.items()
    ]
    alt = f"{_epochs(history)}; kept is epoch {selected} with a balanced accuracy of {kept:.3f} on validation. {'; '.join(words)}"
    return ReportFigure("history", "Training, epoch by epoch", caption, alt, figure, data)


def _series(history: pd.DataFrame) -> dict[str, dict[str, pd.Series]]:
    """Return panel -> line -> values, of what this run's history holds."""
    panels = {CLASSIFICATION: {"training": history["train_classification"], "validation": history["val_loss"]}}
    panels[BALANCED_ACCURACY] = {"validation": history["val_balanced_accuracy"]}
    columns = [str(name) for name in history.columns]
    heads = {
        name.removeprefix("train_classification_"): history[name]
        for name in columns
        if name.startswith("train_classification_")
    }
    if heads:
        panels[HEADS] = heads
    terms = {title: {"training": history[name]} for name, title in TERMS.items() if name in history}
    # A total of one term would say the same twice.
    if heads or len(terms) > 1:
        panels |= terms
    norms = {
        name.removeprefix("l1_"): history[name] / history[name].iloc[0] for name in columns if name.startswith("l1_")
    }
    if norms:
        panels[NORMS] = norms
    return panels


def _finish(axis: Axes, title: str, epochs: pd.Series, selected: int) -> None:
    """Mark the kept epoch, and write title and legend above the panel, where they can hide no line."""
    axis.axvline(selected, color=INK, linestyle=":", linewidth=1)
    legend_rows = -(-len(axis.get_legend_handles_labels()[1]) // 2)
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        borderaxespad=0.1,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1,
        borderpad=0,
    )
    axis.set_title(title, pad=3 + 12 * legend_rows)
    axis.set_xlabel("epoch")
    axis.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def _epochs(history: pd.DataFrame) -> str:
    return f"{len(history)} epoch{'s' if len(history) != 1 else ''}"
