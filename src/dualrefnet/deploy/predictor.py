"""The predictor: images and metadata in, predictions out, from a run folder or an exported bundle.

A bundle is predicted without torch; of a run folder it is loaded when the run is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps
from PIL.Image import Image as PillowImage

from dualrefnet.data.images import decode_image
from dualrefnet.deploy.hub import BundleMixin, check_bundle, is_bundle
from dualrefnet.errors import DataError, DependencyError, RunError, install_hint
from dualrefnet.progress import warn
from dualrefnet.runtime.availability import missingness_shortcut
from dualrefnet.runtime.bundle import bundle_parts
from dualrefnet.runtime.classifier import Classifier
from dualrefnet.runtime.images import MAX_BYTES, MAX_PIXELS
from dualrefnet.runtime.prediction import Explanation, Prediction
from dualrefnet.runtime.preprocessing import Image

if TYPE_CHECKING:
    import pandas as pd

    from dualrefnet.run import Run

__all__ = ["Explanation", "ImageSource", "Prediction", "Predictor"]

# A file, its bytes, an array (H, W, 3) of 0..255 or nested lists like it, or an image of Pillow.
ImageSource = Path | str | bytes | NDArray[np.integer] | Sequence[Any] | PillowImage


class Predictor(BundleMixin, Classifier):
    """A trained model with its preprocessing.

    Make one with `Predictor.load`, or from the Hugging Face Hub with `Predictor.from_pretrained`.

    Attributes:
        description: name, data set, classes and measures of the model, as plain JSON values; no image and no patient is
            in it.
    """

    def __init__(self, description: Mapping[str, Any], **parts: Any) -> None:
        super().__init__(**parts)
        self.description = dict(description)

    @classmethod
    def load(cls, source: Path | str | Run, device: str = "cpu", variant: str = "float32") -> Predictor:
        """Load a model.

        Args:
            source: a run folder, of which the best epoch is taken, or the folder of an exported bundle.
            device: `cpu`, `cuda`, ...
            variant: `float32`, or `int8` of a bundle that has it.

        Raises:
            RunError: the folder holds no model, or one of its files is damaged or of another model.
            DependencyError: it is a bundle, and onnxruntime isn't installed.
        """
        folder = Path(source) if isinstance(source, Path | str) else source.path
        if is_bundle(folder):
            predictor = cls(**_bundle_parts(folder, device, variant))
            predictor.bundle = folder
            return predictor
        if variant != "float32":
            raise RunError(f"{folder} is a run folder, with float32 alone; `dualrefnet export {folder}` makes int8")
        # Torch takes seconds to import, and a machine that serves bundles needn't have it.
        from dualrefnet.deploy.network import run_parts

        return cls(**run_parts(source, device))

    @property
    def name(self) -> str:
        """The name of the recipe that it was trained with."""
        return str(self.description["name"])

    @property
    def title(self) -> str:
        """The title of the data set that it was trained on."""
        return str(self.description["dataset"]["title"])

    @property
    def shortcut(self) -> str | None:
        """Why it must not be used where metadata may be missing; None if it may."""
        return missingness_shortcut(self.description.get("measured") or {})

    @property
    def class_names(self) -> dict[str, str]:
        """Label -> name in words; empty if the data set has none."""
        return dict(self.description["class_names"])

    @property
    def coverage(self) -> float | None:
        """How often the set `Prediction.likely` is to hold the right class; None if there are no sets."""
        return None if self.decision is None else self.decision.coverage

    def decode(
        self, source: Path | str | bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
    ) -> NDArray[np.uint8]:
        """Decode an image of unknown origin to (H, W, 3); see `dualrefnet.data.images.decode_image`.

        Raises:
            ImageError: it can't be decoded, or is beyond the limits.
        """
        return decode_image(source, max_bytes=max_bytes, max_pixels=max_pixels)

    def prepare(self, image: ImageSource | None) -> Image | None:
        """Decode and preprocess an image exactly as in training, to (S, S, 3); None stays None.

        Raises:
            ImageError: it can't be decoded.
            DataError: the array isn't an image, or there is none and the model needs one.
        """
        with _data_errors():
            if image is None:
                return self._images([None])[0]
            if isinstance(image, Path | str | bytes):
                return self.prepare_array(self.decode(image))
            return self.prepare_array(_to_array(image))

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Refuse invalid metadata.

        Raises:
            DataError: a field is unknown, or a value is invalid.
        """
        with _data_errors():
            self.encoder.encode_records([metadata] if self.reads_metadata else [])

    @overload
    def predict(self, image: pd.DataFrame) -> pd.DataFrame: ...

    @overload
    def predict(self, image: ImageSource | None = None, metadata: Mapping[str, Any] | None = None) -> Prediction: ...

    def predict(
        self, image: ImageSource | pd.DataFrame | None = None, metadata: Mapping[str, Any] | None = None
    ) -> Prediction | pd.DataFrame:
        """Classify one image, or the cases of a table.

        Args:
            image: a file, its bytes, RGB values (H, W, 3) of 0..255, or an image of Pillow; None only for models that
                do without. Or a DataFrame with a row a case: its file in the column `image`, and fields; then the
                result is a DataFrame with the columns of `dualrefnet predict`.
            metadata: any subset of the fields, such as `{"age": 61, "region": "FACE"}`; the others are missing.

        Raises:
            ImageError: the image can't be decoded.
            DataError: a field is unknown, a value is invalid, or the model needs an image.
        """
        if hasattr(image, "columns"):
            from dualrefnet.deploy.batch import predict_table

            if metadata is not None:
                raise DataError("the metadata of a DataFrame's cases are its columns")
            return predict_table(self, cast("pd.DataFrame", image))
        return self.predict_many([image], [metadata or {}])[0]

    def __repr__(self) -> str:
        reads = [what for what, read in (("image", self.reads_image), ("metadata", bool(self.fields))) if read]
        return f"Predictor({self.name}: {' and '.join(reads)} -> {', '.join(self.classes)}; {self.title})"

    def predict_many(
        self, images: Sequence[ImageSource | None], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Prediction]:
        """Classify several images, each with its own metadata; see `predict`."""
        if len(images) != len(metadata):
            raise DataError(f"{len(images)} images and {len(metadata)} records of metadata: give each image one")
        return self.predict_arrays([self.prepare(image) if self.reads_image else None for image in images], metadata)

    def predict_lesion(self, images: Sequence[ImageSource], metadata: Mapping[str, Any] | None = None) -> Prediction:
        """Classify one lesion with several images, over which the probabilities are averaged.

        Args:
            images: see `predict`; may be empty for models that do without.
            metadata: of the lesion.
        """
        prepared = [self.prepare(image) for image in images] if self.reads_image else []
        return self.predict_lesions([prepared], [metadata or {}])[0]

    def predict_arrays(
        self, prepared: Sequence[Image | None], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Prediction]:
        """Classify images from `prepare`."""
        return self.predict_lesions([[image] for image in prepared], metadata)

    def predict_lesions(
        self, prepared: Sequence[Sequence[Image | None]], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Prediction]:
        """Classify lesions, each with images from `prepare` and one record of metadata."""
        with _data_errors():
            return self.classify(prepared, metadata)

    def explain(
        self, image: ImageSource | None, metadata: Mapping[str, Any] | None = None, label: str | None = None
    ) -> Explanation:
        """Explain a prediction by occluding patches of the image and leaving out values, one at a time.

        Args:
            image: see `predict`.
            metadata: see `predict`.
            label: the class to explain; None: the likeliest.

        Raises:
            ImageError: the image can't be decoded.
            DataError: as `predict`, or the class is unknown.
        """
        return self.explain_array(self.prepare(image) if self.reads_image else None, metadata or {}, label)

    def explain_array(
        self, prepared: Image | None, metadata: Mapping[str, Any], label: str | None = None
    ) -> Explanation:
        """Explain the prediction for an image from `prepare`; see `explain`."""
        with _data_errors():
            return self.explain_prepared(prepared, metadata, label)


