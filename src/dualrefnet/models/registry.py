"""From names to models: every method by its paper name, built from a description that is plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dualrefnet.errors import RecipeError, RunError
from dualrefnet.models.base import Architecture, Method
from dualrefnet.models.concat import Concat
from dualrefnet.models.deepmetaforge import DeepMetaForge
from dualrefnet.models.dualrefnet import AuxNet, DualRefNet
from dualrefnet.models.encoders import WeightsSource, create_encoder
from dualrefnet.models.ensemble import Ensemble
from dualrefnet.models.hmfb import HyperparametricMetadataFusion
from dualrefnet.models.jif_mmfa import JointIndividualFusion
from dualrefnet.models.metablock import MetaBlockNet
from dualrefnet.models.metanet import MetaNet
from dualrefnet.models.single_modality import MetadataOnly, NoMetadata
from dualrefnet.models.visual import Visual
from dualrefnet.recipe import Recipe, suggestion

METHODS: dict[str, type[Method]] = {
    "dualrefnet": DualRefNet,
    "auxnet": AuxNet,
    "no_metadata": NoMetadata,
    "metadata_only": MetadataOnly,
    "concat": Concat,
    "metanet": MetaNet,
    "metablock": MetaBlockNet,
    "hmfb": HyperparametricMetadataFusion,
    "visual": Visual,
    "deepmetaforge": DeepMetaForge,
    "jif_mmfa": JointIndividualFusion,
    "ensemble": Ensemble,
}
NEUTRAL = (0.5, 0.5, 0.5)


def check_method(recipe: Recipe) -> type[Method]:
    """Return the method of a recipe.

    Raises:
        RecipeError: there is none of that name (the message names those there are), or it can't work without a form.
    """
    name = recipe.model.method
    if name not in METHODS:
        raise RecipeError(
            f"model.method: there is no method {name!r}{suggestion(name, METHODS)} (there are: {', '.join(METHODS)})"
        )
    if METHODS[name].needs_metadata and recipe.metadata.tier == "M0":
        raise RecipeError(f"model.method {name} needs metadata: set metadata.tier to M1, M2 or M3, or take no_metadata")
    return METHODS[name]


def new_model(recipe: Recipe, metadata_width: int, classes: int) -> tuple[Method, Architecture, list[dict[str, Any]]]:
    """Build the model of a recipe with the weights it starts from.

    Args:
        recipe: a checked recipe.
        metadata_width: M.
        classes: C.

    Returns:
        The model, its description, and the record of each encoder's weights (with `mean` and `std`); a method that
        reads
        no image has one record that says so.

    Raises:
        RecipeError: unknown method or backbone.
        WeightsError: the weights aren't to be had.
    """
    method, section = check_method(recipe), recipe.model
    if not recipe.rebuilds_image:
        section = section.model_copy(update={"decoder": "none"})
    reads_both = method.reads_image and method.reads_metadata and metadata_width > 0
    architecture = Architecture(
        image_size=recipe.image.size,
        metadata_width=metadata_width,
        classes=classes,
        section=section,
        missing_tokens=recipe.metadata.imputation == "token" and method.reads_metadata and metadata_width > 0,
        missing_image=reads_both and recipe.modality_dropout.image > 0,
    )
    encoders = []
    for position, name in enumerate(architecture.backbones if method.reads_image else ()):
        encoders.append(create_encoder(name, section.weights, recipe.image.size, None, method.taps(section), position))
    model = method(architecture, encoders)
    if recipe.training.encoder == "frozen":
        for encoder in encoders:
            encoder.freeze()
    sources = [encoder.weights for encoder in encoders] or [
        WeightsSource("none", "no image encoder", None, NEUTRAL, NEUTRAL)
    ]
    return model, architecture, [source.as_dict() for source in sources]


def load_model(description: Mapping[str, Any], weights_file: Path) -> Method:
    """Build a trained model.

    Args:
        description: the run's `model.json`.
        weights_file: its `model.safetensors`.

    Raises:
        RunError: the parameters aren't there, or don't fit.
    """
    if not weights_file.is_file():
        raise RunError(
            f"there is no {weights_file}: the run's first epoch isn't over (`dualrefnet train ... --resume`)"
        )
    architecture = Architecture.model_validate(description["architecture"])
    section = architecture.section
    if section.method not in METHODS:
        raise RunError(
            f"{weights_file.parent} holds a model of method {section.method!r}, which this version doesn't know"
        )
    method = METHODS[section.method]
    encoders = []
    for position, name in enumerate(architecture.backbones if method.reads_image else ()):
        source = description["weights"][position]
        encoder = create_encoder(
            name, "none", architecture.image_size, source["options"], method.taps(section), position
        )
        # Built without its weights file, the encoder doesn't know what images it expects; the record does.
        encoder.mean, encoder.std = tuple(source["mean"]), tuple(source["std"])
        encoders.append(encoder)
    model = method(architecture, encoders)
    try:
        model.load_state_dict(load_file(str(weights_file)))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise RunError(f"{weights_file} doesn't fit its model.json: {str(error).splitlines()[0]}") from error
    return model


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
