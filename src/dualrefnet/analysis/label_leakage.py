"""Metadata that give the label away: missingness, label-leaking columns, metadata alone, and re-identification.

All models here see no image. They are measured by 5-fold cross-validation with intervals over resampled patients (or
lesions, where the data set names no patients; see `DatasetSchema.unit`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
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
from dualrefnet.evaluation.bootstrap import NAN, Bootstrap, Estimate, Floats
from dualrefnet.evaluation.metrics import WeightedMetrics, confusion_metrics
from dualrefnet.recipe import MetadataSection

Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]
# Makes a fresh, unfitted classifier of scikit-learn.
Learner = Callable[[], Any]
Progress = Callable[[int, int], None]

FOLDS = 5
LEVEL = 0.95
MEASURES = {"balanced_accuracy": "balanced_accuracy", "auc": "auc_macro_ovr", "malignant_auc": "malignant.auc"}


@dataclass(frozen=True)
class AuditedRows:
    """The N rows of a split, in its order: the lesion `table`, the `others` (published columns that aren't features),
    labels as indices into the `classes` that have a row, and `groups` (see `DatasetSchema.unit`). `malignant` is empty
    if none or all of the classes are.
    """

    table: pd.DataFrame
    others: pd.DataFrame
    schema: DatasetSchema
    classes: tuple[str, ...]
    malignant: tuple[str, ...]
    labels: Integers
    groups: NDArray[np.object_]
    splits: NDArray[np.object_]

    @classmethod
    def of(cls, dataset: Dataset, split: pd.DataFrame) -> AuditedRows:
        """Take the rows of a split; labels and patients are those of the data set."""
        index = pd.Series(dataset.table.index, index=dataset.table["image_id"]).loc[split["image_id"]]
        table = dataset.table.loc[index].reset_index(drop=True)
        classes = tuple(label for label in dataset.schema.classes if (table["label"] == label).any())
        malignant = tuple(label for label in classes if label in dataset.schema.malignant)
        return cls(
            table,
            dataset.other_columns.reindex(index).reset_index(drop=True),
            dataset.schema,
            classes,
            malignant if len(malignant) < len(classes) else (),
            np.array([classes.index(label) for label in table["label"]], dtype=np.int64),
            groups(table, dataset.schema).to_numpy(dtype=object),
            split["split"].to_numpy(dtype=object),
        )

    @property
    def is_malignant(self) -> Mask:
        """(N,) whether the row is a cancer."""
        return np.asarray(np.isin(self.classes, self.malignant)[self.labels])

    @property
    def test(self) -> Mask:
        """(N,) whether the row is in the test split."""
        return np.asarray(self.splits == "test")


def predict_in_folds(
    learner: Learner, features: Floats, labels: Integers, groups: NDArray[Any] | None, classes: int, seed: int
) -> Floats:
    """Return (N, C) cross-validated probabilities; `groups` stay in one fold, None: folds of images."""
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(FOLDS, shuffle=True, random_state=seed)
    probabilities = np.zeros((len(labels), classes))
    with _one_thread(), warnings.catch_warnings():
        # A class with fewer images than folds is missing from some of them, and its images count as wrong there.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for train, test in list(splitter.split(features, labels, groups)):
            model = learner().fit(features[train], labels[train])
            probabilities[np.ix_(test, model.classes_)] = model.predict_proba(features[test])
    return probabilities


def _one_thread() -> Any:
    # The matrices are small: threads would wait for each other, ten times as long on a busy machine.
    return threadpool_limits(limits=1)


def _enough_for_folds(labels: Integers, groups: NDArray[Any]) -> bool:
    """Whether there are two classes, one of them in every fold, and at least one group a fold."""
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) > 1 and int(counts.max()) >= FOLDS and len(set(groups)) >= FOLDS


def _measure(
    labels: Integers,
    probabilities: Floats,
    groups: NDArray[Any],
    classes: tuple[str, ...],
    malignant: tuple[str, ...],
    samples: int,
    seed: int,
) -> dict[str, float]:
    """Return the `MEASURES`, each with `_low` and `_high`; NaN where undefined."""
    bootstrap = Bootstrap(groups, samples, seed, LEVEL)
    model = WeightedMetrics(labels, probabilities, bootstrap.codes, classes, malignant)
    point, drawn = model.measure(bootstrap.unit_weights), bootstrap.resample_each({"": model.measure})[""]
    result: dict[str, float] = {}
    for name, key in MEASURES.items():
        estimate = bootstrap.estimate(float(point[key][0]), drawn[key]) if key in drawn else Estimate(NAN)
        result |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return result


def balanced_accuracy(labels: Integers, preds: Integers, classes: tuple[str, ...], bootstrap: Bootstrap) -> Floats:
    """Return the balanced accuracy on the rows themselves, and then that of every resample: (1 + samples,)."""
    cells = bootstrap.sums(np.eye(len(classes) ** 2)[labels * len(classes) + preds])

    def statistic(weights: Floats) -> Floats:
        matrices = (weights @ cells).reshape(-1, len(classes), len(classes))
        return confusion_metrics(matrices, classes)["balanced_accuracy"]

    return np.concatenate([statistic(bootstrap.unit_weights), bootstrap.resample(statistic)])


def _estimate(values: Floats, bootstrap: Bootstrap) -> Estimate:
    return bootstrap.estimate(float(values[0]), values[1:])


def _image_and_group_folds(
    learner: Learner, features: Floats, rows: AuditedRows, bootstrap: Bootstrap, seed: int
) -> tuple[Estimate, Estimate, Estimate]:
    """Return the balanced accuracy in folds of images, in folds of patients, and the paired difference: a model that
    recognises patients by their metadata is better in folds of images.
    """
    images, grouped = (
        balanced_accuracy(
            rows.labels,
            predict_in_folds(learner, features, rows.labels, kept, len(rows.classes), seed).argmax(axis=1),
            rows.classes,
            bootstrap,
        )
        for kept in (None, rows.groups)
    )
    return _estimate(images, bootstrap), _estimate(grouped, bootstrap), _estimate(images - grouped, bootstrap)


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
    """Fields that are missing together in the rows of `mask` (N,); `code` stands for missing, such as UNK (empty: empty
    cells).
    """

    fields: tuple[str, ...]
    code: str
    mask: Mask

    @property
    def name(self) -> str:
        """What it is called in tables."""
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


def missingness(rows: AuditedRows, samples: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame, list[Finding]]:
    """Measure which fields are missing together, for which classes, and what missingness alone predicts (logistic
    regression on one column a mask, classes balanced, in patient-disjoint folds).

    Return a table of blocks: `block`, `rows`, `share`, one column a class (the share of its rows), `malignant_missing`,
    `malignant_present` (share of cancers among the rows with and without); a table of models: `mask` (a block, `all
    empty cells`, `all`), `rows`, and `MEASURES`, each with `_low` and `_high`; and the findings.
    """
    blocks = find_blocks(rows)
    if not blocks:
        message = "no metadata cell is missing" if rows.schema.fields else "there is no metadata"
        return pd.DataFrame(), pd.DataFrame(), [Finding("PASS", "missing_mask", message)]
    table = pd.DataFrame([_block_row(rows, block) for block in blocks])
    reported = [block for block in blocks if block.mask.sum() >= MINIMUM_ROWS]
    if not _enough_for_folds(rows.labels, rows.groups):
        return table, pd.DataFrame(), [_block_finding(rows, block, None) for block in reported]
    chosen = {block.name: [block] for block in reported}
    empty = [block for block in blocks if not block.code]
    # No model twice: the last of them is that of everything that is missing.
    if 1 < len(empty) < len(blocks):
        chosen["all empty cells"] = empty
    if list(chosen.values()) != [blocks]:
        chosen["all"] = blocks
    models = []
    for name, members in chosen.items():
        masks = np.stack([block.mask for block in members], axis=1).astype(float)
        probabilities = predict_in_folds(
            lambda: LogisticRegression(class_weight="balanced", max_iter=1000),
            masks,
            rows.labels,
            rows.groups,
            len(rows.classes),
            seed,
        )
        measured = _measure(rows.labels, probabilities, rows.groups, rows.classes, rows.malignant, samples, seed)
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
    return Finding(
        "WARN" if model is not None and _lower_auc(model) > 0.5 else "PASS", "missing_block", message, (), missing
    )


def _lower_auc(row: dict[str, Any]) -> float:
    """Return the higher of the lower bounds of the two AUCs; NaN if both are undefined."""
    return float(np.fmax(row["auc_low"], row["malignant_auc_low"]))


def _mask_finding(model: dict[str, Any], classes: int) -> Finding:
    message = (
        f"missingness alone gives a balanced accuracy of {model['balanced_accuracy']:.3f} "
        f"[{model['balanced_accuracy_low']:.3f}, {model['balanced_accuracy_high']:.3f}] (chance {1 / classes:.3f}) "
        f"and a macro AUC of {model['auc']:.3f} [{model['auc_low']:.3f}, {model['auc_high']:.3f}] (chance .5)"
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


def label_leaking_columns(rows: AuditedRows, samples: int, seed: int) -> tuple[pd.DataFrame, list[Finding]]:
    """Measure how well every metadata field and every other published column alone predicts the class.

    Return a table `column`, `feature` (whether models see it), `rows` (recorded), `MEASURES` with `_low` and `_high`,
    `settles` (how many rows hold a value that determines malignancy or class) and `verdict`, the strongest first; and a
    finding for each column that isn't PASS, and one for the rest.
    """
    fields = [(field.name, rows.table[field.name], True) for field in rows.schema.fields]
    examined, findings = [], []
    for name, column, feature in [*fields, *((str(name), rows.others[name], False) for name in rows.others.columns)]:
        known = column.notna().to_numpy()
        codes = column_codes(column[known]) if known.any() else None
        if codes is None and known.any() and feature:
            message = f"{name} has {column.nunique():,} different words: free text or an id, which wasn't examined"
            findings.append(Finding("WARN", "proxy", message))
        elif codes is not None and _enough_for_folds(rows.labels[known], rows.groups[known]):
            row, finding = _examine(name, column[known], codes, known, feature, rows, samples, seed)
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
    name: str, values: pd.Series, codes: Floats, known: Mask, feature: bool, rows: AuditedRows, samples: int, seed: int
) -> tuple[dict[str, Any], Finding | None]:
    """Return a column's row, and a finding unless it passes; `values` and `codes` are those of the `known` rows."""
    present, labels = np.unique(rows.labels[known], return_inverse=True)
    classes = tuple(rows.classes[index] for index in present)
    malignant = tuple(label for label in classes if label in rows.malignant)
    malignant = malignant if len(malignant) < len(classes) else ()
    groups = rows.groups[known]
    # Leaves of 10 rows: a tree that isolates single patients learns nothing that holds for others.
    probabilities = predict_in_folds(
        lambda: DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=10, class_weight="balanced", random_state=0),
        codes[:, None],
        labels,
        groups,
        len(classes),
        seed,
    )
    measured = _measure(labels, probabilities, groups, classes, malignant, samples, seed)
    chance = 1 / len(classes)
    gain, auc = (measured["balanced_accuracy_low"] - chance) / (1 - chance), _lower_auc(measured)
    determining, count = _determining_values(values, known, rows)
    strong = bool(determining) or auc >= STRONG_AUC
    nearly = gain >= LABEL_GAIN or auc >= LABEL_AUC or (bool(determining) and auc >= STRONG_AUC)
    level: Level = "FAIL" if feature and nearly else "WARN" if nearly or strong else "PASS"
    row = {"column": name, "feature": feature, "rows": int(known.sum()), **measured, "settles": count, "verdict": level}
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


