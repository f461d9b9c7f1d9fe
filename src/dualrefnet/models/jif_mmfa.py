"""JIF-MMFA (Pattern Recognition 2024): joint and individual features, fused by self- and mutual attention, with three
heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualrefnet.models.base import Architecture, Method, Output
from dualrefnet.models.components import DecisionFusion, normalised_layers
from dualrefnet.models.encoders import Encoded, Encoder

WIDTHS, DROPOUT = (512, 128), 0.3


class MutualAttention(nn.Module):
    """a' = a + a * s_a * m_a, gates s_a = sigmoid(W1 a) from itself and m_a = sigmoid(W3 b) from the other; b' alike.

    Our reading of "self- and mutual attention" of two vectors.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.self_image, self.self_metadata, self.image_by_metadata, self.metadata_by_image = (
            nn.Sequential(nn.Linear(features, features), nn.Sigmoid()) for _ in range(4)
        )

    def forward(self, image: Tensor, metadata: Tensor) -> Tensor:
        enhanced_image = image + image * self.self_image(image) * self.image_by_metadata(metadata)
        enhanced_metadata = metadata + metadata * self.self_metadata(metadata) * self.metadata_by_image(image)
        return torch.cat([enhanced_image, enhanced_metadata], dim=1)


class JointIndividualFusion(Method, name="jif_mmfa"):
    """Image vector (D) -> 512 -> 128 = a and metadata (d) -> 512 -> 128 = b; heads of a, of b and of [a' || b']; their
    weighted mean.

    L = CE_joint + CE_image + CE_metadata; the weights of the mean are chosen on validation.

    A reconstruction: published, where we could read, are joint and individual features and attention of both kinds.
    Widths, activation and dropout are those of the group's earlier FusionM4Net; gates, losses and the mean are our
    reading.
    """

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        narrow = WIDTHS[-1]
        self.image_branch = normalised_layers([encoders[0].features, *WIDTHS], DROPOUT, nn.SiLU)
        self.metadata_branch = normalised_layers([architecture.metadata_width, *WIDTHS], DROPOUT, nn.SiLU)
        self.attention = MutualAttention(narrow)
        self.joint_head = nn.Linear(2 * narrow, architecture.classes)
        self.image_head = nn.Linear(narrow, architecture.classes)
        self.metadata_head = nn.Linear(narrow, architecture.classes)
        self.decision = DecisionFusion(("joint", "image", "metadata"))

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        individual_image = self.image_branch(images.first.vector)
        individual_metadata = self.metadata_branch(metadata)
        joint = self.attention(individual_image, individual_metadata)
        logits = {
            "joint": self.joint_head(joint),
            "image": self.image_head(individual_image),
            "metadata": self.metadata_head(individual_metadata),
        }
        return self.decision.output(logits, joint, joint, self.training)
