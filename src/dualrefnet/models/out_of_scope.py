"""How unlike the photographs that a model was trained on a picture is, judged by what the image encoders make of it.

Two squared distances from the training photographs are added, each divided by its standard deviation over validation photographs:
of the encoders' vector itself, and of the shares that its entries have in it (the Hellinger transform: roots of the shares). A
picture that excites the encoder little is near in the first and far in the second; one that excites it much, the reverse.

Each distance is Mahalanobis's with one covariance for all classes (after Lee et al. 2018), shrunk towards equal variances (Ledoit
and Wolf 2004), its leading directions exact and one variance for all others (as in probabilistic principal components, Tipping
and Bishop 1999; the rest counts as in ViM, Wang et al. 2022). What is kept are means, directions and variances over many
photographs, never the vector of one, as a search for nearest neighbours would need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from dualrefnet.errors import RunError
from dualrefnet.files import write_tensors

Floats = NDArray[np.float64]

# Directions kept of each distance, at most; with few photographs at most half as many as there are.
DIRECTIONS = 64
# Share of the validation photographs beyond the limit: the rate of false alarms that is meant.
FALSE_ALARMS = 0.02
# Of the validation photographs' scores, so that a score can be told in words.
QUANTILES = 101
_FORMAT = "1"


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

    def measure(self, rows: Floats) -> Floats:
        """Return the distance of each of (N, D), in units of `scale`."""
        centred = rows - self.mean
        along = centred @ self.directions.T.astype(np.float64)
        squared = np.square(along)
        # Rounding may leave less than nothing of a row that lies in the directions.
        beside = np.maximum(np.square(centred).sum(axis=1) - squared.sum(axis=1), 0)
        measured: Floats = ((squared / self.variances).sum(axis=1) + beside / self.rest) / self.scale
        return measured


@dataclass(frozen=True)
class OutOfScope:
    """A fitted score; make one with `fit_out_of_scope` or `OutOfScope.load`. Scoring needs NumPy alone.

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
        """Return how unlike the training photographs pictures are: the two distances over the limit, so more than 1 is unlike.

        Args:
            vectors: (N, D), the encoders' vectors, concatenated.

        Returns:
            (N,), NaN for a vector that isn't finite (a photograph that isn't there).

        Raises:
            ValueError: another D.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.length:
            raise ValueError(f"vectors must have the shape (N, {self.length}), not {vectors.shape}")
        return _guarded(vectors, lambda rows: (self.vector.measure(rows) + self.shares.measure(_shares(rows))) / self.limit)

    def share_nearer(self, score: float) -> float:
        """Return the share of the validation photographs, 0..1, that have a lower score than this one."""
        return float(np.interp(score, self.quantiles, np.linspace(0, 1, QUANTILES)))

    def save(self, path: Path) -> None:
        """Write a safetensors file with the numbers, and the single ones in its header."""
        tensors = {"quantiles": self.quantiles}
        header = {"format": _FORMAT, "limit": repr(self.limit), "training": str(self.training), "validation": str(self.validation)}
        for name, part in (("vector", self.vector), ("shares", self.shares)):
            tensors |= {f"{name}.mean": part.mean, f"{name}.directions": part.directions, f"{name}.variances": part.variances}
            header |= {f"{name}.rest": repr(part.rest), f"{name}.scale": repr(part.scale)}
        header["description"] = (
            "Squared Mahalanobis distances of the image encoders' vector and of the roots of its shares, each over its scale, added and "
            f"divided by the limit; beyond 1 lie {FALSE_ALARMS:.0%} of the validation photographs."
        )
        write_tensors(path, {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}, header)

    @classmethod
    def load(cls, path: Path) -> OutOfScope:
        """Read what `save` has written.

        Raises:
            RunError: the file is missing, damaged or of another version.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            if header.get("format") != _FORMAT:
                raise ValueError(f"format {header.get('format')}")
            vector, shares = (_distance(tensors, header, name) for name in ("vector", "shares"))
            return cls(vector, shares, float(header["limit"]), tensors["quantiles"], int(header["training"]), int(header["validation"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise RunError(f"{path} can't be read ({error}); make it again with `dualrefnet evaluate {path.parent}`") from None


def fit_out_of_scope(training: NDArray[np.floating], validation: NDArray[np.floating]) -> OutOfScope:
    """Fit the score.

    Args:
        training: (N, D) vectors of training photographs; rows that aren't finite are left out.
        validation: (V, D) of photographs that weren't trained on; they set scales and limit, since the network has made room for
            those that it was trained on.

    Raises:
        ValueError: fewer than 2 rows are finite on a side, or the sides differ in D.
    """
    train, held_out = (np.asarray(side, dtype=np.float64)[np.isfinite(side).all(axis=1)] for side in (training, validation))
    if min(len(train), len(held_out)) < 2 or train.shape[1] != held_out.shape[1]:
        raise ValueError(f"an out-of-scope score needs 2 vectors of one length on each side, not {train.shape} and {held_out.shape}")
    vector = _fit_distance(train, held_out)
    shares = _fit_distance(_shares(train), _shares(held_out))
    scores = np.sort(vector.measure(held_out) + shares.measure(_shares(held_out)))
    # The smallest score beyond which at most that share of new photographs is expected (split conformal); the largest if they are few.
    place = min(int(np.ceil((1 - FALSE_ALARMS) * (len(scores) + 1))), len(scores))
    limit = float(max(scores[place - 1], np.finfo(np.float32).tiny))
    quantiles = np.quantile(scores / limit, np.linspace(0, 1, QUANTILES)).astype(np.float32)
    return OutOfScope(vector, shares, limit, quantiles, len(train), len(held_out))


def _fit_distance(train: Floats, held_out: Floats) -> Distance:
    """Fit one distance on (N, D) and its scale on (V, D)."""
    number, length = train.shape
    mean = train.mean(axis=0)
    centred = train - mean
    # Of the smaller of the two product matrices, whose eigenvalues are the same.
    few = number <= length
    values, vectors = np.linalg.eigh((centred @ centred.T if few else centred.T @ centred) / number)
    values, vectors = values[::-1], vectors[:, ::-1]
    total, squares = float(np.trace(centred @ centred.T if few else centred.T @ centred)) / number, float(np.square(values).sum())
    even = total / length
    # Ledoit and Wolf 2004, section 3.3: how far the sample's covariance is shrunk towards `even` times the identity.
    spread = squares - total**2 / length
    noise = (np.square(np.square(centred).sum(axis=1)).mean() - squares) / number
    shrink = float(np.clip(noise / spread, 0, 1)) if spread > 0 else 1.0
    kept = min(DIRECTIONS, number // 2, length - 1, int((values > 1e-9 * max(values[0], 1e-300)).sum()))
    values, vectors = values[:kept], vectors[:, :kept]
    directions = (vectors.T @ centred) / np.sqrt(number * values)[:, None] if few else vectors.T
    variances = (1 - shrink) * values + shrink * even
    # All vectors equal: any other is infinitely far, which is written as very far.
    rest = max((total - float(variances.sum())) / (length - kept), 1e-12 * max(even, 1e-12))
    fitted = Distance(mean.astype(np.float32), directions.astype(np.float32), variances.astype(np.float32), rest, 1.0)
    scale = float(fitted.measure(held_out).std())
    return Distance(fitted.mean, fitted.directions, fitted.variances, rest, scale if scale > 0 else 1.0)


def _shares(rows: Floats) -> Floats:
    """Return the roots of the shares that the entries have in the sum of their sizes, each with its sign; of nothing, nothing."""
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
        raise ValueError(f"{name} has {len(variances)} variances of {directions.shape} directions of {len(mean)} numbers")
    return Distance(mean, directions, variances, float(header[f"{name}.rest"]), float(header[f"{name}.scale"]))
