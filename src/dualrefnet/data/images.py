"""Find image files by their ids; decode files of unknown origin into 8-bit RGB arrays; read lesion masks."""

from __future__ import annotations

import io
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base as ExifTag
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TILELENGTH, TILEWIDTH, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dualrefnet.errors import DataError, ImageError
from dualrefnet.runtime.image_structure import excess
from dualrefnet.runtime.preprocessing import to_square

MAX_BYTES = 100 * 2**20
MAX_PIXELS = 100_000_000
MIN_SIDE = 16
MASK_FOLDER = "masks"

# What is listed as an image; whether it can be decoded is seen when it is read.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
    *(".heic", ".heif", ".avif", ".gif", ".jp2"),
)
# EXIF orientation -> what brings the image upright (EXIF 2.32, tag 0x0112; 1 is upright).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OPENERS = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"BM": BmpImageFile,
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImageFile),
}
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK")


def image_path(name: str) -> str:
    """Return a path as one writes it here, whichever system the table came from."""
    return unicodedata.normalize("NFC", name.strip()).replace("\\", "/").removeprefix("./")


def image_id(name: str) -> str:
    """Return the path that names an image, without its suffix."""
    stem, suffix = os.path.splitext(image_path(name))
    return stem if suffix.lower() in IMAGE_SUFFIXES else stem + suffix


