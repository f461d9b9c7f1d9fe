"""What a predictor needs of a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dualrefnet.data import isic_2019, pad_ufes_20, sample
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.deploy.torch_network import TorchNetwork
from dualrefnet.errors import RunError
from dualrefnet.evaluation.calibrated import Calibration
from dualrefnet.models.backbones import Encoder
from dualrefnet.models.method import Method
from dualrefnet.models.out_of_scope import OutOfScope
from dualrefnet.models.registry import load_model
from dualrefnet.progress import warn
from dualrefnet.recipe import ImageSection
from dualrefnet.run import Run


def run_parts(run: Path | str | Run, device: str) -> dict[str, Any]:
    """Return the arguments of `Predictor` that a run stands for.

    Raises:
        RunError: the folder holds no trained model, or its check of pictures is damaged or of another model.
    """
    run = run if isinstance(run, Run) else Run(Path(run))
    description = run.model
    model = load_model(description, run.weights_file)
    image = ImageSection.model_validate(description["preprocessing"]["image"])
    mean, sd = (tuple(description["preprocessing"][name]) for name in ("mean", "std"))
    dataset, class_names = described_dataset(description["dataset"])
    told = {name: description[name] for name in ("dualrefnet", "classes", "malignant")}
    told |= {"dataset": dataset, "name": run.recipe.name, "class_names": class_names, "variant": "float32"}
    return {
        "description": told | {"measured": run.metrics if run.finished else None},
        "network": TorchNetwork(model, image.size, (mean, sd), torch.device(device)),
        "classes": description["classes"],
        "malignant": description["malignant"],
        "form": MetadataEncoder.from_json(description["metadata"]),
        "image": image,
        "reads_image": model.reads_image,
        "reads_metadata": model.reads_metadata,
        "learned_tokens": not model.needs_image,
        "out_of_scope": _find_check(run, model),
        "decision": _find_calibration(run),
    }


def described_dataset(known: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what people are told of the data, and the classes in words; runs of the first versions say less, their adapters the rest.

    Args:
        known: what a run's `model.json` says of the data set.
    """
    schema = {one.name: one for one in (pad_ufes_20.SCHEMA, isic_2019.SCHEMA, sample.SCHEMA)}.get(known["name"])
    citation, names = (schema.citation, dict(schema.class_names)) if schema is not None else ("", {})
    told = {name: known[name] for name in ("name", "title", "licence", "drawn", "protocol")}
    return told | {"citation": known.get("citation", citation)}, known.get("class_names", names)


def _find_calibration(run: Run) -> Calibration | None:
    """Return a run's calibration; None, and say so, if an older run has none."""
    if run.calibration_file.is_file():
        return run.calibration
    warn(
        f"{run.path} has no calibration, so its probabilities are the model's own, without sets and referral; `dualrefnet evaluate "
        f"{run.path}` makes it"
    )
    return None


def _find_check(run: Run, model: Method) -> OutOfScope | None:
    """Return a run's check of pictures; None, and say so, if an older run has none."""
    if not model.reads_image:
        return None
    if not run.out_of_scope_file.is_file():
        warn(
            f"{run.path} has no out-of-scope check, so nothing warns of a picture that shows no lesion; `dualrefnet evaluate {run.path}` "
            "makes it"
        )
        return None
    found = run.out_of_scope
    length = sum(encoder.features for encoder in model.encoders if isinstance(encoder, Encoder))
    if found.length != length:
        raise RunError(
            f"{run.out_of_scope_file} is of another model ({found.length} numbers, not {length}); make it again with `dualrefnet evaluate "
            f"{run.path}`"
        )
    return found
