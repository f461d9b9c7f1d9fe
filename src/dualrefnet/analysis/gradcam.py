"""Grad-CAM: which places of a photograph speak for a class (Selvaraju et al. 2017, with captum's `LayerGradCam`).

With A_k the K maps of an encoder's last layer and z the class's score, heat = ReLU(sum_k a_k A_k), where a_k is the
mean
of dz / dA_k over the places. The score is that of `Output.logits`: before the softmax, or, of methods that fuse
decisions,
the logarithm of the fused probability. The form is given along with the image, so the heat is that of this patient.

The layer is `Encoder.last_map`, the last one with places. Where the image vector is a class token (ViT, ConViT), which
the
last block makes beside that map, the layer is the first normalisation of the last block without the class token: all
that
the class token still learns of the places goes through it.

Heat tells where the evidence is that goes through that layer, not all of what a method knows: not the form, not what is
read
from maps further in (Visual's attention), nor, beside a class token, the last map where a method reads that too.
"""

# also: Does Grad-CAM look at the lesion? Measured on the test images that somebody has outlined, against a spot in the
# middle.
# also: Pictures of Grad-CAM: the heat laid over photographs, and how much of it lies in lesions.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dualrefnet.errors import DependencyError, RunError
from dualrefnet.models.base import Method
from dualrefnet.models.encoders import BACKBONES, Encoder

try:
    from captum.attr import LayerGradCam
except ImportError:
    raise DependencyError("Grad-CAM needs captum: pip install 'dualrefnet[explain]'") from None
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.analysis.opened_run import OpenedRun, sample_rows
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
    styled,
)
from dualrefnet.errors import DataError, DependencyError
from dualrefnet.evaluation.bootstrap import draw_counts, percentile_interval

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
except ImportError:
    raise DependencyError("pictures need matplotlib: pip install 'dualrefnet[report]'") from None


@dataclass(frozen=True)
class SaliencyMaps:
    """Grad-CAM of a batch.

    Attributes:
        heat: (B, S, S) float32, not negative, as large as the images. Of one encoder it is in units of the class's
            score;
            of several it is the mean over the encoders of heat / its maximum, in 0..1.
        maps: of each encoder (B, h, w) float32, not negative: the heat before it was enlarged. An encoder whose map is
            zero
            everywhere found nothing that speaks for the class.
    """

    heat: Tensor
    maps: tuple[Tensor, ...]

    @property
    def empty(self) -> Tensor:
        """(B,) True where the heat is zero everywhere: nothing in the image speaks for the class."""
        return self.heat.amax(dim=(1, 2)) == 0


def gradcam(model: Method, images: Tensor, metadata: Tensor, targets: Tensor) -> SaliencyMaps:
    """Return where images speak for a class.

    The model computes as in evaluation and is left as it was: modes, hooks, `requires_grad`, and no gradient on a
    parameter.

    Args:
        model: of any method that reads images.
        images: (B, 3, S, S), normalised for the first encoder.
        metadata: (B, M) encoded forms.
        targets: (B,) the class that each image is asked about.

    Raises:
        RunError: the method reads no image.
    """
    if not model.reads_image:
        raise RunError(f"{model.title} reads no image, so there is no Grad-CAM of it")
    # Detached: where an encoder does nothing at all, its map is the image itself, and captum would mark the caller's
    # tensor.
    images = images.detach()
    maps = []
    with _undisturbed(model):
        for encoder in model.encoders:
            assert isinstance(encoder, Encoder)
            with _watched(encoder, images.shape[-1]) as layer:
                grad_cam = LayerGradCam(lambda image, form: model(image, form).logits, layer)
                found = grad_cam.attribute(images, targets, additional_forward_args=(metadata,), relu_attributions=True)
            maps.append(found.detach().float()[:, 0])
    enlarged = [_enlarge(places, images.shape[-1]) for places in maps]
    heat = (
        enlarged[0]
        if len(enlarged) == 1
        else torch.stack([_share_of_maximum(places) for places in enlarged]).mean(dim=0)
    )
    return SaliencyMaps(heat, tuple(maps))


