"""The run folder: everything that one run made, under fixed names.

`recipe.yaml`, `split.csv`, `model.safetensors`, `model.json`, `history.csv`, `predictions.csv`, `calibration.json`,
`out_of_scope.safetensors`, `metrics.json`, `fingerprint.json`; while training also `checkpoint.safetensors`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from importlib import metadata as packages
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

import dualrefnet
from dualrefnet import run_schema
from dualrefnet.data.protocols import FOLD, refuse_crossing
from dualrefnet.data.schema import Dataset
from dualrefnet.errors import DualRefNetError, RecipeError, RunError, in_python
from dualrefnet.files import is_file, locked, make_folder, sha256_of_file, sha256_of_json, write_csv, write_yaml
from dualrefnet.recipe import CROSS_FITTED, Recipe, differences, load_recipe

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from dualrefnet.evaluation.calibration import Calibration
    from dualrefnet.runtime.out_of_distribution import OutOfDistributionScore

# What `dualrefnet evaluate` writes.
MEASURED = ("predictions.csv", "calibration.json", "out_of_scope.safetensors", "metrics.json")
# What a training writes before its first epoch, and all that a run may have.
BEGUN = {"recipe.yaml", "split.csv", "model.json", "fingerprint.json"}
# The folder in a cross-fitted run.
MEMBERS = "members"
FILES = {*BEGUN, *MEASURED, "model.safetensors", "history.csv", "checkpoint.safetensors"}
FILES |= {"probes", "explanations", "report", "external", MEMBERS, "tracker"}
# While a training writes the folder.
LOCK = ".lock"
# Libraries that numbers depend on, and how they are imported.
LIBRARIES = {name: name for name in ("torch", "torchvision", "timm", "accelerate")}
LIBRARIES |= {"opencv-python-headless": "cv2", "pillow": "PIL", "numpy": "numpy", "pandas": "pandas"}
LIBRARIES |= {"scikit-learn": "sklearn"}


class TestSplit(NamedTuple):
    """What a run predicted for its test split: `rows` of `predictions.csv` with each image's `group`, classes as
    numbers, and probabilities (N, C).
    """

    rows: pd.DataFrame
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    @property
    def groups(self) -> NDArray[np.object_]:
        """What the bootstrap resamples: the patient, lesion or image of each row."""
        return self.rows["group"].to_numpy(dtype=object)


@dataclass(frozen=True, init=False, repr=False)
class Run:
    """A run folder."""

    path: Path

    def __init__(self, path: Path | str) -> None:
        object.__setattr__(self, "path", Path(path))

    def __repr__(self) -> str:
        try:
            said = self.summary().splitlines()[0] if self.finished else "unfinished"
        except DualRefNetError as error:
            said = str(error)
        return f"Run({str(self.path)!r}: {said})"

    def summary(self) -> str:
        """Return the result in a few lines: what was measured on whom, calibration, what is missing, limitations."""
        from dualrefnet.display.format import availability_line, calibration_line, percent, protocol_name
        from dualrefnet.evaluation.bootstrap import images_of

        metrics, recipe, unit = self.metrics, self.recipe, self.unit
        images = metrics["support"]
        groups = metrics["bootstrap"]["groups"] if "bootstrap" in metrics else images
        lines = [
            f"{recipe.model.method} on {metrics['dataset']}: "
            f"balanced accuracy {percent(metrics, 'balanced_accuracy')}, "
            f"{images_of(images, groups, unit if 'bootstrap' in metrics else 'image')}",
            protocol_name(recipe.data.protocol, unit),
        ]
        lines += [calibration_line(metrics["calibrated"])] if "calibrated" in metrics else []
        lines += [availability_line(metrics["availability"])] if "availability" in metrics else []
        lines += ["SYNTHETIC IMAGES, NOT CLINICAL"] if metrics["drawn"] else []
        return "\n".join(filter(None, [*lines, *metrics["remarks"]]))

    @in_python
    def evaluate(self, root: Path | str | None = None) -> dict[str, Any]:
        """Measure the trained model again; returns the metrics, which are also written.

        Args:
            root: where the data are now, if they have moved.
        """
        from dualrefnet.analysis.evaluate import evaluate_run

        return evaluate_run(self, root)

    @in_python
    def report(self, path: Path | str | None = None, *, explanations: bool = True) -> Path:
        """Write the report; returns the HTML page.

        Args:
            path: folder; None: `report` in the run folder.
            explanations: also what needs the model and the data, which takes minutes.
        """
        from dualrefnet.report.run_report import write_report

        return write_report(self, None if path is None else Path(path), explained=explanations)

    @property
    def weights_file(self) -> Path:
        """The best epoch's parameters."""
        return self.path / "model.safetensors"

    @property
    def members(self) -> list[Run]:
        """The runs of which a cross-fitted run consists, one a fold; none of any other run."""
        is_member = self.path.parent.name == MEMBERS and (self.path.parent.parent / "recipe.yaml").is_file()
        if is_member or not (self.path / "recipe.yaml").is_file() or self.recipe.data.protocol != CROSS_FITTED:
            return []
        return [Run(self.path / MEMBERS / str(fold)) for fold in range(self.recipe.data.folds)]

    @property
    def checkpoint_file(self) -> Path:
        """The state after the last whole epoch; removed when training is over."""
        return self.path / "checkpoint.safetensors"

    @property
    def metrics_file(self) -> Path:
        """The metrics; written last, so a run that has them is finished."""
        return self.path / "metrics.json"

    @property
    def calibration_file(self) -> Path:
        """Calibration fitted on the validation split."""
        return self.path / "calibration.json"

    @property
    def out_of_scope_file(self) -> Path:
        """The out-of-distribution score; not of a method that reads no image."""
        return self.path / "out_of_scope.safetensors"

    @property
    def finished(self) -> bool:
        """True if training and evaluation are over."""
        return self.metrics_file.is_file()

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        with self._reading("recipe.yaml") as path:
            return run_schema.check_recipe(load_recipe(path))

    @property
    def trained(self) -> bool:
        """True if training is over, and the parameters are there."""
        if members := self.members:
            return all(member.trained for member in members)
        made = self.path / "fingerprint.json"
        return self.weights_file.is_file() and made.is_file() and "model_sha256" in self.fingerprint

    @property
    def split(self) -> pd.DataFrame:
        """The split; a group that crosses it is refused unless the recipe lets it."""
        with self._reading("split.csv") as path:
            split = run_schema.read_split(path)
        if not self.recipe.data.may_leak:
            refuse_crossing(split)
        return split

    @property
    def model(self) -> dict[str, Any]:
        """Architecture, classes, metadata encoder and preprocessing, as plain JSON."""
        recipe = self.recipe
        with self._reading("model.json") as path:
            model = run_schema.read_model(path)
        with self._reading("recipe.yaml"):
            run_schema.check_fits_recipe(model, recipe)
        return model

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics on the test split."""
        classes = self.model["classes"]
        with self._reading("metrics.json") as path:
            return run_schema.read_metrics(path, classes)

    @property
    def unit(self) -> str:
        """`patient`, `lesion` or `image`: what must not cross the split, and is resampled."""
        from dualrefnet.data import isic_2019, pad_ufes_20

        metrics = self.metrics
        # Runs of earlier versions don't record it, or call a single image a patient.
        if metrics["leakage"] and not any(metrics["leakage"].values()):
            return "image"
        known = isic_2019.SCHEMA if self.recipe.data.dataset == isic_2019.SCHEMA.name else pad_ufes_20.SCHEMA
        return str(metrics.get("unit", known.unit))

    @property
    def predictions(self) -> pd.DataFrame:
        """One row an image of validation and test."""
        split, classes = self.split, self.model["classes"]
        with self._reading("predictions.csv") as path:
            return run_schema.read_predictions(path, split, classes)

    @property
    def test(self) -> TestSplit:
        """The predictions of the test split."""
        import pandas as pd

        predictions, classes = self.predictions, self.model["classes"]
        rows = predictions[predictions["split"] == "test"].reset_index(drop=True)
        rows["group"] = rows["image_id"].map(self.split.set_index("image_id")["patient_id"])
        labels = pd.Index(classes).get_indexer(pd.Index(rows["label"])).astype("int64")
        return TestSplit(rows, labels, rows[[f"prob_{name}" for name in classes]].to_numpy(dtype=float))

    @property
    def calibration(self) -> Calibration:
        """Temperature, conformal thresholds and threshold of referral, fitted on the validation split."""
        from dualrefnet.evaluation.calibration import Calibration

        if self.finished and not self.calibration_file.is_file():
            raise RunError(f"{self.path} is older than calibration.json: run `dualrefnet evaluate {self.path}`")
        classes = self.model["classes"]
        with self._reading("calibration.json") as path:
            calibration = Calibration.from_json(run_schema.read_checked(path, run_schema.Calibration))
            if list(calibration.classes) != classes:
                raise ValueError("it is of other classes than the model")
            return calibration

    @property
    def out_of_scope(self) -> OutOfDistributionScore:
        """The out-of-distribution score of an image, with its limit."""
        from dualrefnet.runtime.out_of_distribution import OutOfDistributionScore

        if self.finished and not self.out_of_scope_file.is_file():
            raise RunError(f"{self.path} has no out-of-distribution check: run `dualrefnet evaluate {self.path}`")
        with self._reading("out_of_scope.safetensors") as path:
            return OutOfDistributionScore.load(path)

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch."""
        with self._reading("history.csv") as path:
            return run_schema.read_history(path)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the numbers depend on: versions, code, data, hardware, weights."""
        with self._reading("fingerprint.json") as path:
            return run_schema.read_checked(path, run_schema.Fingerprint)

    def check_weights(self) -> None:
        """Refuse parameters that aren't those of the training; RunError says so. Older runs don't record them."""
        if members := self.members:
            for member in members:
                member.check_weights()
            return
        recorded = self.fingerprint.get("model_sha256") if (self.path / "fingerprint.json").is_file() else None
        with self._reading(self.weights_file.name) as path:
            if recorded is not None and sha256_of_file(path) != recorded:
                raise ValueError("its checksum isn't that in fingerprint.json")

    def damage(self) -> str:
        """Return what is wrong with the files of a finished run, those that it has; empty: nothing."""
        optional = {
            "history": self.path / "history.csv",
            "calibration": self.calibration_file,
            "out_of_scope": self.out_of_scope_file,
        }
        try:
            for name in ("metrics", "predictions", "fingerprint", *optional):
                if name not in optional or optional[name].is_file():
                    getattr(self, name)
            if all(run.weights_file.is_file() for run in self.members or [self]):
                self.check_weights()
        except DualRefNetError as error:
            return str(error)
        return ""

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        """Give the path of a file; what is wrong with it becomes an error that says what to do."""
        path = self._existing(name)
        try:
            yield path
        except (ValueError, OSError, RecipeError) as error:
            cure = "restore it from a copy, or train anew in another folder"
            if name in MEASURED:
                cure = f"`dualrefnet evaluate {self.path}` writes it anew"
            raise RunError(f"{path} is damaged ({' '.join(str(error).split())}): {cure}") from None

    def _existing(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            cut = "it isn't a run folder, or its training was cut short (`dualrefnet train ... --resume`)"
            raise RunError(f"{self.path} has no {name}: {cut}")
        return path


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Keep a second training out of a run folder, which is made."""
    lock = make_folder(path) / LOCK
    with locked(lock, f"{path} is in use by another training; wait until it ends, or name another folder with --out"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def new_folder(name: str, resume: bool = False, overwrite: bool = False) -> Path:
    """Return the default folder of a run: `runs/NAME`, or with the time behind it where a finished run stays."""
    folder = Path("runs") / name
    # Several processes would each have a time of their own.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    stays = Run(folder).finished and not resume and not overwrite
    return folder.with_name(f"{name}-{datetime.now():%Y%m%d-%H%M%S}") if stays and alone else folder


def refuse_taken(path: Path, resume: bool = False, overwrite: bool = False) -> bool:
    """Refuse a folder that holds something else, or a run unless it is resumed or overwritten; return whether there is
    a run to go on with.
    """
    if is_file(path):
        raise RunError(f"{path} is a file; name a folder for the run")
    found = [file for file in path.iterdir() if file.name != LOCK] if path.is_dir() else []
    # A kill during the very first write leaves no more than such a file.
    found = [file for file in found if not file.match(".*.partial")]
    if not found:
        return False
    if not (path / "recipe.yaml").is_file():
        raise RunError(f"{path} isn't empty and isn't a run folder; name another one with --out")
    names = {file.name for file in found}
    if overwrite and names - FILES:
        strange = sorted(names - FILES)[0]
        raise RunError(f"{path} holds {strange}, which no run has; take it away, or name another folder with --out")
    # Before the first epoch there is nothing to lose, and a start that failed must not block the next one.
    if overwrite or names <= BEGUN:
        return False
    if not resume:
        what = "a finished run" if Run(path).finished else "an unfinished run"
        fix = "continue it with --resume, replace it with --overwrite, or name another folder with --out"
        raise RunError(f"{path} holds {what}; {fix}")
    return True


def start_run(path: Path, recipe: Recipe, resume: bool = False, overwrite: bool = False) -> Run:
    """Open the folder of a run that begins or goes on."""
    run = Run(path)
    if not refuse_taken(path, resume, overwrite):
        for name in FILES:
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink(missing_ok=True)
    elif changed := differences(run.recipe, recipe):
        fix = "replace it with --overwrite, or name another folder with --out"
        raise RunError(f"{path} was started with another recipe ({', '.join(changed[:3])}); {fix}")
    write_yaml(path / "recipe.yaml", recipe.model_dump(mode="json"))
    return run


def write_split(run: Run, split: pd.DataFrame) -> None:
    """Write the split, or check that a resumed run has the same one."""
    split = split.astype({name: str for name in split if name != FOLD})
    if (run.path / "split.csv").is_file():
        if not run.split.equals(split.reset_index(drop=True)):
            what = "its split.csv doesn't fit any more; start anew with --out"
            raise RunError(f"the data have changed since {run.path} was started: {what}")
        return
    write_csv(run.path / "split.csv", split)


def fingerprint(
    recipe: Recipe,
    dataset: Dataset,
    split: pd.DataFrame,
    weights: list[dict[str, Any]],
    target_weights: dict[str, Any] | None,
    precision: str,
    processes: int,
) -> dict[str, Any]:
    """Describe all that a number depends on: versions, code, data, seed, hardware, weights and processes."""
    import torch

    return {
        "dualrefnet": dualrefnet.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in LIBRARIES},
        "git_commit": _git_commit(),
        "seed": recipe.seed,
        "data": {
            "dataset": dataset.schema.title,
            "table_sha256": sha256_of_json(dataset.table.drop(columns="image_path").to_csv(index=False)),
            "split_sha256": sha256_of_json(split.to_csv(index=False)),
            "rows_used": len(split),
        },
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
            "cores": psutil.cpu_count(logical=True),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "precision": precision,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "weights": weights,
        "target_weights": target_weights,
    }


def _version(package: str) -> str:
    try:
        return packages.version(package)
    except packages.PackageNotFoundError:
        # OpenCV and others come under several names, and conda's say nothing to pip.
        return str(import_module(LIBRARIES[package]).__version__)


def _git_commit() -> str | None:
    """Return the commit of the source tree, with `+changes` if it is not clean; None for an installed wheel."""
    here = Path(__file__).parent

    def git(*arguments: str | Path) -> str:
        command = ["git", "-C", here, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", here) else "")
    except (OSError, subprocess.SubprocessError):
        return None
