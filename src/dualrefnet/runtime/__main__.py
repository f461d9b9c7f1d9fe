"""Classify the images of one lesion with the bundle in whose folder this runs. Not a medical device.

Tried on Python 3.9 and 3.11.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

NEEDED = "this program needs Python 3.9 or newer and: pip install onnxruntime numpy opencv-python-headless pillow"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=NEEDED)
    parser.add_argument("images", nargs="*", type=Path, help="of one lesion; none for a model of metadata alone")
    metadata_help = "metadata of the patient, a JSON object or a file that holds one"
    parser.add_argument("--metadata", "--form", default="{}", metavar="JSON", help=metadata_help)
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent.parent, help="folder of the bundle")
    parser.add_argument("--variant", default="float32", help="float32 or int8")
    arguments = parser.parse_args()
    try:
        from .bundle import load_bundle
        from .images import decode_image

        text: str = arguments.metadata
        metadata = json.loads(Path(text).read_text(encoding="utf-8") if text.endswith(".json") else text)
        if not isinstance(metadata, dict):
            raise ValueError("the metadata must be a JSON object")
        classifier = load_bundle(arguments.bundle, arguments.variant)
        paths = arguments.images if classifier.reads_image else []
        images = [classifier.prepare_array(decode_image(path)) for path in paths]
        [prediction] = classifier.classify([images], [metadata])
    except ImportError as error:
        print(f"error: {error}; {NEEDED}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RecursionError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(prediction), indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
