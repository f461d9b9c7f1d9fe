"""Parse one multipart request within limits, in memory: nothing a client sends is ever written to a disk."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import AsyncGenerator
from typing import Any, NoReturn

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from dualrefnet.service.inference import Reservation, Upload
from dualrefnet.service.schemas import Refusal
from dualrefnet.service.settings import ServiceSettings

# The characters and the length that RFC 2046 allows.
BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{1,70}")
MAX_LABEL = 200
MAX_NAME = 200
# Beyond it an integer isn't exact as a float; no field is as large.
MAX_INTEGER = 2**53
MAX_DIGITS = 40


class _Parser(MultiPartParser):
    # Starlette would spool parts of 1 MB and more to a temporary file.
    spool_max_size = sys.maxsize
    ended = False

    def on_end(self) -> None:
        self.ended = True


async def read_upload(
    request: Request, reservation: Reservation, settings: ServiceSettings, *, explained: bool = False
) -> Upload:
    """Read a request with parts `images`, `metadata` and (`explained`) `label`; file names are ignored."""
    limits = {"images": (settings.max_images, settings.max_image), "metadata": (1, settings.max_metadata)}
    if explained:
        limits |= {"images": (1, settings.max_image), "label": (1, MAX_LABEL)}
    found: dict[str, list[bytes]] = {name: [] for name in limits}
    for name, value in await _read_parts(request, reservation, settings.max_images + len(limits)):
        if name not in limits:
            raise _invalid("unknown_part", f"a part has an unknown name; known are {', '.join(limits)}")
        most, longest = limits[name]
        if len(found[name]) == most:
            raise _invalid("too_many_parts", f"{name} may be given {'once' if most == 1 else f'{most} times'} at most")
        if len(value) > longest:
            raise Refusal(413, "part_too_large", f"{name} may have {longest:,} bytes at most")
        found[name].append(value)
    metadata = parse_metadata(found["metadata"][0]) if found["metadata"] else {}
    try:
        label = found["label"][0].decode("utf-8") if found.get("label") else None
    except UnicodeDecodeError:
        raise _invalid("not_utf8", "label isn't UTF-8") from None
    return Upload(found["images"], metadata, label)


async def _read_parts(request: Request, reservation: Reservation, max_parts: int) -> list[tuple[str, bytes]]:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind.strip().lower() != b"multipart/form-data":
        parts = "images (files) and metadata (a JSON object as text)"
        raise Refusal(415, "not_multipart", f"send multipart/form-data with parts {parts}")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal(415, "encoded", "send the body as it is, without Content-Encoding")
    boundary = options.get(b"boundary", b"").decode("latin-1")
    if not BOUNDARY.fullmatch(boundary):
        raise _invalid("bad_boundary", "Content-Type must give a boundary of 1 to 70 of RFC 2046's characters")

    async def stream() -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            reservation.receive(len(chunk))
            yield chunk

    # As latin-1, a part without a file name is a text that can be turned back into its bytes.
    headers = Headers({"content-type": f'multipart/form-data; charset=latin-1; boundary="{boundary}"'})
    parser = _Parser(headers, stream(), max_files=max_parts, max_fields=max_parts, max_part_size=sys.maxsize)
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError):
        # Not the parser's own message: it may quote what was sent.
        raise _invalid("bad_multipart", "the body isn't valid multipart/form-data, or has too many parts") from None
    if not parser.ended:
        raise _invalid("truncated", "the body ends before its last boundary")
    return [
        (name, await value.read() if isinstance(value, UploadFile) else value.encode("latin-1"))
        for name, value in form.multi_items()
    ]


def parse_metadata(raw: bytes) -> dict[str, Any]:
    """Parse metadata, an object of strings, numbers, true, false and null; else a Refusal: 400, or 422 if not flat."""
    try:
        metadata = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except UnicodeDecodeError:
        raise _invalid("not_utf8", "metadata isn't UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise _invalid("not_json", "metadata isn't JSON") from None
    if not isinstance(metadata, dict) or any(isinstance(value, (dict, list)) for value in metadata.values()):
        example = '{"age": 61, "region": "FACE"}'
        raise Refusal(422, "not_flat", f"metadata must be one JSON object of plain values, such as {example}")
    if any(len(name) > MAX_NAME for name in metadata):
        raise _invalid("long_name", f"a name in metadata has more than {MAX_NAME} characters")
    texts = [*metadata, *(value for value in metadata.values() if isinstance(value, str))]
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise _invalid("not_unicode", "a string in metadata holds a lone surrogate")
    return metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise _invalid("name_twice", "a name is duplicated in metadata")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise _invalid("not_json", f"{name} isn't JSON; leave out what isn't known")


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS or abs(int(digits)) > MAX_INTEGER:
        raise _invalid("number_out_of_range", "a number in metadata is out of range")
    return int(digits)


def _parse_float(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise _invalid("number_out_of_range", "a number in metadata is out of range")
    return float(digits)


def _invalid(code: str, message: str) -> Refusal:
    return Refusal(400, code, message)
