"""The players among whom a prediction is shared out: the questions of the form, or the columns that the model reads.

A question is answered as a whole, so all columns of one field are one player: a number, or the indicators of its
categories. The
columns of tier M3 that say which fields are missing are a player of their own. They are no answers: of PAD-UFES-20 they
say who was
never biopsied, and nobody of these has a cancer, a shortcut that would stay hidden if each flag stood with its field.

By column, every column is a player, as in the paper's Figure 6. Its coalitions hold forms that no patient can fill in,
with two
regions of the body at once or with none, and so the model is asked about what it never learned. The values of a field's
columns
may be summed to one number a field; they add up to the same prediction, but are not the values of the fields as
players.
"""

# also: One prediction shared out among players by shap's permutation explainer.
# also: Shapley values of the patient's answers while the photograph stays the same (SHAP, Lundberg and Lee 2017).
# also: Pictures of the Shapley values of the metadata: which answers count, for whom, and how one prediction comes
# about.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import MetadataField
from dualrefnet.errors import DependencyError

try:
    from shap import PermutationExplainer
except ImportError:
    raise DependencyError("Shapley values need shap: pip install 'dualrefnet[explain]'") from None
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dualrefnet.analysis.opened_run import OpenedRun, sample_rows
from dualrefnet.display.figure import (
    COLOURS,
    INK,
    PAPER,
    PRIMARY,
    SECONDARY,
    ReportFigure,
    beeswarm_offsets,
    class_colours,
    file_stem,
    new_figure,
    rank_colour_scale,
    styled,
)
from dualrefnet.errors import RunError
from dualrefnet.models.encoders import Encoded, EncoderOutput
from dualrefnet.models.inference import encoded as stored_features

By = Literal["field", "column"]


MISSING_FLAGS = "missing fields (flags)"


_PREFIX = "missing_"


_TRUTH = {"no": 0.0, "yes": 1.0}


@dataclass(frozen=True)
class FeatureGroup:
    """Columns that come and go together.

    Attributes:
        name: for people; of a column, its name in `MetadataEncoder.names`.
        field: the question that it belongs to; of all flags together, the player's name.
        kind: numeric, boolean or categorical, as the field; missing: flags that say what is missing.
        columns: which of the M columns.
    """

    name: str
    field: str
    kind: Literal["numeric", "boolean", "categorical", "missing"]
    columns: tuple[int, ...]


@dataclass(frozen=True)
class FieldValues:
    """What N patients said, for each of P players.

    Attributes:
        words: N rows of P; `66 years`, `yes`, `FACE`, or why there is no answer: `not recorded, imputed`.
        colours: (N, P) float32, low to high: numbers as the model reads them, 0 and 1 of what is answered by yes or no,
            how many
            flags are set. NaN for other categories and where there is no answer, also if one was imputed.
        answered: (N, P), False where there is no answer.
    """

    words: tuple[tuple[str, ...], ...]
    colours: NDArray[np.float32]
    answered: NDArray[np.bool_]


def make_feature_groups(encoder: MetadataEncoder, by: By) -> tuple[FeatureGroup, ...]:
    """Return the players of an encoder's M columns; each column belongs to one of them.

    Args:
        encoder: the fitted encoder.
        by: field: a player for each field, and one for all flags together; column: a player for each column.

    Raises:
        ValueError: `by` is neither.
    """
    if by not in ("field", "column"):
        raise ValueError(f"players are made by field or by column, not by {by!r}")
    names, players, start = encoder.names, [], 0
    for field, levels in zip(encoder.fields, encoder.categories, strict=True):
        columns = tuple(range(start, start + (1 if field.kind == "numeric" else len(levels))))
        start += len(columns)
        if by == "column":
            players += [FeatureGroup(names[column], field.name, field.kind, (column,)) for column in columns]
        elif columns:  # A category of which the training rows had no value has no column, and no influence.
            players.append(FeatureGroup(field.name, field.name, field.kind, columns))
    flags = tuple(range(start, len(names)))
    if by == "column":
        players += [
            FeatureGroup(names[column], names[column].removeprefix(_PREFIX), "missing", (column,)) for column in flags
        ]
    elif flags:
        players.append(FeatureGroup(MISSING_FLAGS, MISSING_FLAGS, "missing", flags))
    return tuple(players)


