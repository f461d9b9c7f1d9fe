"""From a decoded photograph to the square that the model reads: one function for training and for prediction."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from dualrefnet.data.colour import clahe_lightness, shades_of_gray
from dualrefnet.recipe import ImageSection

# A thread pool works on whole images; OpenCV's own threads inside each of them would only fight over the cores.
cv2.setNumThreads(1)


def preprocess(image: NDArray[np.uint8], section: ImageSection, side: int | None = None) -> NDArray[np.uint8]:
    """Colour constancy, CLAHE, then resize: the paper's order.

    Args:
        image: (H, W, 3) RGB at full resolution.
        section: the recipe's choices.
        side: side of the result in pixels; None: `section.size`.

    Returns:
        (side, side, 3) RGB.
    """
    if section.colour_constancy == "shades_of_gray":
        image = shades_of_gray(image, section.minkowski_p, section.gamma)
    if section.clahe:
        image = clahe_lightness(image, section.clahe_clip, section.clahe_grid, section.clahe_channel_order)
    return to_square(image, side or section.size, section.fit)


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
