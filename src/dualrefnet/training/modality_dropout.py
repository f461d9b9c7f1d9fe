"""Modality dropout: in training fields, metadata and images are missing at random, so that the model copes with what is
missing later.

Neverova et al. 2016 drop whole modalities of random cases. Here every case is classified with both modalities, without
metadata and without its image, and each answer has its share of the loss: the mean over which modality would have been
dropped, with less noise and hardly any cost, since the image is encoded once. Fields are dropped by a share that is
itself drawn, so that every amount is met as often. With `pattern` a case takes over what is missing in another one:
then what is missing says less about the class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualrefnet.models.base import Method, Output, mark_missing
from dualrefnet.models.encoders import Encoded
from dualrefnet.recipe import ModalityDropoutSection
from dualrefnet.runtime.availability import IMAGE_ONLY, METADATA_ONLY
from dualrefnet.runtime.metadata import Span


def draw_missing(
    metadata: NDArray[np.float32], spans: Sequence[Span], section: ModalityDropoutSection, seed: int, epoch: int
) -> NDArray[np.bool_]:
    """Draw which columns of encoded metadata (N, M; NaN where a field is missing) are hidden in one epoch, (N, M)."""
    count, fields = len(metadata), len(spans)
    # Each choice has its own stream, so changing one setting leaves the other choices as they were.
    streams = [np.random.default_rng([seed, epoch, 100 + number]) for number in range(4)]
    known = np.zeros((count, fields), dtype=bool)
    for index, span in enumerate(spans):
        # A category of which the training rows had no value has no column, and can't be known.
        known[:, index] = (span.stop > span.start) & ~np.isnan(metadata[:, span.start : span.stop]).any(axis=1)
    share = streams[0].random(count) * (streams[1].random(count) < section.fields)
    hidden = streams[2].random((count, fields)) < share[:, None]
    others = streams[3].permutation(count)
    hidden |= ~known[others] & (streams[3].random(count) < section.pattern)[:, None]
    columns = np.zeros(metadata.shape, dtype=bool)
    for index, span in enumerate(spans):
        columns[:, span.start : span.stop] = hidden[:, index, None]
    return columns


def modality_shares(method: Method, section: ModalityDropoutSection) -> dict[str, float]:
    """Return the share of the classification loss that each single modality has; none if one is read."""
    if method.missing is None or not method.reads_metadata or not method.reads_image:
        return {}
    shares = {IMAGE_ONLY: section.metadata, METADATA_ONLY: section.image}
    return {name: share for name, share in shares.items() if share}


class ModalityViews(nn.Module):
    """A method that classifies with both modalities and each alone: one module, one pass for data parallelism."""

    def __init__(self, method: Method, modalities: Sequence[str]) -> None:
        super().__init__()
        self.method, self.modalities = method, tuple(modalities)

    def forward(self, image: Tensor | Encoded | None, metadata: Tensor) -> tuple[Output, dict[str, Output]]:
        """Return the answer to both modalities, and those to the single ones by name; see `Method.forward`."""
        images = Encoded(()) if image is None else self.method.encode(image)
        single = {}
        if IMAGE_ONLY in self.modalities:
            single[IMAGE_ONLY] = self.method.answer(images, torch.full_like(metadata, torch.nan))
        if METADATA_ONLY in self.modalities:
            missing = torch.ones(len(metadata), dtype=torch.bool, device=metadata.device)
            single[METADATA_ONLY] = self.method.answer(mark_missing(images, missing), metadata)
        return self.method(images, metadata), single
