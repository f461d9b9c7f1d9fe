"""Prediction of many files into one CSV, with memory that doesn't grow."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualrefnet.data.adapters import IMAGE_SUFFIXES, read_csv
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import DataError, ImageError
from dualrefnet.files import atomic_path
from dualrefnet.progress import warn

BATCH = 32
KEY_COLUMNS = ("image", "image_id", "img_id", "isic_id", "file", "filename")


def predict_files(
    predictor: Predictor, sources: Sequence[Path], metadata: Path | None, out: Path, progress: Callable[[int, int], None] | None = None
) -> tuple[int, int]:
    """Classify files and folders of images.

    Args:
        predictor: the model.
        sources: image files and folders (searched with what is below them).
        metadata: CSV with a key column (`image`: file name or id) and metadata columns, or None.
        out: CSV to write, atomically: image, predicted, likely, prob_<CLASS>..., malignancy, refer, out_of_scope, warnings, error.
        progress: called with (images done, images in all).

    Returns:
        How many were classified, and how many could not be read.

    Raises:
        DataError: there is no image, or the CSV isn't what it must be.
    """
    files = find_files(sources)
    forms = read_forms(metadata, predictor) if metadata else {}
    unmatched = sum(form_key(file) not in forms for file in files) if metadata else 0
    if unmatched:
        warn(f"{unmatched} of {len(files)} images have no row in {metadata}: all of their metadata are missing")
    done = failed = 0
    probabilities = [f"prob_{name}" for name in predictor.classes]
    columns = ["image", "predicted", "likely", *probabilities, "malignancy", "refer", "out_of_scope", "warnings", "error"]
    with atomic_path(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file, ThreadPoolExecutor() as pool:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for start in range(0, len(files), BATCH):
            chunk = files[start : start + BATCH]
            results = _classify(predictor, chunk, forms, pool)
            for path, result in zip(chunk, results, strict=True):
                writer.writerow({"image": str(path), **result})
                done, failed = (done, failed + 1) if "error" in result else (done + 1, failed)
            if progress:
                progress(start + len(chunk), len(files))
    return done, failed


def _classify(
    predictor: Predictor, chunk: list[Path], forms: Mapping[str, dict[str, Any]], pool: ThreadPoolExecutor
) -> Iterator[dict[str, Any]]:
    def prepare(path: Path) -> NDArray[np.uint8] | ImageError | None:
        try:
            return predictor.prepare(path) if predictor.reads_image else None
        except ImageError as error:
            return error

    prepared = list(pool.map(prepare, chunk))
    good = [(path, image) for path, image in zip(chunk, prepared, strict=True) if not isinstance(image, ImageError)]
    predictions = iter(predictor.predict_arrays([image for _, image in good], [forms.get(form_key(path), {}) for path, _ in good]))
    for image in prepared:
        if isinstance(image, ImageError):
            yield {"error": str(image)}
            continue
        prediction = next(predictions)
        yield {
            "predicted": prediction.label,
            "likely": " ".join(prediction.likely),
            **{f"prob_{name}": f"{value:.6f}" for name, value in prediction.probabilities.items()},
            "malignancy": "" if prediction.malignancy is None else f"{prediction.malignancy:.6f}",
            "refer": "" if prediction.refer is None else str(prediction.refer),
            "out_of_scope": "" if prediction.out_of_scope is None else f"{prediction.out_of_scope:.3f}",
            "warnings": "; ".join(prediction.warnings),
        }


def find_files(sources: Sequence[Path]) -> list[Path]:
    """Return the image files that are meant, sorted within each folder.

    Raises:
        DataError: a path doesn't exist, or there is no image.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            files += sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))
        elif source.is_file():
            files.append(source)
        else:
            raise DataError(f"there is no file or folder {source}")
    if not files:
        raise DataError(f"no image is in {', '.join(map(str, sources))}; known suffixes: {' '.join(IMAGE_SUFFIXES)}")
    return files


def form_key(name: Path | str) -> str:
    """Return what joins an image and its form: the file's name without folder and image suffix."""
    path = Path(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def read_forms(metadata: Path, predictor: Predictor) -> dict[str, dict[str, Any]]:
    """Read the metadata CSV: key -> form.

    Raises:
        DataError: there is no key column, an image has two rows, or no column is a field of the model.
    """
    table = read_csv(metadata, dtype=str, keep_default_na=False, na_values=[""])
    key = next((column for column in KEY_COLUMNS if column in table.columns), None)
    if key is None:
        raise DataError(
            f"{metadata} names no images: it needs a column image (file name or id); it has: {', '.join(map(str, table.columns))}"
        )
    keys = table[key].map(form_key, na_action="ignore")
    if keys.duplicated().any():
        raise DataError(f"{metadata} has two rows for image {keys[keys.duplicated()].iloc[0]}; keep one")
    names = [item.name for item in predictor.metadata.fields]
    known = [name for name in names if name in table.columns]
    if names and not known:
        raise DataError(f"{metadata} has none of the model's fields: {', '.join(names)}")
    ignored = [column for column in table.columns if column not in known and column != key]
    if ignored:
        warn(f"columns of {metadata} that the model doesn't read: {', '.join(ignored)}")
    cells = table[known].astype(object).where(table[known].notna(), None)
    return {key: dict(zip(known, row, strict=True)) for key, row in zip(keys, cells.itertuples(index=False), strict=True)}
