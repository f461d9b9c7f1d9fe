"""What a method costs: parameters, multiply-adds and time of a prediction, memory of a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualrefnet.models.backbones import check_image_size
from dualrefnet.models.base import Architecture, Method
from dualrefnet.models.registry import METHODS, new_model
from dualrefnet.progress import track
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.training.losses import DualRefNetLoss

# What the methods are measured as: the paper's recipe, with its metadata columns and classes.
RECIPE, COLUMNS, CLASSES = "pad_ufes_20_paper", 73, 6
# Encoders of the ensemble as published.
PUBLISHED_MEMBERS = ("efficientnet_b4", "densenet121", "resnet50")
WARM_UP, TIMED = 2, 7
FEW = (2, 4)
BYTES = 4


def measure_costs(backbones: Sequence[str], methods: Sequence[str] = tuple(METHODS)) -> pd.DataFrame:
    """Measure the methods with each of the encoders: size, multiply-adds, memory of training, time on this CPU."""
    for backbone in backbones:
        check_image_size(backbone, load_recipe(RECIPE).image.size)
    rows = []
    for method in track(methods, "methods"):
        names = backbones
        if method == "ensemble":
            names = ["+".join(PUBLISHED_MEMBERS)]
        elif not METHODS[method].reads_image:
            names = [""]
        for name in names:
            keys: dict[str, object] = {"model.method": method, "model.weights": "none"}
            if method == "ensemble":
                keys["model.members"] = PUBLISHED_MEMBERS
            elif name:
                keys["model.backbone"] = name
            recipe = load_recipe(RECIPE, keys)
            model, architecture, _ = new_model(recipe, COLUMNS, CLASSES)
            milliseconds = prediction_time(model, architecture)
            cost = network_cost(model, architecture)
            training = training_memory(model, architecture, recipe)
            rows.append(
                {"method": method, "backbone": name}
                | cost
                | {"training_bytes": training, "milliseconds": round(milliseconds, 1)}
            )
    return pd.DataFrame(rows)


def network_cost(model: Method, architecture: Architecture, training: bool = False) -> dict[str, int]:
    """Return the `parameters` and `multiply_adds` of one image's forward pass: of a prediction, which needs no decoder,
    or of training. Fake tensors, which have shapes alone, will do.
    """
    # Batch normalisation can't train on one image.
    before, images = model.training, 2 if training else 1
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.train(training)(*_inputs(model, architecture, images))
    model.train(before)
    counted = (value for name, value in model.named_parameters() if training or not name.startswith("decoder."))
    # An operation of the counter is a multiplication or an addition.
    return {
        "parameters": sum(value.numel() for value in counted),
        "multiply_adds": counter.get_total_flops() // (2 * images),
    }


def training_memory(model: Method, architecture: Architecture, recipe: Recipe) -> int:
    """Return the bytes of a training step: parameters, gradients, optimizer and what autograd keeps.

    What autograd keeps grows evenly with the images: it is measured on few, and reckoned up.
    """
    few, more = (_kept_for_backward(model, architecture, recipe, count) for count in FEW)
    each = (more - few) / (FEW[1] - FEW[0])
    states = 2 if recipe.training.optimizer == "adamw" else int(recipe.training.momentum > 0)
    parameters = list(model.parameters())
    learning = sum(value.numel() for value in parameters if value.requires_grad)
    fixed = BYTES * (sum(value.numel() for value in parameters) + (1 + states) * learning)
    return round(fixed + few + each * (recipe.training.batch_size - FEW[0]))


def _kept_for_backward(model: Method, architecture: Architecture, recipe: Recipe, count: int) -> int:
    """Return the bytes that autograd keeps of a step on so many images, the parameters apart."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        place = value.untyped_storage().data_ptr()
        if place not in own:
            # Held, so that its address isn't given to another.
            kept[place] = value
        return value

    loss = DualRefNetLoss(recipe.loss, torch.ones(architecture.classes))
    side = 2 * architecture.image_size
    target = torch.zeros(count, 3, side, side) if recipe.rebuilds_image else None
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = model(*_inputs(model, architecture, count))
        loss(output, torch.zeros(count, dtype=torch.long), target, model.penalised)
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def prediction_time(model: Method, architecture: Architecture) -> float:
    model.eval()
    inputs, seconds = _inputs(model, architecture, 1), []
    with torch.inference_mode():
        for _ in range(WARM_UP + TIMED):
            started = time.perf_counter()
            model(*inputs)
            seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[WARM_UP:])


def _inputs(model: Method, architecture: Architecture, count: int) -> tuple[Tensor | None, Tensor]:
    side, device = architecture.image_size, next(model.parameters()).device
    image = torch.zeros(count, 3, side, side, device=device) if model.reads_image else None
    return image, torch.zeros(count, architecture.metadata_width, device=device)
