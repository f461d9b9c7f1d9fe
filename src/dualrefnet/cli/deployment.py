"""Commands that use a trained model: predict, export, serve."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualrefnet.cli import (
    Cache,
    ModelFolder,
    PredictionDevice,
    RayAddress,
    Root,
    RunFolder,
    Variant,
    Workers,
    app,
    existing,
    print_table,
    refuse_without_effect,
    resumable,
)
from dualrefnet.errors import DataError, DualRefNetError

if TYPE_CHECKING:
    from dualrefnet.deploy.batch import Case
    from dualrefnet.deploy.predictor import Predictor

Accept = Annotated[
    bool,
    typer.Option(
        "--accept-missingness-shortcut",
        help="For research: also a model that takes missing metadata for a sign of a benign lesion, or that was never "
        "measured so. Model card, /v1/model and page then warn of it.",
    ),
]


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
    from dualrefnet.deploy.batch import Cases, ImageCases, ModelFolder, TableCases, Work, predict_chunks, predict_to_csv

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
    with resumable(f"what is done is kept beside {out}, and the same command with --resume"):
        done = predict_to_csv(folder, predictor.classes, cases, out, work, batch=batch, resume=resume)
    resumed = f" ({done.resumed} of these rows were there before)" if done.resumed else ""
    typer.echo(
        f"{done.classified} rows classified, {done.failed} not, for the reason in their column error{resumed}: {out}"
    )
    raise typer.Exit(2 if done.failed and not done.classified else 0)


def _print_prediction(predictor: Predictor, case: Case) -> None:
    """Print what the model says of one case."""
    from dualrefnet.display.format import PrintedTable, text_rows
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


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the bundle; replaced if it exists.")],
    int8: Annotated[
        bool | None, typer.Option("--int8/--no-int8", help="Also an 8-bit network; default: if the images are there.")
    ] = None,
    root: Root = None,
    cache: Cache = None,
    accept_missingness_shortcut: Accept = False,
    push_to: Annotated[
        str | None, typer.Option("--push-to", metavar="ORG/NAME", help="Then push it to the Hugging Face Hub, private.")
    ] = None,
) -> None:
    """Export a trained run as a bundle: a folder that predicts without torch, and says what it is (extra `export`).

    It holds the network as ONNX (`model.onnx`) and for `torch.export.load` (`model.pt2`), preprocessing, metadata
    encoding, calibration, the out-of-distribution check, a model card, the licence of the data, and a small program
    that needs only onnxruntime, NumPy and OpenCV. No image and no patient is in it.

    The exported network is compared with torch's on validation images; a difference of more than 0.001 in a probability
    stops the export, and nothing is left behind. A model whose referral of cancers falls by more than .10 when metadata
    are blank is refused.

    `predict`, `serve` and `dualrefnet.Predictor.load` take the folder in place of a run.
    """
    from dualrefnet.deploy.export import export_run
    from dualrefnet.run import Run

    bundle = export_run(Run(run), out, int8, root, cache, accept_missingness_shortcut)
    parity = bundle["networks"]["float32"]["parity"]
    difference = f"largest difference of a probability from torch's {parity['max_probability_difference']:.1e}"
    typer.echo(f"{out}: {', '.join(bundle['networks'])}; {difference}, {parity['checked_on']}")
    if push_to is not None:
        from dualrefnet.deploy.hub import push_bundle

        typer.echo(f"pushed: {push_bundle(out, push_to, private=True)}")


@app.command()
def serve(
    model: ModelFolder,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a copy of the model.")] = 1,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="Keys, one a line; or $DUALREFNET_API_KEY.")
    ] = None,
    max_upload: Annotated[int, typer.Option("--max-upload", min=1, metavar="MB", help="Largest request.")] = 64,
    max_image: Annotated[int, typer.Option("--max-image", min=1, metavar="MB", help="Largest image in it.")] = 20,
    max_megapixels: Annotated[int, typer.Option("--max-megapixels", min=1, help="Most pixels of an image.")] = 50,
    queue: Annotated[int, typer.Option(min=1, help="Requests that a worker holds at once.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="From request to response.")] = 30.0,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", metavar="ORIGIN", help="A web site whose pages may use the service; or several."
        ),
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The web page at /.")] = True,
    root_path: Annotated[
        str, typer.Option("--root-path", metavar="PATH", help="Path under which a proxy serves it, such as /lesions.")
    ] = "",
    device: PredictionDevice = "cpu",
    variant: Variant = "float32",
    accept_missingness_shortcut: Accept = False,
) -> None:
    """Serve a model over HTTP, with a web page at / and the API's documentation at /docs.

    SIGTERM, SIGHUP or Ctrl+C stops the service after every accepted request is answered; a second one stops it at
    once. Needs the extra `deploy`.
    """
    from pydantic import ValidationError

    from dualrefnet.service.server import Served
    from dualrefnet.service.server import serve as run_server
    from dualrefnet.service.settings import ServiceSettings

    size = max_upload * 2**20
    try:
        settings = ServiceSettings(
            page=page,
            root_path=root_path,
            allow_origins=tuple(allow_origin or ()),
            max_upload=size,
            max_image=max_image * 2**20,
            max_pixels=max_megapixels * 10**6,
            queue_bytes=max(4 * size, 256 * 2**20),
            queue=queue,
            timeout=timeout,
            accept_missingness_shortcut=accept_missingness_shortcut,
        )
    except ValidationError as error:
        # All other options have been checked by their types.
        wanted = {"root_path": "a path such as /lesions", "allow_origins": "an origin such as https://example.org"}
        name = str(error.errors()[0]["loc"][0])
        option = "--" + name.removesuffix("s").replace("_", "-")
        raise DataError(f"{option} must be {wanted[name]}, without a slash at its end") from None
    keys = api_key_file and api_key_file.resolve()
    where = {"device": device, "host": host, "port": port, "workers": workers}
    served = Served(source=model.resolve(), settings=settings, api_key_file=keys, variant=variant, **where)
    raise typer.Exit(run_server(served))
