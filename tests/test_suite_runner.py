import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

from dualrefnet.errors import RunError
from dualrefnet.files import write_yaml
from dualrefnet.models.registry import METHODS
from dualrefnet.run import Run
from dualrefnet.suite.grid import (
    Block,
    Suite,
    Variant,
    expand,
    load_suite,
    override,
    shipped_suites,
    smoke,
    with_recipes,
)
from dualrefnet.suite.runner import Outcome, duration, run_suite, suite_lock
from dualrefnet.suite.tables import write_tables

# Seconds a run: the metadata alone, though the rows are those of the image methods.
QUICK = {
    "model.method": "metadata_only",
    "image.size": 32,
    "training.epochs": 1,
    "training.device": "cpu",
    "evaluation.bootstrap": 0,
}
# A run that is still at it when somebody comes to stop it.
ENDLESS = {"training.epochs": 100_000}


def suite_of(root: Path, **variants: dict) -> Suite:
    chosen = [Variant(name=name.replace("_", " "), set=values) for name, values in variants.items()]
    return Suite(
        name="s", title="S", grid=[Block(recipe="sample", set={"data.root": str(root), **QUICK}, variants=chosen)]
    )


def run_of(name: str) -> str:
    return f"sample-metadata_only-efficientnet_lite0-{name}-fold0-seed0"


