"""Augmentation of whole batches, on the device that trains.

Drawing the random numbers is apart from applying them: `draw` makes a table with one row an image from (seed, epoch), so
an image is cropped, turned and shaded in the same way whichever process or batch it falls into, and that can be
replayed; the noise itself is drawn on the device, from torch's generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dualrefnet.recipe import AugmentationSection


@dataclass(frozen=True)
class AugmentationDraw:
    """Random choices for N images.

    Attributes:
        geometry: (N, 2, 3) affine map from output to input coordinates, both -1..1 (as in `affine_grid`).
        photometry: (N, 4) factors of brightness, contrast and saturation, and the sd of the noise.
    """

    geometry: Tensor
    photometry: Tensor

    def of(self, rows: NDArray[np.int64]) -> AugmentationDraw:
        """Return the draws of some images."""
        index = torch.from_numpy(rows)
        return AugmentationDraw(self.geometry[index], self.photometry[index])


def draw(count: int, section: AugmentationSection, seed: int, epoch: int) -> AugmentationDraw:
    """Draw the choices for `count` images of one epoch."""
    # Each choice has its own stream, so changing one setting leaves the other choices as they were.
    streams = [np.random.default_rng([seed, epoch, number]) for number in range(9)]
    uniform = [stream.random(count) for stream in streams]
    flip_x = np.where(uniform[0] < section.horizontal_flip, -1.0, 1.0)
    flip_y = np.where(uniform[1] < section.vertical_flip, -1.0, 1.0)
    low, high = section.scale
    scale = low + (high - low) * uniform[2]
    angle = np.deg2rad(section.rotation) * (2 * uniform[3] - 1)
    # The crop stays inside the image: its centre moves by at most what the scale leaves free.
    shift_x, shift_y = ((1 - scale) * (2 * u - 1) for u in uniform[4:6])
    cosine, sine = np.cos(angle) * scale, np.sin(angle) * scale
    rows = [[cosine * flip_x, -sine * flip_y, shift_x], [sine * flip_x, cosine * flip_y, shift_y]]
    geometry = np.stack([np.stack(row, axis=-1) for row in rows], axis=1)
    strengths = (section.brightness, section.contrast, section.saturation)
    factors = [1 + strength * (2 * u - 1) for strength, u in zip(strengths, uniform[6:9], strict=True)]
    noise = section.noise * np.random.default_rng([seed, epoch, 9]).random(count)
    photometry = np.stack([*factors, noise], axis=1)
    return AugmentationDraw(torch.from_numpy(geometry).float(), torch.from_numpy(photometry).float())


def warp(images: Tensor, geometry: Tensor) -> Tensor:
    """Apply the geometric part.

    Args:
        images: (B, 3, H, W).
        geometry: (B, 2, 3).

    Returns:
        (B, 3, H, W); beyond the border the image is mirrored.
    """
    grid = functional.affine_grid(geometry, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def shade(images: Tensor, photometry: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Apply the photometric part: brightness, contrast, saturation, noise.

    Args:
        images: (B, 3, H, W) in 0..1.
        photometry: (B, 4), see `AugmentationDraw`.
        generator: draws the noise; None: torch's global one.

    Returns:
        (B, 3, H, W) in 0..1.
    """
    brightness, contrast, saturation, sd = (photometry[:, k].view(-1, 1, 1, 1) for k in range(4))
    images = images * brightness
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    # Luma weights of ITU-R BT.601.
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    grey = (images * weights).sum(dim=1, keepdim=True)
    images = grey + (images - grey) * saturation
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return (images + noise * sd).clamp(0, 1)
