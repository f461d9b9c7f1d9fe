"""Commands that show what a run or a suite says: explain, report; and those of suites: suites, suite, tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualrefnet.cli import (
    Cache,
    Device,
    Masks,
    Overrides,
    RayAddress,
    Root,
    RunFolder,
    RunOrSuite,
    app,
    existing,
    print_table,
    refuse_without_effect,
    resumable,
)
from dualrefnet.errors import DualRefNetError

if TYPE_CHECKING:
    from dualrefnet.suite.grid import Cell

Against = Annotated[
    Path | None, typer.Option("--against", metavar="RUN2", help="Compare a second run, on the test images of both.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder; default: in the run's or suite's.")]
Label = Annotated[str | None, typer.Option("--class", metavar="CLASS", help="Also show the Grad-CAM of this class.")]
MaxImages = Annotated[int, typer.Option(min=20, help="Test images at most, stratified by class.")]
MaxShapImages = Annotated[int, typer.Option(min=20, help="Of these at most so many for SHAP, about 0.2 s each.")]
Each = Annotated[int, typer.Option(min=1, help="Correct and wrong predictions of each class in the gallery.")]
Seed = Annotated[int, typer.Option(help="Of the sampling of images and of all resamples.")]
NoPhotographs = Annotated[
    bool, typer.Option("--no-photographs", help="Leave out images and whatever identifies one: it can be shared.")
]

# Parameters of what needs a run's model.
OF_MODEL = ("label", "masks", "max_images", "max_shap_images", "each", "seed", "device")


@app.command()
def explain(
    context: typer.Context,
    run: RunFolder,
    image: Annotated[
        Path | None,
        typer.Option("--image", metavar="PATH", help="Explain the prediction of this image alone.", callback=existing),
    ] = None,
    metadata: Annotated[
        Path | None,
        typer.Option(
            "--metadata",
            metavar="CSV",
            help="Beside --image: column image (file name or id) and fields.",
            callback=existing,
        ),
    ] = None,
    against: Against = None,
    out: Out = None,
    label: Label = None,
    masks: Masks = None,
    max_images: MaxImages = 500,
    max_shap_images: MaxShapImages = 200,
    each: Each = 2,
    seed: Seed = 0,
    no_photographs: NoPhotographs = False,
    root: Root = None,
    cache: Cache = None,
    device: Device = None,
) -> None:
    """Explain a trained run: Grad-CAM, SHAP of the metadata, t-SNE, a gallery, super-resolution (extra `explain`).

    Writes every figure as PNG (300 dpi) and SVG, and its data as CSV. `report` puts all of them into one page.

    With `--image` one prediction: patches of the image are occluded and values left out, one at a time. Prints by how
    much that changes the probability, and writes where in the image as PNG.
    """
    if image is not None:
        unused = (*(name for name in OF_MODEL if name not in ("label", "device")), "against", "no_photographs")
        refuse_without_effect(context, "with --image", *unused, "root", "cache")
        _explain_image(run, image, metadata, label, out or run / "explanations", device or "cpu")
        return
    refuse_without_effect(context, "without --image", "metadata")
    from dualrefnet.report import ReportOptions
    from dualrefnet.report.run_report import write_explanations
    from dualrefnet.run import Run

    shap_images, photographs = min(max_shap_images, max_images), not no_photographs
    options = ReportOptions(max_images, shap_images, each, label, masks, photographs, seed, root, cache, device)
    files = write_explanations(Run(run), out, Run(against) if against else None, options)
    typer.echo(f"{len(files)} files in {out or run / 'explanations'}")


def _explain_image(run: Path, image: Path, metadata: Path | None, label: str | None, out: Path, device: str) -> None:
    from dualrefnet.deploy.batch import ImageCases
    from dualrefnet.deploy.predictor import Predictor
    from dualrefnet.display.format import PrintedTable, text_rows

    predictor = Predictor.load(run, device)
    if not image.is_file():
        raise DualRefNetError(f"there is no image {image}")
    (case,) = ImageCases([image], metadata, predictor)
    explanation = predictor.explain(case.path, case.metadata, label)
    fields = sorted(explanation.fields.items(), key=lambda item: -abs(item[1]))
    rows = text_rows((name, case.metadata[name], f"{100 * change:+.1f}") for name, change in fields)
    title = f"{image}: {explanation.label}, probability {explanation.probability:.1%}"
    note = "Points: of the probability, in percent, that are gone without the value; if negative, it speaks against."
    if rows:
        print_table(PrintedTable(title, ("field", "value", "points"), rows, (note,), left=2))
    else:
        typer.echo(f"{title}; no metadata were given")
    files = explanation.save(out / f"{image.stem}.png")
    typer.echo(f"files: {', '.join(map(str, files))}")


@app.command()
def report(
    context: typer.Context,
    folder: RunOrSuite,
    against: Against = None,
    out: Out = None,
    without_explanations: Annotated[
        bool, typer.Option("--without-explanations", help="What predictions alone tell: seconds, no data, no model.")
    ] = False,
    label: Label = None,
    masks: Masks = None,
    max_images: MaxImages = 500,
    max_shap_images: MaxShapImages = 200,
    each: Each = 2,
    seed: Seed = 0,
    no_photographs: NoPhotographs = False,
    root: Root = None,
    cache: Cache = None,
    device: Device = None,
) -> None:
    """Write a report of a run or a suite as one HTML page (extras `report` and `explain`).

    The page works offline; its figures (PNG, SVG) and their data (CSV) are beside it. A run's page takes some minutes
    on a CPU, most of them for SHAP; `--without-explanations` takes seconds. A suite's page shows all systems with
    intervals, and cases in which two of them differ; `--against`, `--class`, `--masks`, the numbers of images and the
    device are for runs alone.
    """
    from dualrefnet.report import ReportOptions
    from dualrefnet.report.run_report import write_report
    from dualrefnet.run import Run

    if (folder / "suite.yaml").is_file():
        from dualrefnet.report.suite_report import write_suite_report

        refuse_without_effect(context, "on a suite", "against", "without_explanations", *OF_MODEL)
        page = write_suite_report(folder, out, not no_photographs, root, cache)
    else:
        if without_explanations:
            refuse_without_effect(context, "without explanations", *OF_MODEL, "root", "cache")
        shap_images, photographs = min(max_shap_images, max_images), not no_photographs
        options = ReportOptions(max_images, shap_images, each, label, masks, photographs, seed, root, cache, device)
        page = write_report(Run(folder), out, Run(against) if against else None, options, not without_explanations)
    typer.echo(f"report: {page}")


@app.command("suites")
def list_suites(
    name: Annotated[str | None, typer.Argument(metavar="[SUITE]", help="Print this suite.")] = None,
) -> None:
    """List the suites that ship, or print one: save it, change it, and give the file to `suite`."""
    from dualrefnet.suite.grid import expand, load_suite, shipped_suites, suite_text

    if name is not None:
        typer.echo(suite_text(name), nl=False)
        return
    for shipped in shipped_suites():
        loaded = load_suite(shipped)
        typer.echo(f"{shipped:<17} {len({cell.run for cell in expand(loaded)}):>4} runs  {loaded.title}")


@app.command()
def suite(
    name: Annotated[str, typer.Argument(metavar="SUITE", help="A YAML file, or a suite that ships (`suites`).")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The suite folder; default: its name in suites/.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every recipe and list the runs.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Synthetic images, one CNN, one epoch: minutes.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time; they share the cores.")] = 1,
    ray: RayAddress = None,
    cores: Annotated[
        int | None, typer.Option(min=1, help="CPU cores of one run; default: a worker's share, on Ray 1.")
    ] = None,
    discard_models: Annotated[
        bool, typer.Option("--discard-models", help="Remove the parameters of finished runs; tables need none.")
    ] = False,
    cache: Cache = None,
) -> None:
    """Train a grid of recipes: a table or figure of the paper, or your own. Running it again goes on where it stopped.

    KEY=VALUE changes every run; model.method, model.backbone, data.fold and seed take lists too: seed=[0,1,2].

    A run that fails is reported at the end, doesn't stop the others, and is tried again by the next call. Exit status 1
    if one failed. `dualrefnet tables DIR` makes the tables.
    """
    from dualrefnet.progress import note
    from dualrefnet.recipe import parse_overrides
    from dualrefnet.suite.grid import check_names, expand, load_suite, prepare

    chosen, values = load_suite(name), parse_overrides(overrides or [])
    folder = out or Path("suites") / (f"{chosen.name}-smoke" if smoke else chosen.name)
    chosen, remarks = prepare(chosen, values, folder.absolute() / "data" if smoke else None)
    for message in remarks:
        note(message)
    cells = expand(chosen)
    check_names(cells)
    if dry_run:
        _print_plan(
            cells, [f"{split.recipe.data.dataset}, protocol {split.recipe.data.protocol}" for split in chosen.splits]
        )
        return
    from dualrefnet.suite.runner import run_suite

    with resumable(f"what is finished is kept in {folder}, and the same command"):
        outcome = run_suite(chosen, folder, workers, cache, ray, cores, not discard_models)
    for reason in dict.fromkeys(failure.error for failure in outcome.failed.values()):
        runs = [run for run, failure in outcome.failed.items() if failure.error == reason]
        typer.echo(f"failed: {', '.join(runs)}: {reason}")
    counts = f"{len(outcome.finished)} finished, {outcome.skipped} were finished before, {len(outcome.failed)} failed"
    typer.echo(f"runs in {folder}: {outcome.total}; {counts}")
    if outcome.failed:
        typer.echo(f"{folder}/failures and {folder}/logs say more; the same command tries the failed runs again")
    else:
        typer.echo(f"now: dualrefnet tables {folder}")
    raise typer.Exit(1 if outcome.failed else 0)


@app.command()
def paper(
    overrides: Overrides = None,
    only: Annotated[
        str,
        typer.Option("--only", metavar="PARTS", help="Some of table1 to table4, figure1e, figure7, ablations: a,b."),
    ] = "",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: paper, or paper-smoke.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say runs, hours and disk; train nothing.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Synthetic images, one CNN, one epoch: minutes.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time; they share the cores.")] = 1,
    no_photographs: NoPhotographs = False,
    cache: Cache = None,
    device: Device = None,
) -> None:
    """Train everything in the paper and write one page: its tables and figures as printed, with a verdict on each.

    Running it again goes on where it stopped. A run that several tables share is trained once. Exit status 1 if a run
    failed; the page is written all the same.
    """
    from dualrefnet.progress import note
    from dualrefnet.recipe import parse_overrides
    from dualrefnet.report import ReportOptions
    from dualrefnet.suite.paper import paper_suites, plan_table, run_paper

    folder = out or Path("paper-smoke" if smoke else "paper")
    names = [name.strip() for name in only.split(",") if name.strip()]
    suites, remarks = paper_suites(names, parse_overrides(overrides or []), smoke, folder)
    for message in remarks:
        note(message)
    if dry_run:
        print_table(plan_table(suites))
        return
    with resumable(f"what is finished is kept in {folder}, and the same command"):
        outcomes = run_paper(suites, folder, workers, cache)
    from dualrefnet.report.paper_report import write_paper_report

    images, shap_images, each = (60, 20, 1) if smoke else (500, 200, 2)
    options = ReportOptions(images, shap_images, each, photographs=not no_photographs, cache=cache, device=device)
    page = write_paper_report(folder, options)
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.failed}
    for name, outcome in failed.items():
        for reason in dict.fromkeys(failure.error for failure in outcome.failed.values()):
            count = sum(failure.error == reason for failure in outcome.failed.values())
            typer.echo(f"{name}: {count} of {max(1, outcome.total)} failed: {reason}")
    typer.echo(f"the paper: {page}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def tables(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A suite folder, finished or not.")]) -> None:
    """Make the tables of a suite from its runs: CSV, Markdown and LaTeX, with intervals, tests and the paper's numbers.

    Prints the tables; the files are in DIR/tables.
    """
    from dualrefnet.suite.results import aggregate
    from dualrefnet.suite.tables import printed_tables, write_tables

    found = aggregate(folder)
    files = write_tables(folder, found)
    for _, table in printed_tables(found):
        print_table(table)
    typer.echo(f"files: {', '.join(str(file) for file in files)}")


def _print_plan(cells: list[Cell], splits: list[str]) -> None:
    for cell in cells:
        if cell.run == cell.name:
            typer.echo(f"{cell.name:<64} protocol {cell.key.protocol}, {cell.recipe.training.epochs} epochs")
    for split in splits:
        typer.echo(f"split of {split}")
    shared = [cell for cell in cells if cell.run != cell.name]
    for cell in shared:
        typer.echo(f"{cell.name:<64} is the run {cell.run}")
    counts = [f"runs: {len(cells) - len(shared)}"]
    counts += [f"cells: {len(cells)}"] if shared else []
    counts += [f"splits: {len(splits)}"] if splits else []
    typer.echo(f"{', '.join(counts)}; nothing was trained")
