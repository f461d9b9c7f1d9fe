"""Shapley values of the patient's answers while the photograph stays the same (SHAP, Lundberg and Lee 2017).

For one patient, the base is the mean probability that the model gives for this photograph with the forms of other patients. Each
player's value says how far this patient's own answer moves the probability from there, on average over the orders in which the
answers can come; base and values add up to the prediction. Probabilities are shared out, not logits: +0.10 is ten percentage points.

Hidden answers come from other patients one player at a time, so that some of the forms that the model is asked about are ones
that nobody would fill in: an answer beside a flag that says it is missing. See `dualrefnet.explain.players`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dualrefnet.errors import RunError
from dualrefnet.evaluation.opened_run import OpenedRun, sample_rows
from dualrefnet.explain.players import By, Player, make_players, read_answers
from dualrefnet.explain.shares import Classifier, share_out
from dualrefnet.models.backbones import Encoded, EncoderOutput
from dualrefnet.models.inference import encoded as stored_features

# Orders of the players; by column there are many more players, and one order takes longer.
PERMUTATIONS: dict[By, int] = {"field": 10, "column": 2}
# Photographs that the encoders read at once; forms that the model answers at once, and how many numbers of encoded photographs
# (256 MB of float32) these may stand beside: methods that look at maps take fewer forms at once.
BATCH, MOST_ROWS, MOST_NUMBERS = 16, 4096, 2**26


@dataclass(frozen=True)
class MetadataShap:
    """Shapley values of the metadata beside N images, among P players, for C classes; in probabilities.

    Attributes:
        values: (N, P, C) float32.
        errors: (N, P, C) float32, the values' standard errors: other orders would have given about as different ones.
        base: (N, C) float32, of each photograph with the background's forms.
        prediction: (N, C) float32, with the patient's own form.
        players: P.
        classes: C labels.
        image_ids: N.
        labels: (N,) the true class.
        words: N rows of P answers for people; see `Answers`.
        colours: (N, P) float32, answers from low to high; see `Answers`.
        answered: (N, P), False where there is no answer; see `Answers`.
        by: what the players are, field or column.
        side: of the split.
        images_in_all: images of that side, of which N were chosen, each class in proportion.
        background: training forms that stand in for hidden answers.
        permutations: orders of the players, each of them forwards and backwards.
        seed: of the choice, of the background and of the orders.
        reads_image: False if there is no photograph, and the base is the same for all.
    """

    values: NDArray[np.float32]
    errors: NDArray[np.float32]
    base: NDArray[np.float32]
    prediction: NDArray[np.float32]
    players: tuple[Player, ...]
    classes: tuple[str, ...]
    image_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    words: tuple[tuple[str, ...], ...]
    colours: NDArray[np.float32]
    answered: NDArray[np.bool_]
    by: By
    side: str
    images_in_all: int
    background: int
    permutations: int
    seed: int
    reads_image: bool

    def table(self) -> pd.DataFrame:
        """Return one row an image, class and player: image_id, class, player, field, kind, answer, value, error."""
        images, players, classes = self.values.shape
        each = pd.DataFrame([(player.name, player.field, player.kind) for player in self.players], columns=["player", "field", "kind"])
        part = pd.concat([each] * (images * classes), ignore_index=True)
        part.insert(0, "class", np.tile(np.repeat(self.classes, players), images))
        part.insert(0, "image_id", np.repeat(self.image_ids, players * classes))
        part["answer"] = [word for words in self.words for _ in self.classes for word in words]
        return part.assign(value=self.values.transpose(0, 2, 1).ravel(), error=self.errors.transpose(0, 2, 1).ravel())

    def ranking(self) -> pd.DataFrame:
        """Return mean |value| of each player and class: player, field, kind, class, importance; the weightiest player first."""
        importance = np.abs(self.values).mean(axis=0, dtype=np.float64)
        order = np.argsort(-importance.sum(axis=1), kind="stable")
        return pd.DataFrame(
            [
                (self.players[player].name, self.players[player].field, self.players[player].kind, label, importance[player, number])
                for player in order
                for number, label in enumerate(self.classes)
            ],
            columns=["player", "field", "kind", "class", "importance"],
        )

    def top_players(self, row: int, label: str, count: int = 3) -> list[tuple[str, str, float]]:
        """Return the players that moved one image's probability of one class most: (name, answer, value), the largest first.

        Args:
            row: of the N images.
            label: the class.
            count: how many.
        """
        values = self.values[row, :, self.classes.index(label)]
        order = np.argsort(-np.abs(values), kind="stable")[:count]
        return [(self.players[player].name, self.words[row][player], float(values[player])) for player in order]


@torch.inference_mode()
def explain_metadata(
    opened: OpenedRun,
    side: str = "test",
    images: int = 200,
    background: int = 50,
    by: By = "field",
    permutations: int | None = None,
    seed: int = 0,
    image_ids: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MetadataShap:
    """Share the predictions for images of one side out among the answers of the form.

    Each photograph is encoded once and then asked about with some ten thousand forms. Most methods are done with an image in a fifth
    of a second on two cores; `visual`, which looks at maps for every form, and `ensemble` take seconds: ask for fewer images.

    Args:
        opened: the run.
        side: train, val or test.
        images: at most so many, each class in proportion.
        background: at most so many training forms stand in for hidden answers.
        by: what a player is: a field, or a column of its encoding.
        permutations: orders of the players; None: 10 of fields, 2 of columns.
        seed: of the choice, of the background and of the orders.
        image_ids: explain these images of the side instead of a sample.
        progress: called with (images done, images in all).

    Raises:
        RunError: the model reads no metadata.
        KeyError: an image of `image_ids` isn't on that side.
        ArithmeticError: base and values of an image don't add up to its prediction.
    """
    if not opened.reads_metadata:
        raise RunError(f"{opened.run.path}: this model reads no metadata, so there is no influence of theirs to show")
    examples = opened.examples(side)
    players = make_players(opened.metadata, by)
    if permutations is None:
        permutations = PERMUTATIONS[by]
    if image_ids is None:
        chosen = sample_rows(examples.labels, images, seed)
    else:
        number = {image_id: row for row, image_id in enumerate(examples.image_ids)}
        chosen = np.array([number[image_id] for image_id in image_ids], dtype=np.int64)
    others = opened.examples("train").metadata
    others = others[np.sort(np.random.default_rng(seed).permutation(len(others))[:background])]
    shares = []
    for start in range(0, len(chosen), BATCH):
        batch = examples.batch(chosen[start : start + BATCH])
        if batch.features:
            seen: Encoded | None = stored_features(batch.features, opened.device)
        else:
            pictures = opened.images(batch)
            seen = None if pictures is None else opened.model.encode(pictures)
        for place, row in enumerate(batch.rows):
            # Of each image its own, so that its values are the same in any choice of images.
            own_seed = int(np.random.SeedSequence([seed, int(row)]).generate_state(1)[0])
            classify = _classifier(opened, seen, place)
            shares.append(share_out(classify, examples.metadata[row], others, players, permutations, own_seed))
            if progress:
                progress(len(shares), len(chosen))
    rows = opened.rows(side).iloc[chosen]
    answers = read_answers(players, opened.metadata, rows)
    return MetadataShap(
        values=_stack([one.values for one in shares]),
        errors=_stack([one.errors for one in shares]),
        base=_stack([one.base for one in shares]),
        prediction=_stack([one.prediction for one in shares]),
        players=players,
        classes=opened.classes,
        image_ids=tuple(examples.image_ids[row] for row in chosen),
        labels=examples.labels[chosen],
        words=answers.words,
        colours=answers.colours,
        answered=answers.answered,
        by=by,
        side=side,
        images_in_all=len(examples),
        background=len(others),
        permutations=permutations,
        seed=seed,
        reads_image=opened.model.reads_image,
    )


def _classifier(opened: OpenedRun, seen: Encoded | None, place: int) -> Classifier:
    """Return the model as a function of the form alone, with one photograph of an encoded batch."""
    model, device = opened.model, opened.device
    # Only some methods look at the map, and it is large.
    keep_map = model.maps(opened.recipe.model)
    parts = [] if seen is None else [_one(output, place, keep_map) for output in seen.outputs]
    numbers = sum(part.numel() for output in parts for part in (output.map, output.vector, *output.taps) if part is not None)
    most = min(MOST_ROWS, max(1, MOST_NUMBERS // max(1, numbers)))

    def classify(forms: NDArray[np.float32]) -> NDArray[np.float64]:
        probabilities = []
        for chunk in np.array_split(forms, math.ceil(len(forms) / most)):
            image = None if seen is None else Encoded(tuple(_laid_out(output, len(chunk)) for output in parts))
            logits = model(image, torch.from_numpy(chunk).to(device)).logits
            probabilities.append(logits.double().softmax(dim=1).cpu().numpy())
        return np.concatenate(probabilities)

    return classify


def _one(output: EncoderOutput, place: int, keep_map: bool) -> EncoderOutput:
    part = slice(place, place + 1)
    kept = output.map[part] if keep_map and output.map is not None else None
    return EncoderOutput(kept, output.vector[part], tuple(tap[part] for tap in output.taps))


def _laid_out(output: EncoderOutput, rows: int) -> EncoderOutput:
    """Show one photograph's features as `rows` equal ones, without copying them."""
    kept = None if output.map is None else output.map.expand(rows, -1, -1, -1)
    return EncoderOutput(kept, output.vector.expand(rows, -1), tuple(tap.expand(rows, -1, -1, -1) for tap in output.taps))


def _stack(parts: list[NDArray[np.float64]]) -> NDArray[np.float32]:
    return np.stack(parts).astype(np.float32)
