"""How fast are images prepared? `fill_store` against a plain loop of the same steps in OpenCV and NumPy.

The plain loop is what one writes down from the papers: `cv2.imread`, Shades of Gray with `np.power` on the whole image,
CLAHE on L, resize. In float64 it must give the same pixels up to two levels (decoders may differ); in float32 it is
faster, and its sums lose digits: that one is the base of the ratios, since it is the harder to beat.
"""

from __future__ import annotations

import os
import tempfile
from itertools import count as counter
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray

from dualrefnet.data.store import ImageStore, fill_store
from dualrefnet.recipe import ImageSection
from record import RESULTS, compare, how, interleaved, record
from synthetic_images import image_table

MOST_LEVELS = 2
SECTION = ImageSection()
BASE = "plain loop, float32"


def prepare_plainly(path: str, kind: type[np.floating[Any]]) -> NDArray[np.uint8]:
    """Prepare one image step by step, computing in float32 or float64; returns (224, 224, 3) RGB."""
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    assert image is not None
    numbers = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(kind)
    light = np.power(np.power(numbers, SECTION.minkowski_p).mean(axis=(0, 1)), 1 / SECTION.minkowski_p)
    gain = 1 / (np.sqrt(3) * light / np.linalg.norm(light))
    image = np.rint(np.clip(numbers * gain, 0, 255)).astype(np.uint8)
    lightness, a, b = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2LAB))
    equalise = cv2.createCLAHE(clipLimit=SECTION.clahe_clip, tileGridSize=(SECTION.clahe_grid, SECTION.clahe_grid))
    image = cv2.cvtColor(cv2.merge((equalise.apply(lightness), a, b)), cv2.COLOR_LAB2RGB)
    return np.asarray(cv2.resize(image, (SECTION.size, SECTION.size), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def plain_loop(table: pd.DataFrame, kind: type[np.floating[Any]]) -> NDArray[np.uint8]:
    """Prepare all images one after the other; OpenCV itself may use all cores, as it does unless told otherwise."""
    cv2.setNumThreads(os.cpu_count() or 1)
    try:
        return np.stack([prepare_plainly(path, kind) for path in table["image_path"]])
    finally:
        cv2.setNumThreads(1)


def main(
    images: Annotated[Path | None, typer.Option(help="Folder of images; default: drawn ones of 1536 x 1152.")] = None,
    count: Annotated[int, typer.Option(help="Number of images.")] = 32,
    rounds: int = 3,
    out: Path = RESULTS,
) -> None:
    """Measure and check; about a minute and a half on two cores."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        table = image_table(Path(folder), images, count)
        fillings = counter()

        def fill(workers: int) -> ImageStore:
            # A store that is there already would only be opened.
            return fill_store(table, SECTION, cache=Path(folder) / f"cache{next(fillings)}", workers=workers)

        stored = fill(cores).read(np.arange(count)).astype(int)
        levels = {kind.__name__: np.abs(stored - plain_loop(table, kind)) for kind in (np.float32, np.float64)}
        if levels["float64"].max() > MOST_LEVELS:
            raise SystemExit(
                f"fill_store and the plain loop differ by {levels['float64'].max()} levels: they don't do the same"
            )
        cases = {
            BASE: lambda: plain_loop(table, np.float32),
            "plain loop, float64": lambda: plain_loop(table, np.float64),
            "fill_store, 1 thread": lambda: fill(1),
            f"fill_store, {cores} threads": lambda: fill(cores),
        }
        # The check was the warm-up.
        seconds = interleaved(cases, rounds, warmup=0)
    said = "; ".join(
        f"pixels differ from {kind} by at most {found.max()}, mean {found.mean():.3f}" for kind, found in levels.items()
    )
    record(
        "store_filling", compare(seconds, "images/s", BASE, count), f"{count} images; {said}; {how(rounds, BASE)}", out
    )


if __name__ == "__main__":
    typer.run(main)
