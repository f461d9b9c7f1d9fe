"""Metadata: from the raw values of a patient's fields to the vector that the model reads.

Parsing, imputation and encoding are one code for training tables and for single requests; `dualrefnet.data.metadata`
fits what is applied here.
"""

# ruff: noqa: B905 (zip of Python 3.9 can't be strict)
from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Key = TypeVar("Key", int, str)

# What an empty cell is called by spreadsheets, R, pandas, SQL and SAS; without case.
MISSING_WORDS = frozenset(
    ("", "na", "n/a", "n.a.", "#n/a", "<na>", "nan", "nat", "null", "none", "-", "--", "\u2013", "\u2014", ".", "?")
)
# What can't be seen and is no space: byte-order marks, zero-width spaces, soft hyphens.
INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060\u00ad"))
# 1,234 may be a thousand or one and a bit: it is no number.
DECIMAL_COMMA = re.compile(r"[+-]?(0,\d+|\d+,\d{1,2}|\d+,\d{4,})")
# No measure of a patient is larger; what is would overflow in the network.
LARGEST = 1e15
TRUE, FALSE = ("true", "yes", "y", "1", "1.0"), ("false", "no", "n", "0", "0.0")
# Categories that an error lists.
MAX_LISTED = 16


class MetadataError(ValueError):
    """Metadata that the model can't read, in `rows` rows; the message names fields and never repeats a value."""

    rows: int = 1


class Field(Protocol):
    """A metadata field: `dualrefnet.data.schema.MetadataField`, or `FieldSpec` of a bundle."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...  # numeric, boolean or categorical
    @property
    def unit(self) -> str | None: ...
    @property
    def tier(self) -> str: ...  # M1: recorded for every patient
    @property
    def missing_codes(self) -> tuple[str, ...]: ...  # strings that stand for "asked, not known"
    @property
    def aliases(self) -> Mapping[str, str]: ...  # spelling -> category
    @property
    def minimum(self) -> float | None: ...
    @property
    def maximum(self) -> float | None: ...
    @property
    def description(self) -> str: ...


@dataclass(frozen=True)
class FieldSpec:
    """A field of a bundle; see `Field`."""

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
        known = {name: state[name] for name in cls.__dataclass_fields__ if name in state}
        return cls(**known | {"missing_codes": tuple(known.get("missing_codes", ()))})


class EncodingSettings(Protocol):
    """How values are encoded: the section `metadata` of a recipe, or of a bundle."""

    @property
    def tier(self) -> str: ...  # M0 to M3; M3 adds flags of missing fields (research only)
    @property
    def imputation(self) -> str: ...  # neural, zero, token or label_leaking
    @property
    def unknown(self) -> str: ...  # a missing code is a `level` of its own, or `missing`
    @property
    def scale(self) -> str: ...  # zscore or raw
    @property
    def merge_aliases(self) -> bool: ...


class ParsedValue(NamedTuple):
    value: float | int | None  # a number, or the index of a category; None: missing
    invalid: str | None = None  # why a given value counts as missing: infinite, outside (the range) or unknown


def read_cell(value: object, declared: Collection[str] = ()) -> str | None:
    """Return a cell as stripped text, None if it says nothing, as `NA` does where that isn't `declared` as a word."""
    if _is_none(value):
        return None
    text = unicodedata.normalize("NFC", " ".join(str(value).translate(INVISIBLE).split()))
    # A column of whole numbers with gaps is read as floats: `3.0` is `3`.
    whole = text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdigit() else text
    if isinstance(value, float) and value.is_integer():
        whole = str(int(value))
    return None if whole.casefold() in MISSING_WORDS and whole not in declared else whole


def normalise_value(value: object, field: Field, declared: Collection[str] = ()) -> str | None:
    """Write a value as a category: 3.0 -> `3`, yes/1/true -> `True`; None if it is missing."""
    text = read_cell(value, declared)
    if text is not None and field.kind == "boolean" and text.lower() in TRUE + FALSE:
        return str(text.lower() in TRUE)
    return text


def fold(word: str) -> str:
    """Return a category without case, spaces and underscores: `Upper arm` and `UPPER_ARM ` are one."""
    return "".join(word.replace("_", " ").split()).casefold()


