"""Read a safetensors file with NumPy alone: a length, a JSON header, and the numbers."""

# also: How unlike the photographs that a model was trained on a picture is, judged by what the image encoders make of
# it.

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

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


Floats = NDArray[np.float64]


# Of the validation photographs' scores, so that a score can be told in words.
QUANTILES = 101


FORMAT = "1"


@dataclass(frozen=True)
class Distance:
    """A squared Mahalanobis distance.

    Attributes:
        mean: (D,) of the training photographs.
        directions: (K, D) orthonormal, along which they vary most.
        variances: (K,) along these.
        rest: variance along every other direction.
        scale: standard deviation of the distance over validation photographs.
    """

    mean: NDArray[np.float32]
    directions: NDArray[np.float32]
    variances: NDArray[np.float32]
    rest: float
    scale: float

    @cached_property
    def _columns(self) -> Floats:
        """(D, K), the directions in double precision: their squares are subtracted from large numbers."""
        return self.directions.T.astype(np.float64)

    def measure(self, rows: Floats) -> Floats:
        """Return the distance of each of (N, D), in units of `scale`."""
        centred = rows - self.mean
        along = centred @ self._columns
        squared = np.square(along)
        # Rounding may leave less than nothing of a row that lies in the directions.
        beside = np.maximum(np.square(centred).sum(axis=1) - squared.sum(axis=1), 0)
        measured: Floats = ((squared / self.variances).sum(axis=1) + beside / self.rest) / self.scale
        return measured


@dataclass(frozen=True)
class OutOfDistributionScore:
    """A fitted score; it is fitted in `dualrefnet.analysis.out_of_distribution`.

    Attributes:
        vector: distance of the encoders' vector.
        shares: distance of the roots of the shares.
        limit: score beyond which a picture is called unlike the training photographs.
        quantiles: (101,) of the validation photographs' scores, from the least to the largest.
        training: photographs that it was fitted on.
        validation: photographs that limit and scales were set with.
    """

    vector: Distance
    shares: Distance
    limit: float
    quantiles: NDArray[np.float32]
    training: int
    validation: int

    @property
    def length(self) -> int:
        """D, of the vectors."""
        return len(self.vector.mean)

    def score(self, vectors: NDArray[np.floating]) -> Floats:
        """Return how unlike the training photographs pictures are: the two distances over the limit, so more than 1 is
        unlike.

        Args:
            vectors: (N, D), the encoders' vectors, concatenated.

        Returns:
            (N,), NaN for a vector that isn't finite (a photograph that isn't there).

        Raises:
            ValueError: another D.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.length:
            raise ValueError(f"vectors must have the shape (N, {self.length}), not {vectors.shape}")
        return _guarded(
            vectors, lambda rows: (self.vector.measure(rows) + self.shares.measure(root_shares(rows))) / self.limit
        )

    def share_nearer(self, score: float) -> float:
        """Return the share of the validation photographs, 0..1, that have a lower score than this one."""
        return float(np.interp(score, self.quantiles, np.linspace(0, 1, QUANTILES)))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file with the numbers.

        Raises:
            ValueError: it is damaged or of another version.
            OSError: it can't be read.
        """
        tensors, header = read_tensors(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"format {header.get('format')}")
        try:
            vector, shares = (_distance(tensors, header, name) for name in ("vector", "shares"))
            return cls(
                vector,
                shares,
                float(header["limit"]),
                tensors["quantiles"],
                int(header["training"]),
                int(header["validation"]),
            )
        except KeyError as error:
            raise ValueError(f"it has no {error}") from None


def root_shares(rows: Floats) -> Floats:
    """Return the roots of the shares that the entries have in the sum of their sizes, each with its sign; of nothing,
    nothing.
    """
    total = np.abs(rows).sum(axis=1, keepdims=True)
    shares: Floats = np.sign(rows) * np.sqrt(np.abs(rows) / np.where(total > 0, total, 1))
    return shares


def _guarded(vectors: NDArray[np.floating], measure: Callable[[Floats], Floats]) -> Floats:
    """Measure the finite rows; the others get NaN."""
    finite = np.isfinite(vectors).all(axis=1)
    result = np.full(len(vectors), np.nan)
    result[finite] = measure(np.asarray(vectors[finite], dtype=np.float64))
    return result


def _distance(tensors: Mapping[str, NDArray[np.float32]], header: Mapping[str, str], name: str) -> Distance:
    mean, directions, variances = (tensors[f"{name}.{part}"] for part in ("mean", "directions", "variances"))
    if directions.shape != (len(variances), len(mean)):
        raise ValueError(
            f"{name} has {len(variances)} variances of {directions.shape} directions of {len(mean)} numbers"
        )
    return Distance(mean, directions, variances, float(header[f"{name}.rest"]), float(header[f"{name}.scale"]))
