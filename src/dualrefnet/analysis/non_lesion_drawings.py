"""Pictures that a program draws with a seed: what is uploaded by mistake beside photographs, such as forms, charts and
windows.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Random = np.random.Generator
Colour = tuple[int, int, int]
Draw = Callable[[Random], Pixels]

INK: Colour = (25, 25, 30)
LETTERS = np.frombuffer(b"aaaabcdeeeeefghiiiklmnnnoooprrrsssttttuuvwxyz", dtype=np.uint8)


def draw_form(random: Random) -> Pixels:
    """Return a questionnaire: questions, lines to write on, boxes to tick."""
    page = _sheet(random, 1100, 800)
    _write(page, _words(random, 3), (60, 90), 1.3, 2)
    for y in range(160, 1040, 55):
        _write(page, _words(random, 2) + ":", (60, y), 0.7)
        if random.random() < 0.4:
            for x in (380, 520, 660):
                cv2.rectangle(page, (x, y - 18), (x + 20, y + 2), INK, 2)
                _write(page, _words(random, 1), (x + 28, y), 0.6)
            ticked = int(random.choice((380, 520, 660)))
            cv2.line(page, (ticked, y - 18), (ticked + 20, y + 2), (20, 40, 140), 3)
        else:
            cv2.line(page, (380, y + 4), (740, y + 4), (120, 120, 120), 1)
            _write(page, _words(random, 2), (390, y), 0.8, colour=(20, 40, 140))
    return page


def draw_receipt(random: Random) -> Pixels:
    """Return a till receipt: a narrow strip of goods and prices."""
    page = _sheet(random, 1000, 460)
    _write(page, _words(random, 2).upper(), (90, 70), 1.1, 2)
    for y in range(150, 860, 38):
        _write(page, _words(random, 2), (40, y), 0.65)
        _write(page, f"{random.uniform(0.5, 90):6.2f}", (330, y), 0.65)
    cv2.line(page, (40, 880), (420, 880), INK, 2)
    _write(page, f"TOTAL {random.uniform(20, 400):8.2f}", (120, 940), 1.0, 2)
    return page


def draw_table(random: Random) -> Pixels:
    """Return a table of numbers with a coloured head."""
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
            said = _words(random, 1) if row == 0 or column == 0 else f"{random.normal(50, 20):.1f}"
            _write(page, said, (int(xs[column]) + 6, int(ys[row + 1]) - 10), 0.5)
    return page


def draw_bar_chart(random: Random) -> Pixels:
    """Return a chart with coloured bars."""
    page = _sheet(random, 700, 1000)
    _write(page, _words(random, 4), (120, 60), 1.0, 2)
    cv2.line(page, (110, 100), (110, 600), INK, 2)
    cv2.line(page, (110, 600), (950, 600), INK, 2)
    bars = int(random.integers(4, 12))
    step, colours = 820 // bars, [_colour(random) for _ in range(3)]
    for bar in range(bars):
        left, top = 125 + bar * step, 600 - int(random.integers(40, 480))
        cv2.rectangle(page, (left, top), (left + int(step * 0.7), 599), colours[bar % 3], -1)
        _write(page, _words(random, 1)[:6], (left, 630), 0.5)
    return page


def draw_line_chart(random: Random) -> Pixels:
    """Return a chart with coloured lines over a grid."""
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


def draw_window(random: Random) -> Pixels:
    """Return a screenshot: windows with bars, text and buttons on a coloured desktop."""
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


def draw_bar_code(random: Random) -> Pixels:
    """Return a label with a bar code."""
    page = _sheet(random, 500, 800)
    widths = random.integers(1, 5, 110) * 2
    x = 60
    for number, width in enumerate(widths):
        if number % 2 == 0:
            cv2.rectangle(page, (x, 90), (x + int(width) - 1, 370), INK, -1)
        x += int(width)
    _write(page, " ".join(str(digit) for digit in random.integers(0, 10, 13)), (90, 430), 1.0, 2)
    return page


def draw_landscape(random: Random) -> Pixels:
    """Return hills under a sky, in gradients of colour."""
    height, width = 600, 900
    down = np.linspace(0, 1, height)[:, None, None]
    sky_top, sky_bottom = (
        np.array([70, 120, 200]) + random.normal(0, 25, 3),
        np.array([215, 220, 235]) + random.normal(0, 15, 3),
    )
    page = np.broadcast_to((1 - down) * sky_top + down * sky_bottom, (height, width, 3)).copy()
    x, y = np.arange(width), np.arange(height)[:, None]
    for far in range(4):
        waves = sum(
            np.sin(x / random.uniform(60, 260) + random.uniform(0, 6)) * random.uniform(10, 45) for _ in range(3)
        )
        ground = np.array([40, 110, 45]) * (1.3 - 0.2 * far) + random.normal(0, 15, 3)
        page[y > 230 + 90 * far + waves] = ground
    page += random.normal(0, 5, page.shape)
    return _bytes(page)


def draw_one_colour(random: Random) -> Pixels:
    """Return an area of one colour: a covered lens, a wall."""
    return np.full((480, 640, 3), random.integers(0, 256, 3), dtype=np.uint8)


def draw_gradient(random: Random) -> Pixels:
    """Return an area that passes from one colour to another."""
    ends, along = random.uniform(0, 255, (2, 3)), np.linspace(0, 1, 640)[None, :, None]
    return _bytes(np.broadcast_to((1 - along) * ends[0] + along * ends[1], (480, 640, 3)))


def draw_stripes(random: Random) -> Pixels:
    """Return stripes of two colours, in any direction."""
    angle, period = random.uniform(0, np.pi), random.uniform(12, 90)
    y, x = np.mgrid[0:480, 0:640]
    first = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period) > 0
    return np.where(first[:, :, None], random.integers(0, 256, 3), random.integers(0, 256, 3)).astype(np.uint8)


def draw_noise(random: Random) -> Pixels:
    """Return noise, coarse or fine: a picture that was damaged."""
    grain = int(random.choice((1, 4, 16)))
    small = random.integers(0, 256, (480 // grain, 640 // grain, 3)).astype(np.uint8)
    return np.asarray(cv2.resize(small, (640, 480), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)


def photographed(picture: Pixels, random: Random) -> Pixels:
    """Return a sheet as a telephone photographs it: a little turned, unevenly lit, tinted, blurred and noisy."""
    height, width = picture.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), random.uniform(-8, 8), random.uniform(0.9, 1.2))
    table = tuple(int(value) for value in random.integers(40, 150, 3))
    turned = cv2.warpAffine(picture, turn, (width, height), borderValue=table)
    light = np.linspace(random.uniform(0.55, 0.9), random.uniform(0.8, 1.05), width)[None, :, None]
    tint = np.array([1.0, random.uniform(0.88, 1.0), random.uniform(0.7, 1.0)])
    blurred = cv2.GaussianBlur(turned, (0, 0), random.uniform(0.4, 1.4)).astype(float)
    return _bytes(blurred * light * tint + random.normal(0, 4, picture.shape))


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
