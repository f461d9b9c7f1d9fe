import math
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from dualrefnet.errors import DependencyError, RunError
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.run import Run
from dualrefnet.training.tracking import Tracker, flat_metrics, require_tracker
from dualrefnet.training.train import train_recipe

FAST = {"model.method": "metadata_only", "training.epochs": 2}


class Recorded(GeneralTracker):
    """A tracker that keeps what it is told."""

    requires_logging_directory = False
    told: list[tuple[str, Any, int | None]] = []
    fails: set[str] = set()

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self._tell("start", {"project": project, **options})

    @property
    def tracker(self) -> None:
        return None

    def _tell(self, what: str, values: Any, step: int | None = None) -> None:
        if what in self.fails:
            raise ConnectionError(f"no answer to {what}")
        self.told.append((what, values, step))

    def store_init_configuration(self, values: dict) -> None:
        self._tell("config", values)

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self._tell("log", values, step)

    def log_table(self, name: str, columns: list, data: list, step: int) -> None:
        self._tell("table", (name, columns, data), step)

    def log_images(self, values: dict, step: int) -> None:
        self._tell("images", values, step)

    def log_figure(self, figure: Any, name: str) -> None:
        self._tell("figure", name)

    def log_artifact(self, path: str) -> None:
        self._tell("artifact", path)

    def finish(self) -> None:
        self._tell("finish", None)


@pytest.fixture(params=["mlflow", "wandb"])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name under which accelerate finds a tracker that keeps what it is told."""
    name = str(request.param)
    fake = type("Fake", (Recorded,), {"name": name, "told": Recorded.told, "fails": Recorded.fails})
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, fake)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType(name)])
    Recorded.told.clear()
    Recorded.fails.clear()
    return name


def test_a_tracker_gets_recipe_epochs_metrics_and_figures(recorded: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = train_recipe(load_recipe(tiny_recipe, {**FAST, "training.tracker": recorded}), tmp_path / "run")
    kinds = [what for what, _, _ in Recorded.told]
    table = ["table", "images", "images"] if recorded == "wandb" else ["artifact", "figure", "figure"]
    assert kinds == ["start", "config", "log", "log", "log", *table, "finish"]
    start, config, first, second, last = (values for _, values, _ in Recorded.told[:5])
    assert start["project"] == "dualrefnet"
    assert config["training.epochs"] == 2
    assert config["loss.class_weights"] == run.recipe.loss.class_weights
    assert [step for _, _, step in Recorded.told[2:5]] == [1, 2, 2]
    for row, logged in zip(run.history.to_dict("records"), (first, second), strict=True):
        assert logged["val_balanced_accuracy"] == pytest.approx(row["val_balanced_accuracy"])
    assert last["test/balanced_accuracy"] == run.metrics["balanced_accuracy"]
    assert last["test/balanced_accuracy_ci95/low"] == run.metrics["balanced_accuracy_ci95"][0]
    assert last["validation/accuracy"] == run.metrics["validation"]["accuracy"]
    if recorded == "wandb":
        _, columns, rows = Recorded.told[5][1]
        assert columns == ["true", *run.model["classes"]]
        assert [row[1:] for row in rows] == run.metrics["confusion_matrix"]
        (image,) = Recorded.told[6][1]["test/roc"]
        assert image.shape[2] == 3


def test_a_tracker_that_fails_ends_no_training_but_one_that_never_starts_does(
    recorded: str, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(tiny_recipe, {**FAST, "training.epochs": 1, "training.tracker": recorded})
    Recorded.fails.add("log")
    assert train_recipe(recipe, tmp_path / "run").finished
    assert capsys.readouterr().err.count(f"the tracker {recorded} didn't take") == 2
    Recorded.fails.add("start")
    with pytest.raises(RunError, match=rf"tracker={recorded} doesn't start \(no answer to start\): "):
        train_recipe(recipe, tmp_path / "other")


def test_tensorboard_has_scalars_table_and_figures(tiny_recipe: Recipe, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train_recipe(load_recipe(tiny_recipe, {**FAST, "training.tracker": "tensorboard"}), tmp_path / "run")
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"test/roc", "test/precision_recall"} <= set(tags["images"])
    assert "test/confusion_matrix/text_summary" in tags["tensors"]
    assert [event.step for event in events.Scalars("val_loss")] == [1, 2]
    value = events.Scalars("test/balanced_accuracy")[-1].value
    assert value == pytest.approx(run.metrics["balanced_accuracy"], abs=1e-6)


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_computed(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "mlflow", "wandb"):
        monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
        with pytest.raises(DependencyError, match=f"pip install {name}"):
            train_recipe(load_recipe(tiny_recipe, {"training.tracker": name}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    require_tracker("none")


def test_flat_metrics_are_numbers_with_names_that_every_tracker_takes() -> None:
    metrics = {
        "accuracy": 0.5,
        "auc": None,
        "drawn": True,
        "dataset": "x",
        "ci95": [0.25, 0.75],
        "confusion_matrix": [[1, 2], [3, 4]],
        "per_class": {"a.b (é)": {"support": 3, "auc": math.nan}},
        "validation": {"accuracy": 0.75},
    }
    assert dict(flat_metrics(metrics)) == {
        "test/accuracy": 0.5,
        "test/ci95/low": 0.25,
        "test/ci95/high": 0.75,
        "test/per_class/a_b _é_/support": 3,
        "validation/accuracy": 0.75,
    }


def test_without_a_tracker_nothing_is_logged(tiny_run: Run) -> None:
    with Tracker(tiny_run) as tracker:
        tracker.log({"val_loss": 1.0}, 1)
        tracker.log_result()
    assert not (tiny_run.path / "tensorboard").exists()
