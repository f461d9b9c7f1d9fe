"""What every model returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Output(NamedTuple):
    """Result of a forward pass.

    Attributes:
        logits: (B, C) class scores before the softmax.
        features: (B, D) the vector that is classified, fused from image and metadata.
        reconstruction: (B, 3, 2H, 2W) rebuilt image in about 0..1; None without an auxiliary task, and outside training.
        heads: (B, C) logits of additional heads, by name; each gets a cross-entropy term of its own.
    """

    logits: Tensor
    features: Tensor
    reconstruction: Tensor | None
    heads: dict[str, Tensor]
