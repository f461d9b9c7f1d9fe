"""Super-resolution, the auxiliary task: input, target and reconstruction of test images, and PSNR and SSIM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dualrefnet.analysis.opened_run import OpenedRun, in_batches, sample_rows
from dualrefnet.data.loader import Examples
from dualrefnet.display.figure import INK, PRIMARY, SECONDARY, WIDTH, ReportFigure, new_figure, show_image, styled
from dualrefnet.errors import RunError
from dualrefnet.models.inference import normalise
from dualrefnet.models.superresolution import fill_targets, input_and_target, psnr, ssim

BATCH = 16
TARGETS = {
    "bilinear": "the input itself, enlarged bilinearly",
    "bicubic": "the input itself, enlarged bicubically",
    "native": "the image at twice the input's side",
}


@dataclass(frozen=True)
class ReconstructedImage:
    """An image, its target and its reconstruction, with PSNR and SSIM, also of the target's mean colour."""

    image_id: str
    image: NDArray[np.uint8]
    target: NDArray[np.uint8]
    reconstruction: NDArray[np.uint8]
    measures: dict[str, float]


@dataclass(frozen=True)
class Reconstruction:
    """Measures of a sample of test images, and some `shown` at equal steps of rank by PSNR."""

    table: pd.DataFrame
    shown: tuple[ReconstructedImage, ...]
    images: int
    kind: str


def reconstruct(opened: OpenedRun, images: int = 200, show: int = 3, seed: int = 0) -> Reconstruction:
    """Reconstruct and measure at most `images` test images, each class in proportion."""
    recipe = opened.recipe
    if not recipe.rebuilds_image or opened.store is None:
        raise RunError(f"{opened.run.path} was trained without the auxiliary task: there is no reconstruction to show")
    targets, _ = fill_targets(recipe, opened.store, opened.device)
    examples = replace(opened.image_examples("test"), targets=targets)
    chosen = sample_rows(examples.labels, images, seed)
    rows = []
    for some in in_batches(chosen, BATCH, "super-resolution"):
        rows += [{"image_id": case.image_id, **case.measures} for case in _reconstruct(opened, examples, some)]
    table = pd.DataFrame(rows)
    # By rank: bad, middling and good ones alike.
    steps = np.linspace(0.1, 0.9, show) * (len(chosen) - 1)
    places = np.argsort(table["psnr"].to_numpy(), kind="stable")[steps.round().astype(int)]
    shown = tuple(_reconstruct(opened, examples, chosen[places]))
    return Reconstruction(table, shown, len(examples), recipe.model.target)


@torch.inference_mode()
def _reconstruct(opened: OpenedRun, examples: Examples, rows: NDArray[np.int64]) -> list[ReconstructedImage]:
    batch = examples.batch(rows)
    assert batch.images is not None
    full = batch.images.to(opened.device).contiguous().float().div(255)
    stored = None if batch.targets is None else batch.targets.to(opened.device).contiguous().float().div(255)
    image, target = input_and_target(full, stored, opened.recipe.model.target, opened.recipe.image.size)
    output = opened.model.reconstruct(normalise(image, opened.normalisation))
    assert output is not None
    assert target is not None
    output = output.float().clamp(0, 1)
    flat = target.mean(dim=(2, 3), keepdim=True).expand_as(target)
    measures = {
        "psnr": psnr(output, target),
        "ssim": ssim(output, target),
        "psnr_flat": psnr(flat, target),
        "ssim_flat": ssim(flat, target),
    }
    images, targets, outputs = (
        (255 * part).round().byte().permute(0, 2, 3, 1).cpu().numpy() for part in (image, target, output)
    )
    return [
        ReconstructedImage(
            examples.image_ids[row],
            images[place],
            targets[place],
            outputs[place],
            {name: float(values[place]) for name, values in measures.items()},
        )
        for place, row in enumerate(rows)
    ]


@styled
def draw_reconstruction(result: Reconstruction) -> ReportFigure:
    """Draw input, target and reconstruction of some test images, the worst first."""
    rows = len(result.shown)
    figure, axes = new_figure(0.25 + rows * (WIDTH / 3 + 0.22), rows, 3)
    for row, case in enumerate(result.shown):
        first, second, third = axes[3 * row : 3 * row + 3]
        show_image(first, case.image, f"input, {case.image.shape[0]} px")
        show_image(second, case.target, f"target, {case.target.shape[0]} px")
        show_image(third, case.reconstruction, f"output, {case.measures['psnr']:.1f} dB")
    mean = result.table[["psnr", "ssim", "psnr_flat", "ssim_flat"]].mean()
    target = TARGETS.get(result.kind, f"made from the input by the network {result.kind}")
    caption = (
        f"The decoder reconstructs an image of twice the input's side; the target is {target}. Shown are images at "
        f"equal steps of rank by PSNR, of {len(result.table)} of {result.images} test images. Mean PSNR "
        f"{mean['psnr']:.1f} dB, SSIM {mean['ssim']:.2f}; a uniform area of the target's mean colour reaches "
        f"{mean['psnr_flat']:.1f} dB and {mean['ssim_flat']:.2f}."
    )
    alt = "; ".join(
        f"image {number}: PSNR {case.measures['psnr']:.1f} dB, SSIM {case.measures['ssim']:.2f}"
        for number, case in enumerate(result.shown, 1)
    )
    return ReportFigure("reconstruction", "Super-resolution", caption, alt, figure, result.table)


@styled
def draw_reconstruction_history(history: pd.DataFrame) -> ReportFigure:
    """Draw the columns `val_psnr` and `val_ssim` of a run's history over the epochs."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(1.9, 1, 2)
    first, last, alt = history.iloc[0], history.iloc[-1], []
    series = (("val_psnr", "PSNR, dB", PRIMARY), ("val_ssim", "SSIM", SECONDARY))
    for axis, (column, label, colour) in zip(axes, series, strict=True):
        axis.plot(history["epoch"], history[column], color=colour, marker="o", markersize=2.5)
        axis.set_title(label)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        end = (last["epoch"], last[column])
        style: Any = {"textcoords": "offset points", "ha": "right", "color": INK, "fontsize": 7.5}
        axis.annotate(f"{last[column]:.3g}", end, xytext=(0, 5), **style)
        alt.append(f"{label.split(',')[0]} from {first[column]:.3g} to {last[column]:.3g}")
    caption = (
        "PSNR and SSIM of the reconstructions after each epoch: the mean over the first validation images (at most "
        "32), without augmentation. Higher is better."
    )
    data = history[["epoch", "val_psnr", "val_ssim"]]
    title = "Super-resolution over the epochs"
    return ReportFigure("reconstruction_history", title, caption, ", ".join(alt), figure, data)
