"""The image-only baseline of Table 3: backbone, pooled vector, one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from dualrefnet.models.backbones import Encoded, Encoder
from dualrefnet.models.method import Architecture, Method
from dualrefnet.models.output import Output


class NoMetadata(Method):
    """Image vector (D) -> dropout -> Linear(D -> C); metadata are ignored.

    The published network for VGG flattens the last map instead of pooling it; here every encoder gives one vector.
    """

    title = "No metadata"
    reference = "baseline of Pacheco and Krohling, MetaBlock, IEEE JBHI 2021"
    reads_metadata = False
    needs_metadata = False

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        self.dropout = nn.Dropout(architecture.section.dropout)
        self.classifier = nn.Linear(encoders[0].features, architecture.classes)

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        """Classify images, as encoded; the form is ignored."""
        features = images.first.vector
        return Output(self.classifier(self.dropout(features)), features, None, {})