def read_field_values(players: tuple[FeatureGroup, ...], encoder: MetadataEncoder, rows: pd.DataFrame) -> FieldValues:
    """Say in words, and in numbers to colour by, what stands in the players' columns.

    Args:
        players: of `make_players`.
        encoder: that made them.
        rows: N of the lesion table.
    """
    encoded = encoder.encode(rows)
    said, known = {}, {MISSING_FLAGS: np.ones(len(rows), dtype=bool)}
    for index, field in enumerate(encoder.fields):
        said[field.name] = _field_words(encoder, field, encoded.missing[:, index], encoded.invalid[:, index], rows)
        known[field.name] = ~encoded.missing[:, index]
    words, colours, answered = [], [], []
    for player in players:
        values = encoded.values[:, list(player.columns)]
        is_known = known[player.field]
        if player.kind == "missing":
            # That an answer is missing is known of all.
            is_known, amount = known[MISSING_FLAGS], values.sum(axis=1)
            words.append(
                [
                    _yes_or_no(flags) if player.name != MISSING_FLAGS else f"{flags:g} of {len(player.columns)}"
                    for flags in amount
                ]
            )
        elif player.kind == "numeric":
            amount = values[:, 0]
            words.append(said[player.field])
        elif player.name != player.field:
            # One of the field's indicators: of an answer it says yes or no.
            amount = values[:, 0]
            own = zip(amount, is_known, said[player.field], strict=True)
            words.append([_yes_or_no(one) if is_answer else word for one, is_answer, word in own])
        else:
            amount = np.array([_TRUTH.get(word, np.nan) for word in said[player.field]])
            words.append(said[player.field])
        colours.append(np.where(is_known, amount, np.nan))
        answered.append(is_known)
    return FieldValues(
        tuple(zip(*words, strict=True)), np.stack(colours, axis=1).astype(np.float32), np.stack(answered, axis=1)
    )


def _field_words(
    encoder: MetadataEncoder,
    field: MetadataField,
    missing: NDArray[np.bool_],
    rejected: NDArray[np.bool_],
    rows: pd.DataFrame,
) -> list[str]:
    """Return each row's answer to one question."""
    filled = ", imputed" if encoder.imputer is not None else ""
    words = []
    for value, is_missing, is_rejected in zip(rows[field.name], missing, rejected, strict=True):
        if is_missing:
            words.append(("unknown to the model" if is_rejected else "not recorded") + filled)
        elif field.kind == "numeric":
            words.append(f"{value:g} {field.unit or ''}".rstrip())
        elif value in field.missing_codes:
            words.append("not known")
        elif field.kind == "boolean":
            words.append(_yes_or_no(value == "True"))
        else:
            words.append(str(field.aliases.get(value, value) if encoder.section.merge_aliases else value))
    return words


def _yes_or_no(value: object) -> str:
    return "yes" if value else "no"


# (R, M) float32 forms -> (R, C) probabilities.
Classifier = Callable[[NDArray[np.float32]], NDArray[np.float64]]


# How far base + values may be from the prediction: rounding of float32 is a hundred times smaller.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Attribution:
    """A prediction, shared out.

    Attributes:
        values: (P, C), what each player adds to the probability of each class.
        errors: (P, C), standard errors of the values, from how they differ between the orders.
        base: (C,), mean probability with the background's forms.
        prediction: (C,), with the own form.
    """

    values: NDArray[np.float64]
    errors: NDArray[np.float64]
    base: NDArray[np.float64]
    prediction: NDArray[np.float64]


