"""The auxiliary task made visible: what goes in, what is asked for, what the decoder rebuilds, and how near that
comes.
"""

# also: Pictures of the auxiliary task: input, target and reconstruction, and their likeness over the epochs.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dualrefnet.analysis.opened_run import OpenedRun, sample_rows
from dualrefnet.data.loader import Examples
from dualrefnet.display.figure import INK, PRIMARY, SECONDARY, WIDTH, ReportFigure, new_figure, styled
from dualrefnet.errors import RunError
from dualrefnet.models.inference import normalise
from dualrefnet.models.superresolution import fill_targets, input_and_target, psnr, ssim

BATCH = 16


@dataclass(frozen=True)
class ReconstructedImage:
    """One image of the auxiliary task; the pictures are uint8.

    Attributes:
        image_id: its id.
        picture: (S, S, 3), what the encoder reads.
        target: (2S, 2S, 3), what is to be rebuilt.
        reconstruction: (2S, 2S, 3), what the decoder makes.
        measures: `psnr` in dB and `ssim` of the reconstruction; `psnr_flat` and `ssim_flat` of an area of the target's
            mean
            colour, which shows nothing.
    """

    image_id: str
    picture: NDArray[np.uint8]
    target: NDArray[np.uint8]
    reconstruction: NDArray[np.uint8]
    measures: dict[str, float]


@dataclass(frozen=True)
class Reconstruction:
    """How well test images are rebuilt.

    Attributes:
        table: image_id and the measures of `Rebuilt`, one row an image of the sample.
        shown: images at equal steps of rank by PSNR, from a tenth of the way up (badly rebuilt) to nine tenths (well).
        images: on the test side; the table has a sample of them.
        kind: of the target (`model.target`).
    """

    table: pd.DataFrame
    shown: tuple[ReconstructedImage, ...]
    images: int
    kind: str


