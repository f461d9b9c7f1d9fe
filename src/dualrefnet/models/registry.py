"""Every method by its name: what it is called, who published it, what it reads, and how its model is built.

Nothing here needs torch until a model is built, so that a recipe is checked and listed at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualrefnet.errors import RecipeError, RunError, WeightsError
from dualrefnet.models.backbones import check_image_size
from dualrefnet.recipe import Recipe, suggestion

if TYPE_CHECKING:
    from dualrefnet.models.base import Architecture, Method
    from dualrefnet.run import Run

NEUTRAL = (0.5, 0.5, 0.5)


@dataclass
class MethodInfo:
    """A method: title, reference, module and class; `reconstruction`: what was filled in here, None if it is known."""

    title: str
    reference: str
    home: str
    reconstruction: str | None = None
    reads_image: bool = True
    reads_metadata: bool = True
    needs_metadata: bool = True

    @property
    def network(self) -> type[Method]:
        """The class of the network; imports torch."""
        module, name = self.home.split(".")
        return getattr(import_module(f"dualrefnet.models.{module}"), name)  # type: ignore[no-any-return]


METHODS = {
    "dualrefnet": MethodInfo(
        "DualRefNet", "Khurshid, Singh, Vatsa, Scientific Reports 2025", "dualrefnet.DualRefNet", needs_metadata=False
    ),
    "auxnet": MethodInfo(
        "AuxNet",
        "AuxNet, ISBI 2024, arXiv 2402.10454",
        "dualrefnet.AuxNet",
        "metadata network, decoder and optimizer aren't published where we could read them; DualRefNet's are used",
        needs_metadata=False,
    ),
    "no_metadata": MethodInfo(
        "No metadata",
        "baseline of Pacheco and Krohling, MetaBlock, IEEE JBHI 2021",
        "single_modality.NoMetadata",
        reads_metadata=False,
        needs_metadata=False,
    ),
    "metadata_only": MethodInfo(
        "Metadata only", "baseline of this project", "single_modality.MetadataOnly", reads_image=False
    ),
    "concat": MethodInfo(
        "Concat",
        "Pacheco and Krohling, Computers in Biology and Medicine 2020, arXiv 1909.12912",
        "concat.Concat",
        "the rule for the number of image features is inferred from one pair in public code (324 beside 81)",
    ),
    "metanet": MethodInfo("MetaNet", "Li et al., IEEE ISBI 2020", "metanet.MetaNet"),
    "metablock": MethodInfo("MetaBlock", "Pacheco and Krohling, IEEE JBHI 2021", "metablock.MetaBlockNet"),
    "hmfb": MethodInfo(
        "HMFB",
        "hyperparametric metadata fusion block, reference 28 of the paper",
        "hmfb.HyperparametricMetadataFusion",
        "the last map is pooled; the released code convolves the whole map into a vector, but for EfficientNet",
    ),
    "visual": MethodInfo(
        "Visual",
        "visual and metadata guided skin lesion classification, reference 34 of the paper",
        "visual.Visual",
        "taps at the ends of stages, where the released code has places of its own for MobileNet and EfficientNet; "
        "no border of zeros around the maps; normalisation and dropout of its ResNet-50 for all encoders",
    ),
    "deepmetaforge": MethodInfo(
        "DeepMetaForge",
        "DeepMetaForge, IEEE Access 2023",
        "deepmetaforge.DeepMetaForge",
        "layer sizes aren't published where we could read them: BEiT, 1-D CNN and the idea of the fusion module are",
    ),
    "jif_mmfa": MethodInfo(
        "JIF-MMFA",
        "joint-individual fusion with multi-modal fusion attention, Pattern Recognition 2024, arXiv 2312.04189",
        "jif_mmfa.JointIndividualFusion",
        "sizes and optimizer aren't published where we could read them; branches are those of the group's earlier code",
    ),
    "ensemble": MethodInfo(
        "Ensemble",
        "Pham et al., IUKM 2025",
        "ensemble.Ensemble",
        "layer sizes aren't published where we could read them; the published .844 is of another test set (460 images)",
    ),
}


def check_method(recipe: Recipe) -> MethodInfo:
    """Return the method of a recipe; RecipeError: method, encoder, image size and metadata don't fit each other."""
    name = recipe.model.method
    if name not in METHODS:
        raise RecipeError(
            f"model.method: there is no method {name!r}{suggestion(name, METHODS)} (there are: {', '.join(METHODS)})"
        )
    if METHODS[name].needs_metadata and recipe.metadata.tier == "M0":
        raise RecipeError(f"model.method {name} needs metadata: set metadata.tier to M1, M2 or M3, or take no_metadata")
    for backbone in recipe.model.backbones if METHODS[name].reads_image else ():
        check_image_size(backbone, recipe.image.size)
    return METHODS[name]


