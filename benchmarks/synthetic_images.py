"""Images to measure with: drawn ones enlarged to the size of a phone's, or a folder of real ones."""

from __future__ import annotations

from pathlib import Path

import cv2
import pandas as pd

from dualrefnet.data.images import decode_image
from dualrefnet.data.synthetic import MINIMUM_IMAGES, make_synthetic
from dualrefnet.deploy.batch import walk_images

DRAWN = 96


def image_table(folder: Path, images: Path | None, count: int, width: int = 1536, height: int = 1152) -> pd.DataFrame:
    """Return a table with the columns `image_id, image_path` of `count` rows; images are used again if there are fewer.

    Args:
        folder: an empty folder for synthetic images.
        images: a folder of real images; None: draw.
        count: number of rows.
        width: of a drawn JPEG, pixels.
        height: of a drawn JPEG, pixels.
    """
    files = list(walk_images([images])) if images else _draw(folder, min(DRAWN, count), width, height)
    return pd.DataFrame(
        [{"image_id": f"picture_{row}", "image_path": str(files[row % len(files)])} for row in range(count)]
    )


def _draw(folder: Path, count: int, width: int, height: int) -> list[Path]:
    """Draw `count` images of 192 px and enlarge them to JPEGs."""
    drawn = sorted((make_synthetic(folder / "drawn", images=max(count, MINIMUM_IMAGES)) / "images").glob("*.png"))[
        :count
    ]
    files = []
    for source in drawn:
        picture = cv2.resize(decode_image(source), (width, height), interpolation=cv2.INTER_CUBIC)
        files.append(folder / f"{source.stem}.jpg")
        cv2.imwrite(str(files[-1]), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92])
    return files
