"""The picture of a training: its losses, its validation and the size of its last layers, epoch by epoch."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dualrefnet.figures.picture import COLOURS, INK, MARKERS, Picture, new_figure, styled

CLASSIFICATION, BALANCED_ACCURACY, NORMS = "classification loss", "balanced accuracy", "relative L1 norm"
HEADS = "loss of further heads"
# Further terms of the loss, each on a scale of its own.
TERMS = {"train_total": "total loss", "train_reconstruction": "reconstruction loss", "train_penalty": "weight penalty"}


def selected_epoch(history: pd.DataFrame, selection: str) -> int:
    """Return the epoch whose parameters were kept, as training chose it.

    Args:
        history: of the run, one row an epoch.
        selection: `balanced_accuracy`, `accuracy` (the highest on validation; a tie goes to the lower loss) or `loss` (the
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
def draw_history(history: pd.DataFrame, selected: int) -> Picture:
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
    return Picture("history", "Training, epoch by epoch", caption, alt, figure, data)


def _series(history: pd.DataFrame) -> dict[str, dict[str, pd.Series]]:
    """Return panel -> line -> values, of what this run's history holds."""
    panels = {CLASSIFICATION: {"training": history["train_classification"], "validation": history["val_loss"]}}
    panels[BALANCED_ACCURACY] = {"validation": history["val_balanced_accuracy"]}
    columns = [str(name) for name in history.columns]
    heads = {name.removeprefix("train_classification_"): history[name] for name in columns if name.startswith("train_classification_")}
    if heads:
        panels[HEADS] = heads
    terms = {title: {"training": history[name]} for name, title in TERMS.items() if name in history}
    # A total of one term would say the same twice.
    if heads or len(terms) > 1:
        panels |= terms
    norms = {name.removeprefix("l1_"): history[name] / history[name].iloc[0] for name in columns if name.startswith("l1_")}
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