def _determining_values(values: pd.Series, known: Mask, rows: AuditedRows) -> tuple[list[str], int]:
    """Return the values that always or never go with cancer, or always with one class, where chance can't explain it.

    Patients are counted, not rows: images of one patient share the value and often the class.
    """
    cancer, labels, groups = rows.is_malignant[known], rows.labels[known], rows.groups[known]
    # How the class is distributed where the column is recorded: what an uninformative value would show.
    share = float(cancer.mean())
    texts, count = [], 0
    for value, held in values.value_counts().items():
        if held < DETERMINING_SHARE * len(rows.table):
            break
        mine = (values == value).to_numpy()
        patients, first = len(set(groups[mine])), labels[mine][0]
        if rows.malignant and not cancer[mine].any() and (1 - share) ** patients < DETERMINING_CHANCE:
            text = "none is malignant"
        elif rows.malignant and cancer[mine].all() and share**patients < DETERMINING_CHANCE:
            text = "all are malignant"
        elif (labels[mine] == first).all() and float((labels == first).mean()) ** patients < DETERMINING_CHANCE:
            text = f"all are {rows.classes[first]}"
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
    """Return the literature's zero-filled columns, (N, M): UNK a category of its own, numbers as they are.

    Nothing is learned from the rows but the categories that the schema doesn't name.
    """
    section = MetadataSection.model_validate(
        {"tier": tier, "imputation": "zero", "unknown": "level", "scale": "raw", "merge_aliases": False}
    )
    return MetadataEncoder.fit(rows.table, rows.schema, section).encode(rows.table).values.astype(float)


