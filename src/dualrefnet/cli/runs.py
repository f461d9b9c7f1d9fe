"""Commands about runs: doctor, demo, methods, recipes, prepare, train, evaluate, probe, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax

from dualrefnet.cli import app
from dualrefnet.cli.show import COLOURS, output, print_table
from dualrefnet.errors import DualRefNetError

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that ships (`dualrefnet recipes`)."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Change the recipe: training.epochs=3 data.root=DIR ..."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The run folder; default: the recipe's name in runs/.")
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Where prepared images lie; default: $DUALREFNET_CACHE or the user's cache folder.",
    ),
]
Workers = Annotated[int | None, typer.Option(help="Threads that prepare images; default: one a core.")]


@app.command()
def doctor() -> None:
    """Check the environment, the weights and the data: PASS, WARN or FAIL, each with the fix. Exit status 1 on FAIL."""
    from dualrefnet.doctor import examine

    findings = examine()
    console = output()
    for finding in findings:
        console.print(
            f"[{COLOURS[finding.level]}]{finding.level}[/]  {finding.subject}: {finding.message}", soft_wrap=True
        )
    raise typer.Exit(1 if any(finding.level == "FAIL" for finding in findings) else 0)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the drawn data and the run.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Draw the sample data set, train DualRefNet on it, measure and explain it, and write a report. No network; a few
    minutes.

    Needs the extra `explain`.
    """
    from dualrefnet.demo import run_demo

    run, page = run_demo(out)
    _print_metrics(run.metrics)
    typer.echo(
        f"The run folder is {run.path}; try: dualrefnet predict {run.path} --images {out}/data/images --metadata {out}/data/metadata.csv "
        "--out predictions.csv"
    )
    typer.echo(f"The report, for any browser: {page.resolve()}")


@app.command()
def methods() -> None:
    """List the methods that can be trained: `train RECIPE model.method=NAME`. Where a system is a reconstruction, it
    says so.
    """
    from rich.table import Table

    from dualrefnet.models.registry import METHODS

    table = Table("name", "method", "published", "filled in by us", show_lines=True)
    for name, method in METHODS.items():
        table.add_row(name, method.title, method.reference, method.reconstruction or "–")
    Console().print(table)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None) -> None:
    """List the recipes that ship, or print one: save it, change it, and give the file to `train`."""
    from dualrefnet.recipe import load_recipe, recipe_text, shipped_recipes

    if name is not None:
        text = recipe_text(name)
        console = Console()
        console.print(Syntax(text, "yaml", background_color="default")) if console.is_terminal else typer.echo(
            text, nl=False
        )
        return
    for shipped in shipped_recipes():
        typer.echo(f"{shipped:<20} {load_recipe(shipped).description}")


@app.command()
def prepare(recipe: RecipeName, overrides: Overrides = None, cache: Cache = None, workers: Workers = None) -> None:
    """Decode and preprocess a recipe's images once, into the image store. `train` does it too if it wasn't done."""
    from dualrefnet.data.loader import fill_recipe_store, read_dataset
    from dualrefnet.recipe import load_recipe, parse_overrides

    checked = load_recipe(recipe, parse_overrides(overrides or []))
    store = fill_recipe_store(checked, read_dataset(checked), cache, workers)
    typer.echo(f"{len(store.image_ids) - len(store.broken)} images of {store.side} px are in {store.path}")


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run in the folder; start it if there is none.")
    ] = False,
    cache: Cache = None,
    workers: Workers = None,
) -> None:
    """Train and evaluate a recipe; leaves a run folder with the model, predictions and measures.

    Several GPUs: `accelerate launch --multi_gpu -m dualrefnet train RECIPE ...`; several processes on CPUs: the same
    with
    `--num_processes N` and `training.device=cpu`.
    """
    from dualrefnet.recipe import load_recipe, parse_overrides
    from dualrefnet.training.train import train_recipe

    checked = load_recipe(recipe, parse_overrides(overrides or []))
    folder = out or Path("runs") / checked.name
    try:
        run = train_recipe(checked, folder, resume, cache, workers)
    except KeyboardInterrupt:
        raise DualRefNetError(
            f"interrupted; the last whole epoch is kept in {folder}, and the same command with --resume goes on"
        ) from None
    from accelerate import PartialState

    if PartialState().is_main_process:
        _print_metrics(run.metrics)
        typer.echo(f"run folder: {run.path}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    root: Annotated[
        Path | None, typer.Option("--root", metavar="DIR", help="Where the data lie now, if they have moved.")
    ] = None,
    cache: Cache = None,
) -> None:
    """Measure a trained run again: writes predictions.csv and metrics.json, prints the tables."""
    from dualrefnet.analysis.evaluate import evaluate_run
    from dualrefnet.run import Run

    _print_metrics(evaluate_run(Run(run), root, cache=cache))


