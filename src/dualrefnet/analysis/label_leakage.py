"""Metadata that give the label away: missingness, label-leaking columns, metadata alone, and re-identification.

All models here see no image. They are measured by 5-fold cross-validation with intervals over resampled patients (or
lesions, where the data set names no patients; see `DatasetSchema.unit`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

from dualrefnet.data.check import Finding, Level
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import Dataset, DatasetSchema, groups
from dualrefnet.display.format import interval
from dualrefnet.evaluation.bootstrap import NAN, Bootstrap, Estimate, Floats
from dualrefnet.evaluation.metrics import WeightedMetrics, confusion_metrics
from dualrefnet.progress import track
from dualrefnet.recipe import MetadataSection
from dualrefnet.runtime.metadata import read_cell

Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

FOLDS = 5
# Of folds and resamples.
SEED = 0
MEASURES = {"balanced_accuracy": "balanced_accuracy", "auc": "auc_macro_ovr", "malignant_auc": "malignant.auc"}


@dataclass(frozen=True)
class AuditedRows:
    """N rows of a split, in its order."""

    table: pd.DataFrame  # of the lesion table, index 0..N-1
    others: pd.DataFrame  # the published columns that aren't features
    schema: DatasetSchema
    groups: NDArray[np.object_]  # patient or lesion, see `DatasetSchema.unit`
    splits: NDArray[np.object_]  # train, val or test
    samples: int

    @classmethod
    def of(cls, dataset: Dataset, split: pd.DataFrame, samples: int = 200) -> AuditedRows:
        """Take the rows of a split; labels and patients are those of the data set."""
        index = pd.Series(dataset.table.index, index=dataset.table["image_id"]).loc[split["image_id"]]
        table, others = (part.reindex(index).reset_index(drop=True) for part in (dataset.table, dataset.other_columns))
        # A word for nothing, such as NA, is no value.
        others = others.map(read_cell)
        units, splits = groups(table, dataset.schema), split["split"]
        return cls(table, others, dataset.schema, units.to_numpy(dtype=object), splits.to_numpy(dtype=object), samples)

    def where(self, mask: Mask) -> AuditedRows:
        """Take some of the rows, and the classes that these have."""
        table, others = (part[mask].reset_index(drop=True) for part in (self.table, self.others))
        return AuditedRows(table, others, self.schema, self.groups[mask], self.splits[mask], self.samples)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(label for label in self.schema.classes if (self.table["label"] == label).any())

    @cached_property
    def malignant(self) -> tuple[str, ...]:
        """Those of the classes that are cancer; empty if that would be none or all."""
        malignant = tuple(label for label in self.classes if label in self.schema.malignant)
        return malignant if len(malignant) < len(self.classes) else ()

    @cached_property
    def labels(self) -> Integers:
        return pd.Index(self.classes).get_indexer(pd.Index(self.table["label"])).astype(np.int64)

    @cached_property
    def is_malignant(self) -> Mask:
        return np.asarray(self.table["label"].isin(self.malignant))

    @cached_property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(self.groups, self.samples, SEED)

    @property
    def enough_for_folds(self) -> bool:
        """Whether there are two classes, one of them in every fold, and at least one group a fold."""
        counts = np.bincount(self.labels)
        return len(counts) > 1 and int(counts.max()) >= FOLDS and len(set(self.groups)) >= FOLDS


def predict_in_folds(learner: Any, features: Floats, rows: AuditedRows, by_group: bool = True) -> Floats:
    """Return (N, C) cross-validated probabilities, in folds that keep groups together, or in folds of images."""
    splitter = (StratifiedGroupKFold if by_group else StratifiedKFold)(FOLDS, shuffle=True, random_state=SEED)
    probabilities = np.zeros((len(rows.labels), len(rows.classes)))
    with _one_thread(), warnings.catch_warnings():
        # A class with fewer images than folds is missing from some of them, and its images count as wrong there.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for train, test in list(splitter.split(features, rows.labels, rows.groups if by_group else None)):
            model = clone(learner).fit(features[train], rows.labels[train])
            probabilities[np.ix_(test, model.classes_)] = model.predict_proba(features[test])
    return probabilities


def _one_thread() -> Any:
    # The matrices are small: threads would wait for each other, ten times as long on a busy machine.
    return threadpool_limits(limits=1)


def _measure(probabilities: Floats, rows: AuditedRows) -> dict[str, float]:
    """Return the `MEASURES`, each with `_low` and `_high`; NaN where undefined."""
    bootstrap = rows.bootstrap
    model = WeightedMetrics(rows.labels, probabilities, bootstrap.codes, rows.classes, rows.malignant)
    point, drawn = model.measure(bootstrap.unit_weights), bootstrap.resample_each({"": model.measure})[""]
    result: dict[str, float] = {}
    for name, key in MEASURES.items():
        one = bootstrap.estimate(float(point[key][0]), drawn[key]) if key in drawn else Estimate(NAN)
        result |= one.columns(name)
    return result


def _in_words(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.3f} {interval(row[f'{name}_low'], row[f'{name}_high'], '.3f')}"


def balanced_accuracy(labels: Integers, preds: Integers, classes: tuple[str, ...], bootstrap: Bootstrap) -> Floats:
    """Return the balanced accuracy on the rows themselves, and then that of every resample: (1 + samples,)."""
    cells = bootstrap.sums(np.eye(len(classes) ** 2)[labels * len(classes) + preds])

    def statistic(weights: Floats) -> Floats:
        matrices = (weights @ cells).reshape(-1, len(classes), len(classes))
        return confusion_metrics(matrices, classes)["balanced_accuracy"]

    return np.concatenate([statistic(bootstrap.unit_weights), bootstrap.resample(statistic)])


def _estimate(values: Floats, bootstrap: Bootstrap) -> Estimate:
    return bootstrap.estimate(float(values[0]), values[1:])


def _image_and_group_folds(learner: Any, features: Floats, rows: AuditedRows) -> list[Estimate]:
    """Return the balanced accuracy in folds of images, in folds of patients, and the paired difference."""
    images, grouped = (
        balanced_accuracy(
            rows.labels,
            predict_in_folds(learner, features, rows, by_group).argmax(axis=1),
            rows.classes,
            rows.bootstrap,
        )
        for by_group in (False, True)
    )
    return [_estimate(values, rows.bootstrap) for values in (images, grouped, images - grouped)]


# Columns are one block if of the rows in which either is missing at least this share misses both.
TOGETHER = 0.9
# A block in fewer rows counts in the model of all blocks, but isn't reported.
MINIMUM_ROWS = 20
# A mask from which a model reads malignancy or class this well is nearly the label. The worst that is known to have
# been published and used, 13 columns of PAD-UFES-20, lies at .83 and .71.
NEARLY_THE_LABEL = 0.95
# Another column is mentioned with a block if it has no more values than this.
FEW_VALUES = 10
REMEDY = (
    "metadata.tier M3 and metadata.imputation zero show it to the model, tier M2 with imputation token and "
    "modality_dropout trains it away"
)


@dataclass(frozen=True)
class Block:
    """Fields that are missing together."""

    fields: tuple[str, ...]
    code: str  # that stands for missing, such as UNK; empty: the cells are empty
    mask: Mask  # (N,) rows in which all of them are missing

    @property
    def name(self) -> str:
        shown = ", ".join(self.fields[:2]) + (f" and {len(self.fields) - 2} more" if len(self.fields) > 2 else "")
        return f"{shown} = {self.code}" if self.code else f"{shown} empty"


def find_blocks(rows: AuditedRows) -> list[Block]:
    """Return the blocks of fields that are missing together, largest first; codes such as UNK are blocks apart."""
    found: list[list[tuple[str, str, Mask]]] = []
    for field in rows.schema.fields:
        values = rows.table[field.name]
        masks = [("", values.isna()), *((code, values == code) for code in field.missing_codes)]
        for code, mask in ((code, mask.to_numpy(dtype=bool)) for code, mask in masks if mask.any()):
            for members in found:
                # With the first of a block, so that a chain of small differences doesn't join what is unlike.
                if members[0][1] == code and (members[0][2] & mask).sum() >= TOGETHER * (members[0][2] | mask).sum():
                    members.append((field.name, code, mask))
                    break
            else:
                found.append([(field.name, code, mask)])
    blocks = [
        Block(tuple(name for name, *_ in members), members[0][1], np.all([mask for *_, mask in members], axis=0))
        for members in found
    ]
    return sorted(blocks, key=lambda block: -int(block.mask.sum()))


def missingness(rows: AuditedRows) -> tuple[pd.DataFrame, pd.DataFrame, list[Finding]]:
    """Return which fields are missing together (by class), what missingness alone predicts, and the findings."""
    blocks = find_blocks(rows)
    if not blocks:
        message = "no metadata cell is missing" if rows.schema.fields else "there is no metadata"
        return pd.DataFrame(), pd.DataFrame(), [Finding("PASS", "missing_mask", message)]
    table = pd.DataFrame([_block_row(rows, block) for block in blocks])
    reported = [block for block in blocks if block.mask.sum() >= MINIMUM_ROWS]
    if not rows.enough_for_folds:
        return table, pd.DataFrame(), [_block_finding(rows, block, None) for block in reported]
    chosen = {block.name: [block] for block in reported}
    empty = [block for block in blocks if not block.code]
    # No model twice: the last of them is that of everything that is missing.
    if 1 < len(empty) < len(blocks):
        chosen["all empty cells"] = empty
    if list(chosen.values()) != [blocks]:
        chosen["all"] = blocks
    learner, models = LogisticRegression(class_weight="balanced", max_iter=1000), []
    for name, members in chosen.items():
        masks = np.stack([block.mask for block in members], axis=1).astype(float)
        measured = _measure(predict_in_folds(learner, masks, rows), rows)
        models.append({"mask": name, "rows": int(masks.any(axis=1).sum()), **measured})
    findings = [_block_finding(rows, block, model) for block, model in zip(reported, models, strict=False)]
    return table, pd.DataFrame(models), [*findings, _mask_finding(models[-1], len(rows.classes))]


def _block_row(rows: AuditedRows, block: Block) -> dict[str, object]:
    cancer, mask = rows.is_malignant, block.mask
    by_class = {label: float(mask[rows.labels == index].mean()) for index, label in enumerate(rows.classes)}
    missing = float(cancer[mask].mean()) if rows.malignant else NAN
    present = float(cancer[~mask].mean()) if rows.malignant and not mask.all() else NAN
    row = {"block": block.name, "rows": int(mask.sum()), "share": float(mask.mean()), **by_class}
    return {**row, "malignant_missing": missing, "malignant_present": present}


def _block_finding(rows: AuditedRows, block: Block, model: dict[str, Any] | None) -> Finding:
    missing, total = int(block.mask.sum()), len(block.mask)
    names = ", ".join(block.fields)
    one, several = (f"holds {block.code}", f"hold {block.code}") if block.code else ("is empty", "are empty")
    subject = f"{len(block.fields)} fields ({names}) {several} together" if len(block.fields) > 1 else f"{names} {one}"
    message = f"{subject} in {missing:,} of {total:,} rows ({missing / total:.1%})"
    if rows.malignant and missing < total:
        cancers, present = int(rows.is_malignant[block.mask].sum()), float(rows.is_malignant[~block.mask].mean())
        if 2 * cancers < missing:
            message += f"; {missing - cancers:,} of {missing:,} are benign"
        else:
            message += f"; {cancers:,} of {missing:,} ({cancers / missing:.1%}) are malignant"
        message += f", of the other rows {present:.1%} are malignant"
    # Other columns that have one value wherever the block is missing, but several elsewhere.
    for column in rows.others.columns if missing < total else ():
        values = rows.others[column]
        inside = values[block.mask].unique()
        if len(inside) == 1 and pd.notna(inside[0]) and 1 < values.nunique() <= FEW_VALUES:
            message += f"; in all of them {column} is {inside[0]}"
    level: Level = "WARN" if model is not None and _lower_auc(model) > 0.5 else "PASS"
    return Finding(level, "missing_block", message, (), missing)


def _lower_auc(row: dict[str, Any]) -> float:
    """Return the higher of the lower bounds of the two AUCs; NaN if both are undefined."""
    return float(np.fmax(row["auc_low"], row["malignant_auc_low"]))


def _mask_finding(model: dict[str, Any], classes: int) -> Finding:
    message = (
        f"missingness alone gives a balanced accuracy of {_in_words(model, 'balanced_accuracy')} "
        f"(chance {1 / classes:.3f}) and a macro AUC of {_in_words(model, 'auc')} (chance .5)"
    )
    level: Level = "PASS"
    if _lower_auc(model) >= NEARLY_THE_LABEL:
        level, message = "FAIL", f"{message}: which cells are empty nearly determines the class; {REMEDY}"
    # One-sided: folds push a model without information a little below chance.
    elif model["auc_low"] > 0.5:
        level, message = "WARN", f"{message}: it shows who was examined how; {REMEDY}"
    else:
        message += ": no better than chance"
    return Finding(level, "missing_mask", message, count=int(model["rows"]))


# The strongest honest columns that are known: growth (.76 of malignancy) and change in PAD-UFES-20, age in ISIC-2019
# (.72). `biopsed`, a decision made because of the suspicion, has .89. All limits are for the lower end of the interval.
STRONG_AUC = 0.80
# An exact copy of the label has 1; a copy in which one label of ten is wrong about .94 (AUC) and .88 or .80 (gain over
# chance, six or two classes).
LABEL_AUC = 0.90
# Balanced accuracy between chance (0) and all (1).
LABEL_GAIN = 0.70
# A value that determines malignancy must be held by this share of the rows ...
DETERMINING_SHARE = 0.05
# ... and by so many patients that chance makes this of it less often than that. Strict: there are many values.
DETERMINING_CHANCE = 1e-6
# Columns with more different words than this are free text or ids.
FREE_TEXT = 200


def label_leaking_columns(rows: AuditedRows) -> tuple[pd.DataFrame, list[Finding]]:
    """Measure how well every metadata field and every other published column alone predicts the class."""
    fields = [(field.name, rows.table[field.name], True) for field in rows.schema.fields]
    examined, findings = [], []
    for name, column, feature in [*fields, *((str(name), rows.others[name], False) for name in rows.others.columns)]:
        known = rows.where(column.notna().to_numpy())
        values = column.dropna().reset_index(drop=True)
        codes = column_codes(values) if len(values) else None
        if codes is None and len(values) and feature:
            message = f"{name} has {column.nunique():,} different words: free text or an id, which wasn't examined"
            findings.append(Finding("WARN", "proxy", message))
        elif codes is not None and known.enough_for_folds:
            row, finding = _examine(name, values, codes, known, feature, len(rows.table))
            examined.append(row)
            findings += [finding] if finding else []
    if not examined:
        return pd.DataFrame(), findings or [Finding("PASS", "proxy", "there is no column beside the label")]
    table = pd.DataFrame(examined).sort_values("auc", ascending=False, ignore_index=True)
    passed = table[table["verdict"] == "PASS"]
    if len(passed):
        strongest = passed.iloc[0]
        message = f"{len(passed)} columns predict no more than honest findings do; the strongest: "
        message += f"{strongest['column']} (AUC {strongest['auc']:.3f})"
        findings.append(Finding("PASS", "proxy", message, count=len(passed)))
    return table, findings


def column_codes(values: pd.Series) -> Floats | None:
    """Return a recorded column as numbers, words by how frequent they are, (N,); None for free text."""
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.notna().all():
        return np.asarray(numbers, dtype=float)
    if values.nunique() > FREE_TEXT:
        return None
    codes = {value: code for code, value in enumerate(values.value_counts().index)}
    return np.asarray(values.map(codes), dtype=float)


def _examine(
    name: str, values: pd.Series, codes: Floats, known: AuditedRows, feature: bool, total: int
) -> tuple[dict[str, Any], Finding | None]:
    """Return a column's row, and a finding unless it passes; `known` are the rows, of `total`, that hold the column."""
    # Leaves of 10 rows: a tree that isolates single patients learns nothing that holds for others.
    tree = DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=10, class_weight="balanced", random_state=0)
    measured = _measure(predict_in_folds(tree, codes[:, None], known), known)
    chance = 1 / len(known.classes)
    gain, auc = (measured["balanced_accuracy_low"] - chance) / (1 - chance), _lower_auc(measured)
    determining, count = _determining_values(values, known, DETERMINING_SHARE * total)
    strong = bool(determining) or auc >= STRONG_AUC
    nearly = gain >= LABEL_GAIN or auc >= LABEL_AUC or (bool(determining) and auc >= STRONG_AUC)
    level: Level = "FAIL" if feature and nearly else "WARN" if nearly or strong else "PASS"
    row = {"column": name, "feature": feature, "rows": len(values), **measured, "settles": count, "verdict": level}
    if level == "PASS":
        return row, None
    reason = "is a metadata field that reveals much of the label; check when it was recorded and why"
    if not feature:
        reason = "leaks the label; it isn't used as a feature: keep it so"
    elif nearly:
        reason = "is a metadata field and nearly the label; take it out"
    message = f"{name} {reason}: alone it gives a balanced accuracy of {measured['balanced_accuracy']:.3f} "
    message += f"(chance {chance:.3f}), a macro AUC of {measured['auc']:.3f}"
    if np.isfinite(measured["malignant_auc"]):
        message += f" and an AUC of malignancy of {measured['malignant_auc']:.3f}"
    return row, Finding(level, "proxy", "; ".join([message, *determining]), count=count)


