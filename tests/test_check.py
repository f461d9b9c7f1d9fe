import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dualrefnet.data import isic_2019, pad_ufes_20
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.check import MAX_EXAMPLES, OFFICIAL_CLASS_COUNTS, check_dataset


def write_image(path, seed, side=80):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)


def pad_rows(count):
    row = {field.name: "" for field in pad_ufes_20.FIELDS} | {
        "age": "60",
        "itch": "True",
        "grew": "UNK",
        "gender": "MALE",
    }
    return [
        row
        | {
            "patient_id": f"PAT_{n}",
            "lesion_id": str(n),
            "img_id": f"PAT_{n}_{n}_{n}.png",
            "diagnostic": pad_ufes_20.CLASSES[n % 6],
        }
        for n in range(count)
    ]


def write_pad(root, rows, without_image=()):
    for number, row in enumerate(rows):
        if number not in without_image:
            write_image(root / "images" / "imgs_part_1" / row["img_id"], number)
    pd.DataFrame(rows).to_csv(root / "metadata.csv", index=False)


def findings(report, check):
    return [finding for finding in report.findings if finding.check == check]


def only(report, check):
    (finding,) = findings(report, check)
    return finding


def test_a_clean_table_passes_but_for_its_missing_patients(tmp_path):
    names = [f"{n}.png" for n in range(12)]
    for number, name in enumerate(names):
        write_image(tmp_path / "photos" / name, number)
    pd.DataFrame({"file": names, "dx": ["a", "b"] * 6, "site": ["arm"] * 12}).to_csv(
        tmp_path / "table.csv", index=False
    )
    (tmp_path / "dataset.yaml").write_text(
        "images: photos\nimage: file\nlabel: dx\nmetadata: [{name: site, kind: categorical}]\n"
    )
    calls = []
    report = check_dataset("csv_table", tmp_path, workers=3, progress=lambda done, total: calls.append((done, total)))
    assert [finding.check for finding in report.findings if finding.level != "PASS"] == ["patients"]
    assert not report.failed
    assert calls == [(done, 12) for done in range(1, 13)]


def test_rows_and_classes_are_compared_with_the_publication(tmp_path):
    write_pad(tmp_path, pad_rows(6))
    report = check_dataset("pad_ufes_20", tmp_path)
    assert only(report, "rows").level == "FAIL"
    assert "2,298" in only(report, "rows").message
    assert only(report, "classes").level == "FAIL"
    assert "MEL (52 published)" in only(report, "classes").examples


@pytest.mark.parametrize("adapter", [pad_ufes_20, isic_2019])
def test_the_official_class_counts_add_up_to_the_official_rows(adapter):
    counts = OFFICIAL_CLASS_COUNTS[adapter.SCHEMA.name]
    assert set(counts) == set(adapter.CLASSES)
    assert sum(counts.values()) == adapter.SCHEMA.official_rows


def test_rows_without_an_image_and_images_without_a_row_are_counted(tmp_path):
    write_pad(tmp_path, pad_rows(20), without_image=range(4, 20))
    write_image(tmp_path / "images" / "imgs_part_2" / "stranger.png", 99)
    report = check_dataset("pad_ufes_20", tmp_path)
    absent = only(report, "rows_without_image")
    assert (absent.level, absent.count, len(absent.examples)) == ("WARN", 16, MAX_EXAMPLES)
    assert absent.examples[0] == "PAT_4_4_4"
    assert only(report, "images_without_row").examples == ("imgs_part_2/stranger.png",)


def test_broken_and_tiny_images_are_named(tmp_path):
    write_pad(tmp_path, pad_rows(6))
    folder = tmp_path / "images" / "imgs_part_1"
    (folder / "PAT_2_2_2.png").write_bytes((folder / "PAT_2_2_2.png").read_bytes()[:900])
    (folder / "PAT_3_3_3.png").write_text("not an image")
    write_image(folder / "PAT_4_4_4.png", 4, side=63)
    write_image(folder / "PAT_5_5_5.png", 5, side=64)
    report = check_dataset("pad_ufes_20", tmp_path)
    assert only(report, "undecodable").level == "FAIL"
    assert only(report, "undecodable").examples == ("PAT_2_2_2", "PAT_3_3_3")
    assert only(report, "tiny").examples == ("PAT_4_4_4",)


