"""How long does one image with its form take? The whole predictor against bare onnxruntime inference of its image
encoder.

The image is as large as a phone's. Decoding, colour steps and resizing depend on its size and not on the model, so they
are stated apart; the ratio is that of everything else the predictor does (form, network, calibration, sets, check of
the image, warnings) to the encoder alone, in onnxruntime with its own defaults. The variants are torch as trained
(eager), the exported ONNX file, and its int8 variant where the bundle has one.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import pandas as pd
import torch
import typer
from numpy.typing import NDArray

from dualrefnet import Predictor
from dualrefnet.data.images import decode_image
from dualrefnet.deploy.network import TorchNetwork
from dualrefnet.runtime.preprocessing import clahe_lightness, shades_of_gray, to_square
from record import RESULTS, interleaved, record
from synthetic_images import image_table

# Seconds before each timing, as between requests of one client.
PAUSE = 0.005
BASE = "encoder alone, bare onnxruntime"
BLOCK = 20


class Timed:
    """A case in a process of its own, which computes only when it is asked: in one process, the threads of one session
    get
    into the way of the next, which no server does.

    Args:
        make: returns what is timed; called in the process.
        given: arguments of `make`.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *given: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, given), daemon=True)
        self._process.start()
        self._here.recv()

    def ask(self, times: int) -> list[float]:
        """Return the seconds of so many calls."""
        self._here.send(times)
        seconds: list[float] = self._here.recv()
        return seconds

    def close(self) -> None:
        """End the process."""
        self._here.send(0)
        self._process.join()


def _serve(there: Connection, make: Callable[..., Callable[[], object]], given: tuple[Any, ...]) -> None:
    case = make(*given)
    for _ in range(10):
        case()
    there.send("ready")
    while times := there.recv():
        seconds = []
        for _ in range(times):
            time.sleep(PAUSE)
            started = time.perf_counter()
            case()
            seconds.append(time.perf_counter() - started)
        there.send(seconds)


def whole_predictor(
    source: Path, variant: str, prepared: NDArray[np.uint8], form: dict[str, Any]
) -> Callable[[], object]:
    """Return the prediction of one image that is prepared, with its form."""
    predictor = Predictor.load(source, variant=variant)
    return lambda: predictor.predict_arrays([prepared], [form])


def bare_encoder(file: Path, size: int) -> Callable[[], object]:
    """Return the inference of one image by an encoder's ONNX file, with onnxruntime's own defaults."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)}
    return lambda: session.run(None, given)


def export_encoder(eager: Predictor, file: Path) -> None:
    """Export the image encoder of a run alone."""
    network = eager.network
    assert isinstance(network, TorchNetwork)
    picture = torch.zeros(1, 3, eager.size, eager.size)
    torch.onnx.export(
        _Vector(network.model.encoder).eval(), (picture,), str(file), dynamo=True, external_data=False, verbose=False
    )


class _Vector(torch.nn.Module):
    """The encoder's vector alone."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        vector: torch.Tensor = self.encoder(image).vector
        return vector


def an_answer_for_every_field(predictor: Predictor) -> dict[str, Any]:
    """Return a whole form: the middle of numbers, the first of categories."""
    forms = {}
    for field in predictor.fields:
        low, high = field.minimum or 0, field.maximum if field.maximum is not None else 100
        forms[field.name] = (low + high) / 2 if field.kind == "numeric" else predictor.categories(field.name)[0]
    return forms


def _percentile(times: list[float], number: int) -> float:
    """Return a percentile of seconds, in milliseconds."""
    return 1000 * float(np.percentile(times, number))


def main(
    run: Annotated[Path, typer.Argument(help="A finished run's folder, of a model that reads images.")],
    bundle: Annotated[Path, typer.Argument(help="The bundle that `dualrefnet export` made of it.")],
    images: Annotated[Path | None, typer.Option(help="Folder of images; default: drawn ones.")] = None,
    width: int = 4032,
    height: int = 3024,
    rounds: int = 200,
    out: Path = RESULTS,
) -> None:
    """Measure; about two minutes on two cores."""
    eager, exported = Predictor.load(run), Predictor.load(bundle)
    variants = {"eager": (run, "float32"), "ONNX": (bundle, "float32")}
    if "int8" in json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["networks"]:
        variants["int8"] = (bundle, "int8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(image_table(Path(folder), images, 1, width, height)["image_path"].iloc[0])
        data = path.read_bytes()
        file = Path(folder) / "encoder.onnx"
        export_encoder(eager, file)
        encoder = Timed(bare_encoder, file, eager.size)
    image, form, settings = decode_image(data), an_answer_for_every_field(exported), exported.image
    prepared = exported.prepare(image)
    coloured = shades_of_gray(image, settings.minkowski_p, settings.gamma)
    flat = clahe_lightness(coloured, settings.clahe_clip, settings.clahe_grid, settings.clahe_channel_order)
    assert prepared is not None
    seconds: dict[str, list[float]] = {}
    beside: dict[str, list[float]] = {}
    for name, (source, variant) in variants.items():
        case, whole = f"{name}: form, network and decision", Timed(whole_predictor, source, variant, prepared, form)
        seconds[case], beside[case] = [], []
        for _ in range(max(1, rounds // BLOCK)):
            beside[case] += encoder.ask(min(BLOCK, rounds))
            seconds[case] += whole.ask(min(BLOCK, rounds))
        whole.close()
    encoder.close()
    seconds["ONNX: form alone"] = interleaved({"form": lambda: exported.encoder.encode_records([form])}, rounds)["form"]
    # Slow and independent of the model: fewer rounds are enough.
    seconds |= interleaved(
        {
            "step: decode the JPEG": lambda: decode_image(data),
            "step: colour constancy": lambda: shades_of_gray(image, settings.minkowski_p, settings.gamma),
            "step: CLAHE": lambda: clahe_lightness(
                coloured, settings.clahe_clip, settings.clahe_grid, settings.clahe_channel_order
            ),
            "step: resize": lambda: to_square(flat, settings.size, settings.fit),
            "ONNX: from the JPEG's bytes to the answer": lambda: exported.predict(data, form),
        },
        max(10, rounds // 5),
        warmup=2,
    )
    rows = []
    for case, times in seconds.items():
        row: dict[str, Any] = {"case": case, "p50_ms": _percentile(times, 50), "p95_ms": _percentile(times, 95)}
        if case in beside:
            row |= {f"encoder_p{number}_ms": _percentile(beside[case], number) for number in (50, 95)}
            row |= {f"ratio_p{number}": row[f"p{number}_ms"] / row[f"encoder_p{number}_ms"] for number in (50, 95)}
        rows.append(row | {"rounds": len(times)})
    note = (
        f"{exported.name}, {exported.size} px, {len(form)} answers; {image.shape[1]} x {image.shape[0]} JPEG of "
        f"{len(data):,} "
        f"bytes; onnxruntime {onnxruntime.__version__}; encoder: {BASE}; each in a process of its "
        f"own, {BLOCK} calls of the one, then of the other, {1000 * PAUSE:g} ms apart; ratios of percentiles"
    )
    record("predictor_latency", pd.DataFrame(rows), note, out)


if __name__ == "__main__":
    typer.run(main)
