"""Visual: the image vector attends to maps inside the encoder, and the metadata weights the image vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualrefnet.models.base import Architecture, Method, Output
from dualrefnet.models.components import normalised_layers
from dualrefnet.models.encoders import Encoded, Encoder

METADATA_DROPOUT, CLASSIFIER_DROPOUT = 0.2, 0.4


class PlaceAttention(nn.Module):
    """g_k = sum_x a(x) L(x), a = softmax_x <L(x), g>: where a map agrees with the image vector (Jetley et al. 2018).

    L = P T is the map T after a 1x1 convolution to D channels without bias, or the map itself if it has D channels. The
    same numbers come from <P T(x), g> = <T(x), P'g> and sum_x a(x) P T(x) = P sum_x a(x) T(x), without a map of D
    channels.
    """

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.projector = None if channels == features else nn.Linear(channels, features, bias=False)

    def forward(self, tap: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to (B, C, h, w) with (B, D); return (B, D) and the attention (B, h, w)."""
        # In float32 also under autocast: a softmax over thousands of places of sums over hundreds of channels.
        with torch.autocast(tap.device.type, enabled=False):
            places, question = tap.float(), vector.float()
            if self.projector is not None:
                question = question @ self.projector.weight
            scores = torch.einsum("bchw,bc->bhw", places, question)
            attention = scores.flatten(1).softmax(dim=1).view_as(scores)
            looked = torch.einsum("bchw,bhw->bc", places, attention)
            return (looked if self.projector is None else self.projector(looked)), attention


class Visual(Method, name="visual"):
    """[g_1 || g_2 || g_3 || g * phi(metadata)] (4 D) -> layers -> C: attention at three maps, and the image vector g,
    weighted.

    Every encoder fits, since the taps of transformers too are maps: their tokens, laid out on the grid.

    Not faithful in three things. The released code taps MobileNet and EfficientNet at places of its own, of
    EfficientNet two inside blocks; here all taps are the ends of the last three stages before the last map, its places
    in VGG-13, ResNet-50 and DenseNet-121 (of ViT-like encoders: the blocks at a quarter, a half and three quarters).
    Its border of zeros around the maps is left out. Normalisation and dropout are its ResNet-50's for all. The widths
    are the released ones, but for the layer of 81 that it puts before those for metadata of ISIC.
    """

    reads_taps = True

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        features, taps = encoders[0].features, encoders[0].tap_features
        # The released widths between metadata and D, and, backwards, between D and C; for other D the nearest of them.
        between = [512] if features > 1024 else [width for width in (256, 512) if width < features]
        self.attentions = nn.ModuleList(PlaceAttention(channels, features) for channels in taps)
        # Its last dropout would hide parts of the image vector itself; the released code has none there.
        self.metadata_network = normalised_layers([architecture.metadata_width, *between, features], METADATA_DROPOUT)[
            :-1
        ]
        funnel = [features, *between[::-1]]
        self.reducer = normalised_layers([(len(taps) + 1) * features, *funnel], CLASSIFIER_DROPOUT)
        self.classifier = nn.Linear(funnel[-1], architecture.classes)

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        encoded = images.first
        looked = [
            attention(tap, encoded.vector)[0] for attention, tap in zip(self.attentions, encoded.taps, strict=True)
        ]
        features = torch.cat([*looked, encoded.vector * self.metadata_network(metadata)], dim=1)
        hidden = self.reducer(features)
        return Output(self.classifier(hidden), features, hidden, None, {})
