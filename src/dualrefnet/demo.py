"""The demonstration: from nothing to a measured and explained model on synthetic images, in minutes, offline."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from dualrefnet.data.synthetic import make_synthetic
from dualrefnet.errors import RunError
from dualrefnet.progress import note, progress_bar
from dualrefnet.recipe import load_recipe
from dualrefnet.report import ReportOptions
from dualrefnet.report.run_report import write_report
from dualrefnet.run import Run
from dualrefnet.training.train import train_recipe

IMAGES = 420


def run_demo(out: Path) -> tuple[Run, Path]:
    """Make the sample in `out/data`, train into `out/run`, and return the run and the page; goes on if interrupted."""
    # Says at once, and not after the training, if an extra isn't installed.
    import_module("dualrefnet.report.explanations")
    if out.is_dir() and any(child.name not in ("data", "run", "cache") for child in out.iterdir()):
        raise RunError(f"{out} holds other things; name another folder with --out")
    note("making the synthetic sample: invented images, not clinical ones")
    with progress_bar("drawing") as show:
        make_synthetic(out / "data", images=IMAGES, progress=show)
    recipe = load_recipe("sample", {"data.root": str(out / "data")})
    run = train_recipe(recipe, out / "run", resume=True, cache=out / "cache")
    note("writing the report")
    # Enough for a look; `dualrefnet report` takes more images.
    return run, write_report(run, options=ReportOptions(shap_images=40, cache=out / "cache"))
