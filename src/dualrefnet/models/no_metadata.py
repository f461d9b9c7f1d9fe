"""The image-only baseline of Table 3: backbone, pooled vector, one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from dualrefnet.models.backbones import Encoder
from dualrefnet.models.output import Output


class NoMetadata(nn.Module):
    """Pooled image vector -> dropout -> Linear(C); metadata are ignored."""

    reads_image = True

    def __init__(self, encoder: Encoder, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(encoder.features, classes)

    def forward(self, image: Tensor, metadata: Tensor) -> Output:
        """Classify (B, 3, H, W) normalised images."""
        features = self.encoder(image).vector
        return Output(self.classifier(self.dropout(features)), features, None, {})
