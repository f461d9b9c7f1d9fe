"""Commands that show what a run or a suite says: explain, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualrefnet.cli import app

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")]
Root = Annotated[Path | None, typer.Option("--root", metavar="DIR", help="Where the data lie now, if they have moved.")]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Where prepared images lie; default: $DUALREFNET_CACHE or the user's cache folder."),
]
Against = Annotated[
    Path | None, typer.Option("--against", metavar="RUN2", help="Set a second run beside it, on the test images that both have.")
]
Label = Annotated[str | None, typer.Option("--class", metavar="CLASS", help="Also show where photographs speak for this class.")]
Masks = Annotated[
    Path | None,
    typer.Option(
        "--masks",
        metavar="DIR",
        help="Outlines of the lesions, IMAGE_ID.png, to measure where Grad-CAM looks; default: masks/ in the data's folder, if there.",
    ),
]
Images = Annotated[int, typer.Option(min=20, help="Test images at most that are looked at, each class in proportion.")]
ShapImages = Annotated[int, typer.Option(min=20, help="Of these at most so many for SHAP, which takes about a fifth of a second an image.")]
Each = Annotated[int, typer.Option(min=1, help="Right and wrong answers of each class in the gallery.")]
Seed = Annotated[int, typer.Option(help="Of the choice of images and of all resamples.")]
NoPhotographs = Annotated[
    bool,
    typer.Option("--no-photographs", help="Leave out photographs and all that names a single image, so that the result may be sent on."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")]


@app.command()
def explain(
    run: RunFolder,
    against: Against = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder; default: explanations/ in the run folder.")] = None,
    label: Label = None,
    masks: Masks = None,
    images: Images = 500,
    shap_images: ShapImages = 200,
    each: Each = 2,
    seed: Seed = 0,
    no_photographs: NoPhotographs = False,
    root: Root = None,
    cache: Cache = None,
    device: Device = None,
) -> None:
    """Show what a trained run sees: Grad-CAM, SHAP of the form, t-SNE, a gallery, the auxiliary task (extra `explain`).

    Leaves every picture as PNG (300 dpi) and SVG, and its numbers as CSV. `report` puts all of them and more into one page.
    """
    from dualrefnet.report.wishes import Wishes
    from dualrefnet.report.write import write_explanations
    from dualrefnet.run import Run

    wishes = Wishes(images, min(shap_images, images), each, label, masks, not no_photographs, seed)
    files = write_explanations(Run(run), out, Run(against) if against else None, wishes, root, cache, device)
    typer.echo(f"{len(files)} files in {files[0].parent}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN|SUITE", help="A finished run's folder, or a suite's.")],
    against: Against = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder; default: report/ in the run's or suite's folder.")
    ] = None,
    without_explanations: Annotated[
        bool, typer.Option("--without-explanations", help="Only what the predictions say: seconds, and neither data nor model are needed.")
    ] = False,
    label: Label = None,
    masks: Masks = None,
    images: Images = 500,
    shap_images: ShapImages = 200,
    each: Each = 2,
    seed: Seed = 0,
    no_photographs: NoPhotographs = False,
    root: Root = None,
    cache: Cache = None,
    device: Device = None,
) -> None:
    """Write one page about a run or a suite, for people who have only a browser (extras `report` and `explain`).

    The page is one HTML file that works offline; its pictures (PNG, SVG) and their numbers (CSV) lie beside it. A run's page
    takes some minutes on a CPU, most of them for SHAP; `--without-explanations` takes seconds. Of a suite the page shows all
    systems with intervals, and cases in which two of them differ; `--against`, `--class`, `--masks`, the numbers of images and
    the device are for runs alone.
    """
    from dualrefnet.report.wishes import Wishes
    from dualrefnet.report.write import write_report
    from dualrefnet.run import Run

    if (folder / "suite.yaml").is_file():
        from dualrefnet.report.suite import write_suite_report

        page = write_suite_report(folder, out, not no_photographs, root, cache)
    else:
        wishes = Wishes(images, min(shap_images, images), each, label, masks, not no_photographs, seed)
        page = write_report(Run(folder), out, Run(against) if against else None, wishes, not without_explanations, root, cache, device)
    typer.echo(f"the report: {page}")
