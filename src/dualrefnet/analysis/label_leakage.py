"""The rows that an audit looks at: those of a split, with all that is known of them, in the split's order."""

# also: The few measures an audit takes of models that see no picture, with intervals over patients.
# also: What is missing, and whether that gives the class away: a form filled in only for some patients tells which they
# are.
# also: Proxies of the label: columns that hold the answer, or what was done because of the answer, under whatever name.
# also: The form alone, without a picture: how far it goes, and how much of that is the recognition of patients.
# also: Does a form name its patient? For each form the nearest other one is looked up, as a model with a memory would.

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
from dualrefnet.evaluation.bootstrap import Bootstrap, draw_counts, group_codes, percentile_interval
from dualrefnet.evaluation.metrics import WeightedMetrics
from dualrefnet.recipe import MetadataSection


@dataclass(frozen=True)
class AuditedRows:
    """Rows of a data set and their sides.

    Attributes:
        table: (N rows) of the lesion table, index 0..N-1.
        others: (N rows) the published columns that aren't features.
        schema: what the columns mean.
        classes: the classes that have a row.
        malignant: those of them that are cancer; empty if that would be none or all.
        labels: (N,) indices into `classes`.
        groups: (N,) the patient (of ISIC-2019: lesion) of every row.
        sides: (N,) train, val or test.
    """

    table: pd.DataFrame
    others: pd.DataFrame
    schema: DatasetSchema
    classes: tuple[str, ...]
    malignant: tuple[str, ...]
    labels: NDArray[np.int64]
    groups: NDArray[np.object_]
    sides: NDArray[np.object_]

    @classmethod
    def of(cls, dataset: Dataset, split: pd.DataFrame) -> AuditedRows:
        """Take the rows of a split; labels and patients are those of the data set."""
        places = pd.Series(dataset.table.index, index=dataset.table["image_id"]).loc[split["image_id"]]
        table = dataset.table.loc[places].reset_index(drop=True)
        others = dataset.other_columns.reindex(places).reset_index(drop=True)
        classes = tuple(label for label in dataset.schema.classes if (table["label"] == label).any())
        malignant = tuple(label for label in classes if label in dataset.schema.malignant)
        labels = np.array([classes.index(label) for label in table["label"]], dtype=np.int64)
        return cls(
            table,
            others,
            dataset.schema,
            classes,
            malignant if len(malignant) < len(classes) else (),
            labels,
            groups(table, dataset.schema).to_numpy(dtype=object),
            split["split"].to_numpy(dtype=object),
        )

    @property
    def is_malignant(self) -> NDArray[np.bool_]:
        """(N,) whether the row is a cancer."""
        malignant: NDArray[np.bool_] = np.isin(self.classes, self.malignant)[self.labels]
        return malignant

    @property
    def test(self) -> NDArray[np.bool_]:
        """(N,) whether the row is on the test side."""
        chosen: NDArray[np.bool_] = self.sides == "test"
        return chosen


FOLDS = 5


LEVEL = 0.95


MEASURES = {"balanced_accuracy": "balanced_accuracy", "auc": "auc_macro_ovr", "malignant_auc": "malignant.auc"}


