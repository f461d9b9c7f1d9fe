"""Large files that are filled over time: take the space first, let one process fill, say what a full disk means."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from dualrefnet.errors import DataError

CACHE_VARIABLE = "DUALREFNET_CACHE"


def default_cache() -> Path:
    """Return the folder for stores: `$DUALREFNET_CACHE`, else `dualrefnet` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualrefnet"


def reserve(path: Path, size: int, extra: int = 0) -> bool:
    """Make a file of `size` bytes whose space on the disk is taken; return False if it was there already.

    Args:
        path: the file.
        size: bytes.
        extra: further bytes that will be needed beside it.

    Raises:
        DataError: the disk has no room; nothing half made stays.
    """
    have = path.stat().st_size if path.exists() else 0
    if have == size:
        return False
    free = shutil.disk_usage(path.parent).free
    if free + have < size + extra:
        raise DataError(
            f"the image store needs {size / 2**30:.2f} GiB in {path.parent.parent} and {free / 2**30:.2f} GiB are free; "
            f"free some space, or set {CACHE_VARIABLE} to a folder on a larger disk"
        )
    try:
        with path.open("wb") as file:
            # Space that is only promised (a sparse file) would end in a crash of the map when the disk is full.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise disk_error(error, path.parent) from error
    return True


def disk_error(error: OSError, folder: Path) -> Exception:
    """Return the error in the user's words if the disk is full, else the error itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"the disk is full: {folder.parent} has no room for the image store; what is done is kept, free some space and run again"
        )
    return error


class Lock:
    """One process fills a store; another one that wants the same store waits for it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX)
        except ImportError:  # Windows has no flock; two fillings at once then write the same bytes twice.
            pass

    def __exit__(self, *_: object) -> None:
        self._file.close()
