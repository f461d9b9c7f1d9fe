"""The metadata encoder: from the patient's form to a vector of numbers, fitted on the training rows alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.imputation import NeuralImputer, Span
from dualrefnet.data.schema import BOOLEAN_VALUES, DatasetSchema, MetadataField, is_blank, normalise_field
from dualrefnet.errors import DataError
from dualrefnet.recipe import MetadataSection


@dataclass(frozen=True)
class EncodedMetadata:
    """Encoded rows.

    Attributes:
        values: (N, M) float32; NaN where a field is missing for which the model has a learned token (imputation `token`).
        missing: (N, F) which fields of the tier were missing before imputation.
        rejected: (N, F) which of these were given, but as an unknown category or an unbelievable number.
        remarks: what was odd about the rows, one sentence each, without any patient's value.
    """

    values: NDArray[np.float32]
    missing: NDArray[np.bool_]
    rejected: NDArray[np.bool_]
    remarks: list[str]


@dataclass(frozen=True)
class MetadataEncoder:
    """A fitted encoder; make one with `fit` or `from_json`.

    Attributes:
        section: the recipe's choices.
        fields: the fields of the tier, in the schema's order.
        levels: for every field its categories in column order (empty for a number).
        centre: for every field the mean of the training rows (0 for a category).
        spread: for every field their standard deviation (1 for a category).
        imputer: fills gaps; None: gaps are zero, or NaN where the model has a learned token for them.
        leaked_classes: the diagnoses that the imputer reads; empty but for the demonstration of that leak.
    """

    section: MetadataSection
    fields: tuple[MetadataField, ...]
    levels: tuple[tuple[str, ...], ...]
    centre: tuple[float, ...]
    spread: tuple[float, ...]
    imputer: NeuralImputer | None
    leaked_classes: tuple[str, ...] = ()

    @classmethod
    def fit(cls, rows: pd.DataFrame, schema: DatasetSchema, section: MetadataSection, seed: int = 0) -> MetadataEncoder:
        """Learn categories, means and the imputer from training rows.

        Args:
            rows: training rows of a lesion table; the label isn't looked at (but by the imputation `label_leaking`).
            schema: what the columns mean.
            section: tier, imputation, scale and so on.
            seed: of the imputer.

        Raises:
            DataError: the tier has no field.
        """
        classes: tuple[str, ...] = ()
        fields = tuple(field for field in schema.fields if section.tier in ("M2", "M3") or (section.tier == "M1" and field.tier == "M1"))
        if not fields and section.tier != "M0":
            raise DataError(
                f"{schema.title} has no metadata field of tier {section.tier}"
                + (
                    "; no field is recorded for every image, so choose metadata.tier M2 or M3"
                    if schema.fields
                    else "; choose metadata.tier M0"
                )
            )
        levels, centre, spread = [], [], []
        for field in fields:
            levels.append(_levels(rows[field.name], field, section))
            numbers = rows[field.name].astype(float) if field.kind == "numeric" else pd.Series([0.0])
            known = bool(numbers.notna().any())
            centre.append(float(numbers.mean()) if known and field.kind == "numeric" else 0.0)
            deviation = float(numbers.std(ddof=0)) if known and field.kind == "numeric" else 1.0
            spread.append(deviation if deviation > 0 else 1.0)
        encoder = cls(section, fields, tuple(levels), tuple(centre), tuple(spread), None)
        if section.imputation in ("zero", "token") or not fields:
            return encoder
        columns, missing, _, _ = encoder._observe(rows)
        spans = encoder.spans
        if section.imputation == "label_leaking":
            classes = schema.classes
            columns, missing = _with_diagnosis(columns, missing, rows, classes)
            spans.append(Span(spans[-1].stop, spans[-1].stop + len(classes), False))
        imputer = NeuralImputer.fit(columns, missing, spans, seed)
        return cls(section, fields, tuple(levels), tuple(centre), tuple(spread), imputer, classes)

    @property
    def names(self) -> list[str]:
        """The M column names, such as `age`, `region_FACE`, `missing_smoke`."""
        names = []
        for field, levels in zip(self.fields, self.levels, strict=True):
            names += [field.name] if field.kind == "numeric" else [f"{field.name}_{level}" for level in levels]
        return names + [f"missing_{field.name}" for field in self._masked()]

    @property
    def width(self) -> int:
        """M, the length of an encoded row."""
        return len(self.names)

    @property
    def spans(self) -> list[Span]:
        """The columns of each field; the columns that say what is missing come after them."""
        spans, start = [], 0
        for field, levels in zip(self.fields, self.levels, strict=True):
            stop = start + (1 if field.kind == "numeric" else len(levels))
            spans.append(Span(start, stop, field.kind == "numeric"))
            start = stop
        return spans

    def encode(self, rows: pd.DataFrame) -> EncodedMetadata:
        """Encode rows; columns may be absent, values may be unknown: both count as missing and are remarked on.

        Args:
            rows: table with any of the fields' columns; raw values are fine (`yes`, 3.0).

        Raises:
            DataError: a numeric column holds text; or the gaps were filled from the diagnosis, and the rows have none.
        """
        columns, missing, rejected, remarks = self._observe(rows)
        if self.imputer is not None and self.leaked_classes:
            width = columns.shape[1]
            columns = self.imputer.fill(*_with_diagnosis(columns, missing, rows, self.leaked_classes))[:, :width]
        elif self.imputer is not None:
            columns = self.imputer.fill(columns, missing)
        if self.section.scale == "raw":
            for index, (field, span) in enumerate(zip(self.fields, self.spans, strict=True)):
                if field.kind == "numeric":
                    raw = columns[:, span.start] * self.spread[index] + self.centre[index]
                    # Zero imputation writes the number 0, as the literature's zero-filled columns do.
                    blank = missing[:, index] & (self.imputer is None)
                    columns[:, span.start] = np.where(blank, 0.0, raw)
        if self.section.imputation == "token":
            for index, span in enumerate(self.spans):
                columns[missing[:, index], span.start : span.stop] = np.nan
        mask = [missing[:, index] for index, field in enumerate(self.fields) if field in self._masked()]
        values = np.concatenate([columns, np.stack(mask, axis=1)], axis=1) if mask else columns
        return EncodedMetadata(values.astype(np.float32), missing, rejected, remarks)

    def to_json(self) -> dict[str, Any]:
        """Return the fitted state as plain JSON values."""
        return {
            "section": self.section.model_dump(mode="json"),
            "fields": [field.model_dump(mode="json", exclude_defaults=True) for field in self.fields],
            "levels": [list(levels) for levels in self.levels],
            "centre": list(self.centre),
            "spread": list(self.spread),
            "names": self.names,
            "imputer": self.imputer.to_json() if self.imputer else None,
            "leaked_classes": list(self.leaked_classes),
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> MetadataEncoder:
        """Rebuild from `to_json`."""
        return cls(
            MetadataSection.model_validate(state["section"]),
            tuple(MetadataField.model_validate(field) for field in state["fields"]),
            tuple(tuple(levels) for levels in state["levels"]),
            tuple(state["centre"]),
            tuple(state["spread"]),
            NeuralImputer.from_json(state["imputer"]) if state["imputer"] else None,
            tuple(state["leaked_classes"]),
        )

    def _masked(self) -> tuple[MetadataField, ...]:
        """The fields with a column that says whether they were missing (tier M3; a token says it itself)."""
        if self.section.tier != "M3" or self.section.imputation == "token":
            return ()
        return tuple(field for field in self.fields if field.tier == "M2" or (field.missing_codes and self.section.unknown == "missing"))

    def _observe(self, rows: pd.DataFrame) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_], list[str]]:
        """Return standardised numbers and indicators with zeros for gaps, the gaps, the rejected values, and remarks."""
        spans = self.spans
        columns = np.zeros((len(rows), spans[-1].stop if spans else 0), dtype=np.float32)
        missing = np.ones((len(rows), len(spans)), dtype=bool)
        rejected = np.zeros_like(missing)
        remarks: list[str] = []
        absent = [field.name for field in self.fields if field.name not in rows.columns]
        if absent:
            remarks.append(f"columns absent, treated as missing: {', '.join(absent)}")
        for index, (field, levels, span) in enumerate(zip(self.fields, self.levels, spans, strict=True)):
            if field.name in absent:
                continue
            values, said = normalise_field(rows[field.name], field)
            remarks += said
            if field.kind == "numeric":
                numbers = values.to_numpy(dtype=float)
                missing[:, index] = np.isnan(numbers)
                rejected[:, index] = missing[:, index] & ~is_blank(rows[field.name], field).to_numpy()
                columns[:, span.start] = np.nan_to_num((numbers - self.centre[index]) / self.spread[index])
                continue
            words = values.map(lambda value, field=field: _spell(value, field, self.section), na_action="ignore")
            position = {level: place for place, level in enumerate(levels)}
            codes = words.map(position).fillna(-1).to_numpy(dtype=int)
            rejected[:, index] = words.notna().to_numpy() & (codes < 0)
            if rejected[:, index].any():
                remarks.append(f"{field.name}: {rejected[:, index].sum()} values are none of the known categories, treated as missing")
            known = np.flatnonzero(codes >= 0)
            columns[known, span.start + codes[known]] = 1
            missing[:, index] = codes < 0
        return columns, missing, rejected, remarks


def _with_diagnosis(
    columns: NDArray[np.float32], missing: NDArray[np.bool_], rows: pd.DataFrame, classes: tuple[str, ...]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Append the diagnosis as one more field, as the imputation does that the paper cites: the leak to be demonstrated."""
    if "label" not in rows.columns:
        raise DataError(
            "this model was trained on metadata whose gaps were filled from the diagnosis (metadata.imputation label_leaking), "
            "a demonstration of a leak: where the diagnosis isn't known it can't be used"
        )
    diagnosis = np.stack([(rows["label"] == label).to_numpy(dtype=np.float32) for label in classes], axis=1)
    return np.concatenate([columns, diagnosis], axis=1), np.concatenate([missing, np.zeros((len(rows), 1), dtype=bool)], axis=1)


def _levels(values: pd.Series, field: MetadataField, section: MetadataSection) -> tuple[str, ...]:
    """Return the categories of a field in column order."""
    if field.kind == "numeric":
        return ()
    if field.kind == "boolean":
        levels = list(BOOLEAN_VALUES)
    elif field.categories:
        levels = list(field.categories)
    else:
        levels = sorted({_text for _text in values.dropna().astype(str) if _text not in field.missing_codes})
    if section.merge_aliases:
        levels = [field.aliases.get(level, level) for level in levels]
    if section.unknown == "level":
        levels += field.missing_codes
    return tuple(dict.fromkeys(levels))


def _spell(value: str, field: MetadataField, section: MetadataSection) -> str | float:
    """Return the category that a cell stands for, NaN for a missing code that is to be missing."""
    if section.unknown == "missing" and value in field.missing_codes:
        return float("nan")
    return field.aliases.get(value, value) if section.merge_aliases else value
