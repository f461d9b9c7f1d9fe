"""One answer on the form, read: a number within what can be believed, or a category."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

BLANKS = ("", "nan", "NaN")
Word = TypeVar("Word", bound=int | str)
# Categories that an error lists.
MOST_LEVELS = 16
TRUE, FALSE = ("true", "yes", "y", "1", "1.0"), ("false", "no", "n", "0", "0.0")


class FormError(ValueError):
    """A form isn't what the model can read; the message holds names of fields, and no answer.

    Attributes:
        rows: how many forms of a table have the fault.
    """

    rows: int = 1


class Field(Protocol):
    """One question of the form; what a data set says of it."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def kind(self) -> str:
        """Numeric, boolean (`True` / `False`) or categorical."""

    @property
    def unit(self) -> str | None:
        """Of a number."""

    @property
    def tier(self) -> str:
        """M1 if it is recorded for every patient."""

    @property
    def missing_codes(self) -> tuple[str, ...]:
        """Strings that stand for "asked, not known"."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Spellings of one value."""

    @property
    def minimum(self) -> float | None:
        """Smallest believable number."""

    @property
    def maximum(self) -> float | None:
        """Largest believable number."""

    @property
    def description(self) -> str:
        """The question in plain words."""


@dataclass(frozen=True)
class FormField:
    """One question of a bundle's form; see `Field`."""

    name: str
    kind: str
    unit: str | None = None
    tier: str = "M2"
    missing_codes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    minimum: float | None = None
    maximum: float | None = None
    description: str = ""

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> FormField:
        """Take what prediction needs of a field's description."""
        known = {name: state[name] for name in cls.__dataclass_fields__ if name in state}
        return cls(**known | {"missing_codes": tuple(known.get("missing_codes", ()))})


class Answer(NamedTuple):
    """One answer, read.

    Attributes:
        value: a number, or the place of a category among the field's levels; None: there is none.
        odd: why an answer that was given counts as none: `infinite`, `outside` (the believable range) or `unknown` (category).
    """

    value: float | int | None
    odd: str | None = None


def is_nothing(value: object) -> bool:
    """Return whether a cell holds nothing: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def spell(value: object, one: Field) -> str:
    """Spell one answer as its category: 3.0 -> `3`, yes/1/true -> `True`; empty if it is blank."""
    if one.kind == "boolean":
        word = str(value).strip().lower()
        if word in TRUE:
            return "True"
        if word in FALSE:
            return "False"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    # A column of whole numbers with gaps is read as floats: `3.0` is the category `3`.
    return text[:-2] if text.endswith(".0") and text[:-2].isdigit() else text


def fold(word: str) -> str:
    """Return a category without its case and spaces, as people's spellings of it differ: `Upper arm` and `UPPER_ARM ` are one."""
    return "".join(word.replace("_", " ").split()).casefold()


def by_fold(words: Mapping[str, Word]) -> dict[str, Word]:
    """Return `fold` of each word -> what the word stands for, without the spellings that stand for several things."""
    found: dict[str, set[Word]] = {}
    for word, meaning in words.items():
        found.setdefault(fold(word), set()).add(meaning)
    return {spelling: next(iter(meanings)) for spelling, meanings in found.items() if len(meanings) == 1}


def refusal(one: Field, levels: Sequence[str], odd: str) -> str:
    """Say why a value was refused and what it may be; the value itself isn't in the message.

    Args:
        one: the field.
        levels: its categories; none for a number.
        odd: see `Answer`.
    """
    if odd == "unknown":
        shown = ", ".join(levels[:MOST_LEVELS]) + (", ..." if len(levels) > MOST_LEVELS else "")
        return f"{one.name} is not one of its categories ({shown}); leave it out if it isn't known"
    low, high = (f"{bound:g}" if bound is not None else "" for bound in (one.minimum, one.maximum))
    limits = f"from {low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}" if high else "finite"
    return f"{one.name} must be a number, {limits}; leave it out if it isn't known"


def read_number(value: object, one: Field) -> Answer:
    """Read one answer to a numeric field.

    Raises:
        FormError: it is text, or yes or no.
    """
    if is_nothing(value) or str(value).strip() in (*BLANKS, *one.missing_codes):
        return Answer(None)
    try:
        # Python reads 1_000 as a thousand, and no table means that; yes isn't the number 1.
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise ValueError
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return Answer(None, "infinite")
    except (TypeError, ValueError):
        raise FormError(f"{one.name} must be a number") from None
    if math.isnan(number):
        raise FormError(f"{one.name} must be a number")
    if math.isinf(number):
        return Answer(None, "infinite")
    if (one.minimum is not None and number < one.minimum) or (one.maximum is not None and number > one.maximum):
        return Answer(None, "outside")
    return Answer(number)
