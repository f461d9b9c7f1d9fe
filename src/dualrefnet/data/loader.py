"""Batches: rows of the image store beside encoded metadata and labels, in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualrefnet.data.derived_store import DerivedStore
from dualrefnet.data.image_store import ImageStore


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
        absent: (B,) photographs that aren't there, whatever `images` holds, for models with a learned token; None: all are there.
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
            parts = [{name: torch.from_numpy(value) for name, value in store.read(places).items()} for store in self.features]
            return Batch(rows, None, metadata, labels, tuple(parts))
        # (B, S, S, 3) seen as (B, 3, S, S): channels_last memory, which is what convolutions like best.
        images = torch.from_numpy(self.store.read(places)).permute(0, 3, 1, 2)
        targets = torch.from_numpy(self.targets.read(places)["target"]).permute(0, 3, 1, 2) if self.targets is not None else None
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
