"""What stands between the network and Gradio: only what the page needs passes, and every answer carries headers that
keep it to itself.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualrefnet.errors import DataError, ImageError
from dualrefnet.page import login as page_login
from dualrefnet.page.login import Login
from dualrefnet.page.upload import TooLarge, Uploads
from dualrefnet.service.schemas import Refusal

_API = "/gradio_api"
_FILE = f"{_API}/file="
# Gradio's own code and pictures, which it looks up below its own folder.
_LIBRARY = re.compile(r"/(assets|static)/[\w./-]+")
_PLAIN = frozenset(
    {"/", "/theme.css", "/config", "/favicon.ico", f"{_API}/theme.css", f"{_API}/app_id", f"{_API}/startup-events"}
)
_RUN = re.compile(rf"{_API}/(run|api)/(predict|classify|explain)/?")
_LARGEST_REQUEST = 256 * 1024
_UPLOAD_SECONDS = 120
_MOST_UPLOADS = 16

# Gradio's page has scripts in itself, and makes functions of text.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


class PageGate:
    """ASGI middleware of the page's Gradio.

    Args:
        app: Gradio.
        login: who may see the page.
        uploads: takes photographs in Gradio's place.
        steps: the number of each of Gradio's functions that may be asked -> how many inputs it has.
    """

    def __init__(self, app: ASGIApp, login: Login, uploads: Uploads, steps: Mapping[int, int]) -> None:
        self._app, self._login, self._uploads, self._steps = app, login, uploads, steps
        self._uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, pass on or refuse."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            # A web socket; Gradio has none that the page needs.
            await send({"type": "websocket.close", "code": 1008})
            return
        path = get_route_path(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                # Names of Gradio's files change with what is in them; everything else may be of a patient.
                found = message["status"] == 200 and path.startswith("/assets/")
                headers["Cache-Control"] = "private, max-age=31536000, immutable" if found else "no-store"
            await send(message)

        request = Request(scope, receive)
        response = await self._answer(request, path)
        if isinstance(response, Response):
            await response(scope, receive, send_with_headers)
        else:
            await self._app(*response, send_with_headers)

    async def _answer(self, request: Request, path: str) -> Response | tuple[Scope, Receive]:
        """Return the answer, or what Gradio is to be asked."""
        method = "GET" if request.method == "HEAD" else request.method
        home = f"{request.scope.get('root_path', '').rstrip('/')}/"
        if path == page_login.PATH and method in ("GET", "POST"):
            return await self._login.answer(request, home)
        if not self._login.is_allowed(request):
            if path == "/" and method == "GET":
                return RedirectResponse(f"{home.rstrip('/')}{page_login.PATH}", status_code=303)
            return _refuse(401, "not_signed_in", "sign in on the page first")
        if method == "GET" and (path in _PLAIN or (_LIBRARY.fullmatch(path) and ".." not in path)):
            # The page has no parameters: Gradio would read states and themes from them.
            return dict(request.scope, query_string=b""), request.receive
        if method == "GET" and path.startswith(_FILE):
            return self._show(path.removeprefix(_FILE))
        if method == "GET" and path == f"{_API}/upload_progress":
            # Photographs are taken whole, so there is no progress to tell; this answer tells the browser not to ask
            # again.
            return Response(status_code=204)
        if method == "POST" and path == f"{_API}/upload":
            return await self._upload(request)
        if method == "POST" and _RUN.fullmatch(path):
            return await _read_run(request, self._steps)
        return _refuse(404, "not_found", "there is no such page")

    def _show(self, name: str) -> Response:
        try:
            return Response(self._uploads.preview(name), media_type="image/jpeg")
        except ImageError as error:
            return _refuse(404, "not_found", str(error))

    async def _upload(self, request: Request) -> Response:
        # The page shows the text of a refusal as it is.
        if self._uploading >= _MOST_UPLOADS:
            return PlainTextResponse("Too many photographs are on their way. Try again in a moment.", status_code=503)
        self._uploading += 1
        try:
            async with asyncio.timeout(_UPLOAD_SECONDS):
                return JSONResponse([await self._uploads.receive(request)])
        except TimeoutError:
            return PlainTextResponse("The photograph took too long to arrive. Try again.", status_code=408)
        except Refusal as error:
            return PlainTextResponse(_sentence(error), status_code=error.status)
        except TooLarge as error:
            return PlainTextResponse(_sentence(error), status_code=413)
        except (DataError, ImageError) as error:
            return PlainTextResponse(_sentence(error), status_code=400)
        finally:
            self._uploading -= 1


async def _read_run(request: Request, steps: Mapping[int, int]) -> Response | tuple[Scope, Receive]:
    """Bound a request, and take out of it what Gradio would remember: which session it belongs to."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > _LARGEST_REQUEST:
                return _refuse(413, "too_large", "the request is too large")
    except Refusal as error:
        return _refuse(error.status, error.code, error.message)
    try:
        asked = json.loads(bytes(body))
        data, number = asked["data"], asked["fn_index"]
        # Texts alone: Gradio would fetch or copy what a file's description names, and write what it doesn't expect to
        # the log.
        valid = (
            type(number) is int and type(data) is list and all(item is None or isinstance(item, str) for item in data)
        )
        valid = valid and len(data) == steps.get(number)
    except (ValueError, TypeError, KeyError, RecursionError):
        valid = False
    if not valid:
        return _refuse(400, "bad_request", "this isn't a request of the page; reload it")
    content = json.dumps({"data": data, "fn_index": number}).encode()
    headers = [
        (name, value)
        for name, value in request.scope["headers"]
        if name not in (b"content-length", b"transfer-encoding")
    ]
    scope = dict(request.scope, headers=[*headers, (b"content-length", str(len(content)).encode())], query_string=b"")
    sent = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await request.receive()
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    return scope, receive


def _refuse(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status)


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."
