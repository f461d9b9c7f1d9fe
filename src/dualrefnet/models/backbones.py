"""The image encoders: the paper's names for timm's networks, all behind one contract.

An encoder gives a map, from which the decoder rebuilds the image, and a vector, which meets the metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import timm
from torch import Tensor, nn

from dualrefnet.errors import RecipeError
from dualrefnet.models.weights import WeightsSource, load_weights, resolve_weights
from dualrefnet.recipe import suggestion


@dataclass(frozen=True)
class BackboneSpec:
    """One architecture.

    Attributes:
        timm_name: its name in timm.
        title: its name in tables.
        kind: cnn, or transformer (built for one image size).
        features: D, channels of the map and length of the vector.
        parameters: millions, without a classifier.
        stride: side of the image / side of the map.
        class_token: the vector is the class token, not the mean of the map.
        taps: which of timm's intermediate maps are given on request: the ends of the last stages before the map (CNNs, Swin),
            or the blocks after a quarter, a half and three quarters of the network.
    """

    timm_name: str
    title: str
    kind: Literal["cnn", "transformer"]
    features: int
    parameters: float
    stride: int = 32
    class_token: bool = False
    taps: tuple[int, ...] = (2, 3, 4)


BACKBONES: dict[str, BackboneSpec] = {
    "vgg13": BackboneSpec("vgg13_bn", "VGG-13", "cnn", 512, 9.4, taps=(1, 2, 3)),
    "resnet50": BackboneSpec("resnet50", "ResNet-50", "cnn", 2048, 23.5, taps=(1, 2, 3)),
    "mobilenet_v2": BackboneSpec("mobilenetv2_100", "MobileNet-V2", "cnn", 1280, 2.2),
    "efficientnet_b4": BackboneSpec("efficientnet_b4", "EfficientNet-B4", "cnn", 1792, 17.5),
    "densenet121": BackboneSpec("densenet121", "DenseNet-121", "cnn", 1024, 7.0, taps=(1, 2, 3)),
    "efficientnet_lite0": BackboneSpec("tf_efficientnet_lite0", "EfficientNet-Lite0", "cnn", 1280, 3.4),
    "efficientnet_lite1": BackboneSpec("tf_efficientnet_lite1", "EfficientNet-Lite1", "cnn", 1280, 4.1),
    "efficientnet_lite2": BackboneSpec("tf_efficientnet_lite2", "EfficientNet-Lite2", "cnn", 1280, 4.8),
    "swin_b": BackboneSpec("swin_base_patch4_window7_224", "Swin-B", "transformer", 1024, 86.7, taps=(0, 1, 2)),
    "vit_b_16": BackboneSpec("vit_base_patch16_224", "ViT-B/16", "transformer", 768, 85.8, stride=16, class_token=True, taps=(2, 5, 8)),
    "convit_b": BackboneSpec("convit_base", "ConViT-B", "transformer", 768, 85.8, stride=16, class_token=True, taps=(2, 5, 8)),
    "beit_b_16": BackboneSpec("beit_base_patch16_224", "BEiT-B/16", "transformer", 768, 85.8, stride=16, taps=(2, 5, 8)),
}
# timm gives (B, 1 + h w, D) tokens for these, the class token first.
TOKENS = ("vit_b_16", "convit_b", "beit_b_16")


class EncoderOutput(NamedTuple):
    """What an encoder gives.

    Attributes:
        map: (B,D,h,w), h = H / stride; of CNNs and Swin the vector is its mean, so a gradient of any output with
            respect to the map is Grad-CAM's. None if it was not kept (frozen encoders).
        vector: (B,D).
        taps: maps from inside the network, (B,C_k,h_k,w_k) each, if the encoder was made with taps.
    """

    map: Tensor | None
    vector: Tensor
    taps: tuple[Tensor, ...] = ()


class Encoded(NamedTuple):
    """Images that the encoders have read: what each of them gave, in the order of the model's encoders."""

    outputs: tuple[EncoderOutput, ...]

    @property
    def first(self) -> EncoderOutput:
        """What the first encoder gave; most methods have no other."""
        return self.outputs[0]

    def each(self, change: Callable[[Tensor], Tensor]) -> Encoded:
        """Return the same with every map, vector and tap changed; (B, ...) each."""
        return Encoded(
            tuple(
                EncoderOutput(None if output.map is None else change(output.map), change(output.vector), tuple(map(change, output.taps)))
                for output in self.outputs
            )
        )

    def rows(self, index: Tensor) -> Encoded:
        """Return what was read of some of the images.

        Args:
            index: (K,) whole numbers or (B,) truth values.
        """
        return self.each(lambda values: values[index])


