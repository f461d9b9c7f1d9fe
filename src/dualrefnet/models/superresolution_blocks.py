"""What the networks of super-resolution share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Mean of the channels (RGB, range 0..1) over DIV2K, with which all of these networks were trained.
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


class Body(nn.Module):
    """Layers one after another under the name `body`, as the published state dicts have them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layers."""
        result: Tensor = self.body(features)
        return result


def convolution(before: int, after: int, groups: int = 1) -> nn.Conv2d:
    """Return a convolution of 3x3 that keeps the size of the map."""
    return nn.Conv2d(before, after, 3, padding=1, groups=groups)


def mean_shift(factor: float) -> nn.Conv2d:
    """Return a convolution that adds `factor` times the mean: as one, it is part of the published state dicts."""
    shift = nn.Conv2d(3, 3, 1)
    shift.weight.data = torch.eye(3).view(3, 3, 1, 1)
    shift.bias = nn.Parameter(factor * torch.tensor(DIV2K_MEAN))
    return shift
