"""The numbers printed in the paper, so that a measured number can stand beside them; and what is wrong with some.

Khurshid, Singh and Vatsa: Multimodal dual-stage feature refinement for robust skin lesion classification, Scientific
Reports 2025. `reported/` holds its Tables 1, 2, 3 and 4 and the figures of its text, as printed, misprints included.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib import resources

import pandas as pd

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
AVERAGED = ("f1", "precision", "recall")
# Rows of Table 4 whose recall equals the accuracy, as only a weighted recall must.
WEIGHTED_IN_TABLE_4 = ("metablock", "deepmetaforge", "ensemble")
# Table 4 doesn't name a method's backbone.
ANY_BACKBONE = "best"
CLASS_METRICS = ("sensitivity", "specificity", "ppv", "npv", "f1")


@dataclass(frozen=True)
class Reported:
    """A number of the paper.

    Attributes:
        value: as printed.
        average: `macro` or `weighted` for precision, recall and F1; empty for other measures.
    """

    value: float
    average: str = ""

    def comparable(self, measure: str) -> bool:
        """True if `measure` is averaged as this number is."""
        return not self.average or measure.endswith(f"_{self.average}")


def reported(
    dataset: str, table: str, method: str, backbone: str, measure: str, metric: str | None = None
) -> Reported | None:
    """Return the paper's number for a cell, or None if the paper has none.

    Args:
        dataset: `pad_ufes_20` or `isic_2019`.
        table: `3a`, `3b`, `4` or `text`.
        method: the system.
        backbone: its image encoder; Table 4 doesn't name one, so there any fits.
        measure: a key of metrics.json.
        metric: the paper's name, where it isn't the one in `PAPER_METRICS`: the ablations of the text.
    """
    metric = metric or PAPER_METRICS.get(measure)
    # No table has it.
    table = "text" if metric == "kappa" else table
    results = _results()
    for name in (backbone, ANY_BACKBONE):
        value = results.get((dataset, table, method, name, metric or ""))
        if value is not None:
            average = "" if metric not in AVERAGED else "weighted" if method in WEIGHTED_IN_TABLE_4 else "macro"
            return Reported(value, average)
    return None


def reported_class(dataset: str, method: str, backbone: str, name: str, measure: str) -> float | None:
    """Return a number of Table 2 (DualRefNet with its best backbone), or None if the paper has none.

    Args:
        dataset: `pad_ufes_20` or `isic_2019`.
        method: the system.
        backbone: its image encoder.
        name: of the class.
        measure: `sensitivity`, `specificity`, `ppv`, `npv` or `f1`.
    """
    return _per_class().get((dataset, backbone, name, measure)) if method == "dualrefnet" else None


def reported_split(dataset: str, side: str, name: str) -> int | None:
    """Return the number of images of a class in `train`, `val` or `test` (Table 1), or None if the paper has none."""
    return _splits().get((dataset, side, name))


def reported_classes(dataset: str) -> tuple[str, ...]:
    """Return the classes in the order of Table 1; empty for a data set that isn't in it."""
    return tuple(dict.fromkeys(name for data, _, name in _splits() if data == dataset))


def caveats(dataset: str, table: str, methods: Collection[str]) -> list[str]:
    """Return what a reader must know before comparing with the paper's numbers, one sentence each.

    Args:
        dataset: `pad_ufes_20` or `isic_2019`.
        table: `1`, `2a`, `2b`, `3a`, `3b`, `4` or `text`.
        methods: those in the printed table; remarks on others are left out.
    """
    notes = []
    for where, whom, note in _CAVEATS:
        if (dataset, table) in where and (not whom or whom & set(methods)):
            notes.append(note)
    return notes


