"""A trained run, asked with inputs that were changed: other forms, no photograph, or other pictures.

A photograph is read once and then asked with as many forms as are wanted, so that the cost is that of one prediction of
the
test side. Nothing is kept of a photograph but its answers and its vector.
"""

# also: Forms from which something was taken: all answers, what the answers say, or the flags that tell which are
# missing.
# also: Pictures from which the lesion, or all but the lesion, was taken: does the model need the lesion, and is it
# enough?

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.data.images import read_mask
from dualrefnet.data.loader import Examples
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import group_codes
from dualrefnet.models.encoders import Encoded
from dualrefnet.models.inference import joined_vectors

Floats = NDArray[np.float64]


Forms = NDArray[np.float32]


Progress = Callable[[int, int], None]


# (B, S, S, 3) pictures of the examples at (B,) places -> the changed pictures, one array (B, S, S, 3) a change.
ChangePictures = Callable[[NDArray[np.uint8], NDArray[np.int64]], Sequence[NDArray[np.uint8]]]


@dataclass(frozen=True)
class Predictions:
    """What a model answered.

    Attributes:
        answers: one (N, C) array of probabilities a form, or a change of the pictures.
        vectors: (N, D) what the encoders made of the pictures, side by side; D is 0 where no picture was read.
    """

    answers: list[Floats]
    vectors: NDArray[np.float32]


def without_fields(rows: pd.DataFrame, fields: Collection[str]) -> pd.DataFrame:
    """Return the rows of a lesion table with these fields missing in all of them."""
    return rows.assign(**dict.fromkeys(fields, np.nan))


def keep_fields(rows: pd.DataFrame, names: Sequence[str], kept: NDArray[np.bool_]) -> pd.DataFrame:
    """Return the rows of a lesion table with what is kept, (N, F), of these F fields, and the rest of them missing."""
    return rows.assign(**{name: rows[name].where(kept[:, index]) for index, name in enumerate(names)})


def predict_with_metadata(
    opened: OpenedRun, examples: Examples, forms: Sequence[Forms], progress: Progress | None = None
) -> Predictions:
    """Ask about photographs, each with several forms.

    Args:
        opened: the run; of a method that reads no image, only the forms are looked at.
        examples: N, with their images or stored features.
        forms: of (N, M) encoded forms each; row i is asked beside photograph i.
        progress: called with (images done, images in all).
    """
    answers = [np.empty((len(examples), len(opened.classes))) for _ in forms]
    vectors: list[NDArray[np.float32]] = []
    done = 0
    for batch in examples.in_order(opened.recipe.evaluation.batch_size):
        with torch.inference_mode():
            encoded = opened.encode(batch)
            if encoded is not None:
                vectors.append(joined_vectors(encoded))
            for answer, form in zip(answers, forms, strict=True):
                answer[batch.rows] = _answer(opened, encoded, form[batch.rows])
        done += len(batch.rows)
        if progress:
            progress(done, len(examples))
    return Predictions(answers, np.concatenate(vectors) if vectors else np.empty((len(examples), 0), np.float32))


def predict_without_image(opened: OpenedRun, forms: Sequence[Forms], progress: Progress | None = None) -> list[Floats]:
    """Ask with forms alone: of a method that reads images, with what stands for "no photograph" in this run.

    Args:
        opened: the run.
        forms: of (N, M) encoded forms each.
        progress: called with (forms done, forms in all).

    Returns:
        One (N, C) array of probabilities for each of `forms`.
    """
    size = opened.recipe.evaluation.batch_size
    blank = opened.blank(size) if opened.model.reads_image else None
    answers = []
    with torch.inference_mode():
        for number, form in enumerate(forms):
            parts = []
            for start in range(0, len(form), size):
                part = form[start : start + size]
                # Only the last batch is smaller.
                encoded = (
                    blank.rows(torch.arange(len(part), device=opened.device)) if blank and len(part) < size else blank
                )
                parts.append(_answer(opened, encoded, part))
            answers.append(np.concatenate(parts))
            if progress:
                progress(number + 1, len(forms))
    return answers