def feature_sets(rows: AuditedRows) -> dict[str, Floats]:
    """Return the sets of columns that the data set has, each (N, M)."""
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


def linear() -> Any:
    """Make logistic regression of standardised columns; classes are balanced, so that rare ones count."""
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=3000, tol=1e-3))


def _nearest_neighbour() -> Any:
    return make_pipeline(StandardScaler(), KNeighborsClassifier(1))


def metadata_alone(
    rows: AuditedRows, forests: bool, samples: int, seed: int, progress: Progress | None = None
) -> tuple[pd.DataFrame, list[Finding]]:
    """Measure what models predict without the image: every learner on every set of columns, in four ways.

    Return a table `features`, `learner`, `measured`, `balanced_accuracy`, `low`, `high`, and `patients_recognised`
    (folds of images minus folds of patients, in the rows of the former) with `_low` and `_high`; and a finding. Forests
    need most of the time.
    """
    sets, grouped = feature_sets(rows), group_folds(rows.schema.unit)
    if not sets:
        return pd.DataFrame(), [Finding("PASS", "form_alone", "there is no metadata")]
    if not _enough_for_folds(rows.labels, rows.groups):
        return pd.DataFrame(), [Finding("WARN", "form_alone", "there are too few rows or patients for five folds")]
    learners: dict[str, Learner] = {LINEAR: linear}
    if forests:
        trees = TREES if len(rows.labels) <= MANY_ROWS else FEWER_TREES
        # Leaves of one row, weighted once for all trees, hold single patients and lose most in patient-disjoint folds.
        learners[FOREST] = lambda: RandomForestClassifier(
            trees, class_weight="balanced_subsample", min_samples_leaf=2, random_state=0, n_jobs=-1
        )
    learners[NEIGHBOUR] = _nearest_neighbour
    bootstrap = Bootstrap(rows.groups, samples, seed, LEVEL)
    measured: list[dict[str, Any]] = []
    for number, (features, learner) in enumerate((features, learner) for features in sets for learner in learners):
        estimates = _test_estimates(learners[learner], sets[features], rows, samples, seed)
        folds = _image_and_group_folds(learners[learner], sets[features], rows, bootstrap, seed)
        estimates |= {IMAGES: folds[0], grouped: folds[1]}
        for way, one in estimates.items():
            row = {"features": features, "learner": learner, "measured": way}
            row |= {"balanced_accuracy": one.value, "low": one.low, "high": one.high}  # type: ignore[dict-item]
            if way == IMAGES:
                row |= {f"patients_recognised{end}": value for end, value in _ends(folds[2])}  # type: ignore[misc]
            measured.append(row)
        if progress is not None:
            progress(number + 1, len(sets) * len(learners))
    return pd.DataFrame(measured), [_alone_finding(measured, rows)]