def start(suite: Suite, folder: Path, *arguments: str) -> subprocess.Popen:
    """Run the real program on a suite in the folder `folder/out`."""
    write_yaml(folder / "suite.yaml", suite.model_dump(mode="json"))
    command = [
        sys.executable,
        "-m",
        "dualrefnet",
        "suite",
        str(folder / "suite.yaml"),
        "--out",
        str(folder / "out"),
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def until(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited for two minutes"
        time.sleep(0.05)


def trains(folder: Path, name: str) -> bool:
    return (folder / "out" / "runs" / run_of(name) / "checkpoint.safetensors").is_file()


def worker_of(folder: Path, name: str) -> int:
    """Return the process that a run's log names last."""
    return int(re.findall(r"process (\d+) on", (folder / "out" / "logs" / f"{run_of(name)}.log").read_text())[-1])


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def mixed(sample_root: Path) -> Suite:
    """Runs that succeed, two that can't, each for a reason of its own, and one without data."""
    return suite_of(
        sample_root,
        good={},
        same={},
        diverges={
            "training.learning_rate": 1e30,
            "training.optimizer": "sgd",
            "training.schedule": "constant",
            "training.epochs": 3,
        },
        wrong_device={"training.device": "mps"},
        no_data={"data.root": str(sample_root / "nowhere")},
        last={"metadata.tier": "M1"},
    )


@pytest.fixture(scope="module")
def first(mixed: Suite, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The folder and outcome of a first call on `mixed`."""
    out = tmp_path_factory.mktemp("suite") / "out"
    return out, run_suite(mixed, out, workers=2)


def test_a_failed_run_is_written_down_and_the_others_go_on(mixed: Suite, first: tuple[Path, Outcome]) -> None:
    out, outcome = first
    assert (outcome.total, outcome.skipped) == (5, 0)
    assert sorted(outcome.finished) == [run_of("good"), run_of("last")]
    assert {name: failure.kind for name, failure in outcome.failed.items()} == {
        run_of("diverges"): "RunError",
        run_of("wrong-device"): "RunError",
        run_of("no-data"): "DataError",
    }
    for name, words in (
        ("diverges", "learning_rate"),
        ("wrong-device", "training.device"),
        ("no-data", "there is no folder"),
    ):
        written = json.loads((out / "failures" / f"{run_of(name)}.json").read_text())
        assert written.keys() == {"error", "kind", "log"}
        assert words in written["error"]
        assert "\n" not in written["error"]
    assert "error: " in (out / "logs" / f"{run_of('diverges')}.log").read_text()
    assert "epoch   1/1" in (out / "logs" / f"{run_of('good')}.log").read_text()


def test_the_folder_says_what_it_holds(mixed: Suite, first: tuple[Path, Outcome]) -> None:
    out, _ = first
    cells = pd.read_csv(out / "cells.csv", keep_default_na=False)
    assert list(cells.columns) == [
        "cell",
        "run",
        "dataset",
        "protocol",
        "method",
        "backbone",
        "variant",
        "fold",
        "seed",
    ]
    assert list(cells["cell"]) == [cell.name for cell in expand(mixed)]
    assert list(cells["run"])[:2] == [run_of("good"), run_of("good")]
    assert {path.name for path in (out / "runs").iterdir()} >= {run_of("good"), run_of("last")}
    assert not (out / "runs" / run_of("same")).exists(), "cells with equal recipes are trained once"
    assert Run(out / "runs" / run_of("good")).finished


def test_the_next_call_skips_the_finished_and_tries_the_failed(
    mixed: Suite, first: tuple[Path, Outcome], capfd
) -> None:
    out, _ = first
    written = Run(out / "runs" / run_of("good")).weights_file.stat().st_mtime_ns
    (out / "failures" / f"{run_of('good')}.json").write_text("{}")
    outcome = run_suite(mixed, out, workers=2)
    assert (outcome.skipped, outcome.finished, len(outcome.failed)) == (2, [], 3)
    assert Run(out / "runs" / run_of("good")).weights_file.stat().st_mtime_ns == written
    assert "2 of 5 runs are finished already" in capfd.readouterr().err
    assert not (out / "failures" / f"{run_of('good')}.json").exists(), "a failure of a run that is finished is no more"
    logs = [(out / "logs" / f"{run_of(name)}.log").read_text().count("--- ") for name in ("good", "diverges")]
    assert logs == [1, 2]


def test_models_can_be_discarded_and_the_runs_stay_finished(sample_root: Path, tmp_path: Path) -> None:
    suite = suite_of(sample_root, good={})
    outcome = run_suite(suite, tmp_path / "out", keep_models=False)
    run = Run(tmp_path / "out" / "runs" / outcome.finished[0])
    assert not run.weights_file.exists()
    assert run.finished
    assert len(run.predictions) > 0
    assert run_suite(suite, tmp_path / "out", keep_models=False).skipped == 1


def test_another_suite_in_the_folder_is_refused(mixed: Suite, first: tuple[Path, Outcome], tmp_path: Path) -> None:
    out, _ = first
    with pytest.raises(RunError, match=r"grid\.0\.set\.training\.epochs: 1 there, 2 now"):
        run_suite(override(mixed, {"training.epochs": 2}), out)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="isn't a suite folder"):
        run_suite(mixed, tmp_path)
    with pytest.raises(RunError, match="is a file"):
        run_suite(mixed, tmp_path / "notes.txt")


def test_a_second_call_is_locked_out(mixed: Suite, tmp_path: Path) -> None:
    with (
        suite_lock(tmp_path),
        pytest.raises(RunError, match=rf"in use by another `dualrefnet suite` \(process {os.getpid()} on"),
    ):
        run_suite(mixed, tmp_path)
    assert not (tmp_path / "suite.yaml").exists()


@pytest.mark.slow
def test_a_killed_worker_fails_its_run_alone_and_a_second_call_is_locked_out(sample_root: Path, tmp_path: Path) -> None:
    suite = suite_of(sample_root, endless=ENDLESS, good={})
    process = start(suite, tmp_path)
    until(lambda: trains(tmp_path, "endless"), process)
    with pytest.raises(RunError, match=rf"in use by another `dualrefnet suite` \(process {process.pid} on"):
        run_suite(suite, tmp_path / "out")
    os.kill(worker_of(tmp_path, "endless"), signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert (
        f"failed: {run_of('endless')}: its process was ended by SIGKILL; most often the system was out of memory"
        in output
    )
    assert "2; 1 finished, 0 were finished before, 1 failed" in output
    assert Run(tmp_path / "out" / "runs" / run_of("good")).finished
    assert json.loads((tmp_path / "out" / "failures" / f"{run_of('endless')}.json").read_text())["kind"] == "WorkerDied"


@pytest.mark.slow
def test_no_worker_outlives_its_parent_and_the_same_command_goes_on(sample_root: Path, tmp_path: Path) -> None:
    suite = suite_of(sample_root, long={"training.epochs": 30})
    run = Run(tmp_path / "out" / "runs" / run_of("long"))
    process = start(suite, tmp_path)
    until(lambda: trains(tmp_path, "long"), process)
    worker = worker_of(tmp_path, "long")
    process.kill()
    process.communicate()
    until(lambda: is_gone(worker))
    before = run.checkpoint_file.stat().st_mtime_ns
    process = start(suite, tmp_path)
    until(lambda: run.checkpoint_file.stat().st_mtime_ns > before, process)
    worker = worker_of(tmp_path, "long")
    # As the terminal does: Ctrl-C reaches the workers too.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    assert is_gone(worker)
    assert not run.finished
    outcome = run_suite(suite, tmp_path / "out")
    assert outcome.finished == [run_of("long")]
    log = (tmp_path / "out" / "logs" / f"{run_of('long')}.log").read_text()
    assert log.count("resumed after epoch") == 2
    assert "Traceback" not in log
    assert list(run.history["epoch"]) == list(range(1, 31))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_at_any_moment_and_the_same_command_gives_the_same_runs(
    workers: int, sample_root: Path, tmp_path: Path
) -> None:
    values = {"training.epochs": 40}
    suite = suite_of(sample_root, a=values, b={**values, "metadata.tier": "M1"}, c={**values, "model.dropout": 0.3})
    undisturbed = run_suite(suite, tmp_path / "undisturbed")
    assert len(undisturbed.finished) == 3
    for delay in (0.0, 1.0, 3.0, 6.0, 9.0, 13.0, 18.0):
        process = start(suite, tmp_path, "--workers", str(workers))
        time.sleep(delay)
        process.kill()
        process.communicate()
    last = start(suite, tmp_path, "--workers", str(workers))
    _, errors = last.communicate(timeout=400)
    assert last.returncode == 0, errors
    runs = {path.name for path in (tmp_path / "out" / "runs").iterdir()}
    assert runs == set(undisturbed.finished)
    for name in runs:
        one, other = Run(tmp_path / "undisturbed" / "runs" / name), Run(tmp_path / "out" / "runs" / name)
        assert one.metrics == other.metrics
        first, second = load_file(one.weights_file), load_file(other.weights_file)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert {path.name for path in one.path.iterdir()} == {path.name for path in other.path.iterdir()}
    assert not list((tmp_path / "out").glob("failures/*"))


@pytest.mark.slow
def test_leftovers_of_a_kill_don_t_stop_a_run(sample_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "runs" / run_of("good")
    # As a kill leaves it in the middle of the first write of a run.
    write_yaml(tmp_path / "out" / "suite.yaml", with_recipes(suite_of(sample_root, good={})).model_dump(mode="json"))
    folder.mkdir(parents=True)
    (folder / ".recipe.yaml.abc.partial").write_text("na")
    outcome = run_suite(suite_of(sample_root, good={}), tmp_path / "out")
    assert outcome.finished == [run_of("good")]
    assert not list(folder.glob(".*"))


def test_splits_are_written_without_any_training(tmp_path: Path) -> None:
    small, _ = smoke(load_suite("table1"), tmp_path / "out" / "data")
    outcome = run_suite(small, tmp_path / "out")
    assert outcome.total == 0
    rows = pd.read_csv(tmp_path / "out" / "splits" / "sample-grouped.csv")
    assert list(rows.columns) == ["image_id", "patient_id", "label", "split"]
    assert len(rows) == 120
    assert (rows.groupby("patient_id")["split"].nunique() == 1).all()


@pytest.mark.slow
def test_a_smoke_test_really_runs(tmp_path: Path) -> None:
    small = override(smoke(load_suite("table2"), tmp_path / "out" / "data")[0], {"training.device": "cpu"})
    outcome = run_suite(small, tmp_path / "out")
    assert outcome.finished == ["sample-dualrefnet-mobilenet_v2-fold0-seed0"]
    assert Run(tmp_path / "out" / "runs" / outcome.finished[0]).metrics["drawn"] is True
    drawn = (tmp_path / "out" / "data" / "metadata.csv").stat().st_mtime_ns
    assert run_suite(small, tmp_path / "out").skipped == 1
    assert (tmp_path / "out" / "data" / "metadata.csv").stat().st_mtime_ns == drawn


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_suites() if name not in ("table1", "table2")])
def test_the_smoke_test_of_every_suite_trains_and_makes_its_tables(name: str, tmp_path: Path) -> None:
    small, _ = smoke(load_suite(name), tmp_path / "out" / "data")
    small = override(small, {"training.device": "cpu"})
    outcome = run_suite(small, tmp_path / "out", workers=2)
    assert not outcome.failed
    assert len(outcome.finished) == len({cell.run for cell in expand(small)})
    methods = {Run(tmp_path / "out" / "runs" / run).metrics["method"] for run in outcome.finished}
    if name == "table3a":
        assert methods == {"no_metadata", "concat", "metanet", "metablock", "visual", "auxnet", "dualrefnet"}
    write_tables(tmp_path / "out")
    page = (tmp_path / "out" / "tables" / "table.md").read_text(encoding="utf-8")
    assert "drawn data, not clinical" in page
    assert "INCOMPLETE" not in page
    assert small.rows == "variant" or all(METHODS[method].title in page for method in methods)


def test_times_are_told_as_a_person_would() -> None:
    assert [duration(seconds) for seconds in (0, 45.2, 99, 120, 5000, 7000)] == [
        "0 s",
        "45 s",
        "99 s",
        "2 min",
        "83 min",
        "1 h 57 min",
    ]
