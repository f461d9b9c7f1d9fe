"""Grad-CAM: which places of an image speak for a class (Selvaraju et al. 2017), and how much of it lies in the lesion.

With A_k the K maps of an encoder's last layer and z the class's score, saliency = ReLU(sum_k a_k A_k), where a_k is the
mean of dz / dA_k over the places. The score is that of `Output.logits`, given the metadata of this patient: before the
softmax, or, of methods that fuse decisions, the logarithm of the fused probability.

The layer is `Encoder.last_map`, the last one with places. Where the image vector is a class token (ViT, ConViT), which
the last block makes beside that map, it is the first normalisation of the last block without the class token: all that
the class token still learns of the places goes through it. What a method knows otherwise isn't in the map: metadata,
and maps further in (Visual's attention), nor, beside a class token, the last map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dualrefnet.analysis.opened_run import OpenedRun, in_batches, sample_rows
from dualrefnet.data.images import find_masks, read_mask
from dualrefnet.data.loader import Examples
from dualrefnet.display.figure import (
    COLOURS,
    MARKERS,
    PRIMARY,
    SALIENCY_CMAP,
    SECONDARY,
    WIDTH,
    ReportFigure,
    new_figure,
    show_image,
    styled,
    truncate,
)
from dualrefnet.display.format import interval
from dualrefnet.errors import DataError, DependencyError, RunError, install_hint
from dualrefnet.evaluation.bootstrap import Bootstrap, Estimate, images_of
from dualrefnet.models.base import Method
from dualrefnet.models.encoders import Encoder

try:
    from captum.attr import LayerGradCam
except ImportError:
    raise DependencyError(f"Grad-CAM needs captum: {install_hint('explain')}") from None

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dualrefnet.analysis.cases import ShownCase

Floats = NDArray[np.float64]
BATCH = 16
# Measure -> what it is called in the figure.
MEASURES = {"energy": "energy in lesion", "pointing": "pointing game"}
ALL_IMAGES = "all images"
# A map with fewer places a side says that something in a third of the image matters, not where the model looks.
FEWEST_PLACES = 6
# Means of the summary -> what their bounds are called before `low` and `high`.
COLUMNS = {"value": "", "baseline": "baseline_", "difference": "difference_", "area": "area_"}
# Interpolation makes a plateau uneven by rounding: pixels so near to the maximum are maxima too.
_TIE = 1e-6


class SaliencyMaps(NamedTuple):
    """Grad-CAM of a batch: `saliency` (B, S, S), and each encoder's map (B, h, w) before it was enlarged.

    Of one encoder it is in units of the class's score; of several the mean of saliency / its maximum, in 0..1.
    """

    saliency: Tensor
    maps: tuple[Tensor, ...]


def gradcam(model: Method, images: Tensor, metadata: Tensor, targets: Tensor) -> SaliencyMaps:
    """Return where images (B, 3, S, S) with metadata (B, M) speak for `targets` (B,); the model is left as it was."""
    if not model.reads_image:
        raise RunError(f"{model.title} reads no image, so there is no Grad-CAM of it")
    # Where an encoder does nothing at all, its map is the image itself, and captum would mark the caller's tensor.
    images = images.detach()
    side, maps = images.shape[-1], []
    with _frozen_evaluation(model):
        for encoder in model.encoders:
            assert isinstance(encoder, Encoder)
            with _target_layer(encoder, side) as layer:
                grad_cam = LayerGradCam(lambda image, values: model(image, values).logits, layer)
                values = grad_cam.attribute(
                    images, targets, additional_forward_args=(metadata,), relu_attributions=True
                )
            maps.append(values.detach().float()[:, 0])
    enlarged = [
        functional.interpolate(places[:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]
        for places in maps
    ]
    if len(enlarged) == 1:
        return SaliencyMaps(enlarged[0], tuple(maps))
    tiny = torch.finfo(torch.float32).tiny
    shares = [places / places.amax(dim=(1, 2), keepdim=True).clamp(min=tiny) for places in enlarged]
    return SaliencyMaps(torch.stack(shares).mean(dim=0), tuple(maps))


def map_sides(opened: OpenedRun) -> tuple[int, ...]:
    """Return the side of each encoder's map, in places: nothing finer can be seen."""
    size = opened.recipe.image.size
    return tuple(size // cast(Encoder, encoder).stride for encoder in opened.model.encoders)


def too_coarse(opened: OpenedRun) -> bool:
    return min(map_sides(opened)) < FEWEST_PLACES


@contextmanager
def _frozen_evaluation(model: Method) -> Iterator[None]:
    """Evaluate a model whose parameters ask for no gradient: captum asks for that of the layer alone."""
    modes = [(module, module.training) for module in model.modules()]
    # A map is that of the image as it is, not of its flipped copies.
    views = [(module, module.views) for module in model.modules() if isinstance(module, Method)]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for method, _ in views:
            method.views = 1
        for parameter, _ in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for method, number in views:
            method.views = number
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _target_layer(encoder: Encoder, side: int) -> Iterator[nn.Module]:
    """Give the layer through which the places of images of that side pass as a map (B, D, h, w)."""
    if not encoder.spec.class_token:
        yield encoder.last_map
        return
    layer, places = nn.Identity(), side // encoder.stride

    def lay_out(module: nn.Module, inputs: object, tokens: Tensor) -> Tensor:
        grid = tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, places, places)
        return torch.cat([tokens[:, :1], layer(grid).flatten(2).transpose(1, 2)], dim=1)

    hook = encoder.body.blocks[-1].norm1.register_forward_hook(lay_out)
    try:
        yield layer
    finally:
        hook.remove()