# Makes a fresh, unfitted classifier of scikit-learn.
Learner = Callable[[], Any]


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval over patients; NaN where it is undefined."""

    value: float
    low: float
    high: float


def predict_in_folds(
    learner: Learner,
    features: NDArray[np.float64],
    labels: NDArray[np.int64],
    groups: NDArray[Any] | None,
    classes: int,
    seed: int,
) -> NDArray[np.float64]:
    """Predict every row by a model that was fitted without the row's fold.

    Args:
        learner: makes a classifier.
        features: (N, M).
        labels: (N,).
        groups: (N,) patients, kept together; None: folds of images.
        classes: C.
        seed: of the folds.

    Returns:
        (N, C) probabilities.
    """
    probabilities = np.zeros((len(labels), classes))
    with one_thread():
        for train, test in _folds(features, labels, groups, seed):
            model = learner().fit(features[train], labels[train])
            probabilities[np.ix_(test, model.classes_)] = model.predict_proba(features[test])
    return probabilities


def one_thread() -> Any:
    """Return a context in which linear algebra uses one thread.

    The matrices of forms are small: threads would spend their time waiting for each other, ten times as long on a busy
    machine.
    """
    return threadpool_limits(limits=1)


def enough_for_folds(labels: NDArray[np.int64], groups: NDArray[Any]) -> bool:
    """Whether two classes are there, one of them in each of the folds, and as many groups as folds."""
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) > 1 and int(counts.max()) >= FOLDS and len(set(groups)) >= FOLDS


def measure(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    groups: NDArray[Any],
    classes: tuple[str, ...],
    malignant: tuple[str, ...],
    samples: int,
    seed: int,
) -> dict[str, Interval]:
    """Return `balanced_accuracy`, `auc` (macro, one class against the rest) and `malignant_auc` with intervals.

    Args:
        labels: (N,).
        probabilities: (N, C).
        groups: (N,) patients.
        classes: C names.
        malignant: those that are cancer; if empty, `malignant_auc` is NaN.
        samples: bootstrap samples.
        seed: of the draw.
    """
    bootstrap = Bootstrap(groups, len(labels), samples, seed, LEVEL)
    model = WeightedMetrics(labels, probabilities, bootstrap.codes, classes, malignant)
    point, drawn = model.measure(bootstrap.unit_weights), bootstrap.resample_each({"": model.measure})[""]
    result = {}
    for name, key in MEASURES.items():
        interval = percentile_interval(drawn[key], LEVEL) if key in drawn else None
        result[name] = (
            Interval(float(point[key][0]), *interval) if interval is not None else Interval(np.nan, np.nan, np.nan)
        )
    return result


def recall_samples(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], groups: NDArray[Any], classes: int, samples: int, seed: int
) -> tuple[float, NDArray[np.float64]]:
    """Return the balanced accuracy and that of every bootstrap sample of patients, (samples,).

    The same `groups` and `seed` draw the same patients, so that differences of two models' samples are paired.
    """
    codes = group_codes(groups)
    count, cell = int(codes.max()) + 1, labels * classes + predicted
    cells = (
        np.bincount(codes * classes**2 + cell, minlength=count * classes**2).reshape(count, classes**2).astype(float)
    )
    drawn = [_balanced(times @ cells, classes) for times in draw_counts(count, samples, seed)]
    return float(_balanced(cells.sum(axis=0, keepdims=True), classes)[0]), np.concatenate(drawn)


def _balanced(cells: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    matrices = cells.reshape(-1, classes, classes)
    support = matrices.sum(axis=2)
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    recall = np.divide(hits, support, out=np.zeros_like(support), where=support > 0)
    return np.asarray(recall.sum(axis=1) / (support > 0).sum(axis=1))


def _folds(
    features: NDArray[np.float64], labels: NDArray[np.int64], groups: NDArray[Any] | None, seed: int
) -> list[tuple[Any, Any]]:
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer images than folds is missing from some of them, and its images count as wrong there.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        return list(splitter.split(features, labels, groups))


# Columns are one block if of the rows in which either is missing at least this share misses both.
TOGETHER = 0.9


# A block in fewer rows is left in the model of all blocks, but isn't talked about.
MINIMUM_ROWS = 20


# A mask from which a model reads malignancy or class this well is nearly the answer. The worst that is known to have
# been
# published and used, 13 columns of PAD-UFES-20, lies at .83 and .71.
NEARLY_THE_ANSWER = 0.95


REMEDY = "metadata.tier M3 and metadata.imputation zero show it to the model, tier M2 with imputation token and modality_dropout trains it away"


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
    """Return the blocks of fields that are missing together, the largest first; empty cells and codes such as UNK
    apart.
    """
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
    blocks = [
        Block(tuple(m[0] for m in members), members[0][1], np.all([m[2] for m in members], axis=0))
        for members in gathered
    ]
    return sorted(blocks, key=lambda block: -int(block.mask.sum()))


def missingness(rows: AuditedRows, samples: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame, list[Finding]]:
    """Say which fields are missing together, for which classes, and what a model learns from that alone.

    The model is logistic regression (classes balanced) on one column a mask, in five folds that keep patients together.

    Returns:
        Table of blocks: `block`, `rows`, `share`, one column a class (the share of its rows), `malignant_missing`,
        `malignant_present`
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
    findings = [
        _block_finding(rows, block, model) for block, (_, model) in zip(spoken, models.iterrows(), strict=False)
    ]
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
        lambda: LogisticRegression(class_weight="balanced", max_iter=1000),
        features,
        rows.labels,
        rows.groups,
        len(rows.classes),
        seed,
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
        return Finding(
            "FAIL", "missing_mask", f"{message}: a model need only see which cells are empty; {REMEDY}", count=count
        )
    # One-sided: folds push a model without knowledge a little below chance.
    if model["auc_low"] > 0.5:
        return Finding("WARN", "missing_mask", f"{message}: the form shows who was examined how; {REMEDY}", count=count)
    return Finding("PASS", "missing_mask", f"{message}: no better than chance", count=count)


