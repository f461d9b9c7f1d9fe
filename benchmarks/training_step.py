"""What does a training step cost? The decoders, the precision and the memory layout, against the bare classifier.

A step is what `dualrefnet.training.loop.Trainer` does with a batch that has been read: augmentation, forward, loss,
backward, optimizer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import typer

from dualrefnet.data.loader import AugmentationDraw, Batch, draw
from dualrefnet.models.inference import resolve_precision
from dualrefnet.models.registry import new_model
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.run import Run
from dualrefnet.training.loop import Trainer
from record import RESULTS, compare, how, interleaved, record

CLASSES, METADATA = 6, 81
BASE = "no_metadata"


class ContiguousTrainer(Trainer):
    """The trainer without channels_last: what the layout is worth."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.model.to(memory_format=torch.contiguous_format)

    def _inputs(self, batch: Batch, draws: AugmentationDraw | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        image, target = super()._inputs(batch, draws)
        return None if image is None else image.contiguous(), target


def random_batch(batch_size: int, size: int) -> Batch:
    """Return noise in the memory layout of the loader: rows of a store, seen with the channels first."""
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (batch_size, size, size, 3), dtype=np.uint8)).permute(
        0, 3, 1, 2
    )
    metadata = torch.from_numpy(generator.random((batch_size, METADATA), dtype=np.float32))
    return Batch(np.arange(batch_size), images, metadata, torch.arange(batch_size) % CLASSES)


def step(recipe: Recipe, batch: Batch, folder: Path, kind: type[Trainer] = Trainer) -> Callable[[], None]:
    """Return a function that takes one training step of a recipe on `batch`; nothing is written to `folder`."""
    torch.manual_seed(0)
    model, _, (source,) = new_model(recipe, METADATA, CLASSES)
    counts = torch.full((CLASSES,), 100)
    trainer = kind(model, recipe, Run(folder), counts, (tuple(source["mean"]), tuple(source["std"])))
    trainer.model.train()
    draws = draw(len(batch.rows), recipe.augmentation, recipe.seed, 0)

    def take() -> None:
        trainer._step(trainer.views, batch, draws)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()

    return take


def main(
    backbone: str = "efficientnet_lite0",
    batch_size: int = 32,
    size: int = 192,
    rounds: int = 5,
    device: str = "auto",
    out: Path = RESULTS,
) -> None:
    """Measure; about two minutes on two cores with the default backbone. On a GPU: `--device cuda`."""
    on_gpu = torch.cuda.is_available() and device != "cpu"
    common = {
        "model.backbone": backbone,
        "model.weights": "none",
        "image.size": size,
        "training.batch_size": batch_size,
        "training.device": device,
    }
    batch = random_batch(batch_size, size)
    dualrefnet = {"model.decoder": "bottleneck"}
    variants: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
        BASE: (Trainer, {"model.method": "no_metadata"}),
        **{f"dualrefnet, decoder {name}": (Trainer, {"model.decoder": name}) for name in ("none", "bottleneck")},
        "dualrefnet, bottleneck, contiguous": (ContiguousTrainer, dualrefnet),
    }
    precisions = ["fp32"]
    if resolve_precision("auto", torch.device("cuda" if on_gpu else "cpu")) == "bf16":
        precisions.append("bf16")
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            f"{name}, {precision}": step(
                load_recipe("pad_ufes_20", {**common, **changes, "training.precision": precision}),
                batch,
                Path(folder),
                kind,
            )
            for precision in precisions
            for name, (kind, changes) in variants.items()
        }
        # Of a GPU the wall counts; on a CPU other jobs must not.
        seconds = interleaved(cases, rounds, clock=time.perf_counter if on_gpu else time.process_time)
    tables = []
    for precision in precisions:
        own = {name: times for name, times in seconds.items() if name.endswith(precision)}
        tables.append(compare(own, "s", f"{BASE}, {precision}"))
    clock = "wall seconds" if on_gpu else "CPU seconds"
    note = (
        f"{backbone}, batch {batch_size}, {size} px, {clock}, channels_last unless named otherwise; "
        f"{how(rounds, f'{BASE} in the same precision')}"
    )
    record(f"training_step-{backbone}-{size}px", pd.concat(tables, ignore_index=True), note, out)


if __name__ == "__main__":
    typer.run(main)
