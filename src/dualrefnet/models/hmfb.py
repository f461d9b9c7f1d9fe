"""HMFB, the hyperparametric metadata fusion block: after MetaBlock, by the authors of DualRefNet's preprocessing."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from dualrefnet.models.base import Architecture, Method, Output
from dualrefnet.models.components import normalised_layers
from dualrefnet.models.encoders import Encoded, Encoder

# The hyperparameters that give the block its name: shares of the image branch and of the metadata branch.
IMAGE_SHARE, METADATA_SHARE = 0.7, 0.3
# Widths of the funnel where the released code has others than D/2, D/4, D/8: MobileNet-V2's D, and EfficientNet-B4's.
FUNNELS = {1280: (512, 256, 64), 1792: (1024, 512, 256)}


class HyperparametricBlock(nn.Module):
    """out = SiLU(.7 LeakyReLU(v * t1) + .3 t2), t_k = BN(A_k u + b_k) from the metadata u (d)."""

    def __init__(self, features: int, metadata_width: int) -> None:
        super().__init__()
        self.scale = nn.Sequential(nn.Linear(metadata_width, features), nn.BatchNorm1d(features))
        self.shift = nn.Sequential(nn.Linear(metadata_width, features), nn.BatchNorm1d(features))

    def forward(self, vector: Tensor, metadata: Tensor) -> Tensor:
        image = functional.leaky_relu(vector * self.scale(metadata))
        return functional.silu(IMAGE_SHARE * image + METADATA_SHARE * self.shift(metadata))


class HyperparametricMetadataFusion(Method, name="hmfb"):
    """Pooled image vector (D) -> block -> a funnel of three layers (normalisation, ReLU, dropout) -> Linear(C).

    Block, funnels and dropout are those of the released code for the paper's five encoders; D/2, D/4, D/8 for others is
    its rule carried on. Not faithful is the image vector: but for EfficientNet, the released code has a convolution as
    wide as the whole last map (200 million parameters for ResNet-50) where the map is pooled here, as in its
    successors.
    """

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        features = encoders[0].features
        funnel = (features, *FUNNELS.get(features, (features // 2, features // 4, features // 8)))
        self.block = HyperparametricBlock(features, architecture.metadata_width)
        self.funnel = nn.Sequential(*normalised_layers(funnel[:3], 0.4), *normalised_layers(funnel[2:], 0.3))
        self.classifier = nn.Linear(funnel[-1], architecture.classes)

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        features = self.block(images.first.vector, metadata)
        hidden = self.funnel(features)
        return Output(self.classifier(hidden), features, hidden, None, {})
