"""NinaSR: super-resolution by residual blocks with local attention, as published by torchSR."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dualrefnet.models.superresolution_blocks import DIV2K_MEAN, Body


class NinaSR(nn.Module):
    """NinaSR by two (Gouvine 2021, doi:10.5281/zenodo.4868308): residual blocks with local attention at the input's size.

    A block adds s = 4/N times its output to its input. Were the outputs of variance 1, as the first input is, the input
    of block i would be of variance 1 + i s^2: it is divided by the root of that, so that no block sees larger numbers
    than another. What the head gives reaches the tail twice, through the blocks and past them.
    """

    def __init__(self, blocks: int, features: int) -> None:
        super().__init__()
        scale = 4 / blocks
        self.head = nn.Sequential(_AddMean(-1), nn.Conv2d(3, features, 3, padding=1, bias=False))
        self.body = nn.Sequential(*(_NinaBlock(features, 1 / math.sqrt(1 + i * scale**2), scale) for i in range(blocks)))
        self.tail = nn.Sequential(nn.Conv2d(features, 3 * 2 * 2, 3, padding=1), nn.PixelShuffle(2), _AddMean(1))

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge (B,3,H,W) in 0..1 to (B,3,2H,2W), not clamped."""
        features = self.head(image)
        result: Tensor = self.tail(features + self.body(features))
        return result


class _AddMean(nn.Module):
    """Add the mean of the training images, or with the sign -1 subtract it."""

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(sign * torch.tensor(DIV2K_MEAN).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return image + self.bias


class _NinaBlock(Body):
    """x + 2 s f(x / sd): f is two 3x3 convolutions that double and halve the channels, with attention between them.

    The 2 makes up for the attention, which halves its input before it has learnt anything.
    """

    def __init__(self, features: int, in_scale: float, out_scale: float) -> None:
        middle = 2 * features
        super().__init__(
            nn.Conv2d(features, middle, 3, padding=1),
            nn.ReLU(inplace=True),
            _LocalAttention(middle),
            nn.Conv2d(middle, features, 3, padding=1, bias=False),
        )
        self.in_scale = in_scale
        self.out_scale = out_scale

    def forward(self, features: Tensor) -> Tensor:
        return features + 2 * self.out_scale * super().forward(features * self.in_scale)


class _LocalAttention(Body):
    """Squeeze and excitation of 16x16 tiles: a tile's channels are weighted by the means of the 31x31 pixels about its first.

    Pixels outside the image don't count, so that the mean is one of fewer pixels at the border.
    """

    def __init__(self, features: int, reduction: int = 4, stride: int = 16) -> None:
        super().__init__(
            nn.AvgPool2d(2 * stride - 1, stride=stride, padding=stride - 1, count_include_pad=False),
            nn.Conv2d(features, features // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(features // reduction, features, 1),
            nn.Sigmoid(),
            nn.Upsample(scale_factor=stride, mode="nearest"),
        )

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        # The last tiles reach beyond an image whose sides aren't multiples of 16.
        return features * super().forward(features)[..., :height, :width]