@dataclass(frozen=True)
class Localisation:
    """How much of the saliency lies in lesions, beside a centred Gaussian that looks at no image.

    `table` has a row an image (energy is NaN without saliency), `summary` one a measure and class with means over the
    same images: Grad-CAM, the Gaussian, their difference, and the lesion's area (uniform saliency).
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    # In the test split; how many of them have a mask, of which the table has a sample; masks of it that mark nothing.
    images: int
    with_mask: int
    empty_masks: int
    # Images without saliency: no energy, and a miss in the pointing game.
    empty_maps: int
    # Side of the map that was enlarged, in places, one an encoder: the resolution of the measurement.
    map_sides: tuple[int, ...]
    samples: int
    seed: int
    unit: str


def localise(
    opened: OpenedRun, masks: Path | None = None, images: int = 500, samples: int = 1000, seed: int = 0
) -> Localisation:
    """Measure where Grad-CAM of the predicted class looks on at most `images` test images that have a mask."""
    if not opened.model.reads_image:
        raise RunError(f"{opened.model.title} reads no image, so there is nothing to localise")
    files = find_masks(opened.dataset.root, masks)
    examples = opened.image_examples("test")
    masked = np.flatnonzero([image_id in files for image_id in examples.image_ids])
    if not len(masked):
        raise DataError("none of the test images has a mask; masks are named <image id>.png")
    chosen = masked[sample_rows(examples.labels[masked], images, seed)]
    section, paths = opened.recipe.image, opened.rows("test")["image_path"]
    parts: list[pd.DataFrame] = []
    for rows in in_batches(chosen, BATCH, "Grad-CAM and masks"):
        masks_of = {
            row: read_mask(files[examples.image_ids[row]], Path(paths.iloc[row]), section.size, section.fit)
            for row in rows
        }
        marked = {row: mask for row, mask in masks_of.items() if mask is not None}
        if marked:
            parts.append(_measure(opened, examples, np.array(list(marked)), np.stack(list(marked.values()))))
    if not parts:
        raise DataError(f"all masks of the {len(chosen)} test images that have one are empty: none marks a lesion")
    table = pd.concat(parts, ignore_index=True)
    return Localisation(
        table,
        summarise(table, opened.groups.loc[table["image_id"]].to_numpy(), opened.classes, samples, seed),
        images=len(examples),
        with_mask=len(masked),
        empty_masks=len(chosen) - len(table),
        empty_maps=int(table["energy"].isna().sum()),
        map_sides=map_sides(opened),
        samples=samples,
        seed=seed,
        unit=opened.dataset.schema.unit,
    )


def energy_inside(saliency: Floats, masks: NDArray[np.bool_]) -> Floats:
    """Return the share of saliency (B, S, S) that lies in masks (B, S, S), (B,); NaN where there is none."""
    inside, total = (saliency * masks).sum(axis=(1, 2)), saliency.sum(axis=(1, 2))
    share: Floats = np.divide(inside, total, out=np.full(len(saliency), np.nan), where=total > 0)
    return share


def pointing_game(saliency: Floats, masks: NDArray[np.bool_]) -> Floats:
    """Return (B,) 1 where the maximum of the saliency lies in the mask; of several maxima the share that does."""
    largest = saliency.max(axis=(1, 2), keepdims=True)
    maxima = (saliency >= largest * (1 - _TIE)) & (largest > 0)
    hits = (maxima & masks).sum(axis=(1, 2)).astype(np.float64)
    return np.asarray(hits / np.maximum(maxima.sum(axis=(1, 2)), 1))


def centred_gaussian(side: int) -> Floats:
    """Return saliency (S, S) that looks at no image: a Gaussian in the middle, sd a quarter of the side, maximum 1."""
    axis = np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (side / 4)) ** 2)
    spot = np.outer(axis, axis)
    return np.asarray(spot / spot.max())


def summarise(
    table: pd.DataFrame, patients: NDArray[np.object_], classes: tuple[str, ...], samples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return `Localisation.summary` of its `table`; a resample without any image of a class is left out for it."""
    rows: list[dict[str, object]] = []
    for name in (ALL_IMAGES, *(name for name in classes if (table["label"] == name).any())):
        of_class = np.ones(len(table), dtype=bool) if name == ALL_IMAGES else (table["label"] == name).to_numpy()
        for measure in MEASURES:
            # A measure that is undefined leaves its image out of all means of the row, so that they stay comparable.
            used = of_class & table[measure].notna().to_numpy()
            value, baseline = table[measure], table[f"{measure}_baseline"]
            values = pd.concat([value, baseline, value - baseline, table["area"]], axis=1)
            row: dict[str, object] = {"class": name, "measure": measure}
            behind = len(np.unique(patients[used]))
            estimates = [Estimate(mean) for mean in values[used].mean()]
            if behind > 1:
                included = np.tile(used[:, None], len(estimates))
                bootstrap = Bootstrap(patients, samples, seed)
                estimates = bootstrap.ratios(values, included, proportions=False)
            for (column, prefix), estimate in zip(COLUMNS.items(), estimates, strict=True):
                row |= {column: estimate.value, f"{prefix}low": estimate.low, f"{prefix}high": estimate.high}
            rows.append(row | {"images": int(used.sum()), "patients": behind})
    return pd.DataFrame(rows)


