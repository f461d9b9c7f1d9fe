"""The auxiliary task made visible: what goes in, what is asked for, what the decoder rebuilds, and how near that comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dualrefnet.data.loader import Examples
from dualrefnet.errors import RunError
from dualrefnet.evaluation.opened_run import OpenedRun, sample_rows
from dualrefnet.models.inference import normalise
from dualrefnet.models.learned_targets import fill_targets
from dualrefnet.models.superresolution import input_and_target, psnr, ssim

BATCH = 16


@dataclass(frozen=True)
class Rebuilt:
    """One image of the auxiliary task; the pictures are uint8.

    Attributes:
        image_id: its id.
        picture: (S, S, 3), what the encoder reads.
        target: (2S, 2S, 3), what is to be rebuilt.
        reconstruction: (2S, 2S, 3), what the decoder makes.
        measures: `psnr` in dB and `ssim` of the reconstruction; `psnr_flat` and `ssim_flat` of an area of the target's mean
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
    shown: tuple[Rebuilt, ...]
    images: int
    kind: str


def rebuild(
    opened: OpenedRun, images: int = 200, show: int = 3, seed: int = 0, progress: Callable[[int, int], None] | None = None
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
        rows += [{"image_id": case.image_id, **case.measures} for case in _rebuild(opened, examples, chosen[start : start + BATCH])]
        if progress:
            progress(min(start + BATCH, len(chosen)), len(chosen))
    table = pd.DataFrame(rows)
    # By rank, not by looks: bad, middling and good ones alike.
    steps = np.linspace(0.1, 0.9, show) * (len(chosen) - 1)
    places = np.argsort(table["psnr"].to_numpy(), kind="stable")[steps.round().astype(int)]
    return Reconstruction(table, tuple(_rebuild(opened, examples, chosen[places])), len(examples), recipe.model.target)


@torch.inference_mode()
def _rebuild(opened: OpenedRun, examples: Examples, rows: NDArray[np.int64]) -> list[Rebuilt]:
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
        "psnr": psnr(rebuilt, target), "ssim": ssim(rebuilt, target), "psnr_flat": psnr(flat, target), "ssim_flat": ssim(flat, target)
    }  # fmt: skip
    pictures, targets, rebuilts = ((255 * part).round().byte().permute(0, 2, 3, 1).cpu().numpy() for part in (picture, target, rebuilt))
    return [
        Rebuilt(
            examples.image_ids[row], pictures[place], targets[place], rebuilts[place],
            {name: float(values[place]) for name, values in measures.items()},
        )
        for place, row in enumerate(rows)
    ]  # fmt: skip
