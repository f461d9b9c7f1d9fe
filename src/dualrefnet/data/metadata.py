"""Neural imputation of missing metadata, without the label.

The imputation cited by the paper reads the diagnosis among its inputs and so writes it into the filled fields. This one
sees the other metadata fields of the training rows and nothing else: a small network is trained to rebuild fields that
were hidden from it on purpose. (`label_leaking` gives it the diagnosis as one more field, to show what that does.)
"""

# also: The metadata encoder: from the patient's form to a vector of numbers, fitted on the training rows alone.

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.schema import BOOLEAN_VALUES, DatasetSchema, MetadataField, odd_remark
from dualrefnet.errors import DataError
from dualrefnet.recipe import MetadataSection
from dualrefnet.runtime.metadata import (
    MetadataError,
    MetadataTransform,
    NeuralImputer,
    Observed,
    Span,
    fitted_state,
    network,
)

Array = NDArray[np.float32]


HIDDEN = 64


STEPS = 400


BATCH = 512


# Of 600 distinct observed numbers a filled value needs no finer choice than 200 quantiles.
MOST_VALUES = 200


# Imputers fitted in this process: a suite trains many methods on the same rows, and the same question has the same
# answer.
REMEMBERED = 32


_remembered: dict[str, NeuralImputer] = {}


def fit_imputer(columns: Array, missing: NDArray[np.bool_], spans: list[Span], seed: int) -> NeuralImputer:
    """Train on the training rows, or remember what the same rows, spans and seed gave in this process.

    Args:
        columns: (N, K) standardised numbers and indicators, zero where missing.
        missing: (N, F) which fields are missing.
        spans: the F fields.
        seed: of initial weights, batches and hidden fields.
    """
    key = hashlib.sha256(
        columns.tobytes() + missing.tobytes() + repr((columns.shape, spans, seed, STEPS)).encode()
    ).hexdigest()
    if key not in _remembered:
        while len(_remembered) >= REMEMBERED:
            _remembered.pop(next(iter(_remembered)))
        _remembered[key] = _train(columns, missing, spans, seed)
    return _remembered[key]


