from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dualrefnet
from dualrefnet.errors import DataError, DualRefNetError, RunError
from dualrefnet.run import Run


@pytest.fixture
def frame(sample_root: Path) -> pd.DataFrame:
    table = pd.read_csv(sample_root / "metadata.csv")
    return table.assign(photo=[str(sample_root / "images" / name) for name in table["img_id"]])


def test_fit_trains_on_any_table_and_keeps_patients_apart(frame: pd.DataFrame, tmp_path: Path) -> None:
    # Columns and classes of a notebook are called as they come.
    classes = {name: number for number, name in enumerate(sorted(frame["diagnostic"].unique()))}
    frame = frame.rename(columns={"photo": 0}).assign(diagnostic=frame["diagnostic"].map(classes))
    run = dualrefnet.fit(
        frame,
        image=0,
        label="diagnostic",
        group="patient_id",
        metadata=["age", "region", "itch"],
        malignant=[1, 2],
        out=tmp_path / "my run 1",
        image__size=32,
        model__weights="none",
        training__epochs=1,
        evaluation__bootstrap=20,
    )
    assert run.finished
    assert (run.split.groupby("patient_id")["split"].nunique() == 1).all()
    assert "sensitivity" in run.metrics["malignant"]
    prediction = dualrefnet.Predictor.load(run).predict(frame[0][0], {"age": 61, "region": "FACE"})
    assert set(prediction.probabilities) == set(map(str, frame["diagnostic"]))
    with pytest.raises(RunError, match=r"holds a finished run; [^-]*resume=True[^-]*overwrite=True[^-]*out=$"):
        dualrefnet.fit(frame, image=0, label="diagnostic", out=tmp_path / "my run 1")


def test_a_run_says_what_it_is(tiny_run: Run, tmp_path: Path) -> None:
    assert set(dualrefnet.__all__) <= set(dir(dualrefnet))
    run = Run(str(tiny_run.path))
    assert run == tiny_run
    assert f"{run.metrics['balanced_accuracy']:.0%}" in run.summary().splitlines()[0]
    assert run.summary().splitlines()[0] in repr(run)
    assert "unfinished" in repr(Run(tmp_path))
    page = run.report(tmp_path / "report", explanations=False)
    assert page.parent == tmp_path / "report"
    with pytest.raises(DualRefNetError, match="no folder"):
        run.evaluate(root="/nowhere")


def test_fit_takes_a_column_for_each_class(frame: pd.DataFrame, tmp_path: Path) -> None:
    names = ["MEL", "NEV", "BCC"]
    frame = frame[frame["diagnostic"].isin(names)]
    table = frame.assign(**{name: frame["diagnostic"] == name for name in names})
    arguments = {"image": "photo", "group": "patient_id", "metadata": ["age"], "malignant": ["MEL", "BCC"]}
    quick = {"model__method": "metadata_only", "image__size": 32, "training__epochs": 1, "evaluation__bootstrap": 20}
    run = dualrefnet.fit(table, label=names, out=tmp_path / "run", **arguments, **quick)
    assert run.model["classes"] == names
    assert dict(zip(run.split["image_id"] + ".png", run.split["label"], strict=True)) == dict(
        zip(frame["img_id"], frame["diagnostic"], strict=True)
    )
    table.loc[table.index[0], names] = True
    with pytest.raises(DataError, match="don't have exactly one label"):
        dualrefnet.fit(table, label=names, out=tmp_path / "wrong", **arguments, **quick)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metadata": ["biopsed"]}, "biopsed"),
        ({"metadata": ["patient_id"]}, "identifies"),
        ({"metadata": "shoe_size"}, "no column shoe_size"),
        ({"label": "truth"}, "no column truth"),
        ({"image": "broken"}, "2 rows of the table name no image"),
        ({"image": 7}, "no column 7"),
        ({"metadata": ["twice"]}, "several columns called twice"),
        ({"label": "one"}, "one class"),
        ({"label": "rare"}, "class rare has 1 "),
    ],
)
def test_columns_that_cannot_be_used_are_refused(frame: pd.DataFrame, tmp_path: Path, change: dict, words: str) -> None:
    broken = frame["photo"].astype(object).where(frame.index > 1, [None, np.nan] * (len(frame) // 2))
    rare = np.where(frame.index == 0, "rare", frame["diagnostic"])
    table = pd.concat(
        [frame.assign(broken=broken, twice=1, one="same", rare=rare), frame[["age"]].set_axis(["twice"], axis=1)],
        axis=1,
    )
    arguments = {"image": "photo", "label": "diagnostic", "metadata": ["age"], **change}
    with pytest.raises(DualRefNetError, match=words):
        dualrefnet.fit(table, out=tmp_path / "mine", **arguments)
    assert not (tmp_path / "mine").exists()
