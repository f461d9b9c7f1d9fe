"""Bundles that are whole, damaged, or not what they say: loaded here, and by their own copy of the runtime."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import dualrefnet
from bundle_folder import CLASSES, SIDE, write_bundle
from dualrefnet import Predictor
from dualrefnet.deploy.batch import TableCases, predict_chunks
from dualrefnet.deploy.hub import write_sums
from dualrefnet.errors import DataError, RunError
from test_batch import table_of

BRIGHT = np.full((SIDE, SIDE, 3), 250, np.uint8)


def alone(bundle: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Call the program of a bundle where there is no dualrefnet."""
    code = "import runpy, sys; sys.modules['dualrefnet'] = None; runpy.run_module('runtime', run_name='__main__')"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=bundle, capture_output=True, text=True, timeout=60, check=False)


def test_a_bundle_predicts_and_says_that_it_has_no_out_of_distribution_score(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    assert alone(bundle).returncode == 2
    picture = tmp_path / "a.png"
    cv2.imwrite(str(picture), np.dstack([BRIGHT // 50, np.full((SIDE, SIDE, 1), 9, np.uint8)]))
    done = alone(bundle, picture, "--metadata", '{"age": 61}')
    assert done.returncode == 0, done.stderr
    # What is nearly transparent is white, here and there.
    prediction = Predictor.load(bundle).predict(picture, {"age": 61})
    assert json.loads(done.stdout)["probabilities"] == pytest.approx(prediction.probabilities)
    assert prediction.label == "BRIGHT"
    for warnings in (prediction.warnings, json.loads(done.stdout)["warnings"]):
        assert any("no score" in warning for warning in warnings)


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx", "model.int8.onnx", "README.md", "runtime/metadata.py"])
def test_a_changed_byte_of_any_file_is_noticed(name: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    content = bytearray((bundle / name).read_bytes())
    place = len(content) // 2 if name.endswith("onnx") else content.rindex(b"\n")
    content[place] ^= 0x2A
    (bundle / name).write_bytes(content)
    with pytest.raises(RunError, match=r"SHA-256|damaged"):
        Predictor.load(bundle)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({"image": {"clahe_grid": grid}}, "image.clahe_grid") for grid in (0, -1, 10**9, 2.0, True, "12", None)),
        *(({"image": {"size": size}}, "image.size") for size in (0, 10**9, float("inf"))),
        *(({"image": {name: 0}}, f"image.{name}") for name in ("minkowski_p", "gamma", "clahe_clip", "fit")),
        ({"image": {"size": 64}}, "fit together"),
        ({"image": {}, "reads_image": False}, "reads_image"),
        ({"learned_tokens": "yes"}, "learned_tokens"),
        ({"classes": ["A", "A", "B"]}, "classes"),
        ({"classes": ["A", "B"], "malignant": []}, "fit together"),
        ({"malignant": ["MEL"]}, "malignant"),
        ({"metadata": {}}, "fit together"),
        ({"metadata": None}, "fit together"),
        ({"calibration": {"classes": CLASSES}}, "isn't a calibration"),
        ({"networks": {"float32": {}}}, "damaged"),
        ({"networks": 3}, "damaged"),
        ({"networks": {"float32": {"file": "../model.onnx", "sha256": ""}}}, "networks are called"),
        ({"format": 2}, "isn't of format 1"),
        ({"weights": (float("nan"), 1.0, 0.0)}, "no finite numbers"),
        ({"weights": (1.0, 1.0)}, "fit together"),
    ],
)
def test_a_description_that_cannot_be_right_is_one_line(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    if float("inf") in changes.get("image", {}).values():
        write_bundle(bundle)
        text = (bundle / "bundle.json").read_text()
        (bundle / "bundle.json").write_text(text.replace(f'"size": {SIDE}', '"size": Infinity'))
        write_sums(bundle)
    else:
        write_bundle(bundle, **changes)
    with pytest.raises(RunError, match=words) as raised:
        Predictor.load(bundle)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["size", "gamma", "clahe", "fit"])
def test_a_missing_setting_is_one_line_of_the_bundles_own_program(name: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    description = json.loads((bundle / "bundle.json").read_text())
    del description["image"][name]
    (bundle / "bundle.json").write_text(json.dumps(description))
    write_sums(bundle)
    done = alone(bundle, "image.png")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"it has no '{name}'" in done.stderr


def test_numbers_that_the_network_cannot_bear_are_errors_of_their_rows_alone(tmp_path: Path) -> None:
    model = Predictor.load(write_bundle(tmp_path / "bundle"))
    for width, words in (("1e300", "width must be a number"), ("1e14", "no finite numbers")):
        with pytest.raises(DataError, match=words):
            model.predict(BRIGHT, {"width": width})
    cv2.imwrite(str(tmp_path / "a.png"), BRIGHT)
    rows = [("image", "width"), ("a.png", "2"), ("a.png", "1e14"), ("a.png", "1e300"), ("a.png", "")]
    cases = TableCases(table_of(tmp_path / "table.csv", rows), model)
    [(_, lines)] = predict_chunks(model, [(0, list(cases))], 8, 1)
    answers = [line.split(b",")[1] for line in lines.splitlines()]
    assert answers == [b"BRIGHT", b"", b"", b"BRIGHT"]


def test_the_runtime_needs_no_newer_python_than_3_9() -> None:
    newer = ("import Self", ", Self", "strict=", "file_digest", "pairwise", "StrEnum", "TypeAlias", "ExceptionGroup")
    for file in (Path(dualrefnet.__file__).parent / "runtime").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        ast.parse(text, feature_version=(3, 9))
        assert not [word for word in newer if word in text], file.name
        # An annotation isn't computed; elsewhere X | Y of types can't be.
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        types = [call for call in calls if getattr(call.func, "id", "") in ("isinstance", "TypeVar", "cast")]
        assert not any(isinstance(value, ast.BinOp) for call in types for value in ast.walk(call)), file.name
        assert "from __future__ import annotations" in text or len(calls) == 0
