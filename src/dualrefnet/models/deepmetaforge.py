"""DeepMetaForge (IEEE Access 2023): both vectors are compressed together and gate each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dualrefnet.models.base import Architecture, Method, Output
from dualrefnet.models.encoders import Encoded, Encoder

COMPRESSED, CLASSIFIER_DROPOUT = 256, 0.2


class DeepMetadataFusion(nn.Module):
    """out = LN([v * a_v + v || m * a_m + m]), [a_v || a_m] = sigmoid(W c), c = GELU(BN(U [v || m])).

    Our reading: [v || m] is compressed to 256 numbers and decompressed to one gate for each of its own.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.compress = nn.Sequential(nn.Linear(features, COMPRESSED), nn.BatchNorm1d(COMPRESSED), nn.GELU())
        self.decompress = nn.Sequential(nn.Linear(COMPRESSED, features), nn.Sigmoid())
        self.norm = nn.LayerNorm(features)

    def forward(self, vector: Tensor, metadata: Tensor) -> Tensor:
        both = torch.cat([vector, metadata], dim=1)
        return self.norm(both * self.decompress(self.compress(both)) + both)  # type: ignore[no-any-return]


class MetadataConvolution(nn.Module):
    """Metadata (B, M) as a signal -> convolutions of width 3 to 32 and 64 channels, ReLU -> Linear -> (B, E)."""

    def __init__(self, metadata_width: int, features: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv1d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 64, 3, padding=1), nn.ReLU()
        )
        self.last = nn.Linear(64 * metadata_width, features)

    def forward(self, metadata: Tensor) -> Tensor:
        return self.last(self.convolutions(metadata.unsqueeze(1)).flatten(1))  # type: ignore[no-any-return]


class DeepMetaForge(Method, name="deepmetaforge"):
    """Image vector (D) and convolved metadata of the same length -> fusion module (2 D) -> 512, GELU, dropout .2 -> C.

    A reconstruction: published, where we could read, are BEiT as encoder, a CNN of the metadata, and the idea of a
    module that compresses and decompresses both together. Every width, gate and normalisation here is our reading.
    """

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        features = encoders[0].features
        self.metadata_network = MetadataConvolution(architecture.metadata_width, features)
        self.fusion = DeepMetadataFusion(2 * features)
        self.hidden = nn.Linear(2 * features, 512)
        self.dropout = nn.Dropout(CLASSIFIER_DROPOUT)
        self.classifier = nn.Linear(512, architecture.classes)

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        features = self.fusion(images.first.vector, self.metadata_network(metadata))
        hidden = functional.gelu(self.hidden(features))
        return Output(self.classifier(self.dropout(hidden)), features, hidden, None, {})
