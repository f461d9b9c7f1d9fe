"""How long does one photograph with its form take? The whole predictor against bare onnxruntime inference of its image encoder.

The photograph is as large as a phone's. Decoding, colour steps and resizing depend on its size and not on the model, so they are stated
apart; the ratio is that of everything else the predictor does (form, network, calibration, sets, check of the picture, warnings) to the
encoder alone, in onnxruntime with its own defaults. The variants of the model are compared on the same photograph in the same rounds:
torch as trained (eager), the exported ONNX file, and its int8 variant where the bundle has one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import pandas as pd
import torch
import typer

from dualrefnet import Predictor
from dualrefnet.data.decode import decode_image
from dualrefnet.deploy.torch_network import TorchNetwork
from dualrefnet.runtime.colour import clahe_lightness, shades_of_gray
from dualrefnet.runtime.preprocessing import to_square
from pictures import picture_table
from record import RESULTS, interleaved, record

BASE = "encoder alone, bare onnxruntime"


def bare_encoder(eager: Predictor, folder: Path) -> Callable[[], object]:
    """Export the image encoder of a run alone, and return its inference of one picture."""
    network = eager.network
    assert isinstance(network, TorchNetwork)
    encoder = network.model.encoder
    picture = torch.randn(1, 3, eager.size, eager.size, generator=torch.Generator().manual_seed(0))
    file = folder / "encoder.onnx"
    torch.onnx.export(_Vector(encoder).eval(), (picture,), str(file), dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: picture.numpy()}
    return lambda: session.run(None, given)


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
        forms[field.name] = (low + high) / 2 if field.kind == "numeric" else predictor.levels(field.name)[0]
    return forms


def main(
    run: Annotated[Path, typer.Argument(help="A finished run's folder, of a model that reads photographs.")],
    bundle: Annotated[Path, typer.Argument(help="The bundle that `dualrefnet export` made of it.")],
    images: Annotated[Path | None, typer.Option(help="Folder of photographs; default: drawn ones.")] = None,
    width: int = 4032,
    height: int = 3024,
    rounds: int = 200,
    out: Path = RESULTS,
) -> None:
    """Measure; about two minutes on two cores."""
    eager, exported = Predictor.load(run), Predictor.load(bundle)
    variants = {"eager": eager, "ONNX": exported}
    if "int8" in json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["networks"]:
        variants["int8"] = Predictor.load(bundle, variant="int8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(picture_table(Path(folder), images, 1, width, height)["image_path"].iloc[0])
        data = path.read_bytes()
        base = bare_encoder(eager, Path(folder))
    photograph, form, settings = decode_image(data), an_answer_for_every_field(exported), exported.image
    prepared = exported.prepare(photograph)
    coloured = shades_of_gray(photograph, settings.minkowski_p, settings.gamma)
    flat = clahe_lightness(coloured, settings.clahe_clip, settings.clahe_grid, settings.clahe_channel_order)
    cases: dict[str, Callable[[], object]] = {BASE: base}
    for name, predictor in variants.items():
        cases[f"{name}: form, network and decision"] = lambda predictor=predictor: predictor.predict_arrays([prepared], [form])
    cases["ONNX: form alone"] = lambda: exported.form.encode_forms([form])
    seconds = interleaved(cases, rounds, warmup=10)
    # Slow and independent of the model: fewer rounds are enough.
    seconds |= interleaved(
        {
            "step: decode the JPEG": lambda: decode_image(data),
            "step: colour constancy": lambda: shades_of_gray(photograph, settings.minkowski_p, settings.gamma),
            "step: CLAHE": lambda: clahe_lightness(coloured, settings.clahe_clip, settings.clahe_grid, settings.clahe_channel_order),
            "step: resize": lambda: to_square(flat, settings.size, settings.fit),
            "ONNX: from the JPEG's bytes to the answer": lambda: exported.predict(data, form),
        },
        max(10, rounds // 5),
        warmup=2,
    )
    rows = []
    for case, times in seconds.items():
        paired = len(times) == rounds
        rows.append(
            {
                "case": case,
                "p50_ms": 1000 * float(np.percentile(times, 50)),
                "p95_ms": 1000 * float(np.percentile(times, 95)),
                "ratio_p50": float(np.percentile(times, 50) / np.percentile(seconds[BASE], 50)) if paired else float("nan"),
                "ratio_p95": float(np.percentile(times, 95) / np.percentile(seconds[BASE], 95)) if paired else float("nan"),
                "ratio_to": BASE,
                "rounds": len(times),
            }
        )
    note = (
        f"{exported.name}, {exported.size} px, {len(form)} answers; {photograph.shape[1]} x {photograph.shape[0]} JPEG of {len(data):,} "
        f"bytes; onnxruntime {onnxruntime.__version__}; all cases in one run, in turn in each round; ratios of percentiles to {BASE!r}"
    )
    record("predictor_latency", pd.DataFrame(rows), note, out)


if __name__ == "__main__":
    typer.run(main)
