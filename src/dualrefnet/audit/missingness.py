"""What is missing, and whether that gives the class away: a form filled in only for some patients tells which they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from dualrefnet.audit.audited_rows import AuditedRows
from dualrefnet.audit.measures import enough_for_folds, measure, predict_in_folds
from dualrefnet.findings import Finding

# Columns are one block if of the rows in which either is missing at least this share misses both.
TOGETHER = 0.9
# A block in fewer rows is left in the model of all blocks, but isn't talked about.
MINIMUM_ROWS = 20
# A mask from which a model reads malignancy or class this well is nearly the answer. The worst that is known to have been
# published and used, 13 columns of PAD-UFES-20, lies at .83 and .71.
NEARLY_THE_ANSWER = 0.95
REMEDY = (
    "metadata.tier M3 and metadata.imputation zero show it to the model, tier M2 with imputation token and modality_dropout trains it away"
)
# Another column is told with a block if it has no more values than this.
FEW_VALUES = 10


@dataclass(frozen=True)
class Block:
    """Columns that are missing together.

    Attributes:
        fields: their names.
        code: the code that stands for missing, such as UNK; empty: the cells are empty.
        mask: (N,) rows in which all of them are missing.
    """

    fields: tuple[str, ...]
    code: str
    mask: NDArray[np.bool_]

    @property
    def name(self) -> str:
        """What it is called in tables."""
        shown = ", ".join(self.fields[:2]) + (f" and {len(self.fields) - 2} more" if len(self.fields) > 2 else "")
        return f"{shown} = {self.code}" if self.code else f"{shown} empty"


def find_blocks(rows: AuditedRows) -> list[Block]:
    """Return the blocks of fields that are missing together, the largest first; empty cells and codes such as UNK apart."""
    masks: list[tuple[str, str, NDArray[np.bool_]]] = []
    for field in rows.schema.fields:
        values = rows.table[field.name]
        masks.append((field.name, "", values.isna().to_numpy()))
        masks += [(field.name, code, (values == code).to_numpy(dtype=bool)) for code in field.missing_codes]
    gathered: list[list[tuple[str, str, NDArray[np.bool_]]]] = []
    for name, code, mask in masks:
        if not mask.any():
            continue
        for members in gathered:
            # With the first of a block, so that a chain of small differences doesn't join what is unlike.
            if members[0][1] == code and (members[0][2] & mask).sum() >= TOGETHER * (members[0][2] | mask).sum():
                members.append((name, code, mask))
                break
        else:
            gathered.append([(name, code, mask)])
    blocks = [Block(tuple(m[0] for m in members), members[0][1], np.all([m[2] for m in members], axis=0)) for members in gathered]
    return sorted(blocks, key=lambda block: -int(block.mask.sum()))


def missingness(rows: AuditedRows, samples: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame, list[Finding]]:
    """Say which fields are missing together, for which classes, and what a model learns from that alone.

    The model is logistic regression (classes balanced) on one column a mask, in five folds that keep patients together.

    Returns:
        Table of blocks: `block`, `rows`, `share`, one column a class (the share of its rows), `malignant_missing`, `malignant_present`
        (share of cancers among the rows with and without). Table of models: `mask` (a block, `all empty cells`, `all`),
        `rows`, and `balanced_accuracy`, `auc`, `malignant_auc`, each with `_low` and `_high`. And the findings.
    """
    blocks = find_blocks(rows)
    if not blocks:
        said = "no metadata cell is missing" if rows.schema.fields else "there is no metadata"
        return pd.DataFrame(), pd.DataFrame(), [Finding("PASS", "missing_mask", said)]
    table = pd.DataFrame([_block_row(rows, block) for block in blocks])
    spoken = [block for block in blocks if block.mask.sum() >= MINIMUM_ROWS]
    if not enough_for_folds(rows.labels, rows.groups):
        return table, pd.DataFrame(), [_block_finding(rows, block, None) for block in spoken]
    chosen = {block.name: [block] for block in spoken}
    empty = [block for block in blocks if not block.code]
    # No model twice: the last of them is what all gaps tell.
    if 1 < len(empty) < len(blocks):
        chosen["all empty cells"] = empty
    if list(chosen.values()) != [blocks]:
        chosen["all"] = blocks
    models = pd.DataFrame([_model_row(name, members, rows, samples, seed) for name, members in chosen.items()])
    findings = [_block_finding(rows, block, model) for block, (_, model) in zip(spoken, models.iterrows(), strict=False)]
    return table, models, [*findings, _mask_finding(models.iloc[-1], rows)]


def _block_row(rows: AuditedRows, block: Block) -> dict[str, object]:
    cancer = rows.is_malignant
    by_class = {label: float(block.mask[rows.labels == index].mean()) for index, label in enumerate(rows.classes)}
    shares = {"malignant_missing": np.nan, "malignant_present": np.nan}
    if rows.malignant:
        shares["malignant_missing"] = float(cancer[block.mask].mean())
        shares["malignant_present"] = float(cancer[~block.mask].mean()) if not block.mask.all() else np.nan
    return {"block": block.name, "rows": int(block.mask.sum()), "share": float(block.mask.mean()), **by_class, **shares}


def _block_finding(rows: AuditedRows, block: Block, model: pd.Series | None) -> Finding:
    missing, total = int(block.mask.sum()), len(block.mask)
    names = ", ".join(block.fields)
    one, several = (f"holds {block.code}", f"hold {block.code}") if block.code else ("is empty", "are empty")
    what = f"{len(block.fields)} fields ({names}) {several} together" if len(block.fields) > 1 else f"{names} {one}"
    message = f"{what} in {missing:,} of {total:,} rows ({missing / total:.1%})"
    tells = model is not None and bool(max(model["auc_low"], np.nan_to_num(model["malignant_auc_low"])) > 0.5)
    if rows.malignant and missing < total:
        ill, present = int(rows.is_malignant[block.mask].sum()), float(rows.is_malignant[~block.mask].mean())
        told = (
            f"{missing - ill:,} of {missing:,} are benign"
            if 2 * ill < missing
            else f"{ill:,} of {missing:,} ({ill / missing:.1%}) are malignant"
        )
        message += f"; {told}, of the other rows {present:.1%} are malignant"
    for column, value in _constant_columns(rows, block).items():
        message += f"; in all of them {column} is {value}"
    return Finding("WARN" if tells else "PASS", "missing_block", message, count=missing)


def _constant_columns(rows: AuditedRows, block: Block) -> dict[str, str]:
    """Return the columns that aren't features and have one value wherever the block is missing, but several elsewhere."""
    found = {}
    for column in rows.others.columns:
        values = rows.others[column]
        inside = values[block.mask].unique()
        if len(inside) == 1 and pd.notna(inside[0]) and 1 < values.nunique() <= FEW_VALUES and not block.mask.all():
            found[str(column)] = str(inside[0])
    return found


