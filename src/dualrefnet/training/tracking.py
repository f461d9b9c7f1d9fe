"""Trackers of experiments, through accelerate: what a training logs to tensorboard, MLflow or Weights & Biases."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from dualrefnet.errors import DependencyError, RunError
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.curves import KINDS, class_curves, draw_curves
from dualrefnet.progress import warn
from dualrefnet.recipe import dotted
from dualrefnet.run import Run

PROJECT = "dualrefnet"
# What a tracker takes as the name of a measure; classes may have any.
_FOREIGN = re.compile(r"[^\w./ -]")
START = {
    "tensorboard": "its files go into the run folder, which must be writable",
    "mlflow": "set MLFLOW_TRACKING_URI to a server that answers, or to a folder",
    "wandb": "`wandb login`, or set WANDB_MODE=offline",
}


def require_tracker(name: str) -> None:
    """Refuse a tracker that isn't installed, before anything is computed."""
    if name != "none" and LoggerType(name) not in get_available_trackers():
        extra = " (extra `track`)" if name == "tensorboard" else ""
        raise DependencyError(
            f"training.tracker={name} needs {name}{extra}: pip install {name}, or train with training.tracker=none"
        )


class Tracker:
    """The tracker of a run, as a context, or nothing; what it refuses later than at the start is a warning."""

    def __init__(self, run: Run) -> None:
        self.run, self.recipe = run, run.recipe
        self.name = self.recipe.training.tracker
        self._accelerator: Accelerator | None = None
        self._step = 0

    def __enter__(self) -> Tracker:
        if self.name == "none":
            return self
        keys = dotted(self.recipe.model_dump(mode="json"))
        config = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in keys.items()
        }
        options = {
            "wandb": {"name": self.recipe.name, "dir": str(self.run.path)},
            "mlflow": {"run_name": self.recipe.name},
        }
        cpu = self.recipe.training.device == "cpu"
        self._accelerator = Accelerator(cpu=cpu, log_with=self.name, project_dir=self.run.path)
        try:
            # tensorboard's project is the folder of its files, in the run's.
            self._accelerator.init_trackers(self.name if self.name == "tensorboard" else PROJECT, config, options)
        # Each tracker raises errors of its own.
        except Exception as error:
            raise RunError(
                f"training.tracker={self.name} doesn't start ({_line(error)}): {START[self.name]}"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._accelerator is not None:
            try:
                self._accelerator.end_training()
            except Exception as failure:
                self._lost("its end", failure)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self._step = epoch
        if self._accelerator is not None:
            try:
                self._accelerator.log(dict(values), step=epoch)
            except Exception as failure:
                self._lost(f"epoch {epoch}", failure)

    def log_result(self) -> None:
        """Log the metrics of the finished run, its confusion matrix and, with the extra `report`, its curves."""
        if self._accelerator is None or not self._accelerator.is_main_process:
            return
        metrics = self.run.metrics
        try:
            self._accelerator.log(dict(flat_metrics(metrics)), step=self._step)
            if metrics.get("split", "test") != "test":
                # Trained on all patients, and tested on none.
                return
            tracker, step = self._accelerator.get_tracker(self.name), self._step
            classes, rows = list(metrics["per_class"]), metrics["confusion_matrix"]
            table = pd.DataFrame(rows, columns=classes).assign(true=classes)[["true", *classes]]
            if self.name == "wandb":
                tracker.log_table("test/confusion_matrix", list(table), table.to_numpy().tolist(), step=step)
            elif self.name == "mlflow":
                tracker.log_artifact(str(self.run.metrics_file))
            else:
                self._accelerator.log({"test/confusion_matrix": _markdown(table)}, step=step)
            for name, figure in self._figures() if find_spec("matplotlib") is not None else ():
                if self.name == "mlflow":
                    tracker.log_figure(figure, f"test/{name}.png")
                    continue
                form = {"dataformats": "NHWC"} if self.name == "tensorboard" else {}
                tracker.log_images({f"test/{name}": np.stack([_pixels(figure)])}, step=step, **form)
        except Exception as failure:
            self._lost("the metrics", failure)

    def _figures(self) -> Iterator[tuple[str, Any]]:
        """Yield the ROC and precision-recall curves of the test split."""
        classes, malignant = (tuple(self.run.model[name]) for name in ("classes", "malignant"))
        test = self.run.test
        bootstrap = Bootstrap(test.groups, self.recipe.evaluation.bootstrap, self.recipe.seed)
        curves = class_curves(test.labels, test.probabilities, bootstrap, classes, malignant)
        for kind in KINDS:
            yield kind, draw_curves(curves, kind, f"{self.run.unit}s").figure

    def _lost(self, what: str, error: Exception) -> None:
        warn(f"the tracker {self.name} didn't take {what} ({_line(error)}); the run folder has it")


def flat_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of `metrics.json` by name: `test/...` and `validation/...`; of an interval both ends."""
    of = "test" if metrics.get("split", "test") == "test" else "validation"
    for name, value in dotted({key: _named(inner) for key, inner in metrics.items()}).items():
        split, rest = ("validation", name.removeprefix("validation.")) if name.startswith("validation.") else (of, name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{split}/{_FOREIGN.sub('_', rest.replace('.', '/'))}", value


def _named(value: Any) -> Any:
    """Name the ends of intervals; other lists are tables, and no measures."""
    if isinstance(value, Mapping):
        return {key.replace(".", "_"): _named(inner) for key, inner in value.items()}
    if isinstance(value, list):
        ends = len(value) == 2 and all(isinstance(end, float) for end in value)
        return dict(zip(("low", "high"), value, strict=True)) if ends else None
    return value


def _markdown(table: pd.DataFrame) -> str:
    lines: list[list[Any]] = [list(table), ["--"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def _pixels(figure: Any) -> Any:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
