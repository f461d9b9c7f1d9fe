"""Published networks of x2 super-resolution, whose output can be the target of the auxiliary task: EDSR, CARN-M,
NinaSR.

Layers and their names are those of the published state dicts (torchSR; the authors of CARN).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualrefnet.errors import WeightsError
from dualrefnet.files import atomic_path, sha256_of_file
from dualrefnet.models.encoders import (
    HUB_TIMEOUT,
    RANDOM,
    SUFFIXES,
    WeightsSource,
    check_online,
    fill_network,
    find_weights,
    given_file,
    no_file_said,
    no_weights,
    read_tensors,
)

# Mean of the channels (RGB, range 0..1) over DIV2K, with which all of these networks were trained.
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


class Body(nn.Module):
    """Layers one after another under the name `body`, as the published state dicts have them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.body(features)
        return result


class Residual(Body):
    """x + f(x), f being the layers."""

    def forward(self, features: Tensor) -> Tensor:
        return features + super().forward(features)


def convolution(before: int, after: int, groups: int = 1) -> nn.Conv2d:
    """Return a convolution of 3x3 that keeps the size of the map."""
    return nn.Conv2d(before, after, 3, padding=1, groups=groups)


def mean_shift(factor: float) -> nn.Conv2d:
    """Return a convolution that adds `factor` times the mean: as one, it is part of the published state dicts."""
    shift = nn.Conv2d(3, 3, 1)
    shift.weight.data = torch.eye(3).view(3, 3, 1, 1)
    shift.bias = nn.Parameter(factor * torch.tensor(DIV2K_MEAN))
    return shift


class EDSR(nn.Module):
    """EDSR by two (Lim et al. 2017, arXiv:1707.02921); inside, images are in 0..255, and the skip spans `body`."""

    def __init__(self, blocks: int, features: int) -> None:
        super().__init__()
        self.sub_mean = mean_shift(-255)
        self.add_mean = mean_shift(255)
        self.head = nn.Sequential(convolution(3, features))
        pairs = [(convolution(features, features), convolution(features, features)) for _ in range(blocks)]
        residuals = [Residual(first, nn.ReLU(inplace=True), second) for first, second in pairs]
        self.body = nn.Sequential(*residuals, convolution(features, features))
        shuffle = nn.Sequential(convolution(features, features * 2 * 2), nn.PixelShuffle(2))
        self.tail = nn.Sequential(shuffle, convolution(features, 3))

    def forward(self, image: Tensor) -> Tensor:
        features = self.head(self.sub_mean(255 * image))
        result: Tensor = self.add_mean(self.tail(features + self.body(features))) / 255
        return result


class CARNM(nn.Module):
    """CARN-M by two (Ahn et al. 2018, arXiv:1803.08664): three cascading blocks that cascade themselves.

    All three published ends (x2, x3, x4) are here, since its state dict holds them; `forward` uses the first.
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
            {
                name: Body(*(layer for side in sides for layer in _upscale(features, side, groups)))
                for name, sides in stages.items()
            }
        )
        self.exit = convolution(features, 3)

    def forward(self, image: Tensor) -> Tensor:
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


class _GroupedBlock(Residual):
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
        return super().forward(features).relu()


def _cascade(features: Tensor, blocks: Iterable[nn.Module], fusions: Iterable[nn.Module]) -> Tensor:
    """Run blocks in a row; after each, the input and all outputs so far are fused into the next input."""
    gathered = features
    for block, fusion in zip(blocks, fusions, strict=True):
        gathered = torch.cat([gathered, block(features)], dim=1)
        features = fusion(gathered)
    return features


def _fusion(count: int, features: int) -> Body:
    return Body(nn.Conv2d(count * features, features, 1), nn.ReLU(inplace=True))


def _upscale(features: int, side: int, groups: int) -> list[nn.Module]:
    return [convolution(features, features * side**2, groups), nn.ReLU(inplace=True), nn.PixelShuffle(side)]


class NinaSR(nn.Module):
    """NinaSR by two (Gouvine 2021, doi:10.5281/zenodo.4868308): residual blocks with local attention at the input's
    size.

    A block adds s = 4/N times its output to its input. Were the outputs of variance 1, as the first input is, the input
    of block i would be of variance 1 + i s^2: it is divided by the root of that, so that no block sees larger numbers
    than another. What the head gives reaches the tail twice, through the blocks and past them.
    """

    def __init__(self, blocks: int, features: int) -> None:
        super().__init__()
        scale = 4 / blocks
        self.head = nn.Sequential(_AddMean(-1), nn.Conv2d(3, features, 3, padding=1, bias=False))
        self.body = nn.Sequential(
            *(_NinaBlock(features, 1 / math.sqrt(1 + i * scale**2), scale) for i in range(blocks))
        )
        self.tail = nn.Sequential(nn.Conv2d(features, 3 * 2 * 2, 3, padding=1), nn.PixelShuffle(2), _AddMean(1))

    def forward(self, image: Tensor) -> Tensor:
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
    """x + 2 s f(x / sd): two 3x3 convolutions about an attention, which the 2 makes up for before it has learnt."""

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
    """Squeeze and excitation of 16x16 tiles by the means of the 31x31 pixels about a tile's first."""

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


