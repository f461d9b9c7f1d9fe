"""The numbers printed in the paper, with their caveats (`paper.yaml`), for comparison with measured ones."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml

# Our measure -> the paper's name of it.
PAPER_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced_accuracy",
    "auc_macro_ovr": "auc",
    "f1_macro": "f1",
    "f1_weighted": "f1",
    "precision_macro": "precision",
    "precision_weighted": "precision",
    "recall_macro": "recall",
    "recall_weighted": "recall",
    "kappa": "kappa",
}


class Reported(NamedTuple):
    """A number of the paper, and how it is averaged over classes: `macro`, `weighted`, or empty (not an average)."""

    value: float
    average: str = ""

    def comparable(self, measure: str) -> bool:
        """Return whether `measure` is averaged as this number is."""
        return not self.average or measure.endswith(f"_{self.average}")


@cache
def paper() -> dict[str, Any]:
    """Return the content of `paper.yaml`; don't change it."""
    text = resources.files("dualrefnet.suite").joinpath("paper.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def reported(
    dataset: str, table: str, method: str, backbone: str, measure: str, metric: str | None = None
) -> Reported | None:
    """Return the paper's number for a cell of table `3a`, `3b`, `4` or `text`, or None if the paper has none.

    Table 4 does not name a backbone, so there any fits. `metric` is the paper's name where it isn't the one in
    `PAPER_METRICS`: the ablations of the text.
    """
    metric = metric or PAPER_METRICS.get(measure, "")
    # Kappa is in no table.
    table = "text" if metric == "kappa" else table
    backbones = paper()["results"].get(dataset, {}).get(table, {}).get(method, {})
    value = backbones.get(backbone, backbones.get("best", {})).get(metric)
    if value is None:
        return None
    averaged = metric in ("f1", "precision", "recall")
    return Reported(value, "" if not averaged else "weighted" if method in paper()["weighted"] else "macro")


def reported_class(dataset: str, method: str, backbone: str, name: str, measure: str) -> float | None:
    """Return a number of Table 2 (DualRefNet with its best backbone), or None if the paper has none."""
    if method != "dualrefnet":
        return None
    found = paper()["per_class"].get(dataset, {}).get(backbone, {}).get(name, {}).get(measure)
    return None if found is None else float(found)


def reported_split(dataset: str, split: str, name: str) -> int | None:
    """Return the number of images of a class in `train`, `val` or `test` (Table 1), or None if the paper has none."""
    images = paper()["splits"].get(dataset, {}).get(split, {}).get(name)
    return None if images is None else int(images)


def reported_classes(dataset: str) -> tuple[str, ...]:
    """Return the classes in the order of Table 1; empty for a data set that is not in it."""
    return tuple(paper()["splits"].get(dataset, {}).get("train", ()))


def caveats(dataset: str, table: str, methods: Collection[str]) -> list[str]:
    """Return what limits a comparison of `methods` with a table of the paper, one sentence each."""
    return [
        caveat["text"]
        for caveat in paper()["caveats"]
        if f"{dataset}/{table}" in caveat["tables"]
        and ("methods" not in caveat or not set(methods).isdisjoint(caveat["methods"]))
    ]
