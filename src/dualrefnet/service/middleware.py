"""Around every route: origins, API keys, limits of bodies, security headers, ids, the log, and one form of errors."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualrefnet.errors import DataError, ImageError
from dualrefnet.service.inference import Busy, Inference
from dualrefnet.service.observability import Metrics, traceback_of
from dualrefnet.service.schemas import PROBES, Refusal, error_json
from dualrefnet.service.settings import ServiceSettings

log = logging.getLogger("dualrefnet.service")
REQUEST_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
# An address can't be rebound as a name can.
LOCAL_HOST = re.compile(r"(localhost|[0-9.]+|\[[0-9a-f:.]+\])(:[0-9]+)?")
CLIENT_DISCONNECTED = 499
MAX_HEADERS = 16 * 1024
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Responses are data: nothing in them may be run, framed or kept. Pages set policies of their own.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware around the whole application; `open_paths` hold nothing of the model and need no key."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServiceSettings,
        metrics: Metrics,
        inference: Inference,
        open_paths: frozenset[str],
    ) -> None:
        self._app, self._settings, self._metrics, self._inference = app, settings, metrics, inference
        self._open = open_paths
        # Keys are known by their digests alone.
        self._digests = [hashlib.sha256(key.get_secret_value().encode()).digest() for key in settings.api_keys]
        self._hosts = {urlsplit(origin).netloc for origin in settings.allow_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # A proxy may take its prefix off or leave it; the routes below never see it.
            path, prefix = scope["path"], self._settings.root_path
            if prefix and (path == prefix or path.startswith(f"{prefix}/")):
                path = path[len(prefix) :] or "/"
            # The server leaves the body out of the response to HEAD.
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            await self._request({**scope, "path": path, "root_path": "", "method": method}, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        exchange = _Exchange(headers, receive, send, request_id, self._settings)
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "length": exchange.length}
        started = time.perf_counter()
        try:
            self._check(scope, headers)
            exchange.check_length()
            await self._app(scope, exchange.receive, exchange.send)
        except Refusal as refusal:
            await exchange.refuse(refusal)
        except Busy:
            self._metrics.rejected.labels("full").inc()
            await exchange.refuse(Refusal(429, "full", "too many requests are waiting; retry", retry=True))
        except (DataError, ImageError) as error:
            code = "bad_photograph" if isinstance(error, ImageError) else "bad_form"
            await exchange.refuse(Refusal(422, code, str(error)))
        except (ClientDisconnect, ConnectionAbortedError):
            self._metrics.rejected.labels("client gone").inc()
        except asyncio.CancelledError:
            # Only the server cancels, when its grace period is over.
            self._inference.given_up += 1
            message = "the service had to stop before it could respond; retry"
            await exchange.refuse(Refusal(503, "stopping", message, retry=True))
            raise
        except Exception as error:
            log.error("error", extra={"id": request_id, "error": type(error).__name__, "where": traceback_of(error)})
            message = "an internal error; the log of the service has more under this request_id"
            await exchange.refuse(Refusal(500, "internal", message))
        finally:
            # The template of the route, never the path itself: a client may write anything into that.
            route = str(getattr(scope.get("route"), "path", "none"))
            status = exchange.status or CLIENT_DISCONNECTED
            seconds = (exchange.ended or time.perf_counter()) - started
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            line = {"id": request_id, "route": route, "status": status, "ms": round(1000 * seconds, 1)}
            log.info("request", extra={**line, "bytes_in": exchange.received, "bytes_out": exchange.sent})

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Refuse what may be known from the head alone."""
        if scope["http_version"] not in ("1.0", "1.1"):
            raise Refusal(400, "not_http", "this service speaks HTTP/1.1", {"Connection": "close"})
        # uvicorn bounds a head only while it is incomplete.
        if len(scope["raw_path"]) + sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADERS:
            raise Refusal(431, "headers_too_large", "the headers are too large", {"Connection": "close"})
        if not self._digests and scope["path"] not in PROBES and not self._knows_host(headers):
            self._metrics.rejected.labels("host").inc()
            message = "without API keys the service answers under its address and localhost alone; see --allow-origin"
            raise Refusal(403, "other_host", message)
        if scope["path"] in self._open:
            return
        if not self._same_origin(headers):
            self._metrics.rejected.labels("origin").inc()
            raise Refusal(403, "other_origin", "requests of other web sites are refused; see --allow-origin")
        if not self._knows_key(headers):
            self._metrics.rejected.labels("key").inc()
            bearer = {"WWW-Authenticate": 'Bearer realm="dualrefnet"'}
            raise Refusal(401, "no_key", "give an API key in the header X-API-Key", bearer)

    def _knows_host(self, headers: Headers) -> bool:
        """Whether the request was sent to an address, or to a known name.

        A web site whose name is rebound to this address can send requests from a browser, and read the responses, under
        its own name alone.
        """
        host = headers.get("host", "").lower()
        return host in self._hosts or LOCAL_HOST.fullmatch(host) is not None

    def _same_origin(self, headers: Headers) -> bool:
        """Whether a browser says that the page is the service's own, or nobody says that it is another's."""
        origin = headers.get("origin")
        if origin in self._settings.allow_origins:
            return True
        if "sec-fetch-site" in headers:
            return headers["sec-fetch-site"] in ("same-origin", "none")
        return origin is None or urlsplit(origin).netloc == headers.get("host")

    def _knows_key(self, headers: Headers) -> bool:
        """Whether X-API-Key or `Authorization: Bearer` gives a key, or none is needed."""
        scheme, _, rest = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key", rest.strip() if scheme.lower() == "bearer" else "")
        digest = hashlib.sha256(given.encode("latin-1")).digest()
        # All are compared, each in constant time: the time reveals nothing.
        return not self._digests or any([hmac.compare_digest(digest, known) for known in self._digests])


