"""Download the official release of a data set: resume what was interrupted, verify it, and unpack it safely."""

from __future__ import annotations

import errno
import os
import queue
import re
import shutil
import stat
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import requests

from dualrefnet.data import isic_2019, pad_ufes_20
from dualrefnet.data.schema import DatasetSchema
from dualrefnet.errors import DataError
from dualrefnet.files import read_json, sha256_of_file, write_json, write_text
from dualrefnet.progress import note, progress_bar, warn

ATTEMPTS = 6
BACKOFF_SECONDS = 2.0
FIRST_ANSWER_SECONDS = 9.0
PACKET_SECONDS = 60.0
CHUNK = 64 * 1024
# Images hardly shrink in an archive: one that unpacks to ten times its size is not what was published.
MAX_EXPANSION = 10
MAX_MEMBERS = 200_000
RECORD = "fetched.json"


@dataclass(frozen=True)
class Source:
    """One file of a release."""

    url: str
    filename: str  # in the data set's folder
    sha256: str | None  # None: no checksum is published
    size: int  # bytes; 0: not known
    folder: str | None = None  # where to unpack this zip, relative to the data set's folder; None: it is no archive


@dataclass(frozen=True)
class Release:
    """An official release."""

    schema: DatasetSchema  # it holds licence and citation
    page: str  # for a browser
    by_hand: str  # what to click there, and under which names to save; `{root}` stands for the data set's folder
    archive: str  # the one archive that a browser gets instead of the single files; empty: there is none
    sources: tuple[Source, ...]


_MENDELEY = "https://data.mendeley.com/public-files/datasets/zr7vgbcyr2/files/{}/file_downloaded"
_ISIC = "https://isic-challenge-data.s3.amazonaws.com/2019/"
# fmt: off
RELEASES = {
    # The checksums are those that Mendeley Data shows beside each file of version 1.
    "pad_ufes_20": Release(
        pad_ufes_20.SCHEMA,
        "https://data.mendeley.com/datasets/zr7vgbcyr2/1",
        "click `Download All` and save the archive as {root}/zr7vgbcyr2-1.zip",
        "zr7vgbcyr2-1.zip",
        (
            Source(_MENDELEY.format("fa850265-57da-48f0-ba3e-998b3e44b1f6"), "metadata.csv",
                   "14d145235cedb022548257acb0d84dcd949e2c916f65d2baa7c38ed5339e9527", 316_209),
            Source(_MENDELEY.format("1cc2f71f-20a2-412d-b746-a9b9bc20c966"), "imgs_part_1.zip",
                   "0ab44f60938bf57445e12f518a8878954cc734e6b0aec6d01194e2d26b4b2dca", 1_245_184_680, "images"),
            Source(_MENDELEY.format("559a60ed-5504-475d-996c-6a8bc253b5e7"), "imgs_part_2.zip",
                   "e2d9a3cbd58e823f5ae33163c48643e7d1b54ae3f9e145f01f8e9f16a363a60b", 1_126_646_990, "images"),
            Source(_MENDELEY.format("34dcdf8e-e5f1-4b35-aa0b-5135051ff852"), "imgs_part_3.zip",
                   "ecc4ef10143a43e1d01cb736773148607a78b530417eb76f2c38ad24bf5d0d2c", 1_220_565_093, "images"),
        ),
    ),
    # The challenge publishes no checksums: those of the tables are of files fetched once, and of the images only the
    # size is known.
    "isic_2019": Release(
        isic_2019.SCHEMA,
        "https://challenge.isic-archive.com/data/#2019",
        "download the training data, metadata and ground truth, and save them under their own names in {root}",
        "",
        (
            Source(_ISIC + isic_2019.GROUND_TRUTH, isic_2019.GROUND_TRUTH,
                   "aa88e9638fe4df9ef330dc4ba22fa4bd475c44af692fffb870c73091ab25cdcd", 1_291_479),
            Source(_ISIC + isic_2019.METADATA, isic_2019.METADATA,
                   "d93994a8ed201d474de9a7af7e17ec30929cbc4a5220659ecbde17cbe83e9316", 1_214_351),
            Source(_ISIC + "ISIC_2019_Training_Input.zip", "ISIC_2019_Training_Input.zip", None, 9_771_618_190, "."),
        ),
    ),
}
# fmt: on