@contextmanager
def _undisturbed(model: Method) -> Iterator[None]:
    """Put a model into evaluation with no parameter that asks for a gradient, and bring all back afterwards.

    captum asks for the gradient of the layer alone; without those of the parameters nothing before it has to be kept.
    """
    modes = [(module, module.training) for module in model.modules()]
    wishes = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wishes:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wished in wishes:
            parameter.requires_grad_(wished)


@contextmanager
def _watched(encoder: Encoder, side: int) -> Iterator[nn.Module]:
    """Give the layer through which the places of images of that side pass as a map (B, D, h, w)."""
    if not BACKBONES[encoder.name].class_token:
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


def _enlarge(places: Tensor, side: int) -> Tensor:
    """Enlarge (B, h, w) bilinearly to (B, side, side)."""
    return functional.interpolate(places[:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def _share_of_maximum(heat: Tensor) -> Tensor:
    """Divide each of (B, S, S) by its maximum; zeros stay zero."""
    largest = heat.amax(dim=(1, 2), keepdim=True)
    return torch.where(largest > 0, heat / largest.where(largest > 0, torch.ones_like(largest)), 0.0)


BATCH = 16


LEVEL = 0.95


MEASURES = ("energy", "pointing")


ALL_IMAGES = "all images"


# Interpolation makes a plateau uneven by rounding: pixels so near to the maximum are maxima too.
_TIE = 1e-6


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Localisation:
    """How much of the heat lies in lesions.

    Attributes:
        table: one row an image: image_id, label, predicted; energy (NaN if there is no heat) and pointing of Grad-CAM;
            energy_baseline and pointing_baseline of the spot in the middle; area, the lesion's share of the picture.
        summary: one row a measure and class (of the label; first `all images`): class, measure; for Grad-CAM value,
            low, high; for
            the spot baseline, baseline_low, baseline_high; difference, difference_low, difference_high of the two; for
            even
            heat area, area_low, area_high; images, patients. All of a row are means over the same images. A bound is
            NaN
            if fewer than two patients are behind it.
        images: of the test side.
        with_mask: how many of them have a mask; the table has a stated sample of these.
        empty_masks: how many masks of the sample mark nothing; their images were left out.
        empty_heats: how many images of the table have no heat: without energy, and a miss in the pointing game.
        map_sides: side of the map that the heat was enlarged from, places, one an encoder: no more than that was
            measured.
        samples: of the bootstrap.
        seed: of the sample and of the bootstrap.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    images: int
    with_mask: int
    empty_masks: int
    empty_heats: int
    map_sides: tuple[int, ...]
    samples: int
    seed: int


def localise(
    opened: OpenedRun,
    masks: Path | None = None,
    images: int = 500,
    samples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Localisation:
    """Measure where Grad-CAM looks on test images that have a mask.

    Args:
        opened: a run of a method that reads images.
        masks: folder of `<image id>.png`; None: `masks` in the data set's folder.
        images: at most so many, each class in proportion; at least the number of classes.
        samples: bootstrap samples, drawn over patients.
        seed: of the choice of images and of the bootstrap.
        progress: called with (images done, images in all).

    Raises:
        RunError: the method reads no image.
        DataError: there are no masks, or none of the test images has one that marks a lesion.
        ImageError: a mask can't be read.
    """
    if not opened.model.reads_image:
        raise RunError(f"{opened.model.title} reads no image, so there is nothing to localise")
    files = find_masks(opened.dataset.root, masks)
    examples = opened.pictures("test")
    masked = np.flatnonzero([image_id in files for image_id in examples.image_ids])
    if not len(masked):
        raise DataError("none of the test images has a mask; masks are named <image id>.png")
    chosen = masked[sample_rows(examples.labels[masked], images, seed)]
    section, photographs = opened.recipe.image, opened.rows("test")["image_path"]
    parts: list[pd.DataFrame] = []
    for start in range(0, len(chosen), BATCH):
        places = chosen[start : start + BATCH]
        found: dict[int, NDArray[np.bool_]] = {}
        for place in places:
            mask = read_mask(files[examples.image_ids[place]], Path(photographs.iloc[place]), section.size, section.fit)
            if mask is not None:
                found[int(place)] = mask
        if found:
            parts.append(_measure(opened, examples, np.array(list(found)), np.stack(list(found.values()))))
        if progress:
            progress(min(start + BATCH, len(chosen)), len(chosen))
    if not parts:
        raise DataError(f"all masks of the {len(chosen)} test images that have one are empty: none marks a lesion")
    table = pd.concat(parts, ignore_index=True)
    patients = opened.groups.loc[table["image_id"]].to_numpy()
    summary = summarise(table, patients, opened.classes, samples, seed)
    empty_masks, empty_heats = len(chosen) - len(table), int(table["energy"].isna().sum())
    sides = tuple(section.size // cast(Encoder, encoder).stride for encoder in opened.model.encoders)
    return Localisation(table, summary, len(examples), len(masked), empty_masks, empty_heats, sides, samples, seed)


def energy_inside(heat: Floats, masks: NDArray[np.bool_]) -> Floats:
    """Return the share of heat (B, S, S), not negative, that lies in masks (B, S, S); (B,), NaN where there is no
    heat.
    """
    inside, total = (heat * masks).sum(axis=(1, 2)), heat.sum(axis=(1, 2))
    share: Floats = np.divide(inside, total, out=np.full(len(heat), np.nan), where=total > 0)
    return share


def pointing_game(heat: Floats, masks: NDArray[np.bool_]) -> Floats:
    """Return 1 where the maximum of the heat (B, S, S) lies in the mask (B, S, S), 0 where not, and 0 where there is no
    heat; (B,).

    Of several maxima the share in the mask counts: even heat has the lesion's share of the picture.
    """
    largest = heat.max(axis=(1, 2), keepdims=True)
    maxima = (heat >= largest * (1 - _TIE)) & (largest > 0)
    hits = (maxima & masks).sum(axis=(1, 2)).astype(np.float64)
    return np.asarray(hits / np.maximum(maxima.sum(axis=(1, 2)), 1))


def centred_gaussian(side: int) -> Floats:
    """Return heat (S, S) that looks at no picture: a round spot in the middle, sd a quarter of the side, 1 at its
    summit.
    """
    axis = np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (side / 4)) ** 2)
    spot = np.outer(axis, axis)
    return np.asarray(spot / spot.max())


def summarise(
    table: pd.DataFrame, patients: NDArray[np.object_], classes: tuple[str, ...], samples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Average the measures over all images and over those of each class, with percentile intervals from a bootstrap
    over patients.

    Args:
        table: `Localisation.table`.
        patients: (N,) of its images.
        classes: labels in their order; those without an image get no row.
        samples: of the bootstrap. A sample without any image of a class is left out for that class.
        seed: of the bootstrap.

    Returns:
        `Localisation.summary`.

    Raises:
        ValueError: `samples` is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    codes, names = pd.factorize(patients)
    times = np.concatenate(list(draw_counts(len(names), samples, seed)))
    present = [name for name in classes if (table["label"] == name).any()]
    rows = []
    for name in (ALL_IMAGES, *present):
        of_class = np.ones(len(table), dtype=bool) if name == ALL_IMAGES else (table["label"] == name).to_numpy()
        for measure in MEASURES:
            # A measure that is undefined leaves its image out of all means of the row, so that they stay comparable.
            used = of_class & table[measure].notna().to_numpy()
            value, baseline = table[measure].to_numpy()[used], table[f"{measure}_baseline"].to_numpy()[used]
            columns = {
                "value": value,
                "baseline": baseline,
                "difference": value - baseline,
                "area": table["area"].to_numpy()[used],
            }
            row: dict[str, object] = {"class": name, "measure": measure}
            for column, values in columns.items():
                low, high = _interval(values, codes[used], times)
                prefix = "" if column == "value" else f"{column}_"
                row |= {column: values.mean() if len(values) else np.nan, f"{prefix}low": low, f"{prefix}high": high}
            rows.append(row | {"images": int(used.sum()), "patients": len(np.unique(codes[used]))})
    return pd.DataFrame(rows)


def _measure(
    opened: OpenedRun, examples: Examples, places: NDArray[np.int64], masks: NDArray[np.bool_]
) -> pd.DataFrame:
    """Return the rows of `Localisation.table` for the examples at `places`, whose masks are (B, S, S)."""
    batch = examples.batch(places)
    images, metadata = opened.images(batch), batch.metadata.to(opened.device)
    assert images is not None
    with torch.inference_mode():
        predicted = opened.model(images, metadata).logits.argmax(dim=1)
    heat = gradcam(opened.model, images, metadata, predicted.clone()).heat.cpu().numpy().astype(np.float64)
    spot = np.broadcast_to(centred_gaussian(masks.shape[1]), masks.shape)
    return pd.DataFrame(
        {
            "image_id": [examples.image_ids[place] for place in places],
            "label": [opened.classes[index] for index in examples.labels[places]],
            "predicted": [opened.classes[index] for index in predicted.tolist()],
            "energy": energy_inside(heat, masks),
            "energy_baseline": energy_inside(spot, masks),
            "pointing": pointing_game(heat, masks),
            "pointing_baseline": pointing_game(spot, masks),
            "area": masks.mean(axis=(1, 2)),
        }
    )


def _interval(values: Floats, codes: NDArray[np.int64], times: Floats) -> tuple[float, float]:
    """Return the interval of the mean of (N,) values of the patients `codes`, which were drawn `times` (samples,
    patients).
    """
    if len(np.unique(codes)) < 2:
        return np.nan, np.nan
    sums = times @ np.bincount(codes, values, times.shape[1])
    counts = times @ np.bincount(codes, minlength=times.shape[1])
    means = np.divide(sums, counts, out=np.full(len(times), np.nan), where=counts > 0)
    return percentile_interval(means, LEVEL) or (np.nan, np.nan)


# How much of the photograph the hottest place hides; from half of the maximum on, all hide as much.
_COVER, _FULL_FROM = 0.65, 0.5


_GREY = 170


_BAR = 0.1  # inches, height of the scale


_LETTERS = 18


@dataclass(frozen=True)
class GradCamCase:
    """One image with its heat, as it is drawn.

    Attributes:
        title: names the image.
        image: (S, S, 3) uint8, as the model sees it.
        saliency: class -> (S, S) Grad-CAM of that class, not negative; of `predicted` and of `other` at least.
        probabilities: class -> probability, of the same classes.
        label: the true class.
        predicted: the most probable class.
        other: the class of the last column, such as the true one, or the second most probable one.
        mask: (S, S) True in the lesion; None: there is none.
    """

    title: str
    image: NDArray[np.uint8]
    saliency: Mapping[str, NDArray[np.float32]]
    probabilities: Mapping[str, float]
    label: str
    predicted: str
    other: str
    mask: NDArray[np.bool_] | None = None


def overlay(image: NDArray[np.uint8], saliency: NDArray[Any]) -> NDArray[np.uint8]:
    """Lay saliency over a image, in shares of its maximum; where it is low the skin stays visible.

    Args:
        image: (S, S, 3).
        saliency: (S, S), not negative; without any saliency the image stays as it is.

    Returns:
        (S, S, 3).

    Raises:
        ValueError: the shapes don't fit, or saliency is negative or not finite.
    """
    if saliency.shape != image.shape[:2]:
        raise ValueError(f"saliency {saliency.shape} doesn't fit a image {image.shape}")
    if not np.isfinite(saliency).all() or saliency.min() < 0:
        raise ValueError("saliency must be finite and not negative")
    largest = float(saliency.max())
    share = saliency.astype(np.float64) / largest if largest > 0 else np.zeros(saliency.shape)
    colour = 255 * colormaps[SALIENCY_CMAP](share)[..., :3]
    cover = _COVER * np.minimum(share / _FULL_FROM, 1)[..., None]
    return np.asarray(np.rint((1 - cover) * image + cover * colour), dtype=np.uint8)


@styled
def draw_gradcam(cases: Sequence[GradCamCase], choice: str, encoders: int = 1) -> ReportFigure:
    """Draw images beside the saliency of the predicted and of another class.

    Args:
        cases: one a row.
        choice: one sentence that says how they were chosen.
        encoders: how many image encoders the model has.
    """
    rows = len(cases)
    figure, axes = new_figure(rows * (WIDTH / 3 + 0.3) + 0.6, rows, 3)
    drawn: list[dict[str, Any]] = []
    for case, (plain, first, second) in zip(cases, zip(*[iter(axes)] * 3, strict=True), strict=True):
        _panel(plain, case.image, case.mask, f"{_short(case.title)}\ntrue: {_short(case.label, _LETTERS - 6)}")
        for axis, name, role in ((first, case.predicted, "predicted"), (second, case.other, "other")):
            said = "predicted" if name == case.predicted else "true" if name == case.label else "not predicted"
            heat = case.saliency[name]
            words = (
                f"{case.probabilities[name]:.0%}, {said}"
                if heat.max() > 0
                else f"{case.probabilities[name]:.0%}, no evidence"
            )
            _panel(axis, overlay(case.image, heat), case.mask, f"{_short(name)}\n{words}")
            drawn.append(
                {
                    "image": case.title,
                    "label": case.label,
                    "column": role,
                    "class": name,
                    "probability": case.probabilities[name],
                    "maximum": float(heat.max()),
                    "in_mask": np.nan
                    if case.mask is None or heat.max() <= 0
                    else float(heat[case.mask].sum() / heat.sum()),
                }
            )
    _scale(figure, axes)
    data = pd.DataFrame(drawn)
    sentences = [
        "Left the picture as the model sees it; beside it the places that speak for a class (Grad-CAM), with its probability.",
        "Glowing places speak for it most; where there is little, the picture shows through.",
        "Each map is in shares of its own maximum, so that two maps can't be compared in strength.",
    ]
    if encoders > 1:
        sentences.append(f"Shown is the mean of the maps of {encoders} encoders, each in shares of its maximum.")
    if any(case.mask is not None for case in cases):
        sentences.append("The white line is the lesion's outline, which the model doesn't see.")
    parts = []
    for row in drawn:
        inside = "" if np.isnan(row["in_mask"]) else f", {row['in_mask']:.0%} of the heat in the lesion"
        parts.append(f"{row['image']} (true {row['label']}): {row['class']} {row['probability']:.0%}{inside}")
    return ReportFigure(
        "gradcam", "Where the model looks", " ".join([*sentences, choice]), "; ".join(parts), figure, data
    )


@styled
def draw_localisation(result: Localisation) -> ReportFigure:
    """Draw how much of the heat lies in lesions, of all images and of each class, beside a spot in the middle and even
    heat.
    """
    names = list(dict.fromkeys(result.summary["class"]))
    figure, axes = new_figure(0.36 * len(names) + 1.15, 1, 2, sharey=True)
    series = (
        ("value", "", PRIMARY, "Grad-CAM"),
        ("baseline", "baseline_", SECONDARY, "spot in the middle"),
        ("area", "area_", COLOURS[6], "even heat"),
    )
    titles = {"energy": "heat in the lesion", "pointing": "hottest place in it"}
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        rows = result.summary[result.summary["measure"] == measure].set_index("class").loc[names]
        for number, (column, prefix, colour, words) in enumerate(series):
            places = np.arange(len(names)) + 0.24 * (number - 1)
            low, high = rows[f"{prefix}low"].to_numpy(), rows[f"{prefix}high"].to_numpy()
            axis.hlines(places, low, high, color=colour, linewidth=1.2)
            axis.plot(rows[column], places, MARKERS[number], color=colour, markersize=3.8, label=words)
        axis.set_title(title)
        axis.set_xlim(-0.03, 1.03)
        axis.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
        axis.grid(axis="y", visible=False)
        axis.axhline(0.5, color=COLOURS[6], linewidth=0.5)
    counts = result.summary[result.summary["measure"] == "pointing"].set_index("class")["images"]
    axes[0].set_yticks(range(len(names)), [f"{_short(name, 14)} ({counts[name]})" for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, columnspacing=1.0, handletextpad=0.2
    )
    return ReportFigure(
        "localisation", "Does Grad-CAM look at the lesion?", _caption(result), _alt(result), figure, result.summary
    )


def _panel(axis: Axes, picture: NDArray[np.uint8], mask: NDArray[np.bool_] | None, title: str) -> None:
    axis.imshow(picture, interpolation="none")
    axis.set_title(title, fontsize=7, fontweight="normal", loc="left")
    axis.set_axis_off()
    if mask is not None and mask.any() and not mask.all():
        line = axis.contour(mask.astype(float), [0.5], colors="#ffffff", linewidths=0.7)
        # White on light skin needs a dark edge.
        line.set_path_effects([withStroke(linewidth=1.7, foreground="#000000")])


def _scale(figure: Figure, axes: list[Axes]) -> None:
    """Add the one scale of all maps: what each share of the maximum makes of a plain grey."""
    strip = overlay(np.full((1, 256, 3), _GREY, dtype=np.uint8), np.linspace(0, 1, 256)[None])[0]
    colours = ListedColormap([tuple(colour / 255) for colour in strip])
    share = _BAR / figure.get_figheight()
    bar = figure.colorbar(
        ScalarMappable(cmap=colours), ax=axes, location="bottom", fraction=share, pad=share, aspect=WIDTH / _BAR
    )
    bar.set_ticks([0, 0.5, 1], labels=["little", "half of the maximum", "much"])
    bar.set_label("evidence for the class, share of the map's maximum")
    bar.outline.set_visible(False)


def _caption(result: Localisation) -> str:
    sides = " and ".join(dict.fromkeys(f"{side} x {side}" for side in result.map_sides))
    remarks = {
        f"Images left out with an empty mask: {result.empty_masks}.": result.empty_masks,
        f"Images without any heat, counted as missed: {result.empty_heats}.": result.empty_heats,
    }
    patients = result.summary.loc[result.summary["measure"] == "pointing", "patients"].iloc[0]
    sentences = [
        "How much of Grad-CAM's heat for the predicted class lies in the lesion, and how often its hottest place does, in "
        f"{len(result.table)} test images of {patients} patients (of {result.images} test images, {result.with_mask} have a mask; seed "
        f"{result.seed}) and in those of each true class (their number in brackets).",
        "Beside it stand a round spot in the middle, which ignores the picture, and even heat, which reaches the lesion's share of the "
        "picture; only what is beyond the spot comes of looking.",
        f"Lines are 95% intervals ({result.samples} bootstrap samples over patients); where few images agree they are too short.",
        f"The heat was enlarged from {sides} places.",
        *(remark for remark, count in remarks.items() if count),
    ]
    return " ".join(sentences)


def _alt(result: Localisation) -> str:
    titles = {"energy": "heat in the lesion", "pointing": "hottest place in it"}
    parts = []
    for row in result.summary.to_dict("records"):
        difference, low, high = (100 * row[column] for column in ("difference", "difference_low", "difference_high"))
        interval = "no interval" if np.isnan(low) else f"{low:+.0f} to {high:+.0f}"
        parts.append(
            f"{row['class']}, {titles[row['measure']]}: Grad-CAM {row['value']:.0%}, spot {row['baseline']:.0%}, "
            f"even heat {row['area']:.0%}, Grad-CAM less spot {difference:+.0f} points ({interval})"
        )
    return "; ".join(parts)


def _short(text: str, letters: int = _LETTERS) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
