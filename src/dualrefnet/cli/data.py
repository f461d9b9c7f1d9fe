"""Commands about data sets: sample, fetch, check, split, audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dualrefnet.cli import COLOURS, Description, Workers, app, print_findings, print_table, refuse_without_effect

DatasetName = Annotated[str, typer.Argument(metavar="DATASET", help="pad_ufes_20, isic_2019, sample or csv_table")]
Root = Annotated[
    Path | None, typer.Option("--root", metavar="DIR", help="The data set's folder; default: in $DUALREFNET_DATA.")
]
Protocol = Annotated[
    str,
    typer.Option(
        help="paper (Table 1 to the row; leaks), grouped (no patient in two splits; no lesion, where no patients are "
        "named), grouped-cv, cross-fitted or own (yours)."
    ),
]
SplitFile = Annotated[
    Path | None,
    typer.Option("--split-file", metavar="CSV", help="own: image_id and split; default: the column of a csv_table."),
]
Fold = Annotated[int, typer.Option(help="grouped-cv: which fold is the test set, from 0.")]
Folds = Annotated[int, typer.Option(help="Number of folds.")]
SplitSeed = Annotated[int, typer.Option(help="Shuffles the grouped protocols.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="JSON", help="Also write the result as JSON.")]


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; new, empty, or an earlier sample.")],
    count: Annotated[int, typer.Option("--count", help="Number of images.")] = 420,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
) -> None:
    """Make the synthetic sample data set: images of invented lesions with metadata, in PAD-UFES-20's layout.

    Not clinical: for trying the software without any download.
    """
    from dualrefnet.data.synthetic import make_synthetic

    make_synthetic(folder, images=count, seed=seed)
    typer.echo(f"{count} synthetic images with metadata are in {folder}")


@app.command()
def fetch(
    dataset: DatasetName,
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="Folder to fill.")],
    accept_licence: Annotated[bool, typer.Option("--accept-licence", help="You accept the data's licence.")] = False,
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
    out: Out = None,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Also measure brightness and colour cast of every image before and after preprocessing, one row each.",
        ),
    ] = None,
    workers: Workers = None,
) -> None:
    """Validate a data set: counts, missing, broken and identical images, shared ids, unknown codes.

    Exit status 1 if something FAILs.
    """
    from dualrefnet.data.check import check_dataset
    from dualrefnet.files import write_json

    report = check_dataset(dataset, root, description, workers)
    print_findings(report.findings)
    result = report.to_json()
    if csv_file:
        result["image_statistics"] = _image_statistics(dataset, root, description, csv_file, workers)
    if out:
        write_json(out, result)
    raise typer.Exit(1 if report.failed else 0)


def _image_statistics(
    dataset: str, root: Path | None, description: Path | None, csv_file: Path, workers: int | None
) -> list[dict[str, Any]]:
    """Write brightness and colour cast of every image, print them by class, and return what was printed."""
    from dualrefnet.analysis.image_statistics import measure_images, statistics_table, summarise
    from dualrefnet.data.adapters import load_dataset
    from dualrefnet.files import write_csv
    from dualrefnet.recipe import ImageSection

    loaded = load_dataset(dataset, root, description)
    measured = measure_images(loaded.with_image, ImageSection(), workers)
    write_csv(csv_file, measured)
    print_table(statistics_table(measured, loaded.schema.classes))
    summary = summarise(measured, loaded.schema.classes)
    return summary.astype(object).where(summary.notna(), None).to_dict("records")  # type: ignore[return-value]


@app.command()
def split(
    context: typer.Context,
    dataset: DatasetName,
    root: Root = None,
    description: Description = None,
    protocol: Protocol = "grouped",
    fold: Fold = 0,
    folds: Folds = 5,
    seed: SplitSeed = 0,
    split_file: SplitFile = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="CSV", help="Write the split, one row an image.")] = None,
) -> None:
    """Divide a data set into train, validation and test, and say what leaks. Works from the CSVs alone."""
    from dualrefnet.data.adapters import load_dataset
    from dualrefnet.data.check import crossing_ids
    from dualrefnet.data.protocols import missing_classes, split_counts, split_dataset
    from dualrefnet.display.format import PrintedTable, protocol_name, text_rows
    from dualrefnet.files import write_csv
    from dualrefnet.progress import warn

    _check_protocol(context)
    loaded = load_dataset(dataset, root, description)
    for message in loaded.warnings:
        warn(message)
    # What leaks is said below; `train` refuses it.
    rows = split_dataset(loaded, protocol, fold, folds, seed, split_file, allow_leak=True)
    counts = split_counts(rows, loaded.schema.classes)
    title = f"{loaded.schema.title}, protocol {protocol}: {protocol_name(protocol, loaded.schema.unit)}"
    there = int(rows["image_id"].isin(loaded.with_image["image_id"]).sum())
    print_table(PrintedTable(title, ("class", *counts), text_rows(counts.itertuples(name=None))))
    typer.echo(f"{there:,} of these rows have their image here, {len(rows) - there:,} don't")
    for message in missing_classes(rows, loaded.schema.classes):
        warn(message)
    print_findings(list(crossing_ids(loaded, rows)))
    if out:
        write_csv(out, rows)
        typer.echo(out)


def _check_protocol(context: typer.Context) -> None:
    protocol = context.params["protocol"]
    whole = ["fold", "folds", "seed"]
    unused = {"grouped": ["fold"], "paper": whole, "own": whole}.get(protocol, [])
    unused = unused if protocol == "own" else [*unused, "split_file"]
    refuse_without_effect(context, f"with the protocol {protocol}", *unused)


@app.command()
def audit(
    context: typer.Context,
    dataset: DatasetName,
    root: Root = None,
    description: Description = None,
    protocol: Protocol = "grouped",
    fold: Fold = 0,
    folds: Folds = 5,
    seed: SplitSeed = 0,
    split_file: SplitFile = None,
    out: Out = None,
    without_images: Annotated[bool, typer.Option("--without-images", help="Read no image, find no duplicate.")] = False,
    without_forests: Annotated[bool, typer.Option("--without-forests", help="No random forests: faster.")] = False,
    workers: Workers = None,
) -> None:
    """Audit a data set and its split: patients, lesions and duplicate images in two splits, and label-leaking metadata.

    Exit status 1 if something FAILs.
    """
    from rich.text import Text

    from dualrefnet.data.adapters import find_root
    from dualrefnet.display.format import protocol_name
    from dualrefnet.files import write_json
    from dualrefnet.progress import output

    _check_protocol(context)
    find_root(dataset, root)
    # scikit-learn takes a second to import.
    from dualrefnet.analysis.audit import audit_dataset, printed_tables

    result = audit_dataset(
        dataset,
        root,
        description,
        protocol,
        fold,
        folds,
        seed,
        not without_images,
        not without_forests,
        workers,
        split_file,
    )
    print_findings(result.findings)
    for table in printed_tables(result).values():
        print_table(table)
    verdict = (result.verdict, COLOURS[result.verdict])
    split_by = f"protocol {result.protocol}, {protocol_name(result.protocol, result.group)}"
    output().print(Text.assemble(f"{result.dataset}, {split_by}: ", verdict))
    if out:
        write_json(out, result.to_json())
    raise typer.Exit(1 if result.failed else 0)