def predict_with_images(
    opened: OpenedRun,
    examples: Examples,
    places: NDArray[np.int64],
    change: ChangePictures,
    forms: Sequence[Forms],
    progress: Progress | None = None,
) -> list[list[Floats]]:
    """Ask about pictures that were changed, each with several forms.

    Args:
        opened: a run of a method that reads images.
        examples: with their pictures.
        places: (P,) of the examples to ask about.
        change: makes the changed pictures.
        forms: of (P, M) encoded forms each.
        progress: called with (images done, images in all).

    Returns:
        For each change one (P, C) array of probabilities for each of `forms`.
    """
    size = opened.recipe.evaluation.batch_size
    parts: list[list[list[Floats]]] = []
    for start in range(0, len(places), size):
        own = slice(start, start + size)
        batch = examples.batch(places[own])
        assert batch.images is not None
        pictures = np.ascontiguousarray(batch.images.permute(0, 2, 3, 1).numpy())
        answers = []
        with torch.inference_mode():
            for changed in change(pictures, batch.rows):
                images = opened.images(replace(batch, images=torch.from_numpy(changed).permute(0, 3, 1, 2)))
                assert images is not None
                encoded = opened.model.encode(images)
                answers.append([_answer(opened, encoded, form[own]) for form in forms])
        parts.append(answers)
        if progress:
            progress(min(start + size, len(places)), len(places))
    return [[np.concatenate(answers) for answers in zip(*batches, strict=True)] for batches in zip(*parts, strict=True)]


def permute_across_groups(groups: ArrayLike, generator: np.random.Generator) -> NDArray[np.int64]:
    """Permute rows so that each gets a row of another group (patient).

    Args:
        groups: (N,) of every row.
        generator: draws the permutation.

    Returns:
        (N,) the row that each row gets; every row is given once.

    Raises:
        DataError: one group has more than half of the rows, so there is no such permutation.
        ValueError: see `group_codes`.
    """
    codes = group_codes(groups)
    if 2 * np.bincount(codes).max() > len(codes):
        raise DataError("one patient has more than half of the images: nothing can be exchanged between patients")
    given = generator.permutation(len(codes))
    while True:
        own = np.flatnonzero(codes[given] == codes)
        if not len(own):
            return given
        # Exchanging with a row that is of another group and was given another group's mends this row and spoils none.
        # There is
        # one: fewer than all rows are of this group or were given it, since the row itself is both.
        row, group = own[0], codes[own[0]]
        other = generator.choice(np.flatnonzero((codes != group) & (codes[given] != group)))
        given[[row, other]] = given[[other, row]]


def _answer(opened: OpenedRun, encoded: Encoded | None, forms: Forms) -> Floats:
    logits = opened.model(encoded, torch.from_numpy(forms).to(opened.device)).logits
    probabilities: Floats = logits.double().softmax(dim=1).cpu().numpy()
    return probabilities


def find_missing(rows: pd.DataFrame, encoder: MetadataEncoder) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which answers are missing and which of the others say "not known" (a missing code that is an answer of its
    own).

    Args:
        rows: N of the lesion table.
        encoder: the run's; its fields count, and what is missing to it.

    Returns:
        Two arrays (N, F).
    """
    missing = encoder.encode(rows).missing
    not_known = np.zeros_like(missing)
    for index, field in enumerate(encoder.fields):
        not_known[:, index] = rows[field.name].isin(field.missing_codes).to_numpy() & ~missing[:, index]
    return missing, not_known


def replace_values(
    rows: pd.DataFrame, encoder: MetadataEncoder, groups: ArrayLike, generator: np.random.Generator
) -> pd.DataFrame:
    """Replace every answer by the one that another patient's row gives to the same question.

    Each field is drawn by itself. What is missing stays missing and what is "not known" stays so: nothing else is true
    in the result.

    Args:
        rows: N of the lesion table.
        encoder: the run's; its fields are replaced.
        groups: (N,) patients.
        generator: draws the rows that answers are taken from.

    Raises:
        ValueError: see `group_codes`.
    """
    codes = group_codes(groups)
    missing, not_known = find_missing(rows, encoder)
    result = rows.copy()
    for index, field in enumerate(encoder.fields):
        known = np.flatnonzero(~missing[:, index] & ~not_known[:, index])
        values = rows[field.name].to_numpy(copy=True)
        if len(np.unique(codes[known])) < 2:
            # Nobody else has answered; the own answer must not stay, and only the gap remains.
            values[known] = np.nan
        else:
            values[known] = values[_from_others(known, codes, generator)]
        result[field.name] = values
    return result


def hide_flags(encoder: MetadataEncoder, forms: Forms) -> Forms:
    """Return (N, M) encoded forms whose flags say that nothing is missing, whatever stands in the gaps."""
    result = forms.copy()
    result[:, encoder.width - count_flags(encoder) :] = 0
    return result


def count_flags(encoder: MetadataEncoder) -> int:
    """Return how many of an encoder's columns, its last ones, are flags that say what is missing."""
    return encoder.width - (encoder.spans[-1].stop if encoder.spans else 0)


