import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from dualrefnet.errors import RunError
from dualrefnet.run import Run
from dualrefnet.suite.grid import Block, Suite, Variant
from dualrefnet.suite.runner import run_suite

QUICK = {
    "model.method": "metadata_only",
    "image.size": 32,
    "training.epochs": 1,
    "training.device": "cpu",
    "evaluation.bootstrap": 0,
}


def suite_of(root: Path, **variants: dict) -> Suite:
    chosen = [Variant(name=name, set=values) for name, values in variants.items()]
    return Suite(
        name="s", title="S", grid=[Block(recipe="sample", set={"data.root": str(root), **QUICK}, variants=chosen)]
    )


def run_of(name: str) -> str:
    return f"sample-metadata_only-efficientnet_lite0-{name}-fold0-seed0"


def test_ray_does_the_runs_and_a_failed_or_killed_one_fails_alone(sample_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray isn't installed (extra `scale`)")
    out = tmp_path / "out"
    suite = suite_of(
        sample_root,
        endless={"training.epochs": 100_000},
        diverges={
            "training.learning_rate": 1e30,
            "training.optimizer": "sgd",
            "training.schedule": "constant",
            "training.epochs": 3,
        },
        good={},
        last={"metadata.tier": "M1"},
    )
    killed: list[int] = []

    def kill_the_endless() -> None:
        log, checkpoint = (
            out / "logs" / f"{run_of('endless')}.log",
            out / "runs" / run_of("endless") / "checkpoint.safetensors",
        )
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        killed.append(int(re.findall(r"process (\d+) on", log.read_text())[-1]))
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
    assert "learning_rate" in json.loads((out / "failures" / f"{run_of('diverges')}.json").read_text())["error"]
    assert "epoch   1/1" in (out / "logs" / f"{run_of('good')}.log").read_text()
    # The folder is the same whoever does the runs: here the next call, on this machine, finds two of four done.
    with pytest.raises(RunError, match="there, 2 now"):
        run_suite(suite_of(sample_root, endless={"training.epochs": 2}), out)


def test_too_few_cpus_and_a_missing_cluster_are_clear_errors(sample_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray isn't installed (extra `scale`)")
    with pytest.raises(RunError, match="give fewer --cores"):
        run_suite(suite_of(sample_root, good={}), tmp_path / "out", ray_address="local", cores=10_000)


def test_without_ray_the_error_names_the_extra(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"pip install 'dualrefnet\[scale\]'"):
        run_suite(suite_of(sample_root, good={}), tmp_path / "out", ray_address="auto")
    assert not (tmp_path / "out").exists()
