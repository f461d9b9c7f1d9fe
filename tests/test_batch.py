import csv
import errno
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest

from dualrefnet.data.images import decode_image
from dualrefnet.deploy import batch as module
from dualrefnet.deploy.batch import (
    Case,
    Cases,
    ImageCases,
    ModelFolder,
    Summary,
    TableCases,
    csv_lines,
    predict_chunks,
    predict_to_csv,
    walk_images,
)
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import DataError, RunError
from dualrefnet.run import Run
from dualrefnet.runtime.prediction import Prediction


class Redness:
    """Stands for a predictor: how red an image is, and the age of its metadata."""

    classes = ("BLUE", "RED")
    fields = (SimpleNamespace(name="age"), SimpleNamespace(name="region"))
    reads_image = True

    def __init__(self, needs_image: bool = True, seconds: float = 0.0, stop_after: int = 10**9) -> None:
        self.needs_image, self.seconds, self.stop_after = needs_image, seconds, stop_after
        self.batches: list[int] = []

    def check_metadata(self, metadata: Mapping[str, str]) -> None:
        if not metadata.get("age", "0").isdigit():
            raise DataError("age must be\na number")

    def prepare(self, image: Path | None) -> np.ndarray | None:
        return None if image is None else decode_image(image)

    def predict_arrays(self, prepared: Sequence[Any], metadata: Sequence[Mapping[str, str]]) -> list[Prediction]:
        time.sleep(self.seconds)
        if len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(len(prepared))
        predictions = []
        for image, values in zip(prepared, metadata, strict=True):
            red = 0.5 if image is None else float(image[..., 0].mean()) / 255
            warnings = [f"age {values['age']}"] if "age" in values else []
            label = "RED" if red > 0.5 else "BLUE"
            both = {"BLUE": 1 - red, "RED": red}
            predictions.append(Prediction(label, both, red, warnings, 0.25, ("RED",), red > 0.5))
        return predictions


def draw(folder: Path, names: Sequence[str]) -> list[Path]:
    """Write an image a name, each of another red."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        image = np.zeros((16, 16, 3), np.uint8)
        image[..., 2] = 255 * number // len(names)
        cv2.imwrite(str(folder / name), image)
    return [folder / name for name in names]


def predict(model: Any, cases: Cases, out: Path, size: int = 4, resume: bool = False) -> Summary:
    """Predict as the command does; the folder `m` beside the result stands for the model's."""
    work = partial(predict_chunks, model, batch=size, workers=2)
    folder = ModelFolder(out.parent / "m")
    return predict_to_csv(folder, model.classes, cases, out, work, batch=size, resume=resume)


def table_of(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    path.write_bytes(csv_lines(rows))
    return path


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1)


