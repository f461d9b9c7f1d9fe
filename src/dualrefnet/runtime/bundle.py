"""An exported model on disk: `bundle.json`, the ONNX file, and the out-of-distribution score."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .calibration import Decision
from .classifier import Classifier, NetworkOutput
from .metadata import MetadataTransform
from .out_of_distribution import OutOfDistributionScore
from .preprocessing import Image, ImageSettings

DESCRIPTION = "bundle.json"
FORMAT = 1
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxNetwork:
    """Computes an exported model; see `Network`."""

    def __init__(self, file: Path, device: str = "cpu", threads: int | None = None) -> None:
        """Load an ONNX file on cpu or cuda, with that many threads for a prediction (None: one a core).

        ValueError: the device isn't one of these, or this onnxruntime can't use it. OSError: it isn't there, or no ONNX
        model.
        """
        provider, available = PROVIDERS.get(device.split(":")[0]), onnxruntime.get_available_providers()
        if provider not in available:
            raise ValueError(
                f"this onnxruntime can't compute on {device!r}; it has: {', '.join(available)} "
                "(for a GPU: pip install onnxruntime-gpu)"
            )
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Threads that wait for each other inside a prediction spin, which is faster than sleeping. After it they would
        # go on spinning, and burn the cores on which the next images are being decoded.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
        except Exception as error:  # onnxruntime's own errors have no common base.
            raise OSError(f"{file} can't be loaded: {str(error).splitlines()[0][:200]}") from None
        self._inputs = [one.name for one in self.session.get_inputs()]
        self._outputs = [one.name for one in self.session.get_outputs()]

    def __call__(
        self, images: Image | None, missing: NDArray[np.bool_] | None, metadata: NDArray[np.float32]
    ) -> NetworkOutput:
        given: dict[str, Any] = {"image": images, "absent": missing, "metadata": metadata}
        computed = self.session.run(None, {name: given[name] for name in self._inputs})
        outputs = dict(zip(self._outputs, computed, strict=True))
        return NetworkOutput(outputs["logits"], outputs.get("vector"))


def read_description(folder: Path) -> dict[str, Any]:
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{folder / DESCRIPTION} isn't a description of format {FORMAT}")
    return description


def bundle_parts(folder: Path, description: dict[str, Any], variant: str, device: str) -> dict[str, Any]:
    """Return the arguments of `Classifier` for a bundle of that description.

    ValueError, KeyError, TypeError: the variant isn't in the bundle, the device can't be used, or the description is
    damaged; OSError: a file is missing or damaged.
    """
    networks = description["networks"]
    if variant not in networks:
        raise ValueError(f"the bundle has no variant {variant!r}; it has: {', '.join(networks)}")
    calibration, score = description["calibration"], folder / "out_of_scope.safetensors"
    return {
        # The name alone: a description can't reach out of its folder.
        "network": OnnxNetwork(folder / Path(networks[variant]["file"]).name, device),
        "classes": description["classes"],
        "malignant": description["malignant"],
        "encoder": MetadataTransform.from_json(description["metadata"]),
        "image": cast(ImageSettings, SimpleNamespace(**description["image"])),
        **{name: description[name] for name in ("reads_image", "reads_metadata", "learned_tokens")},
        "out_of_scope": OutOfDistributionScore.load(score) if score.is_file() else None,
        "decision": Decision(**Decision.parse(calibration)) if calibration else None,
    }


def load_bundle(folder: Path, variant: str = "float32", device: str = "cpu") -> Classifier:
    """Load a bundle; see `bundle_parts`."""
    return Classifier(**bundle_parts(folder, read_description(folder), variant, device))