def _measure(opened: OpenedRun, examples: Examples, rows: NDArray[np.int64], masks: NDArray[np.bool_]) -> pd.DataFrame:
    """Return the rows of `Localisation.table` for the examples at `rows`, whose masks are (B, S, S)."""
    batch = examples.batch(rows)
    images, metadata = opened.images(batch), batch.metadata.to(opened.device)
    assert images is not None
    with torch.inference_mode():
        predicted = opened.model(images, metadata).logits.argmax(dim=1)
    saliency = gradcam(opened.model, images, metadata, predicted.clone()).saliency.cpu().numpy().astype(np.float64)
    spot = np.broadcast_to(centred_gaussian(masks.shape[1]), masks.shape)
    return pd.DataFrame(
        {
            "image_id": [examples.image_ids[row] for row in rows],
            "label": [opened.classes[index] for index in examples.labels[rows]],
            "predicted": [opened.classes[index] for index in predicted.tolist()],
            "energy": energy_inside(saliency, masks),
            "energy_baseline": energy_inside(spot, masks),
            "pointing": pointing_game(saliency, masks),
            "pointing_baseline": pointing_game(spot, masks),
            "area": masks.mean(axis=(1, 2)),
        }
    )


# Opacity at the maximum; from half of the maximum on it stays the same.
_OPACITY, _FULL_FROM = 0.65, 0.5
_GREY = 170
_BAR = 0.1  # inches, height of the scale
_LETTERS = 18