class Encoder(nn.Module):
    """A timm network without classifier.

    Every parameter has a part in `vector`, so that data-parallel training finds none without a gradient.

    Attributes:
        name: paper name, a key of `BACKBONES`.
        features: D.
        stride: side of the image / side of the map.
        tap_features: channels C_k of the taps; empty without taps.
        position: place among the encoders of its model; which of `Encoded.outputs` is its own.
        mean: of each channel, for normalising an image in 0..1.
        std: of each channel.
        weights: what was loaded.
        options: what `create_encoder` needs besides name and size to build this network again.
        body: the timm network.
        last_map: the map passes through it unchanged, so that a hook there sees the map and its gradient. Not of encoders
            whose vector is a class token: it is made beside the map, not from it.
    """

    def __init__(self, name: str, body: nn.Module, weights: WeightsSource, taps: bool = False, position: int = 0) -> None:
        super().__init__()
        spec = BACKBONES[name]
        self.name = name
        self.features = spec.features
        self.stride = spec.stride
        self.weights = weights
        self.options = dict(weights.options)
        self.mean = weights.mean
        self.std = weights.std
        self.position = position
        self.body: Any = body
        self.last_map = nn.Identity()
        self._taps = list(spec.taps) if taps else []
        stages: Any = body.feature_info if taps else ()
        self.tap_features: tuple[int, ...] = tuple(stages[index]["num_chs"] for index in self._taps)
        self._frozen = False

    def freeze(self) -> None:
        """Take the encoder out of the training: no gradient, and no new statistics in its normalisation layers."""
        self._frozen = True
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Encoder:
        """Switch between training and evaluation; a frozen encoder stays in evaluation."""
        return super().train(mode and not self._frozen)

    def forward(self, image: Tensor | Encoded) -> EncoderOutput:
        """Encode images.

        Args:
            image: (B,3,H,W), normalised with `mean` and `std`; H and W multiples of `stride`, and for transformers the
                size that the encoder was made for. What was encoded before passes through.
        """
        if isinstance(image, Encoded):
            return image.outputs[self.position]
        taps: list[Tensor] = []
        if self._taps:
            features, taps = self.body.forward_intermediates(image, indices=self._taps)
        else:
            features = self.body.forward_features(image)
        if self.name == "swin_b":
            features = features.permute(0, 3, 1, 2)
        if self.name not in TOKENS:
            features = self.last_map(features)
            return EncoderOutput(features, features.mean(dim=(2, 3)), tuple(taps))
        height, width = image.shape[-2] // self.stride, image.shape[-1] // self.stride
        places = features[:, 1:].transpose(1, 2).reshape(-1, self.features, height, width)
        if BACKBONES[self.name].class_token:
            return EncoderOutput(places, features[:, 0], tuple(taps))
        places = self.last_map(places)
        # BEiT normalises the mean of its places, where others normalise the places.
        return EncoderOutput(places, self.body.fc_norm(places.mean(dim=(2, 3))), tuple(taps))


def backbone_spec(name: str) -> BackboneSpec:
    """Return the architecture of that paper name.

    Raises:
        RecipeError: there is none.
    """
    if name not in BACKBONES:
        raise RecipeError(f"no backbone is called {name!r}{suggestion(name, BACKBONES)} (there are: {', '.join(BACKBONES)})")
    return BACKBONES[name]


def create_encoder(
    name: str,
    weights: str = "auto",
    image_size: int = 224,
    options: Mapping[str, str] | None = None,
    taps: bool = False,
    position: int = 0,
) -> Encoder:
    """Build an encoder and load its weights.

    Args:
        name: paper name.
        weights: auto, hub, none or a file; see `dualrefnet.models.weights.resolve_weights`.
        image_size: side of the images, pixels; a multiple of the encoder's stride.
        options: only to build a trained encoder again, with weights `none` and its parameters from the run's own file:
            its `options`. `mean` and `std` are then not those of the trained encoder, which stand in the run's record.
        taps: give maps from inside the network too.
        position: place among the encoders of its model.

    Raises:
        RecipeError: the name is unknown, or the size isn't legal for it.
        WeightsError: the weights are not to be had.
        ValueError: `options` with other weights than `none`.
    """
    _check_size(name, image_size)
    if options is not None and weights != "none":
        raise ValueError("options are those of a trained encoder: they go with weights none")
    resolved = resolve_weights(name, weights)
    if options is not None:
        resolved = replace(resolved, source=replace(resolved.source, options=dict(options)))
    body = _create_body(name, image_size, resolved.source.options)
    return Encoder(name, body, load_weights(body, name, resolved), taps, position)


def _check_size(name: str, image_size: int) -> None:
    stride = backbone_spec(name).stride
    if image_size < stride or image_size % stride:
        nearest = max(stride, round(image_size / stride) * stride)
        raise RecipeError(f"{name} takes square images whose side is a multiple of {stride}, not {image_size}; the nearest is {nearest}")


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