class _Exchange:
    """One request and its response: the body, bounded in bytes and time, and what is sent."""

    def __init__(
        self, headers: Headers, receive: Receive, send: Send, request_id: str, settings: ServiceSettings
    ) -> None:
        # The server has refused a length that isn't one.
        self.length = int(headers.get("content-length", 0))
        self._receive, self._send, self._id, self._settings = receive, send, request_id, settings
        self._complete = "transfer-encoding" not in headers and not self.length
        self._deadline: float | None = None
        self.received = self.sent = 0
        self.status: int | None = None
        self.ended: float | None = None

    def check_length(self) -> None:
        """Refuse a body that is too large, or declared to be."""
        if max(self.length, self.received) > self._settings.max_upload:
            raise Refusal(413, "too_large", f"the request may have {self._settings.max_upload:,} bytes at most")

    async def receive(self) -> Message:
        """Return the next part of the body; once it is complete, wait for the client to disconnect."""
        if self._complete:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._settings.body_timeout
        try:
            async with asyncio.timeout_at(min(self._deadline, now + self._settings.idle_timeout)):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, "slow", "the body came too slowly") from None
        self._complete = not message.get("more_body", False)
        self.received += len(message.get("body", b""))
        self.check_length()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._id
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            if not self._complete:
                headers["Connection"] = "close"
        else:
            self.sent += len(message.get("body", b""))
            if not message.get("more_body", False):
                self.ended = time.perf_counter()
                if not self._complete:
                    await self._send({**message, "more_body": True})
                    await self._discard_body()
                    message = {"type": "http.response.body"}
        await self._send(message)

    async def _discard_body(self) -> None:
        # Closing at once would reset the connection under a response that isn't read yet.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.linger):
                while not self._complete:
                    self._complete = not (await self._receive()).get("more_body", False)

    async def refuse(self, refusal: Refusal) -> None:
        """Respond with an error, unless a response is already on its way."""
        if self.status is not None:
            return
        content = error_json(refusal.code, refusal.message, self._id)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **refusal.headers}
        pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": content, "more_body": False})
