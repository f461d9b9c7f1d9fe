import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from dualrefnet.analysis.audit import Audit, audit_dataset, audit_split
from dualrefnet.analysis.duplicates import fingerprint_files
from dualrefnet.analysis.label_leakage import IMAGES, AuditedRows, form_alone, missingness, proxies, reidentification
from dualrefnet.cli import app, data  # noqa: F401 (the module registers the commands)
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.check import Finding
from dualrefnet.data.protocols import split_dataset
from dualrefnet.data.schema import Dataset
from dualrefnet.data.synthetic import make_synthetic


def only(findings: list[Finding], check: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.check == check]
    return finding


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A drawn data set large enough for statements about its form; its pictures aren't looked at."""
    return load_dataset("sample", make_synthetic(tmp_path_factory.mktemp("audited") / "data", images=420, side=64))


@pytest.fixture(scope="module")
def audited(sample_root: Path) -> Audit:
    return audit_dataset("sample", sample_root, forests=False)


def write_table(root: Path, frame: pd.DataFrame, fields: list[str], malignant: str = "[]") -> Dataset:
    frame.assign(image=[f"{n}.png" for n in range(len(frame))]).to_csv(root / "table.csv", index=False)
    metadata = ", ".join(f"{{name: {name}, kind: categorical}}" for name in fields)
    (root / "dataset.yaml").write_text(f"patient: patient\nmalignant: {malignant}\nmetadata: [{metadata}]\n")
    return load_dataset("csv_table", root)


def test_a_grouped_split_of_the_drawn_sample_has_no_failure(sample: Dataset, audited: Audit) -> None:
    assert not audited.failed
    assert audited.verdict == "WARN", "the sample has the shortcuts of PAD-UFES-20"
    assert {finding.check for finding in audited.findings} >= {
        "near_duplicates",
        "identical_other_label",
        "proxy",
        "form_alone",
    }
    for fold in (1, 3):
        assert not audit_split(sample, split_dataset(sample, "grouped-cv", fold), forests=False, samples=50).failed


def test_a_patient_on_two_sides_fails_and_its_image_is_named(sample: Dataset) -> None:
    split = split_dataset(sample)
    test = split[split["split"] == "test"]
    patient = test["patient_id"].value_counts().index[0]
    mine = test.index[test["patient_id"] == patient]
    split.loc[mine[0], "split"] = "train"
    audit = audit_split(sample, split, forests=False, samples=20)
    finding = only(audit.findings, "patients_on_two_sides")
    assert (finding.level, finding.count) == ("FAIL", len(mine) - 1)
    assert set(finding.examples) == set(split.loc[mine[1:], "image_id"])
    shared = audit.tables["shared"].query("what == 'patient' and `class` == 'all'").iloc[0]
    assert shared["train"] == pytest.approx((len(mine) - 1) / (len(test) - 1))
    assert audit.failed


def test_a_copy_of_a_picture_under_another_patient_on_another_side_fails(sample_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(sample_root, root)
    dataset = load_dataset("sample", root)
    split = split_dataset(dataset)
    train, test = (split.loc[split["split"] == side, "image_id"].iloc[0] for side in ("train", "test"))
    picture = Image.open(root / "images" / f"{train}.png")
    small = picture.resize((round(picture.width * 0.7), round(picture.height * 0.7)))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=60)
    (root / "images" / f"{test}.png").write_bytes(content.getvalue())
    audit = audit_split(dataset, split, fingerprint_files(dataset.with_image), forests=False, samples=20)
    finding = only(audit.findings, "near_duplicates")
    assert (finding.level, finding.count) == ("FAIL", 1)
    pairs = audit.tables["near_duplicate_pairs"]
    assert set(pairs.iloc[0][["first", "second"]]) == {train, test}
    assert pairs["other"].tolist() == ["patient"]
    assert only(audit.findings, "near_duplicates_other").level == "WARN"


