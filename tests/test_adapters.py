import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dualrefnet.data import isic_2019, pad_ufes_20
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.check import check_dataset
from dualrefnet.data.csv_table import describe, read_csv
from dualrefnet.data.schema import groups
from dualrefnet.errors import DataError

PAD = pd.DataFrame(
    [
        {"patient_id": "PAT_1", "lesion_id": "7", "img_id": "PAT_1_7_1.png", "diagnostic": "MEL", "age": "40"},
        {"patient_id": "PAT_2", "lesion_id": "7", "img_id": "PAT_2_7_2.png", "diagnostic": "NEV", "itch": "UNK"},
        {"patient_id": "PAT_2", "lesion_id": "8", "img_id": "PAT_2_8_3.png", "diagnostic": "BCC", "fitspatrick": "3.0"},
    ],
    columns=["patient_id", "lesion_id", "img_id", "diagnostic", *(field.name for field in pad_ufes_20.FIELDS)],
).assign(biopsed="True")


def touch(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")


def pad(root, table=PAD, files=()):
    root.mkdir(exist_ok=True)
    table.to_csv(root / "metadata.csv", index=False)
    for file in files:
        touch(root / file)
    return root


def isic(root, files=(), truth=None, metadata=None):
    ids = ["ISIC_0000001", "ISIC_0000002_downsampled"]
    scores = {name: [0.0, 0.0] for name in isic_2019.CLASSES} | {"MEL": [1.0, 0.0], "DF": [0.0, 1.0], "UNK": [0.0, 0.0]}
    columns = {
        "age_approx": ["55", ""],
        "anatom_site_general": ["", "head/neck"],
        "lesion_id": ["", "L1"],
        "sex": ["male", ""],
    }
    (root / isic_2019.GROUND_TRUTH).write_text(
        pd.DataFrame({"image": ids, **scores, **(truth or {})}).to_csv(index=False)
    )
    (root / isic_2019.METADATA).write_text(
        pd.DataFrame({"image": ids, **columns, **(metadata or {})}).iloc[::-1].to_csv(index=False)
    )
    for file in files:
        touch(root / file)
    return root


def own(root, table, /, **description):
    root.mkdir(exist_ok=True)
    table.to_csv(root / "table.csv", index=False)
    (root / "dataset.yaml").write_text(yaml.safe_dump(description))
    return root


@pytest.mark.parametrize(
    ("folders", "suffix"),
    [
        (["images/imgs_part_1", "images/imgs_part_2", "images/imgs_part_3"], ".png"),
        (["imgs_part_1", "imgs_part_2", "imgs_part_3"], ".png"),
        (["imgs_part_1/imgs_part_1", "images/imgs_part_2/imgs_part_2", "images/imgs_part_3"], ".png"),
        (["images", "images", "images"], ".JPEG"),
    ],
)
def test_every_layout_of_pad_ufes_20_is_read(tmp_path, folders, suffix):
    ids = ["PAT_1_7_1", "PAT_2_7_2", "PAT_2_8_3"]
    files = [f"{folder}/{image_id}{suffix}" for folder, image_id in zip(folders, ids, strict=True)]
    dataset = load_dataset("pad_ufes_20", pad(tmp_path, files=files))
    assert list(dataset.table["image_id"]) == ids
    assert [path.removeprefix(f"{tmp_path}/") for path in dataset.table["image_path"]] == files


def test_pad_rows_without_an_image_stay_and_values_are_normalised(tmp_path):
    dataset = load_dataset(
        "pad_ufes_20", pad(tmp_path, files=["images/PAT_2_7_2.png", "images/notes.txt", "images/._PAT_1_7_1.png"])
    )
    assert list(dataset.table["image_path"].isna()) == [True, False, True]
    assert list(dataset.with_image["image_id"]) == ["PAT_2_7_2"]
    assert dataset.table["age"][0] == 40
    assert dataset.table["itch"][1] == "UNK"
    assert dataset.table["fitspatrick"][2] == "3"
    assert "biopsed" not in dataset.table


def test_one_lesion_number_of_two_patients_is_two_lesions_and_stays_known_without_a_patient(tmp_path):
    assert list(load_dataset("pad_ufes_20", pad(tmp_path)).table["lesion_id"]) == ["PAT_1/7", "PAT_2/7", "PAT_2/8"]
    table = load_dataset("pad_ufes_20", pad(tmp_path, PAD.assign(patient_id=["NA", "PAT_2 ", ""]))).table
    assert list(table["lesion_id"]) == ["7", "PAT_2/7", "8"]


def test_two_files_of_one_stem_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"two images are called PAT_1_7_1: .*png and .*jpg; keep one"):
        load_dataset("pad_ufes_20", pad(tmp_path, files=["imgs_part_1/PAT_1_7_1.png", "images/PAT_1_7_1.jpg"]))


