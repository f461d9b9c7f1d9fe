import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from dualrefnet.cli import app, data, deployment, main, print_findings, print_table, reports, runs  # noqa: F401 (they register the commands)
from dualrefnet.data.check import Finding
from dualrefnet.display.format import PrintedTable, text_rows
from dualrefnet.progress import note, warn
from dualrefnet.recipe import shipped_recipes
from dualrefnet.run import Run

COMMANDS = ["doctor", "demo", "sample", "fetch", "check", "split", "audit", "methods", "recipes", "prepare", "train"]
COMMANDS += ["evaluate", "probe", "predict", "suite", "suites", "tables", "explain", "report", "export", "serve"]


def call(*arguments: str | Path):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the program; return its one line of error."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["dualrefnet", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("·", "warning: "))]
        assert stopped.value.code == 2
        assert len(lines) == 1, lines
        return lines[0].removeprefix("error: ")

    return run


def test_every_command_has_help_and_the_list_of_commands_is_complete() -> None:
    output = call("--help").output
    for command in COMMANDS:
        assert command in output
        result = call(command, "--help")
        assert result.exit_code == 0
        assert len(result.output) > 200
    assert call("--version").output.strip().count(".") == 2


def test_recipes_are_listed_and_printed() -> None:
    listed = call("recipes").output
    assert all(name in listed for name in shipped_recipes())
    assert "protocol: grouped" in call("recipes", "pad_ufes_20").output


def test_sample_then_check_then_split(tmp_path: Path) -> None:
    root = tmp_path / "data"
    assert call("sample", root, "--images", "60").exit_code == 0
    checked = call("check", "sample", "--root", root, "--json", tmp_path / "check.json")
    assert checked.exit_code == 0, checked.output
    assert json.loads((tmp_path / "check.json").read_text())["findings"]
    split = call("split", "sample", "--root", root, "--out", tmp_path / "split.csv")
    assert split.exit_code == 0, split.output
    rows = pd.read_csv(tmp_path / "split.csv")
    assert list(rows.columns) == ["image_id", "patient_id", "label", "split"]
    assert len(rows) == 60
    assert (rows.groupby("patient_id")["split"].nunique() == 1).all()
    (root / "images" / f"{rows['image_id'][0]}.png").write_bytes(b"")
    assert call("check", "sample", "--root", root).exit_code == 1


def test_predict_writes_a_row_for_every_image_and_says_why_one_failed(
    tiny_run: Run, sample_root: Path, tmp_path: Path
) -> None:
    images = sorted((sample_root / "images").iterdir())[:3]
    broken = tmp_path / "broken.jpg"
    broken.write_text("this is text")
    raw = pd.read_csv(sample_root / "metadata.csv", dtype=str).rename(columns={"img_id": "image"})
    raw[["image", "age", "region"]].to_csv(tmp_path / "forms.csv", index=False)
    arguments = [argument for path in [*images, broken] for argument in ("--images", path)]
    result = call(
        "predict", tiny_run.path, *arguments, "--metadata", tmp_path / "forms.csv", "--out", tmp_path / "p.csv"
    )
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "p.csv")
    assert len(table) == 4
    assert table["error"].notna().tolist() == [False, False, False, True]
    probabilities = table.filter(like="prob_").iloc[:3]
    assert probabilities.sum(axis=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert "missing and imputed" in table["warnings"].iloc[0]


def test_evaluate_again_gives_the_same_measures(tiny_run: Run) -> None:
    before = tiny_run.metrics
    assert call("evaluate", tiny_run.path).exit_code == 0
    assert tiny_run.metrics == before


def test_bad_input_is_one_clear_line(
    tiny_run: Run, sample_root: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "recipe.yaml").write_text("name: x\ntraining: {epoch: 3}\n")
    image, out = next((sample_root / "images").iterdir()), ("--out", tmp_path / "o.csv")
    expected = {
        ("check", "pad_ufes_20", "--root", tmp_path / "nowhere"): "there is no folder",
        ("split", "pad_ufes", "--root", tmp_path): "no data set adapter is called",
        ("split", "sample", "--root", sample_root, "--protocol", "paper"): "the paper has no split",
        ("train", "pad_ufes"): "did you mean 'pad_ufes_20'",
        ("train", tmp_path / "recipe.yaml"): "did you mean 'epochs'",
        ("train", "sample", "training.epochs"): "isn't key=value",
        ("train", "sample", f"data.root={sample_root}", "model.backbone=resnet5", "--out", tmp_path / "r"): "resnet50",
        ("evaluate", sample_root): "isn't a run folder",
        ("predict", tiny_run.path, "--images", tmp_path / "nowhere.png", *out): "there is no file",
        ("predict", tiny_run.path, "--images", image, "--metadata", tmp_path / "empty.csv", *out): "is empty",
        ("predict", tiny_run.path, "--images", image, "--device", "meta", *out): "the device 'meta' can't be used",
        ("predict", tiny_run.path, "--images", image, "--device", "", *out): "the device '' can't be used",
        ("evaluate", tiny_run.path, "--cache", "/proc/x"): "can't be written",
        ("recipes", "[/x]"): "no recipe file [/x]",
        ("split", "sample", "--root", sample_root, "--fold", "3"): "--fold has no effect",
        ("report", tiny_run.path, "--without-explanations", "--class", "MEL"): "--class has no effect",
        ("fetch", "pad_ufes_20", "--root", tmp_path / "pad"): "--accept-licence",
        ("export", tiny_run.path, "--out", sample_root): "isn't a bundle",
    }
    for arguments, words in expected.items():
        assert words in error_of(*arguments), arguments
    assert not (tmp_path / "o.csv").exists()


def test_text_stands_on_the_terminal_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "width [/mm] [bold] :car: \\[x]"
    print_findings([Finding("WARN", "units", text, examples=(text,))])
    print_table(PrintedTable(text, ("class", text), text_rows([(text, text)]), (text,)))
    note(text)
    warn(text)
    shown = capsys.readouterr()
    assert (shown.out.count(text), shown.err.count(text)) == (7, 2)


def test_doctor_examines_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUALREFNET_DATA", raising=False)
    result = call("doctor")
    assert result.exit_code == 0, result.output
    for subject in ("Python", "libraries", "compute", "memory", "ImageNet weights here", "data", "cache"):
        assert subject in result.output
    monkeypatch.setenv("DUALREFNET_DATA", os.devnull)
    assert "dualrefnet fetch pad_ufes_20" in call("doctor").output
    for name in ("DUALREFNET_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("~no such user").expanduser())
    assert "set DUALREFNET_CACHE to a folder" in call("doctor").output


def test_what_a_terminal_cannot_show_ends_no_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dualrefnet"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "100"}
    done = subprocess.run([*command, "methods"], env=ascii_only, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    # The reader of a pipe that leaves early.
    script = f"{sys.executable} -m dualrefnet recipes | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_demo_ends_with_a_run_that_learned_something(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dualrefnet", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    metrics = Run(tmp_path / "demo" / "run").metrics
    assert metrics["drawn"] is True
    assert metrics["balanced_accuracy"] > 0.4, "chance is 1/6"
    assert "NOT CLINICAL" in done.stdout
