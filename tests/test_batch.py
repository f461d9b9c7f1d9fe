import time
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from coloured import Coloured, draw, predict, table_of
from dualrefnet.deploy.batch import (
    Case,
    FileCases,
    FormsIndex,
    ModelFolder,
    Pace,
    Summary,
    TableCases,
    predict_batches,
    predict_here,
    predict_to_csv,
)
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import DataError, ImageError
from dualrefnet.run import Run
from dualrefnet.runtime.prediction import Prediction


def test_files_and_folders_become_rows_in_order_with_their_forms(tmp_path: Path) -> None:
    draw(tmp_path / "photos", ["b.png", "a.png", "c.PNG"])
    draw(tmp_path / "photos" / "below", ["z.png"])
    draw(tmp_path / "photos" / ".hidden", ["h.png"])
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / "aa.jpg").write_text("no image either")
    (last,) = draw(tmp_path, ["last.png"])
    forms = table_of(
        tmp_path / "forms.csv", [("file", "age", "shoes"), ("b", "61", "43"), ("x/z.jpg", "7", ""), ("c", "", "1")]
    )
    cases = FileCases([tmp_path / "photos", last], forms, Coloured())
    assert cases.total == 6
    assert predict(Coloured(), cases, tmp_path / "out.csv", tmp_path / "m") == Summary(5, 1, 0)
    rows = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    assert list(rows.columns) == [
        *(
            "image",
            "predicted",
            "likely",
            "prob_BLUE",
            "prob_RED",
            "malignancy",
            "refer",
            "out_of_scope",
            "warnings",
            "error",
        ),
    ]
    assert [Path(image).name for image in rows["image"]] == ["a.png", "aa.jpg", "b.png", "c.PNG", "z.png", "last.png"]
    assert rows["warnings"].tolist() == ["", "", "age 61", "", "age 7", ""]
    assert rows["error"].ne("").tolist() == [False, True, False, False, False, False]
    # 85, 0, 170 of 255: the second, first and third that were drawn.
    assert rows["prob_RED"].tolist() == ["0.333333", "", "0.000000", "0.666667", "0.000000", "0.000000"]
    assert rows["predicted"].tolist() == ["BLUE", "", "BLUE", "RED", "BLUE", "BLUE"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["forms.csv", "last.png", "out.csv"]


def test_a_table_names_photographs_and_forms_and_bad_rows_fail_alone(tmp_path: Path) -> None:
    draw(tmp_path / "photos", ["a.png", "b.png"])
    rows = [
        ("age", "image", "region"),
        ("61", "photos/a.png", "FACE"),
        ("", str(tmp_path / "photos/b.png"), ""),
        ("old", "photos/a.png", ""),
        ("5", "photos/nowhere.png", ""),
        ("6", "", ""),
        ("7", "photos/b.png"),
    ]
    table = table_of(tmp_path / "table.csv", rows)
    model = Coloured()
    assert predict(model, TableCases(table, model), tmp_path / "out.csv", tmp_path / "m", batch=3) == Summary(2, 4, 0)
    result = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    assert result["image"].tolist() == [
        "photos/a.png",
        rows[2][1],
        "photos/a.png",
        "photos/nowhere.png",
        "5",
        "photos/b.png",
    ]
    assert result["warnings"].tolist() == ["age 61", "", "", "", "", ""]
    assert result["prob_RED"].tolist()[:3] == ["0.000000", "0.498039", ""]
    for error, words in zip(
        result["error"], ["", "", "age must be a number", "nowhere.png", "names no photograph", "2 cells"], strict=True
    ):
        assert words in error
        assert bool(words) == bool(error)
    # The second batch had no row that could be predicted.
    assert model.batches == [2, 0]


def test_a_model_that_does_without_photographs_takes_a_table_without(tmp_path: Path) -> None:
    table = table_of(tmp_path / "table.csv", [("age",), ("61",), ("old",), ("62",)])
    model = Coloured(needs_image=False)
    assert predict(model, TableCases(table, model), tmp_path / "out.csv", tmp_path / "m") == Summary(2, 1, 0)
    rows = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    assert rows[["image", "warnings"]].to_numpy().tolist() == [[1, "age 61"], [2, ""], [3, "age 62"]]
    with pytest.raises(DataError, match="no column image, and this model needs photographs"):
        TableCases(table, Coloured())


def test_no_more_than_three_batches_are_ahead_and_decoding_goes_on_while_the_model_works(tmp_path: Path) -> None:
    (picture,) = draw(tmp_path, ["a.png"])
    taken: list[int] = []

    def cases() -> Iterator[Case]:
        for number in range(100):
            taken.append(number)
            yield Case(str(number), picture)

    prepared: list[int] = []

    class Watching(Coloured):
        def prepare(self, image: Path | None) -> np.ndarray | None:
            prepared.append(1)
            return super().prepare(image)

        def predict_arrays(self, *arguments: Any) -> list[Prediction]:
            before = len(prepared)
            deadline = time.monotonic() + 5
            while len(prepared) < min(100, 10 * (len(self.batches) + 2)) and time.monotonic() < deadline:
                time.sleep(0.001)
            grown.append((before, len(prepared)))
            return super().predict_arrays(*arguments)

    grown: list[tuple[int, int]] = []
    for number, _ in enumerate(predict_batches(Watching(), cases(), batch=10, workers=2), start=1):
        assert len(taken) <= 10 * (number + 2) + 1
    # While the model works on a batch, the whole next one becomes ready.
    assert all(after >= min(100, 10 * (number + 2)) for number, (_, after) in enumerate(grown))


def test_memory_does_not_grow_with_the_list(tmp_path: Path) -> None:
    class Constant(Coloured):
        # Decoding takes memory of its own, as many times as threads happen to meet.
        def prepare(self, image: Path | None) -> np.ndarray | None:
            return np.zeros((16, 16, 3), np.uint8)

    model = Constant()
    peaks = []
    for rows in (300, 3000):
        table = table_of(
            tmp_path / "table.csv", [("image", "age"), *(("a.png", str(number)) for number in range(rows))]
        )
        forms = table_of(tmp_path / "forms.csv", [("image", "age"), *((f"{number:06}", "1") for number in range(rows))])
        tracemalloc.start()
        predict(model, TableCases(table, model), tmp_path / "out.csv", tmp_path / "m")
        index = FormsIndex(forms, ["age"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert index.find("000299.png") == {"age": "1"}
    assert peaks[1] < 1.2 * peaks[0] + 50_000


def test_the_pace_is_that_of_the_last_half_minute_and_ignores_what_was_resumed() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    assert pace.after(500_000, 1_000_000) == ""
    now = 10.0
    assert pace.after(502_000, 1_000_000) == "200 images/s, 0:41:30 left"
    for now in (40.0, 70.0, 100.0):
        said = pace.after(502_000 + int(now) * 5, 1_000_000)
    assert said.startswith("5.0 images/s")


def test_the_real_predictor_says_the_same_of_a_file_a_table_and_alone(
    tiny_run: Run, sample_root: Path, tmp_path: Path
) -> None:
    model = Predictor.load(tiny_run)
    photographs = sorted((sample_root / "images").iterdir())[:5]
    rows = [(str(path), "61" if number % 2 else "") for number, path in enumerate(photographs)]
    table = table_of(tmp_path / "table.csv", [("image", "age"), *rows])
    forms = table_of(tmp_path / "forms.csv", [("image", "age"), *((Path(path).stem, age) for path, age in rows)])
    work = partial(predict_here, model, batch=2)
    folder = ModelFolder(tiny_run.path)
    assert "model" in folder.made_of
    predict_to_csv(folder, model.classes, TableCases(table, model), tmp_path / "a.csv", work, batch=2)
    predict_to_csv(folder, model.classes, FileCases(photographs, forms, model), tmp_path / "b.csv", work, batch=2)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    result = pd.read_csv(tmp_path / "a.csv")
    for number, (path, age) in enumerate(rows):
        alone = model.predict(Path(path), {"age": age} if age else {})
        said = result[[f"prob_{name}" for name in model.classes]].iloc[number]
        assert said.tolist() == pytest.approx(list(alone.probabilities.values()), abs=2e-6)
        assert result["predicted"][number] == alone.label
    with pytest.raises(ImageError):
        model.prepare(tmp_path / "a.csv")
