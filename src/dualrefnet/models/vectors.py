"""What image encoders make of a picture, kept beside the answer, so that a picture is read once for both."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualrefnet.models.backbones import Encoded
from dualrefnet.models.method import Method
from dualrefnet.models.output import Output


class VectorKeeper(nn.Module):
    """A method that keeps the vectors of what it classifies, so that a picture is encoded once for both; in evaluation only.

    Args:
        method: that is asked.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        # A new module is in training, and would put the method into it when it is put back into the mode that it had.
        self.train(method.training)
        self._kept: list[NDArray[np.float32]] = []

    def forward(self, image: Tensor | Encoded | None, metadata: Tensor) -> Output:
        """Classify as the method does."""
        if image is not None:
            image = self.method.encode(image)
            self._kept.append(joined_vectors(image))
        output: Output = self.method(image, metadata)
        return output

    def take(self) -> NDArray[np.float32] | None:
        """Return the vectors (N, D) since the last call; None if no image was read."""
        kept, self._kept = self._kept, []
        return np.concatenate(kept) if kept else None


def joined_vectors(read: Encoded) -> NDArray[np.float32]:
    """Return the vectors of all encoders beside each other, (B, D)."""
    return torch.cat([output.vector.float() for output in read.outputs], dim=1).cpu().numpy()
