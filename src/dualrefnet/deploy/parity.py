"""Exported networks beside the trained one: parity, and the int8 copy with its accuracy and speed."""

from __future__ import annotations

import logging
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dualrefnet.analysis.opened_run import sample_rows
from dualrefnet.data.loader import Examples
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import BOOLEAN_VALUES
from dualrefnet.data.synthetic import STYLES, draw_lesion, render_lesion
from dualrefnet.errors import DependencyError, RunError, install_hint
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.progress import track
from dualrefnet.runtime.calibration import softmax
from dualrefnet.runtime.classifier import Network, NetworkOutput
from dualrefnet.runtime.out_of_distribution import OutOfDistributionScore
from dualrefnet.runtime.preprocessing import ImageSettings, preprocess

try:
    import onnx
    import onnxscript  # noqa: F401 (torch.onnx imports it where it is too late to say so)
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process
except ImportError:
    raise DependencyError(f"exporting needs onnx, onnxscript and onnxruntime: {install_hint('export')}") from None

BATCH = 16
# Of the timing: calls are made in turn, so that what else the machine does hits both alike.
ROUNDS, WARM_UP = 15, 2
# Products of two activations (attention) stay in float; those with weights don't. Without Sigmoid and Mul,
# EfficientNet-B4 is slower than in float, since every SiLU then goes to float and back.
OPERATIONS = (
    *("Conv", "MatMul", "Gemm", "Add", "Clip", "Relu", "Sigmoid", "Mul"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Concat"),
)
# An int8 network is recommended if it is so much faster, and loses at most so much balanced accuracy.
FASTER, LOSS = 1.1, 0.01
SETTING = {
    "format": "QDQ",
    "activations": "uint8",
    "weights": "int8, a scale for each channel",
    "ranges": "least and largest value over training images",
    "left in float": "normalisation, metadata network, fusion, head",
}

Logits = NDArray[np.floating]


@dataclass(frozen=True)
class Cases:
    images: NDArray[np.uint8] | None  # (N, S, S, 3), preprocessed; None for models that read none
    metadata: NDArray[np.float32]  # (N, M), encoded
    labels: NDArray[np.int64] | None = None  # (N,) class indices; None for synthetic images

    def __len__(self) -> int:
        return len(self.metadata)

    def part(self, start: int, stop: int) -> Cases:
        return Cases(None if self.images is None else self.images[start:stop], self.metadata[start:stop])


def real_cases(examples: Examples, size: int, at_most: int, seed: int = 0) -> Cases:
    """Sample cases of one split, stratified by class, with images of `size` pixels a side."""
    rows = sample_rows(examples.labels, at_most, seed)
    images = None
    if examples.store is not None and examples.store_rows is not None:
        images = examples.store.read(examples.store_rows[rows])
        if images.shape[1] == 2 * size:
            # Stored for native super-resolution targets; the mean of 2 x 2 pixels, as `to_unit` takes it, but in whole
            # numbers.
            images = np.rint(images.reshape(len(images), size, 2, size, 2, 3).mean(axis=(2, 4))).astype(np.uint8)
    return Cases(images, examples.metadata[rows], examples.labels[rows])


def synthetic_cases(count: int, image: ImageSettings | None, metadata: MetadataEncoder, seed: int = 0) -> Cases:
    """Draw synthetic images (None for models that read none) and random metadata with missing fields."""
    random = np.random.default_rng(seed)
    images = None
    if image is not None:
        drawn = []
        for number in range(count):
            lesion = draw_lesion(list(STYLES)[number % len(STYLES)], random)
            tone, size = int(random.integers(1, 7)), float(random.uniform(0.15, 0.35))
            drawn.append(preprocess(render_lesion(lesion, tone, size, 3.0, random, max(64, image.size)), image))
        images = np.stack(drawn)
    columns = {}
    fitted = zip(metadata.fields, metadata.categories, metadata.mean, metadata.std, strict=True)
    for field, categories, mean, std in fitted:
        values = (
            random.normal(mean, std, count)
            if field.kind == "numeric"
            else random.choice(list(categories or BOOLEAN_VALUES), count)
        )
        columns[field.name] = pd.Series(values, dtype=object).mask(random.random(count) < 0.25)
    # A model of the image alone still has rows.
    return Cases(images, metadata.encode(pd.DataFrame(columns, index=range(count))).values)


def predict_cases(
    network: Network, cases: Cases, missing: NDArray[np.bool_] | None = None, label: str = ""
) -> NetworkOutput:
    """Return a network's output for all cases, with a bar of that label; `missing`: (N,) images to leave out."""
    logits, vectors = [], []
    missing = np.zeros(len(cases), dtype=bool) if missing is None else missing
    for start in track(range(0, len(cases), BATCH), label):
        part = cases.part(start, start + BATCH)
        output = network(part.images, missing[start : start + BATCH], part.metadata)
        logits.append(output.logits)
        if output.vectors is not None:
            vectors.append(output.vectors)
    return NetworkOutput(np.concatenate(logits), np.concatenate(vectors) if vectors else None)


def compare(first: Logits, second: Logits) -> dict[str, Any]:
    if first.shape != second.shape or not len(first):
        raise ValueError(f"logits of the shapes {first.shape} and {second.shape} can't be compared")
    one, other = softmax(first), softmax(second)
    difference = np.abs(one - other)
    # A network that returns NaN agrees with none.
    largest, mean = (
        float(value) if np.isfinite(value) else float("inf") for value in (difference.max(), difference.mean())
    )
    return {
        "cases": len(first),
        "max_probability_difference": largest,
        "mean_probability_difference": mean,
        "same_label": float((one.argmax(axis=1) == other.argmax(axis=1)).mean()),
    }


def check_parity(first: Network, second: Network, cases: Cases, learned_tokens: bool) -> dict[str, Any]:
    """Compare two networks that must be equal; with learned tokens also with missing images. See `compare`."""
    rounds: list[NDArray[np.bool_] | None] = [None]
    if learned_tokens and cases.images is not None:
        # In one batch: a missing image must not change its neighbour's prediction.
        rounds.append(np.arange(len(cases)) % 2 == 0)
    outputs = [
        np.concatenate([predict_cases(network, cases, one, "comparing with torch").logits for one in rounds])
        for network in (first, second)
    ]
    return compare(*outputs)


def quantise(file: Path, out: Path, training: Cases) -> None:
    """Write a copy of an ONNX file whose image encoders compute with 8-bit integers, calibrated on training images."""
    if training.images is None or not len(training):
        raise ValueError("ranges are calibrated on images, and there are none")
    with tempfile.TemporaryDirectory(prefix="dualrefnet-int8-") as folder, _quiet():
        simplified = Path(folder) / "simplified.onnx"
        # The symbolic inference of shapes is for other models; these have one free axis.
        quant_pre_process(str(file), str(simplified), skip_symbolic_shape=True)
        graph = onnx.load(simplified, load_external_data=False).graph
        inside = encoder_nodes(graph)
        nodes = [node for node in graph.node if node.name in inside]
        if not any(node.op_type in ("Conv", "MatMul", "Gemm") for node in nodes):
            raise RunError("the image encoder has no layer that int8 supports; export it with --no-int8")
        quantize_static(
            str(simplified),
            str(out),
            _TrainingImages(training, {one.name for one in graph.input}),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATIONS),
            nodes_to_quantize=[node.name for node in nodes if node.op_type in OPERATIONS],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"MatMulConstBOnly": True},
        )
    made = onnx.load(out)
    # Onnxruntime writes its own name over the producer's, and adds metadata of its own.
    original = onnx.load(file, load_external_data=False)
    made.producer_name, made.producer_version = original.producer_name, original.producer_version
    onnx.helper.set_model_props(made, {one.key: one.value for one in original.metadata_props})
    onnx.save(made, out)


