"""Fill the gaps of encoded forms with what a small network finds likeliest; it is fitted in `dualrefnet.data.imputation`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Span:
    """The columns `start:stop` that one field occupies; a numeric field has one column."""

    start: int
    stop: int
    numeric: bool


@dataclass(frozen=True)
class NeuralImputer:
    """A fitted imputer: plain arrays.

    Attributes:
        spans: the fields' columns, in order.
        weights: two layers, (K + F, HIDDEN), (HIDDEN,), (HIDDEN, K), (K,) with K columns and F fields.
        values: for every numeric field the standardised numbers that were observed; a filled number is one of them,
            since a value that nobody ever recorded would give away that it was filled.
    """

    spans: tuple[Span, ...]
    weights: tuple[Array, ...]
    values: tuple[Array, ...]

    def fill(self, columns: Array, missing: NDArray[np.bool_]) -> Array:
        """Return a copy of `columns` (N, K) in which the missing fields (N, F) hold the likeliest value."""
        if not missing.any():
            return columns.copy()
        output = network(np.concatenate([columns, missing.astype(np.float32)], axis=1), self.weights, np)
        filled = columns.copy()
        for index, (span, values) in enumerate(zip(self.spans, self.values, strict=True)):
            rows = np.flatnonzero(missing[:, index])
            # A category of which the training rows had no value has no column.
            if not len(rows) or span.stop == span.start:
                continue
            guess = output[rows, span.start : span.stop]
            if not span.numeric:
                filled[rows, span.start : span.stop] = np.eye(span.stop - span.start, dtype=np.float32)[guess.argmax(axis=1)]
            elif len(values):
                filled[rows, span.start] = values[np.abs(guess - values[None, :]).argmin(axis=1)]
        return filled

    def to_json(self) -> dict[str, Any]:
        """Return the fitted state as plain JSON values."""
        return {
            "spans": [[span.start, span.stop, span.numeric] for span in self.spans],
            "weights": [weight.tolist() for weight in self.weights],
            "values": [values.tolist() for values in self.values],
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> NeuralImputer:
        """Rebuild from `to_json`."""
        return cls(
            tuple(Span(int(start), int(stop), bool(numeric)) for start, stop, numeric in state["spans"]),
            tuple(np.asarray(weight, dtype=np.float32) for weight in state["weights"]),
            tuple(np.asarray(values, dtype=np.float32) for values in state["values"]),
        )


def network(x: Any, weights: Any, library: Any) -> Any:
    """Two layers with tanh; `library` is torch in training and numpy afterwards, the formula is one."""
    first, bias, second, last_bias = weights
    return library.tanh(x @ first + bias) @ second + last_bias
