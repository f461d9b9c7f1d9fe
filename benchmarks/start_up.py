"""What does a command cost before it does its work: CPU seconds of lists, mistakes, and a prediction of one image?

Beside them stands what can't be saved: the interpreter, and the libraries that load a trained network.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from record import RESULTS, record

COMMANDS = {
    "methods": ("methods",),
    "recipes": ("recipes",),
    "suites": ("suites",),
    "mistake: unknown key": ("train", "sample", "training.epoch=3"),
    "mistake: no such data": ("train", "sample", "data.root=/nowhere"),
    "mistake: not a run": ("predict", "/nowhere", "--images", "/nowhere.png"),
    "mistake: no such data set": ("audit", "nosuch"),
    "mistake: no such suite": ("suite", "nosuch"),
}
FLOORS = {"python": "pass", "import torch": "import torch", "import timm": "import timm"}


def cpu_seconds(command: list[str]) -> float:
    """Return user and system seconds of a process, whatever its exit status."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, used = os.wait4(process.pid, 0)
    return used.ru_utime + used.ru_stime


def main(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    bundle: Annotated[Path, typer.Argument(help="Its bundle.")],
    image: Annotated[Path, typer.Argument(help="An image.")],
    rounds: int = 3,
    out: Path = RESULTS,
) -> None:
    """Measure; two minutes on two cores."""
    python = [sys.executable, "-c"]
    cases = {name: [*python, code] for name, code in FLOORS.items()}
    program = [sys.executable, "-m", "dualrefnet"]
    cases |= {name: [*program, *arguments] for name, arguments in COMMANDS.items()}
    for name, model in (("run", run), ("bundle", bundle)):
        cases[f"predict one image, {name}"] = [*program, "predict", str(model), "--images", str(image)]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    # The first round fills the caches of the disk.
    for number in range(rounds + 1):
        for name, command in cases.items():
            used = cpu_seconds(command)
            if number:
                seconds[name].append(used)
    rows = [
        {"case": name, "value": pd.Series(used).median(), "low": min(used), "high": max(used), "unit": "CPU s"}
        for name, used in seconds.items()
    ]
    note = f"user and system seconds of a process, one thread; median of {rounds} rounds, all cases in turn"
    record("start_up", pd.DataFrame(rows), note, out)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    typer.run(main)
