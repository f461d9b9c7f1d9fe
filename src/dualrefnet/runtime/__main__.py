"""`python -m runtime photograph.jpg --form '{"age": 61}'` in a bundle's folder. Not a medical device."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

# More than any phone takes; OpenCV, which reads this once, decodes a thousand million otherwise.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "100000000")

import cv2
import numpy as np
from numpy.typing import NDArray

from .bundle import load_bundle


def main() -> int:
    """Classify the photographs of one lesion; print the answer as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", nargs="*", type=Path, help="of one lesion; none for a model that does without")
    parser.add_argument("--form", default="{}", help="the patient's answers as a JSON object, or a file that holds it")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent.parent, help="the bundle's folder")
    parser.add_argument("--variant", default="float32", help="float32 or int8")
    arguments = parser.parse_args()
    try:
        text = Path(arguments.form).read_text(encoding="utf-8") if arguments.form.endswith(".json") else arguments.form
        classifier = load_bundle(arguments.bundle, arguments.variant)
        pictures = (
            [classifier.prepare_array(decode(path)) for path in arguments.photographs] if classifier.reads_image else []
        )
        [prediction] = classifier.classify([pictures], [json.loads(text)])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(prediction), indent=2, ensure_ascii=False))
    return 0


def decode(path: Path) -> NDArray[np.uint8]:
    """Read a photograph as (H, W, 3) RGB, upright.

    Raises:
        ValueError: OpenCV can't read it, or it is too large.
        OSError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.name}")
    try:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except cv2.error:  # Beyond the limit.
        image = None
    if image is None:
        raise ValueError(f"{path.name} isn't a photograph that OpenCV can read, or has too many pixels")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


if __name__ == "__main__":
    sys.exit(main())
