"""The metadata network: encoded form -> vector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def metadata_mlp(metadata_width: int, widths: Sequence[int]) -> nn.Sequential:
    """Build phi_meta of the paper: fully connected layers of `widths`, ReLU after every layer but the last.

    Maps (B, M) to (B, widths[-1]).
    """
    layers: list[nn.Module] = []
    for number, (narrow, wide) in enumerate(zip([metadata_width, *widths[:-1]], widths, strict=True)):
        layers += [nn.Linear(narrow, wide)] + ([nn.ReLU()] if number + 1 < len(widths) else [])
    return nn.Sequential(*layers)
