"""The model of a cross-fitted run: K members, each trained without one fold of the patients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from dualrefnet.models.base import Head, Method, MissingInputs, Output
from dualrefnet.models.encoders import Encoded
from dualrefnet.recipe import ModelSection

Result = TypeVar("Result")


class CrossFitted(Method):
    """The mean of the members' probabilities, of which the logits are the logarithm.

    An image whose fold is known (`Encoded.folds`) is classified by the one member that hasn't been trained on it.
    """

    def __init__(self, members: Sequence[Method]) -> None:
        # Encoders and learned tokens are the members'.
        nn.Module.__init__(self)
        self.members = nn.ModuleList(members)
        # Members average over their own.
        self.views = 1
        for name in ("title", "reads_image", "reads_metadata", "reads_taps"):
            setattr(self, name, getattr(members[0], name))

    @property
    def parts(self) -> list[Method]:
        return [member for member in self.members if isinstance(member, Method)]

    @property
    def encoders(self) -> list[nn.Module]:  # type: ignore[override]
        return [encoder for member in self.parts for encoder in member.encoders]

    @property
    def missing(self) -> MissingInputs | None:  # type: ignore[override]
        """The first member's learned tokens; each member fills in its own."""
        return self.parts[0].missing

    def maps(self, section: ModelSection) -> bool:  # type: ignore[override]
        return self.parts[0].maps(section)

    @property
    def penalised(self) -> Head | None:
        """None: every member has such layers."""
        return None

    def read(self, image: Tensor) -> Encoded:
        return Encoded(tuple(output for member in self.parts for output in member.read_views(image).outputs))

    def encode_held_out(self, image: Tensor, folds: Tensor) -> Encoded:
        """Read each image (B, 3, H, W) with the member whose fold (B,) it is in."""
        parts, order = self._each_fold(folds, lambda member, rows: member.encode(image[rows]))
        return Encoded.join(parts, lambda several: torch.cat(list(several))[order])._replace(folds=folds)

    def answer(self, images: Encoded, metadata: Tensor) -> Output:
        """Classify with the mean of all members, or each image with that of its fold."""
        if images.folds is not None:
            outputs, order = self._each_fold(
                images.folds, lambda member, rows: member.answer(images.rows(rows), metadata[rows])
            )
            found = zip(*(one[:3] for one in outputs), strict=True)
            logits, features, hidden = (torch.cat(parts)[order] for parts in found)
            return Output(logits, features, hidden, None, {})
        outputs = [member.answer(own, metadata) for member, own in zip(self.parts, self._own(images), strict=True)]
        logits = torch.stack([output.logits.log_softmax(dim=1) for output in outputs])
        features, hidden = (
            torch.cat([getattr(output, name) for output in outputs], dim=1) for name in ("features", "hidden")
        )
        return Output(logits.logsumexp(dim=0) - math.log(len(outputs)), features, hidden, None, {})

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        """See `answer`, which leaves it to each member to fill in what is missing."""
        return self.answer(images, metadata)

    def reconstruct(self, image: Tensor | Encoded) -> Tensor | None:
        images: Sequence[Tensor | Encoded] = [image] * len(self.members)
        if isinstance(image, Encoded):
            images = self._own(image)
        rebuilt = [member.reconstruct(own) for member, own in zip(self.parts, images, strict=True)]
        parts = [part for part in rebuilt if part is not None]
        return torch.stack(parts).mean(dim=0) if parts else None

    def _own(self, images: Encoded) -> list[Encoded]:
        """Return what the encoders of each member gave."""
        count = len(images.outputs) // len(self.members)
        return [Encoded(images.outputs[k * count : (k + 1) * count]) for k in range(len(self.members))]

    def _each_fold(self, folds: Tensor, compute: Callable[[Method, Tensor], Result]) -> tuple[list[Result], Tensor]:
        """Let each member compute the rows of its fold; return that, and the order that puts them back."""
        rows = [(folds == fold).nonzero()[:, 0] for fold in range(len(self.members))]
        results = [compute(member, own) for member, own in zip(self.parts, rows, strict=True) if len(own)]
        return results, torch.cat(rows).argsort()
