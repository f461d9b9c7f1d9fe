"""Image files by the ids that tables give them, their pixels, and lesion masks."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dualrefnet.errors import DataError, ImageError
from dualrefnet.runtime import images
from dualrefnet.runtime.preprocessing import to_square

# What is listed as an image; whether it can be decoded is seen when it is read.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
    *(".heic", ".heif", ".avif", ".gif", ".jp2"),
)
# Columns that may name the image of a row.
IMAGE_COLUMNS = ("image", "image_id", "img_id", "isic_id", "file", "filename")
MASK_FOLDER = "masks"


def image_path(name: str) -> str:
    """Return a path as one writes it here, whichever system the table came from."""
    return unicodedata.normalize("NFC", name.strip()).replace("\\", "/").removeprefix("./")


def image_id(name: str) -> str:
    """Return the path that names an image, without its suffix."""
    stem, suffix = os.path.splitext(image_path(name))
    return stem if suffix.lower() in IMAGE_SUFFIXES else stem + suffix


def is_image(path: Path | str) -> bool:
    """Whether a file is listed as an image: by its suffix, or else by its first bytes."""
    if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
        return True
    try:
        with Path(path).open("rb") as file:
            start = file.read(12)
        # A text may begin with BM.
        return images.find_opener("", start) is not None and (start[:2] != b"BM" or start[6:10] == bytes(4))
    except images.DecodingError:  # One that needs another library.
        return True
    except OSError:
        return False


def list_files(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, links followed, hidden ones left out."""
    seen = set()
    for where, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        # A link may lead back to where it came from.
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (os.path.join(where, name) for name in sorted(names) if not name.startswith("."))
        yield from filter(os.path.isfile, paths)


def _refuse_folder(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise DataError(f"the folder {error.filename} can't be read: {error.strerror}")


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


class NamedImages:
    """The images of some files and folders by the names that a table gives them: paths below one, or ends of paths.

    Folders that don't exist hold none.
    """

    def __init__(self, sources: Iterable[Path]) -> None:
        self._files = [
            (file.relative_to(source if source.is_dir() else source.parent).as_posix(), str(file))
            for source in sources
            if source.exists()
            for file in (map(Path, list_files(source)) if source.is_dir() else [source])
        ]
        self._below = ImageIndex(self._files)
        # Number of parts of a name -> the images by that many last parts of their paths.
        self._ends: dict[int, ImageIndex] = {}

    def find(self, name: str) -> str | None:
        """Return the path of an image, None if there is none; refuse a name that means two."""
        found = self._below.find(name)
        if found is not None:
            return found
        parts = image_path(name).count("/") + 1
        if parts not in self._ends:
            self._ends[parts] = ImageIndex(
                ("/".join(Path(path).absolute().as_posix().split("/")[-parts:]), path) for _, path in self._files
            )
        return self._ends[parts].find(name)


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
