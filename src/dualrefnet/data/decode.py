"""Decode image files of unknown origin into 8-bit RGB arrays, and read lesion masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dualrefnet.errors import DataError, ImageError
from dualrefnet.runtime import images
from dualrefnet.runtime.preprocessing import to_square

MASK_FOLDER = "masks"


def decode_image(source: Path | str | bytes, **limits: Any) -> NDArray[np.uint8]:
    """Decode an image of unknown origin to (H, W, 3); see `dualrefnet.runtime.images.decode_image`."""
    try:
        return images.decode_image(source, **limits)
    except images.DecodingError as error:
        raise ImageError(str(error)) from None


def find_masks(root: Path, folder: Path | None = None) -> dict[str, Path]:
    """Return image id -> mask file of `folder` (None: `masks` in the data set's folder `root`)."""
    where = root / MASK_FOLDER if folder is None else folder
    if not where.is_dir():
        needed = "it must hold <image id>.png for some images, white in the lesion"
        raise DataError(f"there is no folder of masks {where}; {needed}")
    masks = {path.stem: path for path in sorted(where.glob("[!.]*.png")) if path.is_file()}
    if not masks:
        raise DataError(f"{where} holds no mask; name them <image id>.png")
    return masks


def read_mask(path: Path, image: Path, side: int, fit: str) -> NDArray[np.bool_] | None:
    """Read a mask (over 127 is lesion) as the (S, S) square that the model sees; None if no lesion is marked there."""
    values = decode_image(path, min_side=1).max(axis=2)
    if 0 < values.max() <= 127:
        brightest = f"the brightest pixel of the mask {path.name} is {values.max()}"
        raise DataError(f"{brightest}, and lesion is over 127; write 0 and 255")
    marked = np.where(values > 127, np.uint8(255), np.uint8(0))
    if fit == "crop":
        # The middle is cut out of the image, so the mask must have its shape first.
        height, width = decode_image(image).shape[:2]
        marked = np.asarray(cv2.resize(marked, (width, height), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
    mask = to_square(marked, side, fit) > 127
    return mask if mask.any() else None
