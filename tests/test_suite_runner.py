import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

from dualrefnet.errors import DependencyError, RunError, install_hint
from dualrefnet.files import write_yaml
from dualrefnet.run import Run
from dualrefnet.suite.grid import Block, Suite, Variant, expand, load_suite, override, shipped_suites, smoke
from dualrefnet.suite.runner import Outcome, run_suite
from dualrefnet.suite.tables import write_tables

# Seconds per run: the metadata alone, though the rows are those of the image methods.
QUICK = {
    "model.method": "metadata_only",
    "image.size": 32,
    "training.epochs": 1,
    "training.device": "cpu",
    "evaluation.bootstrap": 0,
}
# Still running when it is killed.
ENDLESS = {"training.epochs": 100_000}
DIVERGES = {
    "training.learning_rate": 1e30,
    "training.optimizer": "sgd",
    "training.schedule": "constant",
    "training.epochs": 3,
}


def suite_of(root: Path, **variants: dict) -> Suite:
    chosen = [Variant(name=name.replace("_", " "), set=values) for name, values in variants.items()]
    block = Block(recipe="sample", set={"data.root": str(root), **QUICK}, variants=chosen)
    return Suite(name="s", title="S", grid=[block])


def run_of(name: str) -> str:
    return f"sample-metadata_only-efficientnet_lite0-{name}-fold0-seed0"


def failure_of(out: Path, name: str) -> dict[str, str]:
    return json.loads((out / "failures" / f"{run_of(name)}.json").read_text())


def start(suite: Suite, folder: Path, *arguments: str) -> subprocess.Popen:
    """Run the real program on a suite in the folder `folder/out`."""
    file, out = folder / "suite.yaml", folder / "out"
    write_yaml(file, suite.model_dump(mode="json"))
    command = [sys.executable, "-m", "dualrefnet", "suite", str(file), "--out", str(out), *arguments]
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


def trains(out: Path, name: str) -> bool:
    return (out / "runs" / run_of(name) / "checkpoint.safetensors").is_file()


def worker_of(out: Path, name: str) -> int:
    """Return the process that a run's log names last."""
    return int(re.findall(r"process (\d+) on", (out / "logs" / f"{run_of(name)}.log").read_text())[-1])


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def mixed(sample_root: Path) -> Suite:
    """Runs that succeed, two that can't, each for a reason of its own, and one without data."""
    return suite_of(
        sample_root,
        good={},
        same={},
        diverges=DIVERGES,
        wrong_device={"training.device": "mps"},
        no_data={"data.root": str(sample_root / "nowhere")},
        last={"metadata.tier": "M1"},
    )


