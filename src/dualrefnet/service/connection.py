"""One connection of the server: uvicorn's, with what that doesn't bound."""

from __future__ import annotations

import asyncio
import http
import sys
import uuid
from typing import Any

import h11
from starlette.datastructures import MutableHeaders
from uvicorn.protocols.http.h11_impl import H11Protocol

from dualrefnet.service.middleware import safe_headers
from dualrefnet.service.schemas import error_bytes

# Bytes of the lines before the body.
MAX_HEAD = 16 * 1024


class Connection(H11Protocol):
    """uvicorn's connection, which lets a client take any time for its first lines, and closes idle ones in the face of a request.

    What is added: a time for the lines before the body, a number of connections, errors in the service's own form, and a last moment
    for requests on open connections when the service stops.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._service = self.config.loaded_app.state.service
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > self._service.settings.connections:
            self._refuse(503, "too_many_connections", "too many connections are open; ask again")
            return
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what has come, and see whether the lines before the body are whole."""
        # The parser bounds only what isn't whole: a piece at a time, a head of any length would be too large before it is.
        step = MAX_HEAD if self.conn.their_state is h11.IDLE else len(data)
        for start in range(0, len(data), step):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + step])
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None and self.conn.trailing_data[0]:
            self._wait_for_head()

    def send_400_response(self, msg: str) -> None:
        """Answer what isn't HTTP; `msg` is uvicorn's, and says no more than that."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        codes = {431: "headers_too_large", 501: "not_implemented"}
        self._refuse(
            status, codes.get(status, "not_http"), "the request isn't HTTP as it should be, or the lines before its body are too large"
        )

    def shutdown(self) -> None:
        """Stop: a request that is being answered is; one that comes within a moment is too, and told that the connection ends."""
        self._service.standing.stop()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            return
        self.loop.call_later(self._service.settings.linger, self._close_if_idle)

    def _close_if_idle(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        # Half a request is waited for; its timer is running.
        if idle and not self.conn.trailing_data[0] and not self.transport.is_closing():
            self.transport.close()

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self._service.settings.header_timeout, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.conn.trailing_data[0]:
            self._refuse(408, "slow", "the lines before the body came too slowly")
        else:
            self.transport.close()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer without the application, and close."""
        if self.cycle is not None and not self.cycle.response_complete:
            # The application is at work on a request whose body turned out to be no HTTP.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = uuid.uuid4().hex
            content = error_bytes(code, message, request_id)
            headers = MutableHeaders({"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"})
            safe_headers(headers, request_id)
            phrase = http.HTTPStatus(status).phrase
            lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers.raw)
            self.transport.write(f"HTTP/1.1 {status} {phrase}\r\n".encode() + lines + b"\r\n" + content)
        self._stop_timer()
        self.transport.close()
