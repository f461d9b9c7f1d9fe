"""Grad-CAM: which places of a photograph speak for a class (Selvaraju et al. 2017, with captum's `LayerGradCam`).

With A_k the K maps of an encoder's last layer and z the class's score, heat = ReLU(sum_k a_k A_k), where a_k is the mean
of dz / dA_k over the places. The score is that of `Output.logits`: before the softmax, or, of methods that fuse decisions,
the logarithm of the fused probability. The form is given along with the image, so the heat is that of this patient.

The layer is `Encoder.last_map`, the last one with places. Where the image vector is a class token (ViT, ConViT), which the
last block makes beside that map, the layer is the first normalisation of the last block without the class token: all that
the class token still learns of the places goes through it.

Heat tells where the evidence is that goes through that layer, not all of what a method knows: not the form, not what is read
from maps further in (Visual's attention), nor, beside a class token, the last map where a method reads that too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dualrefnet.errors import DependencyError, RunError
from dualrefnet.models.backbones import BACKBONES, Encoder
from dualrefnet.models.method import Method

try:
    from captum.attr import LayerGradCam
except ImportError:
    raise DependencyError("Grad-CAM needs captum: pip install 'dualrefnet[explain]'") from None


@dataclass(frozen=True)
class Heat:
    """Grad-CAM of a batch.

    Attributes:
        heat: (B, S, S) float32, not negative, as large as the images. Of one encoder it is in units of the class's score;
            of several it is the mean over the encoders of heat / its maximum, in 0..1.
        maps: of each encoder (B, h, w) float32, not negative: the heat before it was enlarged. An encoder whose map is zero
            everywhere found nothing that speaks for the class.
    """

    heat: Tensor
    maps: tuple[Tensor, ...]

    @property
    def empty(self) -> Tensor:
        """(B,) True where the heat is zero everywhere: nothing in the image speaks for the class."""
        return self.heat.amax(dim=(1, 2)) == 0


def gradcam(model: Method, images: Tensor, metadata: Tensor, targets: Tensor) -> Heat:
    """Return where images speak for a class.

    The model computes as in evaluation and is left as it was: modes, hooks, `requires_grad`, and no gradient on a parameter.

    Args:
        model: of any method that reads images.
        images: (B, 3, S, S), normalised for the first encoder.
        metadata: (B, M) encoded forms.
        targets: (B,) the class that each image is asked about.

    Raises:
        RunError: the method reads no image.
    """
    if not model.reads_image:
        raise RunError(f"{model.title} reads no image, so there is no Grad-CAM of it")
    # Detached: where an encoder does nothing at all, its map is the image itself, and captum would mark the caller's tensor.
    images = images.detach()
    maps = []
    with _undisturbed(model):
        for encoder in model.encoders:
            assert isinstance(encoder, Encoder)
            with _watched(encoder, images.shape[-1]) as layer:
                grad_cam = LayerGradCam(lambda image, form: model(image, form).logits, layer)
                found = grad_cam.attribute(images, targets, additional_forward_args=(metadata,), relu_attributions=True)
            maps.append(found.detach().float()[:, 0])
    enlarged = [_enlarge(places, images.shape[-1]) for places in maps]
    heat = enlarged[0] if len(enlarged) == 1 else torch.stack([_share_of_maximum(places) for places in enlarged]).mean(dim=0)
    return Heat(heat, tuple(maps))


@contextmanager
def _undisturbed(model: Method) -> Iterator[None]:
    """Put a model into evaluation with no parameter that asks for a gradient, and bring all back afterwards.

    captum asks for the gradient of the layer alone; without those of the parameters nothing before it has to be kept.
    """
    modes = [(module, module.training) for module in model.modules()]
    wishes = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wishes:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wished in wishes:
            parameter.requires_grad_(wished)


@contextmanager
def _watched(encoder: Encoder, side: int) -> Iterator[nn.Module]:
    """Give the layer through which the places of images of that side pass as a map (B, D, h, w)."""
    if not BACKBONES[encoder.name].class_token:
        yield encoder.last_map
        return
    layer, places = nn.Identity(), side // encoder.stride

    def lay_out(module: nn.Module, inputs: object, tokens: Tensor) -> Tensor:
        grid = tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, places, places)
        return torch.cat([tokens[:, :1], layer(grid).flatten(2).transpose(1, 2)], dim=1)

    hook = encoder.body.blocks[-1].norm1.register_forward_hook(lay_out)
    try:
        yield layer
    finally:
        hook.remove()


def _enlarge(places: Tensor, side: int) -> Tensor:
    """Enlarge (B, h, w) bilinearly to (B, side, side)."""
    return functional.interpolate(places[:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def _share_of_maximum(heat: Tensor) -> Tensor:
    """Divide each of (B, S, S) by its maximum; zeros stay zero."""
    largest = heat.amax(dim=(1, 2), keepdim=True)
    return torch.where(largest > 0, heat / largest.where(largest > 0, torch.ones_like(largest)), 0.0)
