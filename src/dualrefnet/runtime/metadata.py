"""One answer on the form, read: a number within what can be believed, or a category."""

# also: Fill the gaps of encoded forms with what a small network finds likeliest; it is fitted in
# `dualrefnet.data.metadata`.
# also: The form: from a patient's answers to the vector of numbers that the model reads.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

BLANKS = ("", "nan", "NaN")


Word = TypeVar("Word", bound=int | str)


# Categories that an error lists.
MOST_LEVELS = 16


TRUE, FALSE = ("true", "yes", "y", "1", "1.0"), ("false", "no", "n", "0", "0.0")


class MetadataError(ValueError):
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
class FieldSpec:
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
    def from_json(cls, state: Mapping[str, Any]) -> FieldSpec:
        """Take what prediction needs of a field's description."""
        known = {name: state[name] for name in cls.__dataclass_fields__ if name in state}
        return cls(**known | {"missing_codes": tuple(known.get("missing_codes", ()))})


class ParsedValue(NamedTuple):
    """One answer, read.

    Attributes:
        value: a number, or the place of a category among the field's levels; None: there is none.
        odd: why an answer that was given counts as none: `infinite`, `outside` (the believable range) or `unknown`
            (category).
    """

    value: float | int | None
    invalid: str | None = None


def is_nothing(value: object) -> bool:
    """Return whether a cell holds nothing: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def normalise_value(value: object, one: Field) -> str:
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
    """Return a category without its case and spaces, as people's spellings of it differ: `Upper arm` and `UPPER_ARM `
    are one.
    """
    return "".join(word.replace("_", " ").split()).casefold()


def by_fold(words: Mapping[str, Word]) -> dict[str, Word]:
    """Return `fold` of each word -> what the word stands for, without the spellings that stand for several things."""
    found: dict[str, set[Word]] = {}
    for word, meaning in words.items():
        found.setdefault(fold(word), set()).add(meaning)
    return {spelling: next(iter(meanings)) for spelling, meanings in found.items() if len(meanings) == 1}


def explain_invalid(one: Field, levels: Sequence[str], odd: str) -> str:
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
    limits = (
        f"from {low} to {high}"
        if low and high
        else f"at least {low}"
        if low
        else f"at most {high}"
        if high
        else "finite"
    )
    return f"{one.name} must be a number, {limits}; leave it out if it isn't known"


def parse_number(value: object, one: Field) -> ParsedValue:
    """Read one answer to a numeric field.

    Raises:
        FormError: it is text, or yes or no.
    """
    if is_nothing(value) or str(value).strip() in (*BLANKS, *one.missing_codes):
        return ParsedValue(None)
    try:
        # Python reads 1_000 as a thousand, and no table means that; yes isn't the number 1.
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise ValueError
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return ParsedValue(None, "infinite")
    except (TypeError, ValueError):
        raise MetadataError(f"{one.name} must be a number") from None
    if math.isnan(number):
        raise MetadataError(f"{one.name} must be a number")
    if math.isinf(number):
        return ParsedValue(None, "infinite")
    if (one.minimum is not None and number < one.minimum) or (one.maximum is not None and number > one.maximum):
        return ParsedValue(None, "outside")
    return ParsedValue(number)


Array = NDArray[np.float32]


@dataclass(frozen=True)
class Span:
    """The columns `start:stop` that one field occupies; a numeric field has one column."""

    start: int
    stop: int
    numeric: bool


@dataclass(frozen=True)
class NeuralImputer:
    """A fitted imputer: plain arrays.

    Attributes:
        spans: the fields' columns, in order.
        weights: two layers, (K + F, HIDDEN), (HIDDEN,), (HIDDEN, K), (K,) with K columns and F fields.
        values: for every numeric field the standardised numbers that were observed; a filled number is one of them,
            since a value that nobody ever recorded would give away that it was filled.
    """

    spans: tuple[Span, ...]
    weights: tuple[Array, ...]
    values: tuple[Array, ...]

    def fill(self, columns: Array, missing: NDArray[np.bool_]) -> Array:
        """Return a copy of `columns` (N, K) in which the missing fields (N, F) hold the likeliest value."""
        if not missing.any():
            return columns.copy()
        output = network(np.concatenate([columns, missing.astype(np.float32)], axis=1), self.weights, np)
        filled = columns.copy()
        for index, (span, values) in enumerate(zip(self.spans, self.values, strict=True)):
            rows = np.flatnonzero(missing[:, index])
            # A category of which the training rows had no value has no column.
            if not len(rows) or span.stop == span.start:
                continue
            guess = output[rows, span.start : span.stop]
            if not span.numeric:
                filled[rows, span.start : span.stop] = np.eye(span.stop - span.start, dtype=np.float32)[
                    guess.argmax(axis=1)
                ]
            elif len(values):
                filled[rows, span.start] = values[np.abs(guess - values[None, :]).argmin(axis=1)]
        return filled

    def to_json(self) -> dict[str, Any]:
        """Return the fitted state as plain JSON values."""
        return {
            "spans": [[span.start, span.stop, span.numeric] for span in self.spans],
            "weights": [weight.tolist() for weight in self.weights],
            "values": [values.tolist() for values in self.values],
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> NeuralImputer:
        """Rebuild from `to_json`."""
        return cls(
            tuple(Span(int(start), int(stop), bool(numeric)) for start, stop, numeric in state["spans"]),
            tuple(np.asarray(weight, dtype=np.float32) for weight in state["weights"]),
            tuple(np.asarray(values, dtype=np.float32) for values in state["values"]),
        )


def network(x: Any, weights: Any, library: Any) -> Any:
    """Two layers with tanh; `library` is torch in training and numpy afterwards, the formula is one."""
    first, bias, second, last_bias = weights
    return library.tanh(x @ first + bias) @ second + last_bias


Mask = NDArray[np.bool_]


class Settings(Protocol):
    """How answers are encoded: the section `metadata` of a recipe, or of a bundle."""

    @property
    def tier(self) -> str:
        """M0, M1, M2 or M3; M3 includes flags of missing fields (research only)."""

    @property
    def imputation(self) -> str:
        """What fills gaps: `neural`, `zero`, `token` or `label_leaking`."""

    @property
    def unknown(self) -> str:
        """A missing code is a `level` of its own, or `missing`."""

    @property
    def scale(self) -> str:
        """Of numbers: `zscore` or `raw`."""

    @property
    def merge_aliases(self) -> bool:
        """Whether spellings of one value are one."""


@dataclass(frozen=True)
class FormSettings:
    """The settings of a bundle; see `Settings`."""

    tier: str
    imputation: str
    unknown: str
    scale: str
    merge_aliases: bool


class Observed(NamedTuple):
    """N forms before their gaps are filled.

    Attributes:
        columns: (N, K) standardised numbers and indicators, zero where missing.
        missing: (N, F) which fields have no answer.
        odd: for each field and reason why answers don't count, which rows they are in, (N,).
    """

    columns: Array
    missing: Mask
    invalid: dict[tuple[int, str], Mask]

    @property
    def rejected(self) -> Mask:
        """(N, F) which fields were answered with something that doesn't count."""
        rejected = np.zeros_like(self.missing)
        for (index, _), rows in self.invalid.items():
            rejected[:, index] |= rows
        return rejected


