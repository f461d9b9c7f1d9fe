"""A finished run, opened: its model, its data and the preprocessing between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualrefnet.data.images import MASK_FOLDER, find_masks
from dualrefnet.data.loader import Batch, Examples, fill_recipe_store, make_examples, read_dataset, split_rows
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import Dataset
from dualrefnet.data.store import DerivedStore, ImageStore
from dualrefnet.errors import DataError, RunError
from dualrefnet.models.base import Method
from dualrefnet.models.cross_fitted import CrossFitted
from dualrefnet.models.encoders import Encoded, EncoderOutput
from dualrefnet.models.inference import (
    Normalisation,
    encoded,
    fill_features,
    joined_vectors,
    normalise,
    resolve_device,
    to_unit,
)
from dualrefnet.models.registry import load_run_model
from dualrefnet.progress import progress_bar
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.run import Run

# Images whose vectors are held: about 5 kB each.
MOST_IMAGES = 50_000


class Fit(NamedTuple):
    """A model, and the rows that it has been trained on and is tested on."""

    train: Examples  # read by that model
    rows: NDArray[np.int64]  # of `train`
    tested: NDArray[np.int64]  # of the examples that are tested


@dataclass(frozen=True)
class OpenedRun:
    """What predicting again, measuring and explaining need: the best epoch in evaluation mode, with the present data.

    Of a cross-fitted run every row is in all splits, and `encode` is by the member that hasn't been trained on it.
    """

    run: Run
    recipe: Recipe
    dataset: Dataset
    split: pd.DataFrame
    model: Method
    metadata: MetadataEncoder
    normalisation: Normalisation
    store: ImageStore | None
    device: torch.device
    cache: Path | None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.schema.classes

    @property
    def groups(self) -> pd.Series:
        """Image id -> patient or lesion (`dataset.schema.unit`), whose images are in one split."""
        return self.split.set_index("image_id")["patient_id"]

    @property
    def reads_metadata(self) -> bool:
        """False if neither the method nor the recipe's tier reads metadata."""
        return self.model.reads_metadata and self.metadata.width > 0

    def examples(self, split: str) -> Examples:
        """Return one split, with the stored features if the encoder was frozen: the quick way to predictions."""
        return make_examples(self.dataset, self.split, split, self.metadata, self.store, self._features)

    def image_examples(self, split: str) -> Examples:
        """Return one split with its images, also if the encoder was frozen: what explanations look at."""
        return make_examples(self.dataset, self.split, split, self.metadata, self.store)

    def rows(self, split: str) -> pd.DataFrame:
        """Return the lesion table's rows of one split, in the order of its examples."""
        return split_rows(self.dataset, self.split, split)

    def patients(self, split: str) -> NDArray[np.object_]:
        """Return the patient or lesion of each example of a split, which can be measured if it has at least two."""
        patients = self.groups.loc[self.rows(split)["image_id"]].to_numpy(dtype=object)
        if len(set(patients)) < 2:
            name, unit = {"val": "validation", "test": "test"}[split], self.dataset.schema.unit
            raise DataError(
                f"the {name} split has {len(patients)} images of {len(set(patients))} {unit}s, and measuring needs two "
                f"{unit}s at least: train with more data, or with another data.protocol or data.split_seed"
            )
        return patients

    def fits(self, train: Examples, tested: int) -> list[Fit]:
        """Return what is trained on and tested with what: one pair, or of a cross-fitted run one a member."""
        if train.folds is None:
            return [Fit(train, np.arange(len(train)), np.arange(tested))]
        return [
            Fit(
                replace(train, folds=np.full_like(train.folds, fold)),
                np.flatnonzero(train.folds != fold),
                np.flatnonzero(train.folds == fold),
            )
            for fold in np.unique(train.folds)
        ]

    @cached_property
    def _features(self) -> tuple[DerivedStore, ...]:
        if self.store is None or self.recipe.training.encoder != "frozen":
            return ()
        # Frozen encoders are those of all members.
        model = self.model.parts[0] if isinstance(self.model, CrossFitted) else self.model
        return fill_features(self.recipe, model, self.store, self.device)

    def images(self, batch: Batch) -> Tensor | None:
        """Return a batch's images (B, 3, S, S) as the model reads them; None if the method reads none."""
        if batch.images is None:
            return None
        return normalise(to_unit(batch.images.to(self.device), self.recipe.image.size), self.normalisation)

    def encode(self, batch: Batch) -> Encoded | None:
        """Return the encoders' outputs for a batch, stored or held-out ones where there are; None: no image is read."""
        folds = None if batch.folds is None else batch.folds.to(self.device)
        if batch.features:
            return encoded(batch.features, self.device)._replace(folds=folds)
        images = self.images(batch)
        if images is None:
            return None if folds is None else Encoded((), folds)
        if folds is None:
            return self.model.encode(images)
        assert isinstance(self.model, CrossFitted)
        return self.model.encode_held_out(images, folds)

    @cached_property
    def _vectors(self) -> dict[tuple[str, int], list[Tensor]]:
        """Image id and member -> what each encoder gave, so that whoever looks at an image again finds it read."""
        return {}

    @torch.inference_mode()
    def encode_rows(self, examples: Examples, rows: NDArray[np.int64]) -> Encoded | None:
        """Return `encode` of examples; an image of which the model reads vectors alone is encoded once."""
        method = self.model.parts[0] if isinstance(self.model, CrossFitted) else self.model
        whole = method.reads_taps or method.maps(self.recipe.model)
        if whole or not method.reads_image or examples.features:
            return self.encode(examples.batch(rows))
        if len(self._vectors) > MOST_IMAGES:
            self._vectors.clear()
        members = np.zeros(len(examples), dtype=np.int64) if examples.folds is None else examples.folds
        keys = [(examples.image_ids[row], int(members[row])) for row in rows]
        for key, row in zip(keys, rows, strict=True):
            if key not in self._vectors:
                # One at a time: in a batch the last digits depend on the images beside it, so on who asked first.
                read = self.encode(examples.batch(np.array([row])))
                assert read is not None
                self._vectors[key] = [output.vector[0] for output in read.outputs]
        columns = zip(*(self._vectors[key] for key in keys), strict=True)
        folds = None if examples.folds is None else torch.from_numpy(members[rows]).to(self.device)
        return Encoded(tuple(EncoderOutput(None, torch.stack(column)) for column in columns), folds)

    @torch.inference_mode()
    def vectors(self, examples: Examples, rows: NDArray[np.int64], label: str = "") -> NDArray[np.float32]:
        """Return the encoders' vectors of the examples at `rows`, concatenated if there are several, (N, D)."""
        found = []
        for part in in_batches(rows, self.recipe.evaluation.batch_size, label):
            read = self.encode_rows(examples, part)
            assert read is not None
            found.append(joined_vectors(read))
        return np.concatenate(found)

    def masks(self, folder: Path | None = None) -> dict[str, Path]:
        """Return test image id -> mask of the lesion; none if no folder was named and the data set has none."""
        if folder is None and not (self.dataset.root / MASK_FOLDER).is_dir():
            return {}
        found = find_masks(self.dataset.root, folder)
        masks = {image_id: found[image_id] for image_id in self.rows("test")["image_id"] if image_id in found}
        if folder is not None and not masks:
            raise DataError(f"{folder} holds no mask of a test image; masks are named <image id>.png")
        return masks

    @torch.inference_mode()
    def blank(self, examples: Examples) -> Callable[[NDArray[np.int64]], Encoded | None]:
        """Return what stands for missing images of rows of examples: the learned token, or the mean colour encoded."""
        folds = None if examples.folds is None else torch.from_numpy(examples.folds).to(self.device)
        read = Encoded(())
        if self.model.reads_image:
            size, pixel = self.recipe.image.size, torch.nan if self.model.missing is not None else 0.0
            image = torch.full((1, 3, size, size), pixel, device=self.device)
            if isinstance(self.model, CrossFitted):
                # One row a member.
                members = torch.arange(len(self.model.members), device=self.device)
                read = self.model.encode_held_out(image.expand(len(members), -1, -1, -1), members)
            else:
                read = self.model.encode(image)
        elif folds is None:
            return lambda rows: None

        def select(rows: NDArray[np.int64]) -> Encoded:
            chosen = torch.zeros(len(rows), dtype=torch.int64, device=self.device) if folds is None else folds[rows]
            return read.each(lambda values: values[chosen])._replace(folds=None if folds is None else chosen)

        return select


