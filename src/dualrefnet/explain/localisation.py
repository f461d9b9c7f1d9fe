"""Does Grad-CAM look at the lesion? Measured on the test images that somebody has outlined, against a spot in the middle.

Two measures an image, of the heat of the predicted class:

- energy: the share of all heat that lies in the lesion;
- pointing game (Zhang et al. 2018): does the hottest place lie in the lesion?

Photographs are taken with the lesion in the middle, so heat that ignores the picture does well too. A round Gaussian spot in
the middle of the picture (sd a quarter of the side) is therefore measured beside, and the difference of the two tells what
looking at the picture adds. Even heat would reach the lesion's share of the picture in both measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dualrefnet.data.loader import Examples
from dualrefnet.data.masks import find_masks, read_mask
from dualrefnet.errors import DataError, RunError
from dualrefnet.evaluation.intervals import draw_counts, percentile_interval
from dualrefnet.evaluation.opened_run import OpenedRun, sample_rows
from dualrefnet.explain.gradcam import gradcam
from dualrefnet.models.backbones import Encoder

BATCH = 16
LEVEL = 0.95
MEASURES = ("energy", "pointing")
ALL = "all images"
# Interpolation makes a plateau uneven by rounding: pixels so near to the maximum are maxima too.
_TIE = 1e-6

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Localisation:
    """How much of the heat lies in lesions.

    Attributes:
        table: one row an image: image_id, label, predicted; energy (NaN if there is no heat) and pointing of Grad-CAM;
            energy_baseline and pointing_baseline of the spot in the middle; area, the lesion's share of the picture.
        summary: one row a measure and class (of the label; first `all images`): class, measure; for Grad-CAM value, low, high; for
            the spot baseline, baseline_low, baseline_high; difference, difference_low, difference_high of the two; for even
            heat area, area_low, area_high; images, patients. All of a row are means over the same images. A bound is NaN
            if fewer than two patients are behind it.
        images: of the test side.
        with_mask: how many of them have a mask; the table has a stated sample of these.
        empty_masks: how many masks of the sample mark nothing; their images were left out.
        empty_heats: how many images of the table have no heat: without energy, and a miss in the pointing game.
        map_sides: side of the map that the heat was enlarged from, places, one an encoder: no more than that was measured.
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
    """Return the share of heat (B, S, S), not negative, that lies in masks (B, S, S); (B,), NaN where there is no heat."""
    inside, total = (heat * masks).sum(axis=(1, 2)), heat.sum(axis=(1, 2))
    share: Floats = np.divide(inside, total, out=np.full(len(heat), np.nan), where=total > 0)
    return share


def pointing_game(heat: Floats, masks: NDArray[np.bool_]) -> Floats:
    """Return 1 where the maximum of the heat (B, S, S) lies in the mask (B, S, S), 0 where not, and 0 where there is no heat; (B,).

    Of several maxima the share in the mask counts: even heat has the lesion's share of the picture.
    """
    largest = heat.max(axis=(1, 2), keepdims=True)
    maxima = (heat >= largest * (1 - _TIE)) & (largest > 0)
    hits = (maxima & masks).sum(axis=(1, 2)).astype(np.float64)
    return np.asarray(hits / np.maximum(maxima.sum(axis=(1, 2)), 1))


def centred_gaussian(side: int) -> Floats:
    """Return heat (S, S) that looks at no picture: a round spot in the middle, sd a quarter of the side, 1 at its summit."""
    axis = np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (side / 4)) ** 2)
    spot = np.outer(axis, axis)
    return np.asarray(spot / spot.max())


def summarise(
    table: pd.DataFrame, patients: NDArray[np.object_], classes: tuple[str, ...], samples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Average the measures over all images and over those of each class, with percentile intervals from a bootstrap over patients.

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
    for name in (ALL, *present):
        of_class = np.ones(len(table), dtype=bool) if name == ALL else (table["label"] == name).to_numpy()
        for measure in MEASURES:
            # A measure that is undefined leaves its image out of all means of the row, so that they stay comparable.
            used = of_class & table[measure].notna().to_numpy()
            value, baseline = table[measure].to_numpy()[used], table[f"{measure}_baseline"].to_numpy()[used]
            columns = {"value": value, "baseline": baseline, "difference": value - baseline, "area": table["area"].to_numpy()[used]}
            row: dict[str, object] = {"class": name, "measure": measure}
            for column, values in columns.items():
                low, high = _interval(values, codes[used], times)
                prefix = "" if column == "value" else f"{column}_"
                row |= {column: values.mean() if len(values) else np.nan, f"{prefix}low": low, f"{prefix}high": high}
            rows.append(row | {"images": int(used.sum()), "patients": len(np.unique(codes[used]))})
    return pd.DataFrame(rows)


def _measure(opened: OpenedRun, examples: Examples, places: NDArray[np.int64], masks: NDArray[np.bool_]) -> pd.DataFrame:
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
    """Return the interval of the mean of (N,) values of the patients `codes`, which were drawn `times` (samples, patients)."""
    if len(np.unique(codes)) < 2:
        return np.nan, np.nan
    sums = times @ np.bincount(codes, values, times.shape[1])
    counts = times @ np.bincount(codes, minlength=times.shape[1])
    means = np.divide(sums, counts, out=np.full(len(times), np.nan), where=counts > 0)
    return percentile_interval(means, LEVEL) or (np.nan, np.nan)
