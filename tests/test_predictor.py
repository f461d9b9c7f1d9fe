import io
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


def test_the_predictor_repeats_the_evaluation_to_the_digit(
    tiny_run: Run, predictor: Predictor, sample_root: Path
) -> None:
    table = load_dataset("sample", sample_root).table.set_index("image_id")
    fields = [field.name for field in predictor.fields]
    # Of the validation side one image lies exactly on the threshold of the sets.
    for _, row in tiny_run.predictions.query("split == 'test'").head(6).iterrows():
        source = table.loc[row["image_id"]]
        form = {name: source[name] for name in fields if pd.notna(source[name])}
        prediction = predictor.predict(source["image_path"], form)
        assert prediction.label == row["predicted"]
        answer = row[[f"prob_{name}" for name in predictor.classes]].to_numpy(dtype=float)[None]
        decided = tiny_run.calibration.decide(answer, [True], [len(form) / len(fields)])
        assert list(prediction.probabilities.values()) == pytest.approx(decided.probabilities[0], abs=1e-5)
        members = [name for name, inside in zip(predictor.classes, decided.sets[0], strict=True) if inside]
        assert sorted(prediction.likely) == sorted(members)
        assert list(prediction.likely) == sorted(members, key=prediction.probabilities.__getitem__, reverse=True)
        assert prediction.refer == decided.refer[0]
        assert prediction.availability == decided.thresholds[0].group.name


def test_a_photograph_may_be_a_file_bytes_or_an_array(predictor: Predictor, sample_root: Path) -> None:
    path = next((sample_root / "images").iterdir())
    array = np.asarray(Image.open(path).convert("RGB"))
    answers = [predictor.predict(source, {"age": 61}) for source in (path, str(path), path.read_bytes(), array)]
    assert all(answer == answers[0] for answer in answers)
    assert sum(answers[0].probabilities.values()) == pytest.approx(1)
    cancers = [answers[0].probabilities[name] for name in ("BCC", "MEL", "SCC")]
    assert answers[0].malignancy == pytest.approx(sum(cancers))


def test_forms_of_any_completeness_are_answered_and_gaps_are_said(predictor: Predictor, sample_root: Path) -> None:
    path = next((sample_root / "images").iterdir())
    assert "region" in predictor.predict(path, {"age": 61}).warnings[-1]
    for unknown in ({"region": "MOON"}, {"age": float("inf")}, {"age": 61, "itch": "perhaps"}):
        with pytest.raises(DataError, match="leave it out if it isn't known"):
            predictor.predict(path, unknown)
    assert (
        predictor.predict(path, {"region": " face"}).probabilities
        == predictor.predict(path, {"region": "FACE"}).probabilities
    )
    assert (
        predictor.predict(path, {"itch": "yes"}).probabilities == predictor.predict(path, {"itch": True}).probabilities
    )


def test_bad_input_is_refused(predictor: Predictor, sample_root: Path) -> None:
    path = next((sample_root / "images").iterdir())
    with pytest.raises(DataError, match="shoe_size"):
        predictor.predict(path, {"shoe_size": 43})
    with pytest.raises(DataError, match="age must be a number"):
        predictor.predict(path, {"age": "old"})
    with pytest.raises(DataError, match="needs a photograph"):
        predictor.predict(None, {"age": 61})
    with pytest.raises(DataError, match="uint8"):
        predictor.predict(np.zeros((5, 5)), {})
    with pytest.raises(ImageError):
        predictor.predict(b"no image", {})
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "JPEG")
    with pytest.raises(ImageError):
        predictor.predict(stream.getvalue()[:200], {})


def test_prediction_imports_no_training_code() -> None:
    code = (
        "import sys, dualrefnet.deploy.predictor, dualrefnet.deploy.batch; "
        "print([name for name in sys.modules if name.startswith('dualrefnet.training')])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
