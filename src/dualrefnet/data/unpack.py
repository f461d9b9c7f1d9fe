"""Unpack a zip of unknown origin safely."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from dualrefnet.errors import DataError

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
    """Unpack a zip into a folder, and the zips in it one level deep; either all of it appears there, or an error is raised.

    One folder that wraps a whole release (it holds `metadata.csv`) is taken off. What macOS adds is left out.

    Returns:
        The top-level files and folders that were written.

    Raises:
        DataError: the archive is damaged, encrypted, holds links or paths that lead out of the folder, or unpacks to far
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
            members = [member for member in opened.infolist() if not re.search(r"(^|/)(__MACOSX/|\.DS_Store$)", member.filename)]
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
        # zipfile given hostile bytes raises nearly anything: BadZipFile, struct.error, zlib.error, RuntimeError, IndexError.
        raise DataError(f"{archive.name} is damaged ({' '.join(str(error).split())}); delete it and run again") from None
    return written


def _refuse_unsafe(member: zipfile.ZipInfo, archive: Path) -> None:
    path = PurePosixPath(member.filename)
    leads_out = path.is_absolute() or ".." in path.parts or "\\" in member.filename or re.match("[A-Za-z]:", member.filename)
    # The upper half holds the Unix file type; archives from Windows have 0 there.
    kind = stat.S_IFMT(member.external_attr >> 16)
    if leads_out or kind not in (0, stat.S_IFREG, stat.S_IFDIR) or member.flag_bits & 1:
        raise DataError(f"{archive.name} holds {member.filename!r}: a path that leads out, a link or an encrypted file; it wasn't unpacked")
