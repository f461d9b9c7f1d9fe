"""Commands about data sets: sample, fetch, check, split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dualrefnet.cli import app

DatasetName = Annotated[str, typer.Argument(metavar="DATASET", help="pad_ufes_20, isic_2019, sample or csv_table")]
Root = Annotated[
    Path | None, typer.Option("--root", metavar="DIR", help="The data set's folder; default: the folder of that name in $DUALREFNET_DATA.")
]
Description = Annotated[
    Path | None,
    typer.Option("--description", metavar="YAML", help="csv_table: what the columns mean; default: dataset.yaml in the folder."),
]


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; new, empty, or an earlier sample.")],
    images: Annotated[int, typer.Option(help="Number of pictures.")] = 420,
    seed: Annotated[int, typer.Option(help="The same seed draws the same bytes.")] = 0,
) -> None:
    """Draw the sample data set: pictures of invented lesions with invented metadata, in PAD-UFES-20's layout.

    Drawn, not clinical: for trying the software without any download.
    """
    from dualrefnet.data.sample import draw_sample
    from dualrefnet.progress import progress_bar

    with progress_bar("drawing") as show:
        draw_sample(folder, images=images, seed=seed, progress=show)
    typer.echo(f"{images} drawn pictures with metadata are in {folder}")


@app.command()
def fetch(
    dataset: DatasetName,
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="Folder to fill.")],
    accept_licence: Annotated[bool, typer.Option("--accept-licence", help="You accept the data set's licence.")] = False,
) -> None:
    """Download the official release of a data set. Running it again resumes.

    Shows the licence of the data, which you accept with `--accept-licence`.
    """
    from dualrefnet.data.fetch import fetch_dataset

    for path in fetch_dataset(dataset, root, accept_licence=accept_licence):
        typer.echo(path)


@app.command()
def check(
    dataset: DatasetName,
    root: Root = None,
    description: Description = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the findings as JSON.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that read images; default: one a core.")] = None,
) -> None:
    """Validate a data set: counts, missing, broken and identical images, shared ids, unknown codes.

    Exit status 1 if something FAILs.
    """
    from dualrefnet.data.check import check_dataset
    from dualrefnet.files import write_json
    from dualrefnet.progress import progress_bar

    with progress_bar("reading images") as show:
        report = check_dataset(dataset, root, description, workers, show)
    colours = {"PASS": "green", "WARN": "yellow", "FAIL": "red"}
    console = Console(highlight=False)
    for finding in report.findings:
        console.print(f"[{colours[finding.level]}]{finding.level}[/]  {finding.check}: {finding.message}", soft_wrap=True)
        if finding.examples and finding.level != "PASS":
            console.print(f"      e.g. {', '.join(map(str, finding.examples[:3]))}", style="dim", soft_wrap=True)
    if json_file:
        write_json(json_file, report.to_json())
    raise typer.Exit(1 if report.failed else 0)


@app.command()
def split(
    dataset: DatasetName,
    root: Root = None,
    description: Description = None,
    protocol: Annotated[str, typer.Option(help="paper (Table 1 to the row; leaks), grouped (patients apart) or grouped-cv.")] = "grouped",
    fold: Annotated[int, typer.Option(help="grouped-cv: which fold is the test set, from 0.")] = 0,
    folds: Annotated[int, typer.Option(help="Number of folds.")] = 5,
    seed: Annotated[int, typer.Option(help="Shuffles the grouped protocols.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", metavar="CSV", help="Write image_id, patient_id, label, split.")] = None,
) -> None:
    """Divide a data set into train, validation and test, and say what leaks. Works from the CSVs alone."""
    from dualrefnet.data.adapters import load_dataset
    from dualrefnet.data.protocols import leakage, missing_sides, split_counts, split_dataset
    from dualrefnet.files import write_csv
    from dualrefnet.progress import remark, warn

    loaded = load_dataset(dataset, root, description)
    for message in loaded.remarks:
        warn(message)
    rows = split_dataset(loaded, protocol, fold, folds, seed)
    table = Table("class", "train", "val", "test", title=f"{loaded.schema.title}, protocol {protocol}")
    for name, counts in split_counts(rows, loaded.schema.classes).iterrows():
        table.add_row(str(name), *(f"{count}" for count in counts), end_section=bool(name == loaded.schema.classes[-1]))
    Console().print(table)
    for message in missing_sides(rows, loaded.schema.classes):
        warn(message)
    for name, shares in leakage(loaded, rows).items():
        if shares is None:
            remark(f"the data set names no {name}, so that a {name} on both sides can't be seen")
        elif shares["train"] or shares["train_or_val"]:
            worst = max(shares["per_class"], key=shares["per_class"].get)
            warn(
                f"{shares['train']:.1%} of the test images show a {name} that is also in train "
                f"({shares['train_or_val']:.1%} with validation); worst class: {worst} {shares['per_class'][worst]:.1%}"
            )
        else:
            remark(f"no test image shows a {name} of train or validation")
    if out:
        write_csv(out, rows)
        typer.echo(out)
