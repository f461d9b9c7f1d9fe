"""The metadata-only baseline: DualRefNet without its image branch. What the form alone gives away."""

from __future__ import annotations

from torch import Tensor

from dualrefnet.models.backbones import Encoded, Encoder
from dualrefnet.models.head import Head
from dualrefnet.models.metadata_encoders import create_metadata_network
from dualrefnet.models.method import Architecture, Method
from dualrefnet.models.output import Output


class MetadataOnly(Method):
    """Metadata network and head of DualRefNet; the image is ignored."""

    title = "Metadata only"
    reference = "baseline of this project"
    reads_image = False

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        section = architecture.section
        self.metadata_network = create_metadata_network(section.metadata_encoder, architecture.metadata_width, section.metadata_widths)
        self.head = Head(section.metadata_widths[-1], section.hidden, architecture.classes, section.dropout)

    @property
    def penalised(self) -> Head | None:
        """The head, as in DualRefNet."""
        return self.head

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        """Classify (B, M) forms; there are no images."""
        features = self.metadata_network(metadata)
        return Output(self.head(features), features, None, {})
