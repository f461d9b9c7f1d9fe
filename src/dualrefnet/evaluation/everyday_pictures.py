"""Pictures that show no lesion, for measuring whether a score tells them from photographs that do.

They come with scikit-image and scikit-learn or are drawn by a program: nothing is fetched, and no face is among them. Halves
share no source: what is chosen by looking at the first is reported on the second.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from dualrefnet.data.decode import decode_image
from dualrefnet.evaluation import drawn_pictures as drawn

PHOTOGRAPHS, DOCUMENTS, PLAIN, MEDICAL = "everyday photographs", "documents and drawings", "plain areas", "other medical images"
Half = Literal["choosing", "reporting"]

# Of each source. They aren't independent, so intervals draw sources.
CUTTINGS = 8
# Left out of what scikit-image brings along: astronaut, camera and lfw (people), phantom (drawn tissue).
_BUNDLED = {
    "choosing": {
        PHOTOGRAPHS: (
            "coffee.png", "coins.png", "brick.png", "clock_motion.png", "motorcycle_left.png", "hubble_deep_field.jpg", "china.jpg",
        ),
        DOCUMENTS: ("page.png", "color.png"),
    },
    "reporting": {
        PHOTOGRAPHS: ("chelsea.png", "rocket.jpg", "grass.png", "gravel.png", "moon.png", "flower.jpg"),
        DOCUMENTS: ("text.png", "logo.png", "horse.png", "chessboard_RGB.png"),
    },
}  # fmt: skip
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
    """Give medical images of other kinds: a retina, stained tissue, a cell, micro-aneurysms. A harder group, reported apart."""
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