# The strongest honest columns that are known: growth (.76 of malignancy) and change in PAD-UFES-20, age in ISIC-2019
# (.72).
# `biopsed`, a decision made because of the suspicion, has .89. All limits are for the lower end of the interval.
STRONG_AUC = 0.80


# An exact copy of the label has 1; a copy in which one label of ten is wrong about .94 (AUC) and .88 or .80 (knowledge,
# six or
# two classes).
ANSWER_AUC = 0.90


# Balanced accuracy between chance (0) and all (1).
ANSWER_KNOWLEDGE = 0.70


# A value that settles malignancy must be held by this share of the rows ...
SETTLING_SHARE = 0.05


# ... and by so many patients that chance makes this of it less often than that. Strict: a form has many values.
SETTLING_CHANCE = 1e-6


# Columns with more different words than this are free text or ids.
FREE_TEXT = 200


COLUMNS = ("column", "feature", "rows", "balanced_accuracy", "auc", "malignant_auc", "settles", "verdict")


def proxies(rows: AuditedRows, samples: int, seed: int) -> tuple[pd.DataFrame, list[Finding]]:
    """Examine every metadata field and every other published column.

    Returns:
        Table `column`, `feature` (whether models see it), `rows` (recorded), `balanced_accuracy`, `auc`,
        `malignant_auc` with `_low` and
        `_high`, `settles` (how many rows hold a value that settles malignancy or class) and `verdict`; the strongest
        first.
        And the findings: one for each column that isn't PASS, and one for the rest.
    """
    told, findings = [], []
    for name, column, feature in _columns(rows):
        row, finding = _examine(name, column, feature, rows, samples, seed)
        if row is not None:
            told.append(row)
        if finding is not None:
            findings.append(finding)
    table = pd.DataFrame(told, columns=None if told else list(COLUMNS))
    if len(table):
        table = table.sort_values("auc", ascending=False, ignore_index=True)
    quiet = int((table["verdict"] == "PASS").sum()) if len(table) else 0
    if quiet:
        strongest = table[table["verdict"] == "PASS"].iloc[0]
        message = f"{quiet} columns tell no more than an honest finding does; the strongest: {strongest['column']} (AUC {strongest['auc']:.3f})"
        findings.append(Finding("PASS", "proxy", message, count=quiet))
    elif not findings:
        findings.append(Finding("PASS", "proxy", "there is no column beside the label"))
    return table, findings


def column_codes(values: pd.Series) -> NDArray[np.float64] | None:
    """Return a recorded column as numbers, (N,): numbers as they are, words by how frequent they are; None for free
    text.
    """
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.notna().all():
        return np.asarray(numbers, dtype=float)
    if values.nunique() > FREE_TEXT:
        return None
    codes = {value: code for code, value in enumerate(values.value_counts().index)}
    return np.asarray(values.map(codes), dtype=float)


def _columns(rows: AuditedRows) -> list[tuple[str, pd.Series, bool]]:
    fields = [(field.name, rows.table[field.name], True) for field in rows.schema.fields]
    return fields + [(str(name), rows.others[name], False) for name in rows.others.columns]


def _tree() -> DecisionTreeClassifier:
    # Leaves of 10 rows: a tree that isolates single patients learns nothing that holds for others.
    return DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=10, class_weight="balanced", random_state=0)