def _from_others(
    known: NDArray[np.int64], codes: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Draw for each of the rows `known` one of them that is of another group."""
    drawn = generator.choice(known, len(known))
    while True:
        own = np.flatnonzero(codes[drawn] == codes[known])
        if not len(own):
            return drawn
        drawn[own] = generator.choice(known, len(own))


# In the order of `change_picture`.
CHANGES = ("lesion_blurred", "background_only", "lesion_only")


# As shares of the picture's side: how much larger the outline becomes; sd of its soft border; sd of the blur; width of
# the ring of
# skin around the lesion whose mean colour fills.
GROWN, BORDER, BLUR, RING = 0.04, 0.015, 0.1, 0.1


Picture = NDArray[np.uint8]


Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Outlines:
    """Outlines of test pictures, as the model sees them.

    Attributes:
        places: (P,) of the examples that have one.
        packed: their masks, a bit a pixel: those of thousands of pictures are kept until their turn comes.
        side: S, of a mask.
        left_out: how many outlines cover the whole picture, or mark nothing in it.
    """

    places: NDArray[np.int64]
    packed: dict[int, NDArray[np.uint8]]
    side: int
    left_out: int

    def mask(self, place: int) -> Mask:
        """Return the mask (S, S) of the example at a place."""
        return np.unpackbits(self.packed[place], count=self.side**2).reshape(self.side, self.side).astype(bool)


def read_outlines(opened: OpenedRun, examples: Examples, masks: dict[str, Path]) -> Outlines:
    """Read the outlines of the test pictures.

    Args:
        opened: a run of a method that reads images.
        examples: the test side, with its pictures.
        masks: image id -> mask file.

    Raises:
        ImageError: a mask can't be read.
        DataError: a mask isn't black and white.
    """
    assert examples.store is not None
    photographs, side = opened.rows("test")["image_path"], examples.store.side
    having = [place for place, image_id in enumerate(examples.image_ids) if image_id in masks]
    packed = {}
    for place in having:
        mask = read_mask(masks[examples.image_ids[place]], Path(photographs.iloc[place]), side, opened.recipe.image.fit)
        if mask is not None and not grow(mask).all():
            packed[place] = np.packbits(mask)
    return Outlines(np.array(list(packed), dtype=np.int64), packed, side, len(having) - len(packed))


def predict_perturbed(
    opened: OpenedRun, examples: Examples, outlines: Outlines, forms: Sequence[Forms], progress: Progress | None = None
) -> dict[str, list[Floats]]:
    """Ask about every picture that has an outline: blurred in it, filled in it, and filled around it.

    Args:
        opened: a run of a method that reads images.
        examples: the test side, with its pictures.
        outlines: of P of its pictures.
        forms: of (P, M) encoded forms each, to ask with.
        progress: called with (images done, images in all).

    Returns:
        Change -> one (P, C) array of probabilities for each of `forms`; keys are `CHANGES`.
    """

    def change(pictures: Picture, places: NDArray[np.int64]) -> list[Picture]:
        changed = [
            perturb_image(picture, outlines.mask(int(place))) for picture, place in zip(pictures, places, strict=True)
        ]
        return [np.stack(alike) for alike in zip(*changed, strict=True)]

    answers = predict_with_images(opened, examples, outlines.places, change, forms, progress)
    return dict(zip(CHANGES, answers, strict=True))


def perturb_image(picture: Picture, mask: Mask) -> tuple[Picture, Picture, Picture]:
    """Return a picture with its lesion blurred away, with the lesion filled, and with all but the lesion filled.

    What fills is the mean colour of the skin in a ring around the lesion.

    Args:
        picture: (S, S, 3).
        mask: (S, S), True in the lesion, which doesn't cover the picture.
    """
    side = len(picture)
    grown = grow(mask)
    inside = np.maximum(cv2.GaussianBlur(grown.astype(np.float32), (0, 0), BORDER * side), mask)[:, :, None]
    pixels = picture.astype(np.float32)
    ring = _dilated(grown, RING * side) & ~grown
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
    return _dilated(mask, GROWN * len(mask))


def _dilated(mask: Mask, distance: float) -> Mask:
    """Return where a mask is or is nearer than `distance` pixels, at least one."""
    # The distance of every pixel from the mask, of which a dilation is what lies below a limit.
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(away <= max(1.0, distance))
