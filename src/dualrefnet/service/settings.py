"""Limits and API keys of the web service."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from dualrefnet.errors import DataError
from dualrefnet.progress import warn

KEY_VARIABLE = "DUALREFNET_API_KEY"
MIN_KEY_LENGTH = 16


class ServiceSettings(BaseModel):
    """Limits of the service; the defaults suit one machine.

    Attributes:
        api_keys: keys that give access; empty: no key is needed. Never serialised.
        page: whether `/` is the web page.
        root_path: path under which a proxy serves it, such as `/lesions`.
        max_upload: largest body of a request, bytes.
        max_pixels: largest width x height of an image that is decoded.
        max_images: most images of one lesion.
        max_metadata: longest metadata, bytes.
        queue: most requests held at once, per worker.
        queue_bytes: most bytes of bodies held at once, per worker.
        explain_queue: most requests for explanations held at once, per worker.
        timeout: seconds from a complete request to its response.
        body_timeout: seconds for the whole body.
        idle_timeout: seconds without a byte of the body.
        linger: seconds for which the rest of a refused body is discarded, so that the client reads why.
        grace: seconds in which accepted requests are answered when the service stops.
        connections: most open connections, per worker.
        max_batch: most images in a batch; on CPUs larger batches take proportionally longer.
        max_wait: seconds an idle model waits for images that are being decoded; without any it never waits.
        decoders: threads that decode images, per worker.
        accept_missingness_shortcut: for research, serve also a model whose referral relies on missing metadata.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_keys: tuple[SecretStr, ...] = Field(default=(), exclude=True, repr=False)
    page: bool = True
    root_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~/-]*[A-Za-z0-9._~-])?$")
    max_upload: int = Field(default=64 * 2**20, ge=1024)
    max_pixels: int = Field(default=50_000_000, ge=1)
    max_images: int = Field(default=8, ge=1)
    max_metadata: int = Field(default=16 * 2**10, ge=2)
    queue: int = Field(default=64, ge=1)
    queue_bytes: int = Field(default=256 * 2**20, ge=1024)
    explain_queue: int = Field(default=4, ge=1)
    timeout: float = Field(default=30.0, gt=0)
    body_timeout: float = Field(default=60.0, gt=0)
    idle_timeout: float = Field(default=10.0, gt=0)
    linger: float = Field(default=1.0, ge=0)
    grace: float = Field(default=45.0, gt=0)
    connections: int = Field(default=500, ge=1)
    max_batch: int = Field(default=8, ge=1)
    max_wait: float = Field(default=0.002, ge=0)
    decoders: int = Field(default=2, ge=1)
    accept_missingness_shortcut: bool = False

    @model_validator(mode="after")
    def _queue_holds_one_body(self) -> ServiceSettings:
        if self.queue_bytes < self.max_upload:
            raise ValueError(f"queue_bytes ({self.queue_bytes}) must be at least max_upload ({self.max_upload})")
        return self


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[SecretStr, ...]:
    """Read the keys in the variable DUALREFNET_API_KEY and in a file, one a line (# begins a comment).

    Raises:
        DataError: the file can't be read or holds no key, the variable is empty, or a key can't be sent in a header.
    """
    keys = _keys_in(file) if file is not None else []
    if KEY_VARIABLE in environment:
        keys.insert(0, environment[KEY_VARIABLE].strip())
        if not keys[0]:
            raise DataError(f"{KEY_VARIABLE} is set but empty, so no request could pass; set it to a key, or unset it")
    for key in keys:
        if not all(33 <= ord(character) <= 126 for character in key):
            raise DataError("an API key must be printable ASCII without spaces: others can't be sent in a header")
        if len(key) < MIN_KEY_LENGTH:
            warn(f"an API key has only {len(key)} characters; use {MIN_KEY_LENGTH} or more random ones")
    return tuple(SecretStr(key) for key in dict.fromkeys(keys))


def _keys_in(file: Path) -> list[str]:
    try:
        mode = file.stat().st_mode
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it isn't UTF-8"
        raise DataError(f"the API keys in {file} can't be read: {reason}") from None
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        warn(f"other users of this machine can read the API keys in {file}; protect them with `chmod 600 {file}`")
    keys = [key for line in text.splitlines() if (key := line.split("#", 1)[0].strip())]
    if not keys:
        raise DataError(f"{file} holds no API key; write one a line")
    return keys