def _ends(one: Estimate) -> list[tuple[str, float]]:
    return [("", one.value), ("_low", one.low), ("_high", one.high)]


def _test_estimates(
    learner: Learner, features: Floats, rows: AuditedRows, samples: int, seed: int
) -> dict[str, Estimate]:
    test, estimates = rows.test, {}
    for way, chosen in ((TRAIN, rows.splits == "train"), (TRAIN_VAL, ~test)):
        if not test.any() or len(set(rows.labels[chosen])) < 2:
            continue
        if len(set(rows.groups[test])) < 2:
            estimates[way] = Estimate(NAN)
            continue
        with _one_thread():
            preds = learner().fit(features[chosen], rows.labels[chosen]).predict(features[test])
        bootstrap = Bootstrap(rows.groups[test], samples, seed, LEVEL)
        estimates[way] = _estimate(balanced_accuracy(rows.labels[test], preds, rows.classes, bootstrap), bootstrap)
    return estimates


def _alone_finding(measured: list[dict[str, Any]], rows: AuditedRows) -> Finding:
    images = [row for row in measured if row["measured"] == IMAGES]
    grouped = [row for row in measured if row["measured"] == group_folds(rows.schema.unit)]
    best = max(grouped, key=lambda row: row["balanced_accuracy"])
    one, other = max(zip(images, grouped, strict=True), key=lambda pair: pair[0]["patients_recognised_low"])
    low, high, unit = one["patients_recognised_low"], one["patients_recognised_high"], rows.schema.unit
    message = (
        f"metadata alone give a balanced accuracy of {best['balanced_accuracy']:.3f} in {unit}-disjoint folds "
        f"({best['learner']}, {best['features']}; chance {1 / len(rows.classes):.3f}): a model that also reads images "
        "must do better"
    )
    compared = (
        f"{one['learner']}, {one['features']}: {one['balanced_accuracy']:.3f} in folds of images, "
        f"{other['balanced_accuracy']:.3f} in folds of {unit}s, difference {one['patients_recognised']:.3f} "
        f"[{low:.3f}, {high:.3f}]"
    )
    if low > FOLD_NOISE:
        message += f". They identify {unit}s ({compared}): never split this data set by image"
        return Finding("WARN", "form_alone", message)
    return Finding("PASS", "form_alone", f"{message}. They do not identify {unit}s ({compared})")