def _model_row(name: str, blocks: list[Block], rows: AuditedRows, samples: int, seed: int) -> dict[str, object]:
    features = np.stack([block.mask for block in blocks], axis=1).astype(float)
    probabilities = predict_in_folds(
        lambda: LogisticRegression(class_weight="balanced", max_iter=1000), features, rows.labels, rows.groups, len(rows.classes), seed
    )
    measured = measure(rows.labels, probabilities, rows.groups, rows.classes, rows.malignant, samples, seed)
    values = {f"{key}{end}": getattr(value, part) for key, value in measured.items() for end, part in _PARTS}
    return {"mask": name, "rows": int(features.any(axis=1).sum()), **values}


_PARTS = (("", "value"), ("_low", "low"), ("_high", "high"))


def _mask_finding(model: pd.Series, rows: AuditedRows) -> Finding:
    chance = 1 / len(rows.classes)
    message = (
        f"what is missing, and nothing else, gives a balanced accuracy of {model['balanced_accuracy']:.3f} "
        f"[{model['balanced_accuracy_low']:.3f}, {model['balanced_accuracy_high']:.3f}] (chance {chance:.3f}) and a macro AUC of "
        f"{model['auc']:.3f} [{model['auc_low']:.3f}, {model['auc_high']:.3f}] (chance .5)"
    )
    count = int(model["rows"])
    if max(model["auc_low"], np.nan_to_num(model["malignant_auc_low"])) >= NEARLY_THE_ANSWER:
        return Finding("FAIL", "missing_mask", f"{message}: a model need only see which cells are empty; {REMEDY}", count=count)
    # One-sided: folds push a model without knowledge a little below chance.
    if model["auc_low"] > 0.5:
        return Finding("WARN", "missing_mask", f"{message}: the form shows who was examined how; {REMEDY}", count=count)
    return Finding("PASS", "missing_mask", f"{message}: no better than chance", count=count)
