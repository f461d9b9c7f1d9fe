"""Fit the score that tells how unlike the photographs that a model was trained on a picture is; see `dualrefnet.runtime.out_of_scope`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from dualrefnet.errors import RunError
from dualrefnet.files import write_tensors
from dualrefnet.runtime.out_of_scope import FORMAT, QUANTILES, Distance, OutOfScopeScore, root_shares

Floats = NDArray[np.float64]

# Directions kept of each distance, at most; with few photographs at most half as many as there are.
DIRECTIONS = 64
# Share of the validation photographs beyond the limit: the rate of false alarms that is meant.
FALSE_ALARMS = 0.02


@dataclass(frozen=True)
class OutOfScope(OutOfScopeScore):
    """A fitted score with its file; make one with `fit_out_of_scope` or `OutOfScope.load`."""

    def save(self, path: Path) -> None:
        """Write a safetensors file with the numbers, and the single ones in its header."""
        tensors = {"quantiles": self.quantiles}
        header = {"format": FORMAT, "limit": repr(self.limit), "training": str(self.training), "validation": str(self.validation)}
        for name, part in (("vector", self.vector), ("shares", self.shares)):
            tensors |= {f"{name}.mean": part.mean, f"{name}.directions": part.directions, f"{name}.variances": part.variances}
            header |= {f"{name}.rest": repr(part.rest), f"{name}.scale": repr(part.scale)}
        header["description"] = (
            "Squared Mahalanobis distances of the image encoders' vector and of the roots of its shares, each over its scale, added and "
            f"divided by the limit; beyond 1 lie {FALSE_ALARMS:.0%} of the validation photographs."
        )
        write_tensors(path, {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}, header)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` has written.

        Raises:
            RunError: the file is missing, damaged or of another version.
        """
        try:
            return super().load(path)
        except (OSError, ValueError) as error:
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
    shares = _fit_distance(root_shares(train), root_shares(held_out))
    scores = np.sort(vector.measure(held_out) + shares.measure(root_shares(held_out)))
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
