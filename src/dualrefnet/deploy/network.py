"""Networks on torch: that of a run folder, and the one that is exported, with bytes in and logits out."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

import dualrefnet
from dualrefnet.data import isic_2019, pad_ufes_20, synthetic
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.errors import RunError
from dualrefnet.models.base import Architecture, Method, mark_missing
from dualrefnet.models.encoders import Encoded, Encoder
from dualrefnet.models.inference import Normalisation, joined_vectors, normalise, resolve_device, to_unit
from dualrefnet.models.registry import load_run_model
from dualrefnet.progress import warn
from dualrefnet.recipe import ImageSection
from dualrefnet.run import Run
from dualrefnet.runtime.classifier import NetworkOutput
from dualrefnet.runtime.out_of_distribution import OutOfDistributionScore
from dualrefnet.runtime.preprocessing import Image

BATCH_AXIS = "N"


class TorchNetwork:
    """Computes a trained model; see `dualrefnet.runtime.classifier.Network`."""

    def __init__(self, model: Method, size: int, normalisation: Normalisation, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self._size, self._normalisation, self._device = size, normalisation, device

    @torch.inference_mode()
    def __call__(
        self, images: Image | None, missing: NDArray[np.bool_] | None, metadata: NDArray[np.float32]
    ) -> NetworkOutput:
        read = None
        if images is not None:
            unit = to_unit(torch.from_numpy(images).permute(0, 3, 1, 2).to(self._device), self._size)
            pixels = normalise(unit, self._normalisation)
            if missing is not None:
                pixels = pixels.masked_fill(torch.from_numpy(missing).to(self._device).view(-1, 1, 1, 1), torch.nan)
            read = self.model.encode(pixels)
        logits = self.model(read, torch.from_numpy(metadata).to(self._device)).logits.float().cpu().numpy()
        return NetworkOutput(logits, None if read is None else joined_vectors(read))


def run_parts(run: Path | str | Run, device: str) -> dict[str, Any]:
    run = run if isinstance(run, Run) else Run(Path(run))
    about = run.model
    model = load_run_model(run)
    image = ImageSection.model_validate(about["preprocessing"]["image"])
    dataset, class_names = describe_dataset(about["dataset"])
    description = {name: about[name] for name in ("dualrefnet", "classes", "malignant")}
    description |= {"dataset": dataset, "name": run.recipe.name, "class_names": class_names, "variant": "float32"}
    description["measured"] = run.metrics if run.finished else None
    if not run.calibration_file.is_file():
        warn(
            f"{run.path} has no calibration: probabilities are uncalibrated, without sets and referral; "
            f"`dualrefnet evaluate {run.path}` fits it"
        )
    return {
        "description": description,
        "network": TorchNetwork(model, image.size, normalisation_of(about), resolve_device(device)),
        "classes": about["classes"],
        "malignant": about["malignant"],
        "encoder": MetadataEncoder.from_json(about["metadata"]),
        "image": image,
        "reads_image": bool(model.reads_image),
        "reads_metadata": bool(model.reads_metadata),
        "learned_tokens": not model.needs_image,
        "out_of_scope": _find_score(run, model) if model.reads_image else None,
        "decision": run.calibration if run.calibration_file.is_file() else None,
    }


def normalisation_of(about: Mapping[str, Any]) -> Normalisation:
    mean, std = (tuple(about["preprocessing"][name]) for name in ("mean", "std"))
    return mean, std


def describe_dataset(about: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a run's data set and the names of its classes; the schemas complete what first versions lack."""
    schemas = {schema.name: schema for schema in (pad_ufes_20.SCHEMA, isic_2019.SCHEMA, synthetic.SCHEMA)}
    schema = schemas.get(about["name"])
    citation, names = (schema.citation, dict(schema.class_names)) if schema is not None else ("", {})
    dataset = {name: about[name] for name in ("name", "title", "licence", "drawn", "protocol")}
    return dataset | {"citation": about.get("citation", citation)}, about.get("class_names", names)


def vector_length(model: Method) -> int:
    return sum(encoder.features for encoder in model.encoders if isinstance(encoder, Encoder))


def _find_score(run: Run, model: Method) -> OutOfDistributionScore | None:
    """Return a run's out-of-distribution score; None, with a warning, if an older run has none."""
    again = f"`dualrefnet evaluate {run.path}` fits it"
    if not run.out_of_scope_file.is_file():
        warn(f"{run.path} has no out-of-distribution score, so images without a lesion get no warning; {again}")
        return None
    score = run.out_of_scope
    if score.length != vector_length(model):
        numbers = f"{score.length} numbers, not {vector_length(model)}"
        raise RunError(f"{run.out_of_scope_file} is of another model ({numbers}); {again}")
    return score


