"""From names to models: every method by its paper name, built from a description that is plain JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dualrefnet.errors import RecipeError, RunError
from dualrefnet.models.backbones import Encoder, create_encoder
from dualrefnet.models.decoders import create_decoder
from dualrefnet.models.dualrefnet import DualRefNet
from dualrefnet.models.metadata_only import MetadataOnly
from dualrefnet.models.no_metadata import NoMetadata
from dualrefnet.models.weights import WeightsSource
from dualrefnet.recipe import Recipe


class Architecture(BaseModel):
    """All that is needed to build a model again, weights apart; stands in `model.json`.

    Attributes:
        method: name in `METHODS`.
        backbone: name of the image encoder.
        image_size: side of the input, pixels.
        metadata_width: M, length of an encoded form.
        classes: C.
        metadata_widths: layers of the metadata network.
        hidden: width of the layer before the classifier.
        dropout: probability.
        decoder: `bottleneck`, `plain` or `none`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    backbone: str
    image_size: int
    metadata_width: int
    classes: int
    metadata_widths: tuple[int, ...]
    hidden: int
    dropout: float
    decoder: str


def _dualrefnet(architecture: Architecture, encoder: Encoder | None) -> nn.Module:
    assert encoder is not None
    decoder = None if architecture.decoder == "none" else create_decoder(architecture.decoder, encoder.features, encoder.stride)
    return DualRefNet(
        encoder,
        architecture.metadata_width,
        architecture.classes,
        architecture.metadata_widths,
        architecture.hidden,
        architecture.dropout,
        decoder,
    )


def _no_metadata(architecture: Architecture, encoder: Encoder | None) -> nn.Module:
    assert encoder is not None
    return NoMetadata(encoder, architecture.classes, architecture.dropout)


def _metadata_only(architecture: Architecture, encoder: Encoder | None) -> nn.Module:
    return MetadataOnly(
        architecture.metadata_width, architecture.classes, architecture.metadata_widths, architecture.hidden, architecture.dropout
    )


METHODS: dict[str, Callable[[Architecture, Encoder | None], nn.Module]] = {
    "dualrefnet": _dualrefnet,
    "no_metadata": _no_metadata,
    "metadata_only": _metadata_only,
}
WITHOUT_IMAGE = frozenset({"metadata_only"})


def check_method(method: str) -> None:
    """Refuse an unknown method.

    Raises:
        RecipeError: naming the methods there are.
    """
    if method not in METHODS:
        raise RecipeError(f"model.method: there is no method {method!r}; there are: {', '.join(METHODS)}")


def new_model(recipe: Recipe, metadata_width: int, classes: int) -> tuple[nn.Module, Architecture, dict[str, Any]]:
    """Build the model of a recipe with the weights it starts from.

    Args:
        recipe: a checked recipe.
        metadata_width: M.
        classes: C.

    Returns:
        The model, its description, and the record of the encoder's weights (with `mean` and `std`).

    Raises:
        RecipeError: unknown method or backbone.
        WeightsError: the weights aren't to be had.
    """
    check_method(recipe.model.method)
    encoder = None
    if recipe.model.method not in WITHOUT_IMAGE:
        encoder = create_encoder(recipe.model.backbone, recipe.model.weights, recipe.image.size)
    neutral = (0.5, 0.5, 0.5)
    source = encoder.weights if encoder else WeightsSource("none", "no image encoder", None, neutral, neutral)
    architecture = Architecture(
        method=recipe.model.method,
        backbone=recipe.model.backbone,
        image_size=recipe.image.size,
        metadata_width=metadata_width,
        classes=classes,
        metadata_widths=recipe.model.metadata_widths,
        hidden=recipe.model.hidden,
        dropout=recipe.model.dropout,
        decoder=recipe.model.decoder,
    )
    return METHODS[architecture.method](architecture, encoder), architecture, source.as_dict()


def load_model(description: Mapping[str, Any], weights_file: Path) -> nn.Module:
    """Build a trained model.

    Args:
        description: the run's `model.json`.
        weights_file: its `model.safetensors`.

    Raises:
        RunError: the parameters aren't there, or don't fit.
    """
    if not weights_file.is_file():
        raise RunError(f"there is no {weights_file}: the run's first epoch isn't over (`dualrefnet train ... --resume`)")
    architecture = Architecture.model_validate(description["architecture"])
    check_method(architecture.method)
    encoder = None
    if architecture.method not in WITHOUT_IMAGE:
        encoder = create_encoder(architecture.backbone, "none", architecture.image_size, description["weights"]["options"])
    model = METHODS[architecture.method](architecture, encoder)
    try:
        model.load_state_dict(load_file(str(weights_file)))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise RunError(f"{weights_file} doesn't fit its model.json: {str(error).splitlines()[0]}") from error
    return model