def in_batches(rows: NDArray[np.int64], size: int, label: str = "") -> Iterator[NDArray[np.int64]]:
    """Yield `size` rows at a time, with a bar of that label if there is one."""
    with progress_bar(label, bool(label)) as show:
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
            show(min(start + size, len(rows)), len(rows))


def open_run(
    run: Run,
    root: Path | str | None = None,
    dataset: Dataset | None = None,
    cache: Path | None = None,
    device: torch.device | None = None,
) -> OpenedRun:
    """Open a trained run; `root` is the folder of the data, if it isn't the recipe's."""
    overrides = {"data.root": str(root)} if root is not None else {}
    recipe, split, description = load_recipe(run.recipe, overrides), run.split, run.model
    dataset = dataset or read_dataset(recipe)
    model = load_run_model(run)
    if list(dataset.schema.classes) != description["classes"]:
        raise RunError(
            f"{run.path} knows the classes {', '.join(description['classes'])}, but the data in {dataset.root} have "
            f"{', '.join(dataset.schema.classes)}; give the right folder with --root"
        )
    device = device or resolve_device(None)
    model.to(device).eval()
    store = fill_recipe_store(recipe, dataset, cache) if model.reads_image else None
    readable = set(store.image_ids) - set(store.broken) if store else set(dataset.table["image_id"])
    missing = set(split["image_id"]) - readable
    if missing:
        raise RunError(
            f"{len(missing)} images of {run.path / 'split.csv'} are not in {dataset.root}; "
            "give the right folder with --root"
        )
    preprocessing, metadata = description["preprocessing"], MetadataEncoder.from_json(description["metadata"])
    normalisation = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
    return OpenedRun(run, recipe, dataset, split, model, metadata, normalisation, store, device, cache)


def sample_rows(labels: np.ndarray, at_most: int, seed: int) -> np.ndarray:
    """Return, ascending, the places of at most `at_most` rows with each class in proportion (largest remainder).

    Classes whose share is less than one row get one, and the others share what is left.
    """
    names, counts = np.unique(labels, return_counts=True)
    if len(labels) <= at_most:
        return np.arange(len(labels))
    if at_most < len(names):
        raise ValueError(f"{at_most} rows can't show {len(names)} classes; ask for more")
    rare = np.zeros(len(counts), dtype=bool)
    while True:
        left = at_most - int(rare.sum())
        # In whole numbers, so that no rounding matters: share = parts / total.
        parts, total = left * counts, int(counts[~rare].sum())
        more = ~rare & (parts < total)
        if not more.any():
            break
        rare |= more
    wanted = np.where(rare, 1, parts // total)
    order = np.argsort(np.where(rare, 1, -(parts % total)), kind="stable")
    wanted[order[: at_most - wanted.sum()]] += 1
    generator = np.random.default_rng(seed)
    chosen = [
        generator.choice(np.flatnonzero(labels == name), size, replace=False)
        for name, size in zip(names, wanted, strict=True)
    ]
    return np.sort(np.concatenate(chosen))