def by_fold(words: Mapping[str, Key]) -> dict[str, Key]:
    """Return `fold` of each word -> what the word stands for, without spellings that stand for several things."""
    meanings: dict[str, set[Key]] = {}
    for word, meaning in words.items():
        meanings.setdefault(fold(word), set()).add(meaning)
    return {spelling: next(iter(found)) for spelling, found in meanings.items() if len(found) == 1}


def explain_invalid(field: Field, categories: Sequence[str], invalid: str) -> str:
    """Say what the value of a field may be; `invalid` is that of `ParsedValue`."""
    if invalid == "unknown":
        listed = ", ".join(categories[:MAX_LISTED]) + (", ..." if len(categories) > MAX_LISTED else "")
        return f"{field.name} is not one of its categories ({listed}); leave it out if it isn't known"
    limits = (("at least", field.minimum), ("at most", field.maximum))
    bounds = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
    return f"{field.name} must be a number, {bounds or 'finite'}; leave it out if it isn't known"


def parse_number(value: object, field: Field) -> ParsedValue:
    word = read_cell(value)
    if word is None or word in field.missing_codes:
        return ParsedValue(None)
    try:
        number = read_number(value)
    except OverflowError:
        return ParsedValue(None, "infinite")
    except (TypeError, ValueError):
        raise MetadataError(f"{field.name} must be a number") from None
    if math.isnan(number):
        raise MetadataError(f"{field.name} must be a number")
    if abs(number) > LARGEST:
        return ParsedValue(None, "infinite")
    too_small = field.minimum is not None and number < field.minimum
    too_large = field.maximum is not None and number > field.maximum
    return ParsedValue(None, "outside") if too_small or too_large else ParsedValue(number)


def read_number(value: object) -> float:
    """Return a number that is written with a decimal point or an unmistakable decimal comma; else a ValueError."""
    # Python reads 1_000 as a thousand, and no table means that; yes isn't the number 1.
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise ValueError
    if isinstance(value, str) and DECIMAL_COMMA.fullmatch(value.strip()):
        value = value.replace(",", ".")
    return float(value)  # type: ignore[arg-type]


def _is_none(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True)
class Span:
    """The columns `start:stop` that one field occupies; a numeric field has one column."""

    start: int
    stop: int
    numeric: bool


