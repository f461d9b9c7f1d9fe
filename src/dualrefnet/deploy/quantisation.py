"""A smaller, faster copy of an exported model: 8-bit whole numbers in the image encoders, everything else as it was.

The setting was chosen on validation photographs of PAD-UFES-20 (DualRefNet on EfficientNet-Lite0): activations of 8 bits without and
weights of 8 bits with sign, a scale for each channel, ranges from the least and largest value over training photographs. On a processor
with VNNI signed activations weren't faster than float and unsigned weights five times as slow; one scale for all channels, or quantising
the convolutions alone, made the error at least three times as large; narrower ranges (percentiles, entropy) and layers left in float
gained nothing.
"""

from __future__ import annotations

import logging
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualrefnet.deploy.parity import BATCH, Cases, Progress, accuracy, agreement, ask, race
from dualrefnet.errors import DependencyError, RunError
from dualrefnet.runtime.classifier import Network
from dualrefnet.runtime.out_of_scope import OutOfScopeScore

try:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
except ImportError:
    raise DependencyError("int8 needs onnx and onnxruntime: pip install 'dualrefnet[export]'") from None

# Products of two activations (attention) stay in float; those with weights don't. Without Sigmoid and Mul, EfficientNet-B4 is slower than
# in float, since every SiLU then goes to float and back.
OPERATIONS = (
    *("Conv", "MatMul", "Gemm", "Add", "Clip", "Relu", "Sigmoid", "Mul"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Concat"),
)
# So much faster than float32, and at most so much of its balanced accuracy lost, is worth having.
FASTER, LOSS = 1.1, 0.01
SETTING = {
    "format": "QDQ",
    "activations": "uint8",
    "weights": "int8, a scale for each channel",
    "ranges": "least and largest value over training photographs",
    "left in float": "normalisation, metadata network, fusion, head",
}


class _TrainingPhotographs(CalibrationDataReader):  # type: ignore[misc]
    """Gives onnxruntime the photographs from which it learns the ranges."""

    def __init__(self, cases: Cases, names: set[str], progress: Progress | None) -> None:
        self._batches = self._read(cases, names, progress)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch; None after the last."""
        return next(self._batches, None)

    @staticmethod
    def _read(cases: Cases, names: set[str], progress: Progress | None) -> Iterator[dict[str, Any]]:
        for start in range(0, len(cases), BATCH):
            part = cases.part(start, start + BATCH)
            given = {"image": part.images, "absent": np.zeros(len(part), dtype=bool), "metadata": part.forms}
            yield {name: value for name, value in given.items() if name in names}
            if progress is not None:
                progress(start + len(part), len(cases))


def quantise(file: Path, out: Path, training: Cases, progress: Progress | None = None) -> None:
    """Write a copy of an ONNX file whose image encoders compute with 8-bit whole numbers.

    Args:
        file: from `dualrefnet.deploy.exported_model.write_onnx`; reads images.
        out: to write.
        training: photographs of the training side, never of another.
        progress: called with (photographs done, in all).

    Raises:
        ValueError: there is no photograph.
        RunError: the model has nothing that could be quantised.
    """
    if training.images is None or not len(training):
        raise ValueError("ranges are learned from photographs, and there are none")
    with tempfile.TemporaryDirectory(prefix="dualrefnet-int8-") as folder, _quiet():
        simplified = Path(folder) / "simplified.onnx"
        # The symbolic inference of shapes is for other models; these have one free axis.
        quant_pre_process(str(file), str(simplified), skip_symbolic_shape=True)
        graph = onnx.load(simplified, load_external_data=False).graph
        inside = encoder_nodes(graph)
        chosen = [node.name for node in graph.node if node.name in inside and node.op_type in OPERATIONS]
        if not any(node.op_type in ("Conv", "MatMul", "Gemm") for node in graph.node if node.name in inside):
            raise RunError("the image encoder has no layer that int8 knows; export it with --no-int8")
        names = {one.name for one in graph.input}
        quantize_static(
            str(simplified),
            str(out),
            _TrainingPhotographs(training, names, progress),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATIONS),
            nodes_to_quantize=chosen,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"MatMulConstBOnly": True},
        )
    made = onnx.load(out)
    # Onnxruntime writes its own name over the maker's, and the values that it needed on the way.
    kept = onnx.load(file, load_external_data=False)
    made.producer_name, made.producer_version = kept.producer_name, kept.producer_version
    onnx.helper.set_model_props(made, {one.key: one.value for one in kept.metadata_props})
    onnx.save(made, out)


def measure_int8(
    float32: Network, int8: Network, cases: Cases, classes: tuple[str, ...], check: OutOfScopeScore | None, progress: Progress | None = None
) -> tuple[dict[str, Any], str, bool]:
    """Measure an 8-bit network beside the one that it was made from.

    Args:
        float32: the original.
        int8: the copy.
        cases: of the validation side.
        classes: in the order of the outputs.
        check: of pictures, whose false alarms are counted; None if there is none.
        progress: called with (answers got, in all).

    Returns:
        The measures, a sentence that says what the copy is worth, and whether it is worth having.
    """
    found: dict[str, Any] = {}
    answers = []
    for number, (name, network) in enumerate((("float32", float32), ("int8", int8))):
        show = None if progress is None else partial(_further, progress, number * len(cases), 2 * len(cases))
        answers.append(ask(network, cases, progress=show))
        found[name] = accuracy(answers[-1].logits, cases, classes)
        if check is not None and answers[-1].vectors is not None:
            found[name]["false_alarms"] = float((check.score(answers[-1].vectors) > 1).mean())
    races = [race(float32, int8, cases, batch) for batch in (1, 8)]
    found |= agreement(answers[0].logits, answers[1].logits).to_json()
    found["speed"] = [
        {"batch": one.batch, "float32_ms": one.first, "int8_ms": one.second, "times_as_fast": one.times_as_fast} for one in races
    ]
    found["processor"] = _processor()
    fast = races[0].times_as_fast
    before, after = (found[name]["balanced_accuracy"] for name in ("float32", "int8"))
    faster, kept = fast >= FASTER, after >= before - LOSS
    speed = f"{fast:.1f} times as fast as float32 on this machine" if faster else f"not faster on this machine ({fast:.2f} times as fast)"
    loss = f"balanced accuracy {after:.3f} on validation, where float32 has {before:.3f}"
    verdict = f"{speed}; {loss}{'' if kept else ', a loss'}. {'' if faster and kept else 'Use model.onnx.'}".rstrip()
    return found, verdict, faster and kept


def encoder_nodes(graph: Any) -> set[str]:
    """Return the names of the nodes that the output `vector` depends on: the image encoders.

    Args:
        graph: of an ONNX model.
    """
    maker = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    waiting = ["vector"]
    while waiting:
        node = maker.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting += node.input
    return found


def _further(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _processor() -> str:
    """Name this machine's processor, and say whether it has instructions for 8-bit products."""
    known = torch.cpu.get_capabilities()
    fit = any(known.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return f"{known.get('cpu_name') or platform.processor() or platform.machine()}, {'with' if fit else 'without'} VNNI"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime's advice to developers, which it gives the root logger, from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
