import csv
import os
from pathlib import Path

import pytest

from coloured import Coloured, draw, predict, table_of
from dualrefnet.deploy.batch import FileCases, FormsIndex, Summary, TableCases, walk_images
from dualrefnet.errors import DataError


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"image,age\n", "has no rows"),
        (b"image,shoes\na.png,43\n", "none of the model's fields"),
        (b"image,age,age\na.png,1,2\n", "two columns called age"),
        (b"image,age\na.png,1\n\xff.png,2\n", "can't be read as CSV"),
        (b'image,age\na.png,1\n"b' + b"x" * 200_000 + b'",2\n', "field larger"),
    ],
)
def test_what_is_no_table_is_refused_before_the_work(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        TableCases(tmp_path / "table.csv", Coloured())


def test_forms_are_found_by_image_and_a_wrong_table_of_them_is_refused(tmp_path: Path) -> None:
    path = table_of(
        tmp_path / "forms.csv",
        [("image_id", "region", "age"), ("a", "FACE, left", "61"), ("b.jpg", "", ""), ("ü", "x\ny", "")],
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    forms = FormsIndex(path, ["age", "region", "itch"])
    assert forms.find("folder/a.jpeg") == {"age": "61", "region": "FACE, left"}
    assert forms.find("b") == {}
    assert forms.find("ü.png") == {"region": "x\ny"}
    assert forms.find("c") is None
    for rows, words in (
        ([("age",), ("1",)], "names no images"),
        ([("image", "x"), ("a", "1")], "none of the model's fields"),
        ([("image", "age"), ("a.png", "1"), ("b", "2"), ("a", "3")], "two rows for image a"),
        ([("image", "age"), ("a.png", "1"), ("b", "2", "3")], "row 2: the row has 3 cells"),
    ):
        with pytest.raises(DataError, match=words):
            FormsIndex(table_of(tmp_path / "wrong.csv", rows), ["age"])
    with pytest.raises(DataError, match="there is no file"):
        FormsIndex(tmp_path / "nowhere.csv", ["age"])


def test_names_that_are_no_text_and_names_with_line_breaks_survive(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (picture,) = draw(folder, ["a.png"])
    for name in (b"\xff.png", b'b\n"c",\n.png', b"=1+1.png"):
        os.link(picture, os.path.join(os.fsencode(folder), name))
    forms = table_of(tmp_path / "forms.csv", [("image", "age"), ("a", "61")])
    model = Coloured()
    assert predict(model, FileCases([folder], forms, model), tmp_path / "out.csv", tmp_path / "m") == Summary(4, 0, 0)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        names = [Path(row["image"]).name for row in csv.DictReader(file)]
    assert names == ["=1+1.png", "a.png", 'b\n"c",\n.png', "\\udcff.png"]


def test_nothing_to_predict_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image is in"):
        FileCases([tmp_path], None, Coloured())
    with pytest.raises(DataError, match="there is no file or folder"):
        list(walk_images([tmp_path / "nowhere"]))
