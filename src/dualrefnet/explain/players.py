"""The players among whom a prediction is shared out: the questions of the form, or the columns that the model reads.

A question is answered as a whole, so all columns of one field are one player: a number, or the indicators of its categories. The
columns of tier M3 that say which fields are missing are a player of their own. They are no answers: of PAD-UFES-20 they say who was
never biopsied, and nobody of these has a cancer, a shortcut that would stay hidden if each flag stood with its field.

By column, every column is a player, as in the paper's Figure 6. Its coalitions hold forms that no patient can fill in, with two
regions of the body at once or with none, and so the model is asked about what it never learned. The values of a field's columns
may be summed to one number a field; they add up to the same prediction, but are not the values of the fields as players.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import MetadataField

By = Literal["field", "column"]
MISSING = "missing fields (flags)"
_PREFIX = "missing_"
_TRUTH = {"no": 0.0, "yes": 1.0}


@dataclass(frozen=True)
class Player:
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
class Answers:
    """What N patients said, for each of P players.

    Attributes:
        words: N rows of P; `66 years`, `yes`, `FACE`, or why there is no answer: `not recorded, imputed`.
        colours: (N, P) float32, low to high: numbers as the model reads them, 0 and 1 of what is answered by yes or no, how many
            flags are set. NaN for other categories and where there is no answer, also if one was imputed.
        answered: (N, P), False where there is no answer.
    """

    words: tuple[tuple[str, ...], ...]
    colours: NDArray[np.float32]
    answered: NDArray[np.bool_]


def make_players(encoder: MetadataEncoder, by: By) -> tuple[Player, ...]:
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
    for field, levels in zip(encoder.fields, encoder.levels, strict=True):
        columns = tuple(range(start, start + (1 if field.kind == "numeric" else len(levels))))
        start += len(columns)
        if by == "column":
            players += [Player(names[column], field.name, field.kind, (column,)) for column in columns]
        elif columns:  # A category of which the training rows had no value has no column, and no influence.
            players.append(Player(field.name, field.name, field.kind, columns))
    flags = tuple(range(start, len(names)))
    if by == "column":
        players += [Player(names[column], names[column].removeprefix(_PREFIX), "missing", (column,)) for column in flags]
    elif flags:
        players.append(Player(MISSING, MISSING, "missing", flags))
    return tuple(players)


def read_answers(players: tuple[Player, ...], encoder: MetadataEncoder, rows: pd.DataFrame) -> Answers:
    """Say in words, and in numbers to colour by, what stands in the players' columns.

    Args:
        players: of `make_players`.
        encoder: that made them.
        rows: N of the lesion table.
    """
    encoded = encoder.encode(rows)
    said, known = {}, {MISSING: np.ones(len(rows), dtype=bool)}
    for index, field in enumerate(encoder.fields):
        said[field.name] = _field_words(encoder, field, encoded.missing[:, index], encoded.rejected[:, index], rows)
        known[field.name] = ~encoded.missing[:, index]
    words, colours, answered = [], [], []
    for player in players:
        values = encoded.values[:, list(player.columns)]
        is_known = known[player.field]
        if player.kind == "missing":
            # That an answer is missing is known of all.
            is_known, amount = known[MISSING], values.sum(axis=1)
            words.append([_yes_or_no(flags) if player.name != MISSING else f"{flags:g} of {len(player.columns)}" for flags in amount])
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
    return Answers(tuple(zip(*words, strict=True)), np.stack(colours, axis=1).astype(np.float32), np.stack(answered, axis=1))


def _field_words(
    encoder: MetadataEncoder, field: MetadataField, missing: NDArray[np.bool_], rejected: NDArray[np.bool_], rows: pd.DataFrame
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
