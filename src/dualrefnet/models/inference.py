"""From bytes to logits: the same steps in validation, evaluation and prediction; and features of frozen encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dualrefnet.data.loader import Batch
from dualrefnet.data.store import Arrays, DerivedStore, ImageStore, Part, fill_derived_store
from dualrefnet.errors import DataError, RunError
from dualrefnet.models.base import Method
from dualrefnet.models.encoders import Encoded, Encoder, EncoderOutput
from dualrefnet.progress import progress_bar
from dualrefnet.recipe import Recipe

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


def to_unit(images: Tensor, size: int) -> Tensor:
    """Turn (B, 3, S, S) bytes into (B, 3, size, size) in 0..1; a store of twice the size is averaged over 2 x 2."""
    unit = images.float().div(255)
    return functional.avg_pool2d(unit, 2) if images.shape[-1] == 2 * size else unit


def normalise(images: Tensor, normalisation: Normalisation) -> Tensor:
    """Subtract the mean and divide by the sd that the encoder's weights expect; (B, 3, H, W) in 0..1."""
    mean, sd = (images.new_tensor(values).view(1, 3, 1, 1) for values in normalisation)
    return (images - mean) / sd


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass: bf16 autocast or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def resolve_precision(precision: str, device: torch.device, trained: nn.Module | None = None) -> str:
    """Turn `auto` into `bf16` where the hardware computes it natively and a training of `trained` gains by it, else
    `fp32`.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older processors emulate bf16, and are slower with it than without.
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = capabilities.get("amx_bf16", False)
        if capabilities.get("avx512_bf16"):
            # Without matrix tiles the backward pass of depthwise convolutions loses more than dense layers gain.
            native = native or trained is None or not any(map(_is_depthwise, trained.modules()))
    return "bf16" if native else "fp32"


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def resolve_device(name: str | None) -> torch.device:
    """Return the device of that name (None: a GPU if there is one); one that can't compute here is refused."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    # What torch raises depends on the kind of device and on how torch was built.
    except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"the device {name!r} can't be used ({reason}); use cpu, or leave --device out") from None
    return device


def check_finite(logits: Tensor) -> Tensor:
    """Return logits (B, C) as they are; RunError if they aren't numbers, which would read as the first class."""
    wrong = int((~logits.isfinite()).any(dim=1).sum())
    if wrong:
        raise RunError(
            f"the model computes no finite numbers for {wrong} of {len(logits)} images: its training has diverged "
            "(lower training.learning_rate, or set training.gradient_clip=1), or a number in the metadata is out of "
            "all range (see `dualrefnet check`)"
        )
    return logits


class Predicted(NamedTuple):
    """What a model says of N images: logits (N, C) on the CPU, labels, and logits of further heads."""

    logits: Tensor
    labels: Tensor
    heads: dict[str, Tensor]


def encoded(features: Sequence[Mapping[str, Tensor]], device: torch.device) -> Encoded:
    """Turn a batch's stored features into what methods take in place of images."""
    outputs = []
    for parts in features:
        moved = {name: value.to(device, torch.float32) for name, value in parts.items()}
        taps = tuple(moved[name] for name in sorted(moved) if name.startswith("tap"))
        outputs.append(EncoderOutput(moved.get("map"), moved["vector"], taps))
    return Encoded(tuple(outputs))


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    batches: Iterable[Batch],
    size: int,
    normalisation: Normalisation,
    device: torch.device,
    precision: str = "fp32",
) -> Predicted:
    """Run a model over batches in evaluation mode; `precision` is `fp32` or `bf16`."""
    was_training = model.training
    model.eval()
    logits, labels = [], []
    heads: dict[str, list[Tensor]] = {}
    for batch in batches:
        images: Tensor | Encoded | None = None
        if batch.features:
            images = encoded(batch.features, device)
        elif batch.images is not None:
            images = normalise(to_unit(batch.images.to(device, non_blocking=True), size), normalisation)
        with autocast(device, precision):
            output = model(images, batch.metadata.to(device))
        logits.append(check_finite(output.logits.float().cpu()))
        labels.append(batch.labels)
        for name, value in output.heads.items():
            heads.setdefault(name, []).append(value.float().cpu())
    model.train(was_training)
    return Predicted(torch.cat(logits), torch.cat(labels), {name: torch.cat(values) for name, values in heads.items()})


def joined_vectors(read: Encoded) -> NDArray[np.float32]:
    """Return the vectors of all encoders beside each other, (B, D)."""
    return torch.cat([output.vector.float() for output in read.outputs], dim=1).cpu().numpy()


def fill_features(recipe: Recipe, model: Method, store: ImageStore, device: torch.device) -> tuple[DerivedStore, ...]:
    """Return what each (untrained) encoder makes of every image; computed once for all runs that share both."""
    keep_map = model.maps(recipe.model)
    return tuple(
        _fill(encoder, store, recipe.image.size, keep_map, device)
        for encoder in model.encoders
        if isinstance(encoder, Encoder)
    )


def _fill(encoder: Encoder, store: ImageStore, size: int, keep_map: bool, device: torch.device) -> DerivedStore:
    encoder.to(device).eval()

    @torch.inference_mode()
    def compute(pictures: NDArray[np.uint8]) -> Arrays:
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device)
        output = encoder(normalise(to_unit(images, size), (encoder.mean, encoder.std)))
        values = {"vector": output.vector.float().cpu().numpy()}
        if keep_map and output.map is not None:
            values["map"] = output.map.half().cpu().numpy()
        return values | {f"tap{number}": tap.half().cpu().numpy() for number, tap in enumerate(output.taps)}

    shapes = {name: value.shape[1:] for name, value in compute(np.zeros((1, size, size, 3), dtype=np.uint8)).items()}
    # Half precision is enough for maps, which are large, and of which the mean or a weighted mean is taken.
    parts = {name: Part("float32" if name == "vector" else "float16", shape) for name, shape in shapes.items()}
    settings = {"encoder": encoder.name, "parameters": _fingerprint(encoder), "size": size, "parts": sorted(parts)}
    settings |= {"mean": list(encoder.mean), "std": list(encoder.std)}
    with progress_bar(f"features of {encoder.name}") as show:
        name = f"features-{encoder.name.replace(':', '-')}"
        return fill_derived_store(store, name, settings, parts, compute, progress=show)


def _fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, so that only the same encoder finds its features again."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
