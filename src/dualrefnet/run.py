"""The run folder: everything that one run made, under fixed names.

`recipe.yaml`, `split.csv`, `model.safetensors`, `model.json`, `history.csv`, `predictions.csv`, `calibration.json`,
`out_of_scope.safetensors`, `metrics.json`, `fingerprint.json`; while training also `checkpoint.safetensors`.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib import metadata as packages
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import psutil

import dualrefnet
from dualrefnet.data.protocols import SPLIT_COLUMNS, refuse_crossing
from dualrefnet.data.schema import Dataset
from dualrefnet.errors import RunError
from dualrefnet.files import (
    is_file,
    locked,
    make_folder,
    read_csv,
    read_json,
    remove_partial,
    sha256_of_json,
    write_csv,
    write_yaml,
)
from dualrefnet.recipe import Recipe, differences, load_recipe

if TYPE_CHECKING:
    from dualrefnet.evaluation.calibration import Calibration
    from dualrefnet.runtime.out_of_distribution import OutOfDistributionScore


# While a training writes the folder.
LOCK = ".lock"
# Libraries that numbers depend on, and how they are imported.
LIBRARIES = {name: name for name in ("torch", "torchvision", "timm", "accelerate")}
LIBRARIES |= {"opencv-python-headless": "cv2", "pillow": "PIL", "numpy": "numpy", "pandas": "pandas"}
LIBRARIES |= {"scikit-learn": "sklearn"}


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

    @property
    def weights_file(self) -> Path:
        """The best epoch's parameters."""
        return self.path / "model.safetensors"

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
        return load_recipe(self._existing("recipe.yaml"))

    @property
    def split(self) -> pd.DataFrame:
        """The split; a group that crosses it is refused unless the protocol is `paper`."""
        split = read_csv(self._existing("split.csv"), dtype=str, keep_default_na=False)
        if list(split.columns) != list(SPLIT_COLUMNS):
            raise RunError(f"{self.path / 'split.csv'} must have the columns {', '.join(SPLIT_COLUMNS)}")
        if self.recipe.data.protocol != "paper":
            refuse_crossing(split)
        return split

    @property
    def model(self) -> dict[str, Any]:
        """Architecture, classes, metadata encoder and preprocessing, as plain JSON."""
        return read_json(self._existing("model.json"))  # type: ignore[no-any-return]

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics on the test split."""
        return read_json(self._existing("metrics.json"))  # type: ignore[no-any-return]

    @property
    def unit(self) -> str:
        """`patient` or `lesion`: what must not cross the split, and is resampled."""
        from dualrefnet.data import isic_2019, pad_ufes_20

        # Runs of earlier versions don't record it.
        known = isic_2019.SCHEMA if self.recipe.data.dataset == isic_2019.SCHEMA.name else pad_ufes_20.SCHEMA
        return str(self.metrics.get("unit", known.unit))

    @property
    def predictions(self) -> pd.DataFrame:
        """One row an image of validation and test."""
        return read_csv(
            self._existing("predictions.csv"),
            dtype={"image_id": str, "label": str, "predicted": str},
            keep_default_na=False,
        )

    @property
    def calibration(self) -> Calibration:
        """Temperature, conformal thresholds and threshold of referral, fitted on the validation split."""
        if self.finished and not self.calibration_file.is_file():
            raise RunError(f"{self.path} is older than calibration.json: run `dualrefnet evaluate {self.path}`")
        from dualrefnet.evaluation.calibration import Calibration

        try:
            return Calibration.from_json(read_json(self._existing(self.calibration_file.name)))
        except ValueError as error:  # JSONDecodeError is one.
            fix = f"run `dualrefnet evaluate {self.path}`"
            raise RunError(f"{self.calibration_file} can't be read ({error}): {fix}") from None

    @property
    def out_of_scope(self) -> OutOfDistributionScore:
        """The out-of-distribution score of an image, with its limit."""
        if self.finished and not self.out_of_scope_file.is_file():
            raise RunError(f"{self.path} has no out-of-distribution check: run `dualrefnet evaluate {self.path}`")
        from dualrefnet.runtime.out_of_distribution import OutOfDistributionScore

        try:
            return OutOfDistributionScore.load(self._existing(self.out_of_scope_file.name))
        except (OSError, ValueError) as error:
            fix = f"run `dualrefnet evaluate {self.path}`"
            raise RunError(f"{self.out_of_scope_file} can't be read ({error}): {fix}") from None

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch."""
        return read_csv(self._existing("history.csv"))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the numbers depend on: versions, code, data, hardware, weights."""
        return read_json(self._existing("fingerprint.json"))  # type: ignore[no-any-return]

    def _existing(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            cut = "it isn't a run folder, or its training was cut short (`dualrefnet train ... --resume`)"
            raise RunError(f"{self.path} has no {name}: {cut}")
        return path


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Keep a second training out of a run folder, which is made."""
    if is_file(path):
        raise RunError(f"{path} is a file; name a folder for the run")
    lock = make_folder(path) / LOCK
    with locked(lock, f"{path} is in use by another training; wait until it ends, or name another folder with --out"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def refuse_taken(path: Path, resume: bool) -> bool:
    """Refuse a folder that holds something else, or a run unless it is resumed; return whether a run is there."""
    found = [file for file in path.iterdir() if file.name != LOCK] if path.is_dir() else []
    # A kill during the very first write leaves no more than such a file.
    if all(file.match(".*.partial") for file in found):
        return False
    if not (path / "recipe.yaml").is_file():
        raise RunError(f"{path} isn't empty and isn't a run folder; name another one with --out (Python: out=)")
    if not resume:
        what = "a finished run" if Run(path).finished else "an unfinished run"
        fix = "continue it with --resume (Python: resume=True), or name another folder with --out (out=)"
        raise RunError(f"{path} holds {what}; {fix}")
    return True


def start_run(path: Path, recipe: Recipe, resume: bool) -> Run:
    """Open the folder of a run that begins or goes on."""
    run = Run(path)
    if refuse_taken(path, resume):
        if run.recipe != recipe:
            changed = ", ".join(differences(run.recipe, recipe)[:3])
            raise RunError(f"{path} was started with another recipe ({changed}); name another folder with --out")
    else:
        remove_partial(path)
    write_yaml(path / "recipe.yaml", recipe.model_dump(mode="json"))
    return run


def write_split(run: Run, split: pd.DataFrame) -> None:
    """Write the split, or check that a resumed run has the same one."""
    split = split.astype(str)
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
