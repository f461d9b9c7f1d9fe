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
from torch import nn

from dualrefnet.data.decode import decode_image
from dualrefnet.data.loader import Batch
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.preprocessing import preprocess
from dualrefnet.errors import DataError
from dualrefnet.models.inference import Normalisation, predict_logits
from dualrefnet.models.registry import load_model
from dualrefnet.recipe import ImageSection
from dualrefnet.run import Run

ImageSource = Path | str | bytes | NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one photograph. Not a diagnosis.

    Attributes:
        label: the likeliest class.
        probabilities: class -> probability.
        malignancy: sum of the probabilities of the malignant classes; None if the data set names none.
        warnings: what was missing or odd about the input.
    """

    label: str
    probabilities: dict[str, float]
    malignancy: float | None
    warnings: list[str] = field(default_factory=list)


class Predictor:
    """A trained model with its preprocessing; make one with `Predictor.load`.

    Attributes:
        classes: labels in the order of the outputs.
        model: the network, in evaluation mode.
        metadata: the fitted metadata encoder; its `fields` are what a form may ask.
        title: the data set that it learned from.
    """

    def __init__(self, model: nn.Module, description: Mapping[str, Any], device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.device = device
        self.classes: tuple[str, ...] = tuple(description["classes"])
        self.malignant: tuple[str, ...] = tuple(description["malignant"])
        self.title: str = description["dataset"]["title"]
        self.metadata = MetadataEncoder.from_json(description["metadata"])
        self._image = ImageSection.model_validate(description["preprocessing"]["image"])
        self._normalisation: Normalisation = (tuple(description["preprocessing"]["mean"]), tuple(description["preprocessing"]["std"]))

    @classmethod
    def load(cls, run: Path | str | Run, device: str = "cpu") -> Predictor:
        """Load the best epoch of a run.

        Args:
            run: the run folder.
            device: `cpu`, `cuda`, ...

        Raises:
            RunError: the folder holds no trained model.
        """
        run = run if isinstance(run, Run) else Run(Path(run))
        return cls(load_model(run.model, run.weights_file), run.model, torch.device(device))

    @property
    def reads_image(self) -> bool:
        """False for a model of the metadata alone."""
        return bool(self.model.reads_image)

    def predict(self, image: ImageSource | None = None, metadata: Mapping[str, Any] | None = None) -> Prediction:
        """Classify one photograph.

        Args:
            image: a file, its bytes, or an (H, W, 3) RGB array of uint8.
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

    def prepare(self, image: ImageSource | None) -> NDArray[np.uint8]:
        """Decode and preprocess one photograph exactly as in training, to (S, S, 3)."""
        if image is None:
            raise DataError("this model needs a photograph")
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
        images = torch.from_numpy(np.stack(prepared)).permute(0, 3, 1, 2) if self.reads_image else None  # type: ignore[arg-type]
        batch = Batch(np.arange(len(prepared)), images, torch.from_numpy(values), torch.zeros(len(prepared), dtype=torch.int64))
        predicted = predict_logits(self.model, [batch], self._image.size, self._normalisation, self.device)
        results = []
        for row, said in zip(predicted.logits.double().softmax(dim=1).tolist(), warnings, strict=True):
            probabilities = dict(zip(self.classes, row, strict=True))
            malignancy = sum(probabilities[label] for label in self.malignant) if self.malignant else None
            results.append(Prediction(max(probabilities, key=probabilities.__getitem__), probabilities, malignancy, said))
        return results

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
        warnings = []
        for form, missing, rejected in zip(metadata, encoded.missing, encoded.rejected, strict=True):
            said = ["this model reads no metadata; the form is ignored"] if form and not names else []
            said += [f"{name}: not a known category or a believable number" for name, odd in zip(names, rejected, strict=True) if odd]
            gaps = [name for name, gone in zip(names, missing, strict=True) if gone]
            warnings.append(said + ([f"missing and {how}: {', '.join(gaps)}"] if gaps else []))
        return encoded.values, warnings
