"""Read a safetensors file with NumPy alone: a length, a JSON header, and the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Little-endian, as the format says.
TYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U8": "u1"}


def read_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the tensors of a file by name, and the strings of its header.

    Raises:
        ValueError: it isn't a safetensors file, is cut short, or holds a type of number that isn't among `TYPES`.
        OSError: it can't be read.
    """
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("it isn't a safetensors file, or is cut short")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    strings = header.pop("__metadata__", {})
    tensors = {}
    for name, about in header.items():
        first, last = about["data_offsets"]
        if about["dtype"] not in TYPES:
            raise ValueError(f"{name} has numbers of type {about['dtype']}")
        kind = np.dtype(TYPES[about["dtype"]])
        if not 0 <= first <= last <= len(body) or last - first != math.prod(about["shape"]) * kind.itemsize:
            raise ValueError(f"{name} lies outside the file, or isn't as long as its shape says")
        tensors[name] = np.frombuffer(body[first:last], dtype=kind).reshape(about["shape"])
    return tensors, strings
