"""The metadata encoder, fitted on the training rows alone: from metadata values to a vector of numbers.

Its neural imputation sees no label. The imputation cited by the paper reads the diagnosis among its inputs and so
writes it into the imputed fields; this one sees the other metadata fields of the training rows and nothing else: a
small network is trained to reconstruct fields that were hidden from it. (`label_leaking` gives it the diagnosis as one
more field, to demonstrate that leak.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dualrefnet.data.schema import BOOLEAN_VALUES, DatasetSchema, MetadataField, invalid_warning
from dualrefnet.errors import DataError
from dualrefnet.recipe import MetadataSection
from dualrefnet.runtime import metadata as runtime
from dualrefnet.runtime.metadata import MetadataTransform, NeuralImputer, Observed, Span

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

HIDDEN = 64
STEPS = 400
BATCH = 512
# Of 600 distinct observed numbers an imputed value needs no finer choice than 200 quantiles.
MOST_VALUES = 200
# Shares of malignant rows among complete and incomplete rows that differ by less raise no warning.
TELLING = 0.1
# Imputers fitted in this process: a suite trains many methods on the same rows.
CACHE_SIZE = 32
_cache: dict[str, NeuralImputer] = {}


@dataclass(frozen=True)
class EncodedMetadata:
    values: Array  # (N, M); NaN where a field is missing for which the model has a learned token
    missing: Mask  # (N, F) which fields of the tier were missing before imputation
    invalid: Mask  # (N, F) which of these were given, but as an unknown category or an implausible number
    warnings: list[str]  # what was wrong with the rows, one sentence each, without any patient's value


@dataclass(frozen=True)
class MetadataEncoder(MetadataTransform):
    """The transform of a bundle that is also fitted to tables and reads tables; make one with `fit` or `from_json`."""

    section: MetadataSection
    fields: tuple[MetadataField, ...]  # of the tier, in the schema's order

    @classmethod
    def fit(cls, rows: pd.DataFrame, schema: DatasetSchema, section: MetadataSection, seed: int = 0) -> MetadataEncoder:
        """Learn categories, means, deviations and the imputer from training rows; `seed` is the imputer's."""
        import pandas as pd

        tiers = {"M0": (), "M1": ("M1",), "M2": ("M1", "M2"), "M3": ("M1", "M2")}[section.tier]
        fields = tuple(field for field in schema.fields if field.tier in tiers)
        if not fields and section.tier != "M0":
            instead = "choose metadata.tier M0"
            if schema.fields:
                instead = "no field is recorded for every image, so choose metadata.tier M2 or M3"
            raise DataError(f"{schema.title} has no metadata field of tier {section.tier}; {instead}")
        categories = tuple(_categories(rows[field.name], field, section) for field in fields)
        numbers = [rows[field.name].astype(float) if field.kind == "numeric" else pd.Series([0.0]) for field in fields]
        means = tuple(float(one.mean()) if one.notna().any() else 0.0 for one in numbers)
        deviations = [float(one.std(ddof=0)) for one in numbers]
        # A field of one value, and one without any (NaN), aren't scaled.
        stds = tuple(deviation if deviation > 0 else 1.0 for deviation in deviations)
        encoder = cls(section, fields, categories, means, stds, None)
        if section.imputation in ("zero", "token") or not fields:
            return encoder
        observed, _ = encoder._observe(rows)
        columns, missing, spans = observed.columns, observed.missing, list(encoder.spans)
        if section.imputation != "label_leaking":
            return replace(encoder, imputer=fit_imputer(columns, missing, spans, seed))
        columns, missing = _with_diagnosis(columns, missing, rows, schema.classes)
        spans.append(Span(spans[-1].stop, spans[-1].stop + len(schema.classes), False))
        imputer = fit_imputer(columns, missing, spans, seed)
        return replace(encoder, imputer=imputer, leaked_classes=schema.classes)

    def encode(self, rows: pd.DataFrame) -> EncodedMetadata:
        """Encode rows; columns may be absent, values raw or unknown: both count as missing, with a warning."""
        observed, warnings = self._observe(rows)
        columns, missing = observed.columns, observed.missing
        if self.imputer is not None and self.leaked_classes:
            width = columns.shape[1]
            columns = self.imputer.fill(*_with_diagnosis(columns, missing, rows, self.leaked_classes))[:, :width]
        elif self.imputer is not None:
            columns = self.imputer.fill(columns, missing)
        return EncodedMetadata(self.finalise(columns, missing), missing, observed.rejected, warnings)

    def to_json(self) -> dict[str, Any]:
        return {
            "section": self.section.model_dump(mode="json"),
            "fields": [field.model_dump(mode="json", exclude_defaults=True) for field in self.fields],
            "levels": [list(categories) for categories in self.categories],
            "centre": list(self.mean),
            "spread": list(self.std),
            "names": self.names,
            "imputer": self.imputer.to_json() if self.imputer else None,
            "leaked_classes": list(self.leaked_classes),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> MetadataEncoder:
        fields = tuple(MetadataField.model_validate(field) for field in state["fields"])
        return cls(MetadataSection.model_validate(state["section"]), fields, *runtime.fitted_state(state))

    def _observe(self, rows: pd.DataFrame) -> tuple[Observed, list[str]]:
        absent = [field.name for field in self.fields if field.name not in rows.columns]
        warnings = [f"columns absent, treated as missing: {', '.join(absent)}"] if absent else []
        cells = [
            None if name in absent else rows[name].astype(object).where(rows[name].notna(), None).tolist()
            for name in (field.name for field in self.fields)
        ]
        try:
            observed = self.observe(cells, len(rows))
        except runtime.MetadataError as error:
            raise DataError(f"{error}, and {error.rows} rows hold text; is it the right column?") from None
        for (index, reason), where in sorted(observed.invalid.items()):
            warnings.append(invalid_warning(self.fields[index], reason, int(where.sum())))
        return observed, warnings


def _categories(values: pd.Series, field: MetadataField, section: MetadataSection) -> tuple[str, ...]:
    """Return the categories of a field in column order; none of a number."""
    if field.kind == "numeric":
        return ()
    categories = list(BOOLEAN_VALUES if field.kind == "boolean" else field.categories)
    if not categories:
        categories = sorted(set(values.dropna().astype(str)) - set(field.missing_codes))
    if section.merge_aliases:
        categories = [field.aliases.get(category, category) for category in categories]
    if section.unknown == "level":
        categories += field.missing_codes
    return tuple(dict.fromkeys(categories))


def _with_diagnosis(columns: Array, missing: Mask, rows: pd.DataFrame, classes: tuple[str, ...]) -> tuple[Array, Mask]:
    """Append the diagnosis as one more field, as the imputation cited by the paper does."""
    if "label" not in rows.columns:
        raise DataError(
            "this model's missing metadata was imputed from the diagnosis (metadata.imputation label_leaking), "
            "a demonstration of a leak: where the diagnosis isn't known it can't be used"
        )
    diagnosis = np.stack([(rows["label"] == label).to_numpy(dtype=np.float32) for label in classes], axis=1)
    known = np.zeros((len(rows), 1), dtype=bool)
    return np.concatenate([columns, diagnosis], axis=1), np.concatenate([missing, known], axis=1)


def missingness_warning(section: MetadataSection, rows: pd.DataFrame, schema: DatasetSchema) -> str | None:
    """Warn of an encoding that shows the model which fields are missing, where that separates the rows."""
    # What is missing doesn't depend on how it is filled, and zeros are filled at once.
    encoder = MetadataEncoder.fit(rows, schema, section.model_copy(update={"imputation": "zero"}))
    # A learned token with `modality_dropout` may be anywhere.
    if not replace(encoder, section=section).shows_missing or not schema.malignant:
        return None
    incomplete = encoder.encode(rows).missing.any(axis=1)
    if incomplete.all() or not incomplete.any():
        return None
    malignant = rows["label"].isin(schema.malignant).to_numpy()
    without, complete = malignant[incomplete].mean(), malignant[~incomplete].mean()
    if abs(without - complete) < TELLING:
        return None
    return (
        f"metadata.tier {section.tier} with imputation {section.imputation} shows the model which fields are missing, "
        f"and that tells the class: {without:.0%} of the rows with missing fields are malignant, {complete:.0%} of the "
        "complete ones. For research only; metadata.tier=M2 metadata.imputation=token with modality_dropout hides it"
    )


def fit_imputer(columns: Array, missing: Mask, spans: list[Span], seed: int) -> NeuralImputer:
    """Train the imputer on (N, K) columns with (N, F) missing fields, or return what the same call gave before."""
    settings = repr((columns.shape, spans, seed, STEPS)).encode()
    key = hashlib.sha256(columns.tobytes() + missing.tobytes() + settings).hexdigest()
    if key not in _cache:
        while len(_cache) >= CACHE_SIZE:
            _cache.pop(next(iter(_cache)))
        weights, numbers = _train(columns, missing, spans, seed), _observed_numbers(columns, missing, spans)
        _cache[key] = NeuralImputer(tuple(spans), weights, numbers)
    return _cache[key]


def _train(columns: Array, missing: Mask, spans: list[Span], seed: int) -> tuple[Array, ...]:
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(seed)
    x, is_missing = torch.from_numpy(columns), torch.from_numpy(missing)
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
            # A row hides between none and all of its fields, so that training meets any pattern of missing fields.
            share = torch.rand(len(rows), 1, generator=generator)
            hide = is_missing[rows] | (torch.rand(len(rows), fields, generator=generator) < share)
            seen = torch.cat([x[rows] * (1 - hide.float() @ owner), hide.float()], dim=1)
            output = runtime.network(seen, weights, torch)
            loss = 0 * output.sum()  # A batch may hold rows without a single value.
            for index, span in enumerate(spans):
                known = ~is_missing[rows, index]
                if known.any():
                    preds, target = output[known, span.start : span.stop], x[rows][known, span.start : span.stop]
                    field_loss = functional.mse_loss if span.numeric else functional.cross_entropy
                    loss = loss + field_loss(preds, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return tuple(weight.detach().numpy() for weight in weights)


def _observed_numbers(columns: Array, missing: Mask, spans: list[Span]) -> tuple[Array, ...]:
    """Return the distinct observed numbers of each numeric field, thinned to quantiles; none of a category."""
    values = []
    for index, span in enumerate(spans):
        observed = np.unique(columns[~missing[:, index], span.start]) if span.numeric else np.empty(0, np.float32)
        if len(observed) > MOST_VALUES:
            observed = np.quantile(observed, np.linspace(0, 1, MOST_VALUES), method="nearest").astype(np.float32)
        values.append(observed)
    return tuple(values)