def _determining_values(values: pd.Series, known: AuditedRows, at_least: float) -> tuple[list[str], int]:
    """Return the values that settle malignancy or class where chance can't explain it; counted by patient."""
    cancer, labels = known.table["label"].isin(known.schema.malignant).to_numpy(), known.labels
    # How the class is distributed where the column is recorded: what an uninformative value would show.
    share = float(cancer.mean())
    texts, count = [], 0
    for value, held in values.value_counts().items():
        if held < at_least:
            break
        mine = (values == value).to_numpy()
        patients, first = len(set(known.groups[mine])), labels[mine][0]
        if share and not cancer[mine].any() and (1 - share) ** patients < DETERMINING_CHANCE:
            text = "none is malignant"
        elif cancer[mine].all() and share**patients < DETERMINING_CHANCE:
            text = "all are malignant"
        elif (labels[mine] == first).all() and float((labels == first).mean()) ** patients < DETERMINING_CHANCE:
            text = f"all are {known.classes[first]}"
        else:
            continue
        count += int(held)
        # Never a number or a long text, which might be about one patient.
        shown = len(str(value)) <= 20 and not any(character.isdigit() for character in str(value))
        texts.append(f"of the {held:,} rows with {f'the value {value}' if shown else 'one value'} {text}")
    return texts, count