def list_files(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, links followed, hidden ones left out."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        # A link may lead back to where it came from.
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (os.path.join(where, name) for name in sorted(names) if not name.startswith("."))
        yield from filter(os.path.isfile, paths)


def files_in(folders: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Yield name and path of the files in some folders, not of those below."""
    for folder in folders:
        for name in sorted(os.listdir(folder)):
            # A folder, or a link that leads nowhere, is no file.
            if not name.startswith(".") and os.path.isfile(folder / name):
                yield name, str(folder / name)


class ImageIndex:
    """Image files by the names that tables give them: with or without suffix, in any case, with either slash."""

    def __init__(self, files: Iterable[tuple[str, str]]) -> None:
        """Take the name of each file, such as its path below a folder, and its path."""
        self._paths: dict[tuple[str, str], list[str]] = {}
        for name, path in files:
            for key in self._keys(name):
                self._paths.setdefault(key, []).append(path)

    def find(self, name: str) -> str | None:
        """Return the path of the file that `name` means, None if there is none; refuse a name that means two."""
        found = next((self._paths[key] for key in self._keys(name) if key in self._paths), [None])
        if len(found) > 1:
            raise DataError(f"two images are called {name}: {found[0]} and {found[1]}; keep one of them")
        return found[0]

    @staticmethod
    def _keys(name: str) -> list[tuple[str, str]]:
        """From what means one file to what may mean several."""
        path, stem = image_path(name), image_id(name)
        return [("path", path), ("any case", path.casefold()), ("id", stem), ("id in any case", stem.casefold())]


def decode_image(
    source: Path | str | bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG, BMP, TIFF or WebP image to (H, W, 3) RGB; safe for untrusted input and for several threads.

    The content decides the type, not the name. The EXIF orientation is applied (damaged EXIF counts as none),
    transparent pixels are put on white, grey and palette images become RGB, 16-bit samples are scaled to 8 bits, and of
    an animation or a multi-page file the first image is taken. Embedded colour profiles are ignored: the numbers in the
    file are taken as sRGB. `max_pixels` bounds width x height by the file's header; TIFF and WebP are also bound by
    Pillow's own limit, `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    name, data = _read(source, max_bytes)
    opener = _opener(data)
    if opener is None:
        raise ImageError(f"{name} isn't a JPEG, PNG, BMP, TIFF or WebP image, whatever its name says")
    too_many = excess(data)
    if too_many is not None:
        raise ImageError(f"{name} has {too_many}; save it anew")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: truncated images would pass; set it to False")
    _silence_pillow()
    try:
        # Not Image.open: it tries other formats too, and complains of size before our own limit is checked.
        with opener(io.BytesIO(data)) as image:
            _check_size(name, image, max_pixels, min_side)
            image.load()
            return _to_rgb(name, image)
    except ImageError:
        raise
    except Exception as error:
        # A decoder given hostile bytes raises nearly anything: OSError, SyntaxError, struct.error, KeyError,
        # MemoryError.
        raise ImageError(
            f"{name} is damaged or truncated ({_one_line(error)}); get the file again or remove it"
        ) from None


def _read(source: Path | str | bytes, max_bytes: int) -> tuple[str, bytes]:
    """Return a printable name without its folders, and the file's bytes."""
    if isinstance(source, bytes):
        name, data = "the image", source
    else:
        path = Path(source)
        name = path.name if path.name.isprintable() else ascii(path.name)
        try:
            if not path.is_file():
                raise ImageError(f"there is no file {name}")
            with path.open("rb") as file:
                # Python allocates all the memory that it is asked to read: ask for no more than there is.
                data = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
        except (OSError, ValueError) as error:
            raise ImageError(f"{name} can't be read: {_one_line(error)}") from None
    if len(data) > max_bytes:
        raise ImageError(f"{name} is larger than {max_bytes:,} bytes")
    return name, data


def _opener(data: bytes) -> type[ImageFile.ImageFile] | None:
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    return next((opener for magic, opener in _OPENERS.items() if data.startswith(magic)), None)


def _silence_pillow() -> None:
    """Ignore Pillow's warnings about damaged EXIF tags; its warnings about size are another category and stay.

    `warnings.catch_warnings` isn't safe with threads, so the filter stays; the check keeps it from being set again and
    again, which would make Python forget which warnings it has shown once.
    """
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[0] != "ignore" or getattr(first[3], "pattern", None) != r"PIL\.":
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _check_size(name: str, image: ImageFile.ImageFile, max_pixels: int, min_side: int) -> None:
    width, height = image.size
    if isinstance(image, (TiffImageFile, WebPImageFile)) and Image.MAX_IMAGE_PIXELS is not None:
        max_pixels = min(max_pixels, Image.MAX_IMAGE_PIXELS)
    if width * height > max_pixels:
        raise ImageError(f"{name} has {width} x {height} pixels; the limit is {max_pixels:,}")
    if min(width, height) < min_side:
        raise ImageError(f"{name} has {width} x {height} pixels; no side may be shorter than {min_side}")
    if isinstance(image, TiffImageFile):
        # All of a tile is decoded, even where it reaches far beyond the image.
        across, down = (max(1, int(image.tag_v2.get(tag, 1))) for tag in (TILEWIDTH, TILELENGTH))
        tiles = -(-width // across) * -(-height // down) * across * down
        if tiles > max_pixels:
            raise ImageError(f"{name} is cut into tiles of {tiles:,} pixels in all; the limit is {max_pixels:,}")


def _to_rgb(name: str, file: ImageFile.ImageFile) -> NDArray[np.uint8]:
    image: Image.Image = file
    if image.mode.startswith("I;16"):
        image = _eight_bits(file)
    elif image.mode not in _MODES:
        kind = {"F": "floating-point", "I": "32-bit or signed integer"}.get(image.mode, image.mode)
        raise ImageError(f"{name} has {kind} pixels, whose range isn't known; convert it to 8-bit RGB (PNG or JPEG)")
    if image.has_transparency_data:
        # Premultiplied modes must be divided before they are pasted.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    orientation = _orientation(file)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return np.array(image, dtype=np.uint8, order="C")


def _eight_bits(file: ImageFile.ImageFile) -> Image.Image:
    """Scale 16-bit grey (of which a TIFF may use 12) to 8 bits; Pillow's own conversion clips at 255."""
    values = np.asarray(file).astype(np.uint32)
    bits, white_is_zero = 16, False
    if isinstance(file, TiffImageFile):
        bits = int(file.tag_v2.get(BITSPERSAMPLE, (16,))[0])
        white_is_zero = file.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    largest = 2**bits - 1
    grey = ((values * 255 + largest // 2) // largest).astype(np.uint8)
    image = Image.fromarray(255 - grey if white_is_zero else grey)
    if "transparency" in file.info:
        image.putalpha(Image.fromarray(np.where(values == file.info["transparency"], 0, 255).astype(np.uint8)))
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if there is none; Pillow has applied and removed that of a TIFF on loading."""
    try:
        value = image.getexif().get(ExifTag.Orientation, 1)
    except Exception:
        # Damaged EXIF is common and says nothing about the pixels; viewers show such images as they are.
        return 1
    return value if isinstance(value, int) else 1


def _one_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:120]


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
    """Read a mask (a pixel over 127 is lesion) and bring it to the (S, S) square that the model sees.

    `fit` (`squash` or `crop`) is how the image became that square. None if no lesion is marked there.
    """
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
