"""Concat (Pacheco and Krohling 2020): the reduced image vector beside the raw metadata."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualrefnet.models.base import Architecture, Output, VectorMethod
from dualrefnet.models.components import normalised_layers
from dualrefnet.models.encoders import Encoded, Encoder


def reduced_features(metadata_width: int, combination_factor: float) -> int:
    """Return n = c_f d / (1 - c_f), inferred from the one pair in public code: n = 324 for d = 81, c_f = .8."""
    return max(1, round(combination_factor * metadata_width / (1 - combination_factor)))


# Of the public code for VGG, whose flattened map is reduced in two layers.
FLATTENED_WIDTH = 1024


class Concat(VectorMethod, name="concat"):
    """Image vector (D) -> Linear(D -> n), normalisation, ReLU, dropout .5; beside it the metadata (d) -> Linear(n + d
    -> C).

    The layers are those of public code, two for the flattened map of VGG; the rule for n is our reading
    (`reduced_features`).
    """

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        width = architecture.metadata_width
        reduced = reduced_features(width, architecture.section.combination_factor)
        self.reducer = normalised_layers([self.features, *[FLATTENED_WIDTH] * self.flattens, reduced], dropout=0.5)
        self.classifier = nn.Linear(reduced + width, architecture.classes)

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        features = torch.cat([self.reducer(self.vector(images)), metadata], dim=1)
        return Output(self.classifier(features), features, features, None, {})
