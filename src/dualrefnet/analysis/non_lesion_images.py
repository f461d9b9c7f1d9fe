"""Skin without a lesion: the largest square of a photograph that lies away from the outlined lesion.

The hardest of all pictures to tell from photographs of lesions, since all but the lesion is the same: camera, light,
patient. A
cutting is also an enlargement, so beside each stands a square of the same size around the lesion, for comparison.
"""

# also: Pictures that show no lesion, for measuring whether a score tells them from photographs that do.

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from dualrefnet.analysis import non_lesion_drawings as drawn
from dualrefnet.data.images import decode_image, read_mask

# Masks are looked at in this many pixels a side; the lesion's border is kept away from by the share MARGIN of a side.
GRID, MARGIN = 256, 0.03


# The least side of a cutting: as a share of the photograph's shorter side, and in pixels.
LEAST_SHARE, LEAST_PIXELS = 0.25, 96


@dataclass(frozen=True)
class Cuttings:
    """Two squares of one photograph, of the same side.

    Attributes:
        skin: (Q, Q, 3) RGB without any of the lesion.
        lesion: (Q, Q, 3) RGB around the middle of the lesion.
    """

    skin: NDArray[np.uint8]
    lesion: NDArray[np.uint8]


def cut_skin(photograph: Path, mask: Path) -> Cuttings | None:
    """Cut the largest square beside the lesion, and one of the same size around it.

    Args:
        photograph: the file.
        mask: of its lesion, see `dualrefnet.data.images`.

    Returns:
        None if no lesion is marked, or there is no room beside it.

    Raises:
        ImageError: a file can't be read.
        DataError: the mask isn't black and white.
    """
    marked = read_mask(mask, photograph, GRID, "squash")
    if marked is None:
        return None
    pixels = decode_image(photograph)
    height, width = pixels.shape[:2]
    scale = GRID / max(height, width)
    high, wide = max(1, round(height * scale)), max(1, round(width * scale))
    lesion = cv2.resize(marked.astype(np.uint8), (wide, high), interpolation=cv2.INTER_NEAREST)
    kept_away = cv2.dilate(lesion, np.ones((2 * round(MARGIN * GRID) + 1,) * 2, np.uint8))
    # In chessboard distance: how far a square around each place reaches before it meets the lesion or the edge.
    reach = cv2.distanceTransform(np.pad(1 - kept_away, 1), cv2.DIST_C, 3)[1:-1, 1:-1]
    row, column = np.unravel_index(int(reach.argmax()), reach.shape)
    side = int((2 * reach.max() - 1) / scale)
    if side < max(LEAST_PIXELS, LEAST_SHARE * min(height, width)):
        return None
    rows, columns = np.nonzero(lesion)
    skin = _square(pixels, (row + 0.5) / scale, (column + 0.5) / scale, side)
    return Cuttings(skin, _square(pixels, (rows.mean() + 0.5) / scale, (columns.mean() + 0.5) / scale, side))


def _square(pixels: NDArray[np.uint8], row: float, column: float, side: int) -> NDArray[np.uint8]:
    """Cut a square with its middle at a place, moved as far as it must to lie within the picture."""
    top = min(max(0, round(row - side / 2)), pixels.shape[0] - side)
    left = min(max(0, round(column - side / 2)), pixels.shape[1] - side)
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


PHOTOGRAPHS, DOCUMENTS, PLAIN, MEDICAL = (
    "everyday photographs",
    "documents and drawings",
    "plain areas",
    "other medical images",
)


Half = Literal["choosing", "reporting"]


# Of each source. They aren't independent, so intervals draw sources.
CUTTINGS = 8


# Left out of what scikit-image brings along: astronaut, camera and lfw (people), phantom (drawn tissue).
_BUNDLED = {
    "choosing": {
        PHOTOGRAPHS: (
            "coffee.png",
            "coins.png",
            "brick.png",
            "clock_motion.png",
            "motorcycle_left.png",
            "hubble_deep_field.jpg",
            "china.jpg",
        ),
        DOCUMENTS: ("page.png", "color.png"),
    },
    "reporting": {
        PHOTOGRAPHS: ("chelsea.png", "rocket.jpg", "grass.png", "gravel.png", "moon.png", "flower.jpg"),
        DOCUMENTS: ("text.png", "logo.png", "horse.png", "chessboard_RGB.png"),
    },
}


