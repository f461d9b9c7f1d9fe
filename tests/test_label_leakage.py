import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, clone

from dualrefnet.analysis.label_leakage import (
    ALL,
    ALWAYS,
    FLAGGED,
    FOREST,
    IMAGES,
    LINEAR,
    NEIGHBOUR,
    OTHERS,
    REGRESSION,
    TRAIN,
    TRAIN_VAL,
    AuditedRows,
    balanced_accuracy,
    feature_sets,
    label_leaking_columns,
    metadata_alone,
    missingness,
    predict_in_folds,
    reidentification,
)
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.check import Finding
from dualrefnet.data.protocols import split_dataset
from dualrefnet.data.schema import Dataset
from dualrefnet.evaluation.bootstrap import Bootstrap

GROUPED = "5 folds of patients"


def only(findings: list[Finding], check: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.check == check]
    return finding


def write_table(root: Path, frame: pd.DataFrame, fields: list[str], malignant: str = "[]") -> Dataset:
    frame.assign(image=[f"{n}.png" for n in range(len(frame))]).to_csv(root / "table.csv", index=False)
    metadata = ", ".join(f"{{name: {name}, kind: categorical}}" for name in fields)
    (root / "dataset.yaml").write_text(f"patient: patient\nmalignant: {malignant}\nmetadata: [{metadata}]\n")
    return load_dataset("csv_table", root)


@pytest.fixture(scope="module")
def sample(large_root: Path) -> Dataset:
    return load_dataset("sample", large_root)