class _TrainingImages(CalibrationDataReader):  # type: ignore[misc]
    """The batches on which onnxruntime calibrates the ranges."""

    def __init__(self, cases: Cases, names: set[str]) -> None:
        self._batches = self._read(cases, names)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)

    @staticmethod
    def _read(cases: Cases, names: set[str]) -> Iterator[dict[str, Any]]:
        for start in track(range(0, len(cases), BATCH), "int8: calibrating ranges"):
            part = cases.part(start, start + BATCH)
            given = {"image": part.images, "absent": np.zeros(len(part), dtype=bool), "metadata": part.metadata}
            yield {name: value for name, value in given.items() if name in names}


def encoder_nodes(graph: Any) -> set[str]:
    """Return the names of the nodes of an ONNX graph that the output `vector` depends on: the image encoders."""
    producer = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    waiting = ["vector"]
    while waiting:
        node = producer.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting += node.input
    return found


def measure_int8(
    float32: Network,
    int8: Network,
    cases: Cases,
    classes: tuple[str, ...],
    score: OutOfDistributionScore | None,
    images: str = "validation images",
) -> tuple[dict[str, Any], str, bool]:
    """Return an int8 network's measures beside the float32 network's, a sentence, and whether it is recommended."""
    if cases.labels is None:
        raise ValueError("synthetic images have no labels to compare with")
    outputs = [predict_cases(network, cases, label="int8: measuring") for network in (float32, int8)]
    measured = compare(outputs[0].logits, outputs[1].logits)
    for name, output in zip(("float32", "int8"), outputs, strict=True):
        metrics = compute_metrics(cases.labels, softmax(output.logits), list(classes))
        measured[name] = {key: float(metrics[key]) for key in ("accuracy", "balanced_accuracy")}
        if score is not None and output.vectors is not None:
            measured[name]["false_alarms"] = float((score.score(output.vectors) > 1).mean())
    measured["speed"] = [time_networks(float32, int8, cases.part(0, batch)) for batch in (1, 8)]
    capabilities = torch.cpu.get_capabilities()
    vnni = any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    processor = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    measured["images"] = images
    measured["processor"] = f"{processor}, {'with' if vnni else 'without'} VNNI"
    ratio = measured["speed"][0]["times_as_fast"]
    before, after = (measured[name]["balanced_accuracy"] for name in ("float32", "int8"))
    faster, kept = ratio >= FASTER, after >= before - LOSS
    slow = f"not faster on this machine ({ratio:.2f} times as fast)"
    verdict = (
        f"{f'{ratio:.1f} times as fast as float32 on this machine' if faster else slow}; balanced accuracy {after:.3f} "
        f"on {images}, where float32 has {before:.3f}{'' if kept else ', a loss'}."
    )
    return measured, verdict if faster and kept else f"{verdict} Use model.onnx.", faster and kept


def time_networks(float32: Network, int8: Network, cases: Cases, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time two networks on the same batch, one call of each in turn: medians in milliseconds, and of the ratio."""
    missing = np.zeros(len(cases), dtype=bool)
    seconds = np.zeros((WARM_UP + rounds, 2))
    for number in range(len(seconds)):
        for column, network in enumerate((float32, int8)):
            start = time.perf_counter()
            network(cases.images, missing, cases.metadata)
            seconds[number, column] = time.perf_counter() - start
    seconds = seconds[WARM_UP:]
    first, second = (float(value) for value in 1000 * np.median(seconds, axis=0))
    ratio = float(np.median(seconds[:, 0] / seconds[:, 1]))
    return {"batch": len(cases), "float32_ms": first, "int8_ms": second, "times_as_fast": ratio}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime's advice to developers, which it gives the root logger, from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