def trained_on(weights: Iterable[Mapping[str, Any]]) -> list[Mapping[str, str]]:
    """Return the records of the runs from which encoders started, each once, from those of their weights."""
    return list({one["model_sha256"]: one for record in weights for one in record.get("trained_on", ())}.values())


def new_model(recipe: Recipe, metadata_width: int, classes: int) -> tuple[Method, Architecture, list[dict[str, Any]]]:
    """Build the model of a recipe for M columns of metadata; return it, its description, and its weights' records."""
    from dualrefnet.models.base import Architecture
    from dualrefnet.models.encoders import WeightsSource, create_encoder
    from dualrefnet.models.transfer import SourceRun

    info, section = check_method(recipe), recipe.model
    method = info.network
    if not recipe.rebuilds_image:
        section = section.model_copy(update={"decoder": "none"})
    reads_metadata = info.reads_metadata and metadata_width > 0
    architecture = Architecture(
        image_size=recipe.image.size,
        metadata_width=metadata_width,
        classes=classes,
        section=section,
        missing_tokens=recipe.metadata.imputation == "token" and reads_metadata,
        missing_image=info.reads_image and reads_metadata and recipe.modality_dropout.image > 0,
    )
    backbones = architecture.backbones if info.reads_image else ()
    start = None if section.init_from is None else SourceRun.open(recipe)
    weights: Sequence[str | WeightsSource] = [section.weights] * len(backbones) if start is None else start.sources
    encoders = [
        create_encoder(name, weight, recipe.image.size, method.reads_taps, position)
        for position, (name, weight) in enumerate(zip(backbones, weights, strict=True))
    ]
    model = method(architecture, encoders)
    if start is not None:
        start.fill(model, section.init_parts)
    for encoder in encoders:
        if recipe.training.encoder == "frozen":
            encoder.freeze()
        elif recipe.training.freeze_stages:
            encoder.freeze_stages(recipe.training.freeze_stages)
    sources = [encoder.weights for encoder in encoders] or [
        WeightsSource("none", "no image encoder", None, NEUTRAL, NEUTRAL)
    ]
    return model, architecture, [asdict(source) for source in sources]


def load_run_model(run: Run) -> Method:
    """Build the trained model of a run: the best epoch, or of a cross-fitted run all its members in one."""
    from dualrefnet.models.cross_fitted import CrossFitted

    description = run.model
    if "members" not in description:
        return load_model(description, run.weights_file)
    return CrossFitted([load_model(description, member.weights_file) for member in run.members])


def load_model(description: Mapping[str, Any], weights_file: Path) -> Method:
    """Build a trained model from the run's `model.json` and its `model.safetensors`."""
    from dualrefnet.models.base import Architecture
    from dualrefnet.models.encoders import WeightsSource, create_encoder, fill_network, read_tensors
    from dualrefnet.run import Run

    if not weights_file.is_file():
        raise RunError(
            f"there is no {weights_file}: the run's first epoch isn't over (`dualrefnet train ... --resume`)"
        )
    Run(weights_file.parent).check_weights()
    try:
        architecture = Architecture.model_validate(description["architecture"])
        section = architecture.section
        if section.method not in METHODS:
            raise RunError(f"{weights_file.parent} holds a model of method {section.method!r}, unknown to this version")
        method = METHODS[section.method].network
        sources = [WeightsSource.from_json(record) for record in description["weights"]]
        encoders = [
            create_encoder(name, source, architecture.image_size, method.reads_taps, position)
            for position, (name, source) in enumerate(zip(architecture.backbones, sources, strict=True))
            if method.reads_image
        ]
        model = method(architecture, encoders)
        fill_network(model, read_tensors(weights_file), f"{weights_file} doesn't fit its model.json")
    except WeightsError as error:
        raise RunError(str(error)) from error
    except (LookupError, TypeError, ValueError) as error:
        raise RunError(f"{weights_file} doesn't fit its model.json: {str(error).splitlines()[0]}") from error
    return model
