"""Decision fusion: several heads of one model answer, and the final probabilities are their weighted mean."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from sklearn.metrics import recall_score
from torch import Tensor, nn

from dualrefnet.models.output import Output

# The simplex is searched in steps of a twelfth, so that equal weights of two, three or four heads are among the candidates
# (91 for three heads).
STEPS = 12


class DecisionFusion(nn.Module):
    """p = sum_k w_k softmax(z_k), with weights that are chosen on validation and travel with the parameters.

    Attributes:
        names: the K heads, in order.
        weights: (K,), a buffer; equal until `choose`.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.weights: Tensor
        self.register_buffer("weights", torch.full((len(names),), 1 / len(names)))

    def forward(self, logits: Tensor) -> Tensor:
        """Mix (K, B, C) logits to the (B, C) logarithms of the mean probabilities."""
        weighted = logits.float().log_softmax(dim=2) + self.weights.log()[:, None, None]
        return weighted.logsumexp(dim=0)

    def output(self, logits: dict[str, Tensor], features: Tensor, training: bool) -> Output:
        """Return a model's output.

        In training the first head's scores stand in `logits` and the others in `heads`, so that each has a cross-entropy
        of its own; afterwards `logits` is the fused answer and `heads` holds all of them.

        Args:
            logits: (B, C) of every head, in the order of `names`.
            features: (B, D).
            training: whether the model trains.
        """
        if training:
            first, *others = self.names
            return Output(logits[first], features, None, {name: logits[name] for name in others})
        return Output(self(torch.stack([logits[name] for name in self.names])), features, None, logits)

    def choose(self, logits: Tensor, labels: Tensor) -> None:
        """Choose the weights with the best balanced accuracy on validation; of equals the most even ones.

        Args:
            logits: (K, N, C) of the heads on the validation images.
            labels: (N,).
        """
        probabilities = logits.float().softmax(dim=2)
        truth = labels.cpu().numpy()
        present = np.unique(truth)
        best, chosen = (-1.0, 0), self.weights
        for counts in product(range(STEPS + 1), repeat=len(self.names)):
            if sum(counts) != STEPS:
                continue
            weights = torch.tensor(counts, dtype=torch.float32, device=probabilities.device) / STEPS
            predicted = torch.einsum("k,knc->nc", weights, probabilities).argmax(dim=1).cpu().numpy()
            score = float(recall_score(truth, predicted, labels=present, average="macro", zero_division=0))
            value = (score, -sum(count**2 for count in counts))
            if value > best:
                best, chosen = value, weights
        self.weights.copy_(chosen.to(self.weights.device))