ALWAYS, FLAGGED = "always recorded", "always recorded + missing flag"
ALL, OTHERS = "all, missing as zero", "all, missing as zero + other columns"
LINEAR, FOREST, NEIGHBOUR = "logistic regression", "random forest", "1-nearest neighbour"
# Where it is measured; the fourth, folds of patients or lesions, is `group_folds`.
TRAIN, TRAIN_VAL, IMAGES = "test split, from train", "test split, from train and val", "5 folds of images"
# Folds of two seeds differ by up to this; less than this above it is noise.
FOLD_NOISE = 0.02
# Trees of the forest; of more than 10,000 rows 100 are enough and take half a minute a set of columns.
TREES, FEWER_TREES, MANY_ROWS = 500, 100, 10_000


def group_folds(unit: str) -> str:
    """Return what measuring in folds that keep patients (or lesions) together is called."""
    return f"5 folds of {unit}s"


def encoded_metadata(rows: AuditedRows, tier: str) -> Floats:
    """Return the literature's zero-filled columns, (N, M): UNK a category of its own, numbers as they are."""
    section = MetadataSection.model_validate(
        {"tier": tier, "imputation": "zero", "unknown": "level", "scale": "raw", "merge_aliases": False}
    )
    return MetadataEncoder.fit(rows.table, rows.schema, section).encode(rows.table).values.astype(float)