def test_fields_missing_together_are_one_block_whose_classes_are_counted(tmp_path: Path) -> None:
    count = 400
    frame = pd.DataFrame({"label": ["ill", "well"] * (count // 2), "patient": np.arange(count) // 2})
    # Row 1, 5, 9, ...: half of the healthy miss two fields, and were never operated on.
    gap = np.arange(count) % 4 == 1
    frame["a"], frame["b"] = np.where(gap, None, "x"), np.where(gap, None, "y")
    frame["c"] = np.where(np.arange(count) % 10 == 0, None, "z")
    frame["operated"] = np.where(gap, "no", np.where(np.arange(count) % 3, "yes", "no"))
    dataset = write_table(tmp_path, frame, ["a", "b", "c"], "[ill]")
    blocks, models, findings = missingness(AuditedRows.of(dataset, split_dataset(dataset), 100))
    assert blocks["block"].tolist() == ["a, b empty", "c empty"]
    first = blocks.iloc[0]
    assert (first["rows"], first["ill"], first["well"]) == (100, 0.0, 0.5)
    assert (first["malignant_missing"], first["malignant_present"]) == (0.0, pytest.approx(200 / 300))
    # Known alone: all ill and half of the healthy have the fields.
    assert models.iloc[0]["balanced_accuracy"] == pytest.approx(0.75)
    assert models.iloc[0]["auc"] == pytest.approx(0.75, abs=0.015)
    block = next(finding for finding in findings if finding.check == "missing_block")
    assert "operated is no" in block.message
    assert block.level == "WARN"


def test_missingness_that_is_the_label_fails(tmp_path: Path) -> None:
    frame = pd.DataFrame({"label": ["ill", "well"] * 100, "patient": range(200)})
    frame["thickness"] = np.where(frame["label"] == "ill", "thin", None)
    dataset = write_table(tmp_path, frame, ["thickness"], "[ill]")
    findings = missingness(AuditedRows.of(dataset, split_dataset(dataset), 50))[2]
    assert only(findings, "missing_mask").level == "FAIL"


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("classes", [2, 6])
def test_a_column_derived_from_the_label_fails_as_a_feature_and_warns_otherwise(
    tmp_path: Path, noise: float, classes: int
) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(classes, size=600)
    wrong = generator.random(600) < noise
    planted = np.where(wrong, generator.integers(classes, size=600), labels)
    frame = pd.DataFrame({"label": [f"class {n}" for n in labels], "patient": generator.integers(300, size=600)})
    frame["stage"] = [f"stage {n}" for n in planted]
    frame["site"] = generator.choice(["arm", "leg", "back"], 600)
    for fields, level in ((["stage", "site"], "FAIL"), (["site"], "WARN")):
        dataset = write_table(tmp_path, frame, fields, "[class 0]")
        table, findings = label_leaking_columns(AuditedRows.of(dataset, split_dataset(dataset), 50))
        told = {finding.message.split()[0]: finding.level for finding in findings if finding.level != "PASS"}
        assert told == {"stage": level}
        assert table.iloc[0]["column"] == "stage"
        assert table.set_index("column")["feature"].to_dict() == {"stage": level == "FAIL", "site": True}


def test_a_word_for_nothing_is_missing_in_fields_and_other_columns(tmp_path: Path) -> None:
    frame = pd.DataFrame({"label": ["ill", "well"] * 100, "patient": range(200)})
    frame["site"] = frame["ward"] = ["NA", "arm", "N/A", "leg", "nan", "arm", "-", "leg"] * 25
    dataset = write_table(tmp_path, frame, ["site"], "[ill]")
    rows = AuditedRows.of(dataset, split_dataset(dataset), 20)
    assert missingness(rows)[0]["ill"].tolist() == [1.0]
    # Where something is recorded all are well, and nothing is left to be told apart.
    assert len(label_leaking_columns(rows)[0]) == 0


def test_biopsed_is_named_unprompted_and_would_fail_as_a_field_under_another_name(
    sample: Dataset, tmp_path: Path
) -> None:
    findings = label_leaking_columns(AuditedRows.of(sample, split_dataset(sample), 50))[1]
    warned = [finding for finding in findings if finding.level != "PASS"]
    assert [finding.message.split(" ")[0] for finding in warned] == ["biopsed"]
    assert "rows with the value False none is malignant" in warned[0].message
    frame = sample.table[["label"]].assign(patient=sample.table["patient_id"], excised=sample.other_columns["biopsed"])
    dataset = write_table(tmp_path, frame, ["excised"], "[BCC, MEL, SCC]")
    assert only(label_leaking_columns(AuditedRows.of(dataset, split_dataset(dataset), 50))[1], "proxy").level == "FAIL"


def test_shuffled_labels_leave_nothing_to_be_known(sample: Dataset) -> None:
    table = sample.table.assign(label=np.random.default_rng(1).permutation(sample.table["label"]))
    shuffled = dataclasses.replace(sample, table=table)
    rows = AuditedRows.of(shuffled, split_dataset(sample))
    chance = 1 / 6

    models, findings = missingness(rows)[1:]
    # Only upwards: folds push a model that knows nothing a little below chance.
    assert models.iloc[-1]["balanced_accuracy_low"] <= chance
    assert models.iloc[-1]["auc_low"] <= 0.5
    assert only(findings, "missing_mask").level == "PASS"

    columns, findings = label_leaking_columns(rows)
    assert {finding.level for finding in findings} == {"PASS"}
    assert (columns["auc_low"] <= 0.5).mean() > 0.9
    assert (columns["balanced_accuracy_low"] <= chance).mean() > 0.9

    nearest, findings = reidentification(rows)
    assert only(findings, "reidentification").level == "PASS"
    assert (nearest["low"].dropna() <= chance).all()
    assert (nearest["high"].dropna() >= chance).all()

    measured, findings = metadata_alone(rows, False)
    assert only(findings, "form_alone").level == "PASS"
    folds = measured[measured["measured"].str.startswith("5 folds")]
    # 16 values of learners that know nothing: at 95% about one interval may miss chance.
    assert ((folds["low"] <= chance) & (folds["high"] >= chance)).mean() > 0.8


def test_metadata_identify_patients_where_images_share_them(sample: Dataset) -> None:
    rows = AuditedRows.of(sample, split_dataset(sample))
    table, findings = metadata_alone(rows, False)
    assert only(findings, "form_alone").level == "WARN"
    images = table[(table["measured"] == IMAGES) & (table["learner"] == "1-nearest neighbour")]
    assert (images["patients_recognised_low"] > 0.1).all()
    nearest, findings = reidentification(rows)
    assert nearest["value"].iloc[0] == 0.0, "no patient is on two sides"
    assert nearest["value"].iloc[1] > 0.5
    assert only(findings, "reidentification").level == "WARN"


def test_nothing_is_said_of_persons_where_none_is_named(large_root: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(large_root / "metadata.csv")[["diagnostic", "age", "region"]]
    frame.assign(image=[f"{n}.png" for n in frame.index]).to_csv(tmp_path / "table.csv", index=False)
    fields = "[{name: age, kind: numeric}, {name: region, kind: categorical}]"
    (tmp_path / "dataset.yaml").write_text(f"label: diagnostic\nmetadata: {fields}\n")
    dataset = load_dataset("csv_table", tmp_path)
    rows = AuditedRows.of(dataset, split_dataset(dataset))
    table, findings = metadata_alone(rows, False)
    assert "patients_recognised" not in table
    nearest, more = reidentification(rows)
    assert nearest.empty
    assert {finding.level for finding in (*findings, *more)} == {"WARN"}


@pytest.fixture(scope="module")
def pad_rows(pad):
    return AuditedRows.of(pad, split_dataset(pad, "paper"))


def test_missingness_of_pad(pad, pad_rows):
    blocks, models, findings = missingness(pad_rows)
    first = blocks.iloc[0]
    assert first["rows"] == 804
    shares = dict(zip(pad_rows.classes, (61.2, 0.0, 0.0, 69.3, 0.0, 80.0), strict=True))
    assert {label: round(100 * first[label], 1) for label in pad_rows.classes} == shares
    assert first["malignant_missing"] == 0.0
    assert round(first["malignant_present"], 3) == 0.729
    assert "804 of 804 are benign" in findings[0].message
    assert findings[0].message.endswith("biopsed is False")
    # One bit, published: .300 and .714.
    assert models.iloc[0]["balanced_accuracy"] == pytest.approx(0.300, abs=0.01)
    assert models.iloc[0]["auc"] == pytest.approx(0.714, abs=0.015)
    assert "348 of 394 (88.3%) are malignant" in findings[1].message
    assert findings[-1].check == "missing_mask"
    assert findings[-1].level == "WARN"
    codes = {"grew": 402, "changed": 396, "background_father": 95, "background_mother": 84}
    assert (pad.table[list(codes)] == "UNK").sum().to_dict() == codes


def test_biopsed_is_the_only_label_leaking_column_of_pad(pad_rows):
    biopsed = pad_rows.others["biopsed"] == "True"
    share = biopsed.groupby(pad_rows.table["label"]).mean().mul(100).round(1).to_dict()
    assert share == {"ACK": 24.4, "BCC": 100.0, "MEL": 100.0, "NEV": 24.6, "SCC": 100.0, "SEK": 6.4}
    table, findings = label_leaking_columns(pad_rows)
    assert [finding.message.split(" ")[0] for finding in findings if finding.level != "PASS"] == ["biopsed"]
    first = table.iloc[0]
    assert first["column"] == "biopsed"
    assert first["balanced_accuracy"] == pytest.approx(0.323, abs=0.005)
    assert first["auc"] == pytest.approx(0.749, abs=0.01)
    assert not any(finding.level == "FAIL" for finding in findings)


def test_the_nearest_metadata_of_pad_are_often_the_patient_s(pad_rows):
    table, findings = reidentification(pad_rows)
    values = table["value"].tolist()
    assert values[2] == pytest.approx(0.674, abs=0.02)
    assert values[3] == pytest.approx(0.468, abs=0.02)
    assert [finding.level for finding in findings] == ["WARN", "WARN"]


# Published: test side from train, from train and val, folds of images, folds of patients.
LINEAR_OF_PAD = {
    (ALWAYS, LINEAR): (0.635, 0.654, 0.645, 0.623),
    (FLAGGED, LINEAR): (0.672, 0.694, 0.673, 0.658),
    (ALL, LINEAR): (0.681, 0.718, 0.703, 0.639),
    (ALL, NEIGHBOUR): (None, 0.720, 0.674, 0.468),
}
FORESTS_OF_PAD = {
    (ALWAYS, FOREST): (0.697, 0.726, 0.691, 0.598),
    (ALL, FOREST): (0.730, 0.798, 0.735, 0.568),
    (OTHERS, FOREST): (0.743, 0.802, 0.744, 0.600),
}


def compare(table, published):
    found = table.set_index(["features", "learner", "measured"])["balanced_accuracy"]
    for (features, learner), values in published.items():
        for way, value, tolerance in zip(
            (TRAIN, TRAIN_VAL, IMAGES, GROUPED), values, (0.02, 0.02, 0.03, 0.03), strict=True
        ):
            if value is not None:
                assert found[features, learner, way] == pytest.approx(value, abs=tolerance), (features, learner, way)


def test_metadata_of_pad_alone(pad_rows):
    table, findings = metadata_alone(pad_rows, False)
    compare(table, LINEAR_OF_PAD)
    assert [finding.level for finding in findings] == ["WARN"]


@pytest.mark.slow
def test_forests_on_the_metadata_of_pad(pad_rows):
    compare(metadata_alone(pad_rows, True)[0], FORESTS_OF_PAD)


def test_linear_models_on_the_metadata_of_isic(isic):
    rows = AuditedRows.of(isic, split_dataset(isic, "paper"))
    columns, test = feature_sets(rows)[ALL], rows.splits == "test"
    assert columns.shape[1] == 11
    fitted = clone(REGRESSION).fit(columns[rows.splits == "train"], rows.labels[rows.splits == "train"])
    bootstrap = Bootstrap(rows.groups[test], 1)
    preds = fitted.predict(columns[test])
    assert balanced_accuracy(rows.labels[test], preds, rows.classes, bootstrap)[0] == pytest.approx(0.323, abs=0.01)


@pytest.mark.slow
def test_forests_on_the_metadata_of_isic_lose_what_identifies_lesions(isic):
    rows = AuditedRows.of(isic, split_dataset(isic, "paper"))
    table = metadata_alone(rows, True)[0].set_index(["learner", "measured"])["balanced_accuracy"]
    assert table[FOREST, TRAIN] == pytest.approx(0.375, abs=0.02)
    assert table[FOREST, "5 folds of lesions"] == pytest.approx(0.294, abs=0.02)
    assert table[LINEAR, "5 folds of lesions"] == pytest.approx(0.350, abs=0.04)


def test_folds_of_patients_never_predict_a_patient_they_have_seen(pad_rows):
    class Recalls(BaseEstimator):
        """Knows the patients it was fitted on by the one feature."""

        def fit(self, features, labels):
            self.seen, self.classes_ = set(features[:, 0]), np.arange(6)
            return self

        def predict_proba(self, features):
            assert not self.seen & set(features[:, 0])
            return np.full((len(features), 6), 1 / 6)

    patients = np.unique(pad_rows.groups.astype(str), return_inverse=True)[1].astype(float)
    assert predict_in_folds(Recalls(), patients[:, None], pad_rows).sum() == pytest.approx(2298)
