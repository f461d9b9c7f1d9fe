"""From a decoded photograph to the square that the model reads: one function for training and for prediction."""

from __future__ import annotations

from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from .colour import clahe_lightness, shades_of_gray

# A thread pool works on whole images; OpenCV's own threads inside each of them would only fight over the cores.
cv2.setNumThreads(1)


class ImageSettings(Protocol):
    """What is done to a photograph: the section `image` of a recipe, or of a bundle."""

    @property
    def size(self) -> int:
        """Side of the model's input, pixels."""

    @property
    def colour_constancy(self) -> str:
        """`shades_of_gray` or `none`."""

    @property
    def minkowski_p(self) -> float:
        """Norm of the colour constancy."""

    @property
    def gamma(self) -> float | None:
        """Exponent with which the photograph is decoded first; None: it isn't."""

    @property
    def clahe(self) -> bool:
        """Whether the contrast is equalised."""

    @property
    def clahe_clip(self) -> float:
        """Clip limit."""

    @property
    def clahe_grid(self) -> int:
        """Tiles along each side."""

    @property
    def clahe_channel_order(self) -> str:
        """`correct` or `hm_compat`."""

    @property
    def fit(self) -> str:
        """`squash` or `crop`."""


def preprocess(image: NDArray[np.uint8], settings: ImageSettings, side: int | None = None) -> NDArray[np.uint8]:
    """Colour constancy, CLAHE, then resize: the paper's order.

    Args:
        image: (H, W, 3) RGB at full resolution.
        settings: the recipe's choices.
        side: side of the result in pixels; None: `settings.size`.

    Returns:
        (side, side, 3) RGB.
    """
    if settings.colour_constancy == "shades_of_gray":
        image = shades_of_gray(image, settings.minkowski_p, settings.gamma)
    if settings.clahe:
        image = clahe_lightness(image, settings.clahe_clip, settings.clahe_grid, settings.clahe_channel_order)
    return to_square(image, side or settings.size, settings.fit)


def to_square(image: NDArray[np.uint8], side: int, fit: str) -> NDArray[np.uint8]:
    """Resize to (side, side, 3): `squash` both sides, or `crop` the middle of the longer one first."""
    height, width = image.shape[:2]
    if fit == "crop":
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        image = image[top : top + short, left : left + short]
    # Averaging areas avoids aliasing when shrinking; it has no meaning when enlarging.
    shrink = min(image.shape[:2]) >= side
    resized = cv2.resize(np.ascontiguousarray(image), (side, side), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)
