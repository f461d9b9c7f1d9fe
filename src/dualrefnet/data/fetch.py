"""Unpack a zip of unknown origin safely."""

# also: Download the official release of a data set: resume what was interrupted, verify it, and unpack it safely.

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from rich.markup import escape

from dualrefnet.data import isic_2019, pad_ufes_20
from dualrefnet.data.download import Source, download, forget, partial_path
from dualrefnet.data.schema import DatasetSchema
from dualrefnet.errors import DataError
from dualrefnet.files import read_json, sha256_of_file, write_json
from dualrefnet.progress import remark

CHUNK = 2**20


# Photographs hardly shrink in an archive: one that promises ten times its size is not what was published.
MAX_EXPANSION = 10


MAX_MEMBERS = 200_000


def require_space(needed: int, folder: Path) -> None:
    """Refuse to begin what can't end.

    Args:
        needed: bytes.
        folder: an existing folder on the disk in question.

    Raises:
        DataError: fewer bytes are free; the message says how many are missing.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the disk of {folder} is too small: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; "
            f"free {(needed - free) / 1e9:.1f} GB more, or choose another folder"
        )


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a zip into a folder, and the zips in it one level deep; either all of it appears there, or an error is
    raised.

    One folder that wraps a whole release (it holds `metadata.csv`) is taken off. What macOS adds is left out.

    Returns:
        The top-level files and folders that were written.

    Raises:
        DataError: the archive is damaged, encrypted, holds links or paths that lead out of the folder, or unpacks to
            far
            more than photographs can; or the disk is too small.
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
    written = 0
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [
                member
                for member in opened.infolist()
                if not re.search(r"(^|/)(__MACOSX/|\.DS_Store$)", member.filename)
            ]
            promised = sum(member.file_size for member in members)
            if len(members) > MAX_MEMBERS or promised > limit:
                raise DataError(
                    f"{archive.name} promises {len(members):,} files and {promised:,} bytes, too much for its size; it wasn't unpacked"
                )
            require_space(promised, folder)
            for member in members:
                _refuse_unsafe(member, archive)
                target = folder / member.filename
                if member.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, target.open("xb") as file:
                    while chunk := source.read(CHUNK):
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
        raise DataError(
            f"{archive.name} is damaged ({' '.join(str(error).split())}); delete it and run again"
        ) from None
    return written


def _refuse_unsafe(member: zipfile.ZipInfo, archive: Path) -> None:
    path = PurePosixPath(member.filename)
    leads_out = (
        path.is_absolute() or ".." in path.parts or "\\" in member.filename or re.match("[A-Za-z]:", member.filename)
    )
    # The upper half holds the Unix file type; archives from Windows have 0 there.
    kind = stat.S_IFMT(member.external_attr >> 16)
    if leads_out or kind not in (0, stat.S_IFREG, stat.S_IFDIR) or member.flag_bits & 1:
        raise DataError(
            f"{archive.name} holds {member.filename!r}: a path that leads out, a link or an encrypted file; it wasn't unpacked"
        )


RECORD = "fetched.json"


@dataclass(frozen=True)
class Release:
    """What is known of an official release.

    Attributes:
        schema: of the data set; it holds licence and citation.
        page: for a browser.
        by_hand: what to click on that page, and under which names to save; `{root}` stands for the data set's folder.
        whole: name of one archive of everything, which a browser gets instead of the single files; empty: there is
            none.
        sources: the files.
    """

    schema: DatasetSchema
    page: str
    by_hand: str
    whole: str
    sources: tuple[Source, ...]


def _mendeley(file_id: str, filename: str, sha256: str, size: int) -> Source:
    url = f"https://data.mendeley.com/public-files/datasets/zr7vgbcyr2/files/{file_id}/file_downloaded"
    return Source(
        url, filename, sha256, size, filename.endswith(".zip"), "images" if filename.endswith(".zip") else "."
    )


_ISIC = "https://isic-challenge-data.s3.amazonaws.com/2019/"


RELEASES = {
    # The checksums are those that Mendeley Data shows beside each file of version 1.
    "pad_ufes_20": Release(
        pad_ufes_20.SCHEMA,
        "https://data.mendeley.com/datasets/zr7vgbcyr2/1",
        "click `Download All` and save the archive as {root}/zr7vgbcyr2-1.zip",
        "zr7vgbcyr2-1.zip",
        (
            _mendeley(
                "fa850265-57da-48f0-ba3e-998b3e44b1f6",
                "metadata.csv",
                "14d145235cedb022548257acb0d84dcd949e2c916f65d2baa7c38ed5339e9527",
                316_209,
            ),
            _mendeley(
                "1cc2f71f-20a2-412d-b746-a9b9bc20c966",
                "imgs_part_1.zip",
                "0ab44f60938bf57445e12f518a8878954cc734e6b0aec6d01194e2d26b4b2dca",
                1_245_184_680,
            ),
            _mendeley(
                "559a60ed-5504-475d-996c-6a8bc253b5e7",
                "imgs_part_2.zip",
                "e2d9a3cbd58e823f5ae33163c48643e7d1b54ae3f9e145f01f8e9f16a363a60b",
                1_126_646_990,
            ),
            _mendeley(
                "34dcdf8e-e5f1-4b35-aa0b-5135051ff852",
                "imgs_part_3.zip",
                "ecc4ef10143a43e1d01cb736773148607a78b530417eb76f2c38ad24bf5d0d2c",
                1_220_565_093,
            ),
        ),
    ),
    # The challenge publishes no checksums: those of the tables are of files fetched once, and of the images only the
    # size is known.
    "isic_2019": Release(
        isic_2019.SCHEMA,
        "https://challenge.isic-archive.com/data/#2019",
        "download the training data, metadata and ground truth, and save the three files under their own names in {root}",
        "",
        (
            Source(
                _ISIC + isic_2019.GROUND_TRUTH,
                isic_2019.GROUND_TRUTH,
                "aa88e9638fe4df9ef330dc4ba22fa4bd475c44af692fffb870c73091ab25cdcd",
                1_291_479,
                False,
            ),
            Source(
                _ISIC + isic_2019.METADATA,
                isic_2019.METADATA,
                "d93994a8ed201d474de9a7af7e17ec30929cbc4a5220659ecbde17cbe83e9316",
                1_214_351,
                False,
            ),
            Source(_ISIC + "ISIC_2019_Training_Input.zip", "ISIC_2019_Training_Input.zip", None, 9_771_618_190, True),
        ),
    ),
}


def fetch_dataset(
    name: str, root: Path, *, accept_licence: bool, sources: Sequence[Source] | None = None, progress: bool = True
) -> list[Path]:
    """Download and unpack a data set; running it again resumes, and does again only what isn't done.

    A file that already lies in `root` under its own name is verified and used. Archives stay after unpacking. What was
    fetched is recorded in `fetched.json`.

    Args:
        name: pad_ufes_20 or isic_2019.
        root: folder to fill.
        accept_licence: that the user accepts the licence of the data.
        sources: other places of the files; None: the official ones.
        progress: show a bar.

    Returns:
        The files and folders that make up the data set.

    Raises:
        DataError: the licence isn't accepted; there is no release of that name; the disk is too small; a server doesn't
            answer, or answers with something else (the message says what to do in a browser); a file isn't the
            published one; an archive is damaged or isn't safe to unpack.
    """
    if name not in RELEASES:
        hint = "; `dualrefnet sample DIR` draws it" if name == "sample" else ""
        raise DataError(f"{name} has no release to download{hint}; there are: {', '.join(RELEASES)}")
    release = RELEASES[name]
    terms = f"{release.schema.title} is published under {release.schema.licence} ({release.page}); cite: {release.schema.citation}"
    if not accept_licence:
        raise DataError(f"{terms}. If you accept this licence, run it again with --accept-licence")
    remark(escape(terms))
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    files = _read_record(root)
    if sources is None:
        sources = release.sources
        if release.whole and (release.whole in files or (root / release.whole).is_file()):
            sources = (Source(release.page, release.whole, None, 0, True),)
    todo = [source for source in sources if not _is_done(source, root, files)]
    _check_space(todo, root)
    for source in todo:
        files[source.filename] = _fetch(source, root, release, progress)
        head = {"dataset": name, "licence": release.schema.licence, "citation": release.schema.citation}
        write_json(root / RECORD, {**head, "files": list(files.values())})
    return sorted({root / made for source in sources for made in files[source.filename]["made"]})


def _read_record(root: Path) -> dict[str, dict[str, Any]]:
    if not (root / RECORD).exists():
        return {}
    try:
        return {
            entry["filename"]: entry
            for entry in read_json(root / RECORD)["files"]
            if entry["url"] and isinstance(entry["made"], list)
        }
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{root / RECORD} can't be read; delete it and run again") from None


def _is_done(source: Source, root: Path, files: dict[str, dict[str, Any]]) -> bool:
    entry = files.get(source.filename)
    return entry is not None and entry["url"] == source.url and all((root / made).exists() for made in entry["made"])


def _check_space(todo: Sequence[Source], root: Path) -> None:
    needed = 0
    for source in todo:
        there = sum(
            path.stat().st_size for path in (root / source.filename, partial_path(source, root)) if path.exists()
        )
        needed += max(0, source.size - there) + (source.size if source.unpack else 0)
    require_space(needed, root)


def _fetch(source: Source, root: Path, release: Release, progress: bool) -> dict[str, Any]:
    """Get one file, verify it and unpack it; return its entry in the record."""
    path, partial = root / source.filename, partial_path(source, root)
    if path.exists():
        remark(escape(f"{path} is already there and is verified"))
        sha256 = _verify(path, source, f"{path} isn't the published file; move it away and run again")
    else:
        download(source, partial, lambda why: _by_hand(why, source, root, release), progress)
        try:
            sha256 = _verify(
                partial, source, f"what {source.url} sent isn't the published file; it was deleted: run again"
            )
        except DataError:
            forget(partial)
            raise
        os.replace(partial, path)
        forget(partial)
    if source.sha256 is None:
        done = "only its size was compared" if source.size else "it is taken as it is"
        remark(escape(f"no checksum of {source.filename} is published: {done}"))
    made = [path]
    if source.unpack:
        remark(escape(f"unpacking {path}"))
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
    size = path.stat().st_size
    if source.size and size != source.size:
        raise DataError(f"{wrong} ({size:,} bytes, published: {source.size:,})")
    sha256 = sha256_of_file(path)
    if source.sha256 and sha256 != source.sha256:
        raise DataError(f"{wrong} (SHA-256 {sha256}, published: {source.sha256})")
    return sha256


def _by_hand(why: str, source: Source, root: Path, release: Release) -> DataError:
    return DataError(
        f"{source.filename} can't be downloaded by a program ({why}, {source.url}). Open {release.page} in a browser, "
        f"{release.by_hand.format(root=root)}; then run `dualrefnet fetch {release.schema.name} --root {root} --accept-licence` "
        "again: it verifies and unpacks what lies there"
    )
