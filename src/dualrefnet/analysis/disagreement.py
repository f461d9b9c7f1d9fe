"""Where two runs disagree about the test images that both have, and by how much one is better."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from dualrefnet.errors import RunError
from dualrefnet.evaluation.bootstrap import Bootstrap, Difference
from dualrefnet.evaluation.comparison import class_differences, corrected_classes, pooled_bootstrap
from dualrefnet.run import Run

# The four cells of the 2 x 2 table, as (A right, B right).
KINDS = {
    (True, True): "both_right",
    (True, False): "only_a_right",
    (False, True): "only_b_right",
    (False, False): "both_wrong",
}


@dataclass(frozen=True)
class Disagreement:
    """How two runs predicted the test images that both have.

    `table` is in the order of A, with the probability of the true class and the kind (of `KINDS`); `chosen` are rows of
    it to be shown; `difference` is A - B in balanced accuracy; `only_a`, `only_b` count test images of one run alone.
    """

    table: pd.DataFrame
    chosen: pd.DataFrame
    counts: dict[str, int]
    balanced_accuracy_a: float
    balanced_accuracy_b: float
    difference: Difference
    per_class: pd.DataFrame
    patients: int
    only_a: int
    only_b: int
    unit: str


def find_disagreement(a: Run, b: Run, cases: int = 6, samples: int = 1000, seed: int = 0) -> Disagreement:
    """Compare what two finished runs predicted for the test images that both have; choose `cases` of each kind."""
    tested, classes = [run.test.rows for run in (a, b)], list(a.model["classes"])
    if set(classes) != set(b.model["classes"]):
        raise RunError(f"{a.path} and {b.path} know different classes and can't be compared")
    both = shared_images(*tested)
    labels, patients = both["label"].to_numpy(), both["group"].to_numpy()
    aligned = [frame.set_index("image_id").loc[both["image_id"]] for frame in tested]
    scores = [frame[[f"prob_{name}" for name in classes]].to_numpy(dtype=float) for frame in aligned]
    predicted = [frame["predicted"].to_numpy() for frame in aligned]
    truth = np.array([classes.index(label) for label in labels])
    table = pd.DataFrame(
        {
            "image_id": both["image_id"],
            "label": labels,
            "predicted_a": predicted[0],
            "predicted_b": predicted[1],
            "p_true_a": scores[0][np.arange(len(truth)), truth],
            "p_true_b": scores[1][np.arange(len(truth)), truth],
            "kind": [KINDS[pair] for pair in zip(predicted[0] == labels, predicted[1] == labels, strict=True)],
        }
    )
    systems, bootstrap = {"a": [scores[0]], "b": [scores[1]]}, Bootstrap(patients, samples, seed)
    found = pooled_bootstrap(truth, systems, bootstrap, classes)
    return Disagreement(
        table,
        _choose_disagreements(table, patients, cases),
        {kind: int((table["kind"] == kind).sum()) for kind in KINDS.values()},
        found.points["a"]["balanced_accuracy"],
        found.points["b"]["balanced_accuracy"],
        found.difference("a", "b", "balanced_accuracy"),
        corrected_classes(class_differences(found, "a", "b", classes)),
        found.groups,
        only_a=len(tested[0]) - len(both),
        only_b=len(tested[1]) - len(both),
        unit=a.unit,
    )


def shared_images(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Return image_id, label and group of the test images that two runs share, in the order of the first."""
    columns = ["image_id", "label", "group"]
    both = a[columns].merge(b[columns], on="image_id", how="inner", suffixes=("", "_b"), validate="one_to_one")
    if both.empty:
        raise RunError("the two runs share no test image: compare runs with the same data, protocol and fold")
    unequal = int((both["label"] != both["label_b"]).sum())
    if unequal:
        raise RunError(f"{unequal} of {len(both)} test images have another label in the other run: the data differ")
    first, second = (pd.factorize(both[name])[0] for name in ("group", "group_b"))
    if (first != second).any():
        raise RunError("the two runs disagree on which test images show the same patient: the data differ")
    if first.max() == 0:
        raise RunError("all test images that the two runs share are of one patient: nothing can be compared")
    return both[columns]


def _choose_disagreements(table: pd.DataFrame, patients: np.ndarray, cases: int) -> pd.DataFrame:
    """Choose `cases` rows of each kind: classes in turn, the largest differences first, each patient once."""
    found = table.assign(patient=patients, gap=(table["p_true_a"] - table["p_true_b"]).abs())
    found = found[found["kind"].isin(["only_a_right", "only_b_right"])]
    # Of each patient the one image with the largest difference, of whichever kind: A and B are treated alike.
    found = found.sort_values(["gap", "image_id"], ascending=[False, True]).drop_duplicates("patient")
    # Every class's first comes before any class's second.
    found["turn"] = found.groupby(["kind", "label"]).cumcount()
    found = found.sort_values(["turn", "gap", "image_id"], ascending=[True, False, True]).groupby("kind").head(cases)
    order = found.sort_values(["kind", "gap", "image_id"], ascending=[True, False, True]).index
    return table.loc[order].reset_index(drop=True)