def test_images_become_rows_in_order_with_their_metadata(tmp_path: Path) -> None:
    images = tmp_path / "images"
    draw(images, ["b.png", "a.png", "c.PNG"])
    draw(images / "below", ["z.png"])
    draw(images / ".hidden", ["h.png"])
    (images / "notes.txt").write_text("no image")
    (images / "aa.jpg").write_text("no image either")
    (last,) = draw(tmp_path, ["last.png"])
    rows = [("file", "age", "shoes"), ("b", "61", "43"), ("below/Z.PNG", "7", ""), ("c", "", "1")]
    cases = ImageCases([images, last], table_of(tmp_path / "metadata.csv", rows), Redness())
    assert cases.total == 6
    assert predict(Redness(), cases, tmp_path / "out.csv") == Summary(5, 1, 0)
    table = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    before, after = ["image", "predicted", "likely"], ["malignancy", "refer", "out_of_scope", "warnings", "error"]
    assert list(table.columns) == [*before, "prob_BLUE", "prob_RED", *after]
    assert [Path(image).name for image in table["image"]] == ["a.png", "aa.jpg", "b.png", "c.PNG", "z.png", "last.png"]
    assert table["warnings"].tolist() == ["", "", "age 61", "", "age 7", ""]
    assert table["error"].ne("").tolist() == [False, True, False, False, False, False]
    assert table["prob_RED"].tolist() == ["0.333333", "", "0.000000", "0.666667", "0.000000", "0.000000"]
    assert table["predicted"].tolist() == ["BLUE", "", "BLUE", "RED", "BLUE", "BLUE"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["last.png", "metadata.csv", "out.csv"]


def test_a_table_names_images_and_metadata_and_invalid_rows_fail_alone(tmp_path: Path) -> None:
    draw(tmp_path / "images", ["a.png", "b.png"])
    b = str(tmp_path / "images/b.png")
    rows = [("age", "image", "region"), ("61", "images/a.png", "FACE"), ("", b, ""), ("old", "images/a.png", "")]
    rows += [("5", "images/nowhere.png", ""), ("6", "", ""), ("7", "images/b.png"), ("8", "images\\B", "")]
    model = Redness()
    cases = TableCases(table_of(tmp_path / "table.csv", rows), model)
    assert predict(model, cases, tmp_path / "out.csv", size=3) == Summary(3, 4, 0)
    result = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    assert result["image"].tolist() == [
        "images/a.png",
        b,
        "images/a.png",
        "images/nowhere.png",
        "5",
        "images/b.png",
        "images\\B",
    ]
    assert result["warnings"].tolist() == ["age 61", "", "", "", "", "", "age 8"]
    words = ["", "", "age must be a number", "nowhere.png", "names no image", "2 cells", ""]
    assert [part in error and bool(part) == bool(error) for part, error in zip(words, result["error"], strict=True)]
    # The second batch had no row that could be predicted.
    assert model.batches == [2, 0, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"image,age\n", "has no rows"),
        (b"image,shoes\na.png,43\n", "none of the model's fields"),
        (b"image,age,age\na.png,1,2\n", "two columns called age"),
        (b"image,age\na.png,1\n\0.png,2\n", "can't be read as CSV"),
        (b'image,age\na.png,1\n"b' + b"x" * 200_000 + b'",2\n', "field larger"),
    ],
)
def test_an_invalid_table_is_refused_before_the_work(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        TableCases(tmp_path / "table.csv", Redness())


def joined(folder: Path, images: Sequence[str], rows: Sequence[str], sources: Sequence[str] = ("",)) -> list[str]:
    """The ages that images get from a table whose rows are named so, and are 1, 2, ... years old."""
    for image in images:
        draw((folder / image).parent, [Path(image).name])
    table = table_of(folder / "metadata.csv", [("image", "age"), *((row, str(age)) for age, row in enumerate(rows, 1))])
    cases = {case.name: case for case in ImageCases([folder / source for source in sources], table, Redness())}
    return [cases[str(folder / image)].metadata.get("age", "") for image in images]


@pytest.mark.parametrize(
    ("images", "rows", "ages"),
    [
        # Patients have images of the same name.
        (["P01/1.jpg", "P02/1.jpg"], ["P01/1.jpg"], ["1", ""]),
        (["P01/1.jpg", "P02/1.jpg"], ["P02/1.jpg", "P01/1.jpg"], ["2", "1"]),
        (["P01/1.jpg", "P02/1.jpg"], ["P01\\1", " ./p02/1.JPG "], ["1", "2"]),
        (["1.jpg", "P01/1.jpg"], ["1.jpg"], ["1", ""]),
        (["P02/1.jpg"], ["P01/1.jpg"], [""]),
        # A short name, or a longer path, means one image.
        (["P01/a.png", "P02/b.jpeg", "ü.png"], ["b", "A.png", "u\u0308"], ["2", "1", "3"]),
        (["P01/1.jpg", "P02/1.jpg"], ["new/P02/1.jpg", "new/P01/1"], ["2", "1"]),
        (["a.png", "a.jpg"], ["a.png", "a.jpg"], ["1", "2"]),
    ],
)
def test_metadata_are_those_of_the_image_with_that_path(
    images: list[str], rows: list[str], ages: list[str], tmp_path: Path
) -> None:
    assert joined(tmp_path / "new", images, rows) == ages


@pytest.mark.parametrize(
    ("images", "rows", "sources", "words"),
    [
        (["P01/1.jpg", "P02/1.jpg"], ["1.jpg"], [""], r"two images are called 1\.jpg: .*P01/1\.jpg and .*P02/1\.jpg"),
        (["P01/1.jpg", "P02/1.jpg"], ["1"], ["P01", "P02/1.jpg"], r"P01/1\.jpg and .*P02/1\.jpg"),
        (["a.png", "a.jpg"], ["a"], [""], r"a\.jpg and .*a\.png"),
        (["a.png"], ["a.png", "a"], [""], "two rows for image .*a.png"),
    ],
)
def test_a_name_that_means_two_images_is_refused(
    images: list[str], rows: list[str], sources: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        joined(tmp_path, images, rows, sources)


def test_a_table_that_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    images = draw(tmp_path / "images", ["a.png", "b.png"])
    path = tmp_path / "metadata.csv"
    for rows, words in (
        ([("picture", "age"), ("a", "1")], "names no images"),
        ([("image", "age"), ("a.png", "1"), ("b", "2", "3")], "row 2: the row has 3 cells"),
    ):
        with pytest.raises(DataError, match=words):
            ImageCases(images, table_of(path, rows), Redness())
    (tmp_path / "empty").mkdir()
    for source, table, words in (
        (tmp_path / "images", tmp_path / "nowhere.csv", "no file"),
        (tmp_path / "m", None, "no file or folder"),
        (tmp_path / "empty", None, "no image is in"),
    ):
        with pytest.raises(DataError, match=words):
            ImageCases([source], table, Redness())


def test_names_that_are_no_text_and_names_with_line_breaks_survive(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (image,) = draw(folder, ["a.png"])
    for name in (b"\xff.png", b'b\n"c",\n.png', b"=1+1.png"):
        os.link(image, os.path.join(os.fsencode(folder), name))
    metadata = table_of(tmp_path / "metadata.csv", [("image", "age"), ("a", "61")])
    assert predict(Redness(), ImageCases([folder], metadata, Redness()), tmp_path / "out.csv") == Summary(4, 0, 0)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        names = [Path(row["image"]).name for row in csv.DictReader(file)]
    assert names == ["=1+1.png", "a.png", 'b\n"c",\n.png', "\\udcff.png"]


def test_three_batches_are_ahead_at_most_and_decoding_goes_on_while_the_model_works(tmp_path: Path) -> None:
    (image,) = draw(tmp_path, ["a.png"])
    prepared: list[int] = []
    bounds: list[bool] = []

    class Watching(Redness):
        def prepare(self, image: Path | None) -> np.ndarray | None:
            prepared.append(1)
            return super().prepare(image)

        def predict_arrays(self, *arguments: Any) -> list[Prediction]:
            ready = min(100, 10 * (len(self.batches) + 2))
            deadline = time.monotonic() + 5
            while len(prepared) < ready and time.monotonic() < deadline:
                time.sleep(0.001)
            bounds.append(ready <= len(prepared) <= ready + 10)
            return super().predict_arrays(*arguments)

    chunks = ((number, [Case(str(row), image) for row in range(20)]) for number in range(5))
    assert [number for number, _ in predict_chunks(Watching(), chunks, batch=10, workers=2)] == [0, 1, 2, 3, 4]
    assert bounds == [True] * 10


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    class Constant(Redness):
        # Decoding takes memory of its own, as many times as threads happen to meet.
        def prepare(self, image: Path | None) -> np.ndarray | None:
            return np.zeros((16, 16, 3), np.uint8)

    peaks = []
    for count in (300, 3000):
        rows = [("image", "age"), *(("a.png", str(number)) for number in range(count))]
        cases = TableCases(table_of(tmp_path / "table.csv", rows), Constant())
        tracemalloc.start()
        predict(Constant(), cases, tmp_path / "out.csv")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 50_000
    # The table that is joined is held; the documentation says how much it takes.
    fields = [SimpleNamespace(name=f"f{number}") for number in range(15)]
    rows = [["image", *(field.name for field in fields)]]
    rows += [[f"ISIC_{number:07}", *(str(number % 90 + place) for place in range(15))] for number in range(20_000)]
    table, images = table_of(tmp_path / "table.csv", rows), draw(tmp_path, ["ISIC_0000001.png"])
    tracemalloc.start()
    ImageCases(images, table, SimpleNamespace(fields=fields))  # type: ignore[arg-type]
    assert tracemalloc.get_traced_memory()[0] < 400 * 20_000
    tracemalloc.stop()


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_prediction_is_resumed_and_ends_the_same_to_the_byte(tmp_path: Path) -> None:
    draw(tmp_path / "images", [f"{number:02}.png" for number in range(14)])
    (tmp_path / "images" / "03.png").write_text("broken")
    cases = ImageCases([tmp_path / "images"], None, Redness())
    out, folder = tmp_path / "out.csv", tmp_path / "out.csv.chunks"
    predict(Redness(), cases, tmp_path / "whole.csv")
    for after in range(4):
        with pytest.raises(KeyboardInterrupt):
            predict(Redness(stop_after=after), cases, out)
        assert not out.exists()
        with pytest.raises(DataError, match="--resume goes on with it; remove it to begin anew"):
            predict(Redness(), cases, out)
        assert len(list(folder.glob("[0-9]*.csv"))) == after
        again = Redness()
        assert predict(again, cases, out, resume=True) == Summary(13, 1, 4 * after)
        assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
        # Whole batches are repeated, never parts of them; the first holds the broken image.
        assert again.batches == [3, 4, 4, 2][after:]
        assert predict(Redness(stop_after=0), cases, out, resume=True) == Summary(13, 1, 14)
        assert predict(Redness(), cases, out).resumed == 0
        out.unlink()
        assert not folder.exists()


@pytest.mark.usefixtures("small_chunks")
def test_another_model_list_or_batch_is_not_resumed(tmp_path: Path) -> None:
    images = tmp_path / "images"
    draw(images, [f"{number}.png" for number in range(6)])
    metadata = table_of(tmp_path / "metadata.csv", [("image", "age"), ("1", "61")])
    out, model = tmp_path / "out.csv", tmp_path / "m"
    model.mkdir()

    def resume(**options: Any) -> Summary:
        return predict(Redness(), ImageCases([images], metadata, Redness()), out, resume=True, **options)

    with pytest.raises(KeyboardInterrupt):
        predict(Redness(stop_after=1), ImageCases([images], metadata, Redness()), out)
    (model / "model.safetensors").write_text("other numbers")
    with pytest.raises(DataError, match="since this has changed: model; call it as"):
        resume()
    (model / "model.safetensors").unlink()
    (model / "metrics.json").write_text("measured again")
    with pytest.raises(DataError, match="changed: batch"):
        resume(size=5)
    draw(images, ["7.png"])
    with pytest.raises(DataError, match="changed: images, rows"):
        resume()
    (images / "7.png").unlink()
    metadata.write_text("image,age\n1,62\n")
    with pytest.raises(DataError, match="changed: metadata"):
        resume()
    metadata.write_text("image,age\n1,61\n")
    assert resume().resumed == 4


def test_two_processes_do_not_write_one_file_and_a_full_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = ImageCases(draw(tmp_path, ["a.png"]), None, Redness())

    class Second(Redness):
        def predict_arrays(self, *arguments: Any) -> list[Prediction]:
            for resume in (False, True):
                with pytest.raises(RunError, match=r"another process is writing .*out\.csv; wait"):
                    predict(Redness(), cases, tmp_path / "out.csv", resume=resume)
            return super().predict_arrays(*arguments)

    predict(Second(), cases, tmp_path / "out.csv")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="the disk is full"):
        predict(Redness(), cases, tmp_path / "other.csv")
    assert not (tmp_path / "other.csv").exists()


def test_a_killed_process_is_resumed_by_the_next(tmp_path: Path) -> None:
    draw(tmp_path / "images", [f"{number:03}.png" for number in range(160)])
    code = (
        "import sys; from pathlib import Path; from test_batch import Redness, predict, ImageCases, module; "
        "module.CHUNK = 1; model = Redness(seconds=0.02); folder = Path(sys.argv[1]); "
        "print(predict(model, ImageCases([folder / 'images'], None, model), folder / 'out.csv', resume=True).resumed)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    killed = subprocess.Popen(command, env=environment)
    folder = tmp_path / "out.csv.chunks"
    deadline = time.monotonic() + 60
    while len(list(folder.glob("[0-9]*.csv"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "out.csv").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 32
    predict(Redness(), ImageCases([tmp_path / "images"], None, Redness()), tmp_path / "whole.csv")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_the_real_predictor_agrees_with_itself_on_images_a_table_and_alone(
    tiny_run: Run, sample_root: Path, tmp_path: Path
) -> None:
    model = Predictor.load(tiny_run)
    images = list(walk_images([sample_root / "images"]))[:5]
    rows = [(str(path), "61" if number % 2 else "") for number, path in enumerate(images)]
    table = table_of(tmp_path / "table.csv", [("image", "age"), *rows])
    metadata = table_of(tmp_path / "metadata.csv", [("image", "age"), *((Path(path).stem, age) for path, age in rows)])
    folder, work = ModelFolder(tiny_run.path), partial(predict_chunks, model, batch=2)
    predict_to_csv(folder, model.classes, TableCases(table, model), tmp_path / "a.csv", work, batch=2)
    predict_to_csv(folder, model.classes, ImageCases(images, metadata, model), tmp_path / "b.csv", work, batch=2)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    result = pd.read_csv(tmp_path / "a.csv")
    for number, (path, age) in enumerate(rows):
        alone = model.predict(Path(path), {"age": age} if age else {})
        together = result[[f"prob_{name}" for name in model.classes]].iloc[number]
        assert together.tolist() == pytest.approx(list(alone.probabilities.values()), abs=2e-6)
        assert result["predicted"][number] == alone.label


def test_the_image_column_is_the_one_that_the_description_beside_the_table_names(tmp_path: Path) -> None:
    draw(tmp_path / "photos", ["a.png", "b.png"])
    draw(tmp_path / "photos" / "2024", ["c.png"])
    rows = [("file", "age"), ("a.png", "61"), ("photos/b.png", "5"), ("C", "7"), ("lost.png", "")]
    table = table_of(tmp_path / "new.csv", rows)
    (tmp_path / "dataset.yaml").write_text("image: file\nimages: photos\n")
    assert predict(Redness(), TableCases(table, Redness()), tmp_path / "out.csv") == Summary(3, 1, 0)
    # A table with a column `image` is read as ever.
    table_of(table, [("image", "age"), ("photos/a.png", "61")])
    assert predict(Redness(), TableCases(table, Redness()), tmp_path / "more.csv") == Summary(1, 0, 0)


def test_a_table_that_names_no_images_is_predicted_without_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TableCases(table_of(tmp_path / "new.csv", [("path", "age"), ("a.png", "61")]), Redness(needs_image=False))
    assert "no column image, so every row is predicted without an image" in capsys.readouterr().err
    TableCases(table_of(tmp_path / "new.csv", [("image", "age"), ("a.png", "61")]), Redness(needs_image=False))
    assert "without an image" not in capsys.readouterr().err