@app.command()
def probe(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", metavar="RUN2", help="Set a run of the same test images beside it; may be given several times."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder; default: probes/ in the run folder.")
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            "--masks",
            metavar="DIR",
            help="Outlines of the lesions, IMAGE_ID.png; default: masks/ in the data's folder, if there.",
        ),
    ] = None,
    permutations: Annotated[int, typer.Option(min=1, help="How often inputs are exchanged between patients.")] = 10,
    draws: Annotated[int, typer.Option(min=1, help="Random choices of answers for each share of them.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of exchanges, choices and resamples.")] = 0,
    root: Annotated[
        Path | None, typer.Option("--root", metavar="DIR", help="Where the data lie now, if they have moved.")
    ] = None,
    cache: Cache = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")] = None,
) -> None:
    """Ask a trained run again with parts of its input taken away or exchanged: how much of its score is shortcut?

    Then with fewer and fewer answers, with and without the photograph. Leaves the tables as CSV and, with the extra
    `report`,
    their pictures.
    """
    from dualrefnet.report.run_report import write_probes
    from dualrefnet.run import Run

    others = [Run(path) for path in against or []]
    probed = write_probes(
        Run(run), others, out, masks, permutations, draws, seed=seed, root=root, cache=cache, device=device
    )
    for table in probed.tables:
        print_table(table)
    typer.echo(f"the probes: {probed.folder}")


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="A run folder, or the folder of an exported bundle.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="CSV",
            help="Result: image, predicted, prob_CLASS of every class, malignancy, warnings, error.",
        ),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", metavar="PATH", help="A photograph or a folder of them; may be given several times."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="CSV",
            help="Instead of --images: one row a case, in column image its file (absolute, or relative to the table), in the others the "
            "form. Without a column image: forms alone, for models that do without photographs.",
        ),
    ] = None,
    metadata: Annotated[
        Path | None,
        typer.Option(
            "--metadata",
            metavar="CSV",
            help="Beside --images: one row an image, a column image (file name or id) and any of the fields; absent ones are missing.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with what an interrupted call with the same arguments left; begin if it left nothing.",
        ),
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Photographs that the model sees at once.")] = 32,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode; default: one a core. On Ray: CPUs of each model, 1.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    variant: Annotated[str, typer.Option(help="Of a bundle: float32, or int8 if it has that.")] = "float32",
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Predict on a Ray cluster (extra `scale`): its address, `auto`, or `local` to start Ray here. The model, the photographs "
            "and --out must be on a file system that all its machines see.",
        ),
    ] = None,
) -> None:
    """Classify photographs, a few or a million, with a trained run or an exported bundle.

    Metadata that are missing make the sets larger and more cases be referred: each answer uses the thresholds that were
    fitted for what is
    given. A row that can't be predicted, or has a value that the model doesn't know, says why in its column error.
    Memory doesn't grow with
    the number of photographs.
    """
    from functools import partial

    from dualrefnet.deploy.batch import (
        Cases,
        FileCases,
        ModelFolder,
        TableCases,
        Work,
        predict_here,
        predict_to_csv,
        show_pace,
    )

    if bool(images) == (table is not None) or (table is not None and metadata is not None):
        raise DualRefNetError("give --images, with --metadata if there are forms, or --csv, a table with both")
    folder = ModelFolder(model, device, variant)
    # On Ray the actors have the devices; this process only asks what the model reads.
    predictor = (folder if ray is None else ModelFolder(model, "cpu", variant)).load()
    cases: Cases = TableCases(table, predictor) if table is not None else FileCases(images or [], metadata, predictor)
    if ray is None:
        work: Work = partial(predict_here, predictor, batch=batch, workers=workers)
    else:
        from dualrefnet.deploy.ray_batch import ray_work

        work = ray_work(folder, out, ray, batch, workers)
    try:
        with show_pace("predicting") as show:
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


def _print_metrics(metrics: dict[str, Any]) -> None:
    from dualrefnet.display.format import availability_line, calibration_line, metrics_tables
    from dualrefnet.runtime.availability import missingness_shortcut

    title = f"{metrics['dataset']}, test set, protocol {metrics['protocol']}" + (
        " - DRAWN PICTURES, NOT CLINICAL" if metrics["drawn"] else ""
    )
    for table in metrics_tables(metrics, title):
        print_table(table)
    # A run that was finished by an earlier version has none.
    if "calibrated" in metrics:
        typer.echo(calibration_line(metrics["calibrated"]))
    if "availability" in metrics:
        typer.echo(availability_line(metrics["availability"]))
        reason = missingness_shortcut(metrics)
        if reason is not None:
            Console().print(f"[red]not to be used where metadata may be missing[/red]: {reason}", soft_wrap=True)
