"""The classifier: photographs that are decoded and forms in, answers out. Whatever computes the network is behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .availability import Thresholds, share_given
from .calibration import Decision, apply_temperature, softmax
from .metadata import EncodedRecords, Field, MetadataTransform
from .out_of_distribution import OutOfDistributionScore
from .prediction import Explanation, Prediction, answers_apart, covered, spread_out
from .preprocessing import ImageSettings, preprocess

Image = NDArray[np.uint8]
# Pictures that the network reads at once where one question needs many of them.
BATCH = 32


class NetworkOutput(NamedTuple):
    """What a network says of N pictures with their forms.

    Attributes:
        logits: (N, C).
        vectors: (N, D), what its image encoders make of each picture, NaN where there is none; None if it reads no
            picture.
    """

    logits: NDArray[np.floating]
    vectors: NDArray[np.floating] | None


# (N, S, S, 3) pictures or None, (N,) which aren't there or None, and (N, M) forms -> what the network says.
Network = Callable[[Image | None, NDArray[np.bool_] | None, NDArray[np.float32]], NetworkOutput]


class Classifier:
    """A trained model with its preprocessing.

    Attributes:
        network: computes the model.
        classes: labels in the order of the outputs.
        malignant: the classes that are cancer.
        form: the fitted form encoder; its `fields` are what a form may ask.
        image: what is done to a photograph.
        reads_image: False for a model of the form alone.
        reads_metadata: False for a model of the photograph alone.
        learned_tokens: whether it answers without a photograph.
        out_of_scope: the check of pictures; None if there is none.
        decision: temperature, sets and threshold of referral; None if there are none.
    """

    def __init__(
        self,
        network: Network,
        classes: Sequence[str],
        malignant: Sequence[str],
        form: MetadataTransform,
        image: ImageSettings,
        *,
        reads_image: bool,
        reads_metadata: bool,
        learned_tokens: bool,
        out_of_scope: OutOfDistributionScore | None = None,
        decision: Decision | None = None,
    ) -> None:
        self.network, self.form, self.image = network, form, image
        self.classes, self.malignant = tuple(classes), tuple(malignant)
        self.reads_image, self.reads_metadata, self.learned_tokens = reads_image, reads_metadata, learned_tokens
        self.out_of_scope, self.decision = out_of_scope, decision

    @property
    def needs_image(self) -> bool:
        """False for a model that answers without a photograph."""
        return self.reads_image and not self.learned_tokens

    @property
    def size(self) -> int:
        """S, side of the pictures that the network reads, pixels."""
        return self.image.size

    @property
    def fields(self) -> tuple[Field, ...]:
        """What a form may ask; nothing if the model reads no form."""
        return self.form.fields if self.reads_metadata else ()

    def categories(self, name: str) -> tuple[str, ...]:
        """Return what may be answered to a field: its categories; none for a number.

        Raises:
            FormError: there is no such field.
        """
        self.form.check([{name: None}])
        return next(
            levels for one, levels in zip(self.form.fields, self.form.categories, strict=True) if one.name == name
        )

    def prepare_array(self, photograph: NDArray[np.uint8]) -> Image:
        """Preprocess a decoded photograph exactly as in training.

        Args:
            photograph: (H, W, 3) RGB.

        Returns:
            (S, S, 3) RGB.

        Raises:
            ValueError: it has another shape, or isn't uint8.
        """
        if photograph.dtype != np.uint8 or photograph.ndim != 3 or photograph.shape[2] != 3 or photograph.size == 0:
            raise ValueError(
                f"an image array must be (height, width, 3) uint8 RGB, not {photograph.shape} {photograph.dtype}"
            )
        return preprocess(photograph, self.image)

    def classify(
        self, lesions: Sequence[Sequence[Image | None]], forms: Sequence[Mapping[str, Any]]
    ) -> list[Prediction]:
        """Classify lesions, each with one form and one or several photographs of it.

        Of several photographs the model's probabilities are averaged; temperature, set and referral then act on the
        mean.

        Args:
            lesions: of each lesion the photographs, as `prepare_array` makes them; None: there is none.
            forms: one for each lesion, any subset of the fields.

        Raises:
            FormError: a field is unknown, or a number is none.
            ValueError: a lesion has no photograph though the model needs one, or the lengths differ.
        """
        if len(lesions) != len(forms):
            raise ValueError(f"{len(lesions)} lesions and {len(forms)} forms: give one form a lesion")
        if not lesions:
            return []
        encoded = self.form.encode_records(self._read(forms))
        pictures = [self._pictures(lesion) for lesion in lesions]
        counts = [len(lesion) for lesion in pictures]
        starts = np.cumsum([0, *counts[:-1]])
        flat = [picture for lesion in pictures for picture in lesion]
        probabilities, vectors = self._ask(flat, np.repeat(encoded.values, counts, axis=0))
        pooled = np.add.reduceat(probabilities, starts, axis=0) / np.array(counts)[:, None]
        unlike = self._unlike(vectors, len(flat))
        sets, refer = np.zeros(pooled.shape, dtype=bool), None
        notes: list[list[str]] = [[] for _ in lesions]
        given = [""] * len(lesions)
        if self.decision is not None:
            seen = [self.reads_image and lesion[0] is not None for lesion in pictures]
            decided = self.decision.decide(pooled, seen, share_given(encoded.missing, self.reads_metadata))
            pooled, sets, refer = decided.probabilities, decided.sets, decided.refer
            given = [thresholds.group.name if thresholds.images else "" for thresholds in decided.thresholds]
            notes = [
                self._notes(row, thresholds, None if refer is None else bool(refer[index]))
                for index, (row, thresholds) in enumerate(zip(pooled, decided.thresholds, strict=True))
            ]
        return [
            self._prediction(
                pooled[index],
                sets[index],
                None if refer is None else bool(refer[index]),
                flat[start : start + count],
                unlike[start : start + count],
                notes[index] + self._said(encoded, index, form),
                given[index],
            )
            for index, (start, count, form) in enumerate(zip(starts, counts, forms, strict=True))
        ]

    def explain_prepared(self, picture: Image | None, form: Mapping[str, Any], label: str | None = None) -> Explanation:
        """Say what an answer rests on: the model is asked again with places covered and with answers left out.

        Args:
            picture: as `prepare_array` makes it; None: there is none.
            form: any subset of the fields.
            label: the class that is asked about; None: the likeliest.

        Raises:
            FormError: a field is unknown, or a number is none.
            ValueError: the class is unknown, or there is no photograph though the model needs one.
        """
        if label is not None and label not in self.classes:
            raise ValueError(f"no class is called {label[:40]!r}; there are: {', '.join(self.classes)}")
        picture, [form] = self._pictures([picture])[0], self._read([form])
        whole = self.form.encode_records([form])
        answered = [one.name for one, missing in zip(self.form.fields, whole.missing[0], strict=True) if not missing]
        forms = answers_apart(form, answered)
        patches = [] if picture is None else covered(picture)
        encoded = self.form.encode_records([form, *forms]).values
        pictures = [picture] * (1 + len(forms)) + list(patches)
        values = np.concatenate([encoded, np.repeat(encoded[:1], len(patches), axis=0)])
        rows = np.concatenate(
            [
                self._ask(pictures[start : start + BATCH], values[start : start + BATCH])[0]
                for start in range(0, len(pictures), BATCH)
            ]
        )
        if self.decision is not None:
            # One temperature for all: a change must be of the model's answer, not of the group that the changed input
            # falls into.
            given = self.decision.decide(
                rows[:1], [self.reads_image and picture is not None], share_given(whole.missing, self.reads_metadata)
            )
            rows = apply_temperature(rows, given.thresholds[0].temperature)
        place = int(rows[0].argmax()) if label is None else self.classes.index(label)
        lost = rows[0, place] - rows[1:, place]
        heat = None if picture is None else spread_out(lost[len(forms) :], self.size)
        return Explanation(
            self.classes[place],
            float(rows[0, place]),
            heat,
            dict(zip(answered, lost[: len(forms)].tolist(), strict=True)),
        )

    def _notes(self, row: NDArray[np.float64], thresholds: Thresholds, refer: bool | None) -> list[str]:
        """Say where too little was known to decide, and why a cancer isn't referred."""
        assert self.decision is not None
        careful = {"no class is ruled out": thresholds.threshold, "referral is advised": thresholds.referral}
        careful_for = [what for what, threshold in careful.items() if threshold == 0]
        few = "too few validation cases had what is given here"
        if not self.decision.availability:
            few = "this model was calibrated for inputs as recorded alone (`dualrefnet evaluate` fits the rest)"
        notes = [f"{few}, so {' and '.join(careful_for)}"] if careful_for else []
        likeliest = self.classes[int(row.argmax())]
        if refer is False and likeliest in self.malignant:
            notes.append(
                f"{likeliest} is the likeliest single class, but all malignant classes together stay below the referral threshold of "
                f"{thresholds.referral:.2f} that was fitted for {thresholds.group.description}"
            )
        return notes

    def _read(self, forms: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the forms that the model reads: empty ones if it reads none."""
        return forms if self.reads_metadata else [{}] * len(forms)

    def _pictures(self, lesion: Sequence[Image | None]) -> list[Image | None]:
        """Return a lesion's photographs; [None] if there is none and the model does without."""
        if not self.reads_image:
            return [None]
        there: list[Image | None] = [picture for picture in lesion if picture is not None]
        if not there and self.needs_image:
            raise ValueError(
                "this model needs a photograph; one that was trained for gaps (metadata.imputation token) would do without"
            )
        return there or [None]

    def _ask(
        self, pictures: Sequence[Image | None], values: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.floating] | None]:
        """Return the model's own probabilities (N, C), and the encoders' vectors."""
        images = absent = None
        if self.reads_image:
            images = np.zeros((len(pictures), self.size, self.size, 3), dtype=np.uint8)
            for place, picture in enumerate(pictures):
                if picture is not None:
                    images[place] = picture
            absent = np.array([picture is None for picture in pictures]) if self.learned_tokens else None
        answered = self.network(images, absent, values)
        return softmax(answered.logits), answered.vectors

    def _unlike(self, vectors: NDArray[np.floating] | None, number: int) -> list[float | None]:
        """Return how unlike the training photographs each picture is."""
        if self.out_of_scope is None or vectors is None:
            return [None] * number
        # NaN is a photograph that isn't there.
        return [None if np.isnan(score) else float(score) for score in self.out_of_scope.score(vectors)]

    def _prediction(
        self,
        row: NDArray[np.float64],
        inside: NDArray[np.bool_],
        refer: bool | None,
        pictures: Sequence[Image | None],
        unlike: Sequence[float | None],
        said: list[str],
        availability: str,
    ) -> Prediction:
        """Put together what is said of one lesion."""
        probabilities = dict(zip(self.classes, row.tolist(), strict=True))
        order = sorted(probabilities, key=probabilities.__getitem__, reverse=True)
        likely = {label for label, chosen in zip(self.classes, inside.tolist(), strict=True) if chosen}
        scores = [score for score in unlike if score is not None]
        warnings = [
            self._unlike_warning(score, number, len(pictures))
            for number, score in enumerate(unlike, 1)
            if score is not None and score > 1
        ]
        if self.reads_image and pictures[0] is None:
            warnings.append("answered without a photograph")
        return Prediction(
            order[0],
            probabilities,
            sum(probabilities[label] for label in self.malignant) if self.malignant else None,
            warnings + said,
            max(scores) if scores else None,
            tuple(label for label in order if label in likely),
            refer,
            availability,
        )

    def _unlike_warning(self, score: float, number: int, pictures: int) -> str:
        """Say that a picture isn't like the training photographs, and how rare that is among lesions."""
        assert self.out_of_scope is not None
        share, validation = self.out_of_scope.share_nearer(score), self.out_of_scope.validation
        # Rounded down: 99.96% isn't all.
        than = f"all {validation}" if share >= 1 else f"{int(1000 * share) / 10:g}% of {validation}"
        which = "the picture" if pictures == 1 else f"picture {number}"
        return (
            f"{which} doesn't look like the photographs this model was trained on (more unusual than {than} photographs of lesions "
            "that were kept for comparison); don't rely on the answer"
        )

    def _said(self, encoded: EncodedRecords, row: int, form: Mapping[str, Any]) -> list[str]:
        """Return the warnings about a form."""
        names = [one.name for one in self.form.fields]
        if not names or not self.reads_metadata:
            return ["this model reads no metadata; the form is ignored"] if form else []
        gaps = [name for name, missing in zip(names, encoded.missing[row], strict=True) if missing]
        how = "imputed" if self.form.imputer is not None else "taken as zero"
        how = "answered by a learned token" if self.form.section.imputation == "token" else how
        return [f"missing and {how}: {', '.join(gaps)}"] if gaps else []