def _to_array(image: Any) -> NDArray[np.uint8]:
    """Return an image of Pillow, an array or nested lists as an array; what isn't 0..255 is left to be refused."""
    if isinstance(image, PillowImage):
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    array = np.asarray(image)
    whole = array.dtype.kind in "iu" and array.size > 0 and array.min() >= 0 and array.max() <= 255
    return array.astype(np.uint8) if whole else array


@contextmanager
def _data_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(str(error)) from None


def refuse_shortcut(shortcut: str | None, model: Path | str, accepted: bool) -> None:
    """Refuse to export or serve a model to which missing metadata mean "benign" (see `missingness_shortcut`), or of
    which this was never measured; only warn if `accepted`.
    """
    if shortcut is not None and not accepted:
        raise RunError(
            f"{model}: {shortcut}. Train with metadata.tier=M2, metadata.imputation=token and modality_dropout, as the "
            "shipped recipes do; or, for research alone, pass --accept-missingness-shortcut, and everything made of "
            "the model carries this warning"
        )
    if shortcut is not None:
        warn(f"{model}: {shortcut}")


def _bundle_parts(folder: Path, device: str, variant: str) -> dict[str, Any]:
    description = check_bundle(folder)
    try:
        parts = bundle_parts(folder, description, variant, device)
    except ImportError:
        raise DependencyError(f"{folder} is a bundle: it needs onnxruntime: {install_hint('deploy')}") from None
    except (ValueError, OSError) as error:
        raise RunError(f"{folder} can't be loaded: {error}") from None
    if parts["reads_image"] and parts["out_of_scope"] is None:
        warn(f"{folder} has no out-of-distribution score, so images without a lesion get no warning; export it again")
    names = ("name", "dualrefnet", "dataset", "classes", "class_names", "malignant", "measured")
    return {"description": {name: description.get(name) for name in names} | {"variant": variant}, **parts}
