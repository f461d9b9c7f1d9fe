"""Does the work grow with the data, or faster? CPU time and memory of each command for ever more rows.

The rows are those of the synthetic sample, repeated for new patients; every image is a file of its own whose bytes and
id are its own, so that all are decoded and none is a copy of another.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import pandas as pd
import typer

from dualrefnet.data.images import decode_image
from dualrefnet.data.synthetic import make_synthetic
from dualrefnet.files import write_csv
from record import RESULTS, measure_process, record

DRAWN, SIDE = 600, 32
BACKBONE = "timm:test_efficientnet"


def make_rows(folder: Path, count: int) -> Path:
    """Write a data set of `count` rows in the layout of the sample."""
    if (folder / "metadata.csv").is_file():
        return folder
    drawn = make_synthetic(folder.parent / "drawn", images=DRAWN, side=64)
    table = pd.read_csv(drawn / "metadata.csv", dtype=str, keep_default_na=False)
    contents = [jpeg(drawn / "images" / name) for name in table["img_id"]]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    parts = []
    for copy in range(-(-count // DRAWN)):
        part = table[: count - copy * DRAWN].copy()
        part["patient_id"] += f"_{copy}"
        part["lesion_id"] += f"_{copy}"
        part["img_id"] = [f"{name.removesuffix('.png')}_{copy}.jpg" for name in part["img_id"]]
        for name, content in zip(part["img_id"], contents, strict=False):
            (folder / "images" / name).write_bytes(with_comment(content, copy))
        parts.append(part)
    write_csv(folder / "metadata.csv", pd.concat(parts))
    return folder


def jpeg(path: Path) -> bytes:
    image = cv2.resize(decode_image(path), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def with_comment(content: bytes, number: int) -> bytes:
    """Put a number into a JPEG as a comment, behind its first marker."""
    return content[:2] + b"\xff\xfe\x00\x0a" + b"%08d" % number + content[2:]


def commands(data: Path, run: Path) -> dict[str, list[object]]:
    """Return each step's command."""
    recipe = [
        "sample",
        f"data.root={data}",
        f"image.size={SIDE}",
        f"model.backbone={BACKBONE}",
        "model.weights=none",
        "training.epochs=1",
        "training.batch_size=128",
        "training.device=cpu",
    ]
    table = data / "images.csv"
    return {
        "check": ["check", "sample", "--root", data],
        "split": ["split", "sample", "--root", data, "--out", run.with_suffix(".split.csv")],
        "prepare": ["prepare", *recipe],
        "train": ["train", *recipe, "--out", run, "--overwrite"],
        "evaluate": ["evaluate", run],
        "predict": ["predict", run, "--csv", table, "--out", run.with_suffix(".predictions.csv"), "--batch", "128"],
    }


def main(
    work: Path,
    counts: list[int] = typer.Argument(None, help="of rows"),
    step: list[str] = typer.Option(list(commands(Path("data"), Path("run"))), help="steps that are measured, in order"),
    out: Path = RESULTS,
) -> None:
    """Measure in the folder WORK, where a call that was cut short goes on; 25,000 rows take 10 minutes."""
    rows = []
    for count in counts or [2_500, 25_000, 250_000]:
        folder = work.resolve() / str(count)
        data = make_rows(folder / "data", count)
        named = pd.read_csv(data / "metadata.csv", dtype=str, keep_default_na=False)
        write_csv(data / "images.csv", named.assign(image="images/" + named["img_id"]).drop(columns=["img_id"]))
        for name in step:
            mark = folder / f"{name}.json"
            if not mark.is_file():
                command = [sys.executable, "-m", "dualrefnet", *commands(data, folder / "run")[name]]
                used = measure_process(command, folder / f"{name}.log", {"DUALREFNET_CACHE": str(folder / "cache")})
                mark.write_text(json.dumps(used))
            used = json.loads(mark.read_text())
            rows.append({"step": name, "rows": count, "cpu_s": used["cpu_s"], "peak_mib": used["peak_mib"]})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    for _, found in table.groupby("step"):
        # What the start of a process costs cancels out.
        more = found["rows"].diff()
        table.loc[found.index, "cpu_ms_a_further_row"] = 1000 * found["cpu_s"].diff() / more
        table.loc[found.index, "kib_a_further_row"] = 1024 * found["peak_mib"].diff() / more
    note = (
        f"synthetic sample, JPEGs of {SIDE} px, each command a process with one thread; {BACKBONE}, one epoch, batches "
        "of 128; memory: PSS; a further row: difference to the count above, divided by the difference in rows"
    )
    record("scale", table, note, out)


if __name__ == "__main__":
    typer.run(main)
