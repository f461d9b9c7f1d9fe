"""Pictures of the auxiliary task: input, target and reconstruction, and their likeness over the epochs."""

from __future__ import annotations

import pandas as pd
from matplotlib.ticker import MaxNLocator

from dualrefnet.explain.reconstruction import Reconstruction
from dualrefnet.figures.picture import INK, PRIMARY, SECONDARY, WIDTH, Picture, new_figure, styled

TARGETS = {
    "bilinear": "the input itself, enlarged bilinearly",
    "bicubic": "the input itself, enlarged bicubically",
    "native": "the photograph at twice the input's side",
}


@styled
def draw_reconstruction(result: Reconstruction) -> Picture:
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
    return Picture("reconstruction", "What the auxiliary decoder rebuilds", caption, alt, figure, result.table)


@styled
def draw_reconstruction_history(history: pd.DataFrame) -> Picture:
    """Draw PSNR and SSIM of the first validation images over the epochs.

    Args:
        history: of the run, with the columns `val_psnr` and `val_ssim`.
    """
    figure, axes = new_figure(1.9, 1, 2)
    for axis, column, label, colour in zip(axes, ("val_psnr", "val_ssim"), ("PSNR, dB", "SSIM"), (PRIMARY, SECONDARY), strict=True):
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
    words = [f"{name} from {first[column]:.3g} to {last[column]:.3g}" for name, column in (("PSNR", "val_psnr"), ("SSIM", "val_ssim"))]
    caption = (
        "How near the rebuilt pictures come to their targets after each epoch: the mean over the first validation images (at most 32), "
        "without augmentation. Higher is better."
    )
    data = history[["epoch", "val_psnr", "val_ssim"]]
    return Picture("reconstruction_history", "The auxiliary task over the epochs", caption, ", ".join(words), figure, data)
