"""From an image file of unknown origin to 8-bit RGB: one decoder for training, the service and the clinic."""

from __future__ import annotations

import importlib
import io
import os
import re
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base as ExifTag
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TILELENGTH, TILEWIDTH, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_BYTES = 100 * 2**20
MAX_PIXELS = 100_000_000
MIN_SIDE = 16
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "HEIF", "AVIF")
# A decoder may take minutes or gigabytes for a small file that repeats a scan of all pixels, or an empty header.
# Cameras write up to a dozen scans, and a few dozen segments.
MAX_SCANS = 100
MAX_SEGMENTS = 1000
# Beyond one chunk in so many bytes, which is less than any encoder puts into a chunk of pixels.
CHUNK = 1024
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
# ISO/IEC 23008-12: what phones write.
_HEIF, _AVIF = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"), (b"avif", b"avis")
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK")
# Markers of a JPEG that don't belong to the data of a scan.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_START_OF_SCAN, _END = 0xDA, 0xD9
_FURTHER = bytes(range(1, 255)) * 16
# What a decoder fills up with where the data of a scan end early, in each of its channels.
_FILL = 128


class DecodingError(ValueError):
    """An image that can't be decoded, or is beyond the limits."""


def decode_image(
    source: Path | str | bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    formats: Sequence[str] = FORMATS,
) -> NDArray[np.uint8]:
    """Decode an image of one of some formats to (H, W, 3) RGB; safe for untrusted input and for several threads.

    The content decides the type, not the name. The EXIF orientation is applied (damaged EXIF counts as none),
    transparent pixels are put on white, grey and palette images become RGB, 16-bit samples are scaled to 8 bits, and of
    an animation or a multi-page file the first image is taken. Embedded colour profiles are ignored: the numbers in the
    file are taken as sRGB. `max_pixels` bounds width x height by the file's header; TIFF and WebP are also bound by
    Pillow's own limit, `PIL.Image.MAX_IMAGE_PIXELS`. Raises DecodingError.
    """
    name, data = _read(source, max_bytes)
    opener = find_opener(name, data)
    if opener is None or opener.format not in formats:
        known = f"{', '.join(formats[:-1])} or {formats[-1]}"
        raise DecodingError(f"{name} isn't a {known} image, whatever its name says")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DecodingError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: truncated images would pass; set it to False")
    _silence_pillow()
    try:
        scans = _check_structure(name, data)
        # Not Image.open: it tries other formats too, and complains of size before our own limit is checked.
        with opener(io.BytesIO(data)) as image:
            _check_size(name, image, max_pixels, min_side)
            image.load()
            if opener is JpegImageFile:
                _check_scans(data, image, scans)
            return _to_rgb(name, image)
    except DecodingError:
        raise
    except Exception as error:
        # A decoder given hostile bytes raises nearly anything: OSError, SyntaxError, struct.error, KeyError,
        # MemoryError.
        raise DecodingError(
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
                raise DecodingError(f"there is no file {name}")
            with path.open("rb") as file:
                # Python allocates all the memory that it is asked to read: ask for no more than there is.
                data = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
        except DecodingError:
            raise
        except (OSError, ValueError) as error:
            raise DecodingError(f"{name} can't be read: {_one_line(error)}") from None
    if len(data) > max_bytes:
        raise DecodingError(f"{name} is larger than {max_bytes:,} bytes")
    return name, data


def find_opener(name: str, data: bytes) -> type[ImageFile.ImageFile] | None:
    """Return what opens a file that begins with `data`; None if it is no image that can be decoded."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    if data[4:8] == b"ftyp" and data[8:12] in (*_HEIF, *_AVIF):
        return _heif_opener(name, data[8:12] in _AVIF)
    return next((opener for magic, opener in _OPENERS.items() if data.startswith(magic)), None)


def _heif_opener(name: str, avif: bool) -> type[ImageFile.ImageFile]:
    """Return what opens the images of phones; both are optional."""
    module, attribute = ("PIL.AvifImagePlugin", "AvifImageFile") if avif else ("pillow_heif.as_plugin", "HeifImageFile")
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    except ImportError:
        needed = "pip install 'pillow>=11.3'" if avif else "pip install pillow-heif"
        kind = "an AVIF" if avif else "a HEIC"
        raise DecodingError(f"{name} is {kind} image: `{needed}` makes it readable, or save it as JPEG") from None


def _silence_pillow() -> None:
    """Ignore Pillow's warnings about damaged EXIF tags, for all threads; those about size stay."""
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[0] != "ignore" or getattr(first[3], "pattern", None) != r"PIL\.":
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _check_structure(name: str, data: bytes) -> list[int]:
    """Refuse what is a burden to decode or incomplete; return where each scan of a JPEG ends (see `_jpeg_scans`)."""
    if data.startswith(b"\xff\xd8"):
        return _jpeg_scans(name, data)
    if data.startswith(b"\x89PNG"):
        _check_png(name, data)
    # A RIFF file tells its own length, and is filled up to an even one.
    if data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise EOFError("it ends early")
    return []


def _jpeg_scans(name: str, data: bytes) -> list[int]:
    """Return the places of the markers that end the scans; a single one if the JPEG isn't progressive."""
    place, segments, ends, in_scan = 2, 0, [], False
    while found := _MARKER.search(data, place):
        marker, place = found[1][0], found.end()
        if in_scan:
            ends.append(found.start())
        in_scan = marker == _START_OF_SCAN
        segments += 1
        if marker == _END:
            break
        if len(ends) >= MAX_SCANS:
            raise DecodingError(f"{name} has more than {MAX_SCANS} scans; save it anew")
        if segments > MAX_SEGMENTS:
            raise DecodingError(f"{name} has more than {MAX_SEGMENTS} segments; save it anew")
        place += int.from_bytes(data[place : place + 2], "big")
    return ends


def _check_png(name: str, data: bytes) -> None:
    place, chunks, most = 8, 0, MAX_SEGMENTS + len(data) // CHUNK
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        content, place = memoryview(data)[place + 4 : place + 8 + length], place + 12 + length
        chunks += 1
        if chunks > most:
            raise DecodingError(f"{name} has more than {most} chunks; save it anew")
        # What isn't needed for the pixels, a capital letter says, may be damaged.
        if kind[:1].isupper() and zlib.crc32(content).to_bytes(4, "big") != data[place - 4 : place]:
            raise EOFError(f"its part {kind.decode('ascii', 'replace')} is damaged or ends early")
        if kind == b"IEND":
            return
    raise EOFError("it ends early")


def _check_scans(data: bytes, image: ImageFile.ImageFile, ends: list[int]) -> None:
    """Refuse a JPEG whose scans end early: its decoder fills up with grey, and tells nobody."""
    restarts = [found[1][0] for found in _RESTART.finditer(data, data.find(b"\xff\xda"), ends[-1])]
    if len(ends) == 1 and any(marker != 0xD0 + place % 8 for place, marker in enumerate(restarts)):
        raise EOFError("parts of its pixels are missing")
    last = image.getpixel((image.width - 1, image.height - 1))
    if len(ends) == 1 and image.mode != "CMYK" and np.any(np.array(last) != _FILL):
        return
    # All scans at once: a large progressive JPEG would take seconds for each.
    start, parts = 0, []
    for end in (*ends, len(data)):
        parts.append(data[start:end])
        start = end
    with JpegImageFile(io.BytesIO(_FURTHER.join(parts))) as changed:
        if not np.array_equal(np.asarray(changed), np.asarray(image)):
            raise EOFError("its pixels end early")


def _check_size(name: str, image: ImageFile.ImageFile, max_pixels: int, min_side: int) -> None:
    width, height = image.size
    if isinstance(image, (TiffImageFile, WebPImageFile)) and Image.MAX_IMAGE_PIXELS is not None:
        max_pixels = min(max_pixels, Image.MAX_IMAGE_PIXELS)
    if width * height > max_pixels:
        raise DecodingError(f"{name} has {width} x {height} pixels; the limit is {max_pixels:,}")
    if min(width, height) < min_side:
        raise DecodingError(f"{name} has {width} x {height} pixels; no side may be shorter than {min_side}")
    if isinstance(image, TiffImageFile):
        # All of a tile is decoded, even where it reaches far beyond the image.
        across, down = (max(1, int(image.tag_v2.get(tag, 1))) for tag in (TILEWIDTH, TILELENGTH))
        tiles = -(-width // across) * -(-height // down) * across * down
        if tiles > max_pixels:
            raise DecodingError(f"{name} is cut into tiles of {tiles:,} pixels in all; the limit is {max_pixels:,}")


def _to_rgb(name: str, file: ImageFile.ImageFile) -> NDArray[np.uint8]:
    image: Image.Image = file
    if image.mode.startswith("I;16"):
        image = _eight_bits(file)
    elif image.mode not in _MODES:
        kind = {"F": "floating-point", "I": "32-bit or signed integer"}.get(image.mode, image.mode)
        raise DecodingError(f"{name} has {kind} pixels, whose range isn't known; convert it to 8-bit RGB (PNG or JPEG)")
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
