"""Running a suite: what is finished is skipped, what was cut short goes on, what fails is written down and the rest runs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from dualrefnet.errors import DualRefNetError
from dualrefnet.files import remove_partial, write_csv
from dualrefnet.progress import progress_bar, remark, warn
from dualrefnet.recipe import Recipe
from dualrefnet.run import Run
from dualrefnet.suite.folder import Failure, is_finished, open_folder, record_end, suite_lock
from dualrefnet.suite.grid import Suite, expand, with_recipes
from dualrefnet.suite.ray_runner import require_ray, work_on_ray
from dualrefnet.suite.view import Outcome, View
from dualrefnet.suite.workers import Job, available_cores, work_locally

SMOKE_IMAGES, SMOKE_SIDE = 120, 64


def run_suite(
    suite: Suite,
    out: Path,
    workers: int = 1,
    cache: Path | None = None,
    ray_address: str | None = None,
    cores: int | None = None,
    keep_models: bool = True,
) -> Outcome:
    """Train what a suite folder lacks.

    Args:
        suite: a checked suite, overrides included.
        out: the suite folder; new, or begun with the same suite.
        workers: runs at the same time on this machine.
        cache: where image stores lie; None: the user's cache folder.
        ray_address: run on a Ray cluster instead: its address, or `local`.
        cores: CPU cores of one run; None: the machine's, shared by the workers (on Ray: 1).
        keep_models: keep the parameters of finished runs; the tables need their predictions alone.

    Raises:
        DualRefNetError: the folder is in use or holds something else; Ray isn't there; nothing can be read.
        KeyboardInterrupt: the workers have been stopped; the same call goes on.
    """
    if ray_address is not None:
        require_ray()
    suite = with_recipes(suite)
    cells = expand(suite)
    recipes = {cell.run: cell.recipe for cell in cells if cell.run == cell.name}
    out = out.absolute()
    with suite_lock(out):
        open_folder(out, suite, cells)
        if suite.smoke:
            _draw(out / "data")
        _count_splits(out, suite)
        pending = {run: recipe for run, recipe in recipes.items() if not is_finished(out, run)}
        outcome = Outcome(len(recipes), len(recipes) - len(pending))
        if outcome.skipped:
            remark(f"{outcome.skipped} of {outcome.total} runs are finished already and are skipped")
        for run, failure in _fill_stores(pending, cache).items():
            del pending[run]
            record_end(out, run, failure)
            outcome.count(run, failure)
        threads = cores or (1 if ray_address else max(1, available_cores() // workers))
        jobs = [Job(run, recipe, out, cache and cache.absolute(), threads) for run, recipe in pending.items()]
        events = work_on_ray(jobs, ray_address) if ray_address else work_locally(jobs, workers)
        with View(outcome) as view, closing(events):
            for event in events:
                if event.state == "ended":
                    record_end(out, event.run, event.failure)
                    if event.failure is None and not keep_models:
                        Run(out / "runs" / event.run).weights_file.unlink(missing_ok=True)
                    outcome.count(event.run, event.failure)
                view.show(event)
    return outcome


def _draw(root: Path) -> None:
    from dualrefnet.data.sample import draw_sample

    if (root / "metadata.csv").is_file():
        return
    remove_partial(root)
    remark("drawing the sample data set: invented pictures, not clinical ones")
    with progress_bar("drawing") as show:
        draw_sample(root, images=SMOKE_IMAGES, side=SMOKE_SIDE, progress=show)


def _count_splits(out: Path, suite: Suite) -> None:
    """Write the rows of every split that the suite names."""
    from dualrefnet.data.pipeline import read_dataset
    from dualrefnet.data.protocols import split_dataset

    for split in suite.splits:
        data = split.recipe.data
        rows = split_dataset(read_dataset(split.recipe), data.protocol, data.fold, data.folds, data.split_seed)
        write_csv(out / "splits" / f"{data.dataset}-{data.protocol}.csv", rows)


def _fill_stores(recipes: dict[str, Recipe], cache: Path | None) -> dict[str, Failure]:
    """Prepare the images of all runs, once for those that share them; return the runs that can't have them, and why."""
    from dualrefnet.data.adapters import Dataset
    from dualrefnet.data.pipeline import fill_recipe_store, read_dataset, store_side

    datasets: dict[str, Dataset] = {}
    stores: dict[str, DualRefNetError | None] = {}
    failures = {}
    for run, recipe in recipes.items():
        if recipe.data.rows == "all":
            continue
        source = recipe.data.model_dump_json(include={"dataset", "root", "description"})
        key = f"{source} {recipe.image.model_dump_json()} {store_side(recipe)}"
        if key not in stores:
            try:
                if source not in datasets:
                    datasets[source] = read_dataset(recipe)
                fill_recipe_store(recipe, datasets[source], cache)
                stores[key] = None
            except DualRefNetError as error:
                stores[key] = error
                warn(str(error))
        problem = stores[key]
        if problem is not None:
            failures[run] = Failure(" ".join(str(problem).split()), type(problem).__name__)
    return failures