def _examine(
    name: str, column: pd.Series, feature: bool, rows: AuditedRows, samples: int, seed: int
) -> tuple[dict[str, Any] | None, Finding | None]:
    known = column.notna().to_numpy()
    codes = column_codes(column[known]) if known.any() else None
    if codes is None:
        if known.any() and feature:
            return None, Finding(
                "WARN",
                "proxy",
                f"{name} has {column.nunique():,} different words: free text or an id, which wasn't examined",
            )
        return None, None
    present = np.unique(rows.labels[known])
    groups = rows.groups[known]
    if not enough_for_folds(rows.labels[known], groups):
        return None, None
    classes = tuple(rows.classes[index] for index in present)
    labels = np.searchsorted(present, rows.labels[known])
    malignant = tuple(label for label in classes if label in rows.malignant)
    malignant = malignant if len(malignant) < len(classes) else ()
    probabilities = predict_in_folds(_tree, codes[:, None], labels, groups, len(classes), seed)
    measured = measure(labels, probabilities, groups, classes, malignant, samples, seed)
    settled, count = _settles(column[known], known, rows)
    row: dict[str, Any] = {"column": name, "feature": feature, "rows": int(known.sum())}
    for key, value in measured.items():
        row |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
    chance = 1 / len(classes)
    knowledge = (measured["balanced_accuracy"].low - chance) / (1 - chance)
    auc = float(np.nanmax([measured["auc"].low, measured["malignant_auc"].low]))
    level, said = _verdict(feature, knowledge, auc, bool(settled))
    row |= {"settles": count, "verdict": level}
    if level == "PASS":
        return row, None
    numbers = f"alone it gives a balanced accuracy of {row['balanced_accuracy']:.3f} (chance {chance:.3f}), a macro AUC of {row['auc']:.3f}"
    if np.isfinite(row["malignant_auc"]):
        numbers += f" and an AUC of malignancy of {row['malignant_auc']:.3f}"
    return row, Finding(
        level, "proxy", f"{name} {said}: {numbers}{''.join(f'; {words}' for words in settled)}", count=count
    )


def _verdict(feature: bool, knowledge: float, auc: float, settles: bool) -> tuple[Level, str]:
    answer = knowledge >= ANSWER_KNOWLEDGE or auc >= ANSWER_AUC or (settles and auc >= STRONG_AUC)
    if feature and answer:
        return "FAIL", "is a metadata field and nearly the answer; take it out"
    if not feature and (answer or settles or auc >= STRONG_AUC):
        return "WARN", "is a proxy of the label; it isn't used as a feature: keep it so"
    if settles or auc >= STRONG_AUC:
        return "WARN", "is a metadata field that tells much of the answer; ask when it was recorded and why"
    return "PASS", ""


def _settles(values: pd.Series, known: NDArray[np.bool_], rows: AuditedRows) -> tuple[list[str], int]:
    """Say which values always or never go with a malignant class, or always with one class, where chance can't explain
    it.

    Patients are counted, not rows: photographs of one patient share the value and often the class.
    """
    cancer, labels, groups = rows.is_malignant[known], rows.labels[known], rows.groups[known]
    said, count = [], 0
    for value, held in values.value_counts().items():
        if held < SETTLING_SHARE * len(rows.table):
            break
        mine = (values == value).to_numpy()
        patients = len(set(groups[mine]))
        # How the class is distributed where the column is recorded: what a value that tells nothing would show.
        share = float(cancer.mean())
        what = ""
        if rows.malignant and not cancer[mine].any() and (1 - share) ** patients < SETTLING_CHANCE:
            what = "none is malignant"
        elif rows.malignant and cancer[mine].all() and share**patients < SETTLING_CHANCE:
            what = "all are malignant"
        elif len(set(labels[mine])) == 1 and float((labels == labels[mine][0]).mean()) ** patients < SETTLING_CHANCE:
            what = f"all are {rows.classes[labels[mine][0]]}"
        if what:
            count += int(held)
            said.append(f"of the {held:,} rows with {_shown(value)} {what}")
    return said, count


