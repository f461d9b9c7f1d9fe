"""Skin without a lesion: the largest square of a photograph that lies away from the outlined lesion.

The hardest of all pictures to tell from photographs of lesions, since all but the lesion is the same: camera, light, patient. A
cutting is also an enlargement, so beside each stands a square of the same size around the lesion, for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dualrefnet.data.decode import decode_image
from dualrefnet.data.masks import read_mask

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
        mask: of its lesion, see `dualrefnet.data.masks`.

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
