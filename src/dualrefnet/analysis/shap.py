"""Shapley values of the metadata while the image stays the same (SHAP, Lundberg and Lee 2017).

A prediction is attributed to groups of the columns that the model reads. By field, all columns of one field are one
group: a number, or the indicators of its categories. The columns of tier M3 that say which fields are missing are a
group of their own: of PAD-UFES-20 they say who was never biopsied, and nobody of these has a cancer, a shortcut that
would stay hidden if each flag stood with its field.

By column, every column is a group, as in the paper's Figure 6. Its coalitions hold metadata that no patient can have,
with two regions of the body at once or with none, so the model predicts on what it never learned. The values of a
field's columns add up to the same prediction, but their sum is not the value of the field as a group.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dualrefnet.analysis.opened_run import OpenedRun, sample_rows
from dualrefnet.data.metadata import EncodedMetadata, MetadataEncoder
from dualrefnet.display.figure import (
    COLOURS,
    INK,
    PAPER,
    PRIMARY,
    SECONDARY,
    ReportFigure,
    beeswarm_offsets,
    class_colours,
    file_stem,
    new_figure,
    styled,
)
from dualrefnet.display.format import number
from dualrefnet.errors import DependencyError, RunError, install_hint
from dualrefnet.models.encoders import Encoded, EncoderOutput
from dualrefnet.progress import track

try:
    from shap import PermutationExplainer
except ImportError:
    raise DependencyError(f"Shapley values need shap: {install_hint('explain')}") from None

By = Literal["field", "column"]
Kind = Literal["numeric", "boolean", "categorical", "missing"]
# (R, M) float32 encoded metadata -> (R, C) probabilities.
Classifier = Callable[[NDArray[np.float32]], NDArray[np.float64]]

MISSING_FLAGS = "missing fields (flags)"
# How far base + values may be from the prediction: rounding of float32 is a hundred times smaller.
TOLERANCE = 1e-4
# Orders of the groups; by column there are many more groups, and one order takes longer.
PERMUTATIONS: dict[By, int] = {"field": 10, "column": 2}
# Rows of metadata that the model reads at once, and how many numbers of encoded images (256 MB of float32) these may
# stand beside: methods that read maps take fewer rows at once.
MOST_ROWS, MOST_NUMBERS = 4096, 2**26


class FeatureGroup(NamedTuple):
    """Some of the M columns, which come and go together: a field's, all flags', or one column of `field`."""

    name: str
    field: str
    kind: Kind
    columns: tuple[int, ...]


class FieldValues(NamedTuple):
    """The metadata of N images, for each of P groups.

    `texts` say the value, or why there is none. `colours` (N, P), low to high, are NaN for categories and where there
    is no value, also if one was imputed. `known` (N, P): whether there is a value.
    """

    texts: tuple[tuple[str, ...], ...]
    colours: NDArray[np.float32]
    known: NDArray[np.bool_]


def make_feature_groups(encoder: MetadataEncoder, by: By) -> tuple[FeatureGroup, ...]:
    """Divide an encoder's M columns into groups: one a field and one for all flags together, or one a column."""
    names = encoder.names
    flags = tuple(range(encoder.spans[-1].stop if encoder.spans else 0, len(names)))
    owners: list[tuple[str, Kind, tuple[int, ...]]] = [
        (field.name, field.kind, tuple(range(span.start, span.stop)))
        for field, span in zip(encoder.fields, encoder.spans, strict=True)
    ]
    if by == "field":
        owners.append((MISSING_FLAGS, "missing", flags))
        # A category of which the training rows had no value has no column, and no influence.
        return tuple(FeatureGroup(name, name, kind, columns) for name, kind, columns in owners if columns)
    owners += [(names[flag].removeprefix("missing_"), "missing", (flag,)) for flag in flags]
    return tuple(
        FeatureGroup(names[column], name, kind, (column,)) for name, kind, columns in owners for column in columns
    )


