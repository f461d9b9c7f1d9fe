"""What the web service may be told, and the keys that it asks for."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from dualrefnet.errors import DataError
from dualrefnet.progress import warn

KEY_VARIABLE = "DUALREFNET_API_KEY"
SHORT_KEY = 16


class ServiceSettings(BaseModel):
    """Limits and habits of the service; the defaults suit one machine.

    Attributes:
        api_keys: whoever names one of them is served; empty: everybody is. Left out when the settings are written down.
        page: whether `/` is the page for people.
        root_path: the path under which a proxy shows the service, such as `/lesions`.
        max_upload: largest body of a request, bytes.
        max_pixels: largest width x height of a photograph that is decoded.
        max_images: most photographs of one lesion.
        max_metadata: longest form, bytes.
        queue: most requests that are held at once, each worker.
        queue_bytes: most bytes of bodies that are held at once, each worker.
        explain_queue: most requests for explanations that are held at once, each worker.
        timeout: seconds from a whole request to its answer.
        header_timeout: seconds for the lines before the body.
        body_timeout: seconds for the whole body.
        idle_timeout: seconds without a byte of the body.
        linger: seconds for which the rest of a refused body is thrown away, so that its sender reads why; and for which
            a
            connection without a request stays open when the service stops.
        grace: seconds in which accepted requests are answered when the service stops.
        connections: most open connections, each worker.
        max_batch: most photographs that the model reads at once; on CPUs more of them take as much longer.
        max_wait: seconds that the model waits for photographs that are being decoded; with none of these it never
            waits.
        decoders: threads that decode photographs, each worker.
        accept_missingness_shortcut: for research, serve also a model whose referral of cancers rests on metadata being
            there.
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
    header_timeout: float = Field(default=10.0, gt=0)
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
    def _one_body_finds_room(self) -> ServiceSettings:
        if self.queue_bytes < self.max_upload:
            raise ValueError(f"queue_bytes ({self.queue_bytes}) must be at least max_upload ({self.max_upload})")
        return self


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[SecretStr, ...]:
    """Read the keys: from the environment variable DUALREFNET_API_KEY, and from a file with one a line (# begins a
    remark).

    Args:
        file: the file, or None.
        environment: where the variable stands.

    Returns:
        The keys; empty if neither is given.

    Raises:
        DataError: the file can't be read or holds no key, the variable is empty, or a key can't be sent in a header.
    """
    lines: list[str] = []
    if KEY_VARIABLE in environment:
        lines = [environment[KEY_VARIABLE].strip()]
        if not lines[0]:
            raise DataError(
                f"{KEY_VARIABLE} is set but empty, so nobody could be let in; put a key into it, or unset it"
            )
    if file is not None:
        lines += _keys_of(file)
    for key in lines:
        if not all(33 <= ord(character) <= 126 for character in key):
            raise DataError(
                "an API key may hold printable ASCII characters only, without spaces: others can't be sent in a header"
            )
        if len(key) < SHORT_KEY:
            warn(
                f"an API key has only {len(key)} characters; one of {SHORT_KEY} or more, drawn at random, can't be guessed"
            )
    return tuple(SecretStr(key) for key in dict.fromkeys(lines))


def _keys_of(file: Path) -> list[str]:
    try:
        mode = file.stat().st_mode
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it isn't UTF-8"
        raise DataError(f"the API keys in {file} can't be read: {reason}") from None
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        warn(f"other users of this machine can read the API keys in {file}; keep them out with `chmod 600 {file}`")
    keys = [line.split("#", 1)[0].strip() for line in text.splitlines()]
    if not any(keys):
        raise DataError(f"{file} holds no API key; write one a line")
    return [key for key in keys if key]
