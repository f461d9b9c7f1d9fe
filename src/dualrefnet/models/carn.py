"""CARN-M: super-resolution by cascading blocks of grouped convolutions, as published by its authors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dualrefnet.models.superresolution_blocks import Body, convolution, mean_shift


class CARNM(nn.Module):
    """CARN-M by two (Ahn et al. 2018, arXiv:1803.08664): three cascading blocks that cascade themselves.

    The published network enlarges by two, three and four. All three ends are here, since its state dict holds them, but
    `forward` uses the one for two: 0.25 of the 0.41 M parameters.
    """

    def __init__(self, features: int = 64, groups: int = 4) -> None:
        super().__init__()
        # In a module of one layer, whose name is part of the published state dict.
        self.sub_mean = nn.Sequential(OrderedDict(shifter=mean_shift(-1)))
        self.add_mean = nn.Sequential(OrderedDict(shifter=mean_shift(1)))
        self.entry = convolution(3, features)
        self.b1, self.b2, self.b3 = (_CascadingBlock(features, groups) for _ in range(3))
        self.c1, self.c2, self.c3 = (_fusion(count, features) for count in (2, 3, 4))
        stages = {"up2": (2,), "up3": (3,), "up4": (2, 2)}
        self.upsample = nn.ModuleDict(
            {name: Body(*(layer for side in sides for layer in _upscale(features, side, groups))) for name, sides in stages.items()}
        )
        self.exit = convolution(features, 3)

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge (B,3,H,W) in 0..1 to (B,3,2H,2W), not clamped."""
        features = self.entry(self.sub_mean(image))
        features = _cascade(features, (self.b1, self.b2, self.b3), (self.c1, self.c2, self.c3))
        result: Tensor = self.add_mean(self.exit(self.upsample["up2"](features)))
        return result


class _CascadingBlock(nn.Module):
    """One residual block used three times, with the same parameters, in a cascade."""

    def __init__(self, features: int, groups: int) -> None:
        super().__init__()
        self.b1 = _GroupedBlock(features, groups)
        self.c1, self.c2, self.c3 = (_fusion(count, features) for count in (2, 3, 4))

    def forward(self, features: Tensor) -> Tensor:
        return _cascade(features, (self.b1, self.b1, self.b1), (self.c1, self.c2, self.c3))


class _GroupedBlock(Body):
    """ReLU(x + f(x)): f is two 3x3 convolutions within groups of channels, and one of 1x1 that mixes the groups."""

    def __init__(self, features: int, groups: int) -> None:
        super().__init__(
            convolution(features, features, groups),
            nn.ReLU(inplace=True),
            convolution(features, features, groups),
            nn.ReLU(inplace=True),
            nn.Conv2d(features, features, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(features + super().forward(features))


def _cascade(features: Tensor, blocks: Iterable[nn.Module], fusions: Iterable[nn.Module]) -> Tensor:
    """Run blocks in a row; after each, the cascade's input and all blocks' outputs so far are fused into the next input."""
    gathered = features
    for block, fusion in zip(blocks, fusions, strict=True):
        gathered = torch.cat([gathered, block(features)], dim=1)
        features = fusion(gathered)
    return features


def _fusion(count: int, features: int) -> Body:
    return Body(nn.Conv2d(count * features, features, 1), nn.ReLU(inplace=True))


def _upscale(features: int, side: int, groups: int) -> list[nn.Module]:
    return [convolution(features, features * side**2, groups), nn.ReLU(inplace=True), nn.PixelShuffle(side)]