def read_field_values(groups: tuple[FeatureGroup, ...], encoder: MetadataEncoder, rows: pd.DataFrame) -> FieldValues:
    """Return the values of N rows of the lesion table as texts, and as numbers to colour by."""
    encoded = encoder.encode(rows)
    places = {field.name: place for place, field in enumerate(encoder.fields)}
    texts, colours, known = [], [], []
    for group in groups:
        amount = encoded.values[:, list(group.columns)].sum(axis=1)
        # That a value is missing is known of all.
        is_known = np.ones(len(rows), dtype=bool)
        if group.name == MISSING_FLAGS:
            own = [f"{flags:g} of {len(group.columns)}" for flags in amount]
        elif group.kind == "missing":
            own = [_yes_or_no(flag) for flag in amount]
        else:
            place = places[group.field]
            is_known = ~encoded.missing[:, place]
            own = _field_texts(encoder, place, rows[group.field], encoded)
            if group.kind != "numeric" and group.name != group.field:
                # One of the field's indicators: of a known value it says yes or no.
                pairs = zip(amount, own, is_known, strict=True)
                own = [_yes_or_no(one) if one_known else text for one, text, one_known in pairs]
            elif group.kind != "numeric":
                amount = np.array([{"no": 0.0, "yes": 1.0}.get(text, np.nan) for text in own])
        texts.append(own)
        colours.append(np.where(is_known, amount, np.nan))
        known.append(is_known)
    return FieldValues(
        tuple(zip(*texts, strict=True)), np.stack(colours, axis=1).astype(np.float32), np.stack(known, axis=1)
    )


def _field_texts(encoder: MetadataEncoder, place: int, values: pd.Series, encoded: EncodedMetadata) -> list[str]:
    field, imputed = encoder.fields[place], ", imputed" if encoder.imputer is not None else ""
    texts = []
    for value, missing, invalid in zip(values, encoded.missing[:, place], encoded.invalid[:, place], strict=True):
        if missing:
            texts.append(("unknown to the model" if invalid else "not recorded") + imputed)
        elif field.kind == "numeric":
            texts.append(f"{value:g} {field.unit or ''}".rstrip())
        elif value in field.missing_codes:
            texts.append("not known")
        elif field.kind == "boolean":
            texts.append(_yes_or_no(value == "True"))
        else:
            texts.append(str(field.aliases.get(value, value) if encoder.section.merge_aliases else value))
    return texts


def _yes_or_no(value: object) -> str:
    return "yes" if value else "no"


class Attribution(NamedTuple):
    """The Shapley values (P, C) of one prediction with standard errors; `base` (C,) is without own metadata."""

    values: NDArray[np.float64]
    errors: NDArray[np.float64]
    base: NDArray[np.float64]
    prediction: NDArray[np.float64]


def attribute_prediction(
    classify: Classifier,
    row: NDArray[np.float32],
    background: NDArray[np.float32],
    groups: tuple[FeatureGroup, ...],
    permutations: int,
    seed: int,
) -> Attribution:
    """Attribute the prediction for one row (M,) to groups of its columns; absent ones come from `background` (B, M)."""
    masker = _Masker(row, background, groups)
    with _numpy_state_kept():
        explainer = PermutationExplainer(_remembering(classify), masker, seed=seed)
        explanation = explainer(
            np.arange(len(groups))[None],
            # Groups whose columns are the same in all rows add nothing, and shap leaves them out of the orders.
            max_evals=permutations * (2 * int((~masker.invariants()).any(axis=0).sum()) + 1),
            batch_size=2 * len(groups) + 1,
            error_bounds=True,
            silent=True,
        )
    prediction = classify(row[None])[0]
    values, std = (np.reshape(part[0], (len(groups), -1)) for part in (explanation.values, explanation.error_std))
    base = np.reshape(explanation.base_values[0], -1)
    gap = float(np.abs(base + values.sum(axis=0) - prediction).max())
    # Written so that NaN is an error too.
    if not gap <= TOLERANCE:
        raise ArithmeticError(
            f"base and Shapley values are {gap:.2g} away from the predicted probability, more than {TOLERANCE:g}: "
            "the model isn't deterministic"
        )
    # As if forwards and backwards were two draws; they are better than that, and the error is rather smaller.
    return Attribution(values, std / np.sqrt(2 * permutations), base, prediction)