def test_identical_images_are_told_apart_by_their_labels(tmp_path):
    write_pad(tmp_path, pad_rows(12))
    folder = tmp_path / "images" / "imgs_part_1"
    for source, copies in ((0, (1, 2)), (3, (9,))):
        for copy in copies:
            (folder / f"PAT_{copy}_{copy}_{copy}.png").write_bytes(
                (folder / f"PAT_{source}_{source}_{source}.png").read_bytes()
            )
    report = check_dataset("pad_ufes_20", tmp_path)
    unlike, alike = only(report, "identical_other_label"), only(report, "identical_same_label")
    assert (unlike.level, unlike.examples) == ("WARN", ("PAT_0_0_0 (ACK) = PAT_1_1_1 (BCC) = PAT_2_2_2 (MEL)",))
    assert (alike.level, alike.examples) == ("WARN", ("PAT_3_3_3 = PAT_9_9_9",))


def test_lesion_ids_of_several_patients_are_found_in_the_published_ids(tmp_path):
    rows = pad_rows(6)
    rows[1]["lesion_id"] = "0"
    rows[3]["patient_id"], rows[3]["lesion_id"] = "PAT_2", "2"
    write_pad(tmp_path, rows)
    shared = only(check_dataset("pad_ufes_20", tmp_path), "shared_lesions")
    assert (shared.level, shared.count, shared.examples) == ("WARN", 1, ("0",))


def test_unknown_values_name_the_field_but_never_a_number(tmp_path):
    rows = pad_rows(6)
    rows[0]["region"], rows[1]["region"] = "ELBOW", "1987-02-03"
    rows[2]["itch"] = "perhaps"
    rows[3]["background_father"] = "BRASIL"
    rows[4]["gender"] = "2"
    write_pad(tmp_path, rows)
    report = check_dataset("pad_ufes_20", tmp_path)
    unknown = {finding.message.split(":")[0]: finding for finding in findings(report, "unknown_codes")}
    assert set(unknown) == {"region", "itch", "gender"}
    region = unknown["region"]
    assert (region.count, region.examples) == (2, ("PAT_0_0_0", "PAT_1_1_1"))
    assert "ELBOW" in region.message
    assert "1987" not in region.message
    assert "perhaps" not in unknown["itch"].message
    assert unknown["gender"].examples == ("PAT_4_4_4",)
    alias = only(report, "aliases")
    assert alias.count == 1
    assert "BRASIL means BRAZIL" in alias.message
    assert "BRASIL" not in "".join(finding.message for finding in findings(report, "unknown_codes"))


def test_missing_cells_and_codes_are_counted_apart(tmp_path):
    write_pad(tmp_path, pad_rows(6))
    missing = only(check_dataset("pad_ufes_20", tmp_path), "missing_metadata")
    assert missing.level == "PASS"
    assert "smoke 6," in missing.message
    assert "grew 6 UNK" in missing.message
    assert "itch" not in missing.message
    # 21 fields of 6 rows, without age, itch and gender.
    assert missing.count == 6 * 18


def test_a_table_without_rows_for_a_class_fails(tmp_path):
    write_image(tmp_path / "a.png", 0)
    pd.DataFrame({"image": ["a.png"], "label": ["a"], "patient": ["p"]}).to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "dataset.yaml").write_text("patient: patient\nclasses: [a, b]\n")
    report = check_dataset("csv_table", tmp_path)
    assert (only(report, "classes").level, only(report, "classes").examples) == ("FAIL", ("b",))
    assert only(report, "patients").level == "PASS"


def test_files_of_a_table_s_folder_that_no_row_names_are_found(tmp_path):
    for name in ("p1/a.png", "p2/a.png", "p2/b.png"):
        write_image(tmp_path / name, len(name))
    pd.DataFrame({"image": ["p1/a.png", "p2/a.png"], "label": ["x", "y"]}).to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "dataset.yaml").write_text("{}\n")
    report = check_dataset("csv_table", tmp_path)
    assert only(report, "images_without_row").examples == ("p2/b.png",)
    assert only(report, "rows_without_image").level == "PASS"


def real_data(name):
    base = os.environ.get("DUALREFNET_DATA")
    if not base or not (Path(base) / name).is_dir():
        pytest.skip(f"DUALREFNET_DATA holds no {name}")
    return Path(base) / name


def test_the_known_defects_of_pad_ufes_20_are_found():
    report = check_dataset("pad_ufes_20", real_data("pad_ufes_20"))
    assert not report.failed
    assert only(report, "shared_lesions").count == 250
    assert "PAT_419_2767_323 (ACK) = PAT_419_833_148 (SCC)" in only(report, "identical_other_label").examples
    assert [finding.message for finding in findings(report, "aliases")] == [
        "background_father: BRASIL means BRAZIL; rows: 3"
    ]
    assert only(report, "rows").level == only(report, "classes").level == "PASS"


def test_the_classes_of_isic_2019_are_those_of_the_publication():
    table = load_dataset("isic_2019", real_data("isic_2019")).table
    assert table["label"].value_counts().to_dict() == OFFICIAL_CLASS_COUNTS["isic_2019"]
