import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from dualrefnet.cli import app, runs  # noqa: F401 (registers the command)
from dualrefnet.errors import DependencyError, DualRefNetError
from dualrefnet.files import make_folder, write_csv, write_yaml
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.suite import tuning
from dualrefnet.suite.tuning import tune_recipe
from dualrefnet.training.workers import Event, Failure, Job

pytest.importorskip("optuna")

RANGES = {
    "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "model.hidden": {"low": 8, "high": 64},
    "model.metadata_widths": {"values": [[8], [16, 8]]},
}
Scores = Callable[[Recipe], float]


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    values = {"model.method": "metadata_only", "training.epochs": 1, "training.selection": "last", "data.folds": 3}
    return load_recipe(tiny_recipe, values | {"tune": RANGES})


def score(recipe: Recipe) -> float:
    """Best at a rate of .001 and many hidden units; another level for each fold."""
    return 0.5 - abs(recipe.training.learning_rate - 1e-3) * 40 + recipe.model.hidden / 1000 + recipe.data.fold / 100


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Job]]:
    """Replace trainings by what they would have left, with known scores; `after` ends the call before that job."""

    def install(scores: Scores = score, after: int | None = None) -> list[Job]:
        done: list[Job] = []

        def work(jobs: deque[Job], workers: int, ray_address: str | None) -> Iterator[Event]:
            while jobs:
                job = jobs.popleft()
                yield Event(job.run, ended=False)
                if after is not None and len(done) == after:
                    raise KeyboardInterrupt
                done.append(job)
                value = scores(job.recipe)
                failure = Failure("it has diverged", "RunError") if value < 0 else None
                row = {"epoch": 1, "train_classification": 1.0, "val_loss": 1.0, "val_accuracy": 0.5, "seconds": 1.0}
                write_csv(
                    make_folder(job.folder) / "history.csv", pd.DataFrame([row | {"val_balanced_accuracy": value}])
                )
                write_yaml(job.folder / "recipe.yaml", job.recipe.model_dump(mode="json"))
                yield Event(job.run, ended=True, failure=failure)

        monkeypatch.setattr(tuning, "work", work)
        return done

    return install


def test_trials_are_trained_on_every_fold_and_the_best_recipe_loads(
    recipe: Recipe, trained: Callable[..., list[Job]], tmp_path: Path
) -> None:
    done = trained()
    table = tune_recipe(recipe, tmp_path / "t", 12)
    assert list(table["trial"]) != sorted(table["trial"])
    assert table["score"].dropna().is_monotonic_decreasing
    assert set(table["state"]) == {"complete", "pruned"}
    assert all(not job.tested and job.recipe.data.protocol == "grouped-cv" for job in done)
    for number, folds in zip(table["trial"], table["folds"], strict=True):
        assert [job.recipe.data.fold for job in done if job.run.startswith(f"trial{number}-")] == list(range(folds))
    assert table.loc[table["state"] == "complete", "folds"].eq(3).all()
    assert table.loc[table["state"] == "pruned", "folds"].lt(3).all()
    best, first = load_recipe(tmp_path / "t" / "best.yaml"), table.iloc[0]
    assert best.training.learning_rate == first["training.learning_rate"]
    assert best.model.hidden == first["model.hidden"]
    assert best.model.metadata_widths in ((8,), (16, 8))
    assert first["score"] == pytest.approx(
        sum(score(load_recipe(best, {"data.protocol": "grouped-cv", "data.fold": fold})) for fold in range(3)) / 3
    )
    assert best.data == recipe.data
    assert not best.tune
    assert list(pd.read_csv(tmp_path / "t" / "trials.csv")["trial"]) == list(table["trial"])


def test_a_search_that_was_cut_short_anywhere_goes_on_to_the_same_trials(
    recipe: Recipe, trained: Callable[..., list[Job]], tmp_path: Path
) -> None:
    trained()
    whole = tune_recipe(recipe, tmp_path / "whole", 9)
    for after in (0, 4, 5):
        trained(after=after)
        with pytest.raises(KeyboardInterrupt):
            tune_recipe(recipe, tmp_path / str(after), 9)
        trained()
        pd.testing.assert_frame_equal(tune_recipe(recipe, tmp_path / str(after), 9), whole)
    # And further, several at a time.
    done = trained()
    assert len(tune_recipe(recipe, tmp_path / "whole", 12, jobs=3)) == 12
    assert {job.run.partition("-")[0] for job in done} == {"trial9", "trial10", "trial11"}


def test_a_trial_that_fails_is_said_and_the_others_go_on(
    recipe: Recipe, trained: Callable[..., list[Job]], tmp_path: Path
) -> None:
    trained(lambda one: -1.0 if one.training.learning_rate > 1e-3 else score(one))
    table = tune_recipe(recipe, tmp_path / "t", 8, folds=1)
    assert set(table["state"]) == {"complete", "fail"}
    assert set(table.loc[table["state"] == "fail", "error"]) == {"it has diverged"}
    assert load_recipe(tmp_path / "t" / "best.yaml").training.learning_rate <= 1e-3