def _remembering(classify: Classifier) -> Classifier:
    """Return the same function, which computes equal rows once: of fields with few values two in five rows repeat."""
    known: dict[bytes, NDArray[np.float64]] = {}

    def answer(rows: NDArray[np.float32]) -> NDArray[np.float64]:
        keys = [row.tobytes() for row in rows]
        new = {key: place for place, key in enumerate(keys) if key not in known}
        if new:
            known.update(zip(new, classify(rows[list(new.values())]), strict=True))
        return np.stack([known[key] for key in keys])

    return answer


class _Masker:
    """shap's masker: the row's values where a group is present, those of every background row where not."""

    immutable_outputs = True

    def __init__(
        self, row: NDArray[np.float32], background: NDArray[np.float32], groups: tuple[FeatureGroup, ...]
    ) -> None:
        if sorted(column for group in groups for column in group.columns) != list(range(len(row))):
            raise ValueError(f"each of the {len(row)} columns must belong to one group, and to one only")
        self._row, self._background = row, background
        # (M,): whose column it is.
        self._owner = np.empty(len(row), dtype=np.int64)
        for place, group in enumerate(groups):
            self._owner[list(group.columns)] = place
        same = background == row
        self._same = np.stack([same[:, list(group.columns)].all(axis=1) for group in groups], axis=1)
        self.shape = self._same.shape

    def __call__(self, mask: NDArray[np.bool_], _: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return (B, M) rows of one coalition, a (P,) mask."""
        return np.where(mask[self._owner], self._row, self._background)

    def invariants(self, *_: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return (B, P): where a group's coming changes nothing, so that shap needn't run the model again."""
        return self._same


@contextmanager
def _numpy_state_kept() -> Iterator[None]:
    """Put numpy's global generator, which shap seeds and draws from, back as it was."""
    state = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


@dataclass(frozen=True)
class MetadataShap:
    """Shapley values (N, P, C) of the metadata beside N images, for P groups and C classes; in probabilities.

    `errors` are standard errors: other orders would have given about as different values.
    """

    values: NDArray[np.float32]
    errors: NDArray[np.float32]
    base: NDArray[np.float32]
    prediction: NDArray[np.float32]
    groups: tuple[FeatureGroup, ...]
    classes: tuple[str, ...]
    image_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    fields: FieldValues
    by: By
    total_images: int
    background: int
    permutations: int
    seed: int
    reads_image: bool

    def top_groups(self, row: int, label: str, count: int = 3) -> list[tuple[str, str, float]]:
        """Return the groups that moved an image's probability of a class most: (name, text, value)."""
        values = self.values[row, :, self.classes.index(label)]
        order = np.argsort(-np.abs(values), kind="stable")[:count]
        return [(self.groups[group].name, self.fields.texts[row][group], float(values[group])) for group in order]

    @property
    def importance(self) -> dict[str, float]:
        """Group -> how far it moves the probabilities: mean absolute value, summed over the classes, in points."""
        points = 100 * np.abs(self.values).mean(axis=0, dtype=np.float64).sum(axis=1)
        return dict(zip((group.name for group in self.groups), points.tolist(), strict=True))


@torch.inference_mode()
def explain_metadata(
    opened: OpenedRun,
    images: int = 200,
    background: int = 50,
    by: By = "field",
    permutations: int | None = None,
    seed: int = 0,
    image_ids: Sequence[str] | None = None,
) -> MetadataShap:
    """Attribute the predictions for at most `images` test images, or for `image_ids`, to their metadata.

    Each image is encoded once and then predicted with some ten thousand rows of metadata: about .2 s on two cores.
    """
    if not opened.reads_metadata:
        raise RunError(f"{opened.run.path}: this model reads no metadata, so there is nothing to attribute to them")
    examples = opened.examples("test")
    groups = make_feature_groups(opened.metadata, by)
    if permutations is None:
        permutations = PERMUTATIONS[by]
    if image_ids is None:
        chosen = sample_rows(examples.labels, images, seed)
    else:
        chosen = np.array([examples.image_ids.index(image_id) for image_id in image_ids])
    others = opened.examples("train").metadata
    others = others[np.sort(np.random.default_rng(seed).permutation(len(others))[:background])]
    found: list[Attribution] = []
    for row in track(list(chosen), f"SHAP by {by}"):
        # Each image is encoded alone and has a seed of its own, so its values are the same in any choice of images.
        classify = _classifier(opened, opened.encode_rows(examples, np.array([row])))
        own_seed = int(np.random.SeedSequence([seed, int(row)]).generate_state(1)[0])
        found.append(attribute_prediction(classify, examples.metadata[row], others, groups, permutations, own_seed))
    values, errors, base, prediction = (np.stack(parts).astype(np.float32) for parts in zip(*found, strict=True))
    return MetadataShap(
        values,
        errors,
        base,
        prediction,
        groups,
        opened.classes,
        image_ids=tuple(examples.image_ids[row] for row in chosen),
        labels=examples.labels[chosen],
        fields=read_field_values(groups, opened.metadata, opened.rows("test").iloc[chosen]),
        by=by,
        total_images=len(examples),
        background=len(others),
        permutations=permutations,
        seed=seed,
        reads_image=opened.model.reads_image,
    )


def _classifier(opened: OpenedRun, encoded: Encoded | None) -> Classifier:
    """Return the model as a function of the metadata alone, beside one encoded image."""
    model, outputs = opened.model, () if encoded is None else encoded.outputs
    folds = None if encoded is None else encoded.folds
    # Only some methods read the map, and it is large.
    keep_map = model.maps(opened.recipe.model)

    def repeat(output: EncoderOutput, count: int) -> EncoderOutput:
        """Show the image's features as `count` equal rows, without copying them."""
        places = output.map if keep_map else None
        return EncoderOutput(
            None if places is None else places.expand(count, -1, -1, -1),
            output.vector.expand(count, -1),
            tuple(tap.expand(count, -1, -1, -1) for tap in output.taps),
        )

    single = [repeat(output, 1) for output in outputs]
    numbers = sum(part.numel() for one in single for part in (one.map, one.vector, *one.taps) if part is not None)
    most = min(MOST_ROWS, max(1, MOST_NUMBERS // max(1, numbers)))

    def classify(rows: NDArray[np.float32]) -> NDArray[np.float64]:
        probabilities = []
        for chunk in np.array_split(rows, math.ceil(len(rows) / most)):
            same = None if folds is None else folds.expand(len(chunk))
            image = None if encoded is None else Encoded(tuple(repeat(output, len(chunk)) for output in outputs), same)
            logits = model(image, torch.from_numpy(chunk).to(opened.device)).logits
            probabilities.append(logits.double().softmax(dim=1).cpu().numpy())
        return np.concatenate(probabilities)

    return classify


# Steps of colour of a beeswarm: points of one look are drawn together, and the file is half as large.
STEPS = 8
OTHER = COLOURS[6]
HATCH = "/////"
# Letters in one line beside a waterfall, unless a name is longer.
_LABEL = 24


@styled
def draw_importance(result: MetadataShap, count: int = 15) -> ReportFigure:
    """Draw how far each group moves the probability of each class, on average (the paper's Figure 6)."""
    from matplotlib.patches import Patch

    colours = class_colours(result.classes)
    importance = 100 * np.abs(result.values).mean(axis=0, dtype=np.float64)
    top, others = _largest(importance.sum(axis=1), count)
    points, shown = importance[top], [result.groups[place][:3] for place in top]
    if len(others):
        points = np.vstack([points, importance[others].sum(axis=0)])
        shown.append((f"{len(others)} others", "", ""))
    rows = [
        (*group, label, value)
        for group, values in zip(shown, points, strict=True)
        for label, value in zip(colours, values, strict=True)
    ]
    names, sums = [name for name, *_ in shown], points.sum(axis=1)
    # Dozens of small ones together would press the others against the axis.
    drawn = len(names) - (len(others) > 0 and sums[-1] > sums[0])

    # As many names in a row of the legend as find room.
    across = min(len(colours), max(1, 64 // (5 + max(map(len, colours)))), 4)
    figure, (axis,) = new_figure(0.85 + 0.2 * len(names) + 0.16 * -(-len(colours) // across))
    left = np.zeros(drawn)
    look: Any = {"edgecolor": PAPER, "linewidth": 0.3, "height": 0.75}
    for colour, values in zip(colours.values(), points[:drawn].T, strict=True):
        bars = axis.barh(np.arange(drawn), values, left=left, color=colour, **look)
        for bar, (*_, kind) in zip(bars, shown, strict=False):
            bar.set_hatch(HATCH if kind == "missing" else "")
        left += values
    for place, total in enumerate(sums):
        text, end = (f"{total:.1f}", total) if place < drawn else (f"{total:.1f} together, too long to draw", 0)
        axis.annotate(text, (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, max(sums[:drawn].max(), 1e-9) * 1.14)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("mean |SHAP value|, summed over classes,\npercentage points")
    # matplotlib fills a legend column by column; here it reads row by row.
    patches = [Patch(color=colour, label=label) for label, colour in colours.items()]
    patches = [patches[place] for column in range(across) for place in range(column, len(patches), across)]
    figure.legend(handles=patches, loc="outside upper center", ncols=across, handlelength=1, columnspacing=1.2)
    caption = f"The mean absolute value of each {result.by}, {_given(result)}, one colour a class."
    best = "; ".join(f"{name} {total:.1f}" for name, total in list(zip(names, sums, strict=True))[:5])
    alt = f"Percentage points summed over classes, the largest first: {best}."
    data = pd.DataFrame(rows, columns=["player", "field", "kind", "class", "points"])
    return ReportFigure(f"shap_importance_{result.by}", f"Importance by {result.by}", caption, alt, figure, data)


def _largest(sizes: NDArray[np.floating], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of the `count` largest sizes, and of the others; one alone isn't worth a line of its own."""
    order = np.argsort(-sizes, kind="stable")
    shown = count if len(order) > count + 1 else len(order)
    return order[:shown], order[shown:]


@styled
def draw_beeswarm(result: MetadataShap, label: str, count: int = 10) -> ReportFigure:
    """Draw every image's value of the `count` most important groups for one class, coloured by the group's value."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
    from matplotlib.lines import Line2D

    points = 100 * result.values[:, :, result.classes.index(label)]
    order = np.argsort(-np.abs(points).mean(axis=0), kind="stable")[:count]
    figure, (axis,) = new_figure(1.25 + 0.31 * len(order))
    axis.axvline(0, color=INK, linewidth=0.7, zorder=1)
    # About as wide as a point.
    width = max(float(np.ptp(points[:, order])), 1e-9) / 90
    known, colours = result.fields.known, result.fields.colours
    parts = []
    for place, group in enumerate(order):
        columns = {
            "image_id": result.image_ids,
            "class": label,
            "player": result.groups[group].name,
            "answer": [texts[group] for texts in result.fields.texts],
            "colour": scale_colours(colours[:, group]),
            "points": points[:, group],
            "height": place + beeswarm_offsets(points[:, group], width),
            "marker": "D" if result.groups[group].kind == "missing" else "o",
            "filled": known[:, group],
        }
        parts.append(pd.DataFrame(columns))
    data = pd.concat(parts, ignore_index=True)
    # From low to high is also from dark to light.
    low_to_high = LinearSegmentedColormap.from_list("low_to_high", [COLOURS[0], COLOURS[3], COLOURS[1]])
    paints = [OTHER if np.isnan(one) else to_hex(low_to_high(round(one * STEPS) / STEPS)) for one in data["colour"]]
    for (marker, filled, paint), each in data.assign(paint=paints).groupby(["marker", "filled", "paint"]):
        look: Any = {"markerfacecolor": paint if filled else "none", "markeredgewidth": 0 if filled else 0.6}
        axis.plot(each["points"], each["height"], str(marker), color=paint, markersize=2.7, zorder=3, **look)
    axis.set_yticks(np.arange(len(order)), [result.groups[group].name for group in order])
    axis.set_ylim(len(order) - 0.45, -0.55)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(textwrap.fill(f"SHAP value for {label}, percentage points", 40))
    scale = ScalarMappable(Normalize(0, 1), low_to_high)
    bar = figure.colorbar(scale, ax=axis, location="top", shrink=0.5, aspect=22, pad=0.02)
    bar.set_ticks([0, 1], labels=["low, or no", "high, or yes"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, pad=1)
    greys = ((~known, "not recorded", "none"), (known & np.isnan(colours), "other category", OTHER))
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=3.5, color=OTHER, markerfacecolor=fill, label=text)
        for which, text, fill in greys
        if which[:, order].any()
    ]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=2, handletextpad=0.1)
    caption = "Each point is one image."
    ranges = [
        f"{result.groups[group].name} {points[:, group].min():+.1f} to {points[:, group].max():+.1f}"
        for group in order[:4]
    ]
    alt = f"Values in percentage points, the most important first: {'; '.join(ranges)}."
    name = f"shap_beeswarm_{result.by}_{file_stem(label)}"
    data = data[["image_id", "class", "player", "answer", "colour", "points"]]
    return ReportFigure(name, f"SHAP values for {label}", caption, alt, figure, data)


@styled
def draw_waterfall(result: MetadataShap, image_id: str, label: str, count: int = 9) -> ReportFigure:
    """Draw how one image's probability of one class comes about, from the mean over other metadata to its own."""
    row, column = result.image_ids.index(image_id), result.classes.index(label)
    values, errors = 100 * result.values[row, :, column].astype(float), 100 * result.errors[row, :, column]
    base, prediction = 100 * float(result.base[row, column]), 100 * float(result.prediction[row, column])
    top, others = _largest(np.abs(values), count)
    steps = [
        (result.groups[group].name, result.fields.texts[row][group], values[group], str(result.groups[group].kind))
        for group in top
    ]
    if len(others):
        steps.append((f"{len(others)} others", "", float(values[others].sum()), ""))
    data = pd.DataFrame(steps, columns=["player", "answer", "points", "kind"])
    data["end"] = base + data["points"].cumsum()
    data["start"] = data["end"] - data["points"]

    width = max(_LABEL, *(len(name) for name in data["player"]))
    labels = ["this image,\nother metadata" if result.reads_image else "other metadata"]
    labels += [_wrap_value(name, text, width) for name, text, *_ in steps]
    labels += ["with its own metadata"]
    lines = max(text.count("\n") + 1 for text in labels)
    figure, (axis,) = new_figure(0.65 + len(labels) * (0.12 + 0.125 * lines))

    def write(text: str, end: float, place: int, shift: float, **look: Any) -> None:
        style = {"textcoords": "offset points", "va": "center", "ha": "left" if shift > 0 else "right", **look}
        axis.annotate(text, (end, place), xytext=(shift, 0), **style)

    starts, ends = data["start"].to_numpy(), data["end"].to_numpy()
    for place, (start, end, kind) in enumerate(zip(starts, ends, data["kind"], strict=True), 1):
        colour = SECONDARY if end >= start else PRIMARY
        (bar,) = axis.barh(place, end - start, left=start, height=0.62, color=colour, edgecolor=PAPER, linewidth=0)
        bar.set_hatch(HATCH if kind == "missing" else "")
        write(number(end - start, "+.1f"), end, place, 3 if end >= start else -3, fontsize=7)
        axis.plot([start] * 2, [place - 1, place], color=INK, linewidth=0.6, zorder=1)
    last = len(data) + 1
    axis.plot([prediction] * 2, [last - 1, last], color=INK, linewidth=0.6, zorder=1)
    for place, value in ((0, base), (last, prediction)):
        axis.plot(value, place, marker="D", markersize=4, color=INK)
        # On the side where the figure has room.
        shift = 5 if value < (base + prediction) / 2 else -5
        write(f"{value:.1f} %", value, place, shift, fontsize=7.5, fontweight="bold")
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(last + 0.6, -0.6)
    low, high = min(*starts, *ends), max(*starts, *ends)
    span = max(high - low, 1.0)
    # Room for the numbers beside the bars; but there are no probabilities below 0 and above 100.
    left, right = low - 0.3 * span, high + 0.34 * span
    axis.set_xlim(left, right)
    axis.set_xticks([tick for tick in axis.get_xticks() if max(0, left) <= tick <= min(100, right)])
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"probability of {label}, %")
    caption = (
        f"SHAP values for {label} of image {image_id} (true class: {result.classes[result.labels[row]]}): from "
        f"{base:.1f} %, the mean {_given(result)} over {result.background} training rows, to {prediction:.1f} % with "
        f"its own metadata, in percentage points, good to about {2 * float(errors[top].max()):.1f} points."
    )
    moves = "; ".join(f"{name}{f' = {text}' if text else ''} {value:+.1f}" for name, text, value, _ in steps)
    name = f"shap_waterfall_{result.by}_{file_stem(image_id)}_{file_stem(label)}"
    alt = f"From {base:.1f} % to {prediction:.1f} %: {moves}."
    return ReportFigure(name, f"SHAP values of {image_id} for {label}", caption, alt, figure, data)


def scale_colours(amount: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scale to 0..1 from the 5th to the 95th percentile of what is known, or over all of it where these are one."""
    known = amount[~np.isnan(amount)].astype(float)
    if not len(known):
        return np.full(len(amount), np.nan)
    low, high = np.percentile(known, [5, 95])
    if low == high:
        low, high = known.min(), known.max()
    return np.clip((amount - low) / (high - low), 0, 1) if high > low else np.where(np.isnan(amount), np.nan, 0.5)


def _given(result: MetadataShap) -> str:
    return "given the image" if result.reads_image else "by the metadata alone"


def describe_shap(results: Sequence[MetadataShap]) -> list[str]:
    """Say once, for all figures of the same images, how the values were computed and what the signs mean."""
    first = results[0]
    images = f"{len(first.image_ids)} of {first.total_images} test images, each class in proportion, seed {first.seed}"
    if len(first.image_ids) == first.total_images:
        images = f"All {first.total_images} test images"
    orders = " and ".join(f"{one.permutations} random orders of the {one.by}s" for one in results)
    text = (
        f"{images}; estimates from {orders}; absent values are taken from {first.background} training rows. Colours of "
        "points: the value from low to high within its row; grey: categories without an order; hollow: not recorded, "
        "also where imputed."
    )
    if not any(group.kind == "missing" for group in first.groups):
        return [text]
    flags = "Hatched bars and diamonds are flags of which fields are missing, which can give away how a patient was"
    return [text, f"{flags} examined (on PAD-UFES-20, who was never biopsied)."]


def _wrap_value(name: str, value: str, width: int) -> str:
    """Break a label: first before the value."""
    text = f"{name} = {value}" if value else name
    if len(text) <= width:
        return text
    return "\n".join([f"{name} =", *textwrap.wrap(value, width)]) if value else textwrap.fill(text, width)
