"""How DualRefNet and AuxNet put the image vector and the metadata vector together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualrefnet.models.backbones import EncoderOutput

ATTENTION_WIDTH, ATTENTION_HEADS = 512, 4


def create_fusion(kind: str, image_features: int, metadata_features: int) -> Fusion:
    """Return the fusion of an encoder's output (D) with a metadata vector (E).

    Args:
        kind: `concat` (equation 3), `hadamard` or `cross_attention`.
        image_features: D.
        metadata_features: E.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in FUSIONS:
        raise ValueError(f"there is no fusion {kind!r}; there are: {', '.join(FUSIONS)}")
    return FUSIONS[kind](image_features, metadata_features)


class Concatenation(nn.Module):
    """FV = [FV_image || FV_meta], equation 3.

    Attributes:
        features: D + E.
    """

    def __init__(self, image_features: int, metadata_features: int) -> None:
        super().__init__()
        self.features = image_features + metadata_features

    def forward(self, encoded: EncoderOutput, metadata: Tensor) -> Tensor:
        """Fuse the image vector with (B, E)."""
        return torch.cat([encoded.vector, metadata], dim=1)


class Hadamard(nn.Module):
    """FV = (W FV_image) (.) FV_meta: the other reading of AuxNet's product; the projection makes both vectors E long.

    Attributes:
        features: E.
    """

    def __init__(self, image_features: int, metadata_features: int) -> None:
        super().__init__()
        self.features = metadata_features
        self.projection = nn.Linear(image_features, metadata_features)

    def forward(self, encoded: EncoderOutput, metadata: Tensor) -> Tensor:
        """Fuse the image vector with (B, E)."""
        return self.projection(encoded.vector) * metadata  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """The ablation's cross-attention, four heads of 512 together.

    The paper gives no more than that. Our reading: the metadata vector asks, the places of the last map and the image vector
    answer, and what they say stands beside the metadata vector: [MHA(W_q m, W_p [v || places]) || W_q m]. (With the image
    vector alone attention would have no choice; without it the last normalisation of BEiT would have no part.)

    Attributes:
        features: 512 + 512.
    """

    def __init__(self, image_features: int, metadata_features: int) -> None:
        super().__init__()
        self.features = 2 * ATTENTION_WIDTH
        self.places = nn.Linear(image_features, ATTENTION_WIDTH)
        self.question = nn.Linear(metadata_features, ATTENTION_WIDTH)
        self.attention = nn.MultiheadAttention(ATTENTION_WIDTH, ATTENTION_HEADS, batch_first=True)

    def forward(self, encoded: EncoderOutput, metadata: Tensor) -> Tensor:
        """Fuse the map's places and the vector with (B, E)."""
        assert encoded.map is not None
        tokens = torch.cat([encoded.vector.unsqueeze(1), encoded.map.flatten(2).transpose(1, 2)], dim=1)
        places, question = self.places(tokens), self.question(metadata)
        answer, _ = self.attention(question.unsqueeze(1), places, places, need_weights=False)
        return torch.cat([answer.squeeze(1), question], dim=1)


Fusion = Concatenation | Hadamard | CrossAttention
FUSIONS: dict[str, type[Fusion]] = {"concat": Concatenation, "hadamard": Hadamard, "cross_attention": CrossAttention}