def feature_sets(rows: AuditedRows) -> dict[str, Floats]:
    sets: dict[str, Floats] = {}
    empty = [block.mask for block in find_blocks(rows) if not block.code]
    if any(field.tier == "M1" for field in rows.schema.fields):
        sets[ALWAYS] = encoded_metadata(rows, "M1")
        if empty:
            sets[FLAGGED] = np.column_stack([sets[ALWAYS], empty[0]])
    if rows.schema.fields:
        sets[ALL] = encoded_metadata(rows, "M2")
    words = [name for name in rows.others.columns if 1 < rows.others[name].nunique() <= FREE_TEXT]
    if words:
        extra = pd.get_dummies(rows.others[words], dtype=float).to_numpy()
        sets[OTHERS] = np.column_stack([sets[ALL], extra]) if ALL in sets else extra
    return sets


# Standardised, for comparable columns; classes are balanced, so that rare ones count.
REGRESSION = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=3000, tol=1e-3))
NEAREST = make_pipeline(StandardScaler(), KNeighborsClassifier(1))


def metadata_alone(rows: AuditedRows, forests: bool) -> tuple[pd.DataFrame, list[Finding]]:
    """Measure what models predict without the image: every learner on every set of columns, in four ways.

    `patients_recognised` is folds of images minus folds of patients, in the rows of the former.
    """
    sets, grouped = feature_sets(rows), group_folds(rows.schema.unit)
    named = rows.schema.unit != "image"
    if not sets:
        return pd.DataFrame(), [Finding("PASS", "form_alone", "there is no metadata")]
    if not rows.enough_for_folds:
        return pd.DataFrame(), [Finding("WARN", "form_alone", "there are too few rows or patients for five folds")]
    learners = {LINEAR: REGRESSION, NEIGHBOUR: NEAREST}
    if forests:
        trees = TREES if len(rows.labels) <= MANY_ROWS else FEWER_TREES
        # Leaves of one row, weighted once for all trees, hold single patients and lose most in patient-disjoint folds.
        forest = RandomForestClassifier(
            trees, class_weight="balanced_subsample", min_samples_leaf=2, random_state=0, n_jobs=-1
        )
        learners = {LINEAR: REGRESSION, FOREST: forest, NEIGHBOUR: NEAREST}
    measured: list[dict[str, Any]] = []
    for features, learner in track(list(product(sets, learners)), "metadata alone"):
        images, disjoint, difference = _image_and_group_folds(learners[learner], sets[features], rows)
        estimates = _test_estimates(learners[learner], sets[features], rows) | {IMAGES: images, grouped: disjoint}
        for way, one in estimates.items():
            row = {"features": features, "learner": learner, "measured": way}
            row |= {"balanced_accuracy": one.value, "low": one.low, "high": one.high}  # type: ignore[dict-item]
            if way == IMAGES and named:
                row |= difference.columns("patients_recognised")  # type: ignore[arg-type]
            measured.append(row)
    return pd.DataFrame(measured), [_alone_finding(measured, rows)]


