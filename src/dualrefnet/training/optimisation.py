"""Optimizer and learning-rate schedule of a recipe."""

from __future__ import annotations

import math

from torch import nn, optim

from dualrefnet.recipe import TrainingSection

# Share of the steps in which the rate of one_cycle rises.
WARM_UP = 0.25


def create_optimizer(model: nn.Module, section: TrainingSection) -> optim.Optimizer:
    """Return SGD as the paper has it, or AdamW."""
    # A frozen encoder has no part in it.
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if section.optimizer == "sgd":
        return optim.SGD(learning, section.learning_rate, momentum=section.momentum, weight_decay=section.weight_decay)
    # Decaying biases and the scales of normalisation layers only pulls them away from what the data ask for.
    matrices = [parameter for parameter in learning if parameter.ndim > 1]
    vectors = [parameter for parameter in learning if parameter.ndim <= 1]
    parts = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return optim.AdamW(parts, section.learning_rate)


def create_schedule(
    optimizer: optim.Optimizer, section: TrainingSection, steps: int
) -> optim.lr_scheduler.LambdaLR | optim.lr_scheduler.ReduceLROnPlateau | None:
    """Return the schedule: by step (one cycle over `steps`), by validation loss (plateau), or none."""
    if section.schedule == "one_cycle":
        return optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step / steps))
    if section.schedule == "plateau":
        return optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=section.plateau_factor, patience=section.plateau_patience, min_lr=section.minimum_learning_rate
        )
    return None


def one_cycle(progress: float) -> float:
    """Return the share of the highest learning rate: linear up in the first quarter, then a half cosine down to zero.

    Args:
        progress: share of the steps done, 0..1.
    """
    if progress < WARM_UP:
        # The first step isn't lost to a rate of zero.
        return 0.04 + 0.96 * progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))
