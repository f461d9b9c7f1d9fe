"""From a recipe to batches: data set, split, image store, examples, shuffled batches, and their augmentation.

Augmentation works on whole batches, on the device that trains. Its random numbers are drawn apart from that: `draw`
makes a table with one row an image from (seed, epoch), so an image is cropped, rotated and shaded in the same way
whichever process or batch it is in. Only the noise is drawn on the device, from torch's generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.protocols import (
    FOLD,
    leak_remarks,
    member_split,
    missing_classes,
    split_dataset,
    split_parts,
)
from dualrefnet.data.schema import Dataset
from dualrefnet.data.store import DerivedStore, ImageStore, delete_if_changed, fill_store, map_ahead
from dualrefnet.errors import DataError, SplitError
from dualrefnet.progress import note, progress_bar, warn
from dualrefnet.recipe import AugmentationSection, Recipe

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Batch:
    rows: NDArray[np.int64]  # (B,) positions in the examples, for looking up draws of the augmentation
    images: Tensor | None  # (B, 3, S, S) uint8; None for methods that read no image, or features in its place
    metadata: Tensor  # (B, M) float32
    labels: Tensor  # (B,) int64
    features: tuple[dict[str, Tensor], ...] = ()  # for each frozen encoder the parts of its features, (B, ...) each
    targets: Tensor | None = None  # (B, 3, 2S, 2S) uint8, the auxiliary task's stored targets
    folds: Tensor | None = None  # (B,) of a cross-fitted run: the only member that hasn't been trained on the image
    soft_labels: Tensor | None = None  # (B, C) float32, a teacher's probabilities

    def parts(self, count: int) -> Iterator[Batch]:
        """Yield the batch in so many parts of about the same size."""
        for rows in np.array_split(np.arange(len(self.rows)), count):
            part = slice(rows[0], rows[-1] + 1)
            kept: dict[str, Any] = {name: value if value is None else value[part] for name, value in vars(self).items()}
            kept["features"] = tuple({name: value[part] for name, value in each.items()} for each in self.features)
            yield Batch(**kept)


@dataclass(frozen=True)
class Examples:
    """The N rows of one split, ready to be read."""

    image_ids: tuple[str, ...]
    labels: NDArray[np.int64]  # (N,) class indices
    metadata: NDArray[np.float32]  # (N, M)
    store: ImageStore | None  # None for methods that read no image
    store_rows: NDArray[np.int64] | None  # (N,) rows in the store
    features: tuple[DerivedStore, ...] = ()  # of frozen encoders, read instead of images
    targets: DerivedStore | None = None  # of the auxiliary task
    folds: NDArray[np.int64] | None = None  # (N,) of a cross-fitted run, see `Batch.folds`
    soft_labels: NDArray[np.float32] | None = None  # (N, C), see `Batch.soft_labels`

    def __len__(self) -> int:
        return len(self.image_ids)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        batch = self._read_batch(rows)
        soft_labels = None if self.soft_labels is None else torch.from_numpy(self.soft_labels[rows])
        return replace(batch, soft_labels=soft_labels)

    def _read_batch(self, rows: NDArray[np.int64]) -> Batch:
        metadata, labels = torch.from_numpy(self.metadata[rows]), torch.from_numpy(self.labels[rows])
        folds = None if self.folds is None else torch.from_numpy(self.folds[rows])
        if self.store is None or self.store_rows is None:
            return Batch(rows, None, metadata, labels, folds=folds)
        store_rows = self.store_rows[rows]
        if self.features:
            parts = [feature.read(store_rows).items() for feature in self.features]
            features = tuple({name: torch.from_numpy(value) for name, value in part} for part in parts)
            return Batch(rows, None, metadata, labels, features, folds=folds)
        # (B, S, S, 3) seen as (B, 3, S, S): channels_last memory, which is what convolutions like best.
        images = torch.from_numpy(self.store.read(store_rows)).permute(0, 3, 1, 2)
        targets = None
        if self.targets is not None:
            targets = torch.from_numpy(self.targets.read(store_rows)["target"]).permute(0, 3, 1, 2)
        return Batch(rows, images, metadata, labels, targets=targets, folds=folds)

    def in_order(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield every example once, in order; process `rank` of `world` gets every world-th one."""
        rows = np.arange(rank, len(self), world)
        return self._read([rows[start : start + batch_size] for start in range(0, len(rows), batch_size)])

    def shuffled(self, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield shuffled batches of `batch_size` over all processes together; this process gets its share of each."""
        # The last, incomplete batch is left out (batch normalisation can't work on one image); other images are left
        # out in the next epoch.
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        size = min(batch_size, len(self))
        return self._read([order[k * size : (k + 1) * size][rank::world] for k in range(self.steps(batch_size))])

    def steps(self, batch_size: int) -> int:
        return max(1, len(self) // batch_size)

    def _read(self, batches: list[NDArray[np.int64]]) -> Iterator[Batch]:
        """Read the next batches in a thread while the model works on this one."""
        return map_ahead(self.batch, batches, workers=1, ahead=3)


def read_dataset(recipe: Recipe, loaded: Dataset | None = None) -> Dataset:
    """Read the recipe's data set, unless it is `loaded`, with the classes that it is about; show its warnings."""
    dataset = loaded or load_dataset(recipe.data.dataset, recipe.data.root, recipe.data.description)
    for message in dataset.warnings:
        warn(message)
    task = dataset.of_task(recipe.data.keep, recipe.data.classes)
    if recipe.data.keep:
        left_out = len(dataset.table) - len(task.table)
        note(f"{left_out:,} rows of other classes than {', '.join(recipe.data.keep)} are left out")
    return task


def recipe_split(recipe: Recipe, dataset: Dataset, store: ImageStore | None, tested: bool = True) -> pd.DataFrame:
    """Return the recipe's split of its usable rows, and report others; unless `tested` no test image is needed."""
    data = recipe.data
    split = split_dataset(
        dataset, data.protocol, data.fold, data.folds, data.split_seed, data.split_file, data.allow_leak
    )
    if data.allow_leak:
        for message in leak_remarks(split, dataset.schema.unit):
            warn(message)
    if store is not None:
        usable = split["image_id"].isin(set(store.image_ids) - set(store.broken))
        if not usable.all():
            note(f"{int((~usable).sum())} of {len(split)} rows have no readable image here and are left out")
        split = split[usable].reset_index(drop=True)
    parts = split_parts(split)
    if FOLD not in split and data.protocol != "all":
        parts |= {"test": split["split"] == "test"}
    for name, rows in parts.items():
        if not rows.any() and (tested or name != "test"):
            hint = f"`dualrefnet check {data.dataset} --root {dataset.root}` says which are missing"
            raise SplitError(f"the {name} split has no image left; {hint}")
    trainings = [split]
    if FOLD in split:
        trainings = [member_split(split, fold, recipe.chooses_by_validation) for fold in range(len(parts))]
    for one in trainings:
        trained = set(one.loc[one["split"] == "train", "label"])
        absent = [label for label in dataset.schema.classes if label not in trained]
        if absent:
            hint = "add some, or take the class out of the data set's description"
            raise SplitError(f"no training image of class {', '.join(absent)} is there; {hint}")
    for message in missing_classes(split, dataset.schema.classes):
        warn(f"{message}: its metrics there are undefined")
    return split


def split_rows(dataset: Dataset, split: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the lesion table's rows of one split, in its order; of a cross-fitted run every row is in all splits."""
    ids = split["image_id"] if FOLD in split else split.loc[split["split"] == name, "image_id"]
    return dataset.table.set_index("image_id", drop=False).loc[ids].reset_index(drop=True)


def stored_size(recipe: Recipe) -> int:
    # A native x2 target is the image itself at twice the input's side.
    return recipe.image.size * (2 if recipe.rebuilds_image and recipe.model.target == "native" else 1)


def fill_recipe_store(
    recipe: Recipe, dataset: Dataset, cache: Path | None = None, workers: int | None = None, verify: bool = False
) -> ImageStore:
    """Fill the image store that a recipe needs, and warn of broken images; `verify`: compare it with the files."""
    if len(dataset.with_image) == 0:
        raise DataError(f"{dataset.no_image}; `dualrefnet check {recipe.data.dataset} --root {dataset.root}` says more")
    with progress_bar("preparing images") as show:
        store = fill_store(dataset.with_image, recipe.image, stored_size(recipe), cache, workers, show)
    if verify:
        changed = delete_if_changed(store, dataset.with_image, recipe.image, workers)
        if changed:
            note(f"{len(changed)} images have changed and are prepared again, the first: {changed[0]}")
            return fill_recipe_store(recipe, dataset, cache, workers)
    if store.broken:
        first, reason = next(iter(store.broken.items()))
        listed = f"(listed in {store.path / 'broken.csv'})"
        warn(f"{len(store.broken)} images can't be read and are skipped {listed}; the first: {first}: {reason}")
    return store


def make_examples(
    dataset: Dataset,
    split: pd.DataFrame,
    name: str,
    encoder: MetadataEncoder,
    store: ImageStore | None,
    features: tuple[DerivedStore, ...] = (),
    targets: DerivedStore | None = None,
) -> Examples:
    rows = split_rows(dataset, split, name)
    position = {label: index for index, label in enumerate(dataset.schema.classes)}
    encoded = encoder.encode(rows)
    for message in encoded.warnings:
        warn(f"{name}: {message}")
    ids, labels = tuple(rows["image_id"]), np.array([position[label] for label in rows["label"]], dtype=np.int64)
    store_rows = None if store is None else store.rows_of(ids)
    folds = split.set_index("image_id")[FOLD].loc[list(ids)].to_numpy(np.int64, copy=True) if FOLD in split else None
    return Examples(ids, labels, encoded.values, store, store_rows, features, targets, folds)


@dataclass(frozen=True)
class AugmentationDraw:
    geometry: Tensor  # (N, 2, 3) affine map from output to input coordinates, both -1..1 (as in `affine_grid`)
    photometry: Tensor  # (N, 4) factors of brightness, contrast and saturation, and standard deviation of the noise

    def of(self, rows: NDArray[np.int64]) -> AugmentationDraw:
        index = torch.from_numpy(rows)
        return AugmentationDraw(self.geometry[index], self.photometry[index])


def draw(count: int, section: AugmentationSection, seed: int, epoch: int) -> AugmentationDraw:
    # Each choice has its own stream, so changing one setting leaves the other choices as they were.
    uniform = [np.random.default_rng([seed, epoch, number]).random(count) for number in range(10)]
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
    photometry = np.stack([*factors, section.noise * uniform[9]], axis=1)
    return AugmentationDraw(torch.from_numpy(geometry).float(), torch.from_numpy(photometry).float())


def warp(images: Tensor, geometry: Tensor) -> Tensor:
    """Apply the (B, 2, 3) geometric part to (B, 3, H, W); beyond the border the image is mirrored."""
    grid = functional.affine_grid(geometry, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def shade(images: Tensor, photometry: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Apply the (B, 4) photometric part (brightness, contrast, saturation, noise) to (B, 3, H, W) in 0..1."""
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
