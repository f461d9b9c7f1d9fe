"""The key in front of the page: a form that takes it, and a cookie that every worker can check."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Sequence
from html import escape
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

COOKIE = "dualrefnet_page"
PATH = "/login"
_SECONDS = 12 * 60 * 60
_LARGEST = 4096

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>Sign in - dualrefnet</title><style>
:root {{ --ink: #1b2733; --paper: #f5f7f9; --card: #fff; --line: #76838f; --main: #14606f; --on: #fff; --bad: #9b1c1c; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6ebef; --paper: #12181d; --card: #1b2329; --line: #8b98a3; --main: #7fd0de; --on: #08272d; --bad: #ffb4ab; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }}
main {{ width: 100%; max-width: 24rem; padding: 1.5rem; border-radius: .75rem; background: var(--card); }}
h1 {{ font-size: 1.35rem; margin: 0 0 .5rem; }} p {{ margin: 0 0 1rem; }} .bad {{ color: var(--bad); font-weight: 600; }}
label {{ display: block; font-weight: 600; margin-bottom: .25rem; }}
input, button {{ width: 100%; min-height: 2.75rem; font: inherit; border-radius: .5rem; padding: .5rem .75rem; }}
input {{ border: 1px solid var(--line); background: transparent; color: inherit; margin-bottom: 1rem; }}
button {{ border: 0; background: var(--main); color: var(--on); font-weight: 600; cursor: pointer; }}
:focus-visible {{ outline: 3px solid var(--main); outline-offset: 2px; }}
</style></head><body><main><h1>Sign in</h1><p>This service asks for its API key.</p>{problem}
<form method="post"><label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button type="submit">Sign in</button></form></main></body></html>
"""


class Login:
    """Checks keys and cookies.

    Args:
        keys: what opens the page; empty: it is open.
        seconds: how long a cookie is good for.
    """

    def __init__(self, keys: Sequence[str], seconds: int = _SECONDS) -> None:
        self._keys, self._seconds = tuple(keys), seconds

    def is_allowed(self, request: Request) -> bool:
        """Return whether a request may see the page: there is no key, or it carries a cookie that a key signed."""
        if not self._keys:
            return True
        expires, _, signature = request.cookies.get(COOKIE, "").partition(".")
        if not (expires.isascii() and expires.isdigit() and len(expires) <= 12) or int(expires) < time.time():
            return False
        return any([hmac.compare_digest(signature.encode(), _sign(key, expires).encode()) for key in self._keys])

    async def answer(self, request: Request, home: str) -> Response:
        """Show the form, or take the key.

        Args:
            request: GET or POST of `PATH`.
            home: where the page is.
        """
        if request.method == "POST":
            given = await _read_key(request)
            # All keys are compared, so that the time doesn't say which one was nearly right.
            matching = [key for key in self._keys if hmac.compare_digest(_digest(key), _digest(given))]
            if matching:
                expires = str(int(time.time()) + self._seconds)
                response = RedirectResponse(home, status_code=303)
                value = f"{expires}.{_sign(matching[0], expires)}"
                secure = request.url.scheme == "https"
                response.set_cookie(
                    COOKIE, value, max_age=self._seconds, path=home, secure=secure, httponly=True, samesite="strict"
                )
                return response
            return HTMLResponse(_page("That isn't the key. Try again."), status_code=401)
        return RedirectResponse(home, status_code=303) if self.is_allowed(request) else HTMLResponse(_page())


def _page(problem: str = "") -> str:
    return _PAGE.format(problem=f'<p class="bad" role="alert">{escape(problem)}</p>' if problem else "")


async def _read_key(request: Request) -> str:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST:
            return ""
    return parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=None).get("key", [""])[0]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _sign(key: str, expires: str) -> str:
    return hmac.new(key.encode(), f"dualrefnet page {expires}".encode(), hashlib.sha256).hexdigest()