class _TryAgainError(Exception):
    """The server may answer better in a while."""


class _NoAnswerError(_TryAgainError):
    """The server can't be reached."""


class _NotTheFileError(Exception):
    """There is no answer, or one that isn't the file: a person with a browser may get it."""


def fetch_dataset(name: str, root: Path, *, accept_licence: bool) -> list[Path]:
    """Download and unpack a data set, and return its files; running it again resumes what isn't done.

    A file that already lies in `root` under its own name is verified and used. What was fetched stands in
    `fetched.json`.
    """
    if name not in RELEASES:
        hint = "; `dualrefnet sample DIR` makes it" if name == "sample" else ""
        raise DataError(f"{name} has no release to download{hint}; there are: {', '.join(RELEASES)}")
    release = RELEASES[name]
    schema = release.schema
    terms = f"{schema.title} is published under {schema.licence} ({release.page}); cite: {schema.citation}"
    if not accept_licence:
        raise DataError(f"{terms}. If you accept this licence, run it again with --accept-licence")
    note(terms)
    root.mkdir(parents=True, exist_ok=True)
    files, sources = _read_record(root), release.sources
    if release.archive and (release.archive in files or (root / release.archive).is_file()):
        sources = (Source(release.page, release.archive, None, 0, "."),)
    todo = []
    for source in sources:
        entry = files.get(source.filename, {"url": None, "made": []})
        if entry["url"] != source.url or not all((root / made).exists() for made in entry["made"]):
            todo.append(source)
    needed = 0
    for source in todo:
        have = _size(root / source.filename) + _size(root / f"{source.filename}.partial")
        needed += max(0, source.size - have) + (source.size if source.folder else 0)
    _require_space(needed, root)
    for source in todo:
        files[source.filename] = _fetch(source, root, release)
        head = {"dataset": name, "licence": schema.licence, "citation": schema.citation}
        write_json(root / RECORD, {**head, "files": list(files.values())})
    return sorted({root / made for source in sources for made in files[source.filename]["made"]})


def _read_record(root: Path) -> dict[str, dict[str, Any]]:
    if not (root / RECORD).exists():
        return {}
    try:
        entries = read_json(root / RECORD)["files"]
        return {one["filename"]: one for one in entries if one["url"] and isinstance(one["made"], list)}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{root / RECORD} can't be read; delete it and run again") from None


def _fetch(source: Source, root: Path, release: Release) -> dict[str, Any]:
    """Get one file, verify it and unpack it; return its entry in the record."""
    path, partial = root / source.filename, root / f"{source.filename}.partial"
    if path.exists():
        note(f"{path} is already there and is verified")
        sha256 = _verify(path, source, f"{path} isn't the published file; move it away and run again")
    else:
        try:
            _download(source, partial)
        except _NotTheFileError as error:
            command = f"dualrefnet fetch {release.schema.name} --root {root} --accept-licence"
            raise DataError(
                f"{source.filename} can't be downloaded by a program ({error}, {source.url}). Open {release.page} in a "
                f"browser, {release.by_hand.format(root=root)}; then run `{command}` again"
            ) from None
        try:
            sha256 = _verify(partial, source, f"{source.url} didn't send the published file; it was deleted: run again")
        except DataError:
            _forget(partial)
            raise
        os.replace(partial, path)
        _forget(partial)
    if source.sha256 is None:
        done = "only its size was compared" if source.size else "it is taken as it is"
        note(f"no checksum of {source.filename} is published: {done}")
    made = [path]
    if source.folder:
        note(f"unpacking {path}")
        made = unpack(path, root / source.folder)
    return {
        "filename": source.filename,
        "url": source.url,
        "bytes": path.stat().st_size,
        "sha256": sha256,
        "verified": "sha256" if source.sha256 else "size" if source.size else "no",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "made": [item.relative_to(root).as_posix() for item in made],
    }


