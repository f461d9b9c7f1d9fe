"""How fast are batches? `Examples.shuffled` over a filled store, against decoding and preprocessing in every epoch."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer

from dualrefnet.data.images import decode_image
from dualrefnet.data.loader import Examples
from dualrefnet.data.store import fill_store
from dualrefnet.recipe import ImageSection
from dualrefnet.runtime.preprocessing import preprocess
from record import RESULTS, compare, how, interleaved, record
from synthetic_images import image_table

SECTION = ImageSection()
METADATA = 81


def main(
    images: Annotated[Path | None, typer.Option(help="Folder of images; default: drawn ones of 1536 x 1152.")] = None,
    count: Annotated[int, typer.Option(help="Rows of an epoch; images are used again if there are fewer.")] = 480,
    batch_size: int = 32,
    rounds: int = 3,
    out: Path = RESULTS,
) -> None:
    """Measure; about a minute on two cores."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        table = image_table(Path(folder), images, count)
        store = fill_store(table, SECTION, cache=Path(folder) / "cache")
        rows = np.arange(count)
        examples = Examples(
            tuple(table["image_id"]), np.zeros(count, np.int64), np.zeros((count, METADATA), np.float32), store, rows
        )
        # Every epoch gives the same number of images; the incomplete last batch is left out.
        given = examples.steps(batch_size) * min(batch_size, count)

        def epoch() -> None:
            for batch in examples.shuffled(batch_size, seed=0, epoch=0):
                assert batch.images is not None

        def first_batch() -> None:
            next(iter(examples.shuffled(batch_size, seed=0, epoch=0)))

        def decode_every_time() -> None:
            with ThreadPoolExecutor(cores) as pool:
                for start in range(0, given, batch_size):
                    paths = table["image_path"][start : start + batch_size]
                    batch = np.stack(list(pool.map(lambda path: preprocess(decode_image(path), SECTION), paths)))
                    torch.from_numpy(batch).permute(0, 3, 1, 2)

        plain = f"decode and preprocess, {cores} threads"
        seconds = interleaved({plain: decode_every_time, "Examples.shuffled": epoch}, rounds)
        start = interleaved({"Examples.shuffled, first batch of an epoch": first_batch}, max(rounds, 10))
    speeds = compare(seconds, "images/s", plain, given)
    # A time, which has no counterpart in the other case.
    overhead = compare(start, "s", next(iter(start))).assign(ratio=float("nan"), ratio_to="")
    note = (
        f"{given} images of {SECTION.size} px a round, batches of {batch_size}, store in the system's cache; "
        f"{how(rounds, plain)}"
    )
    record("loader", pd.concat([speeds, overhead], ignore_index=True), note, out)


if __name__ == "__main__":
    typer.run(main)
