"""Limits and API keys of the web service."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, model_validator

from dualrefnet.errors import DataError
from dualrefnet.progress import warn

KEY_VARIABLE = "DUALREFNET_API_KEY"
MIN_KEY_LENGTH = 16
Origin = Annotated[str, StringConstraints(pattern=r"^https?://[^/\s*@?#]+$", to_lower=True)]


class ServiceSettings(BaseModel):
    """Limits of the service, of each worker; the defaults suit one machine. Sizes are in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Keys that give access; empty: no key is needed. Never serialised.
    api_keys: tuple[SecretStr, ...] = Field(default=(), exclude=True, repr=False)
    # Web sites besides its own page that may use the service, such as https://lesions.example.org.
    allow_origins: tuple[Origin, ...] = ()
    page: bool = True  # whether / is the web page
    # Under which a proxy serves it, such as /lesions.
    root_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~/-]*[A-Za-z0-9._~-])?$")
    max_upload: int = Field(default=64 * 2**20, ge=1024)  # of the body of a request
    max_image: int = Field(default=20 * 2**20, ge=1024)  # of one image in it
    max_pixels: int = Field(default=50_000_000, ge=1)  # width x height of an image
    max_images: int = Field(default=8, ge=1)  # of one lesion
    max_metadata: int = Field(default=16 * 2**10, ge=2)
    queue: int = Field(default=64, ge=1)  # requests held at once, from their headers on
    queue_bytes: int = Field(default=256 * 2**20, ge=1024)  # of bodies held at once
    explain_queue: int = Field(default=4, ge=1)  # requests for explanations held at once
    timeout: float = Field(default=30.0, gt=0)  # from a complete request to its response
    body_timeout: float = Field(default=60.0, gt=0)  # for the whole body
    idle_timeout: float = Field(default=10.0, gt=0)  # without a byte of the body
    # For which the rest of a refused body is discarded, so that the client reads why.
    linger: float = Field(default=1.0, ge=0)
    grace: float = Field(default=45.0, gt=0)  # in which accepted requests are answered when the service stops
    connections: int = Field(default=500, ge=1)  # open at once
    max_batch: int = Field(default=8, ge=1)  # images; on CPUs larger batches take proportionally longer
    decoders: int = Field(default=2, ge=1)  # processes that decode images
    decode_timeout: float = Field(default=10.0, gt=0)  # of CPU for one image, after which its process ends
    # For research, serve also a model whose referral relies on missing metadata.
    accept_missingness_shortcut: bool = False

    @model_validator(mode="after")
    def _queue_holds_one_body(self) -> ServiceSettings:
        if self.queue_bytes < self.max_upload:
            raise ValueError(f"queue_bytes ({self.queue_bytes}) must be at least max_upload ({self.max_upload})")
        return self


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[SecretStr, ...]:
    """Read the keys in the variable DUALREFNET_API_KEY and in a file, one a line (# begins a comment)."""
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
