"""Pictures from which the lesion, or all but the lesion, was taken: does the model need the lesion, and is it enough?

An outline is made a little larger and gets a soft border, so that nothing of the lesion is left and no sharp edge is added. What
stays in every change: the lesion's place and size, which the changed part shows, and in the blurred one its mean colour too.
A changed picture is one that the model never saw in training; that alone can lower its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dualrefnet.data.loader import Examples
from dualrefnet.data.masks import read_mask
from dualrefnet.evaluation.changed_inputs import Floats, Forms, Progress, ask_with_pictures
from dualrefnet.evaluation.opened_run import OpenedRun

# In the order of `change_picture`.
CHANGES = ("lesion_blurred", "background_only", "lesion_only")
# As shares of the picture's side: how much larger the outline becomes; sd of its soft border; sd of the blur; width of the ring of
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


def ask_about_changed(
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
        changed = [change_picture(picture, outlines.mask(int(place))) for picture, place in zip(pictures, places, strict=True)]
        return [np.stack(alike) for alike in zip(*changed, strict=True)]

    answers = ask_with_pictures(opened, examples, outlines.places, change, forms, progress)
    return dict(zip(CHANGES, answers, strict=True))


def change_picture(picture: Picture, mask: Mask) -> tuple[Picture, Picture, Picture]:
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
