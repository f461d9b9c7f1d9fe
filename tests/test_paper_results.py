"""The measures reproduce the paper's Table 2a from counts, and show which averages its Table 4 mixes.

The paper prints no confusion matrix. Hits and numbers of predictions per class follow exactly from its two-decimal
table and the class counts of its test set; every measure of Table 2a depends on those margins and hits alone. Five of
its 30 cells can't be had from any counts, or are cut off instead of rounded: they are asserted exactly, one by one.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dualrefnet.evaluation.metrics import metrics_from_confusion

CLASSES = ["ACK", "BCC", "MEL", "NEV", "SCC", "SEK"]
SUPPORT = [122, 141, 9, 40, 32, 39]
PREDICTED = [118, 135, 9, 42, 40, 39]
# One of the many tables with those margins and hits.
MATRIX = np.array(
    [
        [107, 15, 0, 0, 0, 0],
        [0, 118, 0, 2, 21, 0],
        [0, 0, 8, 1, 0, 0],
        [0, 0, 1, 37, 0, 2],
        [11, 2, 0, 0, 19, 0],
        [0, 0, 0, 2, 0, 37],
    ]
)
TABLE_2A = {
    "ppv": [0.91, 0.87, 0.89, 0.88, 0.47, 0.95],
    "f1": [0.89, 0.86, 0.89, 0.90, 0.53, 0.95],
    "sensitivity": [0.88, 0.84, 0.89, 0.93, 0.59, 0.95],
    "specificity": [0.96, 0.93, 0.99, 0.98, 0.94, 0.99],
    "npv": [0.96, 0.93, 1.00, 0.99, 0.94, 0.99],
}
# Printed values that are cut off after two decimals, not rounded, and their exact values.
TRUNCATED = {("MEL", "specificity"): 373 / 374, ("NEV", "specificity"): 338 / 343}
# Printed values that no counts can give: they repeat the class's specificity. Beside them what the counts give.
IMPOSSIBLE = {("ACK", "npv"): 250 / 265, ("BCC", "npv"): 225 / 248, ("SCC", "npv"): 330 / 343}


@st.composite
def fillings(draw: st.DrawFn) -> NDArray[np.int64]:
    """Other tables of the same margins and hits, by moving errors round rectangles off the diagonal."""
    matrix = MATRIX.copy()
    for _ in range(draw(st.integers(0, 30))):
        a, b, c, d = draw(st.permutations(range(6)))[:4]
        amount = min(matrix[a, c], matrix[b, d])
        matrix[[a, b], [c, d]] -= amount
        matrix[[a, b], [d, c]] += amount
    return matrix


def printed_value(name: str, measure: str) -> float:
    return TABLE_2A[measure][CLASSES.index(name)]


@settings(max_examples=30)
@given(matrix=fillings())
def test_table_2a_is_reproduced_to_its_two_decimals_by_any_table_of_these_margins(matrix: NDArray[np.int64]) -> None:
    assert (matrix.sum(axis=1).tolist(), matrix.sum(axis=0).tolist()) == (SUPPORT, PREDICTED)
    per_class = metrics_from_confusion(matrix, CLASSES)["per_class"]
    cells = [
        (name, measure)
        for measure in TABLE_2A
        for name in CLASSES
        if (name, measure) not in {**TRUNCATED, **IMPOSSIBLE}
    ]
    assert len(cells) == 25
    for name, measure in cells:
        assert f"{per_class[name][measure]:.2f}" == f"{printed_value(name, measure):.2f}", (name, measure)


def test_two_printed_specificities_are_truncated_and_not_rounded() -> None:
    per_class = metrics_from_confusion(MATRIX, CLASSES)["per_class"]
    for (name, measure), exact in TRUNCATED.items():
        assert per_class[name][measure] == pytest.approx(exact)
        assert int(100 * exact) / 100 == printed_value(name, measure) != round(exact, 2)


def test_three_printed_npvs_are_impossible_and_repeat_the_specificity() -> None:
    per_class = metrics_from_confusion(MATRIX, CLASSES)["per_class"]
    for (name, measure), exact in IMPOSSIBLE.items():
        assert per_class[name][measure] == pytest.approx(exact)
        assert printed_value(name, measure) == printed_value(name, "specificity")
        # Take every count that the printed sensitivity and specificity allow, whether they were rounded or cut off:
        # none gives the printed NPV, neither rounded nor cut off.
        support = SUPPORT[CLASSES.index(name)]
        others = sum(SUPPORT) - support
        hits = np.arange(support + 1)
        hits = hits[np.abs(hits / support - printed_value(name, "sensitivity") - 0.0025) <= 0.0075]
        cleared = np.arange(others + 1)
        cleared = cleared[np.abs(cleared / others - printed_value(name, "specificity") - 0.0025) <= 0.0075]
        npv = cleared[:, None] / (cleared[:, None] + support - hits)
        assert npv.size > 0
        assert (np.abs(npv - printed_value(name, "npv") - 0.0025) > 0.0075).all()


def test_table_4_prints_means_of_rounded_entries_for_the_proposed_system() -> None:
    measured = metrics_from_confusion(MATRIX, CLASSES)
    printed = {"precision": 0.828, "recall": 0.847, "f1": 0.837}
    columns = {"precision": "ppv", "recall": "sensitivity", "f1": "f1"}
    for name, measure in columns.items():
        assert np.mean(TABLE_2A[measure]) == pytest.approx(printed[name], abs=5.1e-4)
        assert measured[f"{name}_macro"] == pytest.approx(printed[name], abs=2.5e-3)
    assert round(measured["recall_macro"], 3) == 0.845


def test_table_4_mixes_weighted_and_macro_averages() -> None:
    # method -> accuracy, precision, recall as printed. A weighted recall is the accuracy, whatever the predictions.
    weighted = {
        "metablock": (0.726, 0.677, 0.726),
        "deepmetaforge": (0.769, 0.773, 0.769),
        "ensemble": (0.844, 0.849, 0.844),
    }
    macro = {"auxnet": (0.849, 0.825, 0.832), "dualrefnet": (0.851, 0.828, 0.847)}
    assert all(accuracy == recall for accuracy, _, recall in weighted.values())
    assert all(accuracy != recall for accuracy, _, recall in macro.values())
    measured = metrics_from_confusion(MATRIX, CLASSES)
    assert measured["recall_weighted"] == pytest.approx(measured["accuracy"])
    # Measured alike, the proposed system's precision is above the ensemble's .849, not below it.
    assert round(measured["precision_weighted"], 3) == 0.860
    assert measured["precision_weighted"] > weighted["ensemble"][1]
