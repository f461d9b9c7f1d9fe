"""Prediction of many photographs into one CSV, with memory that doesn't grow, and resumable."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import dualrefnet
from dualrefnet.batch.case_list import Case, Cases, walk_images
from dualrefnet.batch.result_file import ResultFile, csv_lines
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import DataError, ImageError
from dualrefnet.files import sha256_of_file, sha256_of_json
from dualrefnet.runtime.prediction import Prediction

BATCH = 32
# What of a run or a bundle changes its answers. Others, such as metrics.json, may be written again meanwhile.
_DECISIVE = (
    *("model.json", "model.safetensors", "calibration.json", "out_of_scope.safetensors"),
    *("bundle.json", "model.onnx", "model.int8.onnx"),
)
_AFTER = ("malignancy", "refer", "out_of_scope", "warnings", "error")
# Gives the batches of the rows from a number on, in order.
Work = Callable[[Cases, int], Iterator["Batch"]]
# A photograph, none, or why there is none.
_Prepared = NDArray[np.uint8] | str | None


@dataclass(frozen=True)
class ModelFolder:
    """A run or an exported bundle, and how it shall be loaded: what another process needs to load the same.

    Attributes:
        path: the folder.
        device: `cpu`, `cuda`, ...
        variant: of a bundle: `float32` or `int8`.
    """

    path: Path
    device: str = "cpu"
    variant: str = "float32"

    def load(self) -> Predictor:
        """Load the model."""
        return Predictor.load(self.path, self.device, self.variant)

    @property
    def made_of(self) -> dict[str, str]:
        """What tells its answers from those of another model."""
        files = {name: sha256_of_file(self.path / name) for name in _DECISIVE if (self.path / name).is_file()}
        return {"model": sha256_of_json(files), "device": self.device, "variant": self.variant, "dualrefnet": dualrefnet.__version__}


@dataclass(frozen=True)
class Batch:
    """The rows of one batch of the result.

    Attributes:
        lines: CSV.
        failed: rows with an error.
    """

    lines: bytes
    failed: int


@dataclass(frozen=True)
class Summary:
    """What became of the rows.

    Attributes:
        classified: rows with a prediction.
        failed: rows with an error.
        resumed: how many of both were there before.
    """

    classified: int
    failed: int
    resumed: int


def columns(classes: Sequence[str]) -> list[str]:
    """Return the header of the result."""
    return ["image", "predicted", "likely", *(f"prob_{name}" for name in classes), *_AFTER]


def find_files(sources: Sequence[Path]) -> list[Path]:
    """Return the image files that are meant; see `dualrefnet.batch.case_list.walk_images`, which holds none of them in memory."""
    return list(walk_images(sources))


def predict_to_csv(
    model: ModelFolder,
    classes: Sequence[str],
    cases: Cases,
    out: Path,
    work: Work,
    *,
    batch: int = BATCH,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Classify every row of a list.

    Args:
        model: what predicts; a result is only gone on with by the same.
        classes: its classes.
        cases: the rows.
        out: CSV to write: image, predicted, likely, prob_<CLASS>..., malignancy, refer, out_of_scope, warnings, error.
        work: does it: `predict_here`, or what `dualrefnet.batch.ray_batch.ray_work` returns.
        batch: rows that the model sees at once.
        resume: go on with what an interrupted call left.
        progress: called with (rows done, rows in all).

    Raises:
        DataError: see `dualrefnet.batch.result_file.ResultFile`.
    """
    with ResultFile(out, columns(classes), {**model.made_of, **cases.made_of}, cases.total, batch, resume) as result:
        done = result.kept
        if progress:
            progress(done, cases.total)
        for rows in work(cases, done) if done < cases.total else ():
            result.append(rows.lines, rows.failed)
            done = min(done + batch, cases.total)
            if progress:
                progress(done, cases.total)
        if done < cases.total:
            raise DataError(f"the list had {cases.total} rows and now ends after {done}; it was changed meanwhile")
        result.finish()
    return Summary(cases.total - result.failed, result.failed, result.kept)


def predict_batches(predictor: Predictor, cases: Iterator[Case], batch: int = BATCH, workers: int | None = None) -> Iterator[Batch]:
    """Classify rows, in order; photographs of the next batches are decoded by threads while the model works on one.

    Args:
        predictor: the model.
        cases: the rows; never more than three batches of them are taken ahead.
        batch: rows that the model sees at once.
        workers: threads that decode; None: one a core.
    """
    prepared = _prepare_ahead(predictor, cases, window=2 * batch, workers=workers or min(16, os.cpu_count() or 1))
    while chunk := list(islice(prepared, batch)):
        yield _classify(predictor, chunk, len(predictor.classes))


def predict_here(predictor: Predictor, cases: Cases, first: int, *, batch: int = BATCH, workers: int | None = None) -> Iterator[Batch]:
    """Do the work of `predict_to_csv` on this machine; see `predict_batches`."""
    return predict_batches(predictor, cases.start_at(first), batch, workers)


def _prepare_ahead(predictor: Predictor, cases: Iterator[Case], window: int, workers: int) -> Iterator[tuple[Case, _Prepared]]:
    """Give rows with their photographs, or why there is none; `window` rows are being prepared at any time."""

    def prepare(case: Case) -> _Prepared:
        if case.error:
            return case.error
        try:
            predictor.check_form(case.form)
            return predictor.prepare(case.path) if predictor.reads_image else None
        except (DataError, ImageError) as error:
            return str(error)

    waiting: deque[tuple[Case, Future[_Prepared]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for case in cases:
            waiting.append((case, pool.submit(prepare, case)))
            if len(waiting) > window:
                first, image = waiting.popleft()
                yield first, image.result()
        while waiting:
            first, image = waiting.popleft()
            yield first, image.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _classify(predictor: Predictor, chunk: list[tuple[Case, _Prepared]], classes: int) -> Batch:
    good = [(case, image) for case, image in chunk if not isinstance(image, str)]
    predictions = iter(predictor.predict_arrays([image for _, image in good], [case.form for case, _ in good]))
    rows = []
    for case, image in chunk:
        if isinstance(image, str):
            rows.append([case.name, "", "", *[""] * classes, *[""] * (len(_AFTER) - 1), " ".join(image.split())])
        else:
            rows.append([case.name, *_cells(next(predictions))])
    return Batch(csv_lines(rows), len(chunk) - len(good))


def _cells(prediction: Prediction) -> list[str]:
    def written(value: Any, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        prediction.label,
        " ".join(prediction.likely),
        *(f"{value:.6f}" for value in prediction.probabilities.values()),
        written(prediction.malignancy, 6),
        "" if prediction.refer is None else str(prediction.refer),
        written(prediction.out_of_scope, 3),
        "; ".join(prediction.warnings),
        "",
    ]
