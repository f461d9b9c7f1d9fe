"""The published networks of super-resolution by two, whose output can be the target of the auxiliary task.

They are frozen teachers: nothing here is trained. Modules and parameters have the names of the published state dicts, so
that these load strictly. NinaSR and EDSR are those of torchSR, CARN-M is that of its authors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from huggingface_hub import constants as hub_constants
from numpy.typing import NDArray
from torch import nn

from dualrefnet.errors import RecipeError, WeightsError
from dualrefnet.files import atomic_path, sha256_of_file
from dualrefnet.models.carn import CARNM
from dualrefnet.models.edsr import EDSR
from dualrefnet.models.ninasr import NinaSR
from dualrefnet.models.weights import HUB_TIMEOUT, SUFFIXES, WEIGHTS_VARIABLE, WeightsSource, read_tensors, weights_folder
from dualrefnet.recipe import suggestion

_TORCHSR = "https://github.com/Coloquinte/torchSR"
_CARN = "https://github.com/nmhkahn/CARN-pytorch"


@dataclass(frozen=True)
class NetworkSpec:
    """One published network.

    Attributes:
        title: its name in tables.
        parameters: millions, as published.
        filename: of the published state dict.
        url: of that file.
        page: of those who publish it.
        licence: of the weights.
        psnr: dB, of enlarging Set5 by two, as torchSR reports it: on luminance and without the border.
        sha256: of the published file, where it is known.
    """

    title: str
    parameters: float
    filename: str
    url: str
    page: str
    licence: str
    psnr: float
    sha256: str | None = None


def _of_torchsr(title: str, parameters: float, filename: str, psnr: float) -> NetworkSpec:
    return NetworkSpec(title, parameters, filename, f"{_TORCHSR}/releases/download/v1.0.3/{filename}", _TORCHSR, "MIT", psnr)


NETWORKS: dict[str, NetworkSpec] = {
    "ninasr_b0": _of_torchsr("NinaSR-B0", 0.10, "ninasr_b0_x2.pt", 37.72),
    "ninasr_b1": _of_torchsr("NinaSR-B1", 1.02, "ninasr_b1_x2.pt", 38.14),
    "edsr": _of_torchsr("EDSR baseline", 1.37, "edsr64_x2.pt", 37.98),
    "carn_m": NetworkSpec(
        "CARN-M",
        0.41,
        "carn_m.pth",
        f"{_CARN}/raw/master/checkpoint/carn_m.pth",
        _CARN,
        "MIT",
        37.68,
        "d48a759a84509351facb6b7c6d5bd6edec98b98519b8c464ee4ab44d2ba964ff",
    ),
}


def network_spec(name: str) -> NetworkSpec:
    """Return the network of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in NETWORKS:
        raise RecipeError(f"no super-resolution network is called {name!r}{suggestion(name, NETWORKS)} (there are: {', '.join(NETWORKS)})")
    return NETWORKS[name]


def create_network(name: str) -> nn.Module:
    """Build a network with random parameters.

    Args:
        name: a key of `NETWORKS`.

    Returns:
        (B,3,H,W) in 0..1 -> (B,3,2H,2W), not clamped.

    Raises:
        RecipeError: the name is unknown.
    """
    network_spec(name)
    if name == "edsr":
        return EDSR(blocks=16, features=64)
    if name == "carn_m":
        return CARNM()
    return NinaSR(blocks=10, features=16) if name == "ninasr_b0" else NinaSR(blocks=26, features=32)