@dataclass(frozen=True)
class NeuralImputer:
    """A fitted imputer: the columns of the F fields in order (`spans`), and two layers, (K + F, HIDDEN), (HIDDEN,),
    (HIDDEN, K), (K,) with K columns.

    An imputed number is one of the observed standardised `values` of its field, since one that nobody ever recorded
    would give away that it was imputed.
    """

    spans: tuple[Span, ...]
    weights: tuple[Array, ...]
    values: tuple[Array, ...]

    def fill(self, columns: Array, missing: Mask) -> Array:
        """Return a copy of `columns` (N, K) in which the missing fields (N, F) hold the likeliest value."""
        filled = columns.copy()
        if not missing.any():
            return filled
        output = network(np.concatenate([columns, missing.astype(np.float32)], axis=1), self.weights, np)
        for index, (span, values) in enumerate(zip(self.spans, self.values)):
            rows = np.flatnonzero(missing[:, index])
            width = span.stop - span.start
            # A categorical field without a value in the training rows has no column.
            if not len(rows) or not width:
                continue
            guess = output[rows, span.start : span.stop]
            if not span.numeric:
                filled[rows, span.start : span.stop] = np.eye(width, dtype=np.float32)[guess.argmax(axis=1)]
            elif len(values):
                filled[rows, span.start] = values[np.abs(guess - values[None, :]).argmin(axis=1)]
        return filled

    def to_json(self) -> dict[str, Any]:
        return {
            "spans": [[span.start, span.stop, span.numeric] for span in self.spans],
            "weights": [weight.tolist() for weight in self.weights],
            "values": [values.tolist() for values in self.values],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> NeuralImputer:
        return cls(
            tuple(Span(int(start), int(stop), bool(numeric)) for start, stop, numeric in state["spans"]),
            tuple(np.asarray(weight, dtype=np.float32) for weight in state["weights"]),
            tuple(np.asarray(values, dtype=np.float32) for values in state["values"]),
        )


def network(x: Any, weights: Any, library: Any) -> Any:
    """Two layers with tanh; `library` is torch in training and numpy afterwards, the formula is one."""
    first, bias, second, last_bias = weights
    return library.tanh(x @ first + bias) @ second + last_bias


class Observed(NamedTuple):
    """N records before imputation."""

    columns: Array  # (N, K) standardised numbers and indicators, zero where missing
    missing: Mask  # (N, F)
    invalid: dict[tuple[int, str], Mask]  # (index of the field, reason) -> rows, (N,)

    @property
    def rejected(self) -> Mask:
        """(N, F) which fields were given with a value that doesn't count."""
        rejected = np.zeros_like(self.missing)
        for (index, _), rows in self.invalid.items():
            rejected[:, index] |= rows
        return rejected


class EncodedRecords(NamedTuple):
    """N records as the model reads them."""

    values: Array  # (N, M); NaN where a field is missing for which the model has a learned token
    missing: Mask  # (N, F)


@dataclass(frozen=True)
class MetadataTransform:
    """A fitted encoder of F fields (of the tier, in the schema's order) into M columns.

    `categories` of every field are in column order (empty for a number); `mean` and `std` are those of the training
    rows (0 and 1 for a category). Without an `imputer` missing fields are zero, or NaN where the model has a learned
    token for them. `leaked_classes` are the diagnoses that the imputer reads; empty but for the demonstration of that
    leak.
    """

    section: EncodingSettings
    fields: tuple[Field, ...]
    categories: tuple[tuple[str, ...], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    imputer: NeuralImputer | None
    leaked_classes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> MetadataTransform:
        """Rebuild from what `dualrefnet.data.metadata.MetadataEncoder.to_json` wrote."""
        fitted = [state[name] for name in ("fields", "levels", "centre", "spread")]
        if len({len(values) for values in fitted}) != 1 or 0 in state["spread"]:
            raise ValueError("the encoding of the metadata doesn't fit its fields")
        section = cast(EncodingSettings, SimpleNamespace(**state["section"]))
        return cls(section, tuple(FieldSpec.from_json(one) for one in state["fields"]), *fitted_state(state))

    @cached_property
    def names(self) -> list[str]:
        """The M column names, such as `age`, `region_FACE`, `missing_smoke`."""
        names = []
        for one, categories in zip(self.fields, self.categories):
            names += [one.name] if one.kind == "numeric" else [f"{one.name}_{category}" for category in categories]
        return names + [f"missing_{self.fields[index].name}" for index in self._flagged]

    @property
    def width(self) -> int:
        """M, the length of an encoded record."""
        return len(self.names)

    @cached_property
    def spans(self) -> list[Span]:
        """The columns of each field; flags of missing fields come after them."""
        spans, start = [], 0
        for one, categories in zip(self.fields, self.categories):
            stop = start + (1 if one.kind == "numeric" else len(categories))
            spans.append(Span(start, stop, one.kind == "numeric"))
            start = stop
        return spans

    def encode_records(self, records: Sequence[Mapping[str, Any]]) -> EncodedRecords:
        """Encode records, each any subset of the fields; one that is left out, None, NaN or empty is missing."""
        self.check_names(records)
        if self.leaked_classes:
            raise MetadataError(
                "this model was trained on metadata imputed from the diagnosis (metadata.imputation label_leaking), a "
                "demonstration of a leak: it can't be used where the diagnosis isn't known"
            )
        observed = self.observe([[record.get(one.name) for record in records] for one in self.fields], len(records))
        if observed.invalid:
            # Taken as missing, it would change the prediction without a word.
            reasons = sorted(observed.invalid)
            raise MetadataError(
                "; ".join(explain_invalid(self.fields[index], self.categories[index], why) for index, why in reasons)
            )
        columns = observed.columns if self.imputer is None else self.imputer.fill(observed.columns, observed.missing)
        return EncodedRecords(self.finalise(columns, observed.missing), observed.missing)

    def check_names(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Refuse records with an unknown field; a model without fields ignores all."""
        names = [one.name for one in self.fields]
        unknown = sorted({str(name) for record in records for name in record}.difference(names))
        if unknown and names:
            shown = ", ".join(name[:40] for name in unknown[:5])
            raise MetadataError(f"unknown metadata fields: {shown}; this model knows: {', '.join(names)}")

    def observe(self, values: Sequence[Sequence[object] | None], number: int) -> Observed:
        """Parse the N values of every field (None: the whole column is missing)."""
        columns = np.zeros((number, self.spans[-1].stop if self.spans else 0), dtype=np.float32)
        missing = np.ones((number, len(self.fields)), dtype=bool)
        invalid: dict[tuple[int, str], Mask] = {}
        for index, (one, span, column) in enumerate(zip(self.fields, self.spans, values)):
            # Patients have the same few values. True, 1 and 1.0 are one key of a dictionary, and different values.
            known: dict[tuple[type, object], ParsedValue] = {}
            not_numbers = 0
            for row, value in enumerate(column or ()):
                key = (type(value), value if isinstance(value, (str, int, float)) else str(value))
                try:
                    parsed = known[key] if key in known else self.parse(index, value)
                except MetadataError:
                    not_numbers += 1
                    continue
                known[key] = parsed
                if parsed.invalid is not None:
                    invalid.setdefault((index, parsed.invalid), np.zeros(number, dtype=bool))[row] = True
                if parsed.value is None:
                    continue
                missing[row, index] = False
                if one.kind == "numeric":
                    columns[row, span.start] = (parsed.value - self.mean[index]) / self.std[index]
                else:
                    columns[row, span.start + int(parsed.value)] = 1
            if not_numbers:
                error = MetadataError(f"{one.name} must be a number")
                error.rows = not_numbers
                raise error
        return Observed(columns, missing, invalid)

    def parse(self, index: int, value: object) -> ParsedValue:
        one = self.fields[index]
        if one.kind == "numeric":
            return parse_number(value, one)
        exact, folded = self._lookup[index]
        word = normalise_value(value, one, (*exact, *one.missing_codes))
        if word is None or (self.section.unknown == "missing" and fold(word) in map(fold, one.missing_codes)):
            return ParsedValue(None)
        place = exact.get(word, folded.get(fold(word)))
        return ParsedValue(place, None if place is not None else "unknown")

    def finalise(self, columns: Array, missing: Mask) -> Array:
        """Return (N, M): imputed columns (N, K) scaled, NaN where a token stands, flags of missing fields appended."""
        if self.section.scale == "raw":
            for index, span in enumerate(self.spans):
                if span.numeric:
                    raw = columns[:, span.start] * self.std[index] + self.mean[index]
                    # Zero imputation writes the number 0, as the literature's zero-filled columns do.
                    blank = missing[:, index] & (self.imputer is None)
                    columns[:, span.start] = np.where(blank, 0.0, raw)
        if self.section.imputation == "token":
            for index, span in enumerate(self.spans):
                columns[missing[:, index], span.start : span.stop] = np.nan
        values = np.concatenate([columns, missing[:, self._flagged]], axis=1) if self._flagged else columns
        return np.asarray(values, dtype=np.float32)

    @property
    def shows_missing(self) -> bool:
        """Whether the encoded record tells which fields are missing, by flags or by zeros."""
        return bool(self._flagged) or (self.section.imputation == "zero" and bool(self.fields))

    @cached_property
    def _flagged(self) -> list[int]:
        """The fields with a flag of whether they are missing (tier M3; a token says it itself)."""
        if self.section.tier != "M3" or self.section.imputation == "token":
            return []
        codes = self.section.unknown == "missing"
        return [index for index, one in enumerate(self.fields) if one.tier == "M2" or (one.missing_codes and codes)]

    @cached_property
    def _lookup(self) -> list[tuple[dict[str, int], dict[str, int]]]:
        """For every field, category -> index; and the same by `fold`, without those that several categories share."""
        lookup = []
        for one, categories in zip(self.fields, self.categories):
            exact = {category: index for index, category in enumerate(categories)}
            if self.section.merge_aliases:
                exact = {alias: exact[name] for alias, name in one.aliases.items() if name in exact} | exact
            lookup.append((exact, by_fold(exact)))
        return lookup


def fitted_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return categories, mean, std, imputer and leaked classes of what `to_json` wrote."""
    return (
        tuple(tuple(categories) for categories in state["levels"]),
        tuple(state["centre"]),
        tuple(state["spread"]),
        NeuralImputer.from_json(state["imputer"]) if state["imputer"] else None,
        tuple(state["leaked_classes"]),
    )