def overlay(image: NDArray[np.uint8], saliency: NDArray[Any]) -> NDArray[np.uint8]:
    """Blend saliency (S, S), divided by its maximum, over an image (S, S, 3): low saliency leaves the skin visible."""
    from matplotlib import colormaps

    largest = float(saliency.max())
    share = saliency.astype(np.float64) / largest if largest > 0 else np.zeros(saliency.shape)
    colour = 255 * colormaps[SALIENCY_CMAP](share)[..., :3]
    opacity = _OPACITY * np.minimum(share / _FULL_FROM, 1)[..., None]
    return np.asarray(np.rint((1 - opacity) * image + opacity * colour), dtype=np.uint8)


@styled
def draw_gradcam(cases: Sequence[ShownCase], choice: str, label: str | None = None, encoders: int = 1) -> ReportFigure:
    """Draw images, one a row, beside the saliency of the predicted and of another class (`label`, or the true one)."""
    rows = len(cases)
    figure, axes = new_figure(rows * (WIDTH / 3 + 0.3) + 0.6, rows, 3)
    drawn: list[dict[str, Any]] = []
    for case, (plain, *panels) in zip(cases, zip(*[iter(axes)] * 3, strict=True), strict=True):
        chosen = case.chosen
        true, predicted = chosen.label, chosen.predicted
        other = label or (true if true != predicted else chosen.second)
        title = f"{truncate(chosen.kind, _LETTERS)}\ntrue: {truncate(true, _LETTERS - 6)}"
        _show_with_outline(plain, case.image, case.mask, title)
        for axis, name, role in zip(panels, (predicted, other), ("predicted", "other"), strict=True):
            what = "predicted" if name == predicted else "true" if name == true else "not predicted"
            saliency, probability = case.saliency[name], chosen.probabilities[name]
            evident = saliency.max() > 0
            title = f"{truncate(name, _LETTERS)}\n{probability:.0%}, {what if evident else 'no evidence'}"
            _show_with_outline(axis, overlay(case.image, saliency), case.mask, title)
            known = case.mask is not None and evident
            drawn.append(
                {
                    "image": chosen.kind,
                    "label": true,
                    "column": role,
                    "class": name,
                    "probability": probability,
                    "maximum": float(saliency.max()),
                    "in_mask": float(saliency[case.mask].sum() / saliency.sum()) if known else np.nan,
                }
            )
    _draw_scale(figure, axes)
    caption = (
        "Left: the image as the model sees it; beside it Grad-CAM of two classes with their probabilities. Each map is "
        "divided by its own maximum, so the strength of two maps can't be compared."
    )
    if encoders > 1:
        caption += f" Shown is the mean over {encoders} encoders."
    if any(case.mask is not None for case in cases):
        caption += " White line: the lesion's outline, which the model doesn't see."
    parts = []
    for row in drawn:
        inside = "" if np.isnan(row["in_mask"]) else f", {row['in_mask']:.0%} of the saliency in the lesion"
        parts.append(f"{row['image']} (true {row['label']}): {row['class']} {row['probability']:.0%}{inside}")
    return ReportFigure("gradcam", "Grad-CAM", f"{caption} {choice}", "; ".join(parts), figure, pd.DataFrame(drawn))