def _shown(value: object) -> str:
    """Return a value that many patients share, but never a number or a long text, which might be about one of them."""
    word = str(value)
    return (
        f"the value {word}" if len(word) <= 20 and not any(character.isdigit() for character in word) else "one value"
    )


ALWAYS, FLAGGED, ALL, OTHERS = (
    "always recorded",
    "always recorded + missing flag",
    "all, gaps zero",
    "all, gaps zero + other columns",
)


LINEAR, FOREST, NEIGHBOUR = "logistic regression", "random forest", "1-nearest neighbour"


# Where it is measured; the fourth, folds of patients or lesions, is `apart`.
TRAIN, TRAIN_VAL, IMAGES = "test side, from train", "test side, from train and val", "5 folds of images"


# Folds of two seeds differ by up to this; less than this above it is noise.
FOLD_NOISE = 0.02


# Trees of the forest; of more than 10,000 rows 100 are enough and take half a minute a set of columns.
TREES, FEWER_TREES, MANY_ROWS = 500, 100, 10_000


Progress = Callable[[int, int], None]


def encoded_form(rows: AuditedRows, tier: str) -> NDArray[np.float64]:
    """Return the form as the literature's zero-filled columns: UNK a level of its own, numbers as they are; (N, M).

    Nothing is learned from the rows but the levels of categories that the schema doesn't name.
    """
    section = MetadataSection.model_validate(
        {"tier": tier, "imputation": "zero", "unknown": "level", "scale": "raw", "merge_aliases": False}
    )
    return MetadataEncoder.fit(rows.table, rows.schema, section).encode(rows.table).values.astype(float)


def feature_sets(rows: AuditedRows) -> dict[str, NDArray[np.float64]]:
    """Return the sets of columns that the data set has, each (N, M)."""
    sets: dict[str, NDArray[np.float64]] = {}
    empty = [block.mask for block in find_blocks(rows) if not block.code]
    if any(field.tier == "M1" for field in rows.schema.fields):
        sets[ALWAYS] = encoded_form(rows, "M1")
        if empty:
            sets[FLAGGED] = np.column_stack([sets[ALWAYS], empty[0]])
    if rows.schema.fields:
        sets[ALL] = encoded_form(rows, "M2")
    words = [name for name in rows.others.columns if 1 < rows.others[name].nunique() <= FREE_TEXT]
    if words:
        extra = pd.get_dummies(rows.others[words], dtype=float).to_numpy()
        sets[OTHERS] = np.column_stack([sets[ALL], extra]) if ALL in sets else extra
    return sets


def learners(count: int, forests: bool) -> dict[str, Learner]:
    """Return the learners for a table of `count` rows; classes are balanced, so that rare ones count.

    Args:
        count: number of rows.
        forests: whether trees are wanted, which take the most time.
    """
    chosen: dict[str, Learner] = {LINEAR: linear}
    if forests:
        trees = TREES if count <= MANY_ROWS else FEWER_TREES
        # Leaves of one row, weighted once for all trees, lose most with patients apart: they hold single patients.
        chosen[FOREST] = lambda: RandomForestClassifier(
            trees, class_weight="balanced_subsample", min_samples_leaf=2, random_state=0, n_jobs=-1
        )
    chosen[NEIGHBOUR] = neighbour
    return chosen


def apart(group: str) -> str:
    """Return what measuring in folds that keep patients (or lesions) together is called."""
    return f"5 folds of {group}s"


def linear() -> object:
    """Make logistic regression of standardised columns."""
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=3000, tol=1e-3))


def neighbour() -> object:
    """Make the 1-nearest neighbour of standardised columns."""
    return make_pipeline(StandardScaler(), KNeighborsClassifier(1))


