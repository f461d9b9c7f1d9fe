"""What every method is: a network that reads an image, metadata or both, copes with missing ones, and classifies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dualrefnet.models.encoders import Encoded, Encoder, EncoderOutput
from dualrefnet.models.registry import METHODS
from dualrefnet.recipe import ModelSection


class Output(NamedTuple):
    """Result of a forward pass: `logits` (B, C) before the softmax; `features` (B, D), the fused vector; `hidden` (B,
    H), what enters the last layer; `reconstruction` (B, 3, 2H, 2W) in training with an auxiliary task; `heads`, logits
    of further heads by name.
    """

    logits: Tensor
    features: Tensor
    hidden: Tensor
    reconstruction: Tensor | None
    heads: dict[str, Tensor]


class Head(nn.Module):
    """Features -> 256 hidden units -> class scores: W_before (`hidden`) and W_cls (`classifier`) of equation 4."""

    def __init__(self, features: int, hidden: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.drop_features = nn.Dropout(dropout)
        self.hidden = nn.Linear(features, hidden)
        self.drop_hidden = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, features: Tensor) -> Output:
        hidden = self.hidden(self.drop_features(features)).relu()
        return Output(self.classifier(self.drop_hidden(hidden)), features, hidden, None, {})


class MissingInputs(nn.Module):
    """Learned tokens, zero at first, in place of what is missing.

    `columns` (M,) one number for each column; `places`, `taps`: for each encoder (D,) and each tap (C_k,) at every
    place.
    """

    def __init__(self, metadata_width: int, encoders: Sequence[Encoder]) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.zeros(metadata_width))
        self.places = nn.ParameterList(nn.Parameter(torch.zeros(encoder.features)) for encoder in encoders)
        self.taps = nn.ParameterList(
            nn.Parameter(torch.zeros(channels)) for encoder in encoders for channels in encoder.tap_features
        )

    def fill_metadata(self, metadata: Tensor) -> Tensor:
        """Put the tokens where (B, M) encoded metadata are missing (NaN)."""
        if not len(self.columns):
            return metadata
        return torch.where(metadata.isnan(), self.columns.to(metadata.dtype), metadata)

    def fill_images(self, encoded: Encoded) -> Encoded:
        """Put the tokens in place of missing images: those whose vectors are NaN."""
        if not len(self.places):
            return encoded
        outputs, taps = [], iter(self.taps)
        for output, place in zip(encoded.outputs, self.places, strict=True):
            missing = output.vector[:, 0].isnan()
            outputs.append(
                EncoderOutput(
                    None if output.map is None else _fill(output.map, place, missing),
                    _fill(output.vector, place, missing),
                    tuple(_fill(tap, next(taps), missing) for tap in output.taps),
                )
            )
        return Encoded(tuple(outputs))


def mark_missing(encoded: Encoded, missing: Tensor) -> Encoded:
    """Set what was encoded of the images that are missing, (B,), to NaN."""
    nan = torch.tensor(float("nan"))
    return encoded.each(lambda values: _fill(values, nan, missing))


def _fill(values: Tensor, token: Tensor, missing: Tensor) -> Tensor:
    """Replace (B, C, ...) `values` by (C,) or a single number `token` where (B,) `missing`."""
    rest = (1,) * (values.dim() - 2)
    token = token.to(values).reshape(1, -1, *rest)
    return torch.where(missing.reshape(-1, 1, *rest), token, values)


# Copies of an image: whether rows and columns are exchanged, and along which dimensions it is flipped then.
VIEWS: tuple[tuple[bool, tuple[int, ...]], ...] = (
    *((False, ()), (False, (-1,)), (False, (-2,)), (False, (-2, -1))),
    *((True, ()), (True, (-1,)), (True, (-2,)), (True, (-2, -1))),
)


def _turn_back(values: Tensor, turned: bool, flipped: tuple[int, ...]) -> Tensor:
    """Return maps (B, C, h, w) of a view as they lie in the image; vectors (B, C) stay."""
    if values.dim() < 4:
        return values
    values = values.flip(flipped)
    return values.transpose(-1, -2) if turned else values


class Architecture(BaseModel):
    """All that is needed to build a model again, weights apart; stands in `model.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int
    metadata_width: int
    classes: int
    section: ModelSection
    missing_tokens: bool = False
    missing_image: bool = True

    @property
    def backbones(self) -> tuple[str, ...]:
        return self.section.backbones


class Method(nn.Module, ABC):
    """Base of all methods: built from its `Architecture` and its encoders, it says in `classify` what it does with
    both.

    `missing` is None where every image and every column must be there.
    """

    title: ClassVar[str]
    reads_image: ClassVar[bool] = True
    reads_metadata: ClassVar[bool] = True
    reads_taps: ClassVar[bool] = False  # maps from inside the encoder

    def __init_subclass__(cls, name: str | None = None) -> None:
        super().__init_subclass__()
        if name is not None:
            info = METHODS[name]
            cls.title, cls.reads_image, cls.reads_metadata = info.title, info.reads_image, info.reads_metadata

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.views: int = architecture.section.views
        columns = architecture.metadata_width if self.reads_metadata else 0
        self.missing = (
            MissingInputs(columns, encoders if architecture.missing_image else [])
            if architecture.missing_tokens
            else None
        )

    @property
    def encoder(self) -> Encoder:
        encoder = self.encoders[0]
        assert isinstance(encoder, Encoder)
        return encoder

    @classmethod
    def maps(cls, section: ModelSection) -> bool:
        """True if the method reads the last map for its answer, not only the vector."""
        return False

    def forward(self, image: Tensor | Encoded | None, metadata: Tensor) -> Output:
        """Classify images (B, 3, H, W), or what encoders have made of them, with metadata (B, M); NaN is missing."""
        images = Encoded(()) if image is None else self.encode(image)
        output = self.answer(images, metadata)
        # The rebuilt image is only needed for its error, so inference doesn't pay for it.
        return output._replace(reconstruction=self.reconstruct(images)) if self.training else output

    def answer(self, images: Encoded, metadata: Tensor) -> Output:
        """Classify what was encoded, with the learned tokens in place of what is missing; see `forward`."""
        if self.missing is not None:
            images, metadata = self.missing.fill_images(images), self.missing.fill_metadata(metadata)
        return self.classify(images, metadata)

    @abstractmethod
    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        """Do what the method does with images that were read and metadata (B, M) in which nothing is missing."""

    def encode(self, image: Tensor | Encoded) -> Encoded:
        """Read images (B, 3, H, W) with all encoders, so that the rest can be repeated."""
        if isinstance(image, Encoded):
            return image
        # Training encodes every image and drops some afterwards, so none is missing here.
        if self.training:
            return self.read(image)
        if self.missing is None:
            return self.read_views(image)
        return mark_missing(self.read_views(image.nan_to_num()), image[:, 0, 0, 0].isnan())

    @property
    def needs_image(self) -> bool:
        """False for a method that reads no image, or has learned a token for a missing one."""
        return self.reads_image and (self.missing is None or not len(self.missing.places))

    def read(self, image: Tensor) -> Encoded:
        return Encoded(tuple(encoder(image) for encoder in self.encoders))

    def read_views(self, image: Tensor) -> Encoded:
        """Read (B, 3, H, W) images and flipped copies of them, and return the mean; maps are flipped back before."""
        if self.views == 1:
            return self.read(image)
        reads = []
        for turned, flipped in VIEWS[: self.views]:
            view = (image.transpose(-1, -2) if turned else image).flip(flipped)
            reads.append(self.read(view).each(partial(_turn_back, turned=turned, flipped=flipped)))
        return Encoded.join(reads, lambda several: torch.stack(list(several)).mean(dim=0))

    def reconstruct(self, image: Tensor | Encoded) -> Tensor | None:
        """Return the (B, 3, 2H, 2W) image, in about 0..1, that the decoder rebuilds; None without one."""
        return None

    @property
    def penalised(self) -> Head | None:
        """The last two layers on which the penalty R acts; None if the method has no such penalty."""
        return None


class VectorMethod(Method):
    """A method of the image as one vector of `features` numbers; of VGG with `vgg_head: flatten` every place of its
    map.
    """

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__(architecture, encoders)
        encoder = encoders[0]
        self.flattens = self.maps(architecture.section)
        self.places = (architecture.image_size // encoder.stride) ** 2 if self.flattens else 1
        self.features = encoder.features * self.places

    @classmethod
    def maps(cls, section: ModelSection) -> bool:
        return section.vgg_head == "flatten" and section.backbone == "vgg13"

    def vector(self, images: Encoded) -> Tensor:
        read = images.first
        if not self.flattens:
            return read.vector
        assert read.map is not None
        return read.map.flatten(1)
