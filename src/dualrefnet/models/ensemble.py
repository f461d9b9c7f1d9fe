"""The ensemble of three encoders (Pham et al. 2025): each with efficient attention and a 1-D CNN of the metadata."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualrefnet.models.base import Architecture, Method, Output
from dualrefnet.models.components import DecisionFusion
from dualrefnet.models.encoders import Encoded, Encoder

# A kernel of 5 is what the rule of ECA gives for 512 to 1792 channels (7 for the 2048 of ResNet-50).
METADATA_FEATURES, HIDDEN, ATTENTION_KERNEL = 128, 256, 5


class EfficientChannelAttention(nn.Module):
    """v * sigmoid(conv1d(v)) (ECA, Wang et al. 2020); gating the mean itself gives the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 1, ATTENTION_KERNEL, padding=ATTENTION_KERNEL // 2, bias=False)

    def forward(self, vector: Tensor) -> Tensor:
        return vector * self.convolution(vector.unsqueeze(1)).squeeze(1).sigmoid()  # type: ignore[no-any-return]


class Member(nn.Module):
    """One encoder's part: [ECA(v)

    CNN(metadata)] (D + 128) -> 256, ReLU -> C; the CNN has 64 and 128 channels.
    """

    def __init__(self, features: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.attention = EfficientChannelAttention()
        self.metadata_network = nn.Sequential(
            nn.Conv1d(1, 64, 3, padding=1),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.MaxPool1d(2, ceil_mode=True),
            nn.Conv1d(64, METADATA_FEATURES, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
        )
        self.hidden = nn.Sequential(nn.Linear(features + METADATA_FEATURES, HIDDEN), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(HIDDEN, classes)

    def forward(self, vector: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, C), fused features (B, D + 128) and hidden activations (B, 256) of (B, D) and (B, M)."""
        features = torch.cat([self.attention(vector), self.metadata_network(metadata.unsqueeze(1))], dim=1)
        hidden = self.hidden(features)
        return self.classifier(hidden), features, hidden


class Ensemble(Method, name="ensemble"):
    """Three encoders, each with the metadata beside it; the answer is the weighted mean of their probabilities.

    All three are trained together, a cross-entropy each; the weights of the mean are chosen on validation.

    A reconstruction: published, where we could read, are three different encoders with efficient attention, the 1-D CNN
    of the metadata beside each, and the weighted mean. EfficientNet, DenseNet and ResNet (`model.members`), ECA as that
    attention, and every width are our reading.
    """

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        self.members = nn.ModuleList(
            Member(encoder.features, architecture.classes, architecture.section.dropout) for encoder in encoders
        )
        self.decision = DecisionFusion(tuple(f"member_{number}" for number in range(1, len(encoders) + 1)))
        # Images come normalised for the first encoder; the others' weights may expect another mean and deviation.
        self.scales: Tensor
        self.shifts: Tensor
        mean, std = (torch.tensor([getattr(encoder, name) for encoder in encoders]) for name in ("mean", "std"))
        self.register_buffer("scales", (std[0] / std)[:, :, None, None])
        self.register_buffer("shifts", ((mean[0] - mean) / std)[:, :, None, None])

    def read(self, image: Tensor) -> Encoded:
        """Read images that are normalised for the first encoder; each of the others gets them as its weights expect."""
        parts = zip(self.encoders, self.scales, self.shifts, strict=True)
        return Encoded(tuple(encoder(image * scale + shift) for encoder, scale, shift in parts))

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        parts = zip(self.members, images.outputs, strict=True)
        logits, features, hidden = zip(*(member(output.vector, metadata) for member, output in parts), strict=True)
        named = dict(zip(self.decision.names, logits, strict=True))
        return self.decision.output(named, torch.cat(features, dim=1), torch.cat(hidden, dim=1), self.training)