def form_alone(
    rows: AuditedRows, forests: bool, samples: int, seed: int, progress: Progress | None = None
) -> tuple[pd.DataFrame, list[Finding]]:
    """Measure every learner on every set of columns, four ways.

    Args:
        rows: of the split.
        forests: whether trees take part, which need most of the time.
        samples: bootstrap samples of patients.
        seed: of folds and draws.
        progress: called with (models measured, models in all).

    Returns:
        Table `features`, `learner`, `measured`, `balanced_accuracy`, `low`, `high`, and `patients_recognised` (folds of
        images less folds
        of patients, in the rows of the former) with `_low` and `_high`. And a finding.
    """
    sets = feature_sets(rows)
    if not sets:
        return pd.DataFrame(), [Finding("PASS", "form_alone", "there is no metadata")]
    if not enough_for_folds(rows.labels, rows.groups):
        return pd.DataFrame(), [Finding("WARN", "form_alone", "there are too few rows or patients for five folds")]
    makers = learners(len(rows.labels), forests)
    told: list[dict[str, object]] = []
    for number, (features, learner) in enumerate((features, learner) for features in sets for learner in makers):
        told += _measured(features, learner, sets[features], makers[learner], rows, samples, seed)
        if progress is not None:
            progress(number + 1, len(sets) * len(makers))
    table = pd.DataFrame(told)
    return table, [_finding(table, rows)]


def _measured(
    features: str, learner: str, columns: NDArray[np.float64], make: Learner, rows: AuditedRows, samples: int, seed: int
) -> list[dict[str, object]]:
    count, told = len(rows.classes), []
    test = rows.test
    for way, chosen in ((TRAIN, rows.sides == "train"), (TRAIN_VAL, ~test)):
        if not test.any() or len(set(rows.labels[chosen])) < 2:
            continue
        with one_thread():
            predicted = make().fit(columns[chosen], rows.labels[chosen]).predict(columns[test])
        value, low, high = _interval(rows.labels[test], predicted, rows.groups[test], count, samples, seed)
        told.append(
            {
                "features": features,
                "learner": learner,
                "measured": way,
                "balanced_accuracy": value,
                "low": low,
                "high": high,
            }
        )
    drawn = {}
    grouped = apart(rows.schema.unit)
    for way, kept in ((IMAGES, None), (grouped, rows.groups)):
        predicted = predict_in_folds(make, columns, rows.labels, kept, count, seed).argmax(axis=1)
        value, drawn[way] = recall_samples(rows.labels, predicted, rows.groups, count, samples, seed)
        low, high = percentile_interval(drawn[way], LEVEL) or (np.nan, np.nan)
        told.append(
            {
                "features": features,
                "learner": learner,
                "measured": way,
                "balanced_accuracy": value,
                "low": low,
                "high": high,
            }
        )
    # The same patients were drawn for both, so that the difference is paired.
    low, high = percentile_interval(drawn[IMAGES] - drawn[grouped], LEVEL) or (np.nan, np.nan)
    difference = float(told[-2]["balanced_accuracy"]) - float(told[-1]["balanced_accuracy"])  # type: ignore[arg-type]
    told[-2] |= {"patients_recognised": difference, "patients_recognised_low": low, "patients_recognised_high": high}
    return told


def _interval(
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    groups: NDArray[np.object_],
    classes: int,
    samples: int,
    seed: int,
) -> tuple[float, float, float]:
    if len(set(groups)) < 2:
        return np.nan, np.nan, np.nan
    value, drawn = recall_samples(labels, predicted, groups, classes, samples, seed)
    low, high = percentile_interval(drawn, LEVEL) or (np.nan, np.nan)
    return value, low, high


def _finding(table: pd.DataFrame, rows: AuditedRows) -> Finding:
    images = table[table["measured"] == IMAGES].to_dict("records")
    grouped = table[table["measured"] == apart(rows.schema.unit)].to_dict("records")
    best = max(grouped, key=lambda row: float(row["balanced_accuracy"]))
    one, other = max(zip(images, grouped, strict=True), key=lambda pair: float(pair[0]["patients_recognised_low"]))
    what = f"{rows.schema.unit}s"
    message = (
        f"without a picture the form gives a balanced accuracy of {best['balanced_accuracy']:.3f} with {what} apart ({best['learner']}, "
        f"{best['features']}; chance {1 / len(rows.classes):.3f}): a model that reads both must do better"
    )
    difference = f"{one['patients_recognised']:.3f} [{one['patients_recognised_low']:.3f}, {one['patients_recognised_high']:.3f}]"
    compared = (
        f"{one['learner']}, {one['features']}: {one['balanced_accuracy']:.3f} in folds of images, {other['balanced_accuracy']:.3f} in "
        f"folds of {what}, difference {difference}"
    )
    if one["patients_recognised_low"] > FOLD_NOISE:
        return Finding(
            "WARN",
            "form_alone",
            f"{message}. The form recognises {what} ({compared}): never divide this data set by image",
        )
    return Finding("PASS", "form_alone", f"{message}. It doesn't recognise {what} ({compared})")