def load_network(name: str, weights: str = "auto") -> tuple[nn.Module, WeightsSource]:
    """Build a network and fill it with published weights; it is in evaluation mode, and its parameters have no gradients.

    Args:
        name: a key of `NETWORKS`.
        weights: `auto` (a file in the folder $DUALREFNET_WEIGHTS, under the network's name or the published one; the
            cache of downloads; the published address: the first that there is), `none` (random), or a file.

    Returns:
        The network, on the CPU, and what it was filled with. `mean` and `std` of the record change nothing: the network
        takes images in 0..1 and subtracts its mean itself.

    Raises:
        RecipeError: the name is unknown.
        WeightsError: the weights are not to be had, or the file holds others; the message says what was tried and what to
            do.
    """
    spec = network_spec(name)
    # Whether a teacher is loaded must not change what the caller draws next.
    with torch.random.fork_rng(devices=[]):
        network = create_network(name).eval().requires_grad_(False)
    if weights == "none":
        return network, WeightsSource("none", "random, not pretrained", None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if weights == "auto":
        path = find_network_file(name)
        if path is None:
            path = _download(name, network)
    else:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise WeightsError(f"there is no weights file {path}; give a file, or auto or none (random)")
    _fill(network, name, path)
    published = path == _cached(spec)
    if published:
        _check_published(path, spec)
    description = spec.url if published else path.name
    source = WeightsSource("hub" if published else "file", description, sha256_of_file(path), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return network, source


def find_network_file(name: str) -> Path | None:
    """Return the file that `auto` would load now without downloading anything, or None.

    Raises:
        RecipeError: the name is unknown.
        WeightsError: $DUALREFNET_WEIGHTS is no folder.
    """
    spec = network_spec(name)
    folder = weights_folder()
    if folder is not None and not folder.is_dir():
        raise WeightsError(f"{WEIGHTS_VARIABLE} is {folder}, which is no folder; correct it or unset it")
    names = [*(f"{name}{suffix}" for suffix in SUFFIXES), spec.filename]
    places = [folder / filename for filename in names] if folder else []
    return next((path for path in [*places, _cached(spec)] if path.is_file()), None)


@torch.inference_mode()
def enlarge(network: nn.Module, images: NDArray[np.uint8], batch_size: int | None = None) -> NDArray[np.uint8]:
    """Enlarge images by two and round the result to bytes.

    Args:
        network: as `load_network` returns it, on any device; or another module of its contract.
        images: (B,H,W,3) RGB, 0..255.
        batch_size: images at a time, about 0.2 GB each for CARN-M and 224 px; None: 1 on CPUs, where more take longer, else 16.

    Returns:
        (B,2H,2W,3) RGB, the nearest bytes; what is outside 0..255 is clamped.

    Raises:
        ValueError: `images` are no such array.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be (B,H,W,3) uint8, not {images.shape} {images.dtype}")
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    count, height, width, _ = images.shape
    enlarged = np.empty((count, 2 * height, 2 * width, 3), np.uint8)
    step = batch_size or (1 if device.type == "cpu" else 16)
    for start in range(0, count, step):
        # A copy, since a store is read-only and torch wants memory that may be written. Left channels_last, as it lies:
        # the convolutions are faster so.
        batch = torch.tensor(images[start : start + step]).to(device).permute(0, 3, 1, 2)
        output = network(batch.float().div(255)).clamp(0.0, 1.0).mul(255).round().to(torch.uint8)
        enlarged[start : start + step] = output.permute(0, 2, 3, 1).cpu().numpy()
    return enlarged


def _fill(network: nn.Module, name: str, path: Path) -> None:
    tensors = read_tensors(path)
    wanted = network.state_dict()
    differences: dict[str, Any] = {
        "missing": wanted.keys() - tensors.keys(),
        "unexpected": tensors.keys() - wanted.keys(),
        "other shape": {key for key in wanted.keys() & tensors.keys() if wanted[key].shape != tensors[key].shape},
    }
    faults = [f"{len(keys)} {what}, such as {min(keys)}" for what, keys in differences.items() if keys]
    if faults:
        raise WeightsError(f"{path} doesn't hold weights of {name} by two: {'; '.join(faults)}")
    network.load_state_dict(tensors)


def _cached(spec: NetworkSpec) -> Path:
    # Where torch.hub, and so torchSR itself, puts this file.
    return Path(torch.hub.get_dir()) / "checkpoints" / spec.filename


def _check_published(path: Path, spec: NetworkSpec) -> None:
    if spec.sha256 is not None and sha256_of_file(path) != spec.sha256:
        raise WeightsError(f"{path} isn't the published file (its SHA-256 isn't {spec.sha256}); delete it and run again")


def _download(name: str, network: nn.Module) -> Path:
    """Fetch the published file into the cache; one that isn't what it must be doesn't stay there."""
    spec = NETWORKS[name]
    path = _cached(spec)
    folder = weights_folder()
    try:
        # Who keeps the hub's client offline means downloads of weights, not one company's.
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in hub_constants.ENV_VARS_TRUE_VALUES:
            raise WeightsError("HF_HUB_OFFLINE is set")
        answer = requests.get(spec.url, timeout=HUB_TIMEOUT)
        answer.raise_for_status()
        with atomic_path(path) as temporary:
            temporary.write_bytes(answer.content)
        try:
            _fill(network, name, path)
            _check_published(path, spec)
        except WeightsError as error:
            path.unlink()
            raise WeightsError("sends something else than the published file") from error
    except (requests.RequestException, WeightsError) as error:
        reason = str(error) if isinstance(error, WeightsError) else f"out of reach ({type(error).__name__})"
        tried = f"no file for it in {folder}" if folder else f"{WEIGHTS_VARIABLE} isn't set"
        place = folder or f"a folder, set {WEIGHTS_VARIABLE} to it"
        raise WeightsError(
            f"no weights for {name}: {tried}; not in the cache {path.parent}; {spec.url}: {reason}. "
            f"Put {spec.filename} from {spec.page} into {place}, or go online, or choose another target"
        ) from error
    return path
