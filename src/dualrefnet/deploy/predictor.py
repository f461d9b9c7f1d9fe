"""What a predictor needs of a run folder."""

# also: The predictor: photographs and forms in, probabilities out, from a run folder or an exported bundle.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dualrefnet.analysis.out_of_distribution import OutOfScope
from dualrefnet.data import isic_2019, pad_ufes_20
from dualrefnet.data import synthetic as sample
from dualrefnet.data.images import MAX_BYTES, MAX_PIXELS, decode_image
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.deploy.hub import BundleMixin, is_bundle
from dualrefnet.deploy.network import TorchNetwork
from dualrefnet.errors import DataError, DependencyError, RunError
from dualrefnet.evaluation.calibration import Calibration
from dualrefnet.models.base import Method
from dualrefnet.models.encoders import Encoder
from dualrefnet.models.registry import load_model
from dualrefnet.progress import warn
from dualrefnet.recipe import ImageSection
from dualrefnet.run import Run
from dualrefnet.runtime.availability import missingness_shortcut
from dualrefnet.runtime.classifier import Classifier, Image
from dualrefnet.runtime.metadata import MetadataError
from dualrefnet.runtime.prediction import Explanation, Prediction

if TYPE_CHECKING:
    from dualrefnet.run import Run


def run_parts(run: Path | str | Run, device: str) -> dict[str, Any]:
    """Return the arguments of `Predictor` that a run stands for.

    Raises:
        RunError: the folder holds no trained model, or its check of pictures is damaged or of another model.
    """
    run = run if isinstance(run, Run) else Run(Path(run))
    description = run.model
    model = load_model(description, run.weights_file)
    image = ImageSection.model_validate(description["preprocessing"]["image"])
    mean, sd = (tuple(description["preprocessing"][name]) for name in ("mean", "std"))
    dataset, class_names = described_dataset(description["dataset"])
    told = {name: description[name] for name in ("dualrefnet", "classes", "malignant")}
    told |= {"dataset": dataset, "name": run.recipe.name, "class_names": class_names, "variant": "float32"}
    return {
        "description": told | {"measured": run.metrics if run.finished else None},
        "network": TorchNetwork(model, image.size, (mean, sd), torch.device(device)),
        "classes": description["classes"],
        "malignant": description["malignant"],
        "form": MetadataEncoder.from_json(description["metadata"]),
        "image": image,
        "reads_image": model.reads_image,
        "reads_metadata": model.reads_metadata,
        "learned_tokens": not model.needs_image,
        "out_of_scope": _find_check(run, model),
        "decision": _find_calibration(run),
    }


