"""The network as it is exported: bytes in, logits out, and what only training needs left behind."""

# also: A model as torch trained it, computed by torch: the network of a run folder.

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

import dualrefnet
from dualrefnet.errors import DependencyError
from dualrefnet.models.base import Architecture, Method, mark_missing
from dualrefnet.models.encoders import Encoded, Encoder
from dualrefnet.models.inference import Normalisation
from dualrefnet.runtime.classifier import NetworkOutput

try:
    import onnx
    import onnxscript  # noqa: F401 (torch.onnx imports it where it is too late to say so)
except ImportError:
    raise DependencyError("exporting needs onnx and onnxscript: pip install 'dualrefnet[export]'") from None
from dualrefnet.data.loader import Batch
from dualrefnet.models.inference import VectorKeeper, predict_logits

BATCH_AXIS = "N"


class ExportedModel(nn.Module):
    """A method with its normalisation inside and without its decoder, in evaluation mode.

    Attributes:
        inputs: names of what it reads, in the order of `forward`: `image` if the method reads images, `absent` if it
            reads them and has
            learned tokens, `metadata` if M > 0.
        outputs: names of what it gives: `logits`, and `vector` if it reads images.
    """

    def __init__(self, method: Method, architecture: Architecture, normalisation: Normalisation) -> None:
        super().__init__()
        self.method = copy.deepcopy(method).eval()
        # A program keeps all parameters, also those that no output depends on.
        if hasattr(self.method, "decoder"):
            self.method.decoder = None  # type: ignore[assignment]
        for part in self.method.modules():
            if hasattr(part, "fused_attn"):
                # Torch's fused attention leaves its result in another order in memory than what the exporter puts in
                # its place.
                part.fused_attn = False  # type: ignore[assignment]
        self.size, self.width, self.classes = architecture.image_size, architecture.metadata_width, architecture.classes
        there = {
            "image": method.reads_image,
            "absent": method.reads_image and not method.needs_image,
            "metadata": self.width > 0,
        }
        self.inputs = tuple(name for name, needed in there.items() if needed)
        self.outputs = ("logits", "vector") if method.reads_image else ("logits",)
        self.mean: Tensor
        self.std: Tensor
        for name, values in zip(("mean", "std"), normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(
        self, image: Tensor | None = None, absent: Tensor | None = None, metadata: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Classify.

        Args:
            image: (N, S, S, 3) uint8 RGB, preprocessed.
            absent: (N,) bool, which photographs aren't there, whatever `image` holds.
            metadata: (N, M) float32, encoded forms; NaN is a gap, for models with learned tokens.

        Returns:
            Logits (N, C), and the encoders' vectors side by side (N, D), NaN where the photograph isn't there; the
            logits alone if no
            image is read.
        """
        missing = self.method.missing
        if metadata is None:
            assert image is not None
            metadata = self.mean.new_zeros((image.shape[0], 0))
        read = Encoded(())
        vectors: tuple[Tensor, ...] = ()
        if image is not None:
            # `to_unit` and `normalise` of the training, on channels that come last.
            read = self.method.read((image.permute(0, 3, 1, 2).float().div(255) - self.mean) / self.std)
            if absent is not None:
                read = mark_missing(read, absent)
            vectors = (torch.cat([output.vector for output in read.outputs], dim=1),)
        if missing is not None:
            read, metadata = missing.photograph(read), missing.form(metadata)
        return self.method.classify(read, metadata).logits, *vectors

    def example(self, count: int = 2) -> dict[str, Tensor]:
        """Return inputs of the right shapes and types: what a program is traced with."""
        made = {
            "image": torch.zeros(count, self.size, self.size, 3, dtype=torch.uint8),
            "absent": torch.zeros(count, dtype=torch.bool),
            "metadata": torch.zeros(count, self.width),
        }
        return {name: made[name] for name in self.inputs}

    def describe(self, name: str) -> dict[str, str]:
        """Return name, type, shape and meaning of an input or output, for people."""
        side, classes = f"(N, {self.size}, {self.size}, 3)", self.classes
        length = sum(encoder.features for encoder in self.method.encoders if isinstance(encoder, Encoder))
        told = {
            "image": ("uint8", side, "the photograph, preprocessed, RGB; normalisation is inside"),
            "absent": ("bool", "(N,)", "true: this photograph isn't there, whatever `image` holds"),
            "metadata": ("float32", f"(N, {self.width})", "the encoded form"),
            "logits": ("float32", f"(N, {classes})", "in the order of `classes`"),
            "vector": (
                "float32",
                f"(N, {length})",
                "what the image encoders make of the picture; NaN where it isn't there",
            ),
        }
        return dict(zip(("name", "type", "shape", "meaning"), (name, *told[name]), strict=True))


class ProgramNetwork:
    """Computes a program that `write_program` wrote; see `dualrefnet.runtime.classifier.Network`."""

    def __init__(self, file: Path, inputs: tuple[str, ...]) -> None:
        self._module, self._inputs = torch.export.load(file).module(), inputs

    @torch.inference_mode()
    def __call__(
        self, images: NDArray[np.uint8] | None, absent: NDArray[np.bool_] | None, forms: NDArray[np.float32]
    ) -> NetworkOutput:
        """Answer; see `Network`."""
        given = {"image": images, "absent": absent, "metadata": forms}
        logits, *vectors = self._module(**{name: torch.from_numpy(given[name]) for name in self._inputs})
        return NetworkOutput(logits.numpy(), vectors[0].numpy() if vectors else None)


@torch.no_grad()
def trace(model: ExportedModel) -> ExportedProgram:
    """Return the program of a model, for any number of images, without traces of the machine that it was made on."""
    count = Dim(BATCH_AXIS, min=1)
    # Strict: it reads the code, where the other way runs it, and the length of a batch that the code asks for would be
    # the example's.
    program = torch.export.export(
        model.eval(), (), model.example(), dynamic_shapes={name: {0: count} for name in model.inputs}, strict=True
    )
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            # Folders of this machine, and lines of the source.
            node.meta.pop("stack_trace", None)
    return program


def write_program(program: ExportedProgram, file: Path) -> None:
    """Write a program for `torch.export.load`.

    Torch would add the inputs that it was traced with, as a pickle: the one in the archive. Without them there is none.
    """
    given = program.example_inputs
    # The setter wants inputs; what is written in place of none is an empty file.
    program._example_inputs = None
    try:
        torch.export.save(program, file)
    finally:
        program._example_inputs = given


def write_onnx(program: ExportedProgram, model: ExportedModel, file: Path, about: dict[str, str]) -> None:
    """Write a program as one ONNX file.

    Args:
        program: from `trace`.
        model: that was traced.
        file: to write; it holds the weights too.
        about: what the file says of itself.
    """
    made = torch.onnx.export(
        program,
        input_names=list(model.inputs),
        output_names=list(model.outputs),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert made is not None
    proto = made.model_proto
    _name_batch_axis(proto)
    for part in (
        *proto.graph.node,
        *proto.graph.value_info,
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.initializer,
    ):
        # Torch's own names of things, and with them folders of this machine.
        del part.metadata_props[:]
    for part in (proto, proto.graph, *proto.functions):
        del part.metadata_props[:]
    proto.producer_name, proto.producer_version = "dualrefnet", dualrefnet.__version__
    onnx.helper.set_model_props(proto, about)
    onnx.checker.check_model(proto)
    onnx.save(proto, file)


def _name_batch_axis(proto: Any) -> None:
    """Call the number of images N; torch numbers its symbols."""
    [symbol] = {one.type.tensor_type.shape.dim[0].dim_param for one in proto.graph.input}
    for one in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for axis in one.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", BATCH_AXIS, axis.dim_param)


class TorchNetwork:
    """Computes a trained model; see `dualrefnet.runtime.classifier.Network`.

    Attributes:
        model: the network, in evaluation mode.
    """

    def __init__(self, model: Method, size: int, normalisation: Normalisation, device: torch.device) -> None:
        """Put a model to work.

        Args:
            model: as it was trained.
            size: side of its input, pixels.
            normalisation: mean and sd of the encoder's weights.
            device: where it shall compute.
        """
        self.model = model.to(device).eval()
        self._keeper = VectorKeeper(self.model)
        self._size, self._normalisation, self._device = size, normalisation, device

    def __call__(
        self, images: NDArray[np.uint8] | None, absent: NDArray[np.bool_] | None, forms: NDArray[np.float32]
    ) -> NetworkOutput:
        """Answer; see `Network`."""
        pictures = None if images is None else torch.from_numpy(images).permute(0, 3, 1, 2)
        gone = torch.from_numpy(absent) if absent is not None and absent.any() else None
        unknown = torch.zeros(len(forms), dtype=torch.int64)
        batch = Batch(np.arange(len(forms)), pictures, torch.from_numpy(forms), unknown, absent=gone)
        logits = predict_logits(self._keeper, [batch], self._size, self._normalisation, self._device).logits
        return NetworkOutput(logits.numpy(), self._keeper.take())
