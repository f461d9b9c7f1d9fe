"""From bytes to logits: the same few steps in validation, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dualrefnet.data.loader import Batch
from dualrefnet.models.backbones import Encoded, EncoderOutput

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


def to_unit(images: Tensor, size: int) -> Tensor:
    """Turn (B, 3, S, S) bytes into (B, 3, size, size) numbers in 0..1.

    A store of twice the size (kept for native super-resolution targets) is averaged over 2 x 2 pixels.
    """
    unit = images.float().div(255)
    return functional.avg_pool2d(unit, 2) if images.shape[-1] == 2 * size else unit


def normalise(images: Tensor, normalisation: Normalisation) -> Tensor:
    """Subtract the mean and divide by the sd that the encoder's weights expect; (B, 3, H, W) in 0..1."""
    mean, sd = (images.new_tensor(values).view(1, 3, 1, 1) for values in normalisation)
    return (images - mean) / sd


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass: bf16 autocast or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def resolve_precision(precision: str, device: torch.device) -> str:
    """Turn `auto` into `bf16` where the hardware computes it natively, else `fp32`."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        # Older processors emulate bf16, and are slower with it than without.
        return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16") else "fp32"
    return "fp32"


class Predicted(NamedTuple):
    """What a model says of N images.

    Attributes:
        logits: (N, C) float32, on the CPU.
        labels: (N,), of the batches.
        heads: (N, C) logits of each of the model's further heads, by name.
    """

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
    progress: Callable[[int], None] | None = None,
) -> Predicted:
    """Run a model over batches in evaluation mode.

    Args:
        model: any model of the contract.
        batches: what to read.
        size: side of the model's input.
        normalisation: mean and sd of the encoder's weights.
        device: where the model is.
        precision: `fp32` or `bf16`.
        progress: called with the number of images done.
    """
    was_training = model.training
    model.eval()
    logits, labels, done = [], [], 0
    heads: dict[str, list[Tensor]] = {}
    for batch in batches:
        images: Tensor | Encoded | None = None
        if batch.features:
            images = encoded(batch.features, device)
        elif batch.images is not None:
            images = normalise(to_unit(batch.images.to(device, non_blocking=True), size), normalisation)
            if batch.absent is not None:
                images = images.masked_fill(batch.absent.to(device).view(-1, 1, 1, 1), torch.nan)
        with autocast(device, precision):
            output = model(images, batch.metadata.to(device))
        logits.append(output.logits.float().cpu())
        labels.append(batch.labels)
        for name, value in output.heads.items():
            heads.setdefault(name, []).append(value.float().cpu())
        done += len(batch.labels)
        if progress:
            progress(done)
    model.train(was_training)
    return Predicted(torch.cat(logits), torch.cat(labels), {name: torch.cat(values) for name, values in heads.items()})