@pytest.mark.parametrize(
    "folder", ["ISIC_2019_Training_Input", "ISIC_2019_Training_Input/ISIC_2019_Training_Input", "images"]
)
def test_every_layout_of_isic_2019_is_read_in_the_order_of_the_ground_truth(tmp_path, folder):
    dataset = load_dataset("isic_2019", isic(tmp_path, [f"{folder}/ISIC_0000002_downsampled.jpg"]))
    table = dataset.table
    assert list(table["image_id"]) == ["ISIC_0000001", "ISIC_0000002_downsampled"]
    assert list(table["label"]) == ["MEL", "DF"]
    assert list(table["image_path"].isna()) == [True, False]
    assert list(table["lesion_id"].isna()) == [True, False]
    assert table["age_approx"][0] == 55
    assert table["age_approx"].isna()[1]
    assert table["anatom_site_general"][1] == "head/neck"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": {"NV": [1.0, 0.0]}}, "1 rows of .* don't have exactly one label, the first: ISIC_0000001"),
        ({"truth": {"DF": [0.0, 0.0], "UNK": [0.0, 1.0]}}, "the first: ISIC_0000002_downsampled"),
        ({"truth": {"MEL": [0.5, 0.0], "NV": [0.5, 0.0]}}, "1 rows of"),
        ({"truth": {"MEL": ["yes", "no"]}}, "2 rows of"),
        ({"truth": {"image": ["ISIC_0000001", "ISIC_9"]}}, "don't name the same images"),
        ({"metadata": {"image": ["ISIC_0000001", "ISIC_9"]}}, "don't name the same images"),
    ],
)
def test_isic_files_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_dataset("isic_2019", isic(tmp_path, **changes))


TABLE = pd.DataFrame(
    {
        "photo": ["sub/a.jpg", "b.png", "c.png"],
        "kind": ["cancer", "mole", "mole"],
        "person": ["1", "1", "2"],
        "years": ["40", "", "300"],
        "place": ["arm", "leg", "arm"],
    }
)


FIELDS = [{"name": "years", "kind": "numeric", "maximum": 120}, {"name": "place", "kind": "categorical"}]


COLUMNS = {"image": "photo", "label": "kind", "patient": "person", "metadata": FIELDS}


def test_an_own_table_is_read_by_its_description(tmp_path):
    root = own(tmp_path, TABLE, **COLUMNS, malignant=["cancer"], images="img", title="Mine")
    touch(root / "img" / "sub" / "a.jpg")
    dataset = load_dataset("csv_table", root)
    assert dataset.schema.classes == ("cancer", "mole")
    assert dataset.schema.malignant == ("cancer",)
    assert dataset.schema.title == "Mine"
    assert list(dataset.table["image_id"]) == ["sub/a", "b", "c"]
    assert list(dataset.table["image_path"].notna()) == [True, False, False]
    assert list(dataset.table["patient_id"]) == ["1", "1", "2"]
    assert dataset.table["years"].tolist()[:1] == [40]
    assert dataset.warnings == ["years: 1 values outside ..120 are treated as missing"]


@pytest.mark.parametrize(
    ("columns", "unit"),
    [
        ({"patient": "person"}, "patient"),
        ({"patient": "person", "lesion": "empty"}, "patient"),
        ({"lesion": "person"}, "lesion"),
        ({"patient": "empty", "lesion": "person"}, "lesion"),
        ({"patient": "empty"}, "image"),
        ({}, "image"),
    ],
)
def test_the_unit_is_what_the_columns_name_and_all_but_patients_get_a_warning(tmp_path, columns, unit):
    root = own(tmp_path, TABLE.assign(empty=["", "NA", ""]), image="photo", label="kind", **columns)
    dataset = load_dataset("csv_table", root)
    assert dataset.schema.unit == unit
    assert [check for check, _ in dataset.notes if check == "patients"] == ["patients"] * (unit != "patient")
    found = [finding for finding in check_dataset("csv_table", root).findings if finding.check == "patients"]
    assert [finding.level for finding in found] == ["PASS" if unit == "patient" else "WARN"]