def reidentification(rows: AuditedRows, samples: int, seed: int) -> tuple[pd.DataFrame, list[Finding]]:
    """Look up the nearest form, as a vector of standardised columns, gaps zero.

    Returns:
        Table `question`, `value`, `low`, `high` (intervals over patients where there are any). And the findings.
    """
    if not rows.schema.fields:
        return pd.DataFrame(), [Finding("PASS", "reidentification", "there is no metadata")]
    form = StandardScaler().fit_transform(encoded_form(rows, "M2"))
    who = rows.schema.unit
    train, test = rows.sides == "train", rows.test
    told: list[tuple[str, float, float, float]] = []
    findings = []
    if train.any() and test.any():
        same = _same_group(form[train], form[test], rows.groups[train], rows.groups[test])
        told.append(
            (f"test images whose nearest training form is of the same {who}", float(same.mean()), np.nan, np.nan)
        )
        message = f"for {int(same.sum()):,} of {len(same):,} test images ({same.mean():.1%}) the nearest training form is one of the same {who}"
        findings.append(Finding("WARN" if same.any() else "PASS", "nearest_form", message, count=int(same.sum())))
    several = pd.Series(rows.groups).duplicated(keep=False).to_numpy()
    if several.any():
        found = _nearest_other(form[several], rows.groups[several])
        told.append(
            (
                f"images of {who}s with several images whose nearest other form is of the same {who}",
                float(found.mean()),
                np.nan,
                np.nan,
            )
        )
    if not enough_for_folds(rows.labels, rows.groups):
        return pd.DataFrame(told, columns=["question", "value", "low", "high"]), findings
    drawn, values = {}, {}
    for name, grouping in (("images", None), (f"{who}s", rows.groups)):
        predicted = predict_in_folds(neighbour, form, rows.labels, grouping, len(rows.classes), seed).argmax(axis=1)
        values[name], drawn[name] = recall_samples(
            rows.labels, predicted, rows.groups, len(rows.classes), samples, seed
        )
        low, high = percentile_interval(drawn[name], LEVEL) or (np.nan, np.nan)
        told.append((f"balanced accuracy of the class of the nearest form, 5 folds of {name}", values[name], low, high))
    # The same patients were drawn for both, so that the difference is paired.
    low, high = percentile_interval(drawn["images"] - drawn[f"{who}s"], LEVEL) or (np.nan, np.nan)
    message = (
        f"the class of the nearest form is right in {values['images']:.3f} (balanced accuracy) in folds of images and "
        f"{values[f'{who}s']:.3f} in folds of {who}s, difference {values['images'] - values[f'{who}s']:.3f} [{low:.3f}, {high:.3f}]"
    )
    findings.append(
        Finding("WARN", "reidentification", f"{message}: a form nearly names its {who}")
        if low > FOLD_NOISE
        else Finding("PASS", "reidentification", f"{message}: forms don't name their {who}")
    )
    return pd.DataFrame(told, columns=["question", "value", "low", "high"]), findings


def _same_group(
    known: NDArray[np.float64],
    asked: NDArray[np.float64],
    known_groups: NDArray[np.object_],
    asked_groups: NDArray[np.object_],
) -> NDArray[np.bool_]:
    with one_thread():
        nearest = NearestNeighbors(n_neighbors=1).fit(known).kneighbors(asked, return_distance=False)[:, 0]
    same: NDArray[np.bool_] = known_groups[nearest] == asked_groups
    return same


def _nearest_other(form: NDArray[np.float64], groups: NDArray[np.object_]) -> NDArray[np.bool_]:
    # Without an argument a row isn't its own neighbour.
    with one_thread():
        nearest = NearestNeighbors(n_neighbors=1).fit(form).kneighbors(return_distance=False)[:, 0]
    same: NDArray[np.bool_] = groups[nearest] == groups
    return same
