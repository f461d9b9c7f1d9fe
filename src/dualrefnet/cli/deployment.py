"""Commands that take a trained model elsewhere: export, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualrefnet.cli import Cache, ModelFolder, PredictionDevice, Root, RunFolder, Variant, app

Accept = Annotated[
    bool,
    typer.Option(
        "--accept-missingness-shortcut",
        help="For research: also a model that takes missing metadata for a sign of a benign lesion, or that was never "
        "measured so. Model card, /v1/model and page then warn of it.",
    ),
]


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

    from dualrefnet.errors import DataError
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
