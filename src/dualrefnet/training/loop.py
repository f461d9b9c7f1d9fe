"""The training loop: one readable pass over epochs and batches, on any device and any number of processes.

With what it needs: optimizer and schedule of a recipe, and checkpoints.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from safetensors import safe_open
from sklearn.metrics import accuracy_score, recall_score
from timm.optim._param_groups import param_groups_layer_decay
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn, optim

from dualrefnet.data.loader import AugmentationDraw, Batch, Examples, draw, shade, warp
from dualrefnet.errors import RunError
from dualrefnet.files import write_csv, write_tensors
from dualrefnet.models.base import Method
from dualrefnet.models.components import DecisionFusion
from dualrefnet.models.encoders import Encoded, Encoder, fill_network
from dualrefnet.models.inference import Normalisation, autocast, encoded, normalise, predict_logits, resolve_precision
from dualrefnet.models.superresolution import input_and_target, psnr, ssim
from dualrefnet.progress import note, progress_bar, warn
from dualrefnet.recipe import Recipe, TrainingSection
from dualrefnet.run import Run
from dualrefnet.runtime.metadata import Span
from dualrefnet.training.losses import DualRefNetLoss
from dualrefnet.training.modality_dropout import ModalityViews, draw_missing, modality_shares
from dualrefnet.training.tracking import Tracker


def create_optimizer(model: Method, section: TrainingSection) -> optim.Optimizer:
    """Return SGD as the paper has it, or AdamW; with `layer_decay` the layers of an encoder learn at rates of their
    own, and all else at the full rate.
    """
    adamw = section.optimizer == "adamw"
    layers: list[dict[str, Any]] = []
    if section.layer_decay is not None:
        for encoder in model.encoders:
            assert isinstance(encoder, Encoder)
            # Weight decay as below.
            layers += param_groups_layer_decay(
                encoder.body, section.weight_decay, weight_decay_exclude_1d=adamw, layer_decay=section.layer_decay
            )
    for group in layers:
        group["lr"] = section.learning_rate * group["lr_scale"]
    apart = {id(parameter) for group in layers for parameter in group["params"]}
    # A frozen encoder has no part in it.
    learning = [one for one in model.parameters() if one.requires_grad and id(one) not in apart]
    if not adamw:
        whole: list[dict[str, Any]] = [{"params": learning}, *layers]
        return optim.SGD(whole, section.learning_rate, momentum=section.momentum, weight_decay=section.weight_decay)
    # Decaying biases and the scales of normalisation layers only pulls them away from what the data ask for.
    matrices = [parameter for parameter in learning if parameter.ndim > 1]
    vectors = [parameter for parameter in learning if parameter.ndim <= 1]
    parts = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # Not fused: the fused kernel takes no heed of the layout of a state that comes from a checkpoint.
    return optim.AdamW([*parts, *layers], section.learning_rate)


def create_schedule(
    optimizer: optim.Optimizer, section: TrainingSection, steps: int
) -> optim.lr_scheduler.LambdaLR | optim.lr_scheduler.ReduceLROnPlateau | None:
    """Return the schedule: by step (one cycle over `steps`), by validation loss (plateau), or none."""
    if section.schedule == "one_cycle":
        return optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step / steps, section.warm_up))
    if section.schedule == "plateau":
        return optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            factor=section.plateau_factor,
            patience=section.plateau_patience,
            min_lr=section.minimum_learning_rate,
        )
    return None


def one_cycle(progress: float, warm_up: float) -> float:
    """Return the share of the highest learning rate at a share of the steps: linear up in the first `warm_up`, then a
    half cosine down to zero.
    """
    if progress < warm_up:
        # The first step isn't lost to a rate of zero.
        return 0.04 + 0.96 * progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up))))


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: optim.Optimizer,
    progress: dict[str, Any],
    averaged: nn.Module | None = None,
) -> None:
    """Write the state of a bare model after an epoch; `progress` (the next epoch, history, scheduler) is plain JSON.
    `averaged` is the same model with the moving average of the parameters.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in model.state_dict().items()}
    if averaged is not None:
        tensors |= {f"averaged/{name}": value for name, value in averaged.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    header = {"progress": progress, "groups": state["param_groups"], "numbers": numbers}
    write_tensors(path, tensors, {"state": json.dumps(header)})


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: optim.Optimizer, averaged: nn.Module | None = None
) -> dict[str, Any]:
    """Put a saved state into a model, its moving average and an optimizer, and return the progress."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        slots: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in header["numbers"].items()}
        state: dict[str, dict[str, Tensor]] = {"model": {}, "averaged": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            if part == "optimizer":
                index, slot = rest.split("/")
                slots.setdefault(int(index), {})[slot] = value
            else:
                state[part][rest] = value
        fill_network(model, state["model"], "its parameters are of another model")
        if averaged is not None:
            fill_network(averaged, state["averaged"], "its averaged parameters are of another model")
        optimizer.load_state_dict({"state": slots, "param_groups": header["groups"]})
        return {name: header["progress"][name] for name in ("epoch", "history", "best", "stale", "norms", "schedule")}
    # Whatever a damaged file leads to.
    except Exception as error:
        raise RunError(
            f"{path} can't be read ({error}); delete it to train from the beginning with --resume"
        ) from error


# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from its heap and not to shrink it (the process keeps its peak memory until it
    ends); return whether it obeys.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # A C library other than glibc, such as musl.
        return False
    return all(
        mallopt(name, value) == 1
        for name, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    )


# Steps after which the loss is looked at.
LOOK = 50
# The last layers have collapsed if the penalty R has left less than this share of their first L1 norm, or if the
# probabilities hardly differ between images (mean over classes of their sd over the validation images).
COLLAPSED_NORM = 0.1
COLLAPSED_SPREAD = 0.005
# Validation images, the first ones, on which the auxiliary task is measured after each epoch.
REBUILT_IMAGES = 32


class Trainer:
    """Trains one model; `fit` does it all. `views` is what a step calls: it classifies with both modalities and with
    each alone.
    """

    def __init__(
        self,
        model: Method,
        recipe: Recipe,
        run: Run,
        counts: Tensor,
        normalisation: Normalisation,
        spans: Sequence[Span] = (),
    ) -> None:
        section = recipe.training
        self.accelerator = Accelerator(cpu=section.device == "cpu")
        self.device = self.accelerator.device
        self.frozen = section.encoder == "frozen"
        # Small layers on stored features gain nothing from half precision.
        self.precision = "fp32" if self.frozen else resolve_precision(section.precision, self.device, model)
        self._best: dict[str, Tensor] = {}
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model, self.recipe, self.run = model, recipe, run
        # Validation watches the training; several passes an image are for the finished model.
        model.views = 1
        self.normalisation, self.spans = normalisation, spans
        # Convolutions on pixels-with-their-channels are faster on CPUs and on tensor cores alike.
        self.model.to(self.device).to(memory_format=torch.channels_last)
        shares = modality_shares(model, recipe.modality_dropout)
        self.views = ModalityViews(model, list(shares))
        # Parts of a batch are averaged, as processes are.
        together = self.accelerator.num_processes * section.accumulate
        self.loss = DualRefNetLoss(recipe.loss, counts, shares, together).to(self.device)
        self.optimizer = create_optimizer(model, section)
        # Its own decay rises from 0, or the first, random parameters would stay in the average for long.
        self.average = ModelEmaV3(model, decay=section.ema, use_warmup=True) if section.ema is not None else None
        # What is validated and kept.
        self.kept: Method = model if self.average is None else self.average.module

    def fit(self, train: Examples, val: Examples, tracker: Tracker | None = None) -> None:
        """Train until the last epoch or early stopping; write the best epoch's parameters and the history.

        Goes on from a checkpoint if the run has one. Whatever happens in between, the same seed on the same machine
        gives the same parameters: every epoch's random numbers follow from (seed, epoch). With a frozen encoder the
        training takes seconds: it leaves no checkpoint, and writes its parameters once.
        """
        section, accelerator = self.recipe.training, self.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        if min(section.batch_size, len(train)) < 2 * world * section.accumulate:
            raise RunError(
                f"a batch of {min(section.batch_size, len(train))} images is too small for {world} processes and "
                f"training.accumulate={section.accumulate}"
            )
        steps = train.steps(section.batch_size)
        schedule = create_schedule(self.optimizer, section, steps * section.epochs)
        progress: dict[str, Any] = {"epoch": 0, "history": [], "best": None, "stale": 0}
        progress["norms"] = head_norms(self.model)
        averaged = None if self.average is None else self.kept
        if self.run.checkpoint_file.is_file():
            progress = load_checkpoint(self.run.checkpoint_file, self.model, self.optimizer, averaged)
            if schedule is not None:
                schedule.load_state_dict(progress["schedule"])
            if accelerator.is_main_process:
                note(f"resumed after epoch {progress['epoch']}")
        # The targets of the few images that are rebuilt, not those of the whole split.
        first = np.arange(min(REBUILT_IMAGES, len(val)))
        rebuilt = replace(val, targets=train.targets).batch(first) if self.recipe.rebuilds_image else None
        wrapped, self.optimizer = accelerator.prepare(self.views, self.optimizer)
        while progress["epoch"] < section.epochs and not self._stale(progress):
            epoch, started = progress["epoch"], time.perf_counter()
            # Dropout and noise; each process needs numbers of its own.
            torch.manual_seed(int(np.random.SeedSequence([self.recipe.seed, epoch, rank]).generate_state(1)[0]))
            augmented = self.recipe.augmentation.enabled and not self.frozen
            draws = draw(len(train), self.recipe.augmentation, self.recipe.seed, epoch) if augmented else None
            dropout, hidden = self.recipe.modality_dropout, None
            if dropout.enabled:
                hidden = draw_missing(train.metadata, self.spans, dropout, self.recipe.seed, epoch)
            losses: dict[str, list[Tensor]] = {}
            self.model.train()
            shown = accelerator.is_main_process and not self.frozen
            with progress_bar(f"epoch {epoch + 1}/{section.epochs}", shown) as show:
                for step, batch in enumerate(train.shuffled(section.batch_size, self.recipe.seed, epoch, rank, world)):
                    terms = self._step(wrapped, batch, draws, hidden)
                    if self.average is not None:
                        self.average.update(self.model, epoch * steps + step + 1)
                    if isinstance(schedule, optim.lr_scheduler.LambdaLR):
                        schedule.step()
                    for name, value in terms.items():
                        losses.setdefault(name, []).append(value)
                    # To look at a loss is to wait for the device.
                    if (step + 1) % LOOK == 0 or step + 1 == steps:
                        _refuse_divergence(losses["total"])
                    show(step + 1, steps)
            row = {"epoch": epoch + 1, "learning_rate": self.optimizer.param_groups[0]["lr"]}
            # Each process has seen its share of every batch.
            each = accelerator.reduce(torch.stack([torch.stack(values) for values in losses.values()]), "mean")
            for name, values in zip(losses, each.tolist(), strict=True):
                row[f"train_{name}"] = sum(value / steps for value in values)
            row |= self._validate(val)
            row |= self._rebuild(rebuilt) if rebuilt is not None else {}
            row |= {f"l1_{name}": value for name, value in head_norms(self.kept).items()}
            row["seconds"] = round(time.perf_counter() - started, 2)
            if isinstance(schedule, optim.lr_scheduler.ReduceLROnPlateau):
                schedule.step(row["val_loss"])
            progress = self._remember(progress, row, schedule)
            if tracker is not None:
                tracker.log({name: value for name, value in row.items() if name != "epoch"}, epoch + 1)
            accelerator.wait_for_everyone()
        if self.frozen and accelerator.is_main_process:
            self.kept.load_state_dict(self._best, strict=False)
            write_tensors(self.run.weights_file, self.kept.state_dict())

    def _step(
        self, wrapped: Any, batch: Batch, draws: AugmentationDraw | None, hidden: NDArray[np.bool_] | None = None
    ) -> dict[str, Tensor]:
        """Take one optimisation step; return the loss terms, which stay on the device."""
        count = self.recipe.training.accumulate
        sums: dict[str, Tensor] = {}
        for part in batch.parts(count) if count > 1 else (batch,):
            terms = self._losses(wrapped, part, draws, hidden)
            self.accelerator.backward(terms["total"] / count)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / count
        if self.recipe.training.gradient_clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.training.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums

    def _losses(
        self, wrapped: Any, batch: Batch, draws: AugmentationDraw | None, hidden: NDArray[np.bool_] | None
    ) -> dict[str, Tensor]:
        labels, metadata = batch.labels.to(self.device), batch.metadata.to(self.device)
        image, target = self._inputs(batch, draws)
        if hidden is not None:
            metadata = metadata.masked_fill(torch.from_numpy(hidden[batch.rows]).to(self.device), torch.nan)
        with autocast(self.device, self.precision):
            output, single = wrapped(image, metadata)
        soft = None if batch.soft_labels is None else batch.soft_labels.to(self.device)
        terms: dict[str, Tensor] = self.loss(output, labels, target, self.model.penalised, single, soft)
        return terms

    def _inputs(self, batch: Batch, draws: AugmentationDraw | None) -> tuple[Tensor | Encoded | None, Tensor | None]:
        """Return the augmented, normalised images (or stored features) and the x2 target of the same crop, unshaded."""
        if batch.features:
            return encoded(batch.features, self.device), None
        if batch.images is None:
            return None, None
        chosen = draws.of(batch.rows) if draws is not None else None
        # Interpolation is twice as fast on planes; only the network gets channels_last.
        full = batch.images.to(self.device, non_blocking=True).contiguous().float().div(255)
        if chosen is not None:
            full = warp(full, chosen.geometry.to(self.device))
        target = None
        if batch.targets is not None:
            target = batch.targets.to(self.device, non_blocking=True).contiguous().float().div(255)
            if chosen is not None:
                target = warp(target, chosen.geometry.to(self.device))
        kind = self.recipe.model.target if self.recipe.rebuilds_image else None
        image, target = input_and_target(full, target, kind, self.recipe.image.size)
        if chosen is not None:
            # The target keeps the colours of the image: to take the noise out again is part of the auxiliary task.
            image = shade(image, chosen.photometry.to(self.device))
        return normalise(image, self.normalisation).contiguous(memory_format=torch.channels_last), target

    def _validate(self, val: Examples) -> dict[str, float]:
        """Return the validation measures; every process works on its share."""
        accelerator, size = self.accelerator, self.recipe.image.size
        batches = val.in_order(self.recipe.evaluation.batch_size, accelerator.process_index, accelerator.num_processes)
        logits, labels, heads = predict_logits(
            self.kept, batches, size, self.normalisation, self.device, self.precision
        )
        if accelerator.num_processes > 1:
            parts = gather_object([(logits, labels, heads)])
            logits, labels = (torch.cat([part[k] for part in parts]) for k in (0, 1))
            heads = {name: torch.cat([part[2][name] for part in parts]) for name in heads}
        decision = getattr(self.kept, "decision", None)
        if isinstance(decision, DecisionFusion):
            stacked = torch.stack([heads[name] for name in decision.names]).to(self.device)
            decision.choose(stacked, labels)
            logits = decision(stacked).cpu()
        predicted = logits.argmax(dim=1)
        present = np.unique(labels.numpy())
        return {
            "val_loss": float(self.loss.cross_entropy(logits.to(self.device), labels.to(self.device))),
            "val_accuracy": float(accuracy_score(labels, predicted)),
            "val_spread": float(logits.softmax(dim=1).std(dim=0).mean()),
            "val_balanced_accuracy": float(
                recall_score(labels, predicted, labels=present, average="macro", zero_division=0)
            ),
        }

    @torch.inference_mode()
    def _rebuild(self, batch: Batch) -> dict[str, float]:
        """Return how well validation images are rebuilt: mean PSNR (dB) and SSIM; nothing for a model without a
        decoder.
        """
        image, target = self._inputs(batch, None)
        if image is None or target is None:
            return {}
        self.kept.eval()
        with autocast(self.device, self.precision):
            rebuilt = self.kept.reconstruct(image)
        if rebuilt is None:
            return {}
        rebuilt = rebuilt.float().clamp(0, 1)
        return {"val_psnr": float(psnr(rebuilt, target).mean()), "val_ssim": float(ssim(rebuilt, target).mean())}

    def _remember(self, progress: dict[str, Any], row: dict[str, float], schedule: Any) -> dict[str, Any]:
        """Write the epoch down: the best parameters first, then the checkpoint that counts the epoch as done."""
        value = selection_value(row, self.recipe.training.selection)
        better = progress["best"] is None or value > progress["best"]
        history = progress["history"]
        progress = progress | {
            "epoch": int(row["epoch"]),
            "history": [*history, row],
            "best": value if better else progress["best"],
            "stale": 0 if better else progress["stale"] + 1,
            "schedule": _plain(schedule.state_dict()) if schedule is not None else None,
        }
        if self.accelerator.is_main_process:
            last = progress["epoch"] == self.recipe.training.epochs
            if self.frozen:
                if better:
                    state = self.kept.state_dict()
                    self._best = {
                        name: value.clone() for name, value in state.items() if not name.startswith("encoders.")
                    }
            else:
                if better:
                    write_tensors(self.run.weights_file, self.kept.state_dict())
                averaged = None if self.average is None else self.kept
                save_checkpoint(self.run.checkpoint_file, self.model, self.optimizer, progress, averaged)
            write_csv(self.run.path / "history.csv", pd.DataFrame(progress["history"]))
            if not self.frozen or last:
                note(_line(row, self.recipe.training.epochs) + (" best" if better else ""))
            before = collapse(history[-1], progress["norms"]) if history else []
            for message in collapse(row, progress["norms"]) if not before else []:
                warn(f"{message}; see loss.frequency, loss.reduction, loss.penalty_strength and training.learning_rate")
        return progress

    def _stale(self, progress: dict[str, Any]) -> bool:
        patience = self.recipe.training.early_stopping
        return patience is not None and progress["stale"] >= patience


def selection_value(row: Mapping[str, float], selection: str) -> list[float]:
    """Return that by which an epoch is chosen, the larger the better; a tie of a measure goes to the lower loss."""
    named = {"loss": [-row["val_loss"]], "last": [row["epoch"]]}
    return named.get(selection) or [row[f"val_{selection}"], -row["val_loss"]]


def _refuse_divergence(losses: Sequence[Tensor]) -> None:
    if not torch.isfinite(torch.stack(list(losses[-LOOK:]))).all():
        raise RunError(
            "the training has diverged, its loss is no longer a number: lower training.learning_rate, or set "
            "training.gradient_clip=1"
        )


def head_norms(model: Method) -> dict[str, float]:
    """Return the L1 norms of the penalised layers, by name; empty for a model without them."""
    head = model.penalised
    if head is None:
        return {}
    return {name: float(getattr(head, name).weight.detach().abs().sum()) for name in ("hidden", "classifier")}


def collapse(row: dict[str, float], first: dict[str, float]) -> list[str]:
    """Say in which way the last layers have collapsed since `first` (norms before training), if they have."""
    messages = [
        f"the {name} layer has collapsed to {row[f'l1_{name}'] / norm:.1%} of its first L1 norm"
        for name, norm in first.items()
        if row[f"l1_{name}"] < COLLAPSED_NORM * norm
    ]
    # An untrained model gives every image the same prediction too; a collapsed one has also lost weight.
    if row["val_spread"] < COLLAPSED_SPREAD and any(row[f"l1_{name}"] < 0.5 * norm for name, norm in first.items()):
        messages.append("the last layers have collapsed: every image gets nearly the same prediction")
    return messages


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Keep what JSON can hold; the rest of a scheduler's state is functions that its constructor sets again."""
    return {name: value for name, value in state.items() if isinstance(value, int | float | str | bool | list | None)}


def _line(row: dict[str, float], epochs: int) -> str:
    return (
        f"epoch {int(row['epoch']):>3}/{epochs}  loss {row['train_total']:.3f}  val loss {row['val_loss']:.3f}  "
        f"val balanced accuracy {row['val_balanced_accuracy']:.3f}  {row['seconds']:.0f} s"
    )
