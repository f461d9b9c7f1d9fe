"""What does the page about a run cost for a data set as large as ISIC-2019: CPU seconds of each part, peak memory?

A drawn data set is repeated to that size (hard links, so it takes little disk), a small model is trained on it for one
epoch, and the page is written in a process of its own, whose peak is read at its end. The time of a part is from the
one before to its end.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

# Nothing heavy is imported here: on Linux a process that is started counts its parent's peak as its own.

ISIC_2019 = 25_331
DRAWN = 420


def prepare(folder: Path, count: int) -> None:
    """Draw images, repeat them as other patients', and train on them."""
    import pandas as pd

    from dualrefnet.data.synthetic import make_synthetic
    from dualrefnet.recipe import load_recipe
    from dualrefnet.training.train import train_recipe

    drawn, root = make_synthetic(folder / "drawn", images=min(DRAWN, count), side=64), folder / "data"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    table, parts = pd.read_csv(drawn / "metadata.csv", dtype=str), []
    for number in range(-(-count // len(table))):
        part = table.head(count - number * len(table)).copy()
        stems = part["img_id"].str.removesuffix(".png")
        for old, new in zip(stems, stems + f"{number:03}", strict=True):
            for name in ("images", "masks"):
                os.link(drawn / name / f"{old}.png", root / name / f"{new}.png")
        part["img_id"] = stems + f"{number:03}.png"
        for column in ("patient_id", "lesion_id"):
            part[column] = part[column] + f"{number:03}"
        parts.append(part)
    pd.concat(parts).to_csv(root / "metadata.csv", index=False)
    values = {
        "data.root": str(root),
        "image.size": 64,
        "model.backbone": "mobilenet_v2",
        "model.weights": "none",
        "training.epochs": 1,
    }
    train_recipe(load_recipe("sample", values), folder / "run", cache=folder / "cache")


def write(folder: Path) -> list[tuple[str, float]]:
    """Write the page; return the seconds of each part."""
    from dualrefnet.report import ReportOptions
    from dualrefnet.report import run_report as writing
    from dualrefnet.run import Run

    times, last = [], time.process_time()

    def note(message: str) -> None:
        nonlocal last
        if message.startswith("done: "):
            times.append((message.removeprefix("done: "), time.process_time() - last))
            last = time.process_time()

    writing.note = note
    writing.write_report(Run(folder / "run"), options=ReportOptions(cache=folder / "cache"))
    return [*times, ("the page itself", time.process_time() - last)]


def main(
    count: Annotated[int, typer.Option("--count", "--images", help="Images in the data set.")] = ISIC_2019,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV; default: benchmarks/results.")] = None,
    part: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure; some minutes on two cores, half of it drawing and training."""
    if part is not None and folder is not None:
        times: list[tuple[str, float]] = []
        if part == "prepare":
            prepare(folder, count)
        elif part == "write":
            times = write(folder)
        else:
            import dualrefnet.report.explanations
            import dualrefnet.report.run_report  # noqa: F401
        # Linux counts in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        print(json.dumps({"peak": peak, "times": times}))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("imports", "prepare", "write"):
            command = [sys.executable, __file__, "--part", name, "--folder", temporary, "--count", str(count)]
            result = json.loads(
                subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            )
            rows += [{"case": case, "value": seconds, "unit": "CPU seconds"} for case, seconds in result["times"]]
            if name != "prepare":
                case = {"imports": "importing everything", "write": "writing the page"}[name]
                rows.append({"case": case, "value": result["peak"], "unit": "MiB, peak RSS"})

    import pandas as pd

    from record import RESULTS, record

    note = (
        f"{count:,} synthetic images, a fifth of them test images; recipe sample with mobilenet_v2 at 64 px, one "
        "epoch; at most 500 images "
        "looked at, 200 for SHAP"
    )
    record("report", pd.DataFrame(rows), note, out or RESULTS)


if __name__ == "__main__":
    typer.run(main)
