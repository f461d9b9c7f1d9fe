"""The predictor: photographs and forms in, probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dualrefnet.data.decode import decode_image
from dualrefnet.data.loader import Batch
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.preprocessing import preprocess
from dualrefnet.errors import DataError, RunError
from dualrefnet.evaluation.calibrated import Calibration
from dualrefnet.models.backbones import Encoder
from dualrefnet.models.inference import Normalisation, predict_logits
from dualrefnet.models.method import Method
from dualrefnet.models.out_of_scope import OutOfScope
from dualrefnet.models.registry import load_model
from dualrefnet.models.vectors import VectorKeeper
from dualrefnet.progress import warn
from dualrefnet.recipe import ImageSection
from dualrefnet.run import Run

ImageSource = Path | str | bytes | NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one photograph. Not a diagnosis.

    Attributes:
        label: the likeliest class.
        probabilities: class -> probability, at the run's temperature if it has one.
        malignancy: sum of the probabilities of the malignant classes; None if the data set names none.
        warnings: what was missing or odd about the input.
        out_of_scope: how unlike the training photographs the picture is; more than 1 stands among the warnings. None if no picture
            was read, or the run has no such check.
        likely: the conformal set, which holds the right class as often as `evaluation.coverage` of the run's recipe says, likeliest
            first; empty if the run has no calibration.
        refer: whether the malignancy reaches the run's threshold of referral; None if it has none.
    """

    label: str
    probabilities: dict[str, float]
    malignancy: float | None
    warnings: list[str] = field(default_factory=list)
    out_of_scope: float | None = None
    likely: tuple[str, ...] = ()
    refer: bool | None = None