def _test_estimates(learner: Any, features: Floats, rows: AuditedRows) -> dict[str, Estimate]:
    test = rows.splits == "test"
    estimates = {}
    for way, chosen in ((TRAIN, rows.splits == "train"), (TRAIN_VAL, ~test)):
        if not test.any() or len(set(rows.labels[chosen])) < 2:
            continue
        if len(set(rows.groups[test])) < 2:
            estimates[way] = Estimate(NAN)
            continue
        with _one_thread():
            preds = clone(learner).fit(features[chosen], rows.labels[chosen]).predict(features[test])
        bootstrap = rows.where(test).bootstrap
        estimates[way] = _estimate(balanced_accuracy(rows.labels[test], preds, rows.classes, bootstrap), bootstrap)
    return estimates


def _alone_finding(measured: list[dict[str, Any]], rows: AuditedRows) -> Finding:
    unit = rows.schema.unit
    images = [row for row in measured if row["measured"] == IMAGES]
    grouped = [row for row in measured if row["measured"] == group_folds(unit)]
    best = max(grouped, key=lambda row: row["balanced_accuracy"])
    best_in = f"{best['balanced_accuracy']:.3f} in {group_folds(unit)} ({best['learner']}, {best['features']}; "
    message = (
        f"metadata alone give a balanced accuracy of {best_in}chance {1 / len(rows.classes):.3f}): a model that also "
        "reads images must do better"
    )
    if unit == "image":
        return Finding("WARN", "form_alone", f"{message}. Whether they identify a person is unknown")
    one, other = max(zip(images, grouped, strict=True), key=lambda pair: pair[0]["patients_recognised_low"])
    compared = (
        f"{one['learner']}, {one['features']}: {one['balanced_accuracy']:.3f} in folds of images, "
        f"{other['balanced_accuracy']:.3f} in folds of {unit}s, difference {_in_words(one, 'patients_recognised')}"
    )
    if one["patients_recognised_low"] > FOLD_NOISE:
        message += f". They identify {unit}s ({compared}): never split this data set by image"
        return Finding("WARN", "form_alone", message)
    return Finding("PASS", "form_alone", f"{message}. They do not identify {unit}s ({compared})")


