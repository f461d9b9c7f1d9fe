"""Do two networks give the same answers, are they as often right, and which of them is faster?"""

# also: A smaller, faster copy of an exported model: 8-bit whole numbers in the image encoders, everything else as it
# was.

from __future__ import annotations

import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from dualrefnet.data.synthetic_lesions import STYLES, draw_lesion, render_lesion
from dualrefnet.errors import DependencyError, RunError
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.runtime.calibration import softmax
from dualrefnet.runtime.classifier import Network, NetworkOutput
from dualrefnet.runtime.out_of_distribution import OutOfDistributionScore
from dualrefnet.runtime.preprocessing import ImageSettings, preprocess

try:
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process
except ImportError:
    raise DependencyError("int8 needs onnx and onnxruntime: pip install 'dualrefnet[export]'") from None


BATCH = 16


# Of the race: calls are timed in turn, so that what else the machine does hits both alike.
ROUNDS = 15


Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cases:
    """Inputs of networks, as many as a machine holds at once.

    Attributes:
        images: (N, S, S, 3) uint8, preprocessed; None for models that read none.
        forms: (N, M) float32, encoded.
        labels: (N,) class indices; None for drawn pictures.
    """

    images: NDArray[np.uint8] | None
    forms: NDArray[np.float32]
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.forms)

    def part(self, start: int, stop: int) -> Cases:
        """Return some of the cases, without labels."""
        return Cases(None if self.images is None else self.images[start:stop], self.forms[start:stop])


@dataclass(frozen=True)
class Agreement:
    """How far the probabilities of two networks are from each other.

    Attributes:
        cases: that both were asked about.
        largest: difference of the probability of a class of a case.
        mean: of all these differences.
        same: share of the cases to which both give the same class.
    """

    cases: int
    largest: float
    mean: float
    same: float

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "cases": self.cases,
            "max_probability_difference": self.largest,
            "mean_probability_difference": self.mean,
            "same_label": self.same,
        }


@dataclass(frozen=True)
class Race:
    """How long two networks took.

    Attributes:
        batch: cases at once.
        first: milliseconds a call, median.
        second: the same of the other.
        times_as_fast: the second is so many times as fast as the first; median over rounds.
    """

    batch: int
    first: float
    second: float
    times_as_fast: float


def real_cases(examples: Examples, size: int, at_most: int, seed: int = 0) -> Cases:
    """Take cases of one side of a split, each class in proportion.

    Args:
        examples: with their pictures (`OpenedRun.pictures`).
        size: side of the model's input, pixels.
        at_most: how many.
        seed: of the choice.
    """
    rows = sample_rows(examples.labels, at_most, seed)
    images = None
    if examples.store is not None and examples.store_rows is not None:
        images = examples.store.read(examples.store_rows[rows])
        if images.shape[1] == 2 * size:
            # Kept for native super-resolution targets; the mean of 2 x 2 pixels, as `to_unit` takes it, but in whole
            # numbers.
            images = np.rint(images.reshape(len(images), size, 2, size, 2, 3).mean(axis=(2, 4))).astype(np.uint8)
    return Cases(images, examples.metadata[rows], examples.labels[rows])


def drawn_cases(count: int, image: ImageSettings | None, metadata: MetadataEncoder, seed: int = 0) -> Cases:
    """Make cases up: pictures drawn by a program, and forms with random answers and gaps. Nothing can be measured on
    them but agreement.

    Args:
        count: how many.
        image: what is done to a photograph; None for models that read none.
        metadata: the fitted encoder.
        seed: of all that is random.
    """
    random = np.random.default_rng(seed)
    images = None
    if image is not None:
        drawn = []
        for number in range(count):
            lesion = draw_lesion(list(STYLES)[number % len(STYLES)], random)
            picture = render_lesion(
                lesion, int(random.integers(1, 7)), float(random.uniform(0.15, 0.35)), 3.0, random, max(64, image.size)
            )
            drawn.append(preprocess(picture, image))
        images = np.stack(drawn)
    answers = {}
    for one, levels, centre, spread in zip(
        metadata.fields, metadata.categories, metadata.mean, metadata.std, strict=True
    ):
        given = (
            random.normal(centre, spread, count)
            if one.kind == "numeric"
            else random.choice(list(levels or BOOLEAN_VALUES), count)
        )
        answers[one.name] = pd.Series(given, dtype=object).mask(random.random(count) < 0.25)
    # A model of the photograph alone still has rows.
    return Cases(images, metadata.encode(pd.DataFrame(answers, index=range(count))).values)


