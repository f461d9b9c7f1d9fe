"""Targets of the auxiliary task, an image of twice the side, and the measure of how well it was rebuilt.

`bilinear` and `bicubic` enlarge the input itself, so the target holds nothing that the input lacks: the task is that of
an auto-encoder. `native` keeps the real image at twice the size and shrinks it to get the input, which is
super-resolution proper.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from dualrefnet.data.store import DerivedStore, ImageStore, Part, fill_derived_store
from dualrefnet.models.superresolution_networks import NETWORKS, enlarge, load_network
from dualrefnet.progress import note, progress_bar
from dualrefnet.recipe import Recipe


def make_target(kind: str, image: Tensor) -> Tensor:
    """Enlarge images (B,3,H,W) in 0..1 by two, `bilinear` or `bicubic`, clamped: the latter overshoots."""
    return F.interpolate(image, scale_factor=2, mode=kind, align_corners=False, antialias=False).clamp(0.0, 1.0)


def split_native(image: Tensor) -> tuple[Tensor, Tensor]:
    """Divide (B,3,2H,2W) into the model's input (B,3,H,W), each pixel the mean of 2x2, and its target, itself."""
    return F.avg_pool2d(image, 2), image


def input_and_target(
    images: Tensor, stored: Tensor | None, kind: str | None, size: int
) -> tuple[Tensor, Tensor | None]:
    """Divide what is stored of an image, (B,3,S,S) in 0..1, into what the model reads and what it rebuilds.

    S is `size`, or twice that for native targets; `stored` (B,3,2S,2S) are a network's targets.
    """
    if images.shape[-1] == 2 * size:
        return split_native(images)
    if stored is None and kind is not None:
        stored = make_target(kind, images)
    return images, stored


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Return (B,) PSNR = 10 log10(1 / MSE) of each image (B,3,H,W), in dB, for the data range 0..1."""
    # In half precision a small error squared would vanish.
    error = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    return -10.0 * torch.log10(error)


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Return (B,) the structural similarity (Wang et al. 2004: Gaussian of sd 1.5, K1 = .01, K2 = .03) of (B,3,H,W)."""
    pairs = zip(prediction.float().cpu().numpy(), target.float().cpu().numpy(), strict=True)
    values = [
        structural_similarity(  # type: ignore[no-untyped-call]
            a, b, channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in pairs
    ]
    return torch.from_numpy(np.array(values, dtype=np.float32))


def fill_targets(
    recipe: Recipe, store: ImageStore, device: torch.device
) -> tuple[DerivedStore | None, dict[str, Any] | None]:
    """Return the enlarged images and the record of the network's weights; both None if no network makes them."""
    name = recipe.model.target
    if not recipe.rebuilds_image or name not in NETWORKS:
        return None, None
    network, source = load_network(name, recipe.model.target_weights)
    network.to(device)
    note(f"targets of the auxiliary task: {NETWORKS[name].title}, {source.description}")
    side = 2 * store.side
    with progress_bar(f"targets of {name}") as show:
        targets = fill_derived_store(
            store,
            f"targets-{name}",
            {"network": name, "weights": source.sha256},
            {"target": Part("uint8", (side, side, 3))},
            lambda pictures: {"target": enlarge(network, pictures)},
            batch=4,
            progress=show,
        )
    return targets, asdict(source)
