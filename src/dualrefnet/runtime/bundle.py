"""An exported model on disk: `bundle.json`, the ONNX file, the out-of-distribution score, and the sums of all files."""

# ruff: noqa: B905 (zip of Python 3.9 can't be strict)
from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .calibration import Decision
from .classifier import Classifier, NetworkOutput
from .metadata import MetadataTransform
from .out_of_distribution import OutOfDistributionScore
from .preprocessing import Image, ImageSettings

DESCRIPTION, SUMS, SCORE = "bundle.json", "SHA256SUMS", "out_of_scope.safetensors"
NETWORKS = ("model.onnx", "model.int8.onnx")
FORMAT = 1
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# What the settings of an image may be; beyond that OpenCV crashes, or takes all memory.
CHOICES: dict[str, tuple[object, ...]] = {
    "colour_constancy": ("shades_of_gray", "none"),
    "clahe": (True, False),
    "clahe_channel_order": ("correct", "hm_compat"),
    "fit": ("squash", "crop"),
}
WHOLE_NUMBERS = {"size": (16, 4096), "clahe_grid": (1, 64)}
NUMBERS = {"minkowski_p": (1, 1e6), "gamma": (1e-3, 1e3), "clahe_clip": (1e-6, 1e6)}


class OnnxNetwork:
    """Computes an exported model; see `Network`."""

    def __init__(self, file: Path, device: str = "cpu", threads: int | None = None) -> None:
        """Load an ONNX file on cpu or cuda, with that many threads for a prediction (None: one a core)."""
        # A bundle is checked and copied without it.
        import onnxruntime

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
            raise OSError(f"{file} can't be loaded: {one_line(error)}") from None
        self.inputs = [one.name for one in self.session.get_inputs()]
        self._outputs = [one.name for one in self.session.get_outputs()]

    def __call__(
        self, images: Image | None, missing: NDArray[np.bool_] | None, metadata: NDArray[np.float32]
    ) -> NetworkOutput:
        given: dict[str, Any] = {"image": images, "absent": missing, "metadata": metadata}
        computed = self.session.run(None, {name: given[name] for name in self.inputs})
        outputs = dict(zip(self._outputs, computed))
        return NetworkOutput(outputs["logits"], outputs.get("vector"))


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of `bundle.json`, after a check of it and of every file against its SHA-256."""
    file = folder / DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise ValueError(f"it isn't of format {FORMAT}")
        sums = {str(one["file"]): str(one["sha256"]) for one in description["networks"].values()}
        _check_description(description)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{file} is damaged: {reason}; export or fetch the bundle again") from None
    for name in sums:
        if name not in NETWORKS:
            raise ValueError(f"{file} names the network {name[:60]!r}; networks are called {' or '.join(NETWORKS)}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, which its {DESCRIPTION} describes; fetch it again")
    for name, digest in (sums | read_sums(folder)).items():
        if (folder / name).is_file() and hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{folder / name} isn't the file that was exported (SHA-256); export or fetch it again")
    return description


def read_sums(folder: Path) -> dict[str, str]:
    """Return each file of a bundle and its SHA-256, as `sha256sum` writes them; none of a bundle that has no list."""
    file = folder / SUMS
    if not file.is_file():
        return {}
    pairs = [line.split("  ", 1) for line in file.read_text(encoding="utf-8").splitlines()]
    if any(len(pair) != 2 or {"..", "/"} & {*PurePosixPath(pair[1]).parts} for pair in pairs):
        raise ValueError(f"{file} is damaged; export or fetch the bundle again")
    return {name: digest for digest, name in pairs}


def _check_description(description: dict[str, Any]) -> None:
    image, classes = description["image"], description["classes"]
    checks = {f"image.{name}": image[name] in choices for name, choices in CHOICES.items()}
    for name, (low, high) in {**WHOLE_NUMBERS, **NUMBERS}.items():
        number = 1 if name == "gamma" and image[name] is None else image[name]
        whole = type(number) is int or (name in NUMBERS and type(number) is float)
        checks[f"image.{name}"] = whole and low <= number <= high
    for name in ("reads_image", "reads_metadata", "learned_tokens"):
        checks[name] = type(description[name]) is bool
    checks["classes"] = len({str(name) for name in classes}) == len(classes) > 1
    checks["malignant"] = {*description["malignant"]} <= {*classes}
    checks["calibration"] = description["calibration"] is None or description["calibration"]["classes"] == classes
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} can't be right")


def bundle_parts(folder: Path, description: dict[str, Any], variant: str, device: str) -> dict[str, Any]:
    """Return the arguments of `Classifier` for a bundle of that description, with which it has predicted once."""
    networks = description["networks"]
    if variant not in networks:
        raise ValueError(f"the bundle has no variant {variant!r}; it has: {', '.join(networks)}")
    network, calibration, score = OnnxNetwork(folder / networks[variant]["file"], device), None, folder / SCORE
    reads_image = description["reads_image"]
    if ("image" in network.inputs) != reads_image:
        raise ValueError(f"{DESCRIPTION} says reads_image {reads_image}, and the network reads {network.inputs}")
    try:
        if description["calibration"]:
            calibration = Decision(**Decision.parse(description["calibration"]))
        parts = {
            "network": network,
            "classes": description["classes"],
            "malignant": description["malignant"],
            "encoder": MetadataTransform.from_json(description["metadata"]),
            "image": cast(ImageSettings, SimpleNamespace(**description["image"])),
            **{name: description[name] for name in ("reads_image", "reads_metadata", "learned_tokens")},
            "out_of_scope": OutOfDistributionScore.load(score) if score.is_file() else None,
            "decision": calibration,
        }
        classifier = Classifier(**parts)
        blank = np.zeros((classifier.size, classifier.size, 3), dtype=np.uint8)
        classifier.classify([[blank]], [{}])
    except Exception as error:  # What doesn't fit together fails anywhere, and onnxruntime's errors have no base.
        raise ValueError(f"the parts of {folder} don't fit together: {one_line(error)}") from None
    return parts


def load_bundle(folder: Path, variant: str = "float32", device: str = "cpu") -> Classifier:
    return Classifier(**bundle_parts(folder, read_description(folder), variant, device))
