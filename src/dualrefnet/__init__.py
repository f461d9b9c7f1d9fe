"""Skin-lesion classification from an image and the patient's metadata: DualRefNet and honest measurement.

Public names: `train`, `fit`, `Predictor`, `Prediction`, `Run`, `Recipe`, `load_recipe`, `load_dataset`,
`split_dataset`, `DualRefNetError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualrefnet.api import fit, train
    from dualrefnet.data.adapters import load_dataset
    from dualrefnet.data.protocols import split_dataset
    from dualrefnet.deploy.predictor import Prediction, Predictor
    from dualrefnet.errors import DualRefNetError
    from dualrefnet.recipe import Recipe, load_recipe
    from dualrefnet.run import Run

__version__ = "0.1.0"

_HOMES = {
    "fit": "api",
    "train": "api",
    "load_dataset": "data.adapters",
    "split_dataset": "data.protocols",
    "Prediction": "deploy.predictor",
    "Predictor": "deploy.predictor",
    "DualRefNetError": "errors",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Run": "run",
}
__all__ = [
    "DualRefNetError",
    "Prediction",
    "Predictor",
    "Recipe",
    "Run",
    "fit",
    "load_dataset",
    "load_recipe",
    "split_dataset",
    "train",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import; `dualrefnet --help` shouldn't wait for it.
    if name in _HOMES:
        return getattr(import_module(f"dualrefnet.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dualrefnet' has no attribute {name!r}")
