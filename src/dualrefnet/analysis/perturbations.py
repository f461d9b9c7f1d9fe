"""A trained run's predictions with changed inputs: other metadata, no image, or perturbed images.

An image is encoded once and then predicted with as many rows of metadata as are wanted, so that the cost is that of one
prediction of the test split. Nothing is kept of an image but its predictions and its vector.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from dualrefnet.analysis.opened_run import OpenedRun, in_batches
from dualrefnet.data.images import read_mask
from dualrefnet.data.loader import Examples
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import group_codes
from dualrefnet.models.encoders import Encoded
from dualrefnet.models.inference import check_finite, joined_vectors
from dualrefnet.progress import track

Floats = NDArray[np.float64]
# (N, M), encoded.
Metadata = NDArray[np.float32]
Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
# In the order of `perturb_image`.
CHANGES = ("lesion_blurred", "background_only", "lesion_only")
# As shares of the image's side: how much larger the outline becomes; sd of its soft border; sd of the blur; width of
# the ring of skin around the lesion whose mean colour fills.
GROWN, BORDER, BLUR, RING = 0.04, 0.015, 0.1, 0.1


class Predictions(NamedTuple):
    """Predictions with several versions of the metadata."""

    probabilities: list[Floats]  # (N, C) a version
    vectors: NDArray[np.float32]  # (N, D) of the image encoders, side by side; D is 0 where no image was read


def predict_with_metadata(
    opened: OpenedRun, examples: Examples, versions: Sequence[Metadata], label: str = ""
) -> Predictions:
    """Predict each of N images with several versions of the metadata, (N, M) each; `label` is of the bar."""
    probabilities = [np.empty((len(examples), len(opened.classes))) for _ in versions]
    vectors: list[NDArray[np.float32]] = []
    for rows in in_batches(np.arange(len(examples)), opened.recipe.evaluation.batch_size, label):
        with torch.inference_mode():
            encoded = opened.encode_rows(examples, rows)
            if encoded is not None and encoded.outputs:
                vectors.append(joined_vectors(encoded))
            for result, version in zip(probabilities, versions, strict=True):
                result[rows] = _predict(opened, encoded, version[rows])
    return Predictions(probabilities, np.concatenate(vectors) if vectors else np.empty((len(examples), 0), np.float32))


def predict_without_image(
    opened: OpenedRun, examples: Examples, versions: Sequence[Metadata], label: str = ""
) -> list[Floats]:
    """Return (N, C) probabilities a version of the metadata alone; a missing image's stand-in is read."""
    size, blank = opened.recipe.evaluation.batch_size, opened.blank(examples)
    probabilities = []
    with torch.inference_mode():
        for version in track(versions, label):
            parts = [_predict(opened, blank(rows), version[rows]) for rows in in_batches(np.arange(len(version)), size)]
            probabilities.append(np.concatenate(parts))
    return probabilities


def _predict(opened: OpenedRun, encoded: Encoded | None, metadata: Metadata) -> Floats:
    logits = opened.model(encoded, torch.from_numpy(metadata).to(opened.device)).logits
    probabilities: Floats = check_finite(logits).double().softmax(dim=1).cpu().numpy()
    return probabilities


def permute_across_groups(groups: ArrayLike, generator: np.random.Generator) -> NDArray[np.int64]:
    """Permute N rows so that each gets a row of another group (patient); every row is given once."""
    codes = group_codes(groups)
    if 2 * np.bincount(codes).max() > len(codes):
        raise DataError(
            "one group (patient or lesion) has more than half of the images: nothing can be permuted across groups"
        )
    given = generator.permutation(len(codes))
    while True:
        own = np.flatnonzero(codes[given] == codes)
        if not len(own):
            return given
        # Exchanging with a row that is of another group and was given another group's fixes this row and spoils none.
        # There is one: fewer than all rows are of this group or were given it, since the row itself is both.
        row, group = own[0], codes[own[0]]
        other = generator.choice(np.flatnonzero((codes != group) & (codes[given] != group)))
        given[[row, other]] = given[[other, row]]


def without_fields(rows: pd.DataFrame, fields: Collection[str]) -> pd.DataFrame:
    """Return the rows of a lesion table with these fields missing in all of them."""
    return rows.assign(**dict.fromkeys(fields, np.nan))


def keep_fields(rows: pd.DataFrame, names: Sequence[str], kept: NDArray[np.bool_]) -> pd.DataFrame:
    """Return the rows of a lesion table with what is kept, (N, F), of these F fields, and the rest of them missing."""
    return rows.assign(**{name: rows[name].where(kept[:, index]) for index, name in enumerate(names)})


