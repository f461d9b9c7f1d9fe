"""The known leaks and shortcuts of the published data sets, counted from their published tables."""

import numpy as np
import pytest

from dualrefnet.analysis.audit import audit_dataset, audit_split, shared_ids
from dualrefnet.analysis.label_leakage import (
    ALL,
    ALWAYS,
    FLAGGED,
    FOREST,
    IMAGES,
    LINEAR,
    NEIGHBOUR,
    OTHERS,
    TRAIN,
    TRAIN_VAL,
    AuditedRows,
    feature_sets,
    form_alone,
    linear,
    missingness,
    predict_in_folds,
    proxies,
    recall_samples,
    reidentification,
)
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.protocols import split_dataset

GROUPED = "5 folds of patients"


@pytest.fixture(scope="module")
def pad(real_pad):
    return load_dataset("pad_ufes_20", real_pad)


@pytest.fixture(scope="module")
def pad_rows(pad):
    return AuditedRows.of(pad, split_dataset(pad, "paper"))


@pytest.fixture(scope="module")
def isic(real_isic):
    return load_dataset("isic_2019", real_isic)


def test_patients_and_lesions_of_the_paper_s_split_of_pad(pad):
    table, findings = shared_ids(pad, split_dataset(pad, "paper"))
    percent = table.set_index(["what", "class"])[["train", "train_or_val"]] * 100
    assert percent.loc[("patient", "all")].round(1).tolist() == [49.3, 55.4]
    assert percent.loc[("lesion", "all")].round(1).tolist() == [22.7, 29.2]
    classes = ["ACK", "BCC", "MEL", "NEV", "SCC", "SEK"]
    for what, column, expected in (
        ("patient", "train", [41, 56, 78, 42, 56, 46]),
        ("lesion", "train", [18, 25, 56, 15, 28, 26]),
        ("patient", "train_or_val", [47, 65, 89, 48, 59, 46]),
        ("lesion", "train_or_val", [21, 37, 89, 15, 34, 26]),
    ):
        # 42.5 and 47.5 (NEV) are printed as 43 and 48.
        assert percent.loc[what].loc[classes, column].tolist() == pytest.approx(expected, abs=0.51)
    assert [finding.level for finding in findings] == ["FAIL", "FAIL"]


def test_lesions_of_the_paper_s_split_of_isic(isic):
    table, findings = shared_ids(isic, split_dataset(isic, "paper"))
    assert [finding.level for finding in findings] == ["WARN", "FAIL"]
    shares = table[table["what"] == "lesion"].set_index("class")
    assert shares.loc["all", ["train", "train_or_val"]].astype(float).round(3).tolist() == [0.637, 0.661]
    expected = {
        "AK": 0.857,
        "MEL": 0.804,
        "BCC": 0.779,
        "SCC": 0.727,
        "DF": 0.723,
        "BKL": 0.669,
        "VASC": 0.667,
        "NV": 0.495,
    }
    assert shares["train"].drop("all").round(3).to_dict() == expected
    grouped = shared_ids(isic, split_dataset(isic))[1]
    assert [finding.level for finding in grouped] == ["WARN", "PASS"]


def test_the_gaps_of_pad(pad, pad_rows):
    blocks, models, findings = missingness(pad_rows, 200, 0)
    first = blocks.iloc[0]
    assert first["rows"] == 804
    assert {label: round(100 * first[label], 1) for label in pad_rows.classes} == {
        "ACK": 61.2,
        "BCC": 0.0,
        "MEL": 0.0,
        "NEV": 69.3,
        "SCC": 0.0,
        "SEK": 80.0,
    }
    assert first["malignant_missing"] == 0.0
    assert round(first["malignant_present"], 3) == 0.729
    said = findings[0].message
    assert said.startswith("13 fields (")
    assert "804 of 804 are benign" in said
    assert said.endswith("in all of them biopsed is False")
    # One bit, published: .300 and .714.
    assert models.iloc[0]["balanced_accuracy"] == pytest.approx(0.300, abs=0.01)
    assert models.iloc[0]["auc"] == pytest.approx(0.714, abs=0.015)
    assert findings[1].message.startswith("2 fields (grew, changed) hold UNK together in 394 of 2,298 rows")
    assert "348 of 394 (88.3%) are malignant" in findings[1].message
    assert findings[-1].check == "missing_mask"
    assert findings[-1].level == "WARN"
    counts = {
        name: int((pad.table[name] == "UNK").sum())
        for name in ("grew", "changed", "background_father", "background_mother")
    }
    assert counts == {"grew": 402, "changed": 396, "background_father": 95, "background_mother": 84}


