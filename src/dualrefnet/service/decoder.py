"""Untrusted images are decoded and preprocessed in processes of their own, which can be ended.

The decoder of a library runs for minutes on a hostile image, takes gigabytes, or crashes. Here that ends one process,
which is bounded in seconds and memory and can write no file, and one request; the next image gets a new process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import struct
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import psutil

import dualrefnet
from dualrefnet.errors import ImageError
from dualrefnet.runtime.images import DecodingError, decode_image
from dualrefnet.runtime.preprocessing import Image, ImageSettings, preprocess

if TYPE_CHECKING:
    from dualrefnet.service.settings import ServiceSettings

log = logging.getLogger("dualrefnet.service")
# Those that cameras and browsers write; HEIF needs pillow-heif.
FORMATS = ("JPEG", "PNG", "WEBP", "HEIF")
# A pixel in the copies that decoding, transparency and preprocessing make of an image.
BYTES_PER_PIXEL = 32
SPARE_MEMORY = 128 * 2**20
# What is returned: whether an image or the reason against it follows, and its bytes.
REPLY = struct.Struct(">?I")
LENGTH = struct.Struct(">I")
STARTED = b"+"


class Decoders:
    """A pool of `settings.decoders` processes that turn encoded images into what the model reads."""

    def __init__(self, settings: ServiceSettings, image: ImageSettings) -> None:
        names = [name for name, value in vars(ImageSettings).items() if isinstance(value, property)]
        limits = settings.model_dump(include={"max_image", "max_pixels", "decode_timeout"})
        self._order = json.dumps({**limits, "image": {name: getattr(image, name) for name in names}})
        self._size, self._count, self._stopped = image.size, settings.decoders, False
        # None: one has ended, and is started again for the next image.
        self._idle: asyncio.LifoQueue[Process | None] = asyncio.LifoQueue()
        self._processes: set[Process] = set()

    async def start(self) -> None:
        for process in await asyncio.gather(*(self._start_one() for _ in range(self._count))):
            self._idle.put_nowait(process)

    async def stop(self) -> None:
        """End all processes, whatever they do."""
        self._stopped = True
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*(process.wait() for process in self._processes))

    async def prepare(self, data: bytes) -> Image:
        """Decode and preprocess an image; raises ImageError."""
        process = await self._idle.get()
        # A process whose client disconnects finishes its image all the same.
        return await asyncio.shield(self._prepare_in(process, data))

    async def _prepare_in(self, process: Process | None, data: bytes) -> Image:
        try:
            if process is not None and process.returncode is not None:
                process = None
            process = process or await self._start_one()
            return await self._exchange(process, data)
        except (asyncio.IncompleteReadError, ConnectionError):
            if process is None or self._stopped:
                raise
            status = await process.wait()
            self._processes.discard(process)
            process = None
            log.warning("a decoder has ended", extra={"status": status})
            reason = "takes too long" if status == -signal.SIGPROF else "makes the decoder fail"
            raise ImageError(f"the image {reason}; save it anew as a plain JPEG or PNG") from None
        finally:
            self._idle.put_nowait(process)

    async def _exchange(self, process: Process, data: bytes) -> Image:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.writelines([LENGTH.pack(len(data)), data])
        await process.stdin.drain()
        good, length = REPLY.unpack(await process.stdout.readexactly(REPLY.size))
        content = await process.stdout.readexactly(length)
        if not good:
            raise ImageError(content.decode("utf-8", "replace"))
        return np.frombuffer(content, dtype=np.uint8).reshape(self._size, self._size, 3)

    async def _start_one(self) -> Process:
        folder = str(Path(dualrefnet.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": folder, "OPENBLAS_NUM_THREADS": "1"}
        environment.pop("DUALREFNET_API_KEY", None)
        command = [sys.executable, "-P", "-m", "dualrefnet.service.decoder", self._order]
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=environment, limit=2**20)
        self._processes.add(process)
        assert process.stdout is not None
        await process.stdout.readexactly(len(STARTED))
        return process


def main() -> None:
    """Decode what comes on standard input until it ends."""
    # From a terminal and from systemd, signals reach the whole group; accepted requests are still answered.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    order = json.loads(sys.argv[1])
    image = SimpleNamespace(**order["image"])
    received, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    replies.write(STARTED)
    replies.flush()
    # Libraries print what they can't read.
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    if sys.platform == "linux":
        # Elsewhere this limit isn't kept.
        memory = SPARE_MEMORY + 2 * order["max_image"] + BYTES_PER_PIXEL * order["max_pixels"]
        memory += psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    while head := received.read(LENGTH.size):
        data = received.read(*LENGTH.unpack(head))
        # Unhandled, the signal ends the process in the middle of a library's loop too.
        signal.setitimer(signal.ITIMER_PROF, order["decode_timeout"])
        try:
            pixels = decode_image(data, max_bytes=order["max_image"], max_pixels=order["max_pixels"], formats=FORMATS)
            good, content = True, preprocess(pixels, image).tobytes()
            del pixels
        except DecodingError as error:
            good, content = False, str(error).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(REPLY.pack(good, len(content)) + content)
        replies.flush()
        del data


if __name__ == "__main__":
    main()