def find_missing(rows: pd.DataFrame, encoder: MetadataEncoder) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return (N, F) which values are missing to the encoder, and which of the others say "not known"."""
    missing = encoder.encode(rows).missing
    not_known = np.zeros_like(missing)
    for index, field in enumerate(encoder.fields):
        not_known[:, index] = rows[field.name].isin(field.missing_codes).to_numpy() & ~missing[:, index]
    return missing, not_known


def replace_values(
    rows: pd.DataFrame, encoder: MetadataEncoder, groups: ArrayLike, generator: np.random.Generator
) -> pd.DataFrame:
    """Replace every value by another patient's in the same field; missing and "not known" stay as they are."""
    codes = group_codes(groups)
    missing, not_known = find_missing(rows, encoder)
    result = rows.copy()
    for index, field in enumerate(encoder.fields):
        known = np.flatnonzero(~missing[:, index] & ~not_known[:, index])
        values = rows[field.name].to_numpy(copy=True)
        if len(np.unique(codes[known])) < 2:
            # Nobody else has a value; the own one must not stay.
            values[known] = np.nan
        else:
            donors = generator.choice(known, len(known))
            while len(own := np.flatnonzero(codes[donors] == codes[known])):
                donors[own] = generator.choice(known, len(own))
            values[known] = values[donors]
        result[field.name] = values
    return result


def count_flags(encoder: MetadataEncoder) -> int:
    """Return how many of an encoder's columns, its last ones, are flags that say what is missing."""
    return encoder.width - (encoder.spans[-1].stop if encoder.spans else 0)


def hide_flags(encoder: MetadataEncoder, metadata: Metadata) -> Metadata:
    """Return metadata (N, M) whose flags say that nothing is missing, whatever stands in place of missing values."""
    result = metadata.copy()
    result[:, encoder.width - count_flags(encoder) :] = 0
    return result


@dataclass(frozen=True)
class Outlines:
    """Outlines of test images, as the model sees them."""

    places: NDArray[np.int64]  # (P,) of the examples that have one
    packed: dict[int, NDArray[np.uint8]]  # masks, a bit a pixel: those of thousands are kept until their turn comes
    side: int  # of a mask
    left_out: int  # how many outlines cover the whole image, or mark nothing in it

    def mask(self, place: int) -> Mask:
        """Return the mask (S, S) of the example at a place."""
        return np.unpackbits(self.packed[place], count=self.side**2).reshape(self.side, self.side).astype(bool)


def read_outlines(opened: OpenedRun, examples: Examples, masks: dict[str, Path]) -> Outlines:
    assert examples.store is not None
    paths, side = opened.rows("test")["image_path"], examples.store.side
    having = [place for place, image_id in enumerate(examples.image_ids) if image_id in masks]
    packed = {}
    for place in having:
        mask = read_mask(masks[examples.image_ids[place]], Path(paths.iloc[place]), side, opened.recipe.image.fit)
        if mask is not None and not grow(mask).all():
            packed[place] = np.packbits(mask)
    return Outlines(np.array(list(packed), dtype=np.int64), packed, side, len(having) - len(packed))


def predict_perturbed(
    opened: OpenedRun, examples: Examples, outlines: Outlines, versions: Sequence[Metadata]
) -> dict[str, list[Floats]]:
    """Return for each of `CHANGES` the probabilities (P, C) with each version of the metadata (P, M)."""
    size, places = opened.recipe.evaluation.batch_size, np.arange(len(outlines.places))
    parts: dict[str, list[list[Floats]]] = {change: [[] for _ in versions] for change in CHANGES}
    for some in in_batches(places, size, "images without the lesion"):
        batch = examples.batch(outlines.places[some])
        assert batch.images is not None
        originals = np.ascontiguousarray(batch.images.permute(0, 2, 3, 1).numpy())
        changed = [
            perturb_image(one, outlines.mask(int(place))) for one, place in zip(originals, batch.rows, strict=True)
        ]
        with torch.inference_mode():
            for change, alike in zip(CHANGES, zip(*changed, strict=True), strict=True):
                encoded = opened.encode(replace(batch, images=torch.from_numpy(np.stack(alike)).permute(0, 3, 1, 2)))
                for kept, version in zip(parts[change], versions, strict=True):
                    kept.append(_predict(opened, encoded, version[some]))
    return {change: [np.concatenate(kept) for kept in of_change] for change, of_change in parts.items()}


def perturb_image(image: Image, mask: Mask) -> tuple[Image, Image, Image]:
    """Return an image (S, S, 3) with its lesion blurred, its lesion filled with skin, and all but its lesion filled."""
    side = len(image)
    grown = grow(mask)
    inside = np.maximum(cv2.GaussianBlur(grown.astype(np.float32), (0, 0), BORDER * side), mask)[:, :, None]
    pixels = image.astype(np.float32)
    ring = _dilate(grown, RING * side) & ~grown
    skin = pixels[ring].mean(axis=0)
    blurred = cv2.GaussianBlur(pixels, (0, 0), BLUR * side)
    parts = (
        inside * blurred + (1 - inside) * pixels,
        inside * skin + (1 - inside) * pixels,
        inside * pixels + (1 - inside) * skin,
    )
    lesion_blurred, background_only, lesion_only = (part.round().clip(0, 255).astype(np.uint8) for part in parts)
    return lesion_blurred, background_only, lesion_only


def grow(mask: Mask) -> Mask:
    """Return an outline (S, S) that is larger by `GROWN` of the side all around."""
    return _dilate(mask, GROWN * len(mask))


def _dilate(mask: Mask, distance: float) -> Mask:
    """Dilate a mask by `distance` pixels, at least one."""
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(away <= max(1.0, distance))