def described_dataset(known: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what people are told of the data, and the classes in words; runs of the first versions say less, their
    adapters the rest.

    Args:
        known: what a run's `model.json` says of the data set.
    """
    schema = {one.name: one for one in (pad_ufes_20.SCHEMA, isic_2019.SCHEMA, sample.SCHEMA)}.get(known["name"])
    citation, names = (schema.citation, dict(schema.class_names)) if schema is not None else ("", {})
    told = {name: known[name] for name in ("name", "title", "licence", "drawn", "protocol")}
    return told | {"citation": known.get("citation", citation)}, known.get("class_names", names)


def _find_calibration(run: Run) -> Calibration | None:
    """Return a run's calibration; None, and say so, if an older run has none."""
    if run.calibration_file.is_file():
        return run.calibration
    warn(
        f"{run.path} has no calibration, so its probabilities are the model's own, without sets and referral; `dualrefnet evaluate "
        f"{run.path}` makes it"
    )
    return None


def _find_check(run: Run, model: Method) -> OutOfScope | None:
    """Return a run's check of pictures; None, and say so, if an older run has none."""
    if not model.reads_image:
        return None
    if not run.out_of_scope_file.is_file():
        warn(
            f"{run.path} has no out-of-scope check, so nothing warns of a picture that shows no lesion; `dualrefnet evaluate {run.path}` "
            "makes it"
        )
        return None
    found = run.out_of_scope
    length = sum(encoder.features for encoder in model.encoders if isinstance(encoder, Encoder))
    if found.length != length:
        raise RunError(
            f"{run.out_of_scope_file} is of another model ({found.length} numbers, not {length}); make it again with `dualrefnet evaluate "
            f"{run.path}`"
        )
    return found


__all__ = ["Explanation", "ImageSource", "Prediction", "Predictor"]


ImageSource = Path | str | bytes | NDArray[np.uint8]


class Predictor(BundleMixin, Classifier):
    """A trained model with its preprocessing; make one with `Predictor.load`, or from a hub with
    `Predictor.from_pretrained`.

    Attributes:
        description: what the model is, was trained on and is worth, as plain JSON values; no photograph and no patient
            is in it.
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
            predictor = cls(**_bundle(folder, device, variant))
            predictor.bundle = folder
            return predictor
        if variant != "float32":
            raise RunError(
                f"{folder} is a run folder, which has one variant, float32; `dualrefnet export {folder}` makes others"
            )
        # Torch takes seconds to import, and a machine that serves bundles needn't have it.

        return cls(**run_parts(source, device))

    @property
    def name(self) -> str:
        """The name of the recipe that it was trained with."""
        return str(self.description["name"])

    @property
    def title(self) -> str:
        """The data set that it learned from."""
        return str(self.description["dataset"]["title"])

    @property
    def shortcut(self) -> str | None:
        """Why its answers to patients with blank metadata can't be relied on; None if they can."""
        return missingness_shortcut(self.description.get("measured") or {})

    @property
    def class_names(self) -> dict[str, str]:
        """Label -> what it stands for, in words; empty if the data set doesn't say."""
        return dict(self.description["class_names"])

    @property
    def coverage(self) -> float | None:
        """How often the set `Prediction.likely` holds the right class; None if there are no sets."""
        return None if self.decision is None else self.decision.coverage

    def decode(
        self, source: Path | str | bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
    ) -> NDArray[np.uint8]:
        """Decode a photograph of unknown origin to (H, W, 3); see `dualrefnet.data.images.decode_image`.

        Raises:
            ImageError: it can't be decoded, or is beyond the limits.
        """
        return decode_image(source, max_bytes=max_bytes, max_pixels=max_pixels)

    def prepare(self, image: ImageSource | None) -> Image | None:
        """Decode and preprocess one photograph exactly as in training, to (S, S, 3); None stays None where the model
        does without.

        Raises:
            ImageError: it can't be decoded.
            DataError: the array isn't a photograph, or there is none and the model needs one.
        """
        if image is None and not self.needs_image:
            return None
        if image is None:
            raise DataError(
                "this model needs a photograph; one that was trained for gaps (metadata.imputation token) would do without"
            )
        try:
            return self.prepare_array(image if isinstance(image, np.ndarray) else self.decode(image))
        except ValueError as error:
            raise DataError(str(error)) from None

    def check_metadata(self, form: Mapping[str, Any]) -> None:
        """Refuse a form that couldn't be read.

        Raises:
            DataError: a field is unknown, or a number isn't one.
        """
        try:
            self.form.encode_records([form] if self.reads_metadata else [])
        except MetadataError as error:
            raise DataError(str(error)) from None

    def predict(self, image: ImageSource | None = None, metadata: Mapping[str, Any] | None = None) -> Prediction:
        """Classify one photograph.

        Args:
            image: a file, its bytes, or an (H, W, 3) RGB array of uint8; None only for models that do without.
            metadata: any subset of the fields, such as `{"age": 61, "region": "FACE"}`; what is absent is missing.

        Raises:
            ImageError: the image can't be decoded.
            DataError: a field is unknown, a number isn't one, or the model needs an image.
        """
        return self.predict_many([image], [metadata or {}])[0]

    def predict_many(
        self, images: Sequence[ImageSource | None], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Prediction]:
        """Classify several photographs, each with its own form; see `predict`."""
        if len(images) != len(metadata):
            raise DataError(f"{len(images)} images and {len(metadata)} forms: give one form an image")
        return self.predict_arrays([self.prepare(image) if self.reads_image else None for image in images], metadata)

    def predict_lesion(self, images: Sequence[ImageSource], metadata: Mapping[str, Any] | None = None) -> Prediction:
        """Classify one lesion of which there are several photographs: the model's probabilities for each are averaged.

        Args:
            images: see `predict`; may be empty for models that do without.
            metadata: one form for the lesion.
        """
        return self.predict_lesions(
            [[self.prepare(image) for image in images] if self.reads_image else []], [metadata or {}]
        )[0]

    def predict_arrays(
        self, prepared: Sequence[Image | None], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Prediction]:
        """Classify photographs that `prepare` has made ready."""
        return self.predict_lesions([[picture] for picture in prepared], metadata)

    def predict_lesions(
        self, prepared: Sequence[Sequence[Image | None]], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Prediction]:
        """Classify lesions, each with the photographs that `prepare` has made ready and with one form."""
        try:
            return self.classify(prepared, metadata)
        except ValueError as error:
            raise DataError(str(error)) from None

    def explain(
        self, image: ImageSource | None, metadata: Mapping[str, Any] | None = None, label: str | None = None
    ) -> Explanation:
        """Say what an answer rests on, by covering places of the photograph and leaving out answers, one at a time.

        Args:
            image: see `predict`.
            metadata: see `predict`.
            label: the class that is asked about; None: the likeliest.

        Raises:
            ImageError: the image can't be decoded.
            DataError: as `predict`, or the class is unknown.
        """
        return self.explain_array(self.prepare(image) if self.reads_image else None, metadata or {}, label)

    def explain_array(
        self, prepared: Image | None, metadata: Mapping[str, Any], label: str | None = None
    ) -> Explanation:
        """Explain the answer to a photograph that `prepare` has made ready; see `explain`."""
        try:
            return self.explain_prepared(prepared, metadata, label)
        except ValueError as error:
            raise DataError(str(error)) from None


def _bundle(folder: Path, device: str, variant: str) -> dict[str, Any]:
    try:
        from dualrefnet.runtime.bundle import bundle_parts, read_description
    except ImportError:
        raise DependencyError(
            f"{folder} is a bundle, which needs onnxruntime: pip install 'dualrefnet[deploy]'"
        ) from None
    try:
        description = read_description(folder)
        parts = bundle_parts(folder, description, variant, device)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise RunError(f"{folder} can't be loaded: {error}") from None
    told = ("name", "dualrefnet", "dataset", "classes", "class_names", "malignant", "measured")
    return {"description": {name: description.get(name) for name in told} | {"variant": variant}, **parts}
