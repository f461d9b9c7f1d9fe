"""Damaged and edited run folders: every file is checked when it is read, in one line that names the file and the cure."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from dualrefnet.cli import app, deployment, reports, runs  # noqa: F401 (the modules register the commands)
from dualrefnet.deploy.network import run_parts
from dualrefnet.display.format import availability_line, availability_table, calibration_line, metrics_tables
from dualrefnet.errors import DualRefNetError, RunError
from dualrefnet.files import read_json, write_csv, write_json
from dualrefnet.report.performance import class_section, read_measured, summary_section
from dualrefnet.report.provenance import provenance_section, run_notes, run_title
from dualrefnet.run import Run, start_run
from dualrefnet.training.train import train_recipe

LEAVES = (None, "x", -1, 1e9, [], {}, True, float("nan"))


@pytest.fixture
def run(tiny_run: Run, tmp_path: Path) -> Run:
    """A copy that shares the files of the original: unlink a file before it is written."""
    return Run(Path(shutil.copytree(tiny_run.path, tmp_path / "run", copy_function=os.link)))


def rewrite(path: Path, content: str) -> None:
    path.unlink()
    path.write_text(content, encoding="utf-8")


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change keys, with __ between levels."""

    def edit(folder: Path) -> None:
        values = inner = read_json(folder / name)
        for key, value in changes.items():
            *places, last = key.split("__")
            for place in places:
                inner = inner[place]
            inner[last] = value
        write_json(folder / name, values)

    return edit


