import numpy as np
import pandas as pd
from PIL import Image

from dualrefnet.data import pad_ufes_20
from dualrefnet.data.check import MAX_EXAMPLES, check_dataset


def write_image(path, seed, side=80):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)


def pad_rows(count):
    blank = dict.fromkeys((field.name for field in pad_ufes_20.FIELDS), "")
    values = {"age": "60", "itch": "True", "grew": "UNK", "gender": "MALE"}
    return [
        {**blank, **values, "patient_id": f"PAT_{n}", "lesion_id": str(n), "img_id": f"PAT_{n}_{n}_{n}.png"}
        | {"diagnostic": pad_ufes_20.CLASSES[n % 6]}
        for n in range(count)
    ]


def write_pad(root, rows, without_image=()):
    for number, row in enumerate(rows):
        if number not in without_image:
            write_image(root / "images" / "imgs_part_1" / row["img_id"], number)
    pd.DataFrame(rows).to_csv(root / "metadata.csv", index=False)


def write_own(root, names, description="", **columns):
    pd.DataFrame({"image": names, "label": ["a", "b"] * (len(names) // 2), **columns}).to_csv(
        root / "table.csv", index=False
    )
    (root / "dataset.yaml").write_text(description or "{}\n")


def findings(report, check):
    return [finding for finding in report.findings if finding.check == check]


def only(report, check):
    (finding,) = findings(report, check)
    return finding


def test_a_clean_table_passes_but_for_its_missing_patients(tmp_path):
    names = [f"{n}.png" for n in range(12)]
    for number, name in enumerate(names):
        write_image(tmp_path / "photos" / name, number)
    fields = "images: photos\nmetadata: [{name: site, kind: categorical}]\n"
    write_own(tmp_path, names, fields, site=["arm"] * 12)
    report = check_dataset("csv_table", tmp_path, workers=3)
    assert [finding.check for finding in report.findings if finding.level != "PASS"] == ["patients"]
    assert not report.failed


def test_a_table_none_of_whose_images_is_there_fails_and_says_where_they_were_looked_for(tmp_path):
    write_own(tmp_path, ["x1", "x2"], "images: photos\n")
    report = check_dataset("csv_table", tmp_path)
    assert report.failed
    assert (only(report, "rows_without_image").level, only(report, "rows_without_image").count) == ("FAIL", 2)
    assert str(tmp_path / "photos" / "x1.jpg") in only(report, "rows_without_image").message


def test_labels_that_are_spelt_in_several_ways_are_said(tmp_path):
    write_image(tmp_path / "0.png", 0)
    write_own(tmp_path, [f"{n}.png" for n in range(4)], label=["a", "b ", "A", "b"])
    report = check_dataset("csv_table", tmp_path)
    assert only(report, "labels").level == "WARN"
    assert only(report, "classes").message.endswith("A 2, b 2")


def test_rows_and_classes_are_compared_with_the_publication(tmp_path):
    write_pad(tmp_path, pad_rows(6))
    report = check_dataset("pad_ufes_20", tmp_path)
    assert only(report, "rows").level == only(report, "classes").level == "FAIL"
    assert "2,298" in only(report, "rows").message
    assert "MEL (52 published)" in only(report, "classes").examples


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
    assert (only(report, "undecodable").level, only(report, "undecodable").count) == ("FAIL", 2)
    assert only(report, "undecodable").examples == ("PAT_2_2_2", "PAT_3_3_3")
    assert only(report, "tiny").examples == ("PAT_4_4_4",)


def test_identical_images_are_told_apart_by_their_labels(tmp_path):
    write_pad(tmp_path, pad_rows(12))
    folder = tmp_path / "images" / "imgs_part_1"
    for source, copy in ((0, 1), (0, 2), (3, 9)):
        content = (folder / f"PAT_{source}_{source}_{source}.png").read_bytes()
        (folder / f"PAT_{copy}_{copy}_{copy}.png").write_bytes(content)
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
    changes = [("region", "ELBOW"), ("region", "1987-02-03"), ("itch", "perhaps"), ("background_father", "BRASIL")]
    for row, (name, value) in zip(rows, [*changes, ("gender", "2")], strict=False):
        row[name] = value
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


def test_the_known_defects_of_pad_ufes_20_are_found(real_pad):
    report = check_dataset("pad_ufes_20", real_pad)
    assert not report.failed
    assert only(report, "shared_lesions").count == 250
    assert "PAT_419_2767_323 (ACK) = PAT_419_833_148 (SCC)" in only(report, "identical_other_label").examples
    assert [finding.message for finding in findings(report, "aliases")] == [
        "background_father: BRASIL means BRAZIL; rows: 3"
    ]
    assert only(report, "rows").level == only(report, "classes").level == "PASS"