def reconstruct(
    opened: OpenedRun,
    images: int = 200,
    show: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Rebuild test images and measure them.

    Args:
        opened: a run with the auxiliary task.
        images: at most so many, each class in proportion.
        show: how many to give back as pictures.
        seed: of the choice.
        progress: called with (images done, images in all).

    Raises:
        RunError: the run has no decoder.
    """
    recipe = opened.recipe
    if not recipe.rebuilds_image or opened.store is None:
        raise RunError(f"{opened.run.path} was trained without the auxiliary task: there is no reconstruction to show")
    targets, _ = fill_targets(recipe, opened.store, opened.device)
    examples = replace(opened.pictures("test"), targets=targets)
    chosen = sample_rows(examples.labels, images, seed)
    rows = []
    for start in range(0, len(chosen), BATCH):
        rows += [
            {"image_id": case.image_id, **case.measures}
            for case in _rebuild(opened, examples, chosen[start : start + BATCH])
        ]
        if progress:
            progress(min(start + BATCH, len(chosen)), len(chosen))
    table = pd.DataFrame(rows)
    # By rank, not by looks: bad, middling and good ones alike.
    steps = np.linspace(0.1, 0.9, show) * (len(chosen) - 1)
    places = np.argsort(table["psnr"].to_numpy(), kind="stable")[steps.round().astype(int)]
    return Reconstruction(table, tuple(_rebuild(opened, examples, chosen[places])), len(examples), recipe.model.target)


@torch.inference_mode()
def _rebuild(opened: OpenedRun, examples: Examples, rows: NDArray[np.int64]) -> list[ReconstructedImage]:
    batch = examples.batch(rows)
    assert batch.images is not None
    full = batch.images.to(opened.device).contiguous().float().div(255)
    stored = None if batch.targets is None else batch.targets.to(opened.device).contiguous().float().div(255)
    picture, target = input_and_target(full, stored, opened.recipe.model.target, opened.recipe.image.size)
    rebuilt = opened.model.reconstruct(normalise(picture, opened.normalisation))
    assert rebuilt is not None
    assert target is not None
    rebuilt = rebuilt.float().clamp(0, 1)
    flat = target.mean(dim=(2, 3), keepdim=True).expand_as(target)
    measures = {
        "psnr": psnr(rebuilt, target),
        "ssim": ssim(rebuilt, target),
        "psnr_flat": psnr(flat, target),
        "ssim_flat": ssim(flat, target),
    }
    pictures, targets, rebuilts = (
        (255 * part).round().byte().permute(0, 2, 3, 1).cpu().numpy() for part in (picture, target, rebuilt)
    )
    return [
        ReconstructedImage(
            examples.image_ids[row],
            pictures[place],
            targets[place],
            rebuilts[place],
            {name: float(values[place]) for name, values in measures.items()},
        )
        for place, row in enumerate(rows)
    ]


TARGETS = {
    "bilinear": "the input itself, enlarged bilinearly",
    "bicubic": "the input itself, enlarged bicubically",
    "native": "the photograph at twice the input's side",
}


@styled
def draw_reconstruction(result: Reconstruction) -> ReportFigure:
    """Draw input, target and reconstruction of some test images, from badly to well rebuilt ones."""
    rows = len(result.shown)
    figure, axes = new_figure(0.25 + rows * (WIDTH / 3 + 0.22), rows, 3)
    for row, case in enumerate(result.shown):
        parts = (case.picture, case.target, case.reconstruction)
        titles = (
            f"input, {case.picture.shape[0]} px",
            f"target, {case.target.shape[0]} px",
            f"rebuilt, {case.measures['psnr']:.1f} dB",
        )
        for axis, part, title in zip(axes[3 * row : 3 * row + 3], parts, titles, strict=True):
            axis.imshow(part, interpolation="none")
            axis.set_title(title, fontsize=7, fontweight="normal")
            axis.set_axis_off()
    mean = result.table[["psnr", "ssim", "psnr_flat", "ssim_flat"]].mean()
    target = TARGETS.get(result.kind, f"made from the input by the network {result.kind}")
    caption = (
        f"The decoder must rebuild a picture of twice the input's side; here the target is {target}. Shown are images at equal "
        f"steps of rank, from badly to well rebuilt, of {len(result.table)} of {result.images} test images, with PSNR in dB and SSIM (1: "
        "equal). "
        f"Mean PSNR {mean['psnr']:.1f} dB, SSIM {mean['ssim']:.2f}; a plain area of the target's mean colour reaches "
        f"{mean['psnr_flat']:.1f} dB and {mean['ssim_flat']:.2f}."
    )
    alt = "; ".join(
        f"image {number}: PSNR {case.measures['psnr']:.1f} dB, SSIM {case.measures['ssim']:.2f}"
        for number, case in enumerate(result.shown, 1)
    )
    return ReportFigure("reconstruction", "What the auxiliary decoder rebuilds", caption, alt, figure, result.table)


@styled
def draw_reconstruction_history(history: pd.DataFrame) -> ReportFigure:
    """Draw PSNR and SSIM of the first validation images over the epochs.

    Args:
        history: of the run, with the columns `val_psnr` and `val_ssim`.
    """
    figure, axes = new_figure(1.9, 1, 2)
    for axis, column, label, colour in zip(
        axes, ("val_psnr", "val_ssim"), ("PSNR, dB", "SSIM"), (PRIMARY, SECONDARY), strict=True
    ):
        axis.plot(history["epoch"], history[column], color=colour, marker="o", markersize=2.5)
        axis.set_title(label)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        last = history.iloc[-1]
        axis.annotate(
            f"{last[column]:.3g}",
            (last["epoch"], last[column]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            color=INK,
            fontsize=7.5,
        )
    first, last = history.iloc[0], history.iloc[-1]
    words = [
        f"{name} from {first[column]:.3g} to {last[column]:.3g}"
        for name, column in (("PSNR", "val_psnr"), ("SSIM", "val_ssim"))
    ]
    caption = (
        "How near the rebuilt pictures come to their targets after each epoch: the mean over the first validation images (at most 32), "
        "without augmentation. Higher is better."
    )
    data = history[["epoch", "val_psnr", "val_ssim"]]
    return ReportFigure(
        "reconstruction_history", "The auxiliary task over the epochs", caption, ", ".join(words), figure, data
    )
