"""From a decoded image to the square that the model reads: one function for training and for prediction.

Colour constancy (Shades of Gray), contrast (CLAHE on the lightness), then resizing: the paper's order.
"""

from __future__ import annotations

import threading
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

# A thread pool works on whole images; OpenCV's own threads inside each of them would only fight over the cores.
cv2.setNumThreads(1)
_thread = threading.local()


class ImageSettings(Protocol):
    """How images are preprocessed: the section `image` of a recipe, or of a bundle."""

    @property
    def size(self) -> int: ...  # side of the model's input, pixels
    @property
    def colour_constancy(self) -> str: ...  # shades_of_gray or none
    @property
    def minkowski_p(self) -> float: ...
    @property
    def gamma(self) -> float | None: ...
    @property
    def clahe(self) -> bool: ...
    @property
    def clahe_clip(self) -> float: ...
    @property
    def clahe_grid(self) -> int: ...  # tiles along each side
    @property
    def clahe_channel_order(self) -> str: ...  # correct or hm_compat
    @property
    def fit(self) -> str: ...  # squash or crop


def preprocess(image: Image, settings: ImageSettings, side: int | None = None) -> Image:
    """Apply colour constancy and CLAHE to (H, W, 3) RGB, then resize to `side` (None: `settings.size`)."""
    if settings.colour_constancy == "shades_of_gray":
        image = shades_of_gray(image, settings.minkowski_p, settings.gamma)
    if settings.clahe:
        image = clahe_lightness(image, settings.clahe_clip, settings.clahe_grid, settings.clahe_channel_order)
    return to_square(image, side or settings.size, settings.fit)


def shades_of_gray(image: Image, p: float = 6.0, gamma: float | None = None) -> Image:
    """Remove the colour of the illuminant of (H, W, 3) RGB (Finlayson and Trezzi 2004).

    The illuminant of channel c is estimated as e_c = (mean_x I_c(x)^p)^(1/p); p = 1 is Grey World, large values
    approach max-RGB. With e scaled to unit length every channel is divided by sqrt(3) e_c, so that grey light changes
    nothing. `gamma`: decode the image with this exponent first and encode it again at the end.
    """
    # An 8-bit channel has 256 values: powers of 256 numbers and a histogram replace powers of every pixel, exactly.
    values = np.arange(256, dtype=np.float64) / 255
    if gamma is not None:
        values = values**gamma
    counts = np.stack([np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)])
    # Relative to the channel's peak, since a large power of a dark value itself would underflow to zero.
    peak = np.where(counts > 0, values, 0).max(axis=1)
    relative = np.minimum(values / np.maximum(peak, 1e-12)[:, None], 1)
    light = peak * ((counts * relative**p).sum(axis=1) / (image.shape[0] * image.shape[1])) ** (1 / p)
    length = np.linalg.norm(light)
    if length == 0:
        return image.copy()
    # A channel that is black everywhere stays black: any finite gain will do.
    gain = 1 / (np.sqrt(3) * np.maximum(light / length, 1e-6))
    table = np.clip(values[:, None] * gain[None, :], 0, 1)
    if gamma is not None:
        table = table ** (1 / gamma)
    table = np.rint(table * 255).astype(np.uint8)
    return np.asarray(cv2.LUT(image, table[None, :, :]), dtype=np.uint8)


def clahe_lightness(image: Image, clip: float = 1.0, grid: int = 12, channel_order: str = "correct") -> Image:
    """Equalise the lightness of (H, W, 3) RGB with limited contrast; a and b of CIE LAB are untouched.

    `hm_compat` computes LAB from swapped red and blue, as released code of the paper's lineage does.
    """
    to_lab, from_lab = cv2.COLOR_RGB2LAB, cv2.COLOR_LAB2RGB
    if channel_order != "correct":
        to_lab, from_lab = cv2.COLOR_BGR2LAB, cv2.COLOR_LAB2BGR
    lab = cv2.cvtColor(image, to_lab)
    # An OpenCV CLAHE object keeps buffers, so each thread has its own.
    if getattr(_thread, "settings", None) != (clip, grid):
        _thread.settings, _thread.clahe = (clip, grid), cv2.createCLAHE(clipLimit=clip, tileGridSize=(grid, grid))
    lab[..., 0] = _thread.clahe.apply(np.ascontiguousarray(lab[..., 0]))
    return np.asarray(cv2.cvtColor(lab, from_lab), dtype=np.uint8)


def to_square(image: Image, side: int, fit: str) -> Image:
    """Resize to (side, side, 3): `squash` both sides, or `crop` the middle of the longer one first."""
    height, width = image.shape[:2]
    if fit == "crop":
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        image = image[top : top + short, left : left + short]
    # Averaging areas avoids aliasing when shrinking; it has no meaning when enlarging.
    method = cv2.INTER_AREA if min(image.shape[:2]) >= side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(np.ascontiguousarray(image), (side, side), interpolation=method), dtype=np.uint8)