class EncodedRecords(NamedTuple):
    """N forms as the model reads them.

    Attributes:
        values: (N, M); NaN where a field is missing for which the model has a learned token.
        missing: (N, F).
    """

    values: Array
    missing: Mask


@dataclass(frozen=True)
class MetadataTransform:
    """A fitted encoder.

    Attributes:
        section: how answers are encoded.
        fields: the fields of the tier, in the schema's order.
        levels: for every field its categories in column order (empty for a number).
        centre: for every field the mean of the training rows (0 for a category).
        spread: for every field their standard deviation (1 for a category).
        imputer: fills gaps; None: gaps are zero, or NaN where the model has a learned token for them.
        leaked_classes: the diagnoses that the imputer reads; empty but for the demonstration of that leak.
    """

    section: Settings
    fields: tuple[Field, ...]
    categories: tuple[tuple[str, ...], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    imputer: NeuralImputer | None
    leaked_classes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> MetadataTransform:
        """Rebuild from what `MetadataEncoder.to_json` wrote."""
        section = FormSettings(**{name: state["section"][name] for name in FormSettings.__dataclass_fields__})
        return cls(section, tuple(FieldSpec.from_json(one) for one in state["fields"]), *fitted_state(state))

    @cached_property
    def names(self) -> list[str]:
        """The M column names, such as `age`, `region_FACE`, `missing_smoke`."""
        names = []
        for one, levels in zip(self.fields, self.categories, strict=True):
            names += [one.name] if one.kind == "numeric" else [f"{one.name}_{level}" for level in levels]
        return names + [f"missing_{self.fields[index].name}" for index in self._masked]

    @property
    def width(self) -> int:
        """M, the length of an encoded form."""
        return len(self.names)

    @cached_property
    def spans(self) -> list[Span]:
        """The columns of each field; the columns that say what is missing come after them."""
        spans, start = [], 0
        for one, levels in zip(self.fields, self.categories, strict=True):
            stop = start + (1 if one.kind == "numeric" else len(levels))
            spans.append(Span(start, stop, one.kind == "numeric"))
            start = stop
        return spans

    def encode_records(self, forms: Sequence[Mapping[str, Any]]) -> EncodedRecords:
        """Encode forms; a question that isn't answered (absent, None, NaN, empty) is missing.

        Args:
            forms: of each patient any subset of the fields, such as `{"age": 61, "region": "FACE"}`.

        Raises:
            FormError: a field is unknown, a value isn't a category of its field or a believable number; or gaps were
                filled from the
                diagnosis in training.
        """
        self.check(forms)
        if self.leaked_classes:
            raise MetadataError(
                "this model was trained on metadata whose gaps were filled from the diagnosis (metadata.imputation label_leaking), "
                "a demonstration of a leak: where the diagnosis isn't known it can't be used"
            )
        observed = self.observe([[form.get(one.name) for form in forms] for one in self.fields], len(forms))
        if observed.invalid:
            # To take it as missing would change the answer without a word.
            raise MetadataError(
                "; ".join(
                    explain_invalid(self.fields[index], self.categories[index], odd)
                    for index, odd in sorted(observed.invalid)
                )
            )
        columns = observed.columns if self.imputer is None else self.imputer.fill(observed.columns, observed.missing)
        return EncodedRecords(self.finalise(columns, observed.missing), observed.missing)

    def check(self, forms: Sequence[Mapping[str, Any]]) -> None:
        """Refuse forms that ask for a field that isn't there; a model of no field ignores all.

        Raises:
            FormError: a field is unknown.
        """
        names = {one.name for one in self.fields}
        unknown = sorted({str(name) for form in forms for name in form} - names)
        if unknown and names:
            raise MetadataError(
                f"unknown metadata fields: {', '.join(name[:40] for name in unknown[:5])}; this model knows: "
                f"{', '.join(one.name for one in self.fields)}"
            )

    def observe(self, answers: Sequence[Sequence[object] | None], number: int) -> Observed:
        """Read the answers of N patients.

        Args:
            answers: for every field the N answers; None: nobody was asked.
            number: N.

        Raises:
            FormError: text stands where a number should.
        """
        columns = np.zeros((number, self.spans[-1].stop if self.spans else 0), dtype=np.float32)
        missing = np.ones((number, len(self.fields)), dtype=bool)
        odd: dict[tuple[int, str], Mask] = {}
        for index, (one, span, given) in enumerate(zip(self.fields, self.spans, answers, strict=True)):
            if given is None:
                continue
            # Patients give the same few answers. True, 1 and 1.0 are one key of a dictionary, and different answers.
            known: dict[tuple[type, object], ParsedValue] = {}
            not_numbers = 0
            for row, value in enumerate(given):
                key = (type(value), value if isinstance(value, str | int | float | bool) else str(value))
                try:
                    answer = known[key] if key in known else self.parse(index, value)
                except MetadataError:
                    not_numbers += 1
                    continue
                known[key] = answer
                if answer.invalid is not None:
                    odd.setdefault((index, answer.invalid), np.zeros(number, dtype=bool))[row] = True
                if answer.value is None:
                    continue
                missing[row, index] = False
                if one.kind == "numeric":
                    columns[row, span.start] = (answer.value - self.mean[index]) / self.std[index]
                else:
                    columns[row, span.start + int(answer.value)] = 1
            if not_numbers:
                error = MetadataError(f"{one.name} must be a number")
                error.rows = not_numbers
                raise error
        return Observed(columns, missing, odd)

    def parse(self, index: int, value: object) -> ParsedValue:
        """Read one answer to the field of that index.

        Raises:
            FormError: text stands where a number should.
        """
        one = self.fields[index]
        if is_nothing(value):
            return ParsedValue(None)
        if one.kind == "numeric":
            return parse_number(value, one)
        word = normalise_value(value, one)
        if word == "" or (self.section.unknown == "missing" and fold(word) in map(fold, one.missing_codes)):
            return ParsedValue(None)
        exact, folded = self._places[index]
        place = exact.get(word, folded.get(fold(word)))
        return ParsedValue(place, None if place is not None else "unknown")

    def finalise(self, columns: Array, missing: Mask) -> Array:
        """Scale filled columns (N, K), mark what has a token, and append which fields are missing: (N, M)."""
        if self.section.scale == "raw":
            for index, (one, span) in enumerate(zip(self.fields, self.spans, strict=True)):
                if one.kind == "numeric":
                    raw = columns[:, span.start] * self.std[index] + self.mean[index]
                    # Zero imputation writes the number 0, as the literature's zero-filled columns do.
                    blank = missing[:, index] & (self.imputer is None)
                    columns[:, span.start] = np.where(blank, 0.0, raw)
        if self.section.imputation == "token":
            for index, span in enumerate(self.spans):
                columns[missing[:, index], span.start : span.stop] = np.nan
        values = np.concatenate([columns, missing[:, self._masked]], axis=1) if self._masked else columns
        return np.asarray(values, dtype=np.float32)

    @property
    def shows_missing(self) -> bool:
        """True if the encoded form tells which fields are missing, by flags or by zeros."""
        return bool(self._masked) or (self.section.imputation == "zero" and bool(self.fields))

    @cached_property
    def _masked(self) -> list[int]:
        """The fields with a column that says whether they were missing (tier M3; a token says it itself)."""
        if self.section.tier != "M3" or self.section.imputation == "token":
            return []
        codes = self.section.unknown == "missing"
        return [index for index, one in enumerate(self.fields) if one.tier == "M2" or (one.missing_codes and codes)]

    @cached_property
    def _places(self) -> list[tuple[dict[str, int], dict[str, int]]]:
        """For every field, category -> place; and the same by `fold`, without those that several categories share."""
        places = []
        for one, levels in zip(self.fields, self.categories, strict=True):
            exact = {level: place for place, level in enumerate(levels)}
            if self.section.merge_aliases:
                exact = {alias: exact[level] for alias, level in one.aliases.items() if level in exact} | exact
            places.append((exact, by_fold(exact)))
        return places


def fitted_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return levels, centre, spread, imputer and leaked classes of what `to_json` wrote."""
    return (
        tuple(tuple(levels) for levels in state["levels"]),
        tuple(state["centre"]),
        tuple(state["spread"]),
        NeuralImputer.from_json(state["imputer"]) if state["imputer"] else None,
        tuple(state["leaked_classes"]),
    )