class Predictor:
    """A trained model with its preprocessing; make one with `Predictor.load`.

    Attributes:
        classes: labels in the order of the outputs.
        model: the network, in evaluation mode.
        metadata: the fitted metadata encoder; its `fields` are what a form may ask.
        title: the data set that it learned from.
        out_of_scope: the check of pictures; None if the run has none.
        calibration: temperature, sets and threshold of referral; None if the run has none.
    """

    def __init__(
        self,
        model: Method,
        description: Mapping[str, Any],
        device: torch.device,
        out_of_scope: OutOfScope | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.model = model.to(device).eval()
        self.device = device
        self.classes: tuple[str, ...] = tuple(description["classes"])
        self.malignant: tuple[str, ...] = tuple(description["malignant"])
        self.title: str = description["dataset"]["title"]
        self.metadata = MetadataEncoder.from_json(description["metadata"])
        self.out_of_scope, self.calibration = out_of_scope, calibration
        self._image = ImageSection.model_validate(description["preprocessing"]["image"])
        self._normalisation: Normalisation = (tuple(description["preprocessing"]["mean"]), tuple(description["preprocessing"]["std"]))

    @classmethod
    def load(cls, run: Path | str | Run, device: str = "cpu") -> Predictor:
        """Load the best epoch of a run.

        Args:
            run: the run folder.
            device: `cpu`, `cuda`, ...

        Raises:
            RunError: the folder holds no trained model, or its check of pictures is damaged or of another model.
        """
        run = run if isinstance(run, Run) else Run(Path(run))
        model = load_model(run.model, run.weights_file)
        return cls(model, run.model, torch.device(device), _find_check(run, model), _find_calibration(run))

    @property
    def reads_image(self) -> bool:
        """False for a model of the metadata alone."""
        return bool(self.model.reads_image)

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

    def predict_many(self, images: Sequence[ImageSource | None], metadata: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        """Classify several photographs, each with its own form; see `predict`."""
        if len(images) != len(metadata):
            raise DataError(f"{len(images)} images and {len(metadata)} forms: give one form an image")
        return self.predict_arrays([self.prepare(image) if self.reads_image else None for image in images], metadata)

    def prepare(self, image: ImageSource | None) -> NDArray[np.uint8] | None:
        """Decode and preprocess one photograph exactly as in training, to (S, S, 3); None stays None where the model does without."""
        if image is None and self.model.missing is not None:
            return None
        if image is None:
            raise DataError("this model needs a photograph; one that was trained for gaps (metadata.imputation token) would do without")
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise DataError(f"an image array must be (height, width, 3) uint8 RGB, not {image.shape} {image.dtype}")
            return preprocess(image, self._image)
        return preprocess(decode_image(image), self._image)

    def predict_arrays(self, prepared: Sequence[NDArray[np.uint8] | None], metadata: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        """Classify photographs that `prepare` has made ready."""
        if not prepared:
            return []
        values, warnings = self._encode(metadata)
        images, absent = self._stack(prepared) if self.reads_image else (None, None)
        unknown = torch.zeros(len(prepared), dtype=torch.int64)
        batch = Batch(np.arange(len(prepared)), images, torch.from_numpy(values), unknown, absent=absent)
        keeper = VectorKeeper(self.model)
        predicted = predict_logits(keeper, [batch], self._image.size, self._normalisation, self.device)
        unlike = self._check(keeper, len(prepared))
        rows = predicted.logits.double().softmax(dim=1).numpy()
        likely, refer = np.zeros(rows.shape, dtype=bool), None
        if self.calibration is not None:
            likely, refer = self.calibration.prediction_sets(rows), self.calibration.refer(rows)
            rows = self.calibration.probabilities(rows)
        results = []
        for number, (row, said, score) in enumerate(zip(rows.tolist(), warnings, unlike, strict=True)):
            probabilities = dict(zip(self.classes, row, strict=True))
            order = sorted(probabilities, key=probabilities.__getitem__, reverse=True)
            malignancy = sum(probabilities[label] for label in self.malignant) if self.malignant else None
            said = said if score is None or score <= 1 else [self._unlike(score), *said]
            if self.reads_image and prepared[number] is None:
                said = ["answered without a photograph", *said]
            inside = {label for label, chosen in zip(self.classes, likely[number], strict=True) if chosen}
            in_order = tuple(label for label in order if label in inside)
            results.append(
                Prediction(order[0], probabilities, malignancy, said, score, in_order, None if refer is None else bool(refer[number]))
            )
        return results

    def _stack(self, prepared: Sequence[NDArray[np.uint8] | None]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the photographs (B, 3, S, S) and which of them aren't there, (B,); None if all are."""
        nothing = np.zeros((self._image.size, self._image.size, 3), dtype=np.uint8)
        images = torch.from_numpy(np.stack([nothing if image is None else image for image in prepared])).permute(0, 3, 1, 2)
        absent = torch.tensor([image is None for image in prepared])
        return images, absent if absent.any() else None

    def _check(self, keeper: VectorKeeper, number: int) -> list[float | None]:
        """Return how unlike the training photographs each of the pictures is that have just been read."""
        vectors = keeper.take()
        if self.out_of_scope is None or vectors is None:
            return [None] * number
        # NaN is a photograph that isn't there.
        return [None if np.isnan(score) else float(score) for score in self.out_of_scope.score(vectors)]

    def _unlike(self, score: float) -> str:
        """Say that a picture isn't like the training photographs, and how rare that is among lesions."""
        assert self.out_of_scope is not None
        share, number = self.out_of_scope.share_nearer(score), self.out_of_scope.validation
        # Rounded down: 99.96% isn't all.
        than = f"all {number}" if share >= 1 else f"{int(1000 * share) / 10:g}% of {number}"
        return (
            f"the picture doesn't look like the photographs this model was trained on (more unusual than {than} photographs of lesions "
            "that were kept for comparison); don't rely on the answer"
        )

    def _encode(self, metadata: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.float32], list[list[str]]]:
        """Encode forms; return (N, M) values and the warnings of each form."""
        names = [item.name for item in self.metadata.fields]
        unknown = sorted({name for form in metadata for name in form} - set(names))
        if unknown and names:
            raise DataError(f"unknown metadata fields: {', '.join(unknown[:5])}; this model knows: {', '.join(names)}")
        # A question that wasn't answered is an empty cell.
        table = pd.DataFrame([{name: form.get(name) for name in names} for form in metadata], dtype=object)
        encoded = self.metadata.encode(table)
        how = "imputed" if self.metadata.imputer is not None else "taken as zero"
        how = "answered by a learned token" if self.model.missing is not None else how
        warnings = []
        for form, missing, rejected in zip(metadata, encoded.missing, encoded.rejected, strict=True):
            said = ["this model reads no metadata; the form is ignored"] if form and not names else []
            said += [f"{name}: not a known category or a believable number" for name, odd in zip(names, rejected, strict=True) if odd]
            gaps = [name for name, gone in zip(names, missing, strict=True) if gone]
            warnings.append(said + ([f"missing and {how}: {', '.join(gaps)}"] if gaps else []))
        return encoded.values, warnings


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
