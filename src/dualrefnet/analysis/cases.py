"""Cases of the test split: the most confident predictions of one run, right and wrong, and where two runs disagree.

Cases are chosen by probability, not by looks.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from dualrefnet.analysis.gradcam import gradcam, overlay
from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.shap import MISSING_FLAGS
from dualrefnet.data.images import read_mask
from dualrefnet.display.figure import (
    FAINT,
    INK,
    PRIMARY,
    SECONDARY,
    WIDTH,
    ReportFigure,
    file_stem,
    new_figure,
    show_image,
    styled,
    truncate,
)
from dualrefnet.errors import RunError
from dualrefnet.evaluation.bootstrap import Bootstrap, Difference
from dualrefnet.evaluation.comparison import pooled_bootstrap
from dualrefnet.models.inference import to_unit
from dualrefnet.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIGHT, WRONG = "right", "wrong"
# The four cells of the 2 x 2 table, as (A right, B right).
KINDS = {
    (True, True): "both_right",
    (True, False): "only_a_right",
    (False, True): "only_b_right",
    (False, False): "both_wrong",
}


@dataclass(frozen=True)
class ChosenCase:
    """A test image that the gallery shows; `kind` is `RIGHT` or `WRONG`."""

    image_id: str
    label: str
    predicted: str
    kind: str
    probabilities: dict[str, float]

    @property
    def second(self) -> str:
        """The second most probable class."""
        return sorted(self.probabilities, key=lambda name: -self.probabilities[name])[1]


@dataclass(frozen=True)
class ShownCase:
    """A chosen image (S, S, 3) as the model sees it, with Grad-CAM (S, S) by class, its mask (S, S), and the (field,
    value, SHAP value) of the fields that moved the predicted class most.
    """

    chosen: ChosenCase
    image: NDArray[np.uint8]
    saliency: Mapping[str, NDArray[np.float32]]
    mask: NDArray[np.bool_] | None
    attributions: list[tuple[str, str, float]]


def choose_cases(
    predictions: pd.DataFrame, groups: ArrayLike, classes: Sequence[str], each: int = 2
) -> list[ChosenCase]:
    """Choose, of every class, the most confident right and the most confident wrong predictions of predictions.csv,
    `each` of them where there are so many, and each group (patient) once for each class and kind.
    """
    columns = [f"prob_{name}" for name in classes]
    table = predictions.assign(group=np.asarray(groups), confidence=predictions[columns].max(axis=1))
    # Ties by id, so that the order of the rows doesn't matter.
    table = table.sort_values(["confidence", "image_id"], ascending=[False, True])
    right = table["label"] == table["predicted"]
    cases = []
    for name in classes:
        for kind, rows in ((RIGHT, right), (WRONG, ~right)):
            shown = table[rows & (table["label"] == name)].drop_duplicates("group").head(each)
            for row in shown.to_dict("records"):
                probabilities = {one: float(row[f"prob_{one}"]) for one in classes}
                cases.append(ChosenCase(row["image_id"], name, row["predicted"], kind, probabilities))
    return cases


def show_cases(
    opened: OpenedRun,
    cases: Sequence[ChosenCase],
    label: str | None = None,
    attributions: Mapping[str, list[tuple[str, str, float]]] | None = None,
    masks: Mapping[str, Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ShownCase]:
    """Compute Grad-CAM of the predicted, the true and the second class of test images, and of `label` if given.

    `attributions`: image id -> what moved the prediction; `masks`: image id -> mask file.
    """
    examples, shown = opened.pictures("test"), []
    places = {image_id: row for row, image_id in enumerate(examples.image_ids)}
    paths = opened.dataset.table.set_index("image_id")["image_path"]
    section = opened.recipe.image
    for case in cases:
        batch = examples.batch(np.array([places[case.image_id]]))
        images = opened.images(batch)
        assert images is not None
        assert batch.images is not None
        names = list(dict.fromkeys([case.predicted, case.label, case.second, *([label] if label else [])]))
        targets = torch.tensor([opened.classes.index(name) for name in names], device=opened.device)
        metadata = batch.metadata.to(opened.device).expand(len(names), -1)
        maps = gradcam(opened.model, images.expand(len(names), -1, -1, -1), metadata, targets).saliency.cpu().numpy()
        image = (255 * to_unit(batch.images, section.size)).round().byte()[0].permute(1, 2, 0).numpy()
        file = (masks or {}).get(case.image_id)
        mask = read_mask(file, Path(paths.loc[case.image_id]), section.size, section.fit) if file else None
        saliency = dict(zip(names, maps, strict=True))
        shown.append(ShownCase(case, image, saliency, mask, (attributions or {}).get(case.image_id, [])))
        if progress:
            progress(len(shown), len(cases))
    return shown


# Inches a case is high, and letters in a line beside the images.
ROW, LETTERS = 1.3, 34
MOST_CLASSES = 3
# Letters of a class's name at most: in front of its bar, and above the map. Share of the column's width that such a
# letter takes.
NAME, MAP_NAME, LETTER = 12, 9, 0.042


@styled
def draw_gallery(cases: Sequence[ShownCase], label: str, name: str) -> ReportFigure:
    """Draw the cases of one class, one a row: image, Grad-CAM of the predicted class, probabilities and attributions;
    `name` is what the class stands for, or empty.
    """
    figure, axes = new_figure(ROW * len(cases), len(cases), 3, WIDTH, width_ratios=(1.0, 1.0, 1.75))
    letters = max(len(truncate(one, NAME)) for case in cases for one, _ in _top(case.chosen))
    rows = []
    for case, (plain, salient, beside) in zip(cases, zip(*[iter(axes)] * 3, strict=True), strict=True):
        chosen = case.chosen
        show_image(plain, case.image, chosen.kind)
        title = f"Grad-CAM {truncate(chosen.predicted, MAP_NAME)}"
        show_image(salient, overlay(case.image, case.saliency[chosen.predicted]), title)
        _write_prediction(beside, case, max(0.24, 0.03 + LETTER * letters))
        attributions = "; ".join(f"{field} = {text}: {value:+.3f}" for field, text, value in case.attributions)
        row = {"image_id": chosen.image_id, "label": chosen.label, "predicted": chosen.predicted, "kind": chosen.kind}
        row |= {f"prob_{one}": value for one, value in chosen.probabilities.items()}  # type: ignore[misc]
        rows.append(row | {"answers": attributions})
    right = sum(case.chosen.kind == RIGHT for case in cases)
    caption = (
        f"Test images of {label} as the model sees them: the {right} most confident right and the {len(cases) - right} "
        "most confident wrong predictions, each patient once."
    )
    alt = "; ".join(
        f"{row['kind']}: predicted {row['predicted']} with {_top(case.chosen)[0][1]:.0%}"
        for row, case in zip(rows, cases, strict=True)
    )
    title = f"Test images of {label}" + (f" ({name})" if name else "")
    return ReportFigure(f"gallery_{file_stem(label)}", title, caption, alt, figure, pd.DataFrame(rows))


def _write_prediction(axis: Axes, case: ShownCase, left: float) -> None:
    """Write probabilities, whose bars begin at `left`, and attributions into an empty axis, from the top, in inches."""
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(ROW, 0)
    place, longest = 0.1, 0.74 - left
    for name, value in _top(case.chosen):
        predicted, right = name == case.chosen.predicted, name == case.chosen.label
        colour = (PRIMARY if right else SECONDARY) if predicted else FAINT
        weight = "bold" if predicted else "normal"
        axis.barh(place, longest * value, 0.11, left=left, color=colour)
        axis.text(0.0, place, truncate(name, NAME), va="center", fontsize=7, fontweight=weight)
        # The probability stands behind its bar, and says which class is the true one.
        text = f"{value:.0%}" + (" true" if right else "")
        axis.text(left + 0.02 + longest * value, place, text, va="center", fontsize=7, color=INK)
        place += 0.15
    place += 0.02
    for name, given, value in case.attributions:
        text = f"fields missing: {given}" if name == MISSING_FLAGS else f"{name} = {given}"
        sign = "−" if value < 0 else "+"
        for line in textwrap.wrap(f"{sign}{abs(100 * value):.0f}  {text}", LETTERS, subsequent_indent="     "):
            axis.text(0.0, place, line, va="center", fontsize=7)
            place += 0.115


def _top(chosen: ChosenCase) -> list[tuple[str, float]]:
    """Return the most probable classes and the true one, the most probable first."""
    top = sorted(chosen.probabilities.items(), key=lambda item: -item[1])[:MOST_CLASSES]
    if chosen.label not in dict(top):
        top[-1] = (chosen.label, chosen.probabilities[chosen.label])
    return top


@dataclass(frozen=True)
class Disagreement:
    """How two runs predicted the same test images.

    `table`: image_id, label, predicted_a, predicted_b, p_true_a, p_true_b (probability of the true class) and kind (one
    of `KINDS`), in the order of A. `chosen`: rows of it to be shown, first those that only A gets right, then those
    that only B does; the largest difference in the probability of the true class first. `difference`: A - B in balanced
    accuracy, its interval over patients. `only_a`, `only_b`: test images of one that the other wasn't tested on, and
    which are left out.
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
    """Compare what two finished runs predicted for the test images that both have; choose `cases` of each kind.

    Raises:
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
        found.groups,
        only_a=len(tested[0]) - len(both),
        only_b=len(tested[1]) - len(both),
    )


def shared_images(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Return image_id, label and group of the test images that two runs share, in the order of the first.

    Raises:
        RunError: there is none; an image has another label in the other run, or is grouped with other images; or
            all are
            of one patient.
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
            show_image(axis, first.image if case is None else overlay(case.image, case.saliency[predicted]), title)
    counts = found.counts
    caption = (
        f"Of {len(found.table)} shared test images, both runs are right on {counts['both_right']}, only {names[0]} on "
        f"{counts['only_a_right']}, only {names[1]} on {counts['only_b_right']}, none on {counts['both_wrong']}. Shown "
        "are those in which the probabilities of the true class differ most, each patient once, with Grad-CAM of the "
        "predicted class and the probability of the true one."
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
