"""The decoders of the auxiliary branch: from the encoder's map to an image of twice the input's side.

The paper says "6-layer CNN". The CNN encoders end at stride 32, and 7 * 2^6 = 448, so `plain` reads it as six doublings.
`bottleneck` has six convolutions too, but does its work on small maps and makes the pixels in one shuffle at the end.
At inference a decoder is dropped.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


def create_decoder(kind: str, in_features: int, stride: int) -> nn.Sequential:
    """Return a decoder (B,D,h,w) -> (B,3, 2 h stride, 2 w stride) for targets in the range 0..1.

    The output is linear and not clamped: a clamp would have no gradient where it is needed.

    Args:
        kind: `plain` or `bottleneck`; see `plain_decoder` and `bottleneck_decoder` for what each costs.
        in_features: D, channels of the encoder's map.
        stride: side of the input image / side of the map, 32 or 16.

    Raises:
        ValueError: the kind or the stride is another.
    """
    if stride not in (16, 32):
        raise ValueError(f"decoders are made for encoders of stride 16 or 32, not {stride}")
    if kind == "plain":
        return plain_decoder(in_features, stride)
    if kind == "bottleneck":
        return bottleneck_decoder(in_features, stride)
    raise ValueError(f"there is no decoder {kind!r}; there are: plain, bottleneck")


def plain_decoder(in_features: int, stride: int) -> nn.Sequential:
    """Six up-sampling stages, D-256-128-64-32-16-3: the literal reading of the paper.

    Cost for a 224 px image and D = 1280: 706 M multiply-adds (MobileNet-V2 itself: 300 M), 5.9 M parameters.
    For stride 16 the first stage keeps the size.
    """
    widths = (in_features, 256, 128, 64, 32, 16)
    layers: list[nn.Module] = []
    for stage, (before, after) in enumerate(pairwise(widths)):
        if stage == 0 and stride == 16:
            layers.append(nn.Conv2d(before, after, 3, padding=1, bias=False))
        else:
            layers.append(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False))
        layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    last = nn.ConvTranspose2d(widths[-1], 3, 4, stride=2, padding=1)
    _start_grey(last)
    return nn.Sequential(*layers, last)


def bottleneck_decoder(in_features: int, stride: int) -> nn.Sequential:
    """Six convolutions: a 1x1 bottleneck to 96, four of 3x3 that shuffle their way to an eighth of the output, 1x1 to pixels.

    Cost for a 224 px image and D = 1280: 58 M multiply-adds, 0.35 M parameters. Each doubling halves the channels on
    both sides of a convolution, so that the middle ones cost about the same. For stride 16 the second keeps the size.
    """
    last = nn.Conv2d(24, 3 * 8 * 8, 1)
    _start_grey(last)
    _equal_subpixels(last, 8)
    return nn.Sequential(
        _Block(in_features, 96, kernel=1),
        _Block(96, 48, upscale=2 if stride == 32 else 1),
        _Block(48, 24, upscale=2),
        _Block(24, 16, upscale=2),
        _Block(16, 24),
        last,
        _Planes(8),
    )


class _Block(nn.Sequential):
    """Convolution, batch normalisation, ReLU and, if it enlarges, a pixel shuffle: (B,before,h,w) -> (B,after,h u,w u)."""

    def __init__(self, before: int, after: int, kernel: int = 3, upscale: int = 1) -> None:
        convolution = nn.Conv2d(before, after * upscale**2, kernel, padding=kernel // 2, bias=False)
        layers: list[nn.Module] = [convolution, nn.BatchNorm2d(after * upscale**2), nn.ReLU(inplace=True)]
        if upscale > 1:
            _equal_subpixels(convolution, upscale)
            layers.append(nn.PixelShuffle(upscale))
        super().__init__(*layers)


class _Planes(nn.Module):
    """A pixel shuffle that writes planes: (B,3 u u,h,w) in any memory format -> (B,3,h u,w u), contiguous.

    The same values as `nn.PixelShuffle`, in one copy. On CPUs that takes about half the time, forward and backward, and
    at the size of the image it was the dearest step of the decoder.
    """

    def __init__(self, upscale: int) -> None:
        super().__init__()
        self.upscale = upscale

    def forward(self, features: Tensor) -> Tensor:
        """Shuffle."""
        batch, _, height, width = features.shape
        subpixels = features.view(batch, 3, self.upscale, self.upscale, height, width)
        return subpixels.permute(0, 1, 4, 2, 5, 3).reshape(batch, 3, height * self.upscale, width * self.upscale)


def _equal_subpixels(convolution: nn.Conv2d, upscale: int) -> None:
    """Start the filters of one block of subpixels equal (ICNR, Aitken et al. 2017): no checkerboard before training."""
    weight = convolution.weight.data
    convolution.weight.data = weight[:: upscale**2].repeat_interleave(upscale**2, dim=0)


def _start_grey(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Start with an almost even grey image.

    Targets lie in 0..1, so 0.5 in the bias spares the encoder the first steps that would only move the mean; small
    weights keep the first error at the variance of the target.
    """
    nn.init.normal_(layer.weight, std=0.02)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, 0.5)
