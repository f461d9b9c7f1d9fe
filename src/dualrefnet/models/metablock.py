"""MetaBlock (Pacheco and Krohling 2021): the metadata gates and shifts groups of image features."""

from __future__ import annotations

from torch import Tensor, nn

from dualrefnet.errors import RecipeError
from dualrefnet.models.base import Architecture, Output, VectorMethod
from dualrefnet.models.encoders import Encoded, Encoder

# Values in one "map" of the pooled vector; the published code has 32 for every encoder that it divides (and 56 for
# EfficientNet-B4).
GROUP = 32


class MetaBlock(nn.Module):
    """out = sigmoid(tanh(V * t1) + t2), t_k = BN(A_k u + b_k) from the metadata u (d) for each of m maps."""

    def __init__(self, maps: int, metadata_width: int) -> None:
        super().__init__()
        self.scale = nn.Sequential(nn.Linear(metadata_width, maps), nn.BatchNorm1d(maps))
        self.shift = nn.Sequential(nn.Linear(metadata_width, maps), nn.BatchNorm1d(maps))

    def forward(self, maps: Tensor, metadata: Tensor) -> Tensor:
        scale, shift = self.scale(metadata).unsqueeze(2), self.shift(metadata).unsqueeze(2)
        return ((maps * scale).tanh() + shift).sigmoid()  # type: ignore[no-any-return]


class MetaBlockNet(VectorMethod, name="metablock"):
    """Pooled image vector (D) as D/32 maps of 32 values -> MetaBlock -> Linear(D -> C).

    The vector is divided, not a map, so every encoder here fits: all D are multiples of 32.
    """

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        features = self.features
        if features % GROUP:
            raise RecipeError(
                f"metablock divides the image vector into groups of {GROUP}; {encoders[0].name} has {features} features"
            )
        self.block = MetaBlock(features // GROUP, architecture.metadata_width)
        self.dropout = nn.Dropout(architecture.section.dropout)
        self.classifier = nn.Linear(features, architecture.classes)

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        features = self.block(self.vector(images).reshape(len(metadata), -1, GROUP), metadata).flatten(1)
        return Output(self.classifier(self.dropout(features)), features, features, None, {})
