"""Where two runs disagree about the test images that both have, and by how much one is better."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dualrefnet.display.figure import WIDTH, ReportFigure, new_figure, show_image, styled, truncate
from dualrefnet.errors import RunError
from dualrefnet.evaluation.bootstrap import Bootstrap, Difference
from dualrefnet.evaluation.comparison import class_differences, corrected_classes, pooled_bootstrap
from dualrefnet.run import Run

if TYPE_CHECKING:
    from dualrefnet.analysis.cases import ShownCase

# The four cells of the 2 x 2 table, as (A right, B right).
KINDS = {
    (True, True): "both_right",
    (True, False): "only_a_right",
    (False, True): "only_b_right",
    (False, False): "both_wrong",
}


@dataclass(frozen=True)
class Disagreement:
    """How two runs predicted the same test images.

    `table`: image_id, label, predicted_a, predicted_b, p_true_a, p_true_b (probability of the true class) and kind (one
    of `KINDS`), in the order of A. `chosen`: rows of it to be shown, first those that only A gets right, then those
    that only B does; the largest difference in the probability of the true class first. `difference`: A - B in balanced
    accuracy, its interval over patients; `per_class`: the same class by class, see `class_differences`. `only_a`,
    `only_b`: test images of one that the other wasn't tested on, and which are left out.
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
    """Compare what two finished runs predicted for the test images that both have; choose `cases` of each kind.

    RunError: a run isn't finished; they share no test image, or differ in labels, classes or patients.
    """
    tested = [_test_predictions(run) for run in (a, b)]
    columns = [[name for name in map(str, frame.columns) if name.startswith("prob_")] for frame in tested]
    if set(columns[0]) != set(columns[1]):
        raise RunError(f"{a.path} and {b.path} know different classes and can't be compared")
    both = shared_images(*tested)
    labels, patients = both["label"].to_numpy(), both["group"].to_numpy()
    aligned = [frame.set_index("image_id").loc[both["image_id"]] for frame in tested]
    scores = [frame[columns[0]].to_numpy(dtype=float) for frame in aligned]
    predicted = [frame["predicted"].to_numpy() for frame in aligned]
    classes = [name.removeprefix("prob_") for name in columns[0]]
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
    """Return image_id, label and group of the test images that two runs share, in the order of the first.

    RunError: there is none; an image has another label in the other run, or is grouped with other images; or all are of
    one patient.
    """
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


def _test_predictions(run: Run) -> pd.DataFrame:
    """Return the predictions of the test split with each image's patient as `group`."""
    predictions = run.predictions
    rows = predictions[predictions["split"] == "test"].reset_index(drop=True)
    return rows.assign(group=rows["image_id"].map(run.split.set_index("image_id")["patient_id"]))


def _choose_disagreements(table: pd.DataFrame, patients: np.ndarray, cases: int) -> pd.DataFrame:
    """Choose `cases` rows of each kind of disagreement: classes in turn, the largest differences first, each patient
    once.
    """
    found = table.assign(patient=patients, gap=(table["p_true_a"] - table["p_true_b"]).abs())
    found = found[found["kind"].isin(["only_a_right", "only_b_right"])]
    # Of each patient the one image with the largest difference, of whichever kind: A and B are treated alike.
    found = found.sort_values(["gap", "image_id"], ascending=[False, True]).drop_duplicates("patient")
    # Every class's first comes before any class's second.
    found["turn"] = found.groupby(["kind", "label"]).cumcount()
    found = found.sort_values(["turn", "gap", "image_id"], ascending=[True, False, True]).groupby("kind").head(cases)
    order = found.sort_values(["kind", "gap", "image_id"], ascending=[True, False, True]).index
    return table.loc[order].reset_index(drop=True)


# Letters that fit above a panel, and those of a class's name among them.
LINE, CLASS_NAME = 20, 13


@styled
def draw_disagreement(
    found: Disagreement, cases: Sequence[tuple[ShownCase, ShownCase | None]], names: tuple[str, str]
) -> ReportFigure:
    """Draw one case a row: the image, and Grad-CAM of what each of two runs predicted (None: the second reads no
    image).
    """
    # Here, because only figures need what Grad-CAM is computed with.
    from dualrefnet.analysis.gradcam import overlay

    chosen: dict[str, dict[str, Any]] = {row["image_id"]: row for row in found.chosen.to_dict("records")}  # type: ignore[misc]
    rows: list[tuple[str, str, str, str, float]] = []
    for first, _ in cases:
        row = chosen[first.chosen.image_id]
        for name, run in zip(names, ("a", "b"), strict=True):
            rows.append((first.chosen.image_id, row["label"], name, row[f"predicted_{run}"], row[f"p_true_{run}"]))
    titles = [_title(name, label, predicted, probability) for _, label, name, predicted, probability in rows]
    lines = max(title.count("\n") + 1 for title in titles)
    figure, axes = new_figure(len(cases) * (WIDTH / 3 + 0.12 + 0.12 * lines), len(cases), 3)
    for number, (first, second) in enumerate(cases):
        plain, *panels = axes[3 * number : 3 * number + 3]
        own = slice(2 * number, 2 * number + 2)
        show_image(plain, first.image, f"true: {truncate(rows[2 * number][1], CLASS_NAME)}")
        for axis, case, (*_, predicted, _), title in zip(panels, (first, second), rows[own], titles[own], strict=True):
            image = overlay(case.image, case.saliency[predicted]) if case is not None and case.saliency else first.image
            show_image(axis, image, title)
    counts = found.counts
    caption = (
        f"Of {len(found.table)} shared test images, both runs are right on {counts['both_right']}, only {names[0]} on "
        f"{counts['only_a_right']}, only {names[1]} on {counts['only_b_right']}, none on {counts['both_wrong']}. Shown "
        f"are those in which the probabilities of the true class differ most, each {found.unit} once, with the "
        "probability of the true class and, where its map is fine enough, Grad-CAM of the predicted one."
    )
    if any(second is None for _, second in cases):
        caption += f" {names[1]} reads no image, so it has no Grad-CAM."
    alt = "; ".join(
        f"true {label}: {name} predicts {predicted}, {value:.0%} for {label}"
        for _, label, name, predicted, value in rows
    )
    data = pd.DataFrame(rows, columns=["image_id", "label", "run", "predicted", "probability_of_true_class"])
    return ReportFigure("disagreement", f"{names[0]} and {names[1]}", caption, alt, figure, data)


def _title(name: str, label: str, predicted: str, probability: float) -> str:
    """Return a panel's title in lines that fit; a run's name is never cut, it may differ at its end."""
    parts = (
        f"{truncate(predicted, CLASS_NAME)}, {'right' if predicted == label else 'wrong'}",
        f"{truncate(label, CLASS_NAME)} {probability:.0%}",
    )
    line = "; ".join(parts)
    return "\n".join([textwrap.fill(name, LINE), *([line] if len(line) <= LINE else parts)])
