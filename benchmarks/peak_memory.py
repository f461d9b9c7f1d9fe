"""How much memory do the long jobs need at most? Each part runs in a process of its own, whose peak is read at its end.

The parts: importing everything (what the others start from), filling a store as large as ISIC-2019's, reading an epoch
of it without a model, and a few training steps. With all 25,331 images the store takes 3.8 GB of disk for a while.
"""

from __future__ import annotations

import json
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
PARTS = {
    "imports": "importing everything",
    "fill": "filling the store",
    "read": "an epoch of Examples.shuffled",
    "train": "training steps",
}


def work(part: str, folder: Path, count: int, side: int, batch_size: int, steps: int) -> None:
    """Do one part's work in this process; the parts find each other's files in `folder`."""
    import numpy as np
    import pandas as pd

    from dualrefnet.data.loader import Examples
    from dualrefnet.data.store import fill_store
    from dualrefnet.recipe import ImageSection, load_recipe
    from synthetic_images import image_table
    from training_step import METADATA, random_batch, step

    if part == "draw":
        image_table(folder, None, count, side, side).to_csv(folder / "table.csv", index=False)
    elif part in ("fill", "read"):
        # Filling a store that is there only opens it.
        store = fill_store(pd.read_csv(folder / "table.csv"), ImageSection(), cache=folder / "cache")
        if part == "read":
            zeros = np.zeros((count, METADATA), np.float32)
            examples = Examples(store.image_ids, np.zeros(count, np.int64), zeros, store, np.arange(count))
            given = sum(len(batch.labels) for batch in examples.shuffled(batch_size, seed=0, epoch=0))
            assert given == examples.steps(batch_size) * min(batch_size, count)
    elif part == "train":
        recipe = load_recipe("pad_ufes_20", {"model.weights": "none", "training.device": "cpu"})
        take = step(recipe, random_batch(batch_size, recipe.image.size), folder)
        for _ in range(steps):
            take()


def main(
    count: Annotated[int, typer.Option("--count", "--images", help="Images in the store.")] = ISIC_2019,
    side: Annotated[int, typer.Option(help="Side of the drawn JPEGs that the store is filled from, pixels.")] = 256,
    batch_size: int = 32,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV; default: benchmarks/results.")] = None,
    part: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure; about two minutes on two cores, most of it filling."""
    if part is not None and folder is not None:
        started = time.perf_counter()
        work(part, folder, count, side, batch_size, steps)
        # Linux counts in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        print(json.dumps({"peak": peak, "seconds": time.perf_counter() - started}))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        options = [
            "--folder",
            temporary,
            "--count",
            str(count),
            "--side",
            str(side),
            "--batch-size",
            str(batch_size),
            "--steps",
            str(steps),
        ]
        for name in ("draw", *PARTS):
            command = [sys.executable, __file__, "--part", name, *options]
            result = json.loads(
                subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            )
            if name in PARTS:
                rows.append(
                    {
                        "case": PARTS[name],
                        "value": result["peak"],
                        "unit": "MiB, peak RSS",
                        "seconds": result["seconds"],
                    }
                )

    import pandas as pd

    from record import RESULTS, record

    table = pd.DataFrame(rows)
    table.insert(2, "above_imports", table["value"] - table["value"].iloc[0])
    note = (
        f"each part in a process of its own; {count:,} images of 224 px from JPEGs of {side} px; batches of "
        f"{batch_size}; "
        f"{steps} steps of mobilenet_v2, recipe pad_ufes_20"
    )
    record("peak_memory", table, note, out or RESULTS)


if __name__ == "__main__":
    typer.run(main)