def _verify(path: Path, source: Source, wrong: str) -> str:
    if source.size and _size(path) != source.size:
        raise DataError(f"{wrong} ({_size(path):,} bytes, published: {source.size:,})")
    sha256 = sha256_of_file(path)
    if source.sha256 and sha256 != source.sha256:
        raise DataError(f"{wrong} (SHA-256 {sha256}, published: {source.sha256})")
    return sha256


def _require_space(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the disk of {folder} is too small: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; "
            f"free {(needed - free) / 1e9:.1f} GB more, or choose another folder"
        )


def _download(source: Source, partial: Path) -> None:
    """Complete `partial`; a broken connection is resumed where it broke off. Nothing is verified but the size."""
    failures, begun_with = 0, _size(partial)
    try:
        with progress_bar(f"{source.filename}, MB") as show:
            while True:
                before = _size(partial)
                try:
                    return _request(source, partial, lambda done: show(done // 10**6, source.size // 10**6))
                except (_TryAgainError, requests.RequestException) as error:
                    if isinstance(error, _NoAnswerError) and _size(partial) == begun_with:
                        raise _NotTheFileError(str(error)) from None
                    # As long as every connection brings something, it is worth going on.
                    failures = 1 if _size(partial) > before else failures + 1
                    reason, kept = " ".join(str(error).split())[:200], f"{_size(partial):,} bytes are kept"
                if failures >= ATTEMPTS:
                    raise DataError(f"{source.url} failed {failures} times ({reason}); {kept}: run it again to resume")
                pause = min(60.0, BACKOFF_SECONDS * 2 ** (failures - 1))
                warn(f"{source.filename}: {reason}; trying again in {pause:.0f} s, {kept}")
                time.sleep(pause)
    except KeyboardInterrupt:
        warn(f"interrupted: {_size(partial):,} bytes of {source.filename} are kept; run it again to resume")
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(f"the disk is full; {partial} is kept: free some space and run it again to resume") from None


def _ask(url: str, headers: dict[str, str]) -> requests.Response:
    """Return the server's answer, or say soon that there is none."""
    answers: queue.SimpleQueue[requests.Response | requests.RequestException] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(requests.get(url, headers=headers, stream=True, timeout=(FIRST_ANSWER_SECONDS, PACKET_SECONDS)))
        except requests.RequestException as error:
            answers.put(error)

    # In a thread: without a network it may take minutes to look up a name, and no timeout bounds that.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=FIRST_ANSWER_SECONDS)
    except queue.Empty:
        raise _NoAnswerError(f"no answer within {FIRST_ANSWER_SECONDS:.0f} seconds; is there a network?") from None
    if isinstance(answer, requests.ConnectionError | requests.Timeout):
        raise _NoAnswerError("the server can't be reached; is there a network?")
    if isinstance(answer, requests.RequestException):
        raise answer
    return answer


def _request(source: Source, partial: Path, show: Callable[[int], None]) -> None:
    """Request once what is missing of `partial`, and append it, if the version is that begun (RFC 9110, 8.8)."""
    version = _version_of(partial)
    if not version.is_file():
        partial.unlink(missing_ok=True)
    have = _size(partial)
    if have and have == source.size:
        return
    # Without `identity` a server may compress, and offsets would count other bytes.
    headers = {"Accept-Encoding": "identity", "User-Agent": "dualrefnet"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version.read_text(encoding="utf-8")}
    with _ask(source.url, headers) as response:
        status = response.status_code
        if status in (408, 425, 429) or status >= 500:
            raise _TryAgainError(f"the server answered {status}")
        offered = response.headers.get("Content-Range", "")
        if status == 416 and offered == f"bytes */{have}":
            return
        if status == 416 or (status == 206 and not offered.startswith(f"bytes {have}-")):
            _forget(partial)
            raise _TryAgainError("the server's file isn't the one that was begun, so it starts from zero")
        if status not in (200, 206):
            raise _NotTheFileError(f"the server answered {status}")
        if "html" in response.headers.get("Content-Type", ""):
            raise _NotTheFileError("the server sent a web page")
        if have and status == 200:
            warn(f"{source.filename}: the server can't resume or its file has changed, so it starts from zero")
            _forget(partial)
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        if source.size and total not in (None, source.size):
            raise _NotTheFileError(f"the server offers {total:,} bytes instead of {source.size:,}")
        chunks = response.iter_content(CHUNK)
        first = next(chunks, b"")
        if source.folder and have == 0 and not first.startswith(b"PK"):
            raise _NotTheFileError("the server sent something that isn't a zip")
        etag = response.headers.get("ETag", "")
        # If-Range takes no weak ETag (RFC 9110, 13.1.5).
        validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
        if validator:
            write_text(version, validator)
        with partial.open("ab" if have else "wb") as file:
            for chunk in chain([first], chunks):
                have += len(chunk)
                # A server that names no length may send without end.
                if source.size and have > source.size:
                    _forget(partial)
                    raise _NotTheFileError(f"the server sends more than the published {source.size:,} bytes")
                file.write(chunk)
                show(have)
    if total is not None and have != total:
        raise _TryAgainError(f"the connection ended after {have:,} of {total:,} bytes")


def _version_of(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.version")


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _version_of(partial).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a zip of unknown origin, and the zips in it one level deep: all of it, or a DataError is raised.

    One folder that wraps a whole release (it holds `metadata.csv`) is taken off, and what macOS adds is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # On the same disk, so that moving is renaming.
    temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder))
    try:
        limit = MAX_EXPANSION * archive.stat().st_size
        limit -= _extract(archive, temporary, limit)
        for nested in sorted(path for path in temporary.rglob("*.zip") if path.is_file()):
            limit -= _extract(nested, nested.parent, limit)
            nested.unlink()
        entries = list(temporary.iterdir())
        top = entries[0] if len(entries) == 1 and (entries[0] / "metadata.csv").is_file() else temporary
        made = set()
        for file in sorted(path for path in top.rglob("*") if path.is_file()):
            target = folder / file.relative_to(top)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
            made.add(folder / file.relative_to(top).parts[0])
        return sorted(made)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _extract(archive: Path, folder: Path, limit: int) -> int:
    """Write the members of one zip below `folder`; return the number of bytes written."""
    written, from_macos = 0, re.compile(r"(^|/)(__MACOSX/|\.DS_Store$)")
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not from_macos.search(member.filename)]
            promised = sum(member.file_size for member in members)
            if len(members) > MAX_MEMBERS or promised > limit:
                much = f"{len(members):,} files and {promised:,} bytes, too much for its size"
                raise DataError(f"{archive.name} promises {much}; it wasn't unpacked")
            _require_space(promised, folder)
            for member in members:
                _refuse_unsafe(member, archive)
                target = folder / member.filename
                if member.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, target.open("xb") as file:
                    while chunk := source.read(2**20):
                        written += len(chunk)
                        # The sizes that an archive promises need not be true.
                        if written > limit:
                            raise DataError(f"{archive.name} unpacks to more than {limit:,} bytes; it wasn't unpacked")
                        file.write(chunk)
    except DataError:
        raise
    except OSError as error:
        # Two members of one name, a name that the disk can't hold, a full disk.
        raise DataError(f"{archive.name} can't be unpacked in {folder.parent}: {error.strerror or error}") from None
    except Exception as error:
        # zipfile given hostile bytes raises nearly anything: BadZipFile, struct.error, zlib.error, RuntimeError,
        # IndexError.
        reason = " ".join(str(error).split())
        raise DataError(f"{archive.name} is damaged ({reason}); delete it and run again") from None
    return written


def _refuse_unsafe(member: zipfile.ZipInfo, archive: Path) -> None:
    name, path = member.filename, PurePosixPath(member.filename)
    leads_out = path.is_absolute() or ".." in path.parts or "\\" in name or re.match("[A-Za-z]:", name)
    # The upper half holds the Unix file type; archives from Windows have 0 there.
    kind = stat.S_IFMT(member.external_attr >> 16)
    if leads_out or kind not in (0, stat.S_IFREG, stat.S_IFDIR) or member.flag_bits & 1:
        what = f"{name!r}: a path that leads out, a link or an encrypted file"
        raise DataError(f"{archive.name} holds {what}; it wasn't unpacked")