def ask(
    network: Network, cases: Cases, absent: NDArray[np.bool_] | None = None, progress: Progress | None = None
) -> NetworkOutput:
    """Ask a network about all cases.

    Args:
        network: see `dualrefnet.runtime.classifier.Network`.
        cases: to ask about.
        absent: (N,) photographs that are taken away, for models with learned tokens.
        progress: called with (cases done, cases in all).
    """
    logits, vectors = [], []
    for start in range(0, len(cases), BATCH):
        part = cases.part(start, start + BATCH)
        gone = np.zeros(len(part), dtype=bool) if absent is None else absent[start : start + BATCH]
        answered = network(part.images, gone, part.forms)
        logits.append(answered.logits)
        vectors.append(answered.vectors)
        if progress is not None:
            progress(start + len(part), len(cases))
    there = [one for one in vectors if one is not None]
    return NetworkOutput(np.concatenate(logits), np.concatenate(there) if there else None)


def agreement(first: NDArray[np.floating], second: NDArray[np.floating]) -> Agreement:
    """Compare the logits (N, C) of two networks.

    Raises:
        ValueError: the shapes differ, or there is no case.
    """
    if first.shape != second.shape or not len(first):
        raise ValueError(f"logits of the shapes {first.shape} and {second.shape} can't be compared")
    ours, theirs = softmax(first), softmax(second)
    difference = np.abs(ours - theirs)
    # A network that gives NaN agrees with nobody.
    largest, mean = (
        float(value) if np.isfinite(value) else float("inf") for value in (difference.max(), difference.mean())
    )
    return Agreement(len(first), largest, mean, float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()))


def check_parity(
    first: Network, second: Network, cases: Cases, learned_tokens: bool, progress: Progress | None = None
) -> Agreement:
    """Compare two networks that shall be the same; of a model with learned tokens also where photographs are missing.

    Args:
        first: a network.
        second: another.
        cases: to ask about.
        learned_tokens: whether they answer without a photograph.
        progress: called with (answers got, in all).
    """
    count = len(cases)
    rounds: list[NDArray[np.bool_] | None] = [None]
    if learned_tokens and cases.images is not None:
        # Beside each other in one batch: one's gap must not touch the other.
        rounds.append(np.arange(count) % 2 == 0)
    logits: tuple[list[NDArray[np.floating]], ...] = ([], [])
    total = count * len(rounds) * 2
    for number, absent in enumerate(rounds):
        for side, network in enumerate((first, second)):
            done = (2 * number + side) * count
            show = partial(_further, progress, done, total) if progress is not None else None
            logits[side].append(ask(network, cases, absent, show).logits)
    return agreement(np.concatenate(logits[0]), np.concatenate(logits[1]))


def accuracy(logits: NDArray[np.floating], cases: Cases, classes: tuple[str, ...]) -> dict[str, float]:
    """Return accuracy and balanced accuracy of answers to real cases.

    Raises:
        ValueError: the cases have no labels.
    """
    if cases.labels is None:
        raise ValueError("drawn pictures have no labels: nothing can be right or wrong")
    measured = compute_metrics(cases.labels, softmax(logits), list(classes))
    return {name: float(measured[name]) for name in ("accuracy", "balanced_accuracy")}


def race(first: Network, second: Network, cases: Cases, batch: int = 1, rounds: int = ROUNDS) -> Race:
    """Time two networks on the same cases, one call of each in turn.

    Args:
        first: a network.
        second: another.
        cases: of which the first `batch` are asked about.
        batch: at once.
        rounds: of which the medians are taken.
    """
    part = cases.part(0, batch)
    gone = np.zeros(len(part), dtype=bool)
    times = np.zeros((rounds + 2, 2))
    for number in range(len(times)):
        for side, network in enumerate((first, second)):
            start = time.perf_counter()
            network(part.images, gone, part.forms)
            times[number, side] = time.perf_counter() - start
    # The first two calls set memory up.
    times = times[2:]
    median = 1000 * np.median(times, axis=0)
    return Race(len(part), float(median[0]), float(median[1]), float(np.median(times[:, 0] / times[:, 1])))


def _further(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


# Products of two activations (attention) stay in float; those with weights don't. Without Sigmoid and Mul,
# EfficientNet-B4 is slower than
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
        file: from `dualrefnet.deploy.network.write_onnx`; reads images.
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
    float32: Network,
    int8: Network,
    cases: Cases,
    classes: tuple[str, ...],
    check: OutOfDistributionScore | None,
    progress: Progress | None = None,
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
        {"batch": one.batch, "float32_ms": one.first, "int8_ms": one.second, "times_as_fast": one.times_as_fast}
        for one in races
    ]
    found["processor"] = _processor()
    fast = races[0].times_as_fast
    before, after = (found[name]["balanced_accuracy"] for name in ("float32", "int8"))
    faster, kept = fast >= FASTER, after >= before - LOSS
    speed = (
        f"{fast:.1f} times as fast as float32 on this machine"
        if faster
        else f"not faster on this machine ({fast:.2f} times as fast)"
    )
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
