"""The demonstration: from nothing to a measured model on drawn pictures, in a few minutes and without a network."""

from __future__ import annotations

from pathlib import Path

from dualrefnet.data.sample import draw_sample
from dualrefnet.errors import RunError
from dualrefnet.progress import progress_bar, remark
from dualrefnet.recipe import load_recipe
from dualrefnet.run import Run
from dualrefnet.training.train import train_recipe

IMAGES = 420


def run_demo(out: Path) -> Run:
    """Draw the sample data set into `out/data`, train the recipe `sample` into `out/run`, and return the run.

    An interrupted demonstration goes on where it stopped.

    Raises:
        RunError: `out` is in use by something else.
    """
    if out.is_dir() and any(child.name not in ("data", "run", "cache") for child in out.iterdir()):
        raise RunError(f"{out} holds other things; name another folder with --out")
    remark("drawing the sample data set: invented pictures, not clinical ones")
    with progress_bar("drawing") as show:
        draw_sample(out / "data", images=IMAGES, progress=show)
    recipe = load_recipe("sample", {"data.root": str(out / "data")})
    return train_recipe(recipe, out / "run", resume=True, cache=out / "cache")