def test_equal_bytes_under_two_labels_are_told(sample_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(sample_root, root)
    table = load_dataset("sample", root).table
    one, two = (table.loc[table["label"] == label, "image_id"].iloc[0] for label in ("MEL", "NEV"))
    shutil.copy(root / "images" / f"{one}.png", root / "images" / f"{two}.png")
    finding = only(audit_dataset("sample", root, forests=False).findings, "identical_other_label")
    assert finding.level == "WARN"
    assert set(finding.examples[0].split(" = ")) == {f"{one} (MEL)", f"{two} (NEV)"}


def test_fields_missing_together_are_one_block_whose_classes_are_counted(tmp_path: Path) -> None:
    count = 400
    frame = pd.DataFrame({"label": ["ill", "well"] * (count // 2), "patient": np.arange(count) // 2})
    # Row 1, 5, 9, ...: half of the healthy miss two fields, and were never operated on.
    gap = np.arange(count) % 4 == 1
    frame["a"], frame["b"] = np.where(gap, None, "x"), np.where(gap, None, "y")
    frame["c"] = np.where(np.arange(count) % 10 == 0, None, "z")
    frame["operated"] = np.where(gap, "no", np.where(np.arange(count) % 3, "yes", "no"))
    dataset = write_table(tmp_path, frame, ["a", "b", "c"], "[ill]")
    blocks, models, findings = missingness(AuditedRows.of(dataset, split_dataset(dataset)), 100, 0)
    assert blocks["block"].tolist() == ["a, b empty", "c empty"]
    first = blocks.iloc[0]
    assert (first["rows"], first["ill"], first["well"]) == (100, 0.0, 0.5)
    assert (first["malignant_missing"], first["malignant_present"]) == (0.0, pytest.approx(200 / 300))
    # Known alone: all ill and half of the healthy have the fields.
    assert models.iloc[0]["balanced_accuracy"] == pytest.approx(0.75)
    assert models.iloc[0]["auc"] == pytest.approx(0.75, abs=0.015)
    block = next(finding for finding in findings if finding.check == "missing_block")
    assert "2 fields (a, b) are empty together in 100 of 400 rows (25.0%); 100 of 100 are benign" in block.message
    assert block.message.endswith("in all of them operated is no")
    assert block.level == "WARN"


def test_gaps_that_are_the_answer_fail(tmp_path: Path) -> None:
    frame = pd.DataFrame({"label": ["ill", "well"] * 100, "patient": range(200)})
    frame["thickness"] = np.where(frame["label"] == "ill", "thin", None)
    dataset = write_table(tmp_path, frame, ["thickness"], "[ill]")
    findings = missingness(AuditedRows.of(dataset, split_dataset(dataset)), 50, 0)[2]
    assert only(findings, "missing_mask").level == "FAIL"


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("classes", [2, 6])
def test_a_column_derived_from_the_label_fails_as_a_field_and_warns_beside_the_form(
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
        table, findings = proxies(AuditedRows.of(dataset, split_dataset(dataset)), 50, 0)
        told = {finding.message.split()[0]: finding.level for finding in findings if finding.level != "PASS"}
        assert told == {"stage": level}
        assert table.iloc[0]["column"] == "stage"
        assert table.set_index("column")["feature"].to_dict() == {"stage": level == "FAIL", "site": True}


def test_biopsed_is_named_unprompted_and_would_fail_as_a_field_under_another_name(
    sample: Dataset, tmp_path: Path
) -> None:
    findings = proxies(AuditedRows.of(sample, split_dataset(sample)), 50, 0)[1]
    warned = [finding for finding in findings if finding.level != "PASS"]
    assert [finding.message.split(" ")[0] for finding in warned] == ["biopsed"]
    assert "it isn't used as a feature: keep it so" in warned[0].message
    assert "rows with the value False none is malignant" in warned[0].message
    frame = sample.table[["label"]].assign(patient=sample.table["patient_id"], excised=sample.other_columns["biopsed"])
    dataset = write_table(tmp_path, frame, ["excised"], "[BCC, MEL, SCC]")
    assert only(proxies(AuditedRows.of(dataset, split_dataset(dataset)), 50, 0)[1], "proxy").level == "FAIL"


def test_shuffled_labels_leave_nothing_to_be_known(sample: Dataset) -> None:
    table = sample.table.assign(label=np.random.default_rng(1).permutation(sample.table["label"]))
    shuffled = dataclasses.replace(sample, table=table)
    rows = AuditedRows.of(shuffled, split_dataset(sample))
    chance = 1 / 6

    models, findings = missingness(rows, 200, 0)[1:]
    # Only upwards: folds push a model that knows nothing a little below chance.
    assert models.iloc[-1]["balanced_accuracy_low"] <= chance
    assert models.iloc[-1]["auc_low"] <= 0.5
    assert only(findings, "missing_mask").level == "PASS"

    columns, findings = proxies(rows, 200, 0)
    assert {finding.level for finding in findings} == {"PASS"}
    assert (columns["auc_low"] <= 0.5).mean() > 0.9
    assert (columns["balanced_accuracy_low"] <= chance).mean() > 0.9

    nearest, findings = reidentification(rows, 200, 0)
    assert only(findings, "reidentification").level == "PASS"
    assert (nearest["low"].dropna() <= chance).all()
    assert (nearest["high"].dropna() >= chance).all()

    measured, findings = form_alone(rows, False, 200, 0)
    assert only(findings, "form_alone").level == "PASS"
    folds = measured[measured["measured"].str.startswith("5 folds")]
    # 16 values of learners that know nothing: at 95% about one interval may miss chance.
    assert ((folds["low"] <= chance) & (folds["high"] >= chance)).mean() > 0.8


def test_the_form_recognises_patients_where_photographs_share_it(sample: Dataset) -> None:
    rows = AuditedRows.of(sample, split_dataset(sample))
    table, findings = form_alone(rows, False, 100, 0)
    assert only(findings, "form_alone").level == "WARN"
    images = table[(table["measured"] == IMAGES) & (table["learner"] == "1-nearest neighbour")]
    assert (images["patients_recognised_low"] > 0.1).all()
    nearest, findings = reidentification(rows, 100, 0)
    assert nearest["value"].iloc[0] == 0.0, "no patient is on two sides"
    assert nearest["value"].iloc[1] > 0.5
    assert only(findings, "reidentification").level == "WARN"


def test_only_the_rows_of_the_split_are_looked_at(sample: Dataset) -> None:
    split = split_dataset(sample).sample(frac=0.5, random_state=0).reset_index(drop=True)
    rows = AuditedRows.of(sample, split)
    assert rows.table["image_id"].tolist() == split["image_id"].tolist()
    expected = dict(zip(sample.table["image_id"], sample.other_columns["biopsed"], strict=True))
    assert rows.others["biopsed"].tolist() == [expected[image_id] for image_id in split["image_id"]]
    assert [rows.classes[index] for index in rows.labels] == split["label"].tolist()


def test_an_audit_is_strict_json(audited: Audit) -> None:
    copy = json.loads(json.dumps(audited.to_json(), allow_nan=False))
    assert copy == audited.to_json()
    assert copy["verdict"] == "WARN"
    assert copy["tables"]["reidentification"][0]["low"] is None
    assert sum(copy["images"].values()) == 120


def test_a_table_without_form_patients_and_images_is_audited_too(tmp_path: Path) -> None:
    frame = pd.DataFrame({"label": ["a", "b"] * 20})
    frame.assign(image=[f"{n}.png" for n in range(40)]).to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "dataset.yaml").write_text("{}\n")
    audit = audit_dataset("csv_table", tmp_path)
    assert not audit.failed
    assert only(audit.findings, "patients_on_two_sides").level == "WARN"
    assert only(audit.findings, "images_compared").level == "WARN"
    assert only(audit.findings, "form_alone").message == "there is no metadata"
    json.dumps(audit.to_json(), allow_nan=False)


def test_the_command_says_the_verdict_and_its_exit_status(sample_root: Path, tmp_path: Path) -> None:
    arguments = [
        "audit",
        "sample",
        "--root",
        str(sample_root),
        "--without-images",
        "--without-forests",
        "--json",
        str(tmp_path / "a.json"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "PASS  patients_on_two_sides" in done.output
    assert "protocol grouped: WARN" in done.output
    assert json.loads((tmp_path / "a.json").read_text())["failed"] is False
    frame = pd.DataFrame({"label": ["a", "b"] * 50, "answer": ["x", "y"] * 50, "patient": range(100)})
    write_table(tmp_path, frame, ["answer"])
    done = CliRunner().invoke(
        app, ["audit", "csv_table", "--root", str(tmp_path), "--without-images", "--without-forests"]
    )
    assert done.exit_code == 1, done.output
    assert "FAIL  proxy: answer is a metadata field and nearly the answer" in done.output
