"""The last two layers, on which the second stage of the refinement acts."""

from __future__ import annotations

from torch import Tensor, nn


class Head(nn.Module):
    """Features -> 256 hidden units -> class scores (the two layers in the sum of equation 4).

    Attributes:
        hidden: the first layer; its rows are W_before.
        classifier: the second layer; its rows are W_cls.
    """

    def __init__(self, features: int, hidden: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.drop_features = nn.Dropout(dropout)
        self.hidden = nn.Linear(features, hidden)
        self.drop_hidden = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, D) to logits (B, C)."""
        return self.classifier(self.drop_hidden(self.hidden(self.drop_features(features)).relu()))  # type: ignore[no-any-return]
