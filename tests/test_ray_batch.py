import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from dualrefnet.cli import app, runs  # noqa: F401 (the module registers the commands)
from dualrefnet.deploy import batch
from dualrefnet.errors import RunError, install_hint
from dualrefnet.run import Run


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for all tests here: starting one takes seconds."""
    ray = pytest.importorskip("ray", reason="Ray isn't installed (extra `scale`)")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
def table(sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of 43 rows, three of which can't be predicted; several chunks and an incomplete last one."""
    monkeypatch.setattr(batch, "CHUNK", 2)
    images = sorted((sample_root / "images").iterdir())[:40]
    (tmp_path / "broken.png").write_text("no image")
    rows: list[dict[str, Any]] = [{"image": str(path), "age": 20, "region": "FACE"} for path in images]
    rows[7]["age"], rows[11]["image"] = "old", "broken.png"
    rows += [{"image": "", "age": 5, "region": ""}] + [{"image": str(images[0]), "age": "", "region": ""}] * 2
    path = tmp_path / "table.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_ray_writes_the_same_file_and_goes_on_with_what_one_machine_left(
    tiny_run: Run, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("predict", tiny_run.path, "--csv", table, "--batch", "4")
    here = call(*common, "--out", tmp_path / "here.csv")
    assert here.exit_code == 0, here.output
    classify, calls = batch._classify, []

    def stop_after_six(*arguments: Any) -> bytes:
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return classify(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_classify", stop_after_six)
        stopped = call(*common, "--out", tmp_path / "there.csv")
    assert "the same command with --resume goes on" in str(stopped.exception)
    there = call(*common, "--out", tmp_path / "there.csv", "--ray", "local", "--resume")
    assert there.exit_code == 0, there.output
    assert "40 rows classified, 3 not" in there.output
    assert "24 of these rows" in there.output
    one, other = (pd.read_csv(tmp_path / name, keep_default_na=False) for name in ("here.csv", "there.csv"))
    # Other threads may add in another order, so the last digit may differ.
    numbers = [name for name in one.columns if name.startswith("prob_")] + ["malignancy", "out_of_scope"]
    pd.testing.assert_frame_equal(one.drop(columns=numbers), other.drop(columns=numbers))
    for name in numbers:
        first, second = (pd.to_numeric(frame[name]) for frame in (one, other))
        pd.testing.assert_series_equal(first, second, atol=2e-3 if name == "out_of_scope" else 2e-6, rtol=0)
    assert sorted(path.name for path in tmp_path.glob("there.csv*")) == ["there.csv"]


@pytest.mark.usefixtures("local_ray")
def test_a_cluster_that_is_too_small_is_an_error(tiny_run: Run, table: Path, tmp_path: Path) -> None:
    common = ("predict", tiny_run.path, "--csv", table, "--out", tmp_path / "out.csv", "--ray", "local")
    greedy = call(*common, "--workers", "1000")
    assert isinstance(greedy.exception, RunError)
    assert "1000 CPUs and the cluster has 2 CPUs" in str(greedy.exception)
    assert "since this has changed: device" in str(call(*common, "--resume", "--device", "cuda").exception)
    assert not (tmp_path / "out.csv").exists()


def test_ray_is_imported_only_with_the_option_and_its_extra_is_named(
    tiny_run: Run, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys, dualrefnet.cli.runs, dualrefnet.deploy.batch; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "dualrefnet.deploy.ray_batch", raising=False)
    result = call("predict", tiny_run.path, "--csv", table, "--out", tmp_path / "out.csv", "--ray", "local")
    assert install_hint("scale") in str(result.exception)