def _train(columns: Array, missing: NDArray[np.bool_], spans: list[Span], seed: int) -> NeuralImputer:
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(seed)
    x, hidden_fields = torch.from_numpy(columns), torch.from_numpy(missing)
    count, fields = missing.shape
    sizes = [(columns.shape[1] + fields, HIDDEN), (HIDDEN,), (HIDDEN, columns.shape[1]), (columns.shape[1],)]
    weights = [torch.randn(size, generator=generator) * (size[0] ** -0.5 if len(size) == 2 else 0.0) for size in sizes]
    for weight in weights:
        weight.requires_grad_()
    # (F, K): which columns belong to which field.
    owner = torch.zeros(fields, columns.shape[1])
    for index, span in enumerate(spans):
        owner[index, span.start : span.stop] = 1
    optimizer = torch.optim.Adam(weights, lr=0.01)
    # The steps are tiny: several threads only wait for each other, and one gives the same numbers on any machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(STEPS):
            rows = torch.randint(count, (min(BATCH, count),), generator=generator)
            # A row hides between none and all of its fields, so that any pattern of gaps is met in training.
            share = torch.rand(len(rows), 1, generator=generator)
            hide = hidden_fields[rows] | (torch.rand(len(rows), fields, generator=generator) < share)
            output = network(torch.cat([x[rows] * (1 - hide.float() @ owner), hide.float()], dim=1), weights, torch)
            loss = 0 * output.sum()  # A batch may hold rows without a single answer.
            for index, span in enumerate(spans):
                known = ~hidden_fields[rows, index]
                if not known.any():
                    continue
                guess, truth = output[known, span.start : span.stop], x[rows][known, span.start : span.stop]
                loss = loss + (
                    functional.mse_loss(guess, truth) if span.numeric else functional.cross_entropy(guess, truth)
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    values = []
    for index, span in enumerate(spans):
        observed = np.unique(columns[~missing[:, index], span.start]) if span.numeric else np.empty(0, np.float32)
        if len(observed) > MOST_VALUES:
            observed = np.quantile(observed, np.linspace(0, 1, MOST_VALUES), method="nearest").astype(np.float32)
        values.append(observed)
    return NeuralImputer(tuple(spans), tuple(weight.detach().numpy() for weight in weights), tuple(values))


# Shares of cancers among complete and incomplete rows that differ by less aren't spoken of.
TELLING = 0.1


@dataclass(frozen=True)
class EncodedMetadata:
    """Encoded rows.

    Attributes:
        values: (N, M) float32; NaN where a field is missing for which the model has a learned token (imputation
            `token`).
        missing: (N, F) which fields of the tier were missing before imputation.
        rejected: (N, F) which of these were given, but as an unknown category or an unbelievable number.
        remarks: what was odd about the rows, one sentence each, without any patient's value.
    """

    values: NDArray[np.float32]
    missing: NDArray[np.bool_]
    rejected: NDArray[np.bool_]
    remarks: list[str]


@dataclass(frozen=True)
class MetadataEncoder(MetadataTransform):
    """A form encoder that is fitted to tables and reads tables; make one with `fit` or `from_json`.

    Attributes:
        section: the recipe's choices.
        fields: the fields of the tier, in the schema's order.
    """

    section: MetadataSection
    fields: tuple[MetadataField, ...]

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
        fields = tuple(
            field
            for field in schema.fields
            if section.tier in ("M2", "M3") or (section.tier == "M1" and field.tier == "M1")
        )
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
        observed, _ = encoder._observe(rows)
        columns, missing = observed.columns, observed.missing
        spans = list(encoder.spans)
        if section.imputation == "label_leaking":
            classes = schema.classes
            columns, missing = _with_diagnosis(columns, missing, rows, classes)
            spans.append(Span(spans[-1].stop, spans[-1].stop + len(classes), False))
        imputer = fit_imputer(columns, missing, spans, seed)
        return cls(section, fields, tuple(levels), tuple(centre), tuple(spread), imputer, classes)

    def encode(self, rows: pd.DataFrame) -> EncodedMetadata:
        """Encode rows; columns may be absent, values may be unknown: both count as missing and are remarked on.

        Args:
            rows: table with any of the fields' columns; raw values are fine (`yes`, 3.0).

        Raises:
            DataError: a numeric column holds text; or the gaps were filled from the diagnosis, and the rows have none.
        """
        observed, remarks = self._observe(rows)
        columns, missing = observed.columns, observed.missing
        if self.imputer is not None and self.leaked_classes:
            width = columns.shape[1]
            columns = self.imputer.fill(*_with_diagnosis(columns, missing, rows, self.leaked_classes))[:, :width]
        elif self.imputer is not None:
            columns = self.imputer.fill(columns, missing)
        return EncodedMetadata(self.finalise(columns, missing), missing, observed.rejected, remarks)

    def to_json(self) -> dict[str, Any]:
        """Return the fitted state as plain JSON values."""
        return {
            "section": self.section.model_dump(mode="json"),
            "fields": [field.model_dump(mode="json", exclude_defaults=True) for field in self.fields],
            "levels": [list(levels) for levels in self.categories],
            "centre": list(self.mean),
            "spread": list(self.std),
            "names": self.names,
            "imputer": self.imputer.to_json() if self.imputer else None,
            "leaked_classes": list(self.leaked_classes),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> MetadataEncoder:
        """Rebuild from `to_json`."""
        fields = tuple(MetadataField.model_validate(field) for field in state["fields"])
        return cls(MetadataSection.model_validate(state["section"]), fields, *fitted_state(state))

    def _observe(self, rows: pd.DataFrame) -> tuple[Observed, list[str]]:
        """Read a table's answers; return them with what is to be remarked on."""
        absent = [field.name for field in self.fields if field.name not in rows.columns]
        remarks = [f"columns absent, treated as missing: {', '.join(absent)}"] if absent else []
        cells = [
            None
            if field.name in absent
            else rows[field.name].astype(object).where(rows[field.name].notna(), None).tolist()
            for field in self.fields
        ]
        try:
            observed = self.observe(cells, len(rows))
        except MetadataError as error:
            raise DataError(f"{error}, and {error.rows} rows hold text; is it the right column?") from None
        remarks += [
            odd_remark(self.fields[index], odd, int(which.sum()))
            for (index, odd), which in sorted(observed.invalid.items())
        ]
        return observed, remarks


def missingness_shown(encoder: MetadataEncoder, rows: pd.DataFrame, schema: DatasetSchema) -> str | None:
    """Warn of an encoding that shows the model which fields are missing, where that tells cancers from benign lesions.

    Args:
        encoder: fitted to `rows`.
        rows: of the training side.
        schema: which classes are malignant.

    Returns:
        A sentence; None if the encoding doesn't show it (a learned token with `modality_dropout` may stand anywhere),
        or it tells nothing.
    """
    if not encoder.shows_missing or not schema.malignant:
        return None
    some = encoder.encode(rows).missing.any(axis=1)
    if some.all() or not some.any():
        return None
    cancer = rows["label"].isin(schema.malignant).to_numpy()
    without, complete = cancer[some].mean(), cancer[~some].mean()
    if abs(without - complete) < TELLING:
        return None
    return (
        f"metadata.tier {encoder.section.tier} with imputation {encoder.section.imputation} shows the model which fields are missing, and "
        f"that tells the class: {without:.0%} of the training rows with missing fields are malignant, {complete:.0%} of the complete ones. "
        "For research only; metadata.tier=M2 metadata.imputation=token with modality_dropout hides it"
    )


def _with_diagnosis(
    columns: NDArray[np.float32], missing: NDArray[np.bool_], rows: pd.DataFrame, classes: tuple[str, ...]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Append the diagnosis as one more field, as the imputation does that the paper cites: the leak to be
    demonstrated.
    """
    if "label" not in rows.columns:
        raise DataError(
            "this model was trained on metadata whose gaps were filled from the diagnosis (metadata.imputation label_leaking), "
            "a demonstration of a leak: where the diagnosis isn't known it can't be used"
        )
    diagnosis = np.stack([(rows["label"] == label).to_numpy(dtype=np.float32) for label in classes], axis=1)
    return np.concatenate([columns, diagnosis], axis=1), np.concatenate(
        [missing, np.zeros((len(rows), 1), dtype=bool)], axis=1
    )


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