def test_equal_files_are_one_group_whatever_they_are_called(tmp_path):
    contents = {"a.jpg": b"x" * 10, "b.jpg": b"x" * 10, "c.jpg": b"y" * 10, "d.jpg": b"x" * 11, "e.jpg": b"y" * 10}
    table = pd.DataFrame({"photo": [*contents, "lost.jpg"], "kind": "mole", "person": ["P1", None, "P2", "", "", ""]})
    root = own(tmp_path, table, image="photo", label="kind", patient="person")
    for name, content in contents.items():
        (root / name).write_bytes(content)
    dataset = load_dataset("csv_table", root)
    assert list(groups(dataset.table, dataset.schema)) == ["P1", "P1", "P2", "image:d", "P2", "image:lost"]


def test_a_class_is_called_by_its_most_frequent_spelling(tmp_path):
    table = TABLE.assign(kind=["Mole", "mole", "mole "])
    dataset = load_dataset("csv_table", own(tmp_path, table, image="photo", label="kind"))
    assert dataset.schema.classes == ("mole",)
    assert set(dataset.table["label"]) == {"mole"}
    assert "'Mole' is mole" in dataset.warnings[0]


NAMES = {
    "as they are": ["sub/a.jpg", "b.PNG", "c"],
    "without suffix": ["sub/a", "b", "c"],
    "another suffix": ["sub/a.png", "b.jpeg", "c.jpg"],
    "another case": ["SUB/A.JPG", "B.png", "C"],
    "Windows": ["sub\\a.jpg", ".\\b.PNG", "c"],
    "spaces": ["sub/a.jpg ", " b.PNG", "c\u00a0"],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_images_are_found_however_a_table_writes_their_names(tmp_path, names):
    root = own(tmp_path, TABLE.assign(photo=names), **COLUMNS, images="img")
    files = [root / "img" / name for name in ("sub/a.jpg", "b.PNG", "c")]
    for file in files:
        touch(file)
    (root / "img" / "loop").symlink_to(root / "img" / "loop")
    (root / "img" / "sub" / "up").symlink_to(root / "img")
    assert list(load_dataset("csv_table", root).table["image_path"]) == [str(file) for file in files]


def test_a_name_that_means_two_images_is_refused_and_a_like_name_elsewhere_is_none(tmp_path):
    root = own(tmp_path, TABLE.assign(photo=["p1/a", "p2/a", "b"]), **COLUMNS)
    touch(root / "p1" / "a.jpg")
    assert list(load_dataset("csv_table", root).table["image_path"].notna()) == [True, False, False]
    touch(root / "p1" / "A.png")
    assert load_dataset("csv_table", root).table["image_path"][0] == str(root / "p1" / "a.jpg")
    touch(root / "p1" / "a.webp")
    with pytest.raises(DataError, match=r"two images are called p1/a: .*a.jpg and .*a.webp"):
        load_dataset("csv_table", root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imgae": "photo"}, "imgae: unknown key; the keys there are title, table, images"),
        (
            {"metadata": [{"name": "years", "knd": "numeric"}]},
            r"metadata.0.*unknown key; the keys there are name, kind",
        ),
        ({"metadata": [{"name": "years", "kind": "number"}]}, "metadata.0.kind"),
        ({"metadata": [{"name": "biopsed", "kind": "boolean"}]}, "holds the diagnosis"),
        (
            {"metadata": [{"name": "kind", "kind": "categorical"}]},
            "kind can't be a metadata field: it is the image, label",
        ),
        ({"metadata": [{"name": "person", "kind": "categorical"}]}, "person can't be a metadata field"),
        ({"metadata": [{"name": "height", "kind": "numeric"}]}, "has no column height; it has: photo, kind"),
        ({"patient": "who"}, "has no column who"),
        ({"metadata": FIELDS[:1] * 2}, "metadata field named twice: years"),
        ({"classes": ["cancer"]}, "unknown labels: mole"),
        ({"malignant": ["melanoma"]}, "malignant names no class"),
        ({"table": "nothing.csv"}, "there is no file .*nothing.csv"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        load_dataset("csv_table", own(tmp_path, TABLE, **(COLUMNS | change)))


ONE_HOT = pd.DataFrame(
    {"photo": ["a", "b", "c"], "mole": [0, "1.0", 1], "cancer": ["1", 0.0, 0], "years": [40, 50, 60]}
)


def test_labels_may_be_a_column_for_each_class(tmp_path):
    for table in (ONE_HOT, ONE_HOT.assign(mole=[False, True, True], cancer=[True, False, False])):
        root = own(tmp_path, table, image="photo", label=["mole", "cancer"], malignant=["cancer"])
        dataset = load_dataset("csv_table", root)
        assert dataset.schema.classes == ("mole", "cancer")
        assert list(dataset.table["label"]) == ["cancer", "mole", "mole"]
        assert list(dataset.other_columns) == ["years"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mole": [1, 1, 1]}, r"1 rows of .* don't have exactly one label, the first: a \(row 1\)"),
        ({"mole": [0, 0, 1]}, r"the first: b \(row 2\); one of the columns mole, cancer must hold 1"),
        ({"mole": [0, 1, None]}, r"the first: c \(row 3\)"),
        ({"mole": [0, 1, "x"]}, r"the first: c \(row 3\)"),
        ({"mole": [0, 3, 1], "cancer": [1, -2, 0]}, r"the first: b \(row 2\)"),
    ],
)
def test_a_row_without_exactly_one_label_is_named(tmp_path, change, message):
    root = own(tmp_path, ONE_HOT.assign(**change), image="photo", label=["mole", "cancer"])
    with pytest.raises(DataError, match=message):
        load_dataset("csv_table", root)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"label": ["mole"]}, "label"),
        ({"label": ["mole", "cancr"]}, "has no column cancr"),
        ({"label": ["mole", "cancer"], "classes": ["mole"]}, "unknown labels: cancer"),
        ({"label": ["mole", "cancer"], "malignant": ["melanoma"]}, "malignant names no class: melanoma"),
        (
            {"label": ["mole", "cancer"], "metadata": [{"name": "cancer", "kind": "boolean"}]},
            "cancer can't be a metadata",
        ),
    ],
)
def test_columns_of_labels_that_do_not_fit_are_refused(tmp_path, description, message):
    with pytest.raises(DataError, match=message):
        load_dataset("csv_table", own(tmp_path, ONE_HOT, image="photo", **description))


