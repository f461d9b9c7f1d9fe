"""What stands around every route: request ids, keys, limits of bodies, headers of safety, one line of log, and one
form of errors.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress

from pydantic import SecretStr
from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualrefnet.errors import DataError, ImageError
from dualrefnet.service.answering import Standing
from dualrefnet.service.batcher import Busy
from dualrefnet.service.observability import Observed, where
from dualrefnet.service.schemas import Refusal, error_bytes
from dualrefnet.service.settings import ServiceSettings

log = logging.getLogger("dualrefnet.service")
REQUEST_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
OPEN_PATHS = ("/healthz", "/readyz")
CLIENT_GONE = 499
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# Answers of the interface are data; nothing in them may be run, shown in a frame or kept.
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
# The interface; with the page on, everything else is the page's, which has a login of its own. Only the beginnings are
# compared: a path
# that isn't quite one of the interface must not pass for one of the page.
INTERFACE = ("/v1", "/metrics", "/openapi", "/docs")
ASKED = ("/v1/predict", "/v1/explain", "/v1/model", "/healthz", "/readyz", "/metrics")
READING = ("/docs", "/openapi.json")


def safe_headers(headers: MutableHeaders, request_id: str) -> None:
    """Add what every answer has; what a route has set itself stays."""
    headers["X-Request-ID"] = request_id
    for name, value in SAFE_HEADERS.items():
        headers.setdefault(name, value)
    headers.setdefault("Content-Security-Policy", DATA_POLICY)
    headers.setdefault("Cache-Control", "no-store")


class Keys:
    """Knows the API keys by their digests."""

    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self._digests = [hashlib.sha256(key.get_secret_value().encode()).digest() for key in keys]

    def admit(self, headers: Headers) -> bool:
        """Return whether a request may pass: it names a key, or none is asked for.

        The key stands in X-API-Key or in `Authorization: Bearer`.
        """
        if not self._digests:
            return True
        given = hashlib.sha256(self._named(headers)).digest()
        # All are compared, each in constant time: how long it takes tells nothing.
        return any([hmac.compare_digest(given, digest) for digest in self._digests])

    @staticmethod
    def _named(headers: Headers) -> bytes:
        if "x-api-key" in headers:
            return headers["x-api-key"].encode("latin-1")
        scheme, _, rest = headers.get("authorization", "").partition(" ")
        return rest.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: ServiceSettings, observed: Observed, standing: Standing) -> None:
        self._app, self._settings, self._observed, self._standing = app, settings, observed, standing
        self._keys = Keys(settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._request(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        named = headers.get("x-request-id", "")
        request_id = named if REQUEST_ID.fullmatch(named) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        # Not by uvicorn, which would add it to every path: a proxy may take it off, or leave it.
        scope["root_path"] = self._settings.root_path
        body = _Body(headers, receive, self._settings)
        answer = _Answer(send, body, request_id, self._standing, self._settings.linger)
        started = time.perf_counter()
        try:
            if scope["http_version"] not in ("1.0", "1.1"):
                raise Refusal(400, "not_http", "this service speaks HTTP/1.1", {"Connection": "close"})
            if not self._admit(scope, headers):
                self._observed.rejected("key")
                raise Refusal(
                    401,
                    "no_key",
                    "name an API key in the header X-API-Key",
                    {"WWW-Authenticate": 'Bearer realm="dualrefnet"'},
                )
            body.check_length()
            await self._app(scope, body.receive, answer.send)
        except (Refusal, Busy, DataError, ImageError) as error:
            await answer.refuse(self._refusal(error))
        except (ClientDisconnect, ConnectionAbortedError):
            self._observed.rejected("client gone")
        except asyncio.CancelledError:
            # Nobody but the server does that, when the time to stop is over.
            self._standing.given_up += 1
            await answer.refuse(
                Refusal(
                    503, "stopping", "the service had to stop before it could answer; ask again", {"Retry-After": "1"}
                )
            )
            raise
        except Exception as error:
            log.error("error", extra={"id": request_id, "error": type(error).__name__, "where": where(error)})
            await answer.refuse(
                Refusal(500, "internal", "the service made a mistake; its log tells more under this request_id")
            )
        finally:
            # A request without an answer was given up: by its client, or when the service had to stop.
            status, route = answer.status or CLIENT_GONE, route_of(scope)
            seconds = (answer.ended or time.perf_counter()) - started
            self._observed.answered(route, status, seconds)
            line = {"id": request_id, "route": route, "status": status, "ms": round(1000 * seconds, 1)}
            log.info("request", extra={**line, "bytes_in": body.size, "bytes_out": answer.size})

    def _admit(self, scope: Scope, headers: Headers) -> bool:
        path = get_route_path(scope)
        if path in OPEN_PATHS or (self._settings.page and not path.startswith(INTERFACE)):
            return True
        if self._keys.admit(headers):
            return True
        # Who has logged in on the page may read of the interface in the browser, which can't name a key.
        login = getattr(scope["app"].state, "page_login", None)
        return path in READING and login is not None and bool(login.is_allowed(Request(scope)))

    def _refusal(self, error: Exception) -> Refusal:
        if isinstance(error, Refusal):
            return error
        if isinstance(error, Busy):
            self._observed.rejected("full")
            return Refusal(429, "full", "too many requests are waiting; ask again", {"Retry-After": "1"})
        return Refusal(422, "bad_photograph" if isinstance(error, ImageError) else "bad_form", str(error))


def route_of(scope: Scope) -> str:
    """Return the template of the route that was found: never the path itself, which a client may write anything into."""
    template = getattr(scope.get("route"), "path", None)
    if isinstance(template, str) and template:
        return template
    path = get_route_path(scope)
    if path in READING or path in ASKED:
        return path
    return "page" if "endpoint" in scope else "none"


class _Body:
    """The body of a request, whose bytes and time are bound."""

    def __init__(self, headers: Headers, receive: Receive, settings: ServiceSettings) -> None:
        length = headers.get("content-length", "")
        self._length = int(length) if length.isascii() and length.isdigit() else None
        self._receive, self._settings = receive, settings
        self.done = "transfer-encoding" not in headers and not self._length
        self.size = 0
        self._deadline: float | None = None

    def check_length(self) -> None:
        """Refuse a body that says itself that it is too large."""
        if self._length is not None and self._length > self._settings.max_upload:
            raise self._too_large()

    def _too_large(self) -> Refusal:
        return Refusal(413, "too_large", f"the request may have {self._settings.max_upload:,} bytes at most")

    async def receive(self) -> Message:
        """Return the next bytes; once all are there, wait for the client to go."""
        if self.done:
            return await self._receive()
        loop = asyncio.get_running_loop()
        self._deadline = self._deadline or loop.time() + self._settings.body_timeout
        try:
            async with asyncio.timeout_at(min(self._deadline, loop.time() + self._settings.idle_timeout)):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, "slow", "the body came too slowly") from None
        if message["type"] == "http.request":
            self.size += len(message.get("body", b""))
            self.done = not message.get("more_body", False)
            if self.size > self._settings.max_upload:
                raise self._too_large()
        return message

    async def throw_away(self, seconds: float) -> None:
        """Read the rest of the body and forget it: closing at once would reset the connection under an answer that
        isn't read yet.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.done:
                    message = await self._receive()
                    self.done = message["type"] != "http.request" or not message.get("more_body", False)


class _Answer:
    """The answer on its way out."""

    def __init__(self, send: Send, body: _Body, request_id: str, standing: Standing, linger: float) -> None:
        self._send, self._body, self._standing = send, body, standing
        self._id, self._linger = request_id, linger
        self.status: int | None = None
        self.size = 0
        self.ended: float | None = None

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            safe_headers(headers, self._id)
            if not self._body.done or self._standing.state == "stopping":
                headers["Connection"] = "close"
        elif message["type"] == "http.response.body":
            self.size += len(message.get("body", b""))
            if not message.get("more_body", False):
                self.ended = time.perf_counter()
                if not self._body.done:
                    await self._send({**message, "more_body": True})
                    await self._body.throw_away(self._linger)
                    message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an error, unless an answer is already on its way."""
        if self.status is not None:
            return
        content = error_bytes(refusal.code, refusal.message, self._id)
        pairs = {"Content-Type": "application/json", "Content-Length": str(len(content)), **refusal.headers}
        headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": content, "more_body": False})