def reidentification(rows: AuditedRows) -> tuple[pd.DataFrame, list[Finding]]:
    """Measure how often the nearest metadata, as a vector of standardised columns, are of the same patient."""
    if not rows.schema.fields:
        return pd.DataFrame(), [Finding("PASS", "reidentification", "there is no metadata")]
    if rows.schema.unit == "image":
        message = "nobody is named, so whether metadata identify a person is unknown"
        return pd.DataFrame(), [Finding("WARN", "reidentification", message)]
    metadata, unit = StandardScaler().fit_transform(encoded_metadata(rows, "M2")), rows.schema.unit
    train, test = rows.splits == "train", rows.splits == "test"
    measured: dict[str, Estimate] = {}
    findings = []
    if train.any() and test.any():
        same = _nearest(metadata[train], rows.groups[train], metadata[test]) == rows.groups[test]
        question = f"test images whose nearest training metadata are of the same {unit}"
        measured[question] = Estimate(float(same.mean()))
        message = f"for {int(same.sum()):,} of {len(same):,} test images ({same.mean():.1%}) the nearest training "
        message += f"metadata are of the same {unit}"
        findings.append(Finding("WARN" if same.any() else "PASS", "nearest_form", message, count=int(same.sum())))
    several = pd.Series(rows.groups).duplicated(keep=False).to_numpy()
    if several.any():
        same = _nearest(metadata[several], rows.groups[several]) == rows.groups[several]
        question = f"images of {unit}s with several images whose nearest other metadata are of the same {unit}"
        measured[question] = Estimate(float(same.mean()))
    if rows.enough_for_folds:
        images, grouped, difference = _image_and_group_folds(NEAREST, metadata, rows)
        for way, one in ((IMAGES, images), (group_folds(unit), grouped)):
            measured[f"balanced accuracy of the class of the nearest metadata, {way}"] = one
        known = difference.low > FOLD_NOISE
        message = (
            f"the class of the nearest metadata has a balanced accuracy of {images.value:.3f} in folds of images and "
            f"{grouped.value:.3f} in folds of {unit}s, difference {_in_words(difference.columns('d'), 'd')}: metadata "
            f"{'nearly' if known else 'do not'} identify the {unit}"
        )
        findings.append(Finding("WARN" if known else "PASS", "reidentification", message))
    return pd.DataFrame([{"question": question} | one.columns() for question, one in measured.items()]), findings


def _nearest(known: Floats, groups: NDArray[np.object_], queries: Floats | None = None) -> NDArray[np.object_]:
    """Return the group of the nearest `known` row to each query; without queries, of the nearest other row to each."""
    with _one_thread():
        nearest = NearestNeighbors(n_neighbors=1).fit(known).kneighbors(queries, return_distance=False)[:, 0]
    return np.asarray(groups[nearest])
