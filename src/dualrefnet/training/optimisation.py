"""Optimizer and learning-rate schedule of a recipe."""

from __future__ import annotations

from torch import nn, optim

from dualrefnet.recipe import TrainingSection


def create_optimizer(model: nn.Module, section: TrainingSection) -> optim.Optimizer:
    """Return SGD as the paper has it, or AdamW."""
    if section.optimizer == "sgd":
        return optim.SGD(model.parameters(), section.learning_rate, momentum=section.momentum, weight_decay=section.weight_decay)
    # Decaying biases and the scales of normalisation layers only pulls them away from what the data ask for.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    parts = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return optim.AdamW(parts, section.learning_rate)


def create_schedule(
    optimizer: optim.Optimizer, section: TrainingSection, steps: int
) -> optim.lr_scheduler.OneCycleLR | optim.lr_scheduler.ReduceLROnPlateau | None:
    """Return the schedule: by step (one cycle over `steps`), by validation loss (plateau), or none."""
    if section.schedule == "one_cycle":
        return optim.lr_scheduler.OneCycleLR(
            optimizer, section.learning_rate, total_steps=max(steps, 2), pct_start=0.25, cycle_momentum=False
        )
    if section.schedule == "plateau":
        return optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=section.plateau_factor, patience=section.plateau_patience, min_lr=section.minimum_learning_rate
        )
    return None
