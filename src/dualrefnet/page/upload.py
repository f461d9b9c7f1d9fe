"""Photographs that a browser sends to the page: read within bounds, stripped of everything but their pixels, kept for
minutes.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from anyio import CapacityLimiter, to_thread
from numpy.typing import NDArray
from PIL import Image
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from dualrefnet.errors import DataError, ImageError

# Gradio reads its folder from this variable; workers inherit it, so they share one.
VARIABLE = "GRADIO_TEMP_DIR"
# What a photograph is called from here on: nothing of the client's name, and nothing that could be guessed. Examples
# are no secret.
NAME = re.compile(r"(photograph-[0-9a-f]{32}|example-[0-9])\.png")
_SECONDS = 10 * 60
_MOST_BYTES = 2 * 2**30
_PREVIEW = 1024
# Boundaries and headers of the parts around the file.
AROUND = 16 * 1024


class TooLarge(ImageError):
    """A body is larger than may be."""


class Uploads:
    """The photographs that wait to be classified.

    Args:
        folder: private, shared by all workers.
        decode: reads an image of unknown origin, or raises ImageError.
        max_bytes: of a file.
        seconds: how long a photograph is kept.
    """

    def __init__(
        self, folder: Path, decode: Callable[[bytes], NDArray[np.uint8]], max_bytes: int, seconds: int = _SECONDS
    ) -> None:
        self.folder, self.seconds = folder, seconds
        self._decode, self._max_bytes = decode, max_bytes
        # A photograph of 100 million pixels takes 300 MB; two at a time are enough for two cores.
        self._limiter = CapacityLimiter(2)

    async def receive(self, request: Request) -> str:
        """Take the one photograph of a multipart request, and return its new name.

        Raises:
            ImageError: it isn't a photograph that can be read; TooLarge, if it is larger than may be.
            DataError: the request isn't one of one file.
        """
        content = await read_one_file(request, self._max_bytes)
        return await to_thread.run_sync(self.keep, content, limiter=self._limiter)

    def keep(self, content: bytes) -> str:
        """Write an image's pixels, and nothing else of it, to the folder; return its new name.

        Raises:
            ImageError: it can't be read.
        """
        self.sweep()
        name = f"photograph-{secrets.token_hex(16)}.png"
        self.write(name, self._decode(content))
        return name

    def write(self, name: str, pixels: NDArray[np.uint8]) -> None:
        """Write a picture (H, W, 3) and its preview under a name that `NAME` allows."""
        _write(self._find(name), pixels, "PNG", compress_level=1)
        _write(self._preview(name), _shrink(pixels), "JPEG", quality=85)

    def read(self, name: str) -> bytes:
        """Return a photograph's bytes.

        Raises:
            ImageError: there is none of that name (any more).
        """
        try:
            return self._find(name).read_bytes()
        except FileNotFoundError:
            raise ImageError(
                f"the photograph isn't here any more (it is kept for {self.seconds // 60} minutes); choose it again"
            ) from None

    def preview(self, name: str) -> bytes:
        """Return a small JPEG of a photograph, for showing.

        Raises:
            ImageError: there is none of that name (any more).
        """
        try:
            return self._preview(self._find(name).name).read_bytes()
        except FileNotFoundError:
            raise ImageError("there is no such photograph (any more)") from None

    def sweep(self) -> None:
        """Remove photographs that are too old, and the oldest of them if they take too much room."""
        now = time.time()
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("photograph-*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        room = _MOST_BYTES
        for modified, size, path in sorted(found, reverse=True):
            room -= size
            if now - modified > self.seconds or room < 0:
                path.unlink(missing_ok=True)

    def _find(self, name: str) -> Path:
        # No other name reaches the file system, so there is no way out of the folder.
        if not NAME.fullmatch(name):
            raise ImageError("there is no such photograph")
        return self.folder / name

    def _preview(self, name: str) -> Path:
        return (self.folder / name).with_suffix(".jpg")


async def read_one_file(request: Request, max_bytes: int) -> bytes:
    """Read the one file of a multipart request into memory.

    Raises:
        TooLarge: the file is larger than `max_bytes`.
        DataError: the request isn't multipart with one file.
    """
    largest = max_bytes + AROUND
    too_large = TooLarge(f"the photograph is larger than {max_bytes / 2**20:.0f} MB; choose a smaller one")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > largest:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > largest:
            raise too_large
    files = await _parse(request.headers, bytes(body))
    if len(files) != 1:
        raise DataError("send one photograph at a time")
    if len(files[0]) > max_bytes:
        raise too_large
    return files[0]


async def _parse(headers: Headers, body: bytes) -> list[bytes]:
    if not headers.get("content-type", "").startswith("multipart/form-data"):
        raise DataError("send the photograph as multipart/form-data")

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(headers, stream(), max_files=1, max_fields=4)
    # It would write what is larger to the disk, unstripped.
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise DataError("the request isn't readable as one file; send one photograph at a time") from error
    return [await value.read() for _, value in form.multi_items() if isinstance(value, UploadFile)]


def private_folder() -> Path:
    """Return the folder of photographs, which only this user may look into.

    It is the one that the environment names, as for the workers of one server; else a new one, which the environment
    then names, and which
    is removed when this process ends. Call it before workers are started.

    Raises:
        DataError: others may look into the folder that the environment names.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        folder = Path(tempfile.mkdtemp(prefix="dualrefnet-page-"))
        os.environ[VARIABLE] = str(folder)
        atexit.register(partial(_remove, folder, os.getpid()))
        return folder
    folder = Path(named)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise DataError(
            f"{VARIABLE} names {folder}, which others may look into; unset it, or `chmod 700` a folder of this user"
        )
    return folder


def _remove(folder: Path, maker: int) -> None:
    # A forked child runs its parent's farewells too.
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop(VARIABLE, None)


def _write(path: Path, pixels: NDArray[np.uint8], kind: str, **options: int) -> None:
    # Under a name of its own first: workers write the same examples. The temporary file is private.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="photograph-", delete=False) as file:
        Image.fromarray(pixels).save(file, kind, **options)
    os.replace(file.name, path)


def _shrink(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    factor = _PREVIEW / max(height, width)
    if factor >= 1:
        return pixels
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
