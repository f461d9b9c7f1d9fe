"""Pictures of the Shapley values of the metadata: which answers count, for whom, and how one prediction comes about."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dualrefnet.explain.shapley import MetadataShap
from dualrefnet.figures.picture import COLOURS, INK, PAPER, PRIMARY, SECONDARY, Picture, class_colours, file_stem, new_figure, styled
from dualrefnet.figures.swarm import shade, swarm

# Low to high; dark to light too, for those who see no colours.
LOW_TO_HIGH = LinearSegmentedColormap.from_list("low_to_high", [COLOURS[0], COLOURS[3], COLOURS[1]])
STEPS = 8
OTHER = COLOURS[6]
HATCH = "/////"
# Characters of one line beside a waterfall, unless a name is longer.
_LABEL = 24


@styled
def draw_importance(result: MetadataShap, count: int = 15) -> Picture:
    """Draw how far each player moves the probability of each class, on average: the paper's Figure 6.

    Args:
        result: of `explain_metadata`.
        count: players of their own; the others are added up.
    """
    ranking = result.ranking().assign(importance=lambda table: 100 * table["importance"]).rename(columns={"importance": "points"})
    names = list(dict.fromkeys(ranking["player"]))
    shown = names[: count if len(names) > count + 1 else len(names)]
    data = ranking[ranking["player"].isin(shown)]
    rest = ranking[~ranking["player"].isin(shown)]
    if len(rest):
        others = f"{len(names) - len(shown)} others"
        summed = rest.groupby("class", sort=False)["points"].sum().reset_index().assign(player=others, field="", kind="")
        shown, data = [*shown, others], pd.concat([data, summed[list(data.columns)]], ignore_index=True)
    points = data.pivot(index="player", columns="class", values="points").loc[shown, list(result.classes)].to_numpy()
    kinds = data.drop_duplicates("player").set_index("player")["kind"].loc[shown]
    sums = points.sum(axis=1)
    # Dozens of small ones together would press the others against the axis.
    drawn = len(shown) - (len(rest) > 0 and sums[-1] > sums[0])

    # As many names in a row of the legend as find room.
    across = min(len(result.classes), max(1, 64 // (5 + max(map(len, result.classes)))), 4)
    figure, axes = new_figure(0.85 + 0.2 * len(shown) + 0.16 * -(-len(result.classes) // across))
    axis, left = axes[0], np.zeros(drawn)
    for number, colour in enumerate(class_colours(result.classes).values()):
        bars = axis.barh(np.arange(drawn), points[:drawn, number], left=left, color=colour, edgecolor=PAPER, linewidth=0.3, height=0.75)
        for bar, kind in zip(bars, kinds, strict=False):
            bar.set_hatch(HATCH if kind == "missing" else "")
        left += points[:drawn, number]
    for place, whole in enumerate(sums):
        text, end = (f"{whole:.1f}", whole) if place < drawn else (f"{whole:.1f} together, too long to draw", 0)
        axis.annotate(text, (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(range(len(shown)), shown)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlim(0, max(sums[:drawn].max(), 1e-9) * 1.14)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("mean change of a class's probability,\nclasses added up, percentage points")
    # matplotlib fills a legend column by column; here it reads row by row.
    patches = [Patch(color=colour, label=label) for label, colour in class_colours(result.classes).items()]
    patches = [patches[place] for column in range(across) for place in range(column, len(patches), across)]
    figure.legend(handles=patches, loc="outside upper center", ncols=across, handlelength=1, columnspacing=1.2)

    what = "answer" if result.by == "field" else "column of the encoded form"
    caption = (
        f"How far each {what} moves the probability of each class, up or down, {_given(result)}: the mean over {_sample(result)}. "
        "In each bar the classes stand in the order of the legend; the number is their sum. "
        f"{_method(result)}{_flags(result, 'Hatched bars')}"
    )
    best = "; ".join(f"{name} {whole:.1f}" for name, whole in list(zip(shown, sums, strict=True))[:5])
    alt = f"Percentage points, classes added up, the weightiest first: {best}."
    title = f"Which {'answers count' if result.by == 'field' else 'columns of the form count'}, by class"
    return Picture(f"shap_importance_{result.by}", title, caption, alt, figure, data.reset_index(drop=True))


@styled
def draw_beeswarm(result: MetadataShap, label: str, count: int = 10) -> Picture:
    """Draw every image's value of the weightiest players for one class, coloured by what was answered.

    Args:
        result: of `explain_metadata`.
        label: the class.
        count: how many players.
    """
    points = 100 * result.values[:, :, result.classes.index(label)]
    order = np.argsort(-np.abs(points).mean(axis=0), kind="stable")[:count]
    figure, axes = new_figure(1.25 + 0.31 * len(order))
    axis = axes[0]
    axis.axvline(0, color=INK, linewidth=0.7, zorder=1)
    # About as wide as a point.
    width = max(float(np.ptp(points[:, order])), 1e-9) / 90
    parts = []
    for place, player in enumerate(order):
        amount, answered = result.colours[:, player], result.answered[:, player]
        parts.append(
            pd.DataFrame(
                {
                    "image_id": result.image_ids,
                    "class": label,
                    "player": result.players[player].name,
                    "answer": [words[player] for words in result.words],
                    "colour": shade(amount),
                    "points": points[:, player],
                    "height": place + swarm(points[:, player], width),
                    "marker": "D" if result.players[player].kind == "missing" else "o",
                    "filled": answered,
                }
            )
        )
    data = pd.concat(parts, ignore_index=True)
    # Points of one look are drawn together: the file is half as large.
    looks = data.assign(paint=[_paint(amount) for amount in data["colour"]]).groupby(["marker", "filled", "paint"])
    for (marker, filled, paint), each in looks:
        axis.plot(
            each["points"], each["height"], linestyle="", marker=str(marker), markersize=2.7, color=str(paint), zorder=3,
            markerfacecolor=str(paint) if filled else "none", markeredgewidth=0 if filled else 0.6,
        )  # fmt: skip
    axis.set_yticks(np.arange(len(order)), [result.players[player].name for player in order])
    axis.set_ylim(len(order) - 0.45, -0.55)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(textwrap.fill(f"change of the probability of {label}, percentage points", 40))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), LOW_TO_HIGH), ax=axis, location="top", shrink=0.5, aspect=22, pad=0.02)
    bar.set_ticks([0, 1], labels=["low, or no", "high, or yes"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, pad=1)
    greys = ((~result.answered, "not recorded", "none"), (result.answered & np.isnan(result.colours), "another answer", OTHER))
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=3.5, color=OTHER, markerfacecolor=fill, label=words)
        for which, words, fill in greys
        if which[:, order].any()
    ]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=2, handletextpad=0.1)

    lead = [f"{result.players[player].name} {points[:, player].min():+.1f} to {points[:, player].max():+.1f}" for player in order[:4]]
    what = "answer" if result.by == "field" else "column"
    caption = (
        f"Each point is one image: how far its {what} moves the probability of {label}, {_given(result)} ({_sample(result)}). Colours show "
        "the answer from low to high within its row; grey points are answers without an order, such as a region or “not known”; hollow "
        f"ones have no answer, also where one was imputed. {_method(result)}{_flags(result, 'Diamonds')}"
    )
    alt = f"Values in percentage points, the weightiest first: {'; '.join(lead)}."
    data = data[["image_id", "class", "player", "answer", "colour", "points"]]
    return Picture(f"shap_beeswarm_{result.by}_{file_stem(label)}", f"What speaks for and against {label}", caption, alt, figure, data)


@styled
def draw_waterfall(result: MetadataShap, image_id: str, label: str, count: int = 9) -> Picture:
    """Draw how one image's probability of one class comes about, from the mean over other patients' forms to its own.

    Args:
        result: of `explain_metadata`.
        image_id: of the N images.
        label: the class.
        count: players of their own; the others are added up.
    """
    row, column = result.image_ids.index(image_id), result.classes.index(label)
    values, errors = 100 * result.values[row, :, column].astype(float), 100 * result.errors[row, :, column]
    base, prediction = 100 * float(result.base[row, column]), 100 * float(result.prediction[row, column])
    order = np.argsort(-np.abs(values), kind="stable")
    top = order[: count if len(order) > count + 1 else len(order)]
    steps = [(result.players[player].name, result.words[row][player], values[player], result.players[player].kind) for player in top]
    if len(top) < len(order):
        steps.append((f"{len(order) - len(top)} others", "", float(values[order[len(top) :]].sum()), ""))
    data = pd.DataFrame(steps, columns=["player", "answer", "points", "kind"])
    data["end"] = base + data["points"].cumsum()
    data["start"] = data["end"] - data["points"]

    beside = "this photograph,\nother patients' forms" if result.reads_image else "other patients' forms"
    width = max(_LABEL, *(len(name) for name in data["player"]))
    answers = zip(data["player"], data["answer"], strict=True)
    labels = [beside, *(_folded(f"{name} = {answer}" if answer else name, width) for name, answer in answers), "with this patient's form"]
    lines = max(text.count("\n") + 1 for text in labels)
    figure, axes = new_figure(0.65 + len(labels) * (0.12 + 0.125 * lines))
    axis = axes[0]
    starts, ends = data["start"].to_numpy(), data["end"].to_numpy()
    for place, (start, end, kind) in enumerate(zip(starts, ends, data["kind"], strict=True), 1):
        rises, points = end >= start, end - start
        bar = axis.barh(place, points, left=start, height=0.62, color=SECONDARY if rises else PRIMARY, edgecolor=PAPER, linewidth=0)
        bar[0].set_hatch(HATCH if kind == "missing" else "")
        side, shift = ("left", 3) if rises else ("right", -3)
        axis.annotate(_signed(points), (end, place), xytext=(shift, 0), textcoords="offset points", fontsize=7, va="center", ha=side)
        axis.plot([start] * 2, [place - 1, place], color=INK, linewidth=0.6, zorder=1)
    last = len(data) + 1
    axis.plot([prediction] * 2, [last - 1, last], color=INK, linewidth=0.6, zorder=1)
    for place, value in ((0, base), (last, prediction)):
        axis.plot(value, place, marker="D", markersize=4, color=INK)
        # On the side where the picture has room.
        side, shift = ("left", 5) if value < (base + prediction) / 2 else ("right", -5)
        style: Any = {"xytext": (shift, 0), "textcoords": "offset points", "va": "center", "ha": side}
        axis.annotate(f"{value:.1f} %", (value, place), fontsize=7.5, fontweight="bold", **style)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(last + 0.6, -0.6)
    low, high = min(*starts, *ends), max(*starts, *ends)
    span = max(high - low, 1.0)
    # Room for the numbers beside the bars; but there are no probabilities below 0 and above 100.
    axis.set_xlim(low - 0.3 * span, high + 0.34 * span)
    axis.set_xticks([tick for tick in axis.get_xticks() if max(0, axis.get_xlim()[0]) <= tick <= min(100, axis.get_xlim()[1])])
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"probability of {label}, %")

    truth, error = result.classes[result.labels[row]], 2 * float(errors[top].max())
    caption = (
        f"How the probability of {label} of image {image_id} (truth: {truth}) comes about: from {base:.1f} %, the mean {_given(result)} "
        f"and {result.background} training forms in turn, to {prediction:.1f} % with this patient's. Orange bars raise it, blue ones lower "
        f"it, in percentage points; they are estimates from {_orders(result)} of the {result.by}s, good to about {error:.1f} points."
    )
    if not result.answered[row, top].all():
        caption += " What is not recorded is no answer of this patient's."
    if (data["kind"] == "missing").any():
        caption += _flags(result, "Hatched bars")
    said = [f"{name} = {answer} {points:+.1f}" if answer else f"{name} {points:+.1f}" for name, answer, points, _ in steps]
    alt = f"From {base:.1f} % to {prediction:.1f} %: {'; '.join(said)}."
    name = f"shap_waterfall_{result.by}_{file_stem(image_id)}_{file_stem(label)}"
    return Picture(name, f"Why {label} for {image_id}", caption, alt, figure, data)


def _given(result: MetadataShap) -> str:
    return "with the photograph left as it is" if result.reads_image else "by the form alone"


def _sample(result: MetadataShap) -> str:
    shown = len(result.image_ids)
    if shown == result.images_in_all:
        return f"all {shown} {result.side} images"
    return f"{shown} of {result.images_in_all} {result.side} images, each class in proportion, seed {result.seed}"


def _orders(result: MetadataShap) -> str:
    return f"{result.permutations} random order{'s' if result.permutations > 1 else ''}"


def _method(result: MetadataShap) -> str:
    return (
        f"Shapley values (SHAP) from {_orders(result)} of the {result.by}s; hidden ones are taken from {result.background} training forms."
    )


def _flags(result: MetadataShap, which: str) -> str:
    """Return the sentence on what stands for missing fields, if anything does."""
    if not any(player.kind == "missing" for player in result.players):
        return ""
    return (
        f" {which} are no answers: they stand for flags that say which fields are empty, and so can give away how a patient was examined "
        "(on PAD-UFES-20, who was never biopsied)."
    )


def _paint(amount: float) -> str:
    """Return the colour of 0..1, or the grey of what has no place between low and high."""
    return OTHER if np.isnan(amount) else to_hex(LOW_TO_HIGH(round(amount * STEPS) / STEPS))


def _folded(text: str, width: int) -> str:
    """Break a label: first before the answer."""
    if len(text) <= width:
        return text
    name, sign, answer = text.partition(" = ")
    return "\n".join([name + sign.rstrip(), *textwrap.wrap(answer, width)]) if sign else textwrap.fill(text, width)


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")
