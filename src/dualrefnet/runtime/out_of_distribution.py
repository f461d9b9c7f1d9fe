"""Out-of-distribution score of an image: how far the encoders' vector lies from those of the training images.

It is fitted in `dualrefnet.analysis.out_of_distribution`, and read from a safetensors file with NumPy alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FORMAT = "1"
# Of the validation images' scores, so that a score can be compared with them.
QUANTILES = 101
# Little-endian, as safetensors prescribes.
TYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U8": "u1"}


@dataclass(frozen=True)
class Distance:
    """A squared Mahalanobis distance: `variances` (K,) along `directions` (K, D), `rest` along every other."""

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
        squared = np.square(centred @ self._columns)
        # Rounding may leave less than nothing of a row that lies in the directions.
        beside = np.maximum(np.square(centred).sum(axis=1) - squared.sum(axis=1), 0)
        measured: Floats = ((squared / self.variances).sum(axis=1) + beside / self.rest) / self.scale
        return measured

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]], header: Mapping[str, str], name: str) -> Distance:
        mean, directions, variances = (tensors[f"{name}.{part}"] for part in ("mean", "directions", "variances"))
        if directions.shape != (len(variances), len(mean)):
            shapes = f"{len(variances)} variances of {directions.shape} directions of {len(mean)} numbers"
            raise ValueError(f"{name} has {shapes}")
        return cls(mean, directions, variances, float(header[f"{name}.rest"]), float(header[f"{name}.scale"]))


@dataclass(frozen=True)
class OutOfDistributionScore:
    """A fitted score: the distances of the encoders' vector and of its `root_shares`, and the `limit` of their sum
    beyond which an image is out-of-distribution; `quantiles` (101,) of the validation images' scores, ascending.

    A cross-fitted model has a pair of `distances` for the vector of each member, and the mean of their sums counts.
    """

    distances: tuple[tuple[Distance, Distance], ...]
    limit: float
    quantiles: NDArray[np.float32]
    training: int
    validation: int

    @property
    def length(self) -> int:
        """D, of the vectors."""
        return sum(len(vector.mean) for vector, _ in self.distances)

    def score(self, vectors: NDArray[np.floating]) -> Floats:
        """Return the sum of the two distances over the limit, (N,): NaN for a missing image."""
        if vectors.ndim != 2 or vectors.shape[1] != self.length:
            raise ValueError(f"vectors must have the shape (N, {self.length}), not {vectors.shape}")
        parts = np.split(vectors, len(self.distances), axis=1)
        sums: Floats = np.mean([self.member_score(part, member) for member, part in enumerate(parts)], axis=0)
        return sums

    def member_score(self, vectors: NDArray[np.floating], member: int) -> Floats:
        """Return the score (N,) of vectors of one member of a cross-fitted model alone; see `score`."""
        vector, shares = self.distances[member]
        finite = np.isfinite(vectors).all(axis=1)
        rows = np.asarray(vectors[finite], dtype=np.float64)
        scores = np.full(len(vectors), np.nan)
        scores[finite] = (vector.measure(rows) + shares.measure(root_shares(rows))) / self.limit
        return scores

    def share_nearer(self, score: float) -> float:
        """Return the share of the validation images, 0..1, that have a lower score than this one."""
        return float(np.interp(score, self.quantiles, np.linspace(0, 1, QUANTILES)))

    @classmethod
    def load(cls, path: Path) -> OutOfDistributionScore:
        """Read a fitted score; ValueError: the file is damaged or of another version."""
        tensors, header = read_tensors(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"format {header.get('format')}")
        try:
            distances = tuple(
                (
                    Distance.from_tensors(tensors, header, f"{prefix}vector"),
                    Distance.from_tensors(tensors, header, f"{prefix}shares"),
                )
                for prefix in prefixes(int(header.get("members", "1")))
            )
            training, validation = int(header["training"]), int(header["validation"])
            return cls(distances, float(header["limit"]), tensors["quantiles"], training, validation)
        except KeyError as error:
            raise ValueError(f"it has no {error}") from None


def prefixes(members: int) -> list[str]:
    """Return what precedes the names of each member's tensors; nothing where there is one."""
    return [""] if members == 1 else [f"{member}." for member in range(members)]


def root_shares(rows: Floats) -> Floats:
    """Return the roots of the shares of the entries in the row's sum of sizes, each with its sign; zeros stay zeros."""
    total = np.abs(rows).sum(axis=1, keepdims=True)
    shares: Floats = np.sign(rows) * np.sqrt(np.abs(rows) / np.where(total > 0, total, 1))
    return shares


def read_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and the strings of its header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("it isn't a safetensors file, or is truncated")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    strings = header.pop("__metadata__", {})
    tensors = {}
    for name, about in header.items():
        first, last = about["data_offsets"]
        if about["dtype"] not in TYPES:
            raise ValueError(f"{name} has the type {about['dtype']}")
        kind = np.dtype(TYPES[about["dtype"]])
        if not 0 <= first <= last <= len(body) or last - first != math.prod(about["shape"]) * kind.itemsize:
            raise ValueError(f"{name} lies outside the file, or isn't as long as its shape says")
        tensors[name] = np.frombuffer(body[first:last], dtype=kind).reshape(about["shape"])
    return tensors, strings
