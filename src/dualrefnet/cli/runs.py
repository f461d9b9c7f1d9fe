"""Commands about runs: doctor, demo, methods, recipes, prepare, train, tune, evaluate, probe, predict."""

from __future__ import annotations

from collections.abc import Callable
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
    PredictionDevice,
    RayAddress,
    Root,
    RunFolder,
    Variant,
    Workers,
    app,
    existing,
    print_findings,
    print_table,
    refuse_without_effect,
)
from dualrefnet.errors import DualRefNetError

if TYPE_CHECKING:
    from dualrefnet.deploy.batch import Case
    from dualrefnet.deploy.predictor import Predictor
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
    from dualrefnet.demo import run_demo

    run, page = run_demo(out)
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
    from dualrefnet.training.preflight import check_start

    folder = out or new_folder(checked.name, resume, overwrite)
    check_start(checked, folder, resume, overwrite)
    from dualrefnet.training.train import train_recipe

    try:
        run = train_recipe(checked, folder, resume, cache, workers, jobs, ray, overwrite=overwrite)
    except KeyboardInterrupt:
        raise DualRefNetError(
            f"interrupted; the last whole epoch is kept, and the command with --out {folder} --resume goes on"
        ) from None
    from accelerate import PartialState

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

    try:
        table = tune_recipe(checked, out, trials, folds, jobs, ray, cache)
    except KeyboardInterrupt:
        raise DualRefNetError(f"interrupted; what is finished is kept in {out}, and the same command goes on") from None
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
    from dualrefnet.training.train import train_recipe

    folder = out or run.with_name(f"{run.resolve().name}-distilled")
    student = train_recipe(checked, folder, resume, cache, workers, overwrite=overwrite)
    _print_metrics(student.metrics, student.unit)
    typer.echo(f"run folder: {student.path}")


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


@app.command()
def predict(
    context: typer.Context,
    model: ModelFolder,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="CSV",
            help="image, predicted, prob_CLASS, malignancy, warnings, error. Needless for one image: the prediction is "
            "printed.",
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", metavar="PATH", help="An image or a folder of them; or several.", callback=existing),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="CSV",
            help="Instead of --images: one row a case, its file in column image, or the one that a dataset.yaml beside "
            "it names (absolute, or relative to the table), metadata in the others. Without such a column: metadata "
            "alone, for models that need no image.",
            callback=existing,
        ),
    ] = None,
    metadata: Annotated[
        Path | None,
        typer.Option(
            "--metadata",
            metavar="CSV",
            help="Beside --images: column image (file name or id) and fields.",
            callback=existing,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted call of these arguments.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 32,
    workers: Workers = None,
    device: PredictionDevice = "cpu",
    variant: Variant = "float32",
    ray: RayAddress = None,
) -> None:
    """Classify images, a few or a million, with a trained run or an exported bundle.

    Missing metadata make the prediction sets larger and refer more cases: each prediction uses the thresholds fitted
    for what is given. A row that can't be predicted, or has a value unknown to the model, says why in its column error.
    Memory doesn't grow with the number of images.
    """
    from functools import partial

    from dualrefnet.deploy.batch import (
        Cases,
        ImageCases,
        ModelFolder,
        TableCases,
        Work,
        predict_chunks,
        predict_to_csv,
    )
    from dualrefnet.progress import progress_bar

    if out is None:
        refuse_without_effect(context, "without --out", "resume", "batch", "workers", "ray")
    if bool(images) == (table is not None) or (table is not None and metadata is not None):
        raise DualRefNetError("give --images, with --metadata if you have them, or --csv, a table with both")
    folder = ModelFolder(model, device, variant)
    # On Ray the actors have the devices; this process only asks what the model reads.
    predictor = (folder if ray is None else ModelFolder(model, "cpu", variant)).load()
    cases: Cases = TableCases(table, predictor) if table is not None else ImageCases(images or [], metadata, predictor)
    if cases.total == 1:
        _print_prediction(predictor, next(iter(cases)))
    if out is None:
        if cases.total > 1:
            raise DualRefNetError(f"name the file for the {cases.total:,} predictions with --out")
        return
    if ray is None:
        work: Work = partial(predict_chunks, predictor, batch=batch, workers=workers)
    else:
        from dualrefnet.deploy.ray_batch import ray_work

        work = ray_work(folder, ray, batch, workers)
    try:
        with progress_bar("predicting") as show:
            done = predict_to_csv(
                folder, predictor.classes, cases, out, work, batch=batch, resume=resume, progress=show
            )
    except KeyboardInterrupt:
        raise DualRefNetError(
            f"interrupted; what is done is kept beside {out}, and the same command with --resume goes on"
        ) from None
    resumed = f" ({done.resumed} of these rows were there before)" if done.resumed else ""
    typer.echo(
        f"{done.classified} rows classified, {done.failed} not, for the reason in their column error{resumed}: {out}"
    )
    raise typer.Exit(2 if done.failed and not done.classified else 0)


def _print_prediction(predictor: Predictor, case: Case) -> None:
    """Print what the model says of one case."""
    from dualrefnet.display.format import PrintedTable, text_rows
    from dualrefnet.errors import DataError
    from dualrefnet.progress import warn

    if case.error:
        raise DataError(f"{case.name}: {case.error}")
    found = predictor.predict(case.path, case.metadata)
    columns: dict[str, Callable[[str], str]] = {
        "class": str,
        "name": lambda name: predictor.class_names.get(name, "–"),
        "malignant": lambda name: "yes" if name in predictor.malignant else "–",
        "in the set": lambda name: "yes" if name in found.likely else "–",
        "probability": lambda name: f"{found.probabilities[name]:.1%}",
    }
    if not predictor.class_names:
        del columns["name"]
    names = sorted(found.probabilities, key=lambda name: -found.probabilities[name])
    rows = text_rows(tuple(value(name) for value in columns.values()) for name in names)
    print_table(PrintedTable(f"{case.name}: {found.label}", tuple(columns), rows, left=len(columns) - 1))
    if found.likely and predictor.coverage is not None:
        typer.echo(f"set of classes with a nominal coverage of {predictor.coverage:.0%}: {', '.join(found.likely)}")
    if found.malignancy is not None:
        advice = {True: "; referral is advised", False: "; below the referral threshold", None: ""}[found.refer]
        typer.echo(f"malignancy: {found.malignancy:.1%}{advice}")
    if found.out_of_scope is not None:
        typer.echo(f"out-of-distribution score: {found.out_of_scope:.2f} (above 1: unlike the training images)")
    for sentence in found.warnings:
        warn(sentence)
    typer.echo("Not a medical device: for research and teaching.")


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