def _show_with_outline(axis: Axes, image: NDArray[np.uint8], mask: NDArray[np.bool_] | None, title: str) -> None:
    from matplotlib.patheffects import withStroke

    show_image(axis, image, title)
    if mask is not None and mask.any() and not mask.all():
        line = axis.contour(mask.astype(float), [0.5], colors="#ffffff", linewidths=0.7)
        # White on light skin needs a dark edge.
        line.set_path_effects([withStroke(linewidth=1.7, foreground="#000000")])


def _draw_scale(figure: Figure, axes: list[Axes]) -> None:
    """Add the one scale of all maps: what each share of the maximum makes of a plain grey."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    strip = overlay(np.full((1, 256, 3), _GREY, dtype=np.uint8), np.linspace(0, 1, 256)[None])[0]
    colours = ScalarMappable(cmap=ListedColormap([tuple(colour / 255) for colour in strip]))
    share = _BAR / figure.get_figheight()
    bar = figure.colorbar(colours, ax=axes, location="bottom", fraction=share, pad=share, aspect=WIDTH / _BAR)
    bar.set_ticks([0, 0.5, 1], labels=["none", "half of the maximum", "maximum"])
    bar.set_label("evidence for the class")
    bar.outline.set_visible(False)


@styled
def draw_localisation(result: Localisation) -> ReportFigure:
    """Draw how much of the saliency lies in lesions, of all images and of each class, beside the two baselines."""
    summary = result.summary
    names = list(dict.fromkeys(summary["class"]))
    figure, axes = new_figure(0.36 * len(names) + 1.15, 1, 2, sharey=True)
    series = (
        ("value", PRIMARY, "Grad-CAM"),
        ("baseline", SECONDARY, "centred Gaussian"),
        ("area", COLOURS[6], "uniform"),
    )
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        rows = summary[summary["measure"] == measure].set_index("class").loc[names]
        for place, (column, colour, label) in enumerate(series):
            heights = np.arange(len(names)) + 0.24 * (place - 1)
            axis.hlines(heights, rows[f"{COLUMNS[column]}low"], rows[f"{COLUMNS[column]}high"], colour, linewidth=1.2)
            axis.plot(rows[column], heights, MARKERS[place], color=colour, markersize=3.8, label=label)
        axis.set_title(title)
        axis.set_xlim(-0.03, 1.03)
        axis.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
        axis.grid(axis="y", visible=False)
        axis.axhline(0.5, color=COLOURS[6], linewidth=0.5)
    pointing = summary[summary["measure"] == "pointing"].set_index("class")
    axes[0].set_yticks(range(len(names)), [f"{truncate(name, 14)} ({pointing['images'][name]})" for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=3, columnspacing=1.0, handletextpad=0.2)
    sides = " and ".join(dict.fromkeys(f"{side} x {side}" for side in result.map_sides))
    caption = (
        f"Share of the saliency for the predicted class that lies in the lesion, and how often its maximum does, in "
        f"{images_of(len(result.table), pointing['patients'].iloc[0], result.unit)} (of {result.images} test "
        f"images, {result.with_mask} have a mask; seed {result.seed}) and by true class (images in brackets). The "
        "centred Gaussian and the uniform map look at no image. Lines: 95% intervals "
        f"({result.samples} bootstrap samples over {result.unit}s). The maps were enlarged from {sides} places."
    )
    if result.empty_masks:
        caption += f" Images left out with an empty mask: {result.empty_masks}."
    if result.empty_maps:
        caption += f" Images without saliency, counted as missed: {result.empty_maps}."
    parts = []
    for row in summary.to_dict("records"):
        bounds = interval(row["difference_low"], row["difference_high"], "+.0%") or "no interval"
        parts.append(
            f"{row['class']}, {MEASURES[row['measure']]}: Grad-CAM {row['value']:.0%}, Gaussian {row['baseline']:.0%}, "
            f"uniform {row['area']:.0%}, Grad-CAM less Gaussian {row['difference']:+.0%} {bounds}"
        )
    return ReportFigure("localisation", "Grad-CAM and the lesion", caption, "; ".join(parts), figure, summary)