@dataclass(frozen=True)
class NetworkSpec:
    """One published network by two, whose weights are under the MIT licence."""

    title: str  # name in tables
    parameters: float  # millions
    build: Callable[[], nn.Module]
    page: str  # of who publishes it
    folder: str  # of the published state dict, below `page`
    filename: str
    sha256: str | None = None  # of that file, where it is known

    @property
    def url(self) -> str:
        return f"{self.page}/{self.folder}/{self.filename}"

    @property
    def cached(self) -> Path:
        """Where torch.hub, and so torchSR itself, puts the file."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.filename

    def check(self, path: Path) -> None:
        """Refuse another file than the published one."""
        if self.sha256 is not None and sha256_of_file(path) != self.sha256:
            raise WeightsError(
                f"{path} isn't the published file (its SHA-256 isn't {self.sha256}); delete it and run again"
            )


_TORCHSR = ("https://github.com/Coloquinte/torchSR", "releases/download/v1.0.3")
_CARN = ("https://github.com/nmhkahn/CARN-pytorch", "raw/master/checkpoint")
NETWORKS = {
    "ninasr_b0": NetworkSpec("NinaSR-B0", 0.10, lambda: NinaSR(10, 16), *_TORCHSR, "ninasr_b0_x2.pt"),
    "ninasr_b1": NetworkSpec("NinaSR-B1", 1.02, lambda: NinaSR(26, 32), *_TORCHSR, "ninasr_b1_x2.pt"),
    "edsr": NetworkSpec("EDSR baseline", 1.37, lambda: EDSR(16, 64), *_TORCHSR, "edsr64_x2.pt"),
    "carn_m": NetworkSpec(
        "CARN-M", 0.41, CARNM, *_CARN, "carn_m.pth", "d48a759a84509351facb6b7c6d5bd6edec98b98519b8c464ee4ab44d2ba964ff"
    ),
}


def load_network(name: str, weights: str = "auto") -> tuple[nn.Module, WeightsSource]:
    """Build a network and fill it with published weights: (B,3,H,W) in 0..1 -> (B,3,2H,2W), not clamped.

    `weights` is `auto` (a file in $DUALREFNET_WEIGHTS, the cache, the published address: the first), `none` (random),
    or a file.
    """
    spec = NETWORKS[name]
    # Whether a teacher is loaded must not change what the caller draws next.
    with torch.random.fork_rng(devices=[]):
        network = spec.build().eval().requires_grad_(False)
    neutral = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if weights == "none":
        return network, WeightsSource("none", RANDOM, None, *neutral)
    path = find_network_file(name) if weights == "auto" else given_file(weights)
    if path is None:
        path = _download(name, network)
    fill_network(network, read_tensors(path), f"{path} doesn't hold weights of {name} by two")
    if path == spec.cached:
        spec.check(path)
        return network, WeightsSource("hub", spec.url, sha256_of_file(path), *neutral)
    return network, WeightsSource("file", path.name, sha256_of_file(path), *neutral)


def find_network_file(name: str) -> Path | None:
    """Return the file that `auto` would load now without downloading anything, or None."""
    spec = NETWORKS[name]
    path = find_weights([*(f"{name}{suffix}" for suffix in SUFFIXES), spec.filename])
    return path or (spec.cached if spec.cached.is_file() else None)


@torch.inference_mode()
def enlarge(network: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Enlarge RGB bytes (B,H,W,3) by two, to the nearest bytes, (B,2H,2W,3)."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    count, height, width, _ = images.shape
    enlarged = np.empty((count, 2 * height, 2 * width, 3), np.uint8)
    # On CPUs more at a time take longer; an image of 224 px takes about 0.2 GB of CARN-M.
    step = 1 if device.type == "cpu" else 16
    for start in range(0, count, step):
        # A copy, since a store is read-only and torch wants memory that may be written. It stays channels_last:
        # the convolutions are faster so.
        batch = torch.tensor(images[start : start + step]).to(device).permute(0, 3, 1, 2)
        output = network(batch.float().div(255)).clamp(0.0, 1.0).mul(255).round().to(torch.uint8)
        enlarged[start : start + step] = output.permute(0, 2, 3, 1).cpu().numpy()
    return enlarged


def _download(name: str, network: nn.Module) -> Path:
    """Fetch the published file into the cache; one that isn't what it must be doesn't stay there."""
    spec = NETWORKS[name]
    path = spec.cached
    try:
        check_online()
        answer = requests.get(spec.url, timeout=HUB_TIMEOUT)
        answer.raise_for_status()
        with atomic_path(path) as temporary:
            temporary.write_bytes(answer.content)
        try:
            fill_network(network, read_tensors(path), name)
            spec.check(path)
        except WeightsError as error:
            path.unlink()
            raise WeightsError("sends something else than the published file") from error
    except (requests.RequestException, WeightsError) as error:
        tried = [no_file_said(), f"not in the cache {path.parent}", spec.url]
        raise no_weights(name, tried, error, f"{spec.filename} from {spec.page}", "choose another target") from error
    return path
