"""What every method is: a network that reads an image, metadata or both, copes with missing ones, and classifies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dualrefnet.models.encoders import Encoded, Encoder, EncoderOutput
from dualrefnet.models.registry import METHODS
from dualrefnet.recipe import ModelSection


class Output(NamedTuple):
    """Result of a forward pass.

    Attributes:
        logits: (B, C) class scores before the softmax.
        features: (B, D) the vector that is classified, fused from image and metadata.
        reconstruction: (B, 3, 2H, 2W) rebuilt image in about 0..1; None without an auxiliary task, and outside
            training.
        heads: (B, C) logits of additional heads, by name; each gets a cross-entropy term of its own.
    """

    logits: Tensor
    features: Tensor
    reconstruction: Tensor | None
    heads: dict[str, Tensor]


class Head(nn.Module):
    """Features -> 256 hidden units -> class scores (the two layers in the sum of equation 4).

    Attributes:
        hidden: the first layer; its rows are W_before.
        classifier: the second layer; its rows are W_cls.
    """

    def __init__(self, features: int, hidden: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.drop_features = nn.Dropout(dropout)
        self.hidden = nn.Linear(features, hidden)
        self.drop_hidden = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, D) to logits (B, C)."""
        return self.classifier(self.drop_hidden(self.hidden(self.drop_features(features)).relu()))  # type: ignore[no-any-return]


class MissingInputs(nn.Module):
    """What a method reads in place of what is missing.

    All tokens start at zero: for a standardised number its mean, for categories none.

    Attributes:
        columns: (M,) one number for each column of the encoded metadata; none if the method reads none.
        places: for each encoder (D,), in place of its vector and of every place of its map; none if an image is never
            missing.
        taps: for each tap of each encoder (C_k,), in place of every place of that map.
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
    """Set what was encoded of missing images to NaN.

    Args:
        encoded: of B images.
        missing: (B,) which of them are missing.
    """
    nan = torch.tensor(float("nan"))
    return encoded.each(lambda values: _fill(values, nan, missing))


def _fill(values: Tensor, token: Tensor, missing: Tensor) -> Tensor:
    """Replace (B, C, ...) `values` by (C,) or a single number `token` where (B,) `missing`."""
    rest = (1,) * (values.dim() - 2)
    token = token.to(values).reshape(1, -1, *rest)
    return torch.where(missing.reshape(-1, 1, *rest), token, values)


class Architecture(BaseModel):
    """All that is needed to build a model again, weights apart; stands in `model.json`.

    Attributes:
        image_size: side of the input, pixels.
        metadata_width: M, length of encoded metadata.
        classes: C.
        section: method, backbone and their settings.
        missing_tokens: learned tokens stand for what is missing.
        missing_image: one of them stands for an image, so that the model answers without one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int
    metadata_width: int
    classes: int
    section: ModelSection
    missing_tokens: bool = False
    missing_image: bool = True

    @property
    def backbones(self) -> tuple[str, ...]:
        """The image encoders that the method may have, in order: one, or the members of an ensemble."""
        if self.section.method != "ensemble":
            return (self.section.backbone,)
        return self.section.members or (self.section.backbone,) * 3


class Method(nn.Module, ABC):
    """Base of all methods.

    A method is built from its `Architecture` and its encoders, and says in `classify` what it does with image and
    metadata.

    Attributes:
        title: name in tables; like the next two, of `METHODS`.
        reads_image: False for a method of the metadata alone.
        reads_metadata: False for a method of the image alone.
        encoders: the image encoders; `reads_image` says whether there are any.
        missing: learned tokens for what is missing; None: every image and every column must be there.
    """

    title: ClassVar[str]
    reads_image: ClassVar[bool] = True
    reads_metadata: ClassVar[bool] = True

    def __init_subclass__(cls, name: str | None = None) -> None:
        super().__init_subclass__()
        if name is not None:
            info = METHODS[name]
            cls.title, cls.reads_image, cls.reads_metadata = info.title, info.reads_image, info.reads_metadata

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        columns = architecture.metadata_width if self.reads_metadata else 0
        self.missing = (
            MissingInputs(columns, encoders if architecture.missing_image else [])
            if architecture.missing_tokens
            else None
        )

    @property
    def encoder(self) -> Encoder:
        """The first image encoder."""
        encoder = self.encoders[0]
        assert isinstance(encoder, Encoder)
        return encoder

    @classmethod
    def taps(cls, section: ModelSection) -> bool:
        """True if the method reads maps from inside the encoder."""
        return False

    @classmethod
    def maps(cls, section: ModelSection) -> bool:
        """True if the method reads the last map for its answer, not only the vector."""
        return False

    def forward(self, image: Tensor | Encoded | None, metadata: Tensor) -> Output:
        """Classify images with their metadata.

        Args:
            image: (B, 3, H, W), normalised for the first encoder, or what the encoders have made of them; None for a
                method that reads no image. With `missing`, an image of NaN is missing.
            metadata: (B, M) encoded metadata; with `missing`, NaN is a missing value.
        """
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
        """Do what the method does with images that were read and metadata in which nothing is missing; see `forward`.

        Args:
            images: what each encoder gave; empty for a method that reads no image.
            metadata: (B, M).
        """

    def encode(self, image: Tensor | Encoded) -> Encoded:
        """Read (B, 3, H, W) images, normalised for the first encoder, with all encoders; `forward` takes the result in
        their place.

        What depends on the metadata alone can then be computed many times for one encoding. What was encoded before
        passes through.
        """
        if isinstance(image, Encoded):
            return image
        if self.missing is None:
            return self.read(image)
        # Training encodes every image and drops some afterwards, so none is missing here.
        return (
            self.read(image)
            if self.training
            else mark_missing(self.read(image.nan_to_num()), image[:, 0, 0, 0].isnan())
        )

    @property
    def needs_image(self) -> bool:
        """False for a method that reads no image, or has learned a token for a missing one."""
        return self.reads_image and (self.missing is None or not len(self.missing.places))

    def read(self, image: Tensor) -> Encoded:
        """Read (B, 3, H, W) images with all encoders."""
        return Encoded(tuple(encoder(image) for encoder in self.encoders))

    def reconstruct(self, image: Tensor | Encoded) -> Tensor | None:
        """Return the (B, 3, 2H, 2W) image that the auxiliary task's decoder rebuilds, in about 0..1; None if there is
        no
        decoder.
        """
        return None

    @property
    def penalised(self) -> Head | None:
        """The last two layers on which the penalty R acts; None if the method has no such penalty."""
        return None
