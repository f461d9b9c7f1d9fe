"""A model as torch trained it, computed by torch: the network of a run folder."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dualrefnet.data.loader import Batch
from dualrefnet.models.inference import Normalisation, predict_logits
from dualrefnet.models.method import Method
from dualrefnet.models.vectors import VectorKeeper
from dualrefnet.runtime.classifier import Answered


class TorchNetwork:
    """Computes a trained model; see `dualrefnet.runtime.classifier.Network`.

    Attributes:
        model: the network, in evaluation mode.
    """

    def __init__(self, model: Method, size: int, normalisation: Normalisation, device: torch.device) -> None:
        """Put a model to work.

        Args:
            model: as it was trained.
            size: side of its input, pixels.
            normalisation: mean and sd of the encoder's weights.
            device: where it shall compute.
        """
        self.model = model.to(device).eval()
        self._keeper = VectorKeeper(self.model)
        self._size, self._normalisation, self._device = size, normalisation, device

    def __call__(self, images: NDArray[np.uint8] | None, absent: NDArray[np.bool_] | None, forms: NDArray[np.float32]) -> Answered:
        """Answer; see `Network`."""
        pictures = None if images is None else torch.from_numpy(images).permute(0, 3, 1, 2)
        gone = torch.from_numpy(absent) if absent is not None and absent.any() else None
        unknown = torch.zeros(len(forms), dtype=torch.int64)
        batch = Batch(np.arange(len(forms)), pictures, torch.from_numpy(forms), unknown, absent=gone)
        logits = predict_logits(self._keeper, [batch], self._size, self._normalisation, self._device).logits
        return Answered(logits.numpy(), self._keeper.take())
