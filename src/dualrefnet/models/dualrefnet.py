"""DualRefNet (Khurshid, Singh, Vatsa, Scientific Reports 2025), and AuxNet (ISBI 2024), its direct ancestor."""

from __future__ import annotations

from torch import Tensor

from dualrefnet.models.base import Architecture, Head, Method, Output
from dualrefnet.models.components import DECODERS, FUSIONS, create_metadata_network
from dualrefnet.models.encoders import Encoded, Encoder
from dualrefnet.recipe import ModelSection


class DualRefNet(Method, name="dualrefnet"):
    """Image encoder and metadata network, concatenated and classified; a decoder rebuilds a x2 image in training.

    One forward tells the architecture: FV = [FV_image || FV_meta] (equation 3), the head of two layers, on which the
    penalty R acts, and the auxiliary decoder on the feature map, dropped at inference. Without metadata (M = 0) the
    image vector is classified alone. The paper's ablations are settings: `metadata_encoder` (attention, transformer)
    and `fusion` (cross_attention).
    """

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        section, encoder = architecture.section, encoders[0]
        self.metadata_network = self.fusion = None
        features = encoder.features
        if architecture.metadata_width:
            self.metadata_network = create_metadata_network(
                section.metadata_encoder, architecture.metadata_width, section.metadata_widths
            )
            self.fusion = FUSIONS[section.fusion](encoder.features, section.metadata_widths[-1])
            features = self.fusion.features
        self.head = Head(features, section.hidden, architecture.classes, section.dropout)
        self.decoder = (
            None if section.decoder == "none" else DECODERS[section.decoder](encoder.features, encoder.stride)
        )

    @classmethod
    def maps(cls, section: ModelSection) -> bool:
        return section.fusion == "cross_attention"

    @property
    def penalised(self) -> Head | None:
        return self.head

    def reconstruct(self, image: Tensor | Encoded) -> Tensor | None:
        if self.decoder is None:
            return None
        # Of the image as it is, not of its flipped copies.
        images = image if isinstance(image, Encoded) else self.read(image)
        return self.decoder(images.first.map)  # type: ignore[no-any-return]

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        features = images.first.vector
        if self.metadata_network is not None and self.fusion is not None:
            features = self.fusion(images.first, self.metadata_network(metadata))
        return self.head(features)  # type: ignore[no-any-return]


class AuxNet(DualRefNet, name="auxnet"):
    """The network and the auxiliary task of DualRefNet, without the penalty R: L = alpha L_class + beta L_aux.

    A reconstruction: fusion and losses are known second hand, and what isn't known is taken from DualRefNet, its
    successor. With `fusion: hadamard` the vectors are multiplied (a public digest's reading of FV_image (.) FV_meta)
    instead of concatenated (as DualRefNet's authors call the same step).
    """

    @property
    def penalised(self) -> Head | None:
        return None