def edit_csv(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    return lambda folder: write_csv(folder / name, change(pd.read_csv(folder / name)))


def edit_recipe(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = yaml.safe_load((folder / "recipe.yaml").read_text())
        change(values)
        rewrite(folder / "recipe.yaml", yaml.safe_dump(values))

    return edit


def flip_a_weight(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 64
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(content)


DAMAGE = {
    "predictions.csv": [
        edit_csv("predictions.csv", lambda rows: rows.iloc[:0]),
        edit_csv("predictions.csv", lambda rows: rows.assign(label="nevus?")),
        edit_csv("predictions.csv", lambda rows: rows.drop(columns="prob_MEL")),
        edit_csv("predictions.csv", lambda rows: rows.assign(prob_MEL="much")),
        edit_csv("predictions.csv", lambda rows: rows.assign(prob_MEL=0.9)),
        edit_csv("predictions.csv", lambda rows: pd.concat([rows, rows.iloc[:1]])),
    ],
    "split.csv": [
        edit_csv("split.csv", lambda rows: pd.concat([rows, rows.iloc[:1]])),
        edit_csv("split.csv", lambda rows: rows.assign(split="tset")),
        edit_csv("split.csv", lambda rows: rows.iloc[:0]),
    ],
    "history.csv": [
        edit_csv("history.csv", lambda rows: rows.iloc[:0]),
        edit_csv("history.csv", lambda rows: rows.assign(val_loss="low")),
    ],
    "metrics.json": [
        edit_json("metrics.json", accuracy=None, per_class={}),
        edit_json("metrics.json", calibrated__before__ece="x"),
        edit_json("metrics.json", confusion_matrix=[[1]]),
    ],
    "calibration.json": [
        edit_json("calibration.json", temperature=0),
        edit_json("calibration.json", conformal__threshold=None),
        edit_json("calibration.json", classes=["A", "B"]),
    ],
    "model.json": [
        edit_json("model.json", format=99),
        edit_json("model.json", metadata__imputer__weights=[[[0.0]]] * 4),
        edit_json("model.json", metadata__imputer__spans=[[0, 10**9, False]]),
        edit_json("model.json", architecture__metadata_width=10**9),
        edit_json("model.json", classes=["A", "A"]),
    ],
    "recipe.yaml": [
        edit_recipe(lambda values: values.pop("evaluation")),
        edit_recipe(lambda values: values["training"].popitem()),
        edit_recipe(lambda values: values.update(format=99)),
        edit_recipe(lambda values: values["image"].update(size=96)),
        edit_recipe(lambda values: values["metadata"].update(tier="M1")),
    ],
    "fingerprint.json": [edit_json("fingerprint.json", hardware={})],
    "model.safetensors": [flip_a_weight],
    "out_of_scope.safetensors": [],
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name, several in DAMAGE.items()
        for damage in (lambda folder, name=name: truncate(folder / name), *several)
    ],
)
def test_a_damaged_file_is_named_with_its_cure(name: str, damage: Callable[[Path], None], run: Run) -> None:
    assert run.damage() == ""
    damage(run.path)
    found = run.damage()
    assert found.startswith(f"{run.path / name} is damaged (")
    assert "\n" not in found
    measured = name in ("predictions.csv", "metrics.json", "calibration.json", "out_of_scope.safetensors")
    assert ("dualrefnet evaluate" if measured else "restore it") in found


@pytest.mark.parametrize("name", ["model.json", "recipe.yaml", "split.csv", "model.safetensors"])
def test_every_command_ends_with_the_line(name: str, run: Run, sample_root: Path, tmp_path: Path) -> None:
    truncate(run.path / name)
    image = next((sample_root / "images").iterdir())
    commands = [
        ["evaluate", run.path, "--root", sample_root],
        ["predict", run.path, "--images", image, "--out", tmp_path / "out.csv"],
        ["export", run.path, "--root", sample_root, "--out", tmp_path / "bundle"],
        ["report", run.path, "--root", sample_root, "--out", tmp_path / "report"],
        ["explain", run.path, "--root", sample_root, "--out", tmp_path / "explain"],
        ["probe", run.path, "--root", sample_root, "--out", tmp_path / "probe"],
    ]
    for command in commands:
        error = CliRunner().invoke(app, list(map(str, command))).exception
        if command[0] == "predict" and name == "split.csv":
            continue
        assert isinstance(error, DualRefNetError), (command[0], error)
        assert str(run.path / name) in str(error)


def test_an_edit_of_any_value_is_refused_or_harmless(run: Run) -> None:
    draw = random.Random(0)
    original = {name: (run.path / name).read_text() for name in ("metrics.json", "model.json", "calibration.json")}
    refused = 0
    for turn in range(150):
        name = list(original)[turn % 3]
        values = json.loads(original[name])
        inner: Any = values
        while True:
            key = draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if not isinstance(inner[key], dict | list) or not inner[key] or draw.random() < 0.2:
                break
            inner = inner[key]
        if draw.random() < 0.3:
            del inner[key]
        else:
            inner[key] = draw.choice(LEAVES)
        rewrite(run.path / name, json.dumps(values))
        try:
            metrics = run.metrics
            metrics_tables(metrics), availability_table(metrics["availability"])
            availability_line(metrics["availability"]), calibration_line(metrics["calibrated"])
            (
                run_title(run),
                run_notes(run),
                provenance_section(run),
                summary_section(read_measured(run)),
                class_section(read_measured(run)),
            )
            run_parts(run, "cpu")
        except RunError:
            refused += 1
        rewrite(run.path / name, original[name])
    assert refused > 75


def test_a_finished_run_with_damaged_measurements_is_measured_again(run: Run, tiny_run: Run, tmp_path: Path) -> None:
    for name in ("metrics.json", "predictions.csv"):
        truncate(run.path / name)
    assert train_recipe(run.recipe, run.path, resume=True).damage() == ""
    assert run.metrics["accuracy"] == tiny_run.metrics["accuracy"]


def test_the_test_split_is_the_one_that_was_measured(tiny_run: Run) -> None:
    test, metrics, classes = tiny_run.test, tiny_run.metrics, tiny_run.model["classes"]
    assert len(test.rows) == len(test.labels) == len(test.probabilities) == metrics["support"]
    predicted = test.probabilities.argmax(axis=1)
    assert [classes[place] for place in predicted] == test.rows["predicted"].tolist()
    counts = pd.crosstab(
        pd.Categorical(test.labels, range(len(classes))), pd.Categorical(predicted, range(len(classes))), dropna=False
    )
    assert counts.to_numpy().tolist() == metrics["confusion_matrix"]
    split = pd.read_csv(tiny_run.path / "split.csv", dtype=str).query("split == 'test'")
    found = dict(zip(test.rows["image_id"], test.groups, strict=True))
    assert found == dict(zip(split["image_id"], split["patient_id"], strict=True))


def test_other_words_of_a_recipe_are_no_other_recipe(run: Run) -> None:
    described = run.recipe.model_copy(update={"description": "in other words"})
    start_run(run.path, described, resume=True)
    assert run.recipe == described
    with pytest.raises(RunError, match="seed: 0 there, 1 now"):
        start_run(run.path, described.model_copy(update={"seed": 1}), resume=True)
    # This one names a file, which says what the columns mean.
    other = described.data.model_copy(update={"description": "other.yaml"})
    with pytest.raises(RunError, match=r"data\.description: None there, other\.yaml now"):
        start_run(run.path, described.model_copy(update={"data": other}), resume=True)
