"""An exported model on disk: `bundle.json`, the ONNX file, and the check of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from .classifier import Classifier
from .form import FormEncoder
from .onnx_network import OnnxNetwork
from .out_of_scope import OutOfScopeScore
from .preprocessing import ImageSettings
from .probabilities import Decision

DESCRIPTION = "bundle.json"
FORMAT = 1


def read_description(folder: Path) -> dict[str, Any]:
    """Read a bundle's description.

    Raises:
        ValueError: it isn't one, or of another version.
        OSError: it can't be read.
    """
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{folder / DESCRIPTION} isn't a description of format {FORMAT}")
    return description


def bundle_parts(folder: Path, description: dict[str, Any], variant: str = "float32", device: str = "cpu") -> dict[str, Any]:
    """Return the arguments of `Classifier` that a bundle stands for.

    Args:
        folder: of the bundle.
        description: from `read_description`.
        variant: float32 or int8.
        device: cpu or cuda.

    Raises:
        ValueError: the variant isn't in the bundle, the device can't be used, or the description is damaged.
        OSError: a file is missing or damaged.
    """
    networks = description["networks"]
    if variant not in networks:
        raise ValueError(f"the bundle has no variant {variant!r}; it has: {', '.join(networks)}")
    calibration, check = description["calibration"], folder / "out_of_scope.safetensors"
    return {
        "network": OnnxNetwork(folder / Path(networks[variant]["file"]).name, device),
        "classes": description["classes"],
        "malignant": description["malignant"],
        "form": FormEncoder.from_json(description["metadata"]),
        "image": cast(ImageSettings, SimpleNamespace(**description["image"])),
        "reads_image": description["reads_image"],
        "reads_metadata": description["reads_metadata"],
        "learned_tokens": description["learned_tokens"],
        "out_of_scope": OutOfScopeScore.load(check) if check.is_file() else None,
        "decision": Decision(**Decision.read(calibration)) if calibration else None,
    }


def load_bundle(folder: Path, variant: str = "float32", device: str = "cpu") -> Classifier:
    """Load a bundle; see `bundle_parts`."""
    return Classifier(**bundle_parts(folder, read_description(folder), variant, device))
