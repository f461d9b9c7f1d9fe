"""kill -9 at any moment: the same command again gives the same files and no others."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualrefnet.files import write_yaml
from dualrefnet.recipe import Recipe

# Loads the libraries once. For each line (arguments, moment) a child runs the command, and is killed as it puts the
# file with that number in its place (0: never); the answer is how many it has put, and its exit status.
PROGRAM = """
import json, os, signal, sys
import onnxruntime, torch
import dualrefnet.analysis.evaluate, dualrefnet.deploy.export, dualrefnet.report.run_report, dualrefnet.training.train
from dualrefnet.cli import main
for line in sys.stdin:
    arguments, moment = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        sys.argv = ["dualrefnet", *arguments]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        renamed = 0
        def watch(event, values):
            global renamed
            if event == "os.rename":
                renamed += 1
                os.write(writing, b".")
                if renamed == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        try:
            main()
            os._exit(0)
        except SystemExit as error:
            os._exit(error.code or 0)
    os.close(writing)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([len(os.read(reading, 10**5)), status]), flush=True)
    os.close(reading)
"""


@pytest.fixture(scope="module")
def program() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    yield process
    process.kill()
    process.wait()


def files(folder: Path) -> dict[str, bytes]:
    """Return every file, hidden ones too, and the content of those that hold no time."""
    timed = ("history.csv", "fingerprint.json", "bundle.json", "parity.json", "SHA256SUMS", ".log", ".html", ".lock")
    return {
        str(path.relative_to(folder)): b"" if path.name.endswith(timed) else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_a_killed_command_leaves_nothing_that_the_same_command_does_not_put_right(
    program: subprocess.Popen, tiny_recipe: Recipe, sample_root: Path, tmp_path: Path
) -> None:
    def run(command: list[str], moment: int = 0) -> tuple[int, int]:
        assert program.stdin is not None
        assert program.stdout is not None
        print(json.dumps([command, moment]), file=program.stdin, flush=True)
        renamed, status = json.loads(program.stdout.readline())
        return renamed, status

    write_yaml(tmp_path / "recipe.yaml", tiny_recipe.model_dump(mode="json"))
    block = {"recipe": str(tmp_path / "recipe.yaml"), "methods": ["metadata_only"]}
    write_yaml(tmp_path / "suite.yaml", {"name": "s", "title": "S", "grid": [block]})
    root, places = ["--root", str(sample_root)], {}
    for name in ("undisturbed", "killed"):
        place = tmp_path / name
        trained = str(place / "run")
        places[name] = {
            "train": (["train", str(tmp_path / "recipe.yaml"), "--out", trained, "--resume"], 6),
            "evaluate": (["evaluate", trained, *root], 6),
            "predict": (
                [
                    "predict",
                    trained,
                    "--images",
                    str(sample_root / "images"),
                    "--out",
                    str(place / "out.csv"),
                    "--resume",
                ],
                5,
            ),
            "report": (["report", trained, "--without-explanations", "--out", str(place / "report")], 6),
            "export": (["export", trained, *root, "--no-int8", "--out", str(place / "bundle")], 5),
            "suite": (["suite", str(tmp_path / "suite.yaml"), "--out", str(place / "suite")], 2),
        }
    kills = 0
    for name, (command, moments) in places["undisturbed"].items():
        renamed, status = run(command)
        assert status == 0, name
        again = places["killed"][name][0]
        for moment in range(moments):
            _, status = run(again, 1 + moment * renamed // moments)
            kills += status == 9
        assert run(again)[1] == 0, name
        assert files(tmp_path / "killed").keys() == files(tmp_path / "undisturbed").keys(), name
    assert kills >= 25
    first, second = files(tmp_path / "undisturbed"), files(tmp_path / "killed")
    assert [name for name in first if first[name] != second[name]] == []
