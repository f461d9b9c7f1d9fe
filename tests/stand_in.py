"""Methods on encoders that read nothing: their outputs are given, so that what a method makes of them can be worked
out by hand.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dualrefnet.models.base import Architecture, Method
from dualrefnet.models.encoders import Encoded, Encoder, EncoderOutput, WeightsSource
from dualrefnet.models.registry import METHODS, NEUTRAL
from dualrefnet.recipe import ModelSection


def build(name: str, features: int, metadata_width: int, taps: Sequence[int] = (), **settings: object) -> Method:
    """Return a method for two classes in evaluation mode, on an encoder of that many features and those channels of
    taps.
    """
    section = ModelSection.model_validate({"method": name, **settings})
    encoder = Encoder("mobilenet_v2", nn.Identity(), WeightsSource("none", "stand-in", None, NEUTRAL, NEUTRAL))
    encoder.features, encoder.tap_features = features, tuple(taps)
    architecture = Architecture(image_size=32, metadata_width=metadata_width, classes=2, section=section)
    return METHODS[name].network(architecture, [encoder]).eval()


def given(vector: list[float], taps: Sequence[Tensor] = ()) -> Encoded:
    """Return what an encoder made of one image."""
    return Encoded((EncoderOutput(None, torch.tensor([vector]), tuple(taps)),))


def set_linear(layer: nn.Module, weight: list[list[float]], bias: Sequence[float] | None = None) -> None:
    """Set a layer's weight, and its bias to numbers or to zero."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.zeros(len(weight)) if bias is None else torch.tensor(bias))


def set_norm(layer: nn.Module, mean: list[float], sd: float = 1.0) -> None:
    """Set a normalisation layer's statistics so that in evaluation it gives exactly (x - mean) / sd."""
    layer.running_mean.copy_(torch.tensor(mean))
    layer.running_var.fill_(sd**2 - layer.eps)
