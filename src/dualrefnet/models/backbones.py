"""The image encoders by name: what a table calls them, and what they give. Nothing here needs torch.

The paper's have names of their own; any other network of timm is `timm:NAME`, and examined when it is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dualrefnet.errors import RecipeError
from dualrefnet.recipe import suggestion

TIMM = "timm:"


@dataclass(frozen=True)
class BackboneSpec:
    """One architecture: names, `kind` (cnn or transformer), D `features`, parameters in millions, `stride`, `taps`.

    `taps` are the ends of the last stages before the map, or of ViT-like networks the blocks at a quarter, half and
    three quarters.
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
    "vit_b_16": BackboneSpec(
        "vit_base_patch16_224", "ViT-B/16", "transformer", 768, 85.8, stride=16, class_token=True, taps=(2, 5, 8)
    ),
    "convit_b": BackboneSpec(
        "convit_base", "ConViT-B", "transformer", 768, 85.8, stride=16, class_token=True, taps=(2, 5, 8)
    ),
    "beit_b_16": BackboneSpec(
        "beit_base_patch16_224", "BEiT-B/16", "transformer", 768, 85.8, stride=16, taps=(2, 5, 8)
    ),
}


def backbone_spec(name: str) -> BackboneSpec:
    """Return the architecture of that paper name; RecipeError: there is none."""
    if name not in BACKBONES:
        raise RecipeError(
            f"no backbone is called {name!r}{suggestion(name, BACKBONES)} (there are: {', '.join(BACKBONES)}; and any "
            "encoder of timm as timm:NAME)"
        )
    return BACKBONES[name]


def backbone_title(name: str) -> str:
    """Return what a table calls an encoder."""
    return BACKBONES[name].title if name in BACKBONES else name.removeprefix(TIMM)


def timm_name(name: str) -> str:
    """Return an encoder's name in timm."""
    return name.removeprefix(TIMM) if name.startswith(TIMM) else backbone_spec(name).timm_name


def check_image_size(name: str, size: int) -> None:
    """Refuse an encoder or a side of the images that can't be; `timm:NAME` is examined when it is built."""
    if name.startswith(TIMM):
        return
    stride = backbone_spec(name).stride
    if size < stride or size % stride:
        nearest = max(stride, round(size / stride) * stride)
        raise RecipeError(
            f"{name} takes square images whose side is a multiple of {stride}, not {size}; the nearest is {nearest}"
        )