def attribute_prediction(
    classify: Classifier,
    form: NDArray[np.float32],
    background: NDArray[np.float32],
    players: tuple[FeatureGroup, ...],
    permutations: int,
    seed: int,
) -> Attribution:
    """Share the prediction for one form out among the players.

    Args:
        classify: what is explained.
        form: (M,) the patient's.
        background: (B, M) forms of others, from which hidden answers are taken.
        players: each of the M columns belongs to one of them.
        permutations: orders of the players; at least 1.
        seed: of the orders.

    Raises:
        ValueError: the players don't share all columns out among them, or there is no permutation.
        ArithmeticError: base and values don't add up to the prediction.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, not {permutations}")
    masker = _Forms(form, background, players)
    with _numpy_keeps_its_state():
        explainer = PermutationExplainer(classify, masker, seed=seed)
        explanation = explainer(
            np.arange(len(players))[None],
            # Players whose columns are the same in all forms add nothing, and shap leaves them out of the orders.
            max_evals=permutations * (2 * int((~masker.invariants()).any(axis=0).sum()) + 1),
            batch_size=2 * len(players) + 1,
            error_bounds=True,
            silent=True,
        )
    prediction = classify(form[None])[0]
    values, spread = (np.reshape(part[0], (len(players), -1)) for part in (explanation.values, explanation.error_std))
    # As if forwards and backwards were two draws; they are better than that, and the error is rather smaller.
    shares = Attribution(
        values, spread / np.sqrt(2 * permutations), np.reshape(explanation.base_values[0], -1), prediction
    )
    gap = float(np.abs(shares.base + shares.values.sum(axis=0) - prediction).max())
    # Written so that NaN is an error too.
    if not gap <= TOLERANCE:
        raise ArithmeticError(
            f"base and Shapley values are {gap:.2g} away from the predicted probability, more than {TOLERANCE:g}: "
            "the model doesn't answer the same question twice in the same way"
        )
    return shares


class _Forms:
    """shap's masker: the patient's answers where a player takes part, those of every other patient where not.

    Attributes:
        shape: (B, P): rows that a call returns, and players.
        immutable_outputs: shap need not copy what a call returns.
    """

    immutable_outputs = True

    def __init__(
        self, form: NDArray[np.float32], background: NDArray[np.float32], players: tuple[FeatureGroup, ...]
    ) -> None:
        columns = [column for player in players for column in player.columns]
        if sorted(columns) != list(range(len(form))):
            raise ValueError(f"each of the {len(form)} columns must belong to one player, and to one only")
        self._form, self._background = form, background
        # (M,): whose column it is.
        self._owner = np.empty(len(form), dtype=np.int64)
        for number, player in enumerate(players):
            self._owner[list(player.columns)] = number
        same = background == form
        self._same = np.stack([same[:, list(player.columns)].all(axis=1) for player in players], axis=1)
        self.shape = self._same.shape

    def __call__(self, mask: NDArray[np.bool_], _: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return (B, M) forms of one coalition, a (P,) mask."""
        return np.where(mask[self._owner], self._form, self._background)

    def invariants(self, *_: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return (B, P): where a player's coming changes nothing, so that shap needn't ask the model again."""
        return self._same


@contextmanager
def _numpy_keeps_its_state() -> Iterator[None]:
    """Put numpy's global generator, which shap seeds and draws from, back as it was."""
    state = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


# Orders of the players; by column there are many more players, and one order takes longer.
PERMUTATIONS: dict[By, int] = {"field": 10, "column": 2}


# Photographs that the encoders read at once; forms that the model answers at once, and how many numbers of encoded
# photographs
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
    players: tuple[FeatureGroup, ...]
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
        each = pd.DataFrame(
            [(player.name, player.field, player.kind) for player in self.players], columns=["player", "field", "kind"]
        )
        part = pd.concat([each] * (images * classes), ignore_index=True)
        part.insert(0, "class", np.tile(np.repeat(self.classes, players), images))
        part.insert(0, "image_id", np.repeat(self.image_ids, players * classes))
        part["answer"] = [word for words in self.words for _ in self.classes for word in words]
        return part.assign(value=self.values.transpose(0, 2, 1).ravel(), error=self.errors.transpose(0, 2, 1).ravel())

    def ranking(self) -> pd.DataFrame:
        """Return mean |value| of each player and class: player, field, kind, class, importance; the weightiest player
        first.
        """
        importance = np.abs(self.values).mean(axis=0, dtype=np.float64)
        order = np.argsort(-importance.sum(axis=1), kind="stable")
        return pd.DataFrame(
            [
                (
                    self.players[player].name,
                    self.players[player].field,
                    self.players[player].kind,
                    label,
                    importance[player, number],
                )
                for player in order
                for number, label in enumerate(self.classes)
            ],
            columns=["player", "field", "kind", "class", "importance"],
        )

    def top_groups(self, row: int, label: str, count: int = 3) -> list[tuple[str, str, float]]:
        """Return the players that moved one image's probability of one class most: (name, answer, value), the largest
        first.

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

    Each photograph is encoded once and then asked about with some ten thousand forms. Most methods are done with an
    image in a fifth
    of a second on two cores; `visual`, which looks at maps for every form, and `ensemble` take seconds: ask for fewer
    images.

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
    players = make_feature_groups(opened.metadata, by)
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
            shares.append(
                attribute_prediction(classify, examples.metadata[row], others, players, permutations, own_seed)
            )
            if progress:
                progress(len(shares), len(chosen))
    rows = opened.rows(side).iloc[chosen]
    answers = read_field_values(players, opened.metadata, rows)
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
    numbers = sum(
        part.numel() for output in parts for part in (output.map, output.vector, *output.taps) if part is not None
    )
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
    return EncoderOutput(
        kept, output.vector.expand(rows, -1), tuple(tap.expand(rows, -1, -1, -1) for tap in output.taps)
    )


def _stack(parts: list[NDArray[np.float64]]) -> NDArray[np.float32]:
    return np.stack(parts).astype(np.float32)


# Low to high; dark to light too, for those who see no colours.
LOW_TO_HIGH = LinearSegmentedColormap.from_list("low_to_high", [COLOURS[0], COLOURS[3], COLOURS[1]])


STEPS = 8


OTHER = COLOURS[6]


HATCH = "/////"


# Characters of one line beside a waterfall, unless a name is longer.
_LABEL = 24


@styled
def draw_importance(result: MetadataShap, count: int = 15) -> ReportFigure:
    """Draw how far each player moves the probability of each class, on average: the paper's Figure 6.

    Args:
        result: of `explain_metadata`.
        count: players of their own; the others are added up.
    """
    ranking = (
        result.ranking()
        .assign(importance=lambda table: 100 * table["importance"])
        .rename(columns={"importance": "points"})
    )
    names = list(dict.fromkeys(ranking["player"]))
    shown = names[: count if len(names) > count + 1 else len(names)]
    data = ranking[ranking["player"].isin(shown)]
    rest = ranking[~ranking["player"].isin(shown)]
    if len(rest):
        others = f"{len(names) - len(shown)} others"
        summed = (
            rest.groupby("class", sort=False)["points"].sum().reset_index().assign(player=others, field="", kind="")
        )
        shown, data = [*shown, others], pd.concat([data, summed[list(data.columns)]], ignore_index=True)
    points = data.pivot(index="player", columns="class", values="points").loc[shown, list(result.classes)].to_numpy()
    kinds = data.drop_duplicates("player").set_index("player")["kind"].loc[shown]
    sums = points.sum(axis=1)
    # Dozens of small ones together would press the others against the axis.
    drawn = len(shown) - (len(rest) > 0 and sums[-1] > sums[0])

    # As many names in a row of the legend as find room.
    across = min(len(result.classes), max(1, 64 // (5 + max(map(len, result.classes)))), 4)
    figure, axes = new_figure(0.85 + 0.2 * len(shown) + 0.16 * -(-len(result.classes) // across))
    axis, left = axes[0], np.zeros(drawn)
    for number, colour in enumerate(class_colours(result.classes).values()):
        bars = axis.barh(
            np.arange(drawn),
            points[:drawn, number],
            left=left,
            color=colour,
            edgecolor=PAPER,
            linewidth=0.3,
            height=0.75,
        )
        for bar, kind in zip(bars, kinds, strict=False):
            bar.set_hatch(HATCH if kind == "missing" else "")
        left += points[:drawn, number]
    for place, whole in enumerate(sums):
        text, end = (f"{whole:.1f}", whole) if place < drawn else (f"{whole:.1f} together, too long to draw", 0)
        axis.annotate(text, (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(range(len(shown)), shown)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlim(0, max(sums[:drawn].max(), 1e-9) * 1.14)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("mean change of a class's probability,\nclasses added up, percentage points")
    # matplotlib fills a legend column by column; here it reads row by row.
    patches = [Patch(color=colour, label=label) for label, colour in class_colours(result.classes).items()]
    patches = [patches[place] for column in range(across) for place in range(column, len(patches), across)]
    figure.legend(handles=patches, loc="outside upper center", ncols=across, handlelength=1, columnspacing=1.2)

    what = "answer" if result.by == "field" else "column of the encoded form"
    caption = (
        f"How far each {what} moves the probability of each class, up or down, {_given(result)}: the mean over {_sample(result)}. "
        "In each bar the classes stand in the order of the legend; the number is their sum. "
        f"{_method(result)}{_flags(result, 'Hatched bars')}"
    )
    best = "; ".join(f"{name} {whole:.1f}" for name, whole in list(zip(shown, sums, strict=True))[:5])
    alt = f"Percentage points, classes added up, the weightiest first: {best}."
    title = f"Which {'answers count' if result.by == 'field' else 'columns of the form count'}, by class"
    return ReportFigure(f"shap_importance_{result.by}", title, caption, alt, figure, data.reset_index(drop=True))


@styled
def draw_beeswarm(result: MetadataShap, label: str, count: int = 10) -> ReportFigure:
    """Draw every image's value of the weightiest players for one class, coloured by what was answered.

    Args:
        result: of `explain_metadata`.
        label: the class.
        count: how many players.
    """
    points = 100 * result.values[:, :, result.classes.index(label)]
    order = np.argsort(-np.abs(points).mean(axis=0), kind="stable")[:count]
    figure, axes = new_figure(1.25 + 0.31 * len(order))
    axis = axes[0]
    axis.axvline(0, color=INK, linewidth=0.7, zorder=1)
    # About as wide as a point.
    width = max(float(np.ptp(points[:, order])), 1e-9) / 90
    parts = []
    for place, player in enumerate(order):
        amount, answered = result.colours[:, player], result.answered[:, player]
        parts.append(
            pd.DataFrame(
                {
                    "image_id": result.image_ids,
                    "class": label,
                    "player": result.players[player].name,
                    "answer": [words[player] for words in result.words],
                    "colour": rank_colour_scale(amount),
                    "points": points[:, player],
                    "height": place + beeswarm_offsets(points[:, player], width),
                    "marker": "D" if result.players[player].kind == "missing" else "o",
                    "filled": answered,
                }
            )
        )
    data = pd.concat(parts, ignore_index=True)
    # Points of one look are drawn together: the file is half as large.
    looks = data.assign(paint=[_paint(amount) for amount in data["colour"]]).groupby(["marker", "filled", "paint"])
    for (marker, filled, paint), each in looks:
        axis.plot(
            each["points"],
            each["height"],
            linestyle="",
            marker=str(marker),
            markersize=2.7,
            color=str(paint),
            zorder=3,
            markerfacecolor=str(paint) if filled else "none",
            markeredgewidth=0 if filled else 0.6,
        )
    axis.set_yticks(np.arange(len(order)), [result.players[player].name for player in order])
    axis.set_ylim(len(order) - 0.45, -0.55)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(textwrap.fill(f"change of the probability of {label}, percentage points", 40))
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), LOW_TO_HIGH), ax=axis, location="top", shrink=0.5, aspect=22, pad=0.02
    )
    bar.set_ticks([0, 1], labels=["low, or no", "high, or yes"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, pad=1)
    greys = (
        (~result.answered, "not recorded", "none"),
        (result.answered & np.isnan(result.colours), "another answer", OTHER),
    )
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=3.5, color=OTHER, markerfacecolor=fill, label=words)
        for which, words, fill in greys
        if which[:, order].any()
    ]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=2, handletextpad=0.1)

    lead = [
        f"{result.players[player].name} {points[:, player].min():+.1f} to {points[:, player].max():+.1f}"
        for player in order[:4]
    ]
    what = "answer" if result.by == "field" else "column"
    caption = (
        f"Each point is one image: how far its {what} moves the probability of {label}, {_given(result)} ({_sample(result)}). Colours show "
        "the answer from low to high within its row; grey points are answers without an order, such as a region or “not known”; hollow "
        f"ones have no answer, also where one was imputed. {_method(result)}{_flags(result, 'Diamonds')}"
    )
    alt = f"Values in percentage points, the weightiest first: {'; '.join(lead)}."
    data = data[["image_id", "class", "player", "answer", "colour", "points"]]
    return ReportFigure(
        f"shap_beeswarm_{result.by}_{file_stem(label)}",
        f"What speaks for and against {label}",
        caption,
        alt,
        figure,
        data,
    )


@styled
def draw_waterfall(result: MetadataShap, image_id: str, label: str, count: int = 9) -> ReportFigure:
    """Draw how one image's probability of one class comes about, from the mean over other patients' forms to its own.

    Args:
        result: of `explain_metadata`.
        image_id: of the N images.
        label: the class.
        count: players of their own; the others are added up.
    """
    row, column = result.image_ids.index(image_id), result.classes.index(label)
    values, errors = 100 * result.values[row, :, column].astype(float), 100 * result.errors[row, :, column]
    base, prediction = 100 * float(result.base[row, column]), 100 * float(result.prediction[row, column])
    order = np.argsort(-np.abs(values), kind="stable")
    top = order[: count if len(order) > count + 1 else len(order)]
    steps = [
        (result.players[player].name, result.words[row][player], values[player], result.players[player].kind)
        for player in top
    ]
    if len(top) < len(order):
        steps.append((f"{len(order) - len(top)} others", "", float(values[order[len(top) :]].sum()), ""))
    data = pd.DataFrame(steps, columns=["player", "answer", "points", "kind"])
    data["end"] = base + data["points"].cumsum()
    data["start"] = data["end"] - data["points"]

    beside = "this photograph,\nother patients' forms" if result.reads_image else "other patients' forms"
    width = max(_LABEL, *(len(name) for name in data["player"]))
    answers = zip(data["player"], data["answer"], strict=True)
    labels = [
        beside,
        *(_folded(f"{name} = {answer}" if answer else name, width) for name, answer in answers),
        "with this patient's form",
    ]
    lines = max(text.count("\n") + 1 for text in labels)
    figure, axes = new_figure(0.65 + len(labels) * (0.12 + 0.125 * lines))
    axis = axes[0]
    starts, ends = data["start"].to_numpy(), data["end"].to_numpy()
    for place, (start, end, kind) in enumerate(zip(starts, ends, data["kind"], strict=True), 1):
        rises, points = end >= start, end - start
        bar = axis.barh(
            place, points, left=start, height=0.62, color=SECONDARY if rises else PRIMARY, edgecolor=PAPER, linewidth=0
        )
        bar[0].set_hatch(HATCH if kind == "missing" else "")
        side, shift = ("left", 3) if rises else ("right", -3)
        axis.annotate(
            _signed(points),
            (end, place),
            xytext=(shift, 0),
            textcoords="offset points",
            fontsize=7,
            va="center",
            ha=side,
        )
        axis.plot([start] * 2, [place - 1, place], color=INK, linewidth=0.6, zorder=1)
    last = len(data) + 1
    axis.plot([prediction] * 2, [last - 1, last], color=INK, linewidth=0.6, zorder=1)
    for place, value in ((0, base), (last, prediction)):
        axis.plot(value, place, marker="D", markersize=4, color=INK)
        # On the side where the picture has room.
        side, shift = ("left", 5) if value < (base + prediction) / 2 else ("right", -5)
        style: Any = {"xytext": (shift, 0), "textcoords": "offset points", "va": "center", "ha": side}
        axis.annotate(f"{value:.1f} %", (value, place), fontsize=7.5, fontweight="bold", **style)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(last + 0.6, -0.6)
    low, high = min(*starts, *ends), max(*starts, *ends)
    span = max(high - low, 1.0)
    # Room for the numbers beside the bars; but there are no probabilities below 0 and above 100.
    axis.set_xlim(low - 0.3 * span, high + 0.34 * span)
    axis.set_xticks(
        [tick for tick in axis.get_xticks() if max(0, axis.get_xlim()[0]) <= tick <= min(100, axis.get_xlim()[1])]
    )
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"probability of {label}, %")

    truth, error = result.classes[result.labels[row]], 2 * float(errors[top].max())
    caption = (
        f"How the probability of {label} of image {image_id} (truth: {truth}) comes about: from {base:.1f} %, the mean {_given(result)} "
        f"and {result.background} training forms in turn, to {prediction:.1f} % with this patient's. Orange bars raise it, blue ones lower "
        f"it, in percentage points; they are estimates from {_orders(result)} of the {result.by}s, good to about {error:.1f} points."
    )
    if not result.answered[row, top].all():
        caption += " What is not recorded is no answer of this patient's."
    if (data["kind"] == "missing").any():
        caption += _flags(result, "Hatched bars")
    said = [
        f"{name} = {answer} {points:+.1f}" if answer else f"{name} {points:+.1f}" for name, answer, points, _ in steps
    ]
    alt = f"From {base:.1f} % to {prediction:.1f} %: {'; '.join(said)}."
    name = f"shap_waterfall_{result.by}_{file_stem(image_id)}_{file_stem(label)}"
    return ReportFigure(name, f"Why {label} for {image_id}", caption, alt, figure, data)


def _given(result: MetadataShap) -> str:
    return "with the photograph left as it is" if result.reads_image else "by the form alone"


def _sample(result: MetadataShap) -> str:
    shown = len(result.image_ids)
    if shown == result.images_in_all:
        return f"all {shown} {result.side} images"
    return f"{shown} of {result.images_in_all} {result.side} images, each class in proportion, seed {result.seed}"


def _orders(result: MetadataShap) -> str:
    return f"{result.permutations} random order{'s' if result.permutations > 1 else ''}"


def _method(result: MetadataShap) -> str:
    return f"Shapley values (SHAP) from {_orders(result)} of the {result.by}s; hidden ones are taken from {result.background} training forms."


def _flags(result: MetadataShap, which: str) -> str:
    """Return the sentence on what stands for missing fields, if anything does."""
    if not any(player.kind == "missing" for player in result.players):
        return ""
    return (
        f" {which} are no answers: they stand for flags that say which fields are empty, and so can give away how a patient was examined "
        "(on PAD-UFES-20, who was never biopsied)."
    )


def _paint(amount: float) -> str:
    """Return the colour of 0..1, or the grey of what has no place between low and high."""
    return OTHER if np.isnan(amount) else to_hex(LOW_TO_HIGH(round(amount * STEPS) / STEPS))


def _folded(text: str, width: int) -> str:
    """Break a label: first before the answer."""
    if len(text) <= width:
        return text
    name, sign, answer = text.partition(" = ")
    return "\n".join([name + sign.rstrip(), *textwrap.wrap(answer, width)]) if sign else textwrap.fill(text, width)


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")
