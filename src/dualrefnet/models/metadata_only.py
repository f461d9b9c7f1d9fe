"""The metadata-only baseline: DualRefNet without its image branch. What the form alone gives away."""

from __future__ import annotations

from torch import Tensor, nn

from dualrefnet.models.head import Head
from dualrefnet.models.metadata_encoders import metadata_mlp
from dualrefnet.models.output import Output


class MetadataOnly(nn.Module):
    """Metadata network and head of DualRefNet; the image is ignored."""

    reads_image = False

    def __init__(
        self, metadata_width: int, classes: int, widths: tuple[int, ...] = (64, 128, 256, 512), hidden: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.metadata_network = metadata_mlp(metadata_width, widths)
        self.head = Head(widths[-1], hidden, classes, dropout)

    def forward(self, image: Tensor | None, metadata: Tensor) -> Output:
        """Classify (B, M) encoded metadata."""
        features = self.metadata_network(metadata)
        return Output(self.head(features), features, None, {})