class ExportedModel(nn.Module):
    """A method with its normalisation inside and without its decoder; `inputs` and `outputs` are those that it has."""

    def __init__(self, method: Method, architecture: Architecture, normalisation: Normalisation) -> None:
        super().__init__()
        self.method = copy.deepcopy(method).eval()
        # A program keeps all parameters, also those that no output depends on.
        for part in list(self.method.modules()):
            if isinstance(part, Method) and hasattr(part, "decoder"):
                part.decoder = None  # type: ignore[assignment]
            if hasattr(part, "fused_attn"):
                # Fused attention leaves its result in another order in memory than the exporter's replacement.
                part.fused_attn = False  # type: ignore[assignment]
        self.size, self.width, self.classes = architecture.image_size, architecture.metadata_width, architecture.classes
        read = {
            "image": method.reads_image,
            "absent": method.reads_image and not method.needs_image,
            "metadata": self.width > 0,
        }
        self.inputs = tuple(name for name, needed in read.items() if needed)
        self.outputs = ("logits", "vector") if method.reads_image else ("logits",)
        self.mean: Tensor
        self.std: Tensor
        for name, values in zip(("mean", "std"), normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(
        self, image: Tensor | None = None, absent: Tensor | None = None, metadata: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Classify images (N, S, S, 3) uint8 RGB, preprocessed, with metadata (N, M) float32 (NaN is missing).

        `absent` (N,) says which images are missing. Return logits (N, C), and the encoders' vectors (N, D), NaN where
        the image is missing.
        """
        if metadata is None:
            assert image is not None
            metadata = self.mean.new_zeros((image.shape[0], 0))
        read = Encoded(())
        vectors: tuple[Tensor, ...] = ()
        if image is not None:
            # `to_unit` and `normalise` of the training, on channels that come last.
            read = self.method.read_views((image.permute(0, 3, 1, 2).float().div(255) - self.mean) / self.std)
            if absent is not None:
                read = mark_missing(read, absent)
            vectors = (torch.cat([output.vector for output in read.outputs], dim=1),)
        return self.method.answer(read, metadata).logits, *vectors

    def example(self, count: int = 2) -> dict[str, Tensor]:
        """Return inputs of the right shapes and types, to trace a program with."""
        made = {
            "image": torch.zeros(count, self.size, self.size, 3, dtype=torch.uint8),
            "absent": torch.zeros(count, dtype=torch.bool),
            "metadata": torch.zeros(count, self.width),
        }
        return {name: made[name] for name in self.inputs}

    def describe(self, name: str) -> dict[str, str]:
        """Return name, type, shape and meaning of an input or output."""
        size = f"(N, {self.size}, {self.size}, 3)"
        tensors = {
            "image": ("uint8", size, "preprocessed RGB; normalisation is inside"),
            "absent": ("bool", "(N,)", "true: this image is missing, whatever `image` holds"),
            "metadata": ("float32", f"(N, {self.width})", "encoded metadata"),
            "logits": ("float32", f"(N, {self.classes})", "in the order of `classes`"),
            "vector": ("float32", f"(N, {vector_length(self.method)})", "of the image encoders; NaN without image"),
        }
        return dict(zip(("name", "type", "shape", "meaning"), (name, *tensors[name]), strict=True))


class ProgramNetwork:
    """Computes a program that `write_program` wrote; see `dualrefnet.runtime.classifier.Network`."""

    def __init__(self, file: Path, inputs: tuple[str, ...]) -> None:
        self._module, self._inputs = torch.export.load(file).module(), inputs

    @torch.inference_mode()
    def __call__(
        self, images: Image | None, missing: NDArray[np.bool_] | None, metadata: NDArray[np.float32]
    ) -> NetworkOutput:
        given = {"image": images, "absent": missing, "metadata": metadata}
        logits, *vectors = self._module(**{name: torch.from_numpy(given[name]) for name in self._inputs})
        return NetworkOutput(logits.numpy(), vectors[0].numpy() if vectors else None)


@torch.no_grad()
def trace(model: ExportedModel) -> ExportedProgram:
    """Return the program of a model, for any number of images, without traces of this machine."""
    shapes = {name: {0: Dim(BATCH_AXIS, min=1)} for name in model.inputs}
    # Strict mode reads the code; the other runs it, and would fix the batch size that the code asks for.
    program = torch.export.export(model.eval(), (), model.example(), dynamic_shapes=shapes, strict=True)
    addresses: dict[str, str] = {}
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            # Folders of this machine and lines of the source.
            node.meta.pop("stack_trace", None)
            # Addresses of memory, with which no two exports of a run would be equal.
            node.meta.pop("from_node", None)
            stack = node.meta.get("nn_module_stack", {})
            node.meta["nn_module_stack"] = {
                addresses.setdefault(key, f"module_{len(addresses)}"): where for key, where in stack.items()
            }
    return program


def write_program(program: ExportedProgram, file: Path) -> None:
    """Write a program for `torch.export.load`, without the inputs that it was traced with, which would be a pickle."""
    given, content = program.example_inputs, io.BytesIO()
    # The setter wants inputs; what is written in place of none is an empty file.
    program._example_inputs = None
    try:
        # Torch's own writer of files ends the process when the disk is full.
        torch.export.save(program, content)
    finally:
        program._example_inputs = given
    file.write_bytes(content.getbuffer())


def write_onnx(program: ExportedProgram, model: ExportedModel, file: Path, about: dict[str, str]) -> None:
    """Write a program of `trace` as one ONNX file, weights included; `about` is its metadata."""
    # Loading a run must not need it.
    import onnx

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
    graph = proto.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    # Torch numbers its symbols.
    [symbol] = {one.type.tensor_type.shape.dim[0].dim_param for one in graph.input}
    for axis in (axis for value in values for axis in value.type.tensor_type.shape.dim if axis.dim_param):
        axis.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", BATCH_AXIS, axis.dim_param)
    for part in (proto, graph, *proto.functions, *graph.node, *values, *graph.initializer):
        # Torch's own names of things, and with them folders of this machine.
        del part.metadata_props[:]
    proto.producer_name, proto.producer_version = "dualrefnet", dualrefnet.__version__
    onnx.helper.set_model_props(proto, about)
    onnx.checker.check_model(proto)
    onnx.save(proto, file)