@pytest.fixture(scope="module")
def first(mixed: Suite, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The folder and outcome of a first call on `mixed`."""
    out = tmp_path_factory.mktemp("suite") / "out"
    return out, run_suite(mixed, out, workers=2)


def test_a_failed_run_is_recorded_and_the_others_go_on(mixed: Suite, first: tuple[Path, Outcome]) -> None:
    out, outcome = first
    assert (outcome.total, outcome.skipped) == (5, 0)
    assert sorted(outcome.finished) == [run_of("good"), run_of("last")]
    kinds = {"diverges": "RunError", "wrong-device": "RunError", "no-data": "DataError"}
    assert {name: failure.kind for name, failure in outcome.failed.items()} == {
        run_of(name): kind for name, kind in kinds.items()
    }
    for name, words in (("diverges", "learning_rate"), ("wrong-device", "training.device"), ("no-data", "nowhere")):
        failure = failure_of(out, name)
        assert failure.keys() == {"error", "kind", "log"}
        assert words in failure["error"]
        assert "\n" not in failure["error"]
    assert "error: " in (out / "logs" / f"{run_of('diverges')}.log").read_text()
    assert "epoch   1/1" in (out / "logs" / f"{run_of('good')}.log").read_text()
    cells = pd.read_csv(out / "cells.csv", keep_default_na=False)
    columns = "cell run dataset protocol method backbone variant fold seed"
    assert list(cells.columns) == columns.split()
    assert list(cells["cell"]) == [cell.name for cell in expand(mixed)]
    assert list(cells["run"])[:2] == [run_of("good"), run_of("good")]
    assert not (out / "runs" / run_of("same")).exists(), "cells with equal recipes are trained once"


def test_the_next_call_skips_the_finished_and_tries_the_failed(mixed: Suite, first: tuple[Path, Outcome]) -> None:
    out, _ = first
    written = Run(out / "runs" / run_of("good")).weights_file.stat().st_mtime_ns
    (out / "failures" / f"{run_of('good')}.json").write_text("{}")
    outcome = run_suite(mixed, out, workers=2)
    assert (outcome.skipped, outcome.finished, len(outcome.failed)) == (2, [], 3)
    assert Run(out / "runs" / run_of("good")).weights_file.stat().st_mtime_ns == written
    assert not (out / "failures" / f"{run_of('good')}.json").exists(), "a failure of a run that is finished is no more"
    logs = [(out / "logs" / f"{run_of(name)}.log").read_text().count("--- ") for name in ("good", "diverges")]
    assert logs == [1, 2]


def test_a_run_whose_files_are_damaged_isn_t_finished(mixed: Suite, first: tuple[Path, Outcome]) -> None:
    run = Run(first[0] / "runs" / run_of("last"))
    before = run.metrics
    run.metrics_file.write_text(run.metrics_file.read_text()[:300])
    outcome = run_suite(mixed, first[0])
    assert (outcome.skipped, outcome.finished) == (1, [run_of("last")])
    assert run.metrics == before


def test_another_suite_in_the_folder_is_refused(mixed: Suite, first: tuple[Path, Outcome], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"grid\.0\.set\.training\.epochs: 1 there, 2 now"):
        run_suite(override(mixed, {"training.epochs": 2}), first[0])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="isn't a suite folder"):
        run_suite(mixed, tmp_path)
    with pytest.raises(RunError, match="is a file"):
        run_suite(mixed, tmp_path / "notes.txt")


@pytest.mark.slow
def test_a_killed_worker_fails_its_run_alone_and_a_second_call_is_locked_out(sample_root: Path, tmp_path: Path) -> None:
    suite, out = suite_of(sample_root, endless=ENDLESS, good={}), tmp_path / "out"
    process = start(suite, tmp_path)
    until(lambda: trains(out, "endless"), process)
    with pytest.raises(RunError, match="in use by another `dualrefnet suite`"):
        run_suite(suite, out)
    os.kill(worker_of(out, "endless"), signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert f"failed: {run_of('endless')}: its process died" in output
    assert Run(out / "runs" / run_of("good")).finished
    assert failure_of(out, "endless")["kind"] == "WorkerDied"


@pytest.mark.slow
def test_no_worker_outlives_its_parent_and_the_same_command_goes_on(sample_root: Path, tmp_path: Path) -> None:
    # Long enough that it is still in training when the signal comes, on a busy machine too.
    suite, out = suite_of(sample_root, long={"training.epochs": 80}), tmp_path / "out"
    run = Run(out / "runs" / run_of("long"))
    process = start(suite, tmp_path)
    until(lambda: trains(out, "long"), process)
    worker = worker_of(out, "long")
    process.kill()
    process.communicate()
    until(lambda: is_gone(worker))
    before = run.checkpoint_file.stat().st_mtime_ns
    process = start(suite, tmp_path)
    until(lambda: run.checkpoint_file.stat().st_mtime_ns > before, process)
    worker = worker_of(out, "long")
    # As the terminal does: Ctrl-C reaches the workers too.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    assert is_gone(worker)
    assert not run.finished
    assert run_suite(suite, out).finished == [run_of("long")]
    log = (out / "logs" / f"{run_of('long')}.log").read_text()
    assert log.count("resumed after epoch") == 2
    assert "Traceback" not in log
    assert list(run.history["epoch"]) == list(range(1, 81))


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
    assert {path.name for path in (tmp_path / "out" / "runs").iterdir()} == set(undisturbed.finished)
    for name in undisturbed.finished:
        one, other = Run(tmp_path / "undisturbed" / "runs" / name), Run(tmp_path / "out" / "runs" / name)
        assert one.metrics == other.metrics
        first, second = load_file(one.weights_file), load_file(other.weights_file)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert {path.name for path in one.path.iterdir()} == {path.name for path in other.path.iterdir()}
    assert not list((tmp_path / "out").glob("failures/*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_suites() if name != "table1"])
def test_the_smoke_test_of_every_suite_trains_and_makes_its_tables(name: str, tmp_path: Path) -> None:
    small, _ = smoke(load_suite(name), tmp_path / "out" / "data")
    small = override(small, {"training.device": "cpu"})
    outcome = run_suite(small, tmp_path / "out", workers=2)
    assert not outcome.failed
    assert set(outcome.finished) == {cell.run for cell in expand(small)}
    assert all(Run(tmp_path / "out" / "runs" / run).metrics["drawn"] for run in outcome.finished)
    write_tables(tmp_path / "out")
    systems = pd.read_csv(tmp_path / "out" / "tables" / "systems.csv")
    assert set(systems["method"]) == {cell.key.method for cell in expand(small)}
    assert systems["flags"].str.contains("synthetic data, not clinical").all()
    assert not (tmp_path / "out" / "tables" / "missing.csv").exists()
    sample = (tmp_path / "out" / "data" / "metadata.csv").stat().st_mtime_ns
    assert run_suite(small, tmp_path / "out").skipped == outcome.total
    assert (tmp_path / "out" / "data" / "metadata.csv").stat().st_mtime_ns == sample


def test_ray_does_the_runs_and_a_failed_or_killed_one_fails_alone(sample_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray isn't installed (extra `scale`)")
    out = tmp_path / "out"
    suite = suite_of(sample_root, endless=ENDLESS, diverges=DIVERGES, good={}, last={"metadata.tier": "M1"})
    killed: list[int] = []

    def kill_the_endless() -> None:
        until(lambda: trains(out, "endless"))
        killed.append(worker_of(out, "endless"))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_the_endless)
    thread.start()
    outcome = run_suite(suite, out, ray_address="local")
    thread.join()
    assert killed
    assert killed[0] != os.getpid()
    assert sorted(outcome.finished) == [run_of("good"), run_of("last")]
    assert {name: failure.kind for name, failure in outcome.failed.items()} == {
        run_of("endless"): "WorkerCrashedError",
        run_of("diverges"): "RunError",
    }
    assert all(Run(out / "runs" / name).finished for name in outcome.finished)
    assert "learning_rate" in failure_of(out, "diverges")["error"]
    assert "epoch   1/1" in (out / "logs" / f"{run_of('good')}.log").read_text()


def test_too_few_cpus_and_a_missing_ray_are_clear_errors(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = suite_of(sample_root, good={})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(DependencyError, match=re.escape(install_hint("scale"))):
            run_suite(suite, tmp_path / "out", ray_address="auto")
    assert not (tmp_path / "out").exists()
    pytest.importorskip("ray", reason="Ray isn't installed (extra `scale`)")
    with pytest.raises(RunError, match="give fewer --cores"):
        run_suite(suite, tmp_path / "out", ray_address="local", cores=10_000)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_at_which_nobody_answers_is_an_error_in_time(scheme: str) -> None:
    pytest.importorskip("ray", reason="Ray isn't installed (extra `scale`)")
    program = "import sys; from dualrefnet import cluster; cluster.PATIENCE = 2; cluster.connect(sys.argv[1])"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
        result = subprocess.run([sys.executable, "-c", program, address], capture_output=True, text=True, timeout=60)
    assert f"RunError: no Ray cluster answers at {address} within 2 seconds" in result.stderr
