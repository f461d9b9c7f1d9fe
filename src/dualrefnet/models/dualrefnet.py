"""DualRefNet (Khurshid, Singh, Vatsa, Scientific Reports 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualrefnet.models.backbones import Encoder
from dualrefnet.models.head import Head
from dualrefnet.models.metadata_encoders import metadata_mlp
from dualrefnet.models.output import Output


class DualRefNet(nn.Module):
    """Image encoder and metadata network, concatenated and classified; a decoder rebuilds a x2 image in training.

    One forward tells the architecture: FV = [FV_image || FV_meta] (equation 3), the head of two layers, and the
    auxiliary decoder on the feature map. Without metadata (M = 0) the image vector is classified alone.

    Attributes:
        head: the layers on which the penalty R acts.
        decoder: dropped at inference; None without the auxiliary task.
    """

    reads_image = True

    def __init__(
        self,
        encoder: Encoder,
        metadata_width: int,
        classes: int,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        hidden: int = 256,
        dropout: float = 0.0,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.metadata_network = metadata_mlp(metadata_width, widths) if metadata_width else None
        self.head = Head(encoder.features + (widths[-1] if metadata_width else 0), hidden, classes, dropout)
        self.decoder = decoder

    def forward(self, image: Tensor, metadata: Tensor) -> Output:
        """Classify (B, 3, H, W) normalised images with (B, M) encoded metadata."""
        encoded = self.encoder(image)
        features = encoded.vector
        if self.metadata_network is not None:
            features = torch.cat([features, self.metadata_network(metadata)], dim=1)
        # The rebuilt image is only needed for its error, so inference doesn't pay for it.
        reconstruction = self.decoder(encoded.map) if self.decoder is not None and self.training else None
        return Output(self.head(features), features, reconstruction, {})
