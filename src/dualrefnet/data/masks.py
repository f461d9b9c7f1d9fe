"""Masks of lesions: where in a photograph the lesion is, as somebody or some program outlined it.

A folder holds `<image id>.png` for some or all images: the whole photograph squashed to any size, white where the lesion is.
Masks serve one purpose, to check where Grad-CAM looks. No model reads them, in training or later.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base as ExifTag
from PIL.TiffImagePlugin import TiffImageFile

from dualrefnet.data.decode import decode_image
from dualrefnet.errors import DataError, ImageError
from dualrefnet.runtime.preprocessing import to_square

FOLDER = "masks"


def find_masks(root: Path, folder: Path | None = None) -> dict[str, Path]:
    """Return image id -> mask file.

    Args:
        root: the data set's folder.
        folder: of the masks; None: `masks` in `root`.

    Raises:
        DataError: there is no such folder, or no PNG in it.
    """
    where = root / FOLDER if folder is None else folder
    if not where.is_dir():
        raise DataError(f"there is no folder of masks {where}; it must hold <image id>.png for some images, white where the lesion is")
    found = {path.stem: path for path in sorted(where.glob("*.png")) if path.is_file() and not path.name.startswith(".")}
    if not found:
        raise DataError(f"{where} holds no mask; name them <image id>.png")
    return found


def read_mask(path: Path, photograph: Path, side: int, fit: str) -> NDArray[np.bool_] | None:
    """Read a mask and bring it to the square that the model sees.

    Args:
        path: of the mask; a pixel over 127 is lesion.
        photograph: that it belongs to; only its size is looked at, and only to crop.
        side: S, of the square.
        fit: how the photograph became that square (`image.fit`): `squash` or `crop`.

    Returns:
        (S, S), True in the lesion; None if no lesion is marked in that square.

    Raises:
        ImageError: a file can't be read.
        DataError: the mask isn't black and white: the whole of it is dark, but not black.
    """
    values = decode_image(path, min_side=1).max(axis=2)
    if 0 < values.max() <= 127:
        raise DataError(f"the brightest pixel of the mask {path.name} is {values.max()}, and lesion is over 127; write 0 and 255")
    marked = np.where(values > 127, np.uint8(255), np.uint8(0))
    if fit == "crop":
        # The middle is cut out of the photograph, so the mask must have its shape first.
        height, width = photograph_size(photograph)
        marked = np.asarray(cv2.resize(marked, (width, height), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
    mask = to_square(marked, side, fit) > 127
    return mask if mask.any() else None


def photograph_size(path: Path) -> tuple[int, int]:
    """Return height and width of an upright photograph, from its file's header alone (of a TIFF: from its pixels).

    Raises:
        ImageError: the file isn't an image that `decode_image` reads, or its header is damaged.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG", "BMP", "TIFF", "WEBP")) as image:
            if not isinstance(image, TiffImageFile):
                width, height = image.size
                return (width, height) if _turned(image) else (height, width)
    except Exception as error:
        # A header given by a stranger makes Pillow raise nearly anything.
        raise ImageError(f"{path.name} can't be measured ({type(error).__name__}); get the file again or remove it") from None
    # Whether Pillow swaps a TIFF's sides before its pixels are read depends on the version.
    height, width = decode_image(path).shape[:2]
    return height, width


def _turned(image: Image.Image) -> bool:
    """True if a picture must be turned by a quarter to be upright (EXIF 2.32, tag 0x0112); EXIF that can't be read counts as none."""
    try:
        return image.getexif().get(ExifTag.Orientation, 1) in (5, 6, 7, 8)
    except Exception:
        return False