def reidentification(rows: AuditedRows, samples: int, seed: int) -> tuple[pd.DataFrame, list[Finding]]:
    """Measure how often the nearest metadata, as a vector of standardised columns, are of the same patient.

    Return a table `question`, `value`, `low`, `high` (NaN where there is no interval), and the findings.
    """
    columns, unit = ["question", "value", "low", "high"], rows.schema.unit
    if not rows.schema.fields:
        return pd.DataFrame(), [Finding("PASS", "reidentification", "there is no metadata")]
    metadata = StandardScaler().fit_transform(encoded_metadata(rows, "M2"))
    train, test = rows.splits == "train", rows.test
    measured: list[tuple[str, float, float, float]] = []
    findings = []
    if train.any() and test.any():
        same = _nearest(metadata[train], rows.groups[train], metadata[test]) == rows.groups[test]
        question = f"test images whose nearest training metadata are of the same {unit}"
        measured.append((question, float(same.mean()), NAN, NAN))
        message = f"for {int(same.sum()):,} of {len(same):,} test images ({same.mean():.1%}) the nearest training "
        message += f"metadata are of the same {unit}"
        findings.append(Finding("WARN" if same.any() else "PASS", "nearest_form", message, count=int(same.sum())))
    several = pd.Series(rows.groups).duplicated(keep=False).to_numpy()
    if several.any():
        same = _nearest(metadata[several], rows.groups[several]) == rows.groups[several]
        question = f"images of {unit}s with several images whose nearest other metadata are of the same {unit}"
        measured.append((question, float(same.mean()), NAN, NAN))
    if not _enough_for_folds(rows.labels, rows.groups):
        return pd.DataFrame(measured, columns=columns), findings
    bootstrap = Bootstrap(rows.groups, samples, seed, LEVEL)
    images, grouped, difference = _image_and_group_folds(_nearest_neighbour, metadata, rows, bootstrap, seed)
    for way, one in ((IMAGES, images), (group_folds(unit), grouped)):
        question = f"balanced accuracy of the class of the nearest metadata, {way}"
        measured.append((question, one.value, one.low, one.high))
    message = (
        f"the class of the nearest metadata has a balanced accuracy of {images.value:.3f} in folds of images and "
        f"{grouped.value:.3f} in folds of {unit}s, difference {difference.value:.3f} "
        f"[{difference.low:.3f}, {difference.high:.3f}]: metadata "
    )
    if difference.low > FOLD_NOISE:
        findings.append(Finding("WARN", "reidentification", f"{message}nearly identify the {unit}"))
    else:
        findings.append(Finding("PASS", "reidentification", f"{message}do not identify the {unit}"))
    return pd.DataFrame(measured, columns=columns), findings


def _nearest(known: Floats, groups: NDArray[np.object_], queries: Floats | None = None) -> NDArray[np.object_]:
    """Return the group of the nearest `known` row to each query; without queries, of the nearest other row to each."""
    with _one_thread():
        nearest = NearestNeighbors(n_neighbors=1).fit(known).kneighbors(queries, return_distance=False)[:, 0]
    return np.asarray(groups[nearest])
