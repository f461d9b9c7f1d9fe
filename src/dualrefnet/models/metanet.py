"""MetaNet (Li et al. 2020): the metadata gates the channels of the last map."""

from __future__ import annotations

from torch import Tensor, nn

from dualrefnet.models.base import Architecture, Output, VectorMethod
from dualrefnet.models.encoders import Encoded, Encoder

# Of the re-implementation `mb_compat`: values under one gate (8 x 8), and the width between its two layers.
GROUP, MIDDLE = 64, 64


class MetaNet(VectorMethod, name="metanet"):
    """Map * sigmoid(A u + b), one gate a channel, then mean over places and Linear(D -> C).

    A gate is the same at every place, so gating the mean is gating the map: the same numbers. That is why every encoder
    fits: of ViT and ConViT the class token is gated, of BEiT the normalised mean, which a network of this kind never
    had.

    With `metanet_variant: mb_compat` the pooled vector is taken as maps of 8 x 8 *channels* under one gate each, from
    two layers with ReLU between: the re-implementation that Table 3's numbers probably come from. (Its code had another
    number for MobileNet, by mistake; here all have D / 64 gates.)
    """

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        features, width = self.features, architecture.metadata_width
        original = architecture.section.metanet_variant == "original"
        self.group = self.places if original else GROUP
        gates = features // self.group
        self.gate = (
            nn.Sequential(nn.Linear(width, gates), nn.Sigmoid())
            if original
            else nn.Sequential(nn.Linear(width, MIDDLE), nn.ReLU(), nn.Linear(MIDDLE, gates), nn.Sigmoid())
        )
        self.dropout = nn.Dropout(architecture.section.dropout)
        self.classifier = nn.Linear(features, architecture.classes)

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        gates = self.gate(metadata).repeat_interleave(self.group, dim=1)
        features = self.vector(images) * gates
        return Output(self.classifier(self.dropout(features)), features, features, None, {})
