"""A trained run, asked with inputs that were changed: other forms, no photograph, or other pictures.

A photograph is read once and then asked with as many forms as are wanted, so that the cost is that of one prediction of the
test side. Nothing is kept of a photograph but its answers and its vector.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from dualrefnet.data.loader import Examples
from dualrefnet.errors import DataError
from dualrefnet.evaluation.intervals import group_codes
from dualrefnet.evaluation.opened_run import OpenedRun
from dualrefnet.models.backbones import Encoded
from dualrefnet.models.vectors import joined_vectors

Floats = NDArray[np.float64]
Forms = NDArray[np.float32]
Progress = Callable[[int, int], None]
# (B, S, S, 3) pictures of the examples at (B,) places -> the changed pictures, one array (B, S, S, 3) a change.
ChangePictures = Callable[[NDArray[np.uint8], NDArray[np.int64]], Sequence[NDArray[np.uint8]]]


@dataclass(frozen=True)
class Asked:
    """What a model answered.

    Attributes:
        answers: one (N, C) array of probabilities a form, or a change of the pictures.
        vectors: (N, D) what the encoders made of the pictures, side by side; D is 0 where no picture was read.
    """

    answers: list[Floats]
    vectors: NDArray[np.float32]


def without_answers(rows: pd.DataFrame, fields: Collection[str]) -> pd.DataFrame:
    """Return the rows of a lesion table with these fields missing in all of them."""
    return rows.assign(**dict.fromkeys(fields, np.nan))


def keep_answers(rows: pd.DataFrame, names: Sequence[str], kept: NDArray[np.bool_]) -> pd.DataFrame:
    """Return the rows of a lesion table with what is kept, (N, F), of these F fields, and the rest of them missing."""
    return rows.assign(**{name: rows[name].where(kept[:, index]) for index, name in enumerate(names)})


def ask_with_forms(opened: OpenedRun, examples: Examples, forms: Sequence[Forms], progress: Progress | None = None) -> Asked:
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
    return Asked(answers, np.concatenate(vectors) if vectors else np.empty((len(examples), 0), np.float32))


def ask_without_photograph(opened: OpenedRun, forms: Sequence[Forms], progress: Progress | None = None) -> list[Floats]:
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
                encoded = blank.rows(torch.arange(len(part), device=opened.device)) if blank and len(part) < size else blank
                parts.append(_answer(opened, encoded, part))
            answers.append(np.concatenate(parts))
            if progress:
                progress(number + 1, len(forms))
    return answers


def ask_with_pictures(
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


def strangers(groups: ArrayLike, generator: np.random.Generator) -> NDArray[np.int64]:
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
        # Exchanging with a row that is of another group and was given another group's mends this row and spoils none. There is
        # one: fewer than all rows are of this group or were given it, since the row itself is both.
        row, group = own[0], codes[own[0]]
        other = generator.choice(np.flatnonzero((codes != group) & (codes[given] != group)))
        given[[row, other]] = given[[other, row]]


def _answer(opened: OpenedRun, encoded: Encoded | None, forms: Forms) -> Floats:
    logits = opened.model(encoded, torch.from_numpy(forms).to(opened.device)).logits
    probabilities: Floats = logits.double().softmax(dim=1).cpu().numpy()
    return probabilities
