"""Download one large file over a connection that may break: every byte that has arrived is kept and never asked for
again.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import requests
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from dualrefnet.errors import DataError
from dualrefnet.files import read_json, write_json
from dualrefnet.progress import console, warn

ATTEMPTS = 6
BACKOFF_SECONDS = 2.0
TIMEOUT_SECONDS = (15.0, 60.0)  # to connect; between two packets
CHUNK = 64 * 1024


@dataclass(frozen=True)
class Source:
    """One file of a release.

    Attributes:
        url: where it is.
        filename: its name in the data set's folder.
        sha256: published checksum; None: none is published.
        size: bytes; 0: not known.
        unpack: whether it is a zip to be unpacked.
        folder: where to unpack it, relative to the data set's folder.
    """

    url: str
    filename: str
    sha256: str | None
    size: int
    unpack: bool
    folder: str = "."


def partial_path(source: Source, root: Path) -> Path:
    """Return the file that holds what has arrived so far."""
    return root / f"{source.filename}.partial"


def _validators(partial: Path) -> Path:
    """Return the file beside `partial` that says of which version of which file it is a part."""
    return partial.with_name(partial.name + ".json")


def forget(partial: Path) -> None:
    """Delete what has arrived, and what is known of it."""
    partial.unlink(missing_ok=True)
    _validators(partial).unlink(missing_ok=True)


class _TryAgainError(Exception):
    """The server may answer better in a while."""


def download(source: Source, partial: Path, refused: Callable[[str], DataError], progress: bool = True) -> None:
    """Complete `partial`; a connection that breaks is taken up where it broke off. Nothing is verified but the size.

    Args:
        source: what to get.
        partial: the file to complete; `partial_path` names it.
        refused: makes the error for an answer that isn't the file (a web page, 403), given what was answered instead.
        progress: show a bar.

    Raises:
        DataError: that error; the server can't be reached; or the disk is full. What has arrived is kept.
    """
    try:
        with _bytes_bar(source, progress) as show:
            _download(source, partial, refused, show)
    except KeyboardInterrupt:
        warn(
            escape(
                f"interrupted: {_bytes_of(partial):,} bytes of {source.filename} are kept, and running it again resumes"
            )
        )
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(f"the disk is full; {partial} is kept: free some space and run it again to resume") from None


def _download(source: Source, partial: Path, refused: Callable[[str], DataError], show: Callable[[int], None]) -> None:
    failures = 0
    while True:
        before = _bytes_of(partial)
        try:
            return _request(source, partial, refused, show)
        except (_TryAgainError, requests.RequestException) as error:
            # As long as every connection brings something, it is worth going on.
            failures = 1 if _bytes_of(partial) > before else failures + 1
            reason = " ".join(str(error).split())[:200]
        kept = f"{_bytes_of(partial):,} bytes"
        if failures >= ATTEMPTS:
            raise DataError(
                f"{source.url} failed {failures} times ({reason}); {kept} are kept: run it again later to resume"
            )
        pause = min(60.0, BACKOFF_SECONDS * 2 ** (failures - 1))
        warn(escape(f"{source.filename}: {reason}; trying again in {pause:.0f} s, {kept} are kept"))
        time.sleep(pause)


def _bytes_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _request(source: Source, partial: Path, refused: Callable[[str], DataError], show: Callable[[int], None]) -> None:
    """Ask once for what is missing of `partial`, and append it."""
    known = _known_validators(source, partial)
    have = _bytes_of(partial)
    if have and have == source.size:
        return
    # Without `identity` a server may compress, and offsets would count other bytes.
    headers = {"Accept-Encoding": "identity", "User-Agent": "dualrefnet"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if known["validator"]:
            headers["If-Range"] = known["validator"]
    with requests.get(source.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        status = response.status_code
        if status in (408, 425, 429) or status >= 500:
            raise _TryAgainError(f"the server answered {status}")
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
        offered = int(span[2]) if span is not None else None
        if status == 416 and offered == have:
            return
        goes_on = span is not None and span[1] == str(have) and known["total"] in (None, offered)
        if status == 416 or (status == 206 and not goes_on):
            forget(partial)
            raise _TryAgainError("the server's file isn't the one that was begun, so it starts from zero")
        if status not in (200, 206):
            raise refused(f"the server answered {status}")
        if "html" in response.headers.get("Content-Type", ""):
            raise refused("the server sent a web page")
        if have and status == 200:
            warn(escape(f"{source.filename}: the server can't resume or its file has changed, so it starts from zero"))
            have = 0
        length = response.headers.get("Content-Length")
        total = offered if status == 206 else int(length) if length and length.isdigit() else None
        if source.size and total not in (None, source.size):
            raise refused(f"the server offers {total:,} bytes instead of {source.size:,}")
        etag = response.headers.get("ETag", "")
        # If-Range takes no weak ETag (RFC 9110, 13.1.5).
        validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
        chunks = response.iter_content(CHUNK)
        first = next(chunks, b"")
        if source.unpack and have == 0 and not first.startswith(b"PK"):
            raise refused("the server sent something that isn't a zip")
        write_json(_validators(partial), {"url": source.url, "validator": validator, "total": total})
        with partial.open("ab" if have else "wb") as file:
            for chunk in chain([first], chunks):
                file.write(chunk)
                have += len(chunk)
                show(have)
    if total is not None and have != total:
        raise _TryAgainError(f"the connection ended after {have:,} of {total:,} bytes")


def _known_validators(source: Source, partial: Path) -> dict[str, Any]:
    """Return what is known of the version that was begun; a part of something unknown is thrown away."""
    try:
        known = read_json(_validators(partial))
        if known["url"] == source.url and _bytes_of(partial) <= (source.size or _bytes_of(partial)):
            return {"validator": known["validator"], "total": known["total"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    forget(partial)
    return {"validator": None, "total": None}


@contextmanager
def _bytes_bar(source: Source, enabled: bool) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not enabled or not console.is_terminal) as bar:
        task = bar.add_task(escape(source.filename), total=source.size or None)
        yield lambda done: bar.update(task, completed=done)
