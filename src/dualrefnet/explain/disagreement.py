"""Where two runs disagree: the test images that one gets right and the other wrong, from their predictions alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from dualrefnet.errors import RunError
from dualrefnet.evaluation.comparison import Difference
from dualrefnet.evaluation.intervals import paired_difference
from dualrefnet.run import Run

# The four cells of the 2 x 2 table, as (A right, B right).
KINDS = {(True, True): "both_right", (True, False): "only_a_right", (False, True): "only_b_right", (False, False): "both_wrong"}
DISAGREEMENTS = ("only_a_right", "only_b_right")


@dataclass(frozen=True)
class Disagreement:
    """How two runs answered the same test images.

    Attributes:
        table: image_id, label, predicted_a, predicted_b, p_true_a, p_true_b (probability given to the true class) and kind
            (one of `KINDS`), one row a test image of both, in the order of A.
        chosen: rows of `table` to be shown, first those that only A gets right, then those that only B does; the largest
            difference in the probability of the true class first.
        counts: kind -> number of images.
        balanced_accuracy_a: of A on these images.
        balanced_accuracy_b: of B.
        difference: A - B in balanced accuracy, its interval over patients.
        patients: whose images these are (of ISIC-2019: lesions).
        only_a: test images of A that B wasn't tested on, and which are therefore left out.
        only_b: test images of B that A wasn't tested on.
    """

    table: pd.DataFrame
    chosen: pd.DataFrame
    counts: dict[str, int]
    balanced_accuracy_a: float
    balanced_accuracy_b: float
    difference: Difference
    patients: int
    only_a: int
    only_b: int


def find_disagreement(a: Run, b: Run, cases: int = 6, samples: int = 1000, seed: int = 0) -> Disagreement:
    """Compare what two finished runs said of the test images that both have.

    Args:
        a: a run.
        b: another one, tested on some of the same images.
        cases: how many to choose of each kind of disagreement.
        samples: bootstrap samples of patients for the difference in balanced accuracy.
        seed: of the draw.

    Raises:
        RunError: a run isn't finished; they share no test image, or differ in labels, classes or patients.
    """
    tested = [_tested(run) for run in (a, b)]
    columns = [[name for name in map(str, frame.columns) if name.startswith("prob_")] for frame in tested]
    if set(columns[0]) != set(columns[1]):
        raise RunError(f"{a.path} and {b.path} know different classes and can't be compared")
    both = shared_images(*tested)
    labels = both["label"].to_numpy()
    scores = [frame.set_index("image_id").loc[both["image_id"], columns[0]].to_numpy(dtype=float) for frame in tested]
    said = [frame.set_index("image_id").loc[both["image_id"], "predicted"].to_numpy() for frame in tested]
    classes = [name.removeprefix("prob_") for name in columns[0]]
    truth = np.array([classes.index(label) for label in labels])
    rows = np.arange(len(truth))
    table = pd.DataFrame({
        "image_id": both["image_id"], "label": labels, "predicted_a": said[0], "predicted_b": said[1],
        "p_true_a": scores[0][rows, truth], "p_true_b": scores[1][rows, truth],
        "kind": [KINDS[pair] for pair in zip(said[0] == labels, said[1] == labels, strict=True)],
    })  # fmt: skip
    patients = both["group"].to_numpy()
    found = paired_difference(truth, scores[0], scores[1], patients, classes, samples=samples, seed=seed)
    return Disagreement(
        table,
        _choose(table, patients, cases),
        {kind: int((table["kind"] == kind).sum()) for kind in KINDS.values()},
        found["a"],
        found["b"],
        Difference(found["difference"], found["ci95"][0], found["ci95"][1], found["p"], found["samples"]),
        found["groups"],
        len(tested[0]) - len(both),
        len(tested[1]) - len(both),
    )


def shared_images(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Return the test images that two runs share, in the order of the first.

    Args:
        a: image_id, label and group (the patient), one row a test image; further columns are ignored.
        b: the same of the other run.

    Returns:
        image_id, label and group.

    Raises:
        RunError: there is none; an image has another label in the other run, or is grouped with other images; or all are
            of one patient.
    """
    columns = ["image_id", "label", "group"]
    both = a[columns].merge(b[columns], on="image_id", how="inner", suffixes=("", "_b"), validate="one_to_one")
    if both.empty:
        raise RunError("the two runs share no test image: compare runs with the same data, protocol and fold")
    unequal = int((both["label"] != both["label_b"]).sum())
    if unequal:
        raise RunError(f"{unequal} of {len(both)} test images have another label in the other run: they don't come from the same data")
    first, second = (pd.factorize(both[name])[0] for name in ("group", "group_b"))
    if (first != second).any():
        raise RunError("the two runs disagree on which test images show the same patient: they don't come from the same data")
    if first.max() == 0:
        raise RunError("all test images that the two runs share are of one patient: nothing can be compared")
    return both[columns]


def _tested(run: Run) -> pd.DataFrame:
    """Return the predictions of the test side with each image's patient as `group`."""
    predictions = run.predictions
    rows = predictions[predictions["split"] == "test"].reset_index(drop=True)
    return rows.assign(group=rows["image_id"].map(run.split.set_index("image_id")["patient_id"]))


def _choose(table: pd.DataFrame, patients: np.ndarray, cases: int) -> pd.DataFrame:
    """Choose `cases` rows of each kind of disagreement: classes in turn, the largest differences first, each patient once."""
    found = table.assign(patient=patients, gap=(table["p_true_a"] - table["p_true_b"]).abs())
    found = found[found["kind"].isin(DISAGREEMENTS)].sort_values(["gap", "image_id"], ascending=[False, True])
    # Of each patient the one image with the largest difference, of whichever kind: A and B are treated alike.
    found = found.drop_duplicates("patient")
    # Every class's first comes before any class's second.
    found["turn"] = found.groupby(["kind", "label"]).cumcount()
    found = found.sort_values(["turn", "gap", "image_id"], ascending=[True, False, True]).groupby("kind").head(cases)
    order = found.sort_values(["kind", "gap", "image_id"], ascending=[True, False, True]).index
    return table.loc[order].reset_index(drop=True)
