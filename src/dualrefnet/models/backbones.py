"""The image encoders: the paper's names for timm's networks, all behind one contract.

An encoder gives a map, from which the decoder rebuilds the image, and a vector, which meets the metadata.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import timm
from torch import Tensor, nn

from dualrefnet.errors import RecipeError
from dualrefnet.models.weights import WeightsSource, load_weights, resolve_weights


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
    """

    timm_name: str
    title: str
    kind: Literal["cnn", "transformer"]
    features: int
    parameters: float
    stride: int = 32
    class_token: bool = False


BACKBONES: dict[str, BackboneSpec] = {
    "vgg13": BackboneSpec("vgg13_bn", "VGG-13", "cnn", 512, 9.4),
    "resnet50": BackboneSpec("resnet50", "ResNet-50", "cnn", 2048, 23.5),
    "mobilenet_v2": BackboneSpec("mobilenetv2_100", "MobileNet-V2", "cnn", 1280, 2.2),
    "efficientnet_b4": BackboneSpec("efficientnet_b4", "EfficientNet-B4", "cnn", 1792, 17.5),
    "densenet121": BackboneSpec("densenet121", "DenseNet-121", "cnn", 1024, 7.0),
    "efficientnet_lite0": BackboneSpec("tf_efficientnet_lite0", "EfficientNet-Lite0", "cnn", 1280, 3.4),
    "efficientnet_lite1": BackboneSpec("tf_efficientnet_lite1", "EfficientNet-Lite1", "cnn", 1280, 4.1),
    "efficientnet_lite2": BackboneSpec("tf_efficientnet_lite2", "EfficientNet-Lite2", "cnn", 1280, 4.8),
    "swin_b": BackboneSpec("swin_base_patch4_window7_224", "Swin-B", "transformer", 1024, 86.7),
    "vit_b_16": BackboneSpec("vit_base_patch16_224", "ViT-B/16", "transformer", 768, 85.8, stride=16, class_token=True),
    "convit_b": BackboneSpec("convit_base", "ConViT-B", "transformer", 768, 85.8, stride=16, class_token=True),
}


class EncoderOutput(NamedTuple):
    """What an encoder gives.

    Attributes:
        map: (B,D,h,w), h = H / stride; of CNNs and Swin the vector is its mean, so a gradient of any output with
            respect to the map is Grad-CAM's.
        vector: (B,D).
    """

    map: Tensor
    vector: Tensor


class Encoder(nn.Module):
    """A timm network without classifier.

    Every parameter has a part in `vector`, so that data-parallel training finds none without a gradient.

    Attributes:
        name: paper name, a key of `BACKBONES`.
        features: D.
        stride: side of the image / side of the map.
        mean: of each channel, for normalising an image in 0..1.
        std: of each channel.
        weights: what was loaded.
        options: what `create_encoder` needs besides name and size to build this network again.
        body: the timm network.
    """

    def __init__(self, name: str, body: nn.Module, weights: WeightsSource) -> None:
        super().__init__()
        spec = BACKBONES[name]
        self.name = name
        self.features = spec.features
        self.stride = spec.stride
        self.weights = weights
        self.options = dict(weights.options)
        self.mean = weights.mean
        self.std = weights.std
        self.body: Any = body
        self._class_token = spec.class_token
        self._channels_last = name == "swin_b"

    def forward(self, image: Tensor) -> EncoderOutput:
        """Encode images.

        Args:
            image: (B,3,H,W), normalised with `mean` and `std`; H and W multiples of `stride`, and for transformers the
                size that the encoder was made for.
        """
        features: Tensor = self.body.forward_features(image)
        if self._class_token:
            height, width = image.shape[-2] // self.stride, image.shape[-1] // self.stride
            tokens = features[:, 1:].transpose(1, 2).reshape(-1, self.features, height, width)
            return EncoderOutput(tokens, features[:, 0])
        if self._channels_last:
            features = features.permute(0, 3, 1, 2)
        return EncoderOutput(features, features.mean(dim=(2, 3)))


def backbone_spec(name: str) -> BackboneSpec:
    """Return the architecture of that paper name.

    Raises:
        RecipeError: there is none.
    """
    if name not in BACKBONES:
        close = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"no backbone is called {name!r}{hint} (there are: {', '.join(BACKBONES)})")
    return BACKBONES[name]


def create_encoder(name: str, weights: str = "auto", image_size: int = 224, options: Mapping[str, str] | None = None) -> Encoder:
    """Build an encoder and load its weights.

    Args:
        name: paper name.
        weights: auto, hub, none or a file; see `dualrefnet.models.weights.resolve_weights`.
        image_size: side of the images, pixels; a multiple of the encoder's stride.
        options: only to build a trained encoder again, with weights `none` and its parameters from the run's own file:
            its `options`. `mean` and `std` are then not those of the trained encoder, which stand in the run's record.

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
    return Encoder(name, body, load_weights(body, name, resolved))


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
