"""Make the C library keep freed memory, for training on a CPU.

A training step frees and asks for the same hundreds of megabytes again. By default glibc gives large blocks back to the
system at once, which then has to clear every page anew: half of the time of a step on a small machine.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from its heap and not to shrink it; return whether it was told (Linux, glibc).

    The process keeps its peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # A C library other than glibc, such as musl.
        return False
    return all(mallopt(name, value) == 1 for name, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)))