_PAD, _ISIC = "pad_ufes_20", "isic_2019"
_3A, _3B, _4, _TEXT = (_PAD, "3a"), (_ISIC, "3b"), (_PAD, "4"), {(_PAD, "text"), (_ISIC, "text")}
_COMPETITORS = {
    "no_metadata",
    "concat",
    "metanet",
    "metablock",
    "visual",
    "auxnet",
    "deepmetaforge",
    "jif_mmfa",
    "ensemble",
}
# (where it applies, the methods it is about (empty: whatever they are), the remark).
_CAVEATS: tuple[tuple[set[tuple[str, str]], set[str], str], ...] = (
    ({_3A, _3B, _4, *_TEXT}, set(), "The paper's figures come from one training each, without intervals."),
    (
        {_3A, _3B, _4},
        _COMPETITORS,
        "The paper's figures of all other methods than DualRefNet are copied from their publications, which had other test sets and "
        "protocols; MetaBlock's are means over five folds.",
    ),
    (
        {_3A},
        {"dualrefnet"},
        "From the counts behind Table 2a the paper's balanced accuracy .845 (VGG-13) has a 95% interval of about [.79, .89] if each "
        "image is a patient of its own.",
    ),
    (
        {_3A},
        {"dualrefnet"},
        "The paper's AUC of DualRefNet (.981 to .997) doesn't fit its accuracy: probably another definition of AUC. No target.",
    ),
    (
        {_3A},
        {"visual"},
        "Visual with DenseNet-121: the paper's accuracy .709 is below its balanced accuracy .779; probably misprinted.",
    ),
    (
        {_3B},
        {"visual"},
        "The paper's ISIC-2019 figures of Visual come from another test set: 5,066 images, those with missing metadata included.",
    ),
    ({_3B}, {"no_metadata", "auxnet"}, "No metadata and AuxNet aren't in the paper's Table 3b."),
    (
        {_4},
        set(),
        "Table 4 mixes averages: precision, recall and F1 of MetaBlock, DeepMetaForge and the ensemble are weighted (their recall is "
        "their accuracy), those of AuxNet and DualRefNet macro. A difference is given only where the average is the same.",
    ),
    (
        {_4},
        {"dualrefnet"},
        "DualRefNet's figures of Table 4 are means of rounded values of Table 2a; its exact macro recall is .845.",
    ),
    ({_4}, {"metablock"}, "MetaBlock's accuracy .726 in Table 4 is no cell of Table 3a."),
    (
        {_4},
        {"ensemble"},
        "The ensemble's accuracy .844 fits a test set of 460 images (388 right), not the paper's 383.",
    ),
    (
        {(_PAD, "2a")},
        set(),
        "Table 2a: the NPVs of ACK, BCC and SCC repeat the specificities, and no counts give them; the specificities of MEL and NEV are "
        "cut off, not rounded.",
    ),
    (
        {(_ISIC, "2b")},
        set(),
        "Table 2b: the specificity .98 of DF and VASC is ruled out by their precisions, which imply .997 and .998.",
    ),
    ({(_PAD, "1")}, set(), "The paper's text says 80:20; its Table 1, rebuilt here, is 4/6, 1/6 and 1/6."),
    (
        {(_ISIC, "1")},
        set(),
        "The paper's text says that about 3,051 images were excluded; by its Table 1 there were 2,851.",
    ),
    (
        {(_ISIC, "text")},
        set(),
        "The paper's .163 for cross-attention on ISIC-2019 is near the .125 of guessing: a failed training, no evidence on attention.",
    ),
)


def _read(name: str) -> pd.DataFrame:
    with (resources.files("dualrefnet.suite") / "reported" / name).open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype={"table": str})


@cache
def _results() -> dict[tuple[str, ...], float]:
    return _lookup(_read("reported_results.csv"), "value")


@cache
def _per_class() -> dict[tuple[str, ...], float]:
    return _lookup(_read("reported_per_class.csv"), "value")


@cache
def _splits() -> dict[tuple[str, ...], int]:
    return {key: int(images) for key, images in _lookup(_read("reported_splits.csv"), "images").items()}


def _lookup(table: pd.DataFrame, column: str) -> dict[tuple[str, ...], float]:
    keys = table.drop(columns=column).itertuples(index=False, name=None)
    return dict(zip(keys, table[column].tolist(), strict=True))
