"""What every method is: a network that reads an image, a form or both, and says so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dualrefnet.models.backbones import Encoded, Encoder
from dualrefnet.models.head import Head
from dualrefnet.models.missing import MissingInputs, mark_absent
from dualrefnet.models.output import Output
from dualrefnet.recipe import ModelSection


class Architecture(BaseModel):
    """All that is needed to build a model again, weights apart; stands in `model.json`.

    Attributes:
        image_size: side of the input, pixels.
        metadata_width: M, length of an encoded form.
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

    A method is built from its `Architecture` and its encoders, and says in `classify` what it does with an image and a form.

    Attributes:
        title: name in tables.
        reference: where the method was published.
        reconstruction: what isn't known of the published system and was filled in here; None if it is known.
        reads_image: False for a method of the metadata alone.
        reads_metadata: False for a method of the image alone.
        needs_metadata: False for a method that also works without a form (metadata tier M0).
        encoders: the image encoders; `reads_image` says whether there are any.
        missing: learned tokens for what is missing; None: every photograph and every column must be there.
    """

    title: ClassVar[str]
    reference: ClassVar[str]
    reconstruction: ClassVar[str | None] = None
    reads_image: ClassVar[bool] = True
    reads_metadata: ClassVar[bool] = True
    needs_metadata: ClassVar[bool] = True

    def __init__(self, architecture: Architecture, encoders: list[Encoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        columns = architecture.metadata_width if self.reads_metadata else 0
        self.missing = MissingInputs(columns, encoders if architecture.missing_image else []) if architecture.missing_tokens else None

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
        """Classify images with their forms.

        Args:
            image: (B, 3, H, W), normalised for the first encoder, or what the encoders have made of them; None for a method that reads
                no image. With `missing`, a photograph of NaN isn't there.
            metadata: (B, M) encoded forms; with `missing`, NaN is a gap.
        """
        images = Encoded(()) if image is None else self.encode(image)
        output = self.answer(images, metadata)
        # The rebuilt image is only needed for its error, so inference doesn't pay for it.
        return output._replace(reconstruction=self.reconstruct(images)) if self.training else output

    def answer(self, images: Encoded, metadata: Tensor) -> Output:
        """Classify what was encoded, with the learned tokens in place of what is missing; see `forward`."""
        if self.missing is not None:
            images, metadata = self.missing.photograph(images), self.missing.form(metadata)
        return self.classify(images, metadata)

    @abstractmethod
    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        """Do what the method does with images that were read and forms in which nothing is missing; see `forward`.

        Args:
            images: what each encoder gave; empty for a method that reads no image.
            metadata: (B, M).
        """

    def encode(self, image: Tensor | Encoded) -> Encoded:
        """Read (B, 3, H, W) images, normalised for the first encoder, with all encoders; `forward` takes the result in their place.

        What depends on the metadata alone can then be asked many times of one reading. What was encoded before passes through.
        """
        if isinstance(image, Encoded):
            return image
        if self.missing is None:
            return self.read(image)
        # Training encodes every image and drops some afterwards, so none is missing here.
        return self.read(image) if self.training else mark_absent(self.read(image.nan_to_num()), image[:, 0, 0, 0].isnan())

    @property
    def needs_image(self) -> bool:
        """False for a method that reads no image, or has learned a token for a missing one."""
        return self.reads_image and (self.missing is None or not len(self.missing.places))

    def read(self, image: Tensor) -> Encoded:
        """Read (B, 3, H, W) images with all encoders."""
        return Encoded(tuple(encoder(image) for encoder in self.encoders))

    def reconstruct(self, image: Tensor | Encoded) -> Tensor | None:
        """Return the (B, 3, 2H, 2W) image that the auxiliary task's decoder rebuilds, in about 0..1; None if there is no decoder."""
        return None

    @property
    def penalised(self) -> Head | None:
        """The last two layers on which the penalty R acts; None if the method has no such penalty."""
        return None