def test_a_target_of_0_and_1_needs_no_quotes(tmp_path):
    table = ONE_HOT.rename(columns={"mole": "target"})
    text = "image: photo\nlabel: target\nmalignant: [1]\nclass_names: {0: benign, 1: malignant}\nclasses: [0, 1]\n"
    root = own(tmp_path, table)
    (root / "dataset.yaml").write_text(text)
    dataset = load_dataset("csv_table", root)
    assert (dataset.schema.classes, dataset.schema.malignant) == (("0", "1"), ("1",))
    assert list(dataset.table["label"]) == ["0", "1", "1"]
    assert dataset.schema.class_names["1"] == "malignant"
    (root / "dataset.yaml").write_text(text.replace("[1]", "[yes]"))
    with pytest.raises(DataError, match="needs quotes"):
        load_dataset("csv_table", root)


def test_a_name_means_the_image_in_a_folder_below_and_a_class_in_any_case(tmp_path):
    names = {"classes": ["mole", "cancer"], "malignant": ["CANCER"], "class_names": {"Mole": "benign"}}
    root = own(tmp_path, TABLE.assign(photo=["A", "2/B", "lost"]), **COLUMNS, **names, images="photos")
    for name in ("2024/1/a.jpg", "2024/2/b.jpg", "2024/3/b.jpg"):
        touch(root / "photos" / name)
    dataset = load_dataset("csv_table", root)
    assert [path and path.rsplit("/", 2)[-2:] for path in dataset.table["image_path"]] == [
        ["1", "a.jpg"],
        ["2", "b.jpg"],
        None,
    ]
    assert (dataset.schema.malignant, dataset.schema.class_names) == (("cancer",), {"mole": "benign"})
    own(tmp_path, TABLE.assign(photo=["A", "b", "lost"]), **COLUMNS, images="photos")
    with pytest.raises(DataError, match="two images are called b"):
        load_dataset("csv_table", root)


