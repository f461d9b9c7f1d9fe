import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dualrefnet import Predictor
from dualrefnet.data.adapters import load_dataset
from dualrefnet.errors import DataError, ImageError
from dualrefnet.run import Run


@pytest.fixture(scope="module")
def predictor(tiny_run: Run) -> Predictor:
    return Predictor.load(tiny_run)


@pytest.fixture
def path(sample_root: Path) -> Path:
    return next((sample_root / "images").iterdir())


def test_the_predictor_repeats_the_evaluation_to_the_digit(
    tiny_run: Run, predictor: Predictor, sample_root: Path
) -> None:
    table = load_dataset("sample", sample_root).table.set_index("image_id")
    fields = [field.name for field in predictor.fields]
    # Of the validation split one image lies exactly on the threshold of the sets.
    for _, row in tiny_run.predictions.query("split == 'test'").head(6).iterrows():
        source = table.loc[row["image_id"]]
        metadata = {name: source[name] for name in fields if pd.notna(source[name])}
        prediction = predictor.predict(source["image_path"], metadata)
        assert prediction.label == row["predicted"]
        probabilities = row[[f"prob_{name}" for name in predictor.classes]].to_numpy(dtype=float)[None]
        decided = tiny_run.calibration.decide(probabilities, [True], [len(metadata) / len(fields)])
        assert list(prediction.probabilities.values()) == pytest.approx(decided.probabilities[0], abs=1e-5)
        members = [name for name, inside in zip(predictor.classes, decided.sets[0], strict=True) if inside]
        assert list(prediction.likely) == sorted(members, key=prediction.probabilities.__getitem__, reverse=True)
        assert prediction.refer == decided.refer[0]
        assert prediction.availability == decided.thresholds[0].group.name


def test_an_image_may_be_a_file_bytes_or_an_array(predictor: Predictor, path: Path) -> None:
    array = np.asarray(Image.open(path).convert("RGB"))
    predictions = [predictor.predict(source, {"age": 61}) for source in (path, str(path), path.read_bytes(), array)]
    assert all(one == predictions[0] for one in predictions)
    probabilities = predictions[0].probabilities
    assert sum(probabilities.values()) == pytest.approx(1)
    assert predictions[0].malignancy == pytest.approx(sum(probabilities[name] for name in ("BCC", "MEL", "SCC")))


def test_an_image_may_be_pillow_s_or_numbers_and_nothing_else(predictor: Predictor, path: Path) -> None:
    with Image.open(path) as image:
        array = np.asarray(image.convert("RGB"))
        expected = predictor.predict(path)
        assert predictor.predict(image) == predictor.predict(array.tolist()) == expected
    assert predictor.predict(array.astype(np.int64)) == expected
    for wrong in (array / 255, array.astype(int) * 2, [[1, 2], [3]], []):
        with pytest.raises(DataError):
            predictor.predict(wrong)


def test_a_table_gives_a_table(predictor: Predictor, sample_root: Path, tmp_path: Path) -> None:
    metadata = pd.read_csv(sample_root / "metadata.csv").head(4)
    paths = [str(sample_root / "images" / name) for name in metadata["img_id"]]
    table = pd.DataFrame({"image": paths, "age": metadata["age"], "itch": metadata["itch"]})
    table.index = pd.Index(list("abcd"))
    table.loc["c", "image"] = str(tmp_path / "lost.png")
    table.loc["b", "age"] = np.nan
    found = predictor.predict(table)
    assert list(found.index) == list("abcd")
    assert found["error"].ne("").tolist() == [False, False, True, False]
    one = predictor.predict(paths[1], {"itch": bool(metadata["itch"][1])})
    assert found.loc["b", "predicted"] == one.label
    assert found.loc["b", [f"prob_{name}" for name in predictor.classes]].tolist() == pytest.approx(
        list(one.probabilities.values()), abs=1e-5
    )
    with pytest.raises(DataError, match="no column image"):
        predictor.predict(table.drop(columns="image"))


def test_an_explanation_is_saved_as_picture_and_table(predictor: Predictor, path: Path, tmp_path: Path) -> None:
    explanation = predictor.explain(path, {"age": 61})
    picture, table = explanation.save(str(tmp_path / "new" / "why.png"))
    assert pd.read_csv(table)["field"].tolist() == ["age"]
    shown = np.asarray(Image.open(picture)).astype(int)
    changed = np.abs(shown - explanation.image).max(axis=2)
    assert (changed[explanation.saliency <= 0] == 0).all()
    hottest = np.unravel_index(explanation.saliency.argmax(), explanation.saliency.shape)
    assert changed[hottest] > 0
    assert repr(predictor.predict(path)).startswith(f"Prediction({predictor.predict(path).label} ")
    assert "MEL" in repr(predictor)


def test_metadata_may_be_incomplete_and_spelled_otherwise_but_not_invalid(predictor: Predictor, path: Path) -> None:
    assert "region" in predictor.predict(path, {"age": 61}).warnings[-1]
    for one, same in (({"region": " face"}, {"region": "FACE"}), ({"itch": "yes"}, {"itch": True})):
        assert predictor.predict(path, one).probabilities == predictor.predict(path, same).probabilities
    for metadata, words in (
        ({"region": "MOON"}, "leave it out if it isn't known"),
        ({"age": float("inf")}, "leave it out if it isn't known"),
        ({"shoe_size": 43}, "shoe_size"),
        ({"age": "old"}, "age must be a number"),
    ):
        with pytest.raises(DataError, match=words):
            predictor.predict(path, metadata)
        with pytest.raises(DataError, match=words):
            predictor.check_metadata(metadata)


def test_an_invalid_image_is_refused(predictor: Predictor, path: Path) -> None:
    with pytest.raises(DataError, match="needs an image"):
        predictor.predict(None, {"age": 61})
    with pytest.raises(DataError, match="uint8"):
        predictor.predict(np.zeros((5, 5)), {})
    for data in (b"no image", path.read_bytes()[:200]):
        with pytest.raises(ImageError):
            predictor.predict(data, {})


def test_the_predictor_describes_itself_and_explains(tiny_run: Run, predictor: Predictor, path: Path) -> None:
    assert predictor.name == tiny_run.recipe.name
    assert predictor.coverage == tiny_run.recipe.evaluation.coverage
    assert predictor.needs_image
    assert predictor.categories("itch")[:2] == ("False", "True")
    assert predictor.categories("age") == ()
    assert set(predictor.class_names) == set(predictor.classes)
    assert isinstance(json.dumps(predictor.description, allow_nan=False), str)
    again = predictor.predict_lesion([path, path], {"age": 61})
    assert again.probabilities == pytest.approx(predictor.predict(path, {"age": 61}).probabilities, abs=1e-5)
    explained = predictor.explain(path, {"age": 61, "itch": True})
    assert explained.label == predictor.predict(path, {"age": 61, "itch": True}).label
    without = predictor.predict(path, {"itch": True}).probabilities
    assert explained.fields["age"] == pytest.approx(explained.probability - without[explained.label], abs=1e-5)
    with pytest.raises(DataError, match="no class"):
        predictor.explain(path, {}, "PSORIASIS")


def test_prediction_imports_no_training_code() -> None:
    code = "import sys, dualrefnet.deploy.batch; assert not any(name.startswith('dualrefnet.training') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
