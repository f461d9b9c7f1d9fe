"""Commands about runs: doctor, demo, methods, recipes, prepare, train, tune, distil, evaluate, probe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dualrefnet.cli import (
    Cache,
    Description,
    Device,
    Masks,
    ModelFolder,
    Overrides,
    RayAddress,
    Root,
    RunFolder,
    Workers,
    app,
    print_findings,
    print_table,
    refuse_without_effect,
    resumable,
)
from dualrefnet.errors import DualRefNetError, RunError

if TYPE_CHECKING:
    from dualrefnet.recipe import Recipe
    from dualrefnet.run import Run

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe (`recipes`).")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="The run folder; default: runs/NAME of the recipe, with the time behind it if a finished run is there.",
    ),
]


@app.command()
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Check what this recipe needs: data, weights, disk.")
    ] = None,
    overrides: Overrides = None,
    cache: Cache = None,
) -> None:
    """Check the environment, the weights and the data: PASS, WARN or FAIL, each with the fix. Exit status 1 on FAIL."""
    from dualrefnet.recipe import load_recipe, parse_overrides

    checked = None if recipe is None else load_recipe(recipe, parse_overrides(overrides or []))
    from dualrefnet.doctor import examine

    findings = examine(checked, cache)
    print_findings(findings)
    raise typer.Exit(1 if any(finding.level == "FAIL" for finding in findings) else 0)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for data and run.")] = Path("runs/demo"),
) -> None:
    """Make synthetic data, train DualRefNet on them, evaluate and explain it, write a report. No network; minutes.

    Needs the extra `explain`.
    """
    # Says at once, and not after the training, if an extra isn't installed.
    import dualrefnet.report.explanations  # noqa: F401
    from dualrefnet.data.synthetic import make_synthetic
    from dualrefnet.progress import note
    from dualrefnet.recipe import load_recipe
    from dualrefnet.report import ReportOptions
    from dualrefnet.report.run_report import write_report
    from dualrefnet.training.train import train_recipe

    if out.is_dir() and any(child.name not in ("data", "run", "cache") for child in out.iterdir()):
        raise RunError(f"{out} holds other things; name another folder with --out")
    note("making the synthetic sample: invented images, not clinical ones")
    make_synthetic(out / "data", images=420)
    recipe = load_recipe("sample", {"data.root": str(out / "data")})
    # Goes on where it was interrupted.
    run = train_recipe(recipe, out / "run", resume=True, cache=out / "cache")
    note("writing the report")
    # Enough for a look; `dualrefnet report` takes more images.
    page = write_report(run, options=ReportOptions(shap_images=40, cache=out / "cache"))
    _print_metrics(run.metrics, run.unit)
    typer.echo(
        f"The run folder is {run.path}; try: dualrefnet predict {run.path} --images {out}/data/images "
        f"--metadata {out}/data/metadata.csv --out predictions.csv"
    )
    typer.echo(f"The report, for any browser: {page.resolve()}")


@app.command()
def methods(
    context: typer.Context,
    cost: Annotated[bool, typer.Option("--cost", help="What each costs instead: size, time and memory.")] = False,
    backbone: Annotated[
        list[str] | None, typer.Option("--backbone", metavar="NAME", help="With --cost: image encoder; or several.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="CSV", help="With --cost: also write it as CSV.")] = None,
) -> None:
    """List the methods (`train RECIPE model.method=NAME`), and what of each is a reconstruction; or what they cost."""
    from rich.table import Table

    from dualrefnet.models.registry import METHODS
    from dualrefnet.progress import output

    if cost:
        _print_costs(backbone or ["vgg13"], out)
        return
    refuse_without_effect(context, "without --cost", "backbone", "out")
    table = Table("name", "method", "published", "filled in by us", show_lines=True)
    for name, method in METHODS.items():
        table.add_row(name, method.title, method.reference, method.reconstruction or "–")
    output().print(table)


def _print_costs(backbones: list[str], out: Path | None) -> None:
    import torch

    from dualrefnet.display.format import COST_COLUMNS, Cell, PrintedTable, billions, millions, number
    from dualrefnet.files import write_csv
    from dualrefnet.models.registry import METHODS
    from dualrefnet.recipe import load_recipe
    from dualrefnet.training.cost import CLASSES, COLUMNS, RECIPE, measure_costs

    found, recipe = measure_costs(backbones), load_recipe(RECIPE)
    rows = []
    for method, encoder, parameters, adds, memory, milliseconds in found.itertuples(index=False):
        numbers = (millions(parameters), billions(adds), number(memory / 2**30, ".2f"), number(milliseconds, ".1f"))
        rows.append([Cell(METHODS[method].title), Cell(encoder.replace("+", " + ") or "–"), *map(Cell, numbers)])
    batch, side = recipe.training.batch_size, recipe.image.size
    notes = (
        f"One image of {side} px with {COLUMNS} columns of metadata, {CLASSES} classes, recipe {RECIPE}; without the "
        "decoder.",
        f"Training memory: a batch of {batch} in float32: parameters, gradients, the optimizer's state and what is "
        "kept for the backward pass; without the workspace of kernels.",
        f"Milliseconds: the model alone, median; threads of this machine: {torch.get_num_threads()}.",
    )
    columns = ("method", "encoder", *COST_COLUMNS, "training memory (GiB)", "CPU ms")
    print_table(PrintedTable("Cost of the methods", columns, rows, notes, left=2))
    if out is not None:
        write_csv(out, found)
        typer.echo(out)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None) -> None:
    """List the recipes that ship, or print one: save it, change it, and give the file to `train`."""
    from dualrefnet.recipe import load_recipe, recipe_text, shipped_recipes

    if name is not None:
        typer.echo(recipe_text(name), nl=False)
        return
    for shipped in shipped_recipes():
        typer.echo(f"{shipped:<20} {load_recipe(shipped).description}")


@app.command()
def prepare(
    recipe: RecipeName,
    overrides: Overrides = None,
    cache: Cache = None,
    workers: Workers = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all images again and prepare anew what differs from the store.")
    ] = False,
) -> None:
    """Decode and preprocess a recipe's images once, into the image store. `train` does it too if it wasn't done."""
    from dualrefnet.data.adapters import find_root
    from dualrefnet.recipe import load_recipe, parse_overrides

    checked = load_recipe(recipe, parse_overrides(overrides or []))
    find_root(checked.data.dataset, checked.data.root)
    from dualrefnet.data.loader import fill_recipe_store, read_dataset

    store = fill_recipe_store(checked, read_dataset(checked), cache, workers, verify)
    typer.echo(f"{len(store.image_ids) - len(store.broken)} images of {store.side} px are in {store.path}")


@app.command()
def train(
    context: typer.Context,
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run, or start it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in this folder.")] = False,
    folds: Annotated[
        int | None,
        typer.Option(
            min=3,
            help="Cross-fit: one model a fold of the patients, together an ensemble; every patient is tested once, by "
            "the model that hasn't seen them. 5 is usual. The same as data.protocol=cross-fitted data.folds=N.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="With --folds: models trained at the same time.")] = 1,
    ray: RayAddress = None,
    cache: Cache = None,
    workers: Workers = None,
) -> None:
    """Train and evaluate a recipe; leaves a run folder with the model, predictions and measures.

    Several GPUs: `accelerate launch --multi_gpu -m dualrefnet train RECIPE ...`; several processes on CPUs: the same
    with `--num_processes N` and `training.device=cpu`.
    """
    from dualrefnet.recipe import CROSS_FITTED, load_recipe, parse_overrides

    if resume and overwrite:
        raise DualRefNetError("--resume keeps the run in a folder and --overwrite replaces it: give one of them")
    changed = parse_overrides(overrides or [])
    if folds is not None:
        changed |= {"data.protocol": CROSS_FITTED, "data.folds": folds}
    checked = load_recipe(recipe, changed)
    if checked.data.protocol != CROSS_FITTED:
        refuse_without_effect(context, "without --folds", "jobs", "ray")
    # pandas takes half a second to import, and torch seconds.
    from dualrefnet.run import new_folder

    _train(checked, out or new_folder(checked.name, resume, overwrite), resume, overwrite, cache, workers, jobs, ray)


def _train(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    overwrite: bool,
    cache: Path | None,
    workers: int | None,
    jobs: int = 1,
    ray: str | None = None,
) -> None:
    """Train a recipe that can begin, and print its measures."""
    from dualrefnet.training.preflight import check_start

    dataset = check_start(recipe, folder, resume, overwrite)
    from accelerate import PartialState

    from dualrefnet.training.train import train_recipe

    with resumable(f"the last whole epoch is kept, and the command with --out {folder} --resume"):
        run = train_recipe(recipe, folder, resume, cache, workers, jobs, ray, overwrite=overwrite, dataset=dataset)
    if PartialState().is_main_process:
        _print_metrics(run.metrics, run.unit)
        _print_departures(run)
        typer.echo(f"run folder: {run.path}")


@app.command()
def tune(
    recipe: RecipeName,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, those of earlier calls included.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The tuning folder; new, or of an earlier call.")],
    overrides: Overrides = None,
    folds: Annotated[
        int | None,
        typer.Option(min=1, help="Train a trial on so many folds; 1: on the recipe's own split; default: data.folds."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials trained at the same time; they share the cores.")] = 1,
    ray: RayAddress = None,
    cache: Cache = None,
) -> None:
    """Search the ranges that the recipe names under `tune:` for the best validation score (extra `tune`).

    Writes best.yaml, a recipe for `train`, and trials.csv. Running it again goes on. Nothing is predicted for a test
    split; but over all folds every patient is on a validation side once.
    """
    from dualrefnet.recipe import load_recipe, parse_overrides

    checked = load_recipe(recipe, parse_overrides(overrides or []))
    from dualrefnet.suite.tuning import printed_trials, tune_recipe

    with resumable(f"what is finished is kept in {out}, and the same command"):
        table = tune_recipe(checked, out, trials, folds, jobs, ray, cache)
    print_table(printed_trials(table))
    if not (out / "best.yaml").is_file():
        raise DualRefNetError(f"no trial was trained to its end; {out / 'trials.csv'} and {out / 'logs'} say why")
    typer.echo(f"now: dualrefnet train {out / 'best.yaml'}")


@app.command()
def distil(
    run: RunFolder,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The new run folder; default: RUN-distilled.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run, or start it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in this folder.")] = False,
    cache: Cache = None,
    workers: Workers = None,
) -> None:
    """Train one model on all data towards what a cross-fitted run predicted out of fold: one network to deploy, not K.

    It learns the labels and, to loss.teacher_share, the members' probabilities of images that they hadn't seen. Nothing
    is left to test it on: the cross-fitted run has the numbers.
    """
    from dualrefnet.recipe import load_recipe, parse_overrides
    from dualrefnet.run import Run

    teacher = Run(run)
    if not teacher.members:
        raise DualRefNetError(f"{run} isn't a cross-fitted run: `dualrefnet train RECIPE --folds 5` makes one")
    given = {"name": f"{teacher.recipe.name[:190]}-distilled", "data.protocol": "all", "loss.teacher": str(run)}
    checked = load_recipe(teacher.recipe, given | parse_overrides(overrides or []))
    _train(checked, out or run.with_name(f"{run.resolve().name}-distilled"), resume, overwrite, cache, workers)


@app.command()
def evaluate(
    context: typer.Context,
    run: ModelFolder,
    root: Root = None,
    cache: Cache = None,
    aggregate: Annotated[
        Literal["lesion", "patient"] | None,
        typer.Option(help="Measure lesions or patients too: several images count once, by the mean of probabilities."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="DATASET", help="External test set: a data set, or a folder with dataset.yaml."),
    ] = None,
    description: Description = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="CLASS=LABEL", help="With --on: what it calls a class of the run; or several."),
    ] = None,
    allow_seen: Annotated[
        bool, typer.Option("--allow-seen", help="With --on: measure images and patients of the training too.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="With --on: default: external/ in the run folder.")
    ] = None,
    workers: Workers = None,
    device: Device = None,
) -> None:
    """Evaluate a trained run again: writes predictions.csv and metrics.json, prints the metrics.

    With --on, evaluate it or a bundle on a data set of another source, and leave the run's own measures as they are.
    """
    if on is None:
        from dualrefnet.analysis.evaluate import evaluate_run
        from dualrefnet.models.inference import resolve_device
        from dualrefnet.run import Run

        refuse_without_effect(context, "without --on", "description", "mapping", "allow_seen", "out", "workers")
        evaluated = Run(run)
        evaluate_run(evaluated, root, cache=cache, device=resolve_device(device), aggregate=aggregate)
        _print_metrics(evaluated.metrics, evaluated.unit)
        _print_departures(evaluated)
        return
    from dualrefnet.deploy.external import evaluate_external, load_external
    from dualrefnet.display.format import deployed_line

    refuse_without_effect(context, "with --on", "cache")
    dataset = load_external(on, root, description)
    metrics = evaluate_external(run, dataset, out, mapping or [], allow_seen, aggregate, device, workers)
    _print_metrics(metrics, metrics["unit"])
    typer.echo(deployed_line(metrics["deployed"]))


@app.command()
def probe(
    run: RunFolder,
    against: Annotated[
        list[Path] | None, typer.Option("--against", metavar="RUN2", help="A run of the same test images; or several.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder; default: probes/ in the run folder.")
    ] = None,
    masks: Masks = None,
    permutations: Annotated[int, typer.Option(min=1, help="How often inputs are permuted across patients.")] = 10,
    draws: Annotated[int, typer.Option(min=1, help="Random choices of fields for each share of them.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of permutations, choices and resamples.")] = 0,
    root: Root = None,
    cache: Cache = None,
    device: Device = None,
) -> None:
    """Predict with parts of the input removed or permuted: how much of the score is shortcut?

    Then with fewer and fewer fields, with and without the image. Writes tables as CSV and, with the extra `report`,
    figures.
    """
    from dualrefnet.report import ReportOptions
    from dualrefnet.report.run_report import write_probes
    from dualrefnet.run import Run

    others = [Run(path) for path in against or []]
    out = out or run / "probes"
    options = ReportOptions(masks=masks, seed=seed, root=root, cache=cache, device=device)
    for table in write_probes(Run(run), others, out, options, permutations, draws):
        print_table(table)
    typer.echo(f"the probes: {out}")


def _print_departures(run: Run) -> None:
    from dualrefnet.progress import note
    from dualrefnet.suite.results import departures, other_experiment

    found = departures(run.recipe, run.split) if run.recipe.data.protocol == "paper" else []
    if found:
        note(other_experiment(found))


def _print_metrics(metrics: dict[str, Any], unit: str) -> None:
    from rich.text import Text

    from dualrefnet.display.format import (
        availability_line,
        calibration_line,
        folds_line,
        metrics_tables,
        protocol_name,
        sentence,
    )
    from dualrefnet.progress import output
    from dualrefnet.runtime.availability import missingness_shortcut

    if metrics["protocol"] == "all":
        typer.echo(sentence(metrics["remarks"][0]))
        return
    tested = f"{'out-of-fold' if 'folds' in metrics else 'test set'}, {protocol_name(metrics['protocol'], unit)}"
    if metrics["protocol"] == "external":
        tested = "external test set"
    synthetic = " - SYNTHETIC IMAGES, NOT CLINICAL" if metrics["drawn"] else ""
    tables = metrics_tables(metrics, f"{metrics['dataset']}, {tested}{synthetic}")
    if "aggregated" in metrics:
        by = metrics["aggregated"]["by"]
        tables += metrics_tables(metrics["aggregated"], f"The same by {by}{synthetic}", f"{by}s")
    for table in tables:
        print_table(table)
    if "folds" in metrics:
        typer.echo(folds_line(metrics["folds"]))
    # A run that was finished by an earlier version has none.
    if "calibrated" in metrics:
        typer.echo(calibration_line(metrics["calibrated"]))
    if "availability" in metrics:
        typer.echo(availability_line(metrics["availability"]))
        reason = missingness_shortcut(metrics)
        if reason is not None:
            verdict = ("not to be used where metadata may be missing", "red")
            output().print(Text.assemble(verdict, f": {reason}"), soft_wrap=True)
