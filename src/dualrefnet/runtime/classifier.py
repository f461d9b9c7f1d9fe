"""The classifier: decoded images and metadata in, predictions out, whatever computes the network."""

# ruff: noqa: B905 (zip of Python 3.9 can't be strict)
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .availability import Thresholds, share_given
from .calibration import Decision, apply_temperature, softmax
from .metadata import Field, MetadataTransform
from .out_of_distribution import OutOfDistributionScore
from .prediction import Explanation, Prediction, occlude, saliency_map
from .preprocessing import Image, ImageSettings, preprocess

# Images that the network reads at once for an explanation, which needs many of them.
BATCH = 32


class NetworkOutput(NamedTuple):
    logits: NDArray[np.floating]  # (N, C)
    # (N, D), the image encoders' vectors, NaN where the image is missing; None if it reads no image.
    vectors: NDArray[np.floating] | None


class Network(Protocol):
    """Computes images (N, S, S, 3) or None, which of them are missing (N,) or None, and encoded metadata (N, M)."""

    def __call__(
        self, images: Image | None, missing: NDArray[np.bool_] | None, metadata: NDArray[np.float32], /
    ) -> NetworkOutput: ...


class Classifier:
    """A trained model with preprocessing, encoder, out-of-distribution score and thresholds (None: there are none)."""

    def __init__(
        self,
        network: Network,
        classes: Sequence[str],
        malignant: Sequence[str],
        encoder: MetadataTransform,
        image: ImageSettings,
        *,
        reads_image: bool,
        reads_metadata: bool,
        learned_tokens: bool,
        out_of_scope: OutOfDistributionScore | None = None,
        decision: Decision | None = None,
    ) -> None:
        self.network, self.encoder, self.image = network, encoder, image
        self.classes, self.malignant = tuple(classes), tuple(malignant)
        self.reads_image, self.reads_metadata, self.learned_tokens = reads_image, reads_metadata, learned_tokens
        self.out_of_scope, self.decision = out_of_scope, decision

    @property
    def needs_image(self) -> bool:
        """False for a model that predicts without an image."""
        return self.reads_image and not self.learned_tokens

    @property
    def size(self) -> int:
        return self.image.size

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.encoder.fields if self.reads_metadata else ()

    def categories(self, name: str) -> tuple[str, ...]:
        """Return the categories of a field; none for a number."""
        self.encoder.check_names([{name: None}])
        return self.encoder.categories[[field.name for field in self.encoder.fields].index(name)]

    def prepare_array(self, image: NDArray[np.uint8]) -> Image:
        """Preprocess a decoded image (H, W, 3) uint8 RGB exactly as in training, to (S, S, 3)."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"an image array must be (height, width, 3) uint8 RGB, not {image.shape} {image.dtype}")
        return preprocess(image, self.image)

    def classify(
        self, lesions: Sequence[Sequence[Image | None]], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Prediction]:
        """Classify lesions with images from `prepare_array` (None: missing) and any subset of the fields.

        Probabilities are averaged over the images; temperature, set and referral then act on the mean.
        """
        if len(lesions) != len(metadata):
            raise ValueError(f"{len(lesions)} lesions and {len(metadata)} records of metadata: give each lesion one")
        if not lesions:
            return []
        encoded = self.encoder.encode_records(self._read(metadata))
        images = [self._images(lesion) for lesion in lesions]
        counts = [len(lesion) for lesion in images]
        starts = np.cumsum([0, *counts[:-1]])
        each, vectors = self._predict([one for lesion in images for one in lesion], encoded.values.repeat(counts, 0))
        probabilities = np.add.reduceat(each, starts, axis=0) / np.array(counts)[:, None]
        scores = np.full(len(each), np.nan)
        if self.out_of_scope is not None and vectors is not None:
            scores = self.out_of_scope.score(vectors)
        decided = None
        if self.decision is not None:
            seen = [self.reads_image and lesion[0] is not None for lesion in images]
            decided = self.decision.decide(probabilities, seen, share_given(encoded.missing, self.reads_metadata))
            probabilities = decided.probabilities
        predictions = []
        for index, (row, lesion_scores) in enumerate(zip(probabilities, np.split(scores, starts[1:]))):
            order = [self.classes[place] for place in np.argsort(-row, kind="stable")]
            by_class = dict(zip(self.classes, row.tolist()))
            malignancy = sum(by_class[label] for label in self.malignant) if self.malignant else None
            known = lesion_scores[~np.isnan(lesion_scores)]
            warnings = self._image_warnings(images[index], lesion_scores)
            prediction = Prediction(
                order[0], by_class, malignancy, warnings, known.max().item() if len(known) else None
            )
            if decided is not None:
                thresholds, inside = decided.thresholds[index], decided.sets[index]
                refer = None if decided.refer is None else bool(decided.refer[index])
                warnings += self._threshold_warnings(order[0], thresholds, refer)
                prediction = replace(
                    prediction,
                    likely=tuple(label for label in order if inside[self.classes.index(label)]),
                    refer=refer,
                    availability=thresholds.group.name if thresholds.images else "",
                )
            warnings += self._metadata_warnings(encoded.missing[index], metadata[index])
            predictions.append(prediction)
        return predictions

    def explain_prepared(
        self, image: Image | None, metadata: Mapping[str, Any], label: str | None = None
    ) -> Explanation:
        """Explain a class (None: the likeliest) by predictions with patches of the image and values left out."""
        if label is not None and label not in self.classes:
            raise ValueError(f"no class is called {label[:40]!r}; there are: {', '.join(self.classes)}")
        [image], [metadata] = self._images([image]), self._read([metadata])
        missing = self.encoder.encode_records([metadata]).missing
        given = [field.name for field, gap in zip(self.encoder.fields, missing[0]) if not gap]
        reduced = [{name: value for name, value in metadata.items() if name != left_out} for left_out in given]
        encoded = self.encoder.encode_records([metadata, *reduced]).values
        patches = [] if image is None else occlude(image)
        images = [image] * len(encoded) + list(patches)
        values = np.concatenate([encoded, np.repeat(encoded[:1], len(patches), axis=0)])
        starts = range(0, len(images), BATCH)
        rows = np.concatenate(
            [self._predict(images[start : start + BATCH], values[start : start + BATCH])[0] for start in starts]
        )
        if self.decision is not None:
            # One temperature for all: a change must come from the model, not from the group of the changed input.
            seen = [self.reads_image and image is not None]
            decided = self.decision.decide(rows[:1], seen, share_given(missing, self.reads_metadata))
            rows = apply_temperature(rows, decided.thresholds[0].temperature)
        place = int(rows[0].argmax()) if label is None else self.classes.index(label)
        drop = rows[0, place] - rows[1:, place]
        saliency = None if image is None else saliency_map(drop[len(given) :], self.size)
        fields = dict(zip(given, drop[: len(given)].tolist()))
        return Explanation(self.classes[place], float(rows[0, place]), saliency, fields, image)

    def _read(self, metadata: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        return metadata if self.reads_metadata else [{}] * len(metadata)

    def _images(self, lesion: Sequence[Image | None]) -> list[Image | None]:
        """Return a lesion's images; [None] if there is none and the model predicts without."""
        given: list[Image | None] = [image for image in lesion if image is not None and self.reads_image]
        if not given and self.needs_image:
            raise ValueError(
                "this model needs an image; one trained with learned tokens (metadata.imputation=token) does without"
            )
        return given or [None]

    def _predict(
        self, images: Sequence[Image | None], values: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.floating] | None]:
        """Return uncalibrated probabilities (N, C), and the encoders' vectors."""
        stacked = missing = None
        if self.reads_image:
            nothing = np.zeros((self.size, self.size, 3), dtype=np.uint8)
            stacked = np.stack([nothing if image is None else image for image in images])
            missing = np.array([image is None for image in images]) if self.learned_tokens else None
        logits, vectors = self.network(stacked, missing, values)
        if logits.shape != (len(values), len(self.classes)):
            raise ValueError(f"the network computes {logits.shape}, not {len(self.classes)} classes of each input")
        given = [row for row, image in enumerate(images) if image is not None]
        if not np.isfinite(logits).all() or (vectors is not None and not np.isfinite(vectors[given]).all()):
            raise ValueError("the network computes no finite numbers for this input: is the model damaged?")
        return softmax(logits), vectors

    def _image_warnings(self, images: Sequence[Image | None], scores: NDArray[np.float64]) -> list[str]:
        warnings = []
        for number, score in enumerate(scores, 1):
            if self.out_of_scope is not None and score > 1:
                share, validation = self.out_of_scope.share_nearer(score), self.out_of_scope.validation
                # Rounded down: 99.96% isn't all.
                than = f"all {validation}" if share >= 1 else f"{int(1000 * share) / 10:g}% of {validation}"
                warnings.append(
                    f"{'the image' if len(images) == 1 else f'image {number}'} doesn't look like the images this model "
                    f"was trained on (out-of-distribution score above {than} validation images); don't rely on the "
                    "prediction"
                )
        if self.reads_image and images[0] is None:
            warnings.append("predicted without an image")
        elif self.reads_image and self.out_of_scope is None:
            warnings.append("not checked whether the image looks like those this model was trained on: no score for it")
        return warnings

    def _threshold_warnings(self, label: str, thresholds: Thresholds, refer: bool | None) -> list[str]:
        """Warn where too little was known to decide, and of a likely cancer that isn't referred."""
        careful = {"no class is ruled out": thresholds.threshold, "referral is advised": thresholds.referral}
        consequences = [what for what, threshold in careful.items() if threshold == 0]
        warnings = []
        if consequences:
            few = "too few validation cases had what is given here"
            if self.decision is not None and not self.decision.availability:
                few = "this model was calibrated for inputs as recorded alone (`dualrefnet evaluate` fits the rest)"
            warnings.append(f"{few}, so {' and '.join(consequences)}")
        if refer is False and label in self.malignant:
            warnings.append(
                f"{label} is the likeliest single class, but all malignant classes together stay below the referral "
                f"threshold of {thresholds.referral:.2f} that was fitted for {thresholds.group.description}"
            )
        return warnings

    def _metadata_warnings(self, missing: NDArray[np.bool_], metadata: Mapping[str, Any]) -> list[str]:
        if not self.fields:
            return ["this model reads no metadata; what was given is ignored"] if metadata else []
        names = [field.name for field, gap in zip(self.fields, missing) if gap]
        how = "imputed" if self.encoder.imputer is not None else "taken as zero"
        if self.encoder.section.imputation == "token":
            how = "replaced by a learned token"
        listed = "all metadata" if len(names) == len(self.fields) else ", ".join(names)
        return [f"missing and {how}: {listed}"] if names else []
