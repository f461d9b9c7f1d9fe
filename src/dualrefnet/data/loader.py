"""Augmentation of whole batches, on the device that trains.

Drawing the random numbers is apart from applying them: `draw` makes a table with one row an image from (seed, epoch),
so
an image is cropped, turned and shaded in the same way whichever process or batch it falls into, and that can be
replayed; the noise itself is drawn on the device, from torch's generator.
"""

# also: Batches: rows of the image store beside encoded metadata and labels, in an order that a seed fixes.
# also: From a recipe to examples: the one way that rows take, for training and for evaluation alike.

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dualrefnet.data.adapters import Dataset, load_dataset
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.protocols import leakage, missing_sides, split_dataset
from dualrefnet.data.store import DerivedStore, ImageStore, fill_store
from dualrefnet.errors import SplitError
from dualrefnet.progress import progress_bar, remark, warn
from dualrefnet.recipe import AugmentationSection, Recipe


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


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        rows: (B,) positions in the examples, for looking up draws of the augmentation.
        images: (B, 3, S, S) uint8, or None for methods that read no image, or features in its place.
        metadata: (B, M) float32.
        labels: (B,) int64.
        features: for each frozen encoder the parts of its features, (B, ...) each; empty if encoders are trained.
        targets: (B, 3, 2S, 2S) uint8, the auxiliary task's stored targets, or None.
        absent: (B,) photographs that aren't there, whatever `images` holds, for models with a learned token; None: all
            are there.
    """

    rows: NDArray[np.int64]
    images: Tensor | None
    metadata: Tensor
    labels: Tensor
    features: tuple[dict[str, Tensor], ...] = ()
    targets: Tensor | None = None
    absent: Tensor | None = None


@dataclass(frozen=True)
class Examples:
    """The rows of one side of a split, ready to be read.

    Attributes:
        image_ids: (N,) ids.
        labels: (N,) class indices.
        metadata: (N, M) float32.
        store: the image store, or None for methods that read no image.
        store_rows: (N,) rows in the store.
        features: stored features of frozen encoders, read instead of pictures.
        targets: stored targets of the auxiliary task.
    """

    image_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    metadata: NDArray[np.float32]
    store: ImageStore | None
    store_rows: NDArray[np.int64] | None
    features: tuple[DerivedStore, ...] = ()
    targets: DerivedStore | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """Read the examples at `rows`."""
        metadata, labels = torch.from_numpy(self.metadata[rows]), torch.from_numpy(self.labels[rows])
        if self.store is None or self.store_rows is None:
            return Batch(rows, None, metadata, labels)
        places = self.store_rows[rows]
        if self.features:
            parts = [
                {name: torch.from_numpy(value) for name, value in store.read(places).items()} for store in self.features
            ]
            return Batch(rows, None, metadata, labels, tuple(parts))
        # (B, S, S, 3) seen as (B, 3, S, S): channels_last memory, which is what convolutions like best.
        images = torch.from_numpy(self.store.read(places)).permute(0, 3, 1, 2)
        targets = (
            torch.from_numpy(self.targets.read(places)["target"]).permute(0, 3, 1, 2)
            if self.targets is not None
            else None
        )
        return Batch(rows, images, metadata, labels, targets=targets)

    def in_order(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Give every example once, in order; process `rank` of `world` gets every world-th one."""
        rows = np.arange(rank, len(self), world)
        return self._read_ahead([rows[start : start + batch_size] for start in range(0, len(rows), batch_size)])

    def shuffled(self, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Give shuffled batches of `batch_size` over all processes together; this process gets its share of each.

        The last, incomplete batch is left out (batch normalisation can't work on one image); other images are left out
        in the next epoch.
        """
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        steps = self.steps(batch_size)
        size = min(batch_size, len(self))
        return self._read_ahead([order[step * size : (step + 1) * size][rank::world] for step in range(steps)])

    def steps(self, batch_size: int) -> int:
        """Return the number of batches of one epoch of `shuffled`."""
        return max(1, len(self) // batch_size)

    def _read_ahead(self, batches: list[NDArray[np.int64]]) -> Iterator[Batch]:
        """Read the next batch in a thread while the model works on this one."""
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(self.batch, rows) for rows in batches[:2]]
            for number in range(len(batches)):
                ready = coming.pop(0)
                if number + 2 < len(batches):
                    coming.append(pool.submit(self.batch, batches[number + 2]))
                yield ready.result()


def read_dataset(recipe: Recipe) -> Dataset:
    """Read the recipe's data set and say what there is to say about it."""
    dataset = load_dataset(recipe.data.dataset, recipe.data.root, recipe.data.description)
    for message in dataset.remarks:
        warn(message)
    return dataset


def split_rows(recipe: Recipe, dataset: Dataset, store: ImageStore | None) -> pd.DataFrame:
    """Return the recipe's split of the rows that it can use, and say what was left out.

    Raises:
        SplitError: no protocol fits, or a side has lost all of its images.
    """
    data = recipe.data
    split = split_dataset(dataset, data.protocol, data.fold, data.folds, data.split_seed)
    if data.protocol == "paper":
        for name, shares in leakage(dataset, split).items():
            if shares is not None:
                warn(
                    f"the paper's split leaks: {shares['train']:.1%} of the test images show a {name} that training sees"
                )
    if store is not None:
        usable = set(store.image_ids) - set(store.broken)
        kept = split[split["image_id"].isin(usable)].reset_index(drop=True)
        if len(kept) < len(split):
            remark(f"{len(split) - len(kept)} of {len(split)} rows have no readable image here and are left out")
        split = kept
    present = [label for label in dataset.schema.classes if (split["label"][split["split"] == "train"] == label).any()]
    for side in ("train", "val", "test"):
        if not (split["split"] == side).any():
            raise SplitError(
                f"the {side} side has no image left; `dualrefnet check {data.dataset}` says which are missing"
            )
    absent = [label for label in dataset.schema.classes if label not in present]
    if absent:
        raise SplitError(
            f"no training image of class {', '.join(absent)} is there; add some, or take the class out of the data set's description"
        )
    for message in missing_sides(split, dataset.schema.classes):
        warn(f"{message}: its measures there are undefined")
    return split


def store_side(recipe: Recipe) -> int:
    """Return the side of the pictures that a recipe needs stored, pixels."""
    # A native x2 target is the photograph itself at twice the input's side.
    return recipe.image.size * (2 if recipe.rebuilds_image and recipe.model.target == "native" else 1)


def fill_recipe_store(
    recipe: Recipe, dataset: Dataset, cache: Path | None = None, workers: int | None = None
) -> ImageStore:
    """Fill the image store that a recipe needs, and say which images are broken."""
    with progress_bar("preparing images") as show:
        store = fill_store(dataset.with_image, recipe.image, store_side(recipe), cache, workers, show)
    if store.broken:
        first, reason = next(iter(store.broken.items()))
        listed = store.path / "broken.csv"
        warn(
            f"{len(store.broken)} images can't be read and are skipped (listed in {listed}); the first: {first}: {reason}"
        )
    return store


def make_examples(
    dataset: Dataset,
    split: pd.DataFrame,
    side: str,
    encoder: MetadataEncoder,
    store: ImageStore | None,
    features: tuple[DerivedStore, ...] = (),
    targets: DerivedStore | None = None,
) -> Examples:
    """Return the examples of one side of a split, in the split's order."""
    rows = side_rows(dataset, split, side)
    position = {label: index for index, label in enumerate(dataset.schema.classes)}
    encoded = encoder.encode(rows)
    for message in encoded.remarks:
        warn(f"{side}: {message}")
    return Examples(
        tuple(rows["image_id"]),
        np.array([position[label] for label in rows["label"]], dtype=np.int64),
        encoded.values,
        store,
        store.rows_of(list(rows["image_id"])) if store is not None else None,
        features,
        targets,
    )


def side_rows(dataset: Dataset, split: pd.DataFrame, side: str) -> pd.DataFrame:
    """Return the lesion table's rows of one side, in the split's order."""
    ids = split.loc[split["split"] == side, "image_id"]
    return dataset.table.set_index("image_id", drop=False).loc[ids].reset_index(drop=True)
