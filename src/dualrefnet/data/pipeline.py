"""From a recipe to examples: the one way that rows take, for training and for evaluation alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from dualrefnet.data.adapters import Dataset, load_dataset
from dualrefnet.data.derived_store import DerivedStore
from dualrefnet.data.image_store import ImageStore, fill_store
from dualrefnet.data.loader import Examples
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.protocols import leakage, missing_sides, split_dataset
from dualrefnet.errors import SplitError
from dualrefnet.progress import progress_bar, remark, warn
from dualrefnet.recipe import Recipe


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
                warn(f"the paper's split leaks: {shares['train']:.1%} of the test images show a {name} that training sees")
    if store is not None:
        usable = set(store.image_ids) - set(store.broken)
        kept = split[split["image_id"].isin(usable)].reset_index(drop=True)
        if len(kept) < len(split):
            remark(f"{len(split) - len(kept)} of {len(split)} rows have no readable image here and are left out")
        split = kept
    present = [label for label in dataset.schema.classes if (split["label"][split["split"] == "train"] == label).any()]
    for side in ("train", "val", "test"):
        if not (split["split"] == side).any():
            raise SplitError(f"the {side} side has no image left; `dualrefnet check {data.dataset}` says which are missing")
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


def fill_recipe_store(recipe: Recipe, dataset: Dataset, cache: Path | None = None, workers: int | None = None) -> ImageStore:
    """Fill the image store that a recipe needs, and say which images are broken."""
    with progress_bar("preparing images") as show:
        store = fill_store(dataset.with_image, recipe.image, store_side(recipe), cache, workers, show)
    if store.broken:
        first, reason = next(iter(store.broken.items()))
        listed = store.path / "broken.csv"
        warn(f"{len(store.broken)} images can't be read and are skipped (listed in {listed}); the first: {first}: {reason}")
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