def test_nothing_of_the_test_split_is_read(tiny_recipe: Recipe, sample_root: Path, tmp_path: Path) -> None:
    """Real trainings, with the test images there and without: the same scores and the same best recipe."""
    values = {"training.epochs": 1, "tune": {"training.learning_rate": RANGES["training.learning_rate"]}}
    tables = []
    for name in ("whole", "without"):
        root = Path(shutil.copytree(sample_root, tmp_path / name))
        recipe = load_recipe(tiny_recipe, values | {"data.root": str(root)})
        if name == "without":
            split = pd.read_csv(tmp_path / "t-whole" / "runs" / "trial0-fold0" / "split.csv")
            test = list(split.loc[split["split"] == "test", "image_id"])
            assert len(test) > 10
            for number, image in enumerate(test):
                (file,) = (root / "images").glob(f"{image}*")
                file.unlink() if number % 2 else file.write_bytes(b"no image")
        tables.append(tune_recipe(recipe, tmp_path / f"t-{name}", 2, folds=1))
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["score"].between(0, 1).all()
    left = {path.name for path in (tmp_path / "t-whole" / "runs").rglob("*")}
    assert "history.csv" in left
    assert not left & {
        "predictions.csv",
        "metrics.json",
        "calibration.json",
        "model.safetensors",
        "checkpoint.safetensors",
    }


@pytest.mark.parametrize(
    ("changes", "folds", "message"),
    [
        ({"tune": {}}, None, "names nothing to tune"),
        ({"tune": {"training.learning_rat": {"low": 1e-4, "high": 1}}}, None, "did you mean 'learning_rate'"),
        ({"tune": {"training.learning_rate": {"low": -1, "high": 1}}}, None, "training.learning_rate=-1.*greater than 0"),
        ({"tune": {"model.fusion": {"values": ["concat", "sum"]}}}, None, "model.fusion=sum"),
        ({"tune": {"data.split_seed": {"low": 0, "high": 9}}}, None, "can't be tuned"),
        ({"tune": {"training.epochs": {"low": 1.5, "high": 9}}}, None, "training.epochs=1.5"),
        ({"tune": {"training.nesterov": {"values": [True, False]}}}, None, "unknown key"),
        ({"data.protocol": "paper"}, None, "leaks"),
        ({"data.protocol": "cross-fitted"}, 1, "data.protocol=grouped"),
        ({"data.protocol": "all"}, None, "--folds 1"),
        ({}, 4, "--folds 4: data.folds is 3"),
    ],
)  # fmt: skip
def test_what_can_not_be_tuned_is_said_before_anything_is_trained(
    changes: dict[str, Any], folds: int | None, message: str, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(DualRefNetError, match=message):
        tune_recipe(load_recipe(recipe, changes), tmp_path / "t", 2, folds)
    assert not (tmp_path / "t").exists()


def test_a_folder_of_something_else_is_refused(
    recipe: Recipe, trained: Callable[..., list[Job]], tmp_path: Path
) -> None:
    trained()
    tune_recipe(recipe, tmp_path / "t", 1)
    with pytest.raises(DualRefNetError, match=r"another recipe or ranges \(training.epochs: 1 there, 2 now\)"):
        tune_recipe(load_recipe(recipe, {"training.epochs": 2}), tmp_path / "t", 1)
    with pytest.raises(DualRefNetError, match="begun with 3 folds, not 2"):
        tune_recipe(recipe, tmp_path / "t", 1, folds=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(DualRefNetError, match="isn't a tuning folder"):
        tune_recipe(recipe, tmp_path / "other", 1)


def test_without_optuna_the_extra_is_named(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DependencyError, match="tune"):
        tune_recipe(recipe, tmp_path / "t", 1)


def test_the_command_prints_the_trials_or_why_there_are_none(
    recipe: Recipe, trained: Callable[..., list[Job]], tmp_path: Path
) -> None:
    write_yaml(tmp_path / "own.yaml", recipe.model_dump(mode="json"))

    def call(*more: str) -> Any:
        return CliRunner().invoke(app, ["tune", str(tmp_path / "own.yaml"), "--trials", "2", "--out", *more])

    trained()
    result = call(str(tmp_path / "t"))
    assert result.exit_code == 0, result.output
    assert f"now: dualrefnet train {tmp_path / 't' / 'best.yaml'}" in result.output
    trained(lambda one: -1.0)
    result = call(str(tmp_path / "u"))
    assert isinstance(result.exception, DualRefNetError)
    assert "no trial was trained to its end" in str(result.exception)