def test_biopsed_is_the_only_proxy_of_pad(pad_rows):
    biopsed = pad_rows.others["biopsed"] == "True"
    share = {
        label: round(100 * float(biopsed[pad_rows.labels == index].mean()), 1)
        for index, label in enumerate(pad_rows.classes)
    }
    assert share == {"ACK": 24.4, "BCC": 100.0, "MEL": 100.0, "NEV": 24.6, "SCC": 100.0, "SEK": 6.4}
    table, findings = proxies(pad_rows, 100, 0)
    assert [finding.message.split(" ")[0] for finding in findings if finding.level != "PASS"] == ["biopsed"]
    first = table.iloc[0]
    assert first["column"] == "biopsed"
    assert first["balanced_accuracy"] == pytest.approx(0.323, abs=0.005)
    assert first["auc"] == pytest.approx(0.749, abs=0.01)
    assert not any(finding.level == "FAIL" for finding in findings)


def test_the_nearest_form_of_pad_is_often_the_patient_s(pad_rows):
    table, findings = reidentification(pad_rows, 200, 0)
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


def test_the_form_of_pad_alone(pad_rows):
    table, findings = form_alone(pad_rows, False, 100, 0)
    compare(table, LINEAR_OF_PAD)
    assert [finding.level for finding in findings] == ["WARN"]


@pytest.mark.slow
def test_the_forests_on_the_form_of_pad(pad_rows):
    compare(form_alone(pad_rows, True, 100, 0)[0], FORESTS_OF_PAD)


def test_linear_models_on_the_form_of_isic(isic):
    rows = AuditedRows.of(isic, split_dataset(isic, "paper"))
    columns = feature_sets(rows)[ALL]
    assert columns.shape[1] == 11
    fitted = linear().fit(columns[rows.sides == "train"], rows.labels[rows.sides == "train"])
    value, _ = recall_samples(
        rows.labels[rows.test], fitted.predict(columns[rows.test]), rows.groups[rows.test], 8, 1, 0
    )
    assert value == pytest.approx(0.323, abs=0.01)


@pytest.mark.slow
def test_the_forest_on_the_form_of_isic_loses_what_lesions_told(isic):
    rows = AuditedRows.of(isic, split_dataset(isic, "paper"))
    table = form_alone(rows, True, 50, 0)[0].set_index(["learner", "measured"])["balanced_accuracy"]
    assert table[FOREST, TRAIN] == pytest.approx(0.375, abs=0.02)
    assert table[FOREST, "5 folds of lesions"] == pytest.approx(0.294, abs=0.02)
    assert table[LINEAR, "5 folds of lesions"] == pytest.approx(0.350, abs=0.04)


def test_grouped_splits_of_the_tables_have_no_failure(pad):
    for fold in (0, 2):
        audit = audit_split(pad, split_dataset(pad, "grouped-cv", fold), forests=False, samples=20)
        assert not audit.failed


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["paper", "grouped"])
def test_copies_among_the_pictures_of_pad(real_pad, protocol):
    audit = audit_dataset("pad_ufes_20", real_pad, protocol=protocol, forests=False)
    assert audit.failed == (protocol == "paper")
    pairs = audit.tables["near_duplicate_pairs"]
    assert ("PAT_419_2767_323", "PAT_419_833_148") in set(zip(pairs["first"], pairs["second"], strict=True))
    assert not (pairs["other"] == "patient").any()
    (finding,) = [finding for finding in audit.findings if finding.check == "identical_other_label"]
    assert finding.examples == ("PAT_419_2767_323 (ACK) = PAT_419_833_148 (SCC)",)


@pytest.mark.slow
def test_copies_among_the_pictures_of_isic_don_t_fail_a_grouped_split(real_isic):
    audit = audit_dataset("isic_2019", real_isic, forests=False)
    assert not audit.failed
    pairs = audit.tables["near_duplicate_pairs"]
    # One lesion published twice, its colours changed.
    assert ("ISIC_0000519_downsampled", "ISIC_0011295") in set(zip(pairs["first"], pairs["second"], strict=True))
    assert np.isin(pairs["other"], ["lesion", "unnamed", ""]).all()


def test_folds_of_patients_never_predict_a_patient_they_have_seen(pad_rows):
    class Recalls:
        """Knows the patients it was fitted on by the one feature."""

        def fit(self, features, labels):
            self.seen, self.classes_ = set(features[:, 0]), np.arange(6)
            return self

        def predict_proba(self, features):
            assert not self.seen & set(features[:, 0])
            return np.full((len(features), 6), 1 / 6)

    patients = np.unique(pad_rows.groups.astype(str), return_inverse=True)[1].astype(float)
    assert predict_in_folds(Recalls, patients[:, None], pad_rows.labels, pad_rows.groups, 6, 0).sum() == pytest.approx(
        2298
    )