_OF_SCIKIT_LEARN = ("china.jpg", "flower.jpg")


_MEDICAL = ("retina.jpg", "ihc.png", "cell.png", "microaneurysms.png")


_DRAWN: dict[str, dict[str, tuple[drawn.Draw, ...]]] = {
    "choosing": {
        DOCUMENTS: (drawn.draw_form, drawn.draw_receipt, drawn.draw_bar_chart, drawn.draw_landscape),
        PLAIN: (drawn.draw_one_colour, drawn.draw_stripes),
    },
    "reporting": {
        DOCUMENTS: (drawn.draw_table, drawn.draw_window, drawn.draw_line_chart, drawn.draw_bar_code),
        PLAIN: (drawn.draw_gradient, drawn.draw_noise),
    },
}


@dataclass(frozen=True)
class EverydayPicture:
    """A picture without a lesion.

    Attributes:
        pixels: (H, W, 3) RGB of uint8, of the size of a photograph; to be preprocessed as one.
        group: what kind of thing it is: `PHOTOGRAPHS`, `DOCUMENTS`, `PLAIN` or `MEDICAL`.
        source: the file or the drawing function; pictures of one source resemble each other.
    """

    pixels: NDArray[np.uint8]
    group: str
    source: str


def everyday_pictures(half: Half, seed: int = 0) -> Iterator[EverydayPicture]:
    """Give one half of the pictures, `CUTTINGS` of each source.

    Args:
        half: `choosing` or `reporting`.
        seed: of the cuttings and of what is drawn.
    """
    random = np.random.default_rng([seed, ("choosing", "reporting").index(half)])
    for group, names in _BUNDLED[half].items():
        for name in names:
            yield from _cuttings(name, group, random)
    for group, functions in _DRAWN[half].items():
        for function in functions:
            for number in range(CUTTINGS):
                pixels = function(random)
                # Every second sheet is a screenshot or a scan, the others are photographed.
                if group == DOCUMENTS and number % 2:
                    pixels = drawn.photographed(pixels, random)
                yield EverydayPicture(pixels, group, function.__name__)


def medical_pictures(seed: int = 0) -> Iterator[EverydayPicture]:
    """Give medical images of other kinds: a retina, stained tissue, a cell, micro-aneurysms. A harder group, reported
    apart.
    """
    random = np.random.default_rng([seed, 2])
    for name in _MEDICAL:
        yield from _cuttings(name, MEDICAL, random)


def _cuttings(name: str, group: str, random: np.random.Generator) -> Iterator[EverydayPicture]:
    """Give the whole picture first, then parts of it, turned by quarters and mirrored."""
    whole = _read(name)
    height, width = whole.shape[:2]
    yield EverydayPicture(whole, group, name)
    for _ in range(CUTTINGS - 1):
        share = random.uniform(0.5, 0.9)
        high, wide = int(height * share), int(width * share)
        top, left = int(random.integers(height - high + 1)), int(random.integers(width - wide + 1))
        part = np.rot90(whole[top : top + high, left : left + wide], int(random.integers(4)))
        yield EverydayPicture(np.ascontiguousarray(part[:, ::-1] if random.random() < 0.5 else part), group, name)


def _read(name: str) -> NDArray[np.uint8]:
    package = "sklearn.datasets.images" if name in _OF_SCIKIT_LEARN else "skimage.data"
    pixels = decode_image(importlib.resources.files(package).joinpath(name).read_bytes(), min_side=1)
    # Photographs are larger than some of these; what is read later must not depend on how small they were.
    scale = 400 / min(pixels.shape[:2])
    if scale > 1:
        pixels = np.asarray(cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    return pixels
