"""Images without a lesion, for measuring an out-of-distribution score: photographs, drawn documents, healthy skin.

Documents, charts and screenshots, which are uploaded by mistake, are drawn with a seed; photographs come with
scikit-image and scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dualrefnet.data.images import decode_image, read_mask

Pixels = NDArray[np.uint8]
Random = np.random.Generator
Colour = tuple[int, int, int]

PHOTOGRAPHS, DOCUMENTS, PLAIN = "everyday photographs", "documents and drawings", "plain areas"
MEDICAL = "other medical images"
# Masks are read with this many pixels a side; the crop keeps away from the lesion by the share MARGIN of it.
GRID, MARGIN = 256, 0.03
# The least side of a crop: as a share of the image's shorter side, and in pixels.
LEAST_SHARE, LEAST_PIXELS = 0.25, 96
# Images of each source. They aren't independent, so intervals draw sources.
CROPS = 8


def crop_skin(image: Path, mask: Path) -> tuple[Pixels, Pixels] | None:
    """Crop the largest square beside the lesion, and one of the same size around it, each (Q, Q, 3) RGB; None: no room.

    Healthy skin is the hardest of all: camera, light and patient are the same; its counterpart is enlarged as much.
    """
    marked = read_mask(mask, image, GRID, "squash")
    if marked is None:
        return None
    pixels = decode_image(image)
    height, width = pixels.shape[:2]
    scale = GRID / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    lesion = cv2.resize(marked.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    kept_away = cv2.dilate(lesion, np.ones((2 * round(MARGIN * GRID) + 1,) * 2, np.uint8))
    # In chessboard distance: how far a square around each point reaches before it meets the lesion or the edge.
    reach = cv2.distanceTransform(np.pad(1 - kept_away, 1), cv2.DIST_C, 3)[1:-1, 1:-1]
    side = int((2 * reach.max() - 1) / scale)
    if side < max(LEAST_PIXELS, LEAST_SHARE * min(height, width)):
        return None

    def square(row: float, column: float) -> Pixels:
        # With its middle there, moved as far as it must to lie within the image.
        top = min(max(0, round((row + 0.5) / scale - side / 2)), height - side)
        left = min(max(0, round((column + 0.5) / scale - side / 2)), width - side)
        return np.ascontiguousarray(pixels[top : top + side, left : left + side])

    row, column = np.unravel_index(int(reach.argmax()), reach.shape)
    rows, columns = np.nonzero(lesion)
    return square(float(row), float(column)), square(rows.mean(), columns.mean())


@dataclass(frozen=True)
class NonLesionImage:
    """An image without a lesion, (H, W, 3) RGB of the size of a photograph; to be preprocessed as one."""

    pixels: Pixels
    group: str
    source: str  # the file or the drawing function; images of one source resemble each other


def everyday_images(seed: int = 0) -> Iterator[NonLesionImage]:
    """Yield `CROPS` images of each source; none of them is of a source that the score was chosen with."""
    random = np.random.default_rng([seed, 1])
    for group, names in _BUNDLED.items():
        for name in names:
            yield from _crops(name, group, random)
    for group, functions in _DRAWN.items():
        for function in functions:
            for number in range(CROPS):
                pixels = function(random)
                # Every second sheet is a screenshot or a scan, the others are photographed.
                if group == DOCUMENTS and number % 2:
                    pixels = _photographed(pixels, random)
                yield NonLesionImage(pixels, group, function.__name__.lstrip("_"))


def medical_images(seed: int = 0) -> Iterator[NonLesionImage]:
    """Yield medical images of other kinds, a harder group: a retina, stained tissue, a cell, micro-aneurysms."""
    random = np.random.default_rng([seed, 2])
    for name in ("retina.jpg", "ihc.png", "cell.png", "microaneurysms.png"):
        yield from _crops(name, MEDICAL, random)


def _crops(name: str, group: str, random: Random) -> Iterator[NonLesionImage]:
    """Yield the image itself first, then parts of it, turned by quarters and mirrored."""
    package = "sklearn.datasets.images" if name == "flower.jpg" else "skimage.data"
    full = decode_image(importlib.resources.files(package).joinpath(name).read_bytes(), min_side=1)
    # Photographs are larger than some of these; the score must not depend on how small they were.
    scale = 400 / min(full.shape[:2])
    if scale > 1:
        full = np.asarray(cv2.resize(full, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    height, width = full.shape[:2]
    yield NonLesionImage(full, group, name)
    for _ in range(CROPS - 1):
        share = random.uniform(0.5, 0.9)
        high, wide = int(height * share), int(width * share)
        top, left = int(random.integers(height - high + 1)), int(random.integers(width - wide + 1))
        part = np.rot90(full[top : top + high, left : left + wide], int(random.integers(4)))
        yield NonLesionImage(np.ascontiguousarray(part[:, ::-1] if random.random() < 0.5 else part), group, name)


INK: Colour = (25, 25, 30)
LETTERS = np.frombuffer(b"aaaabcdeeeeefghiiiklmnnnoooprrrsssttttuuvwxyz", dtype=np.uint8)


def _draw_table(random: Random) -> Pixels:
    page = _sheet(random, 800, 1000)
    columns, rows = int(random.integers(4, 8)), int(random.integers(10, 19))
    xs, ys = np.linspace(40, 960, columns + 1).astype(int), np.linspace(60, 760, rows + 1).astype(int)
    cv2.rectangle(page, (int(xs[0]), int(ys[0])), (int(xs[-1]), int(ys[1])), _colour(random), -1)
    for x in xs:
        cv2.line(page, (int(x), int(ys[0])), (int(x), int(ys[-1])), (140, 140, 140), 1)
    for y in ys:
        cv2.line(page, (int(xs[0]), int(y)), (int(xs[-1]), int(y)), (140, 140, 140), 1)
    for row in range(rows):
        for column in range(columns):
            text = _words(random, 1) if row == 0 or column == 0 else f"{random.normal(50, 20):.1f}"
            _write(page, text, (int(xs[column]) + 6, int(ys[row + 1]) - 10), 0.5)
    return page


def _draw_line_chart(random: Random) -> Pixels:
    page = _sheet(random, 700, 1000)
    for y in range(100, 601, 100):
        cv2.line(page, (100, y), (950, y), (205, 205, 205), 1)
        _write(page, f"{600 - y}", (40, y + 6), 0.55)
    for number in range(int(random.integers(1, 5))):
        heights = 350 + np.cumsum(random.normal(0, 22, 120))
        points = np.stack([np.linspace(100, 950, 120), np.clip(heights, 90, 610)], axis=1).astype(np.int32)
        colour = _colour(random)
        cv2.polylines(page, [points], False, colour, 3, cv2.LINE_AA)
        _write(page, _words(random, 2), (120 + 200 * number, 660), 0.6, colour=colour)
    return page


def _draw_window(random: Random) -> Pixels:
    page = np.full((800, 1280, 3), _colour(random), dtype=np.uint8)
    for _ in range(int(random.integers(1, 4))):
        left, top = int(random.integers(20, 500)), int(random.integers(20, 250))
        right, bottom = left + int(random.integers(500, 740)), top + int(random.integers(350, 520))
        cv2.rectangle(page, (left, top), (right, bottom), (248, 248, 248), -1)
        cv2.rectangle(page, (left, top), (right, top + 36), _colour(random), -1)
        _write(page, _words(random, 3), (left + 14, top + 25), 0.6, colour=(255, 255, 255))
        for y in range(top + 80, bottom - 70, 30):
            _write(page, _words(random, int(random.integers(2, 6))), (left + 20, y), 0.5)
        cv2.rectangle(page, (right - 130, bottom - 50), (right - 20, bottom - 15), _colour(random), -1)
    return page


def _draw_bar_code(random: Random) -> Pixels:
    page = _sheet(random, 500, 800)
    widths = random.integers(1, 5, 110) * 2
    x = 60
    for number, width in enumerate(widths):
        if number % 2 == 0:
            cv2.rectangle(page, (x, 90), (x + int(width) - 1, 370), INK, -1)
        x += int(width)
    _write(page, " ".join(str(digit) for digit in random.integers(0, 10, 13)), (90, 430), 1.0, 2)
    return page


def _draw_gradient(random: Random) -> Pixels:
    ends, along = random.uniform(0, 255, (2, 3)), np.linspace(0, 1, 640)[None, :, None]
    return _bytes(np.broadcast_to((1 - along) * ends[0] + along * ends[1], (480, 640, 3)))


def _draw_noise(random: Random) -> Pixels:
    grain = int(random.choice((1, 4, 16)))
    small = random.integers(0, 256, (480 // grain, 640 // grain, 3)).astype(np.uint8)
    return np.asarray(cv2.resize(small, (640, 480), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)


def _photographed(image: Pixels, random: Random) -> Pixels:
    """Draw a sheet as a telephone photographs it: a little turned, unevenly lit, tinted, blurred and noisy."""
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), random.uniform(-8, 8), random.uniform(0.9, 1.2))
    table = tuple(int(value) for value in random.integers(40, 150, 3))
    turned = cv2.warpAffine(image, turn, (width, height), borderValue=table)
    light = np.linspace(random.uniform(0.55, 0.9), random.uniform(0.8, 1.05), width)[None, :, None]
    tint = np.array([1.0, random.uniform(0.88, 1.0), random.uniform(0.7, 1.0)])
    blurred = cv2.GaussianBlur(turned, (0, 0), random.uniform(0.4, 1.4)).astype(float)
    return _bytes(blurred * light * tint + random.normal(0, 4, image.shape))


def _sheet(random: Random, height: int, width: int) -> Pixels:
    return np.full((height, width, 3), random.integers(235, 256, 3), dtype=np.uint8)


def _colour(random: Random) -> Colour:
    red, green, blue = random.integers(20, 220, 3)
    return int(red), int(green), int(blue)


def _words(random: Random, number: int) -> str:
    return " ".join(random.choice(LETTERS, int(random.integers(3, 10))).tobytes().decode() for _ in range(number))


def _write(
    page: Pixels, text: str, place: tuple[int, int], scale: float, thickness: int = 1, colour: Colour = INK
) -> None:
    cv2.putText(page, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thickness, cv2.LINE_AA)


def _bytes(values: NDArray[np.float64]) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# Left out of what scikit-image brings along: astronaut, camera and lfw (people), phantom (drawn tissue), and what the
# score was chosen with: coffee, coins, brick, clock, motorcycle, Hubble's deep field, page, colour wheel, china.
_BUNDLED = {
    PHOTOGRAPHS: ("chelsea.png", "rocket.jpg", "grass.png", "gravel.png", "moon.png", "flower.jpg"),
    DOCUMENTS: ("text.png", "logo.png", "horse.png", "chessboard_RGB.png"),
}
_DRAWN: dict[str, tuple[Callable[[Random], Pixels], ...]] = {
    DOCUMENTS: (_draw_table, _draw_window, _draw_line_chart, _draw_bar_code),
    PLAIN: (_draw_gradient, _draw_noise),
}
