"""AuxNet (ISBI 2024), the direct ancestor of DualRefNet."""

from __future__ import annotations

from dualrefnet.models.dualrefnet import DualRefNet
from dualrefnet.models.head import Head


class AuxNet(DualRefNet):
    """The network and the auxiliary task of DualRefNet, without the penalty R: L = alpha L_class + beta L_aux.

    A reconstruction: fusion and losses are known second hand, and what isn't known is taken from DualRefNet, its successor.
    With `fusion: hadamard` the vectors are multiplied (a public digest's reading of FV_image (.) FV_meta) instead of
    concatenated (as DualRefNet's authors call the same step).
    """

    title = "AuxNet"
    reference = "AuxNet, ISBI 2024, arXiv 2402.10454"
    reconstruction = "metadata network, decoder and optimizer aren't published where we could read them; DualRefNet's are used"

    @property
    def penalised(self) -> Head | None:
        """None: the penalty is what DualRefNet added."""
        return None
