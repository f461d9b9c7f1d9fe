"""The single-modality baselines: the image alone (Table 3), and the metadata alone."""

from __future__ import annotations

from torch import Tensor, nn

from dualrefnet.models.base import Architecture, Head, Method, Output, VectorMethod
from dualrefnet.models.components import create_metadata_network
from dualrefnet.models.encoders import Encoded, Encoder


class NoMetadata(VectorMethod, name="no_metadata"):
    """Image vector (D) -> dropout -> Linear(D -> C); metadata are ignored."""

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        self.dropout = nn.Dropout(architecture.section.dropout)
        self.classifier = nn.Linear(self.features, architecture.classes)

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        features = self.vector(images)
        return Output(self.classifier(self.dropout(features)), features, features, None, {})


class MetadataOnly(Method, name="metadata_only"):
    """Metadata network and head of DualRefNet; the image is ignored."""

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        section = architecture.section
        self.metadata_network = create_metadata_network(
            section.metadata_encoder, architecture.metadata_width, section.metadata_widths
        )
        self.head = Head(section.metadata_widths[-1], section.hidden, architecture.classes, section.dropout)

    @property
    def penalised(self) -> Head | None:
        return self.head

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        return self.head(self.metadata_network(metadata))  # type: ignore[no-any-return]
