"""Classify the images of one lesion with the bundle in whose folder this runs. Not a medical device."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

# OpenCV reads this once, at import; its default limit of 2^30 pixels would fill the memory.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "100000000")

import cv2
import numpy as np
from numpy.typing import NDArray

from .bundle import load_bundle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="*", type=Path, help="of one lesion; none for a model of metadata alone")
    metadata_help = "metadata of the patient, a JSON object or a file that holds one"
    parser.add_argument("--metadata", "--form", default="{}", metavar="JSON", help=metadata_help)
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent.parent, help="folder of the bundle")
    parser.add_argument("--variant", default="float32", help="float32 or int8")
    arguments = parser.parse_args()
    try:
        text: str = arguments.metadata
        metadata = json.loads(Path(text).read_text(encoding="utf-8") if text.endswith(".json") else text)
        classifier = load_bundle(arguments.bundle, arguments.variant)
        paths = arguments.images if classifier.reads_image else []
        images = [classifier.prepare_array(decode(path)) for path in paths]
        [prediction] = classifier.classify([images], [metadata])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(prediction), indent=2, ensure_ascii=False))
    return 0


def decode(path: Path) -> NDArray[np.uint8]:
    """Read an image as (H, W, 3) RGB, upright."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.name}")
    try:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except cv2.error:  # Beyond the limit.
        image = None
    if image is None:
        raise ValueError(f"{path.name} isn't an image that OpenCV can read, or has too many pixels")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


if __name__ == "__main__":
    sys.exit(main())
