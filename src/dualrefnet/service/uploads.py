"""Read one multipart request within limits, in memory: nothing of a client's is ever written to a disk.

Starlette's own form parser spools files above 1 MB to a temporary file. Here its tokenizer (python-multipart's
low-level parser, which
only finds the parts) feeds byte arrays; the limits hold while the bytes come in. File names and types that the client
names are read
by nobody.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.requests import Request

from dualrefnet.errors import DependencyError
from dualrefnet.service.batcher import Place
from dualrefnet.service.schemas import Refusal

try:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header
except ImportError:
    raise DependencyError("the web service needs python-multipart: pip install 'dualrefnet[deploy]'") from None

# RFC 2046 allows no longer boundary.
MAX_BOUNDARY = 70
MAX_LABEL = 200
MAX_NAME = 200
# Beyond it, a whole number isn't exact as a float; no field is as large.
MAX_INTEGER = 2**53
LONGEST_NUMBER = 40


@dataclass(frozen=True)
class Upload:
    """What a request holds.

    Attributes:
        images: the bytes of each photograph.
        form: the metadata.
        label: the class to explain, if one is named.
    """

    images: tuple[bytes, ...]
    form: dict[str, Any]
    label: str | None


async def read_upload(
    request: Request, place: Place, *, max_images: int, max_metadata: int, with_label: bool = False
) -> Upload:
    """Read a request of `images`, `metadata` and (`with_label`) `label`.

    The size of the whole body and the time for it are bound by the middleware, which gives the bytes.

    Args:
        request: whose body wasn't read yet.
        place: counts the bytes that are held.
        max_images: most photographs.
        max_metadata: longest metadata, bytes.
        with_label: whether a part `label` may come.

    Raises:
        Refusal: the request isn't what it must be.
        Busy: too many bytes are held already.
    """
    limits = {
        "images": (max_images, math.inf),
        "metadata": (1, max_metadata),
        **({"label": (1, MAX_LABEL)} if with_label else {}),
    }
    parts = _Parts(limits)
    parser = MultipartParser(_boundary(request), parts.callbacks())  # type: ignore[arg-type]
    try:
        async for chunk in request.stream():
            place.hold(len(chunk))
            # The parser is quick: it searches for the boundary, and copies what lies between.
            parser.write(chunk)
    except FormParserError:
        # Its message may quote what was sent.
        raise _bad("bad_multipart", "the body isn't well-formed multipart/form-data") from None
    if not parts.ended:
        raise _bad("truncated", "the body ends before its last boundary")
    label = _text(parts.found["label"][0]) if parts.found.get("label") else None
    form = read_form(bytes(parts.found["metadata"][0])) if parts.found.get("metadata") else {}
    return Upload(tuple(bytes(image) for image in parts.found.get("images", [])), form, label)


def _boundary(request: Request) -> bytes:
    """Return the boundary of the parts."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind.strip().lower() != b"multipart/form-data":
        raise Refusal(
            415,
            "not_multipart",
            "send multipart/form-data with parts images (files) and metadata (a JSON object as text)",
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal(415, "encoded", "send the body as it is, without Content-Encoding")
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= MAX_BOUNDARY:
        raise _bad("bad_boundary", f"Content-Type must name a boundary of 1 to {MAX_BOUNDARY} characters")
    return boundary


class _Parts:
    """Collects parts as the parser finds them."""

    def __init__(self, limits: dict[str, tuple[int, float]]) -> None:
        self._limits = limits
        self._header, self._value, self._disposition = bytearray(), bytearray(), bytearray()
        self._longest: float = 0
        self.found: dict[str, list[bytearray]] = {}
        self.ended = False

    def callbacks(self) -> dict[str, Any]:
        names = ("part_begin", "part_data", "header_field", "header_value", "header_end", "headers_finished", "end")
        return {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def _part_begin(self) -> None:
        self._header.clear()
        self._value.clear()
        self._disposition.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            if self._disposition:
                raise _bad("bad_multipart", "a part has two Content-Disposition lines")
            self._disposition += self._value
        self._header.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        try:
            kind, options = parse_options_header(bytes(self._disposition))
        except ValueError:
            raise _bad("bad_multipart", "a part has a Content-Disposition that can't be read") from None
        if kind.lower() != b"form-data" or b"name" not in options:
            raise _bad("nameless_part", "a part has no name (Content-Disposition: form-data; name=...)")
        name = options[b"name"].decode("ascii", errors="replace")
        if name not in self._limits:
            raise _bad("unknown_part", f"a part has an unknown name; known are {', '.join(self._limits)}")
        most, self._longest = self._limits[name]
        parts = self.found.setdefault(name, [])
        if len(parts) >= most:
            raise _bad("too_many_parts", f"{name} may come {'once' if most == 1 else f'{most} times'} at most")
        self._name, self._part = name, bytearray()
        parts.append(self._part)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if len(self._part) + end - start > self._longest:
            raise Refusal(413, "part_too_large", f"{self._name} may have {self._longest:,} bytes at most")
        self._part += data[start:end]

    def _end(self) -> None:
        self.ended = True


def read_form(raw: bytes) -> dict[str, Any]:
    """Read a form: strict JSON, an object of texts, numbers, true, false and null.

    Raises:
        Refusal: 400 if it isn't strict JSON (no NaN, no name twice, no number out of range), 422 if it isn't such an
            object.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_without_doubles,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
        )
    except UnicodeDecodeError:
        raise _bad("not_utf8", "metadata isn't UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise _bad("not_json", "metadata isn't JSON") from None
    if not isinstance(value, dict) or any(isinstance(item, (dict, list)) for item in value.values()):
        raise Refusal(
            422, "not_flat", 'metadata must be one JSON object of plain values, such as {"age": 61, "region": "FACE"}'
        )
    for name, item in value.items():
        if len(name) > MAX_NAME:
            raise _bad("long_name", f"a name in metadata has more than {MAX_NAME} characters")
        _without_surrogates(name)
        if isinstance(item, str):
            _without_surrogates(item)
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _bad("name_twice", "a name stands twice in metadata")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _bad("not_json", f"{name} isn't JSON; leave out what isn't known")


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER or abs(int(digits)) > MAX_INTEGER:
        raise _bad("number_out_of_range", "a number in metadata is out of range")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _bad("number_out_of_range", "a number in metadata is out of range")
    return value


def _without_surrogates(text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _bad("not_unicode", "a text in metadata holds half a character (a lone surrogate)")


def _text(raw: bytearray) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad("not_utf8", "label isn't UTF-8") from None


def _bad(code: str, message: str) -> Refusal:
    return Refusal(400, code, message)
