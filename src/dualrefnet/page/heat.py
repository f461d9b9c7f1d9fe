"""A heat map laid over the photograph that it was made for, as a PNG that a page can hold."""

from __future__ import annotations

import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# The colours of the report's heat maps: their lightness rises with the heat, so they are told apart without seeing
# hues, and in grey.
_COLOURS = cv2.COLORMAP_INFERNO
# How much of the photograph the hottest place hides; from half of the maximum on, all hide as much.
COVER, FULL_FROM = 0.65, 0.5
# The outline is drawn where the heat is half of its maximum: light on dark, so that it is seen on any skin.
_OUTLINE_AT = 0.5
_SIDE = 480
_GREY = 200
_SCALE = (320, 14)


def overlay(photograph: NDArray[np.uint8], heat: NDArray[np.float32], side: int = _SIDE) -> NDArray[np.uint8]:
    """Lay heat over a photograph, in shares of its maximum; where there is little, the skin shows through.

    Args:
        photograph: (S, S, 3) RGB.
        heat: (S, S); what is negative counts as none.
        side: of the result, pixels.

    Returns:
        (side, side, 3) RGB; without any heat it is the photograph.

    Raises:
        ValueError: the shapes don't fit, or heat isn't finite.
    """
    if photograph.ndim != 3 or heat.shape != photograph.shape[:2]:
        raise ValueError(f"heat {heat.shape} doesn't fit a photograph {photograph.shape}")
    if not np.isfinite(heat).all():
        raise ValueError("heat must be finite")
    picture = enlarge(photograph, side)
    largest = float(heat.max())
    if largest <= 0:
        return picture
    share = cv2.resize((np.maximum(heat, 0) / largest).astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    warm = _blend(picture, np.asarray(share, dtype=np.float32))
    outlines, _ = cv2.findContours((share >= _OUTLINE_AT).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    for colour, width in (((0, 0, 0), 4), ((255, 255, 255), 2)):
        cv2.drawContours(warm, outlines, -1, colour, width, cv2.LINE_AA)
    return warm


def enlarge(photograph: NDArray[np.uint8], side: int = _SIDE) -> NDArray[np.uint8]:
    """Return a square photograph at another size, (side, side, 3)."""
    how = cv2.INTER_AREA if photograph.shape[0] > side else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(photograph, (side, side), interpolation=how), dtype=np.uint8)


def scale() -> NDArray[np.uint8]:
    """Draw the colours from none (left) to the maximum (right), on grey: (14, 320, 3)."""
    width, height = _SCALE
    grey = np.full((height, width, 3), _GREY, dtype=np.uint8)
    return _blend(grey, np.tile(np.linspace(0, 1, width, dtype=np.float32), (height, 1)))


def to_png(picture: NDArray[np.uint8]) -> bytes:
    """Encode (H, W, 3) RGB as PNG, without any metadata."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", compress_level=6)
    return stream.getvalue()


def to_jpeg(picture: NDArray[np.uint8], quality: int = 85) -> bytes:
    """Encode (H, W, 3) RGB as JPEG, without any metadata."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _blend(picture: NDArray[np.uint8], share: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay the colours of shares (H, W) in 0..1 over a picture."""
    colour = cv2.applyColorMap(np.rint(share * 255).clip(0, 255).astype(np.uint8), _COLOURS)[..., ::-1].astype(
        np.float32
    )
    cover = (COVER * np.minimum(share / FULL_FROM, 1))[..., None]
    return np.ascontiguousarray(np.rint((1 - cover) * picture + cover * colour), dtype=np.uint8)
