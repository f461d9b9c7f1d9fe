"""The losses of DualRefNet, equations 4 to 7, and their readings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dualrefnet.models.base import Head, Output
from dualrefnet.recipe import LossSection


def class_weights(counts: Tensor, kind: Literal["inverse", "none", "logit_adjustment"]) -> Tensor:
    """Return the weights w_c of the cross-entropy, (C,): `inverse`: N / n_c, 0 without images; otherwise ones."""
    if kind != "inverse":
        return torch.ones(len(counts))
    return torch.where(counts > 0, counts.sum() / counts.clamp(min=1), torch.zeros(())).float()


def class_coefficients(
    counts: Tensor,
    norm: Literal["raw", "sum1", "mean1", "balanced"] = "raw",
    direction: Literal["inverse", "constant", "proportional"] = "inverse",
) -> Tensor:
    """Return the coefficients f_c of the penalty R (equation 4), (C,), from the training images of each class (C,).

    Norm `raw`: 1/n_c (the literal reading); `sum1`, `mean1`: scaled to that sum or mean; `balanced`: N / (C n_c).
    Direction `inverse`: rare classes are penalised most, as the paper has it; `constant`: all alike, with the mean
    coefficient of `inverse`; `proportional`: frequent classes most, with that mean too.
    """
    counts = counts.clamp(min=1).double()
    inverse = 1 / counts
    f = {
        "inverse": inverse,
        "constant": inverse.mean().expand_as(inverse),
        "proportional": counts * (inverse.mean() / counts.mean()),
    }[direction]
    if norm == "sum1":
        f = f / f.sum()
    elif norm == "mean1":
        f = f / f.mean()
    elif norm == "balanced":
        f = f * (counts.sum() / len(counts))
    return f.float()


class ClassFrequencyPenalty(nn.Module):
    """R = lambda (sum_i f_i ||W_before,i||_1 + sum_j f_j ||W_cls,j||_1), equation 4: the second refinement stage.

    A hidden unit i has no class, so its f_i needs a reading:

    - `constant`: the mean of f;
    - `cyclic`: f of class i mod C;
    - `blocks`: f of class floor(i C / 256);
    - `affinity`: the mean of f weighted with |W_cls,c,i|, the unit's use by each class (no gradient flows through it);
    - `batch`: the mean of f over the labels of the batch.
    """

    def __init__(self, f: Tensor, strength: float, assignment: str = "affinity", reduction: str = "sum") -> None:
        super().__init__()
        self.f: Tensor
        self.register_buffer("f", f)
        self.strength, self.assignment, self.reduction = strength, assignment, reduction

    def hidden_coefficients(self, classifier: Tensor, hidden: int, labels: Tensor) -> Tensor:
        """Return f_i of the hidden units for the weights W_cls (C, hidden) and the batch's labels."""
        classes = len(self.f)
        unit = torch.arange(hidden, device=self.f.device)
        if self.assignment == "constant":
            return self.f.mean().expand(hidden)
        if self.assignment == "cyclic":
            return self.f[unit % classes]
        if self.assignment == "blocks":
            return self.f[unit * classes // hidden]
        if self.assignment == "batch":
            return self.f[labels].mean().expand(hidden)
        use = classifier.detach().abs()
        return (self.f @ use) / use.sum(dim=0).clamp(min=torch.finfo(use.dtype).tiny)

    def forward(self, hidden: Tensor, classifier: Tensor, labels: Tensor) -> Tensor:
        """Return R, a scalar, of W_before (256, D) and W_cls (C, 256), for the batch's labels."""
        per_unit = self.hidden_coefficients(classifier, len(hidden), labels) * hidden.abs().sum(dim=1)
        per_class = self.f * classifier.abs().sum(dim=1)
        if self.reduction == "mean":
            return self.strength * (per_unit.sum() / hidden.numel() + per_class.sum() / classifier.numel())
        return self.strength * (per_unit.sum() + per_class.sum())


class DualRefNetLoss(nn.Module):
    """L = alpha L_class + beta L_aux + gamma R (equation 7).

    L_class is the weighted cross-entropy: with `classification_reduction: sum` equation 5 as printed, else divided by
    the images of the batch, or by their weights, so that the scale of the weights doesn't matter. (Processes that share
    a batch average their gradients: each counts its sum as often as there are `processes`.) With `class_weights:
    logit_adjustment` (Menon et al. 2021, not in the paper) the imbalance is met by log(n_c / N), added to the logits in
    the loss alone: weights lose their effect once a small training set is learned by heart, this doesn't. L_aux is the
    mean squared error over all elements of the rebuilt image (equation 6).

    With `modality_dropout` (not in the paper) L_class is the weighted mean of the cross-entropies of both modalities
    and of single ones.
    """

    def __init__(
        self, section: LossSection, counts: Tensor, shares: Mapping[str, float] | None = None, processes: int = 1
    ) -> None:
        super().__init__()
        self.processes = processes
        self.section, self.shares = section, dict(shares or {})
        self.class_weights: Tensor
        self.register_buffer("class_weights", class_weights(counts, section.class_weights))
        self.log_frequency: Tensor
        adjusted = section.class_weights == "logit_adjustment"
        frequency = counts.clamp(min=1) / counts.sum()
        self.frequency: Tensor
        self.register_buffer("frequency", frequency.float())
        self.register_buffer("log_frequency", frequency.log().float() if adjusted else torch.zeros(len(counts)))
        f = class_coefficients(counts, section.frequency, section.direction)
        self.penalty = ClassFrequencyPenalty(f, section.penalty_strength, section.assignment, section.reduction)

    def forward(
        self,
        output: Output,
        labels: Tensor,
        target: Tensor | None,
        head: Head | None,
        single: Mapping[str, Output] | None = None,
        soft_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the named, unweighted terms and `total`, scalars. In `total` alone cross-entropies are reduced as the
        recipe says; as terms all are divided by the weights of the batch, as in validation, so that runs compare.

        `target` (B, 3, 2H, 2W) in 0..1 is needed if the model rebuilt an image; `head` holds the last two layers
        (`hidden`, `classifier`), if there are any; `single` is what the model makes of single modalities, by the names
        in `shares`; `soft_labels` (B, C) are a teacher's probabilities. Terms are `classification`,
        `classification_<head>` for additional heads, `classification_<modality>`, `reconstruction`, `penalty`; one that
        the model has no part for is absent.
        """
        section = self.section
        terms = self._classification(output, labels, soft_labels)
        mean = (1 - sum(self.shares.values())) * torch.stack(list(terms.values())).sum()
        for name, share in self.shares.items():
            parts = self._classification((single or {})[name], labels, soft_labels)
            terms[f"classification_{name}"] = torch.stack(list(parts.values())).sum()
            mean = mean + share * terms[f"classification_{name}"]
        total = section.classification * self._undivided(labels) * mean
        if output.reconstruction is not None and target is not None:
            # In float32 also under autocast: half precision would lose small errors of a good reconstruction.
            terms["reconstruction"] = functional.mse_loss(output.reconstruction.float(), target.float())
            total = total + section.reconstruction * terms["reconstruction"]
        if head is not None and section.penalty * section.penalty_strength > 0:
            terms["penalty"] = self.penalty(head.hidden.weight, head.classifier.weight, labels)
            total = total + section.penalty * terms["penalty"]
        return {**terms, "total": total}

    def _undivided(self, labels: Tensor) -> Tensor | float:
        """Return what turns a cross-entropy that is divided by the weights of the batch into the recipe's."""
        reduction = self.section.classification_reduction
        if reduction == "weights":
            return 1.0
        return self.class_weights[labels].sum() * (self.processes if reduction == "sum" else 1 / len(labels))

    def _classification(self, output: Output, labels: Tensor, soft_labels: Tensor | None) -> dict[str, Tensor]:
        """Return the cross-entropy of the answer, and of each further head."""
        named = {"classification": output.logits} | {
            f"classification_{name}": logits for name, logits in output.heads.items()
        }
        return {name: self.cross_entropy(logits, labels, soft_labels) for name, logits in named.items()}

    def cross_entropy(self, logits: Tensor, labels: Tensor, soft_labels: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of (B, C) logits, with a share of soft labels (Hinton et al. 2015)."""
        logits, weights = logits.float() + self.log_frequency, self.class_weights
        hard = functional.cross_entropy(logits, labels, weights, label_smoothing=self.section.label_smoothing)
        if soft_labels is None:
            return hard
        # The teacher has met the imbalance already: its probabilities are of equally frequent classes. Here they are
        # compared with those of the training images, which weights or log frequencies make equal again.
        soft = soft_labels * self.frequency if self.section.class_weights != "none" else soft_labels
        soft = soft / soft.sum(dim=1, keepdim=True)
        taught = -(weights * soft * logits.log_softmax(dim=1)).sum() / weights[labels].sum()
        share = self.section.teacher_share
        return (1 - share) * hard + share * taught
