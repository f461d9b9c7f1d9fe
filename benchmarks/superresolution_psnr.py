"""What does a super-resolution network restore of an image? Halve real ones, enlarge them again, and compare."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from dualrefnet.data.images import decode_image
from dualrefnet.models.superresolution import make_target, psnr, split_native
from dualrefnet.models.superresolution_networks import NETWORKS, enlarge, find_network_file, load_network
from record import RESULTS, record
from synthetic_images import image_table


class Interpolation(nn.Module):
    """bilinear or bicubic, under the contract of the networks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge (B,3,H,W) to (B,3,2H,2W)."""
        return make_target(self.kind, image)


def central_square(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return the middle of an image, a square of an even side, at most `side`."""
    side = min(side, *picture.shape[:2]) // 2 * 2
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def unit(pictures: NDArray[np.uint8]) -> Tensor:
    """Turn (B,H,W,3) bytes into (B,3,H,W) in 0..1."""
    return torch.tensor(pictures).permute(0, 3, 1, 2) / 255


def default_images() -> Path | None:
    """Return the folder of original images of PAD-UFES-20 in $DUALREFNET_DATA, if it is there."""
    folder = Path(os.environ.get("DUALREFNET_DATA", "")) / "pad_ufes_20" / "originals"
    return folder if folder.is_dir() else None


def main(
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images; default: originals of PAD-UFES-20 in $DUALREFNET_DATA, else synthetic images."
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Images, at most.")] = 24,
    crop: Annotated[
        int, typer.Option(help="Side of the central square that is restored, pixels; smaller images are taken whole.")
    ] = 448,
    out: Path = RESULTS,
) -> None:
    """Measure; about a minute on two cores with one small network."""
    images = images or default_images()
    cases: dict[str, nn.Module] = {kind: Interpolation(kind) for kind in ("bilinear", "bicubic")}
    loaded, absent = [], []
    for name in NETWORKS:
        path = find_network_file(name)
        if path is None:
            absent.append(name)
        else:
            cases[name], source = load_network(name, str(path))
            loaded.append(f"{source.description} (SHA-256 {str(source.sha256)[:12]})")
    with tempfile.TemporaryDirectory() as folder:
        files = image_table(Path(folder), images, count)["image_path"].unique()
        originals = [central_square(decode_image(file), crop)[None] for file in files]
    levels: dict[str, list[float]] = {case: [] for case in cases}
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for original in originals:
        # An image of half the size has bytes too.
        halved = (split_native(unit(original))[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for case, network in cases.items():
            started = time.perf_counter()
            restored = enlarge(network, halved)
            seconds[case].append(time.perf_counter() - started)
            levels[case].append(psnr(unit(restored), unit(original)).item())
    bicubic = np.array(levels["bicubic"])
    table = pd.DataFrame(
        [
            {
                "case": case,
                "value": np.mean(levels[case]),
                "sd": np.std(levels[case], ddof=1) if len(files) > 1 else float("nan"),
                "unit": "dB",
                "gain": np.mean(levels[case] - bicubic),
                "better": np.mean(levels[case] > bicubic),
                "seconds": np.median(seconds[case]),
                "images": len(files),
            }
            for case in cases
        ]
    )
    what = "synthetic images" if images is None else f"images of {images.resolve().parent.name}/{images.name}"
    note = (
        f"{len(files)} {what}, central squares of at most {crop} px, halved by the mean of 2 x 2 pixels, enlarged "
        "one at a time; "
        "value: mean PSNR of RGB bytes; gain: mean difference from bicubic; better: share of images with a gain; "
        f"seconds: median of an image; weights: {', '.join(loaded) or 'none'}; not at hand: "
        f"{', '.join(absent) or 'none'}"
    )
    record("superresolution_psnr", table, note, out)


if __name__ == "__main__":
    typer.run(main)
