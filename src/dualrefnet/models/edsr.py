"""EDSR: super-resolution by residual blocks without normalisation, the baseline as published by torchSR."""

from __future__ import annotations

from torch import Tensor, nn

from dualrefnet.models.superresolution_blocks import Body, convolution, mean_shift


class EDSR(nn.Module):
    """EDSR by two (Lim et al. 2017, arXiv:1707.02921): residual blocks without normalisation, then a pixel shuffle.

    Inside, images are in 0..255. The skip over all blocks ends after the last convolution of `body`.
    """

    def __init__(self, blocks: int, features: int) -> None:
        super().__init__()
        self.sub_mean = mean_shift(-255)
        self.add_mean = mean_shift(255)
        self.head = nn.Sequential(convolution(3, features))
        self.body = nn.Sequential(*(_EDSRBlock(features) for _ in range(blocks)), convolution(features, features))
        shuffle = nn.Sequential(convolution(features, features * 2 * 2), nn.PixelShuffle(2))
        self.tail = nn.Sequential(shuffle, convolution(features, 3))

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge (B,3,H,W) in 0..1 to (B,3,2H,2W), not clamped."""
        features = self.head(self.sub_mean(255 * image))
        result: Tensor = self.add_mean(self.tail(features + self.body(features))) / 255
        return result


class _EDSRBlock(Body):
    """x + f(x), f being two 3x3 convolutions; the baseline doesn't scale f."""

    def __init__(self, features: int) -> None:
        super().__init__(convolution(features, features), nn.ReLU(inplace=True), convolution(features, features))

    def forward(self, features: Tensor) -> Tensor:
        return features + super().forward(features)
