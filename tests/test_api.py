from pathlib import Path

import pandas as pd
import pytest

import dualrefnet
from dualrefnet.errors import DataError


@pytest.fixture
def frame(sample_root: Path) -> pd.DataFrame:
    table = pd.read_csv(sample_root / "metadata.csv")
    return table.assign(photo=[str(sample_root / "images" / name) for name in table["img_id"]])


def test_fit_trains_on_any_table_and_keeps_patients_apart(frame: pd.DataFrame, tmp_path: Path) -> None:
    run = dualrefnet.fit(
        frame,
        image="photo",
        label="diagnostic",
        group="patient_id",
        metadata=["age", "region", "itch"],
        malignant=["MEL", "BCC", "SCC"],
        out=tmp_path / "mine",
        image__size=32,
        model__weights="none",
        training__epochs=1,
        evaluation__bootstrap=20,
    )
    assert run.finished
    assert (run.split.groupby("patient_id")["split"].nunique() == 1).all()
    assert "sensitivity" in run.metrics["malignant"]
    prediction = dualrefnet.Predictor.load(run).predict(frame["photo"][0], {"age": 61, "region": "FACE"})
    assert set(prediction.probabilities) == set(frame["diagnostic"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metadata": ["biopsed"]}, "biopsed"),
        ({"metadata": ["patient_id"]}, "identifies"),
        ({"metadata": ["shoe_size"]}, "no column shoe_size"),
        ({"label": "truth"}, "no column truth"),
    ],
)
def test_columns_that_cannot_be_features_are_refused(
    frame: pd.DataFrame, tmp_path: Path, change: dict, words: str
) -> None:
    arguments = {"image": "photo", "label": "diagnostic", "metadata": ["age"], **change}
    with pytest.raises(DataError, match=words):
        dualrefnet.fit(frame, out=tmp_path / "mine", **arguments)
    assert not (tmp_path / "mine").exists()