def test_images_may_lie_in_several_parts(tmp_path):
    root = own(tmp_path, TABLE.assign(photo=["a", "B.png", "lost"]), **COLUMNS, images=["part1", "part2", "part3"])
    touch(root / "part1" / "a.jpg")
    touch(root / "part2" / "b.png")
    dataset = load_dataset("csv_table", root)
    assert list(dataset.table["image_path"]) == [str(root / "part1" / "a.jpg"), str(root / "part2" / "b.png"), None]
    assert len(dataset.image_folders) == 3
    for name in ("a.jpg", "a.png"):
        touch(root / "part2" / name)
        with pytest.raises(DataError, match=r"two images are called a: .*part1/a.jpg and .*part2/a"):
            load_dataset("csv_table", root)
        (root / "part2" / name).unlink()
    own(root, TABLE.assign(photo=["a.jpg", "B.png", "lost"]), **COLUMNS, images=["part1", "part2"])
    touch(root / "part2" / "a.jpg")
    with pytest.raises(DataError, match=r"two images are called a.jpg: .*part1/a.jpg and .*part2/a.jpg"):
        load_dataset("csv_table", root)


def test_describe_guesses_the_kinds():
    table = pd.DataFrame(
        {
            "age": range(20, 60),
            "size": [f"{number},5" for number in range(40)],
            "grew": ["yes", "no"] * 20,
            "smoker": [1.0, 0.0, None, 1.0] * 10,
            "type": [1, 2, 3, "NA"] * 10,
            "site": ["arm", None] * 20,
        }
    )
    kinds = [field.kind for field in describe(table, list(table))]
    assert kinds == ["numeric", "numeric", "boolean", "boolean", "categorical", "categorical"]


@pytest.mark.parametrize("form", ["{} mm", "{}cm", "{},000", "~{}", "1.{}0,5"])
def test_numbers_that_could_be_misread_are_refused_and_not_made_categories(form):
    values = [form.format(100 + number) for number in range(20)]
    with pytest.raises(DataError, match="20 values aren't plain ones"):
        describe(pd.DataFrame({"size": values}), ["size"])
    with pytest.raises(DataError, match="2 values aren't plain ones"):
        describe(pd.DataFrame({"size": [*values[:1], "unclear", *range(20)]}), ["size"])


WRITTEN = {
    "commas": "a,b\n1,é\n",
    "semicolons": "a;b\n1;é\n",
    "tabs": "a\tb\r\n1\té\r\n",
    "Excel": "sep=;\na;b\n1;é\n",
    "Excel's empty columns": "a,b,,\n1,é,,\n,,,\n",
    "a separator at each end": "a,b\n1,é,\n",
    "old Mac": "a,b\r1,é\r",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
def test_a_csv_is_read_in_whatever_encoding_and_with_whatever_separator(tmp_path, capsys, text, encoding):
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    table = read_csv(tmp_path / "t.csv")
    assert table.to_dict("list") == {"a": ["1"], "b": ["é"]}
    assert ("Windows-1252" in capsys.readouterr().err) == (encoding == "cp1252")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a,b\n", "has no rows"),
        (b"a,b,a\n1,2,3\n", "several columns called a"),
        (b"a,b\n1,2\n1,2,3\n", "row 2 of .* has 3 cells, and the header 2"),
        (b'a,b\n1,"2\n', "can't be read as CSV"),
        (b"a,b\n1,\x002\n", "NUL bytes"),
        ("a,b\n1,2\n".encode("utf-16-le"), "NUL bytes"),
    ],
)
def test_a_csv_that_could_be_misread_is_refused(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path / "t.csv")


@settings(max_examples=60)
@given(st.binary(max_size=60) | st.text(alphabet='a,"\n;1\r\0', max_size=40).map(str.encode))
def test_any_bytes_are_a_table_or_a_data_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.csv"
    file.write_bytes(content)
    said = ""
    try:
        assert isinstance(read_csv(file), pd.DataFrame)
    except DataError as error:
        said = str(error)
    assert "\n" not in said


def test_an_unknown_adapter_and_a_missing_root_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no data set adapter is called 'pad'; there are: pad_ufes_20, isic_2019"):
        load_dataset("pad", tmp_path)
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; `dualrefnet fetch isic_2019"):
        load_dataset("isic_2019", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"`dualrefnet sample .* makes it"):
        load_dataset("sample", tmp_path / "nowhere")
    monkeypatch.delenv("DUALREFNET_DATA", raising=False)
    with pytest.raises(DataError, match="set DUALREFNET_DATA"):
        load_dataset("pad_ufes_20")
