import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from dualrefnet.cli import app, runs  # noqa: F401 (the module registers the commands)
from dualrefnet.errors import RunError
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
def table(sample_root: Path, tmp_path: Path) -> Path:
    """A table of 43 rows, three of which can't be predicted."""
    photographs = sorted((sample_root / "images").iterdir())[:40]
    (tmp_path / "broken.png").write_text("no picture")
    rows = [{"image": str(path), "age": 20 + number, "region": "FACE"} for number, path in enumerate(photographs)]
    rows[7]["age"] = "old"
    rows[11]["image"] = "broken.png"
    rows.append({"image": "", "age": 5, "region": ""})
    rows += [{"image": str(photographs[0]), "age": "", "region": ""}] * 2
    path = tmp_path / "table.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_ray_writes_the_same_file_as_this_machine(
    tiny_run: Run, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two batches a task, so that there are several tasks and an end that isn't whole.
    monkeypatch.setattr("dualrefnet.deploy.ray_batch.BATCHES_A_TASK", 2)
    common = ("predict", tiny_run.path, "--csv", table, "--batch", "4")
    here = call(*common, "--out", tmp_path / "here.csv")
    assert here.exit_code == 0, here.output
    there = call(*common, "--out", tmp_path / "there.csv", "--ray", "local")
    assert there.exit_code == 0, there.output
    assert there.output.split(":")[0] == "40 rows classified, 3 not, for the reason in their column error"
    one, other = (pd.read_csv(tmp_path / name, keep_default_na=False) for name in ("here.csv", "there.csv"))
    # Other threads may add in another order, so the last of six digits may differ.
    numbers = [name for name in one.columns if name.startswith("prob_")] + ["malignancy", "out_of_scope"]
    pd.testing.assert_frame_equal(one.drop(columns=numbers), other.drop(columns=numbers))
    for name in numbers:
        close = 2e-3 if name == "out_of_scope" else 2e-6
        good = one[name] != ""
        assert (good == (other[name] != "")).all()
        assert one.loc[good, name].astype(float).tolist() == pytest.approx(
            other.loc[good, name].astype(float).tolist(), abs=close
        )
    assert sorted(path.name for path in tmp_path.glob("there.csv*")) == ["there.csv"]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_what_one_machine_left_ray_goes_on_with(
    tiny_run: Run, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualrefnet.deploy.ray_batch.BATCHES_A_TASK", 2)
    common = ("predict", tiny_run.path, "--csv", table, "--batch", "4", "--out", tmp_path / "out.csv")
    from dualrefnet.deploy import batch

    classify, seen = batch._classify, []

    def stop_after_three(*arguments):
        seen.append(1)
        if len(seen) > 3:
            raise KeyboardInterrupt
        return classify(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_classify", stop_after_three)
        stopped = call(*common)
    assert "the same command with --resume goes on" in str(stopped.exception)
    done = call(*common, "--resume", "--ray", "local")
    assert done.exit_code == 0, done.output
    assert "(12 of these rows were there before)" in done.output
    rows = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    assert rows["image"].tolist()[:-3] == pd.read_csv(table, keep_default_na=False)["image"].tolist()[:-3]
    assert len(rows) == 43


@pytest.mark.usefixtures("local_ray")
def test_what_ray_cannot_do_is_said_in_words(tiny_run: Run, table: Path, tmp_path: Path) -> None:
    common = ("predict", tiny_run.path, "--csv", table, "--out", tmp_path / "out.csv", "--ray", "local")
    greedy = call(*common, "--workers", "1000")
    assert isinstance(greedy.exception, RunError)
    assert "1000 CPUs and the cluster has 2 CPUs" in str(greedy.exception)
    gpu = call(*common, "--resume", "--device", "cuda")
    assert "since this has changed: device" in str(gpu.exception)
    assert not (tmp_path / "out.csv.cases").exists()
    assert not (tmp_path / "out.csv").exists()


def test_ray_is_not_imported_unless_asked() -> None:
    code = (
        "import sys, dualrefnet.cli.runs, dualrefnet.deploy.batch, dualrefnet.deploy.batch; print('ray' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_without_ray_the_error_names_the_extra(
    tiny_run: Run, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "dualrefnet.deploy.ray_batch", raising=False)
    result = call("predict", tiny_run.path, "--csv", table, "--out", tmp_path / "out.csv", "--ray", "local")
    assert "pip install 'dualrefnet[scale]'" in str(result.exception)
