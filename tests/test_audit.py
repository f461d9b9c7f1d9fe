import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from dualrefnet.analysis.audit import Audit, audit_dataset, audit_split, shared_ids
from dualrefnet.analysis.duplicates import fingerprint_files
from dualrefnet.cli import app, data  # noqa: F401 (the module registers the commands)
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.check import Finding
from dualrefnet.data.protocols import split_dataset
from dualrefnet.data.schema import Dataset
from dualrefnet.recipe import load_recipe
from dualrefnet.training.preflight import check_start


def only(findings: list[Finding], check: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.check == check]
    return finding


@pytest.fixture(scope="module")
def sample(large_root: Path) -> Dataset:
    return load_dataset("sample", large_root)


@pytest.fixture
def copied(sample_root: Path, tmp_path: Path) -> Path:
    """A copy of the data set whose images may be changed."""
    return shutil.copytree(sample_root, tmp_path / "data")


@pytest.fixture(scope="module")
def audited(sample_root: Path) -> Audit:
    return audit_dataset("sample", sample_root, forests=False)


def test_a_grouped_split_of_the_synthetic_sample_has_no_failure(sample: Dataset, audited: Audit) -> None:
    assert audited.verdict == "WARN", "the sample has the shortcuts of PAD-UFES-20"
    expected = {"near_duplicates", "identical_other_label", "proxy", "form_alone"}
    assert {finding.check for finding in audited.findings} >= expected
    assert not audit_split(sample, split_dataset(sample, "grouped-cv", 1), forests=False, samples=20).failed


def test_a_patient_that_crosses_the_split_fails_and_its_image_is_named(sample: Dataset) -> None:
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


def test_a_near_duplicate_of_another_patient_in_another_split_fails(copied: Path) -> None:
    dataset = load_dataset("sample", copied)
    split = split_dataset(dataset)
    train, test = (split.loc[split["split"] == side, "image_id"].iloc[0] for side in ("train", "test"))
    picture = Image.open(copied / "images" / f"{train}.png")
    small = picture.resize((round(picture.width * 0.7), round(picture.height * 0.7)))
    small.save(copied / "images" / f"{test}.png", "JPEG", quality=60)
    audit = audit_split(dataset, split, fingerprint_files(dataset.with_image), forests=False, samples=20)
    finding = only(audit.findings, "near_duplicates")
    assert (finding.level, finding.count) == ("FAIL", 1)
    pairs = audit.tables["near_duplicate_pairs"]
    assert set(pairs.iloc[0][["first", "second"]]) == {train, test}
    assert pairs["other"].tolist() == ["patient"]
    assert only(audit.findings, "near_duplicates_other").level == "WARN"


def test_an_audit_is_strict_json(audited: Audit) -> None:
    copy = json.loads(json.dumps(audited.to_json(), allow_nan=False))
    assert copy == audited.to_json()
    assert copy["verdict"] == "WARN"
    assert copy["tables"]["reidentification"][0]["low"] is None
    assert sum(copy["images"].values()) == 120


def test_the_command_says_the_verdict_and_its_exit_status(sample_root: Path, tmp_path: Path) -> None:
    quick, written = ["--without-images", "--without-forests"], tmp_path / "a.json"
    done = CliRunner().invoke(app, ["audit", "sample", "--root", str(sample_root), *quick, "--out", str(written)])
    assert done.exit_code == 0, done.output
    assert "PASS  patients_on_two_sides" in done.output
    assert "protocol grouped, patient-disjoint split: WARN" in done.output
    assert json.loads(written.read_text())["failed"] is False
    frame = pd.DataFrame({"label": ["a", "b"] * 50, "answer": ["x", "y"] * 50, "patient": range(100)})
    frame.assign(image=[f"{n}.png" for n in range(100)]).to_csv(tmp_path / "table.csv", index=False)
    metadata = "metadata: [{name: answer, kind: categorical}]"
    (tmp_path / "dataset.yaml").write_text(f"patient: patient\n{metadata}\n")
    done = CliRunner().invoke(app, ["audit", "csv_table", "--root", str(tmp_path), *quick])
    assert done.exit_code == 1, done.output
    assert "FAIL  proxy: answer" in done.output


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


def test_a_training_says_what_leaks_before_it_starts_and_the_shortcut_first(real_pad, tmp_path, capsys):
    changes = {
        "data.root": str(real_pad),
        "data.protocol": "paper",
        "metadata.tier": "M3",
        "metadata.imputation": "neural",
        "modality_dropout": {},
    }
    check_start(load_recipe("pad_ufes_20", changes), tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 3
    assert "of the rows with missing fields are malignant" in lines[0]
    assert "49.3%" in lines[1]


def test_lesions_of_the_paper_s_split_of_isic(isic):
    table, findings = shared_ids(isic, split_dataset(isic, "paper"))
    assert [finding.level for finding in findings] == ["WARN", "FAIL"]
    shares = table[table["what"] == "lesion"].set_index("class")
    assert shares.loc["all", ["train", "train_or_val"]].astype(float).round(3).tolist() == [0.637, 0.661]
    classes = ("AK", "MEL", "BCC", "SCC", "DF", "BKL", "VASC", "NV")
    expected = dict(zip(classes, (0.857, 0.804, 0.779, 0.727, 0.723, 0.669, 0.667, 0.495), strict=True))
    assert shares["train"].drop("all").round(3).to_dict() == expected
    grouped = shared_ids(isic, split_dataset(isic))[1]
    assert [finding.level for finding in grouped] == ["WARN", "PASS"]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["paper", "grouped"])
def test_near_duplicates_of_pad(real_pad, protocol):
    audit = audit_dataset("pad_ufes_20", real_pad, protocol=protocol, forests=False)
    assert audit.failed == (protocol == "paper")
    pairs = audit.tables["near_duplicate_pairs"]
    assert ("PAT_419_2767_323", "PAT_419_833_148") in set(zip(pairs["first"], pairs["second"], strict=True))
    assert not (pairs["other"] == "patient").any()
    (finding,) = [finding for finding in audit.findings if finding.check == "identical_other_label"]
    assert finding.examples == ("PAT_419_2767_323 (ACK) = PAT_419_833_148 (SCC)",)


@pytest.mark.slow
def test_near_duplicates_of_isic_don_t_fail_a_grouped_split(real_isic):
    audit = audit_dataset("isic_2019", real_isic, forests=False)
    assert not audit.failed
    pairs = audit.tables["near_duplicate_pairs"]
    # One lesion published twice, its colours changed.
    assert ("ISIC_0000519_downsampled", "ISIC_0011295") in set(zip(pairs["first"], pairs["second"], strict=True))
    assert np.isin(pairs["other"], ["lesion", "unnamed", ""]).all()
