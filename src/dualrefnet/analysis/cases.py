"""The gallery: of every class the surest right and the surest wrong answers, chosen by probability and not by looks."""

# also: Where two runs disagree: the test images that one gets right and the other wrong, from their predictions alone.
# also: The gallery: photographs with what the model says of them, where it looked, and which answers of the form
# counted.
# also: Photographs that one run gets right and another wrong, side by side.

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
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
    styled,
    truncate,
)
from dualrefnet.errors import RunError
from dualrefnet.evaluation.bootstrap import Difference
from dualrefnet.evaluation.comparison import pooled_bootstrap
from dualrefnet.models.inference import to_unit
from dualrefnet.run import Run

RIGHT, WRONG = "surest right", "surest wrong"


@dataclass(frozen=True)
class ChosenCase:
    """A test image that the gallery shows.

    Attributes:
        image_id: its id.
        label: its class.
        predicted: the likeliest class.
        kind: `RIGHT` or `WRONG`.
        probabilities: class -> probability.
    """

    image_id: str
    label: str
    predicted: str
    kind: str
    probabilities: dict[str, float]

    @property
    def second(self) -> str:
        """The second likeliest class."""
        return sorted(self.probabilities, key=lambda name: -self.probabilities[name])[1]


def choose_cases(
    predictions: pd.DataFrame, groups: ArrayLike, classes: Sequence[str], each: int = 2
) -> list[ChosenCase]:
    """Choose, of every class, the right answers with the highest probability and the wrong ones with the highest.

    Args:
        predictions: rows of predictions.csv: `image_id`, `label`, `predicted`, `prob_<CLASS>`.
        groups: the patient of every row; a patient is shown once for each class and kind.
        classes: in the order in which they are shown.
        each: right ones and wrong ones a class; fewer where there are no more.

    Returns:
        The cases: class by class, right before wrong, the surest first.
    """
    columns = [f"prob_{name}" for name in classes]
    table = predictions.assign(group=np.asarray(groups), confidence=predictions[columns].max(axis=1))
    # Ties by id, so that the order of the rows has no say.
    table = table.sort_values(["confidence", "image_id"], ascending=[False, True])
    right = table["label"] == table["predicted"]
    cases = []
    for name in classes:
        for kind, rows in ((RIGHT, right), (WRONG, ~right)):
            shown = table[rows & (table["label"] == name)].drop_duplicates("group").head(each)
            scores = shown[columns].to_numpy(dtype=float).tolist()
            cases += [
                ChosenCase(image_id, name, predicted, kind, dict(zip(classes, row, strict=True)))
                for image_id, predicted, row in zip(shown["image_id"], shown["predicted"], scores, strict=True)
            ]
    return cases


@dataclass(frozen=True)
class ShownCase:
    """A chosen image with all that is shown of it.

    Attributes:
        chosen: which one, and what was said.
        image: (S, S, 3) uint8, as the model sees it.
        saliency: class -> (S, S) Grad-CAM.
        mask: (S, S) True in the lesion, or None.
        attributions: (name, answer, value) of the answers of the form that moved the predicted class most; empty if none is
            read.
    """

    chosen: ChosenCase
    image: NDArray[np.uint8]
    saliency: Mapping[str, NDArray[np.float32]]
    mask: NDArray[np.bool_] | None
    attributions: list[tuple[str, str, float]]


def show_cases(
    opened: OpenedRun,
    cases: Sequence[ChosenCase],
    asked: str | None = None,
    answers: Mapping[str, list[tuple[str, str, float]]] | None = None,
    masks: Mapping[str, Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ShownCase]:
    """Look test images up and ask where they speak for the predicted class, the second, the true one and one more.

    Args:
        opened: a run of a method that reads images.
        cases: of its test side.
        asked: one more class whose heat is wanted.
        answers: image id -> the answers that counted.
        masks: image id -> mask file.
        progress: called with (images done, images in all).
    """
    examples, shown = opened.pictures("test"), []
    place = {image_id: row for row, image_id in enumerate(examples.image_ids)}
    paths = opened.dataset.table.set_index("image_id")["image_path"]
    image = opened.recipe.image
    for case in cases:
        batch = examples.batch(np.array([place[case.image_id]]))
        pictures = opened.images(batch)
        assert pictures is not None
        assert batch.images is not None
        names = list(dict.fromkeys([case.predicted, case.label, case.second, *([asked] if asked else [])]))
        targets = torch.tensor([opened.classes.index(name) for name in names], device=opened.device)
        forms = batch.metadata.to(opened.device).expand(len(names), -1)
        heat = gradcam(opened.model, pictures.expand(len(names), -1, -1, -1), forms, targets).heat.cpu().numpy()
        picture = (255 * to_unit(batch.images, image.size)).round().byte()[0].permute(1, 2, 0).numpy()
        file = (masks or {}).get(case.image_id)
        mask = read_mask(file, Path(paths.loc[case.image_id]), image.size, image.fit) if file else None
        shown.append(
            ShownCase(case, picture, dict(zip(names, heat, strict=True)), mask, (answers or {}).get(case.image_id, []))
        )
        if progress:
            progress(len(shown), len(cases))
    return shown


# The four cells of the 2 x 2 table, as (A right, B right).
KINDS = {
    (True, True): "both_right",
    (True, False): "only_a_right",
    (False, True): "only_b_right",
    (False, False): "both_wrong",
}


DISAGREEMENTS = ("only_a_right", "only_b_right")


@dataclass(frozen=True)
class Disagreement:
    """How two runs answered the same test images.

    Attributes:
        table: image_id, label, predicted_a, predicted_b, p_true_a, p_true_b (probability given to the true class) and
            kind
            (one of `KINDS`), one row a test image of both, in the order of A.
        chosen: rows of `table` to be shown, first those that only A gets right, then those that only B does; the
            largest
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
    table = pd.DataFrame(
        {
            "image_id": both["image_id"],
            "label": labels,
            "predicted_a": said[0],
            "predicted_b": said[1],
            "p_true_a": scores[0][rows, truth],
            "p_true_b": scores[1][rows, truth],
            "kind": [KINDS[pair] for pair in zip(said[0] == labels, said[1] == labels, strict=True)],
        }
    )
    patients = both["group"].to_numpy()
    found = pooled_bootstrap(truth, {"a": [scores[0]], "b": [scores[1]]}, patients, classes, samples, seed)
    return Disagreement(
        table,
        _choose(table, patients, cases),
        {kind: int((table["kind"] == kind).sum()) for kind in KINDS.values()},
        found.points["a"]["balanced_accuracy"],
        found.points["b"]["balanced_accuracy"],
        found.difference("a", "b", "balanced_accuracy"),
        found.groups,
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
        RunError: there is none; an image has another label in the other run, or is grouped with other images; or all
            are
            of one patient.
    """
    columns = ["image_id", "label", "group"]
    both = a[columns].merge(b[columns], on="image_id", how="inner", suffixes=("", "_b"), validate="one_to_one")
    if both.empty:
        raise RunError("the two runs share no test image: compare runs with the same data, protocol and fold")
    unequal = int((both["label"] != both["label_b"]).sum())
    if unequal:
        raise RunError(
            f"{unequal} of {len(both)} test images have another label in the other run: they don't come from the same data"
        )
    first, second = (pd.factorize(both[name])[0] for name in ("group", "group_b"))
    if (first != second).any():
        raise RunError(
            "the two runs disagree on which test images show the same patient: they don't come from the same data"
        )
    if first.max() == 0:
        raise RunError("all test images that the two runs share are of one patient: nothing can be compared")
    return both[columns]


def _tested(run: Run) -> pd.DataFrame:
    """Return the predictions of the test side with each image's patient as `group`."""
    predictions = run.predictions
    rows = predictions[predictions["split"] == "test"].reset_index(drop=True)
    return rows.assign(group=rows["image_id"].map(run.split.set_index("image_id")["patient_id"]))


def _choose(table: pd.DataFrame, patients: np.ndarray, cases: int) -> pd.DataFrame:
    """Choose `cases` rows of each kind of disagreement: classes in turn, the largest differences first, each patient
    once.
    """
    found = table.assign(patient=patients, gap=(table["p_true_a"] - table["p_true_b"]).abs())
    found = found[found["kind"].isin(DISAGREEMENTS)].sort_values(["gap", "image_id"], ascending=[False, True])
    # Of each patient the one image with the largest difference, of whichever kind: A and B are treated alike.
    found = found.drop_duplicates("patient")
    # Every class's first comes before any class's second.
    found["turn"] = found.groupby(["kind", "label"]).cumcount()
    found = found.sort_values(["turn", "gap", "image_id"], ascending=[True, False, True]).groupby("kind").head(cases)
    order = found.sort_values(["kind", "gap", "image_id"], ascending=[True, False, True]).index
    return table.loc[order].reset_index(drop=True)


# Inches a case is high, and letters in a line beside the photographs.
ROW, LETTERS = 1.3, 34


MOST_CLASSES = 3


# Letters of a class's name at most: in front of its bar, and above the heat. Share of the column's width that such a
# letter takes.
NAME, HEAT_NAME, LETTER = 12, 9, 0.042


@styled
def draw_gallery(cases: Sequence[ShownCase], label: str, name: str) -> ReportFigure:
    """Draw the cases of one class, one a row: photograph, heat of the predicted class, and what was said.

    Args:
        cases: of the class, in the order in which they are drawn; at least one.
        label: the class.
        name: what it stands for, or nothing.
    """
    figure, axes = new_figure(ROW * len(cases), len(cases), 3, WIDTH, width_ratios=(1.0, 1.0, 1.75))
    letters = max(len(truncate(name, NAME)) for case in cases for name, _ in _top(case))
    for case, (*pictures, words) in zip(cases, zip(*[iter(axes)] * 3, strict=True), strict=True):
        shown = (case.image, overlay(case.image, case.saliency[case.chosen.predicted]))
        titles = (case.chosen.kind, f"heat for {truncate(case.chosen.predicted, HEAT_NAME)}")
        for axis, picture, title in zip(pictures, shown, titles, strict=True):
            axis.imshow(picture, interpolation="none")
            axis.set_title(title, fontsize=7, fontweight="normal")
            axis.set_axis_off()
        _say(words, case, max(0.24, 0.03 + LETTER * letters))
    title = f"Photographs of {label}" + (f" ({name})" if name else "")
    right = sum(case.chosen.kind == RIGHT for case in cases)
    caption = (
        f"Test photographs of {label} as the model sees them: {right} that it was surest of and right, {len(cases) - right} that it was "
        "surest of and wrong, a patient once each."
    )
    alt = "; ".join(f"{case.chosen.kind}: called {case.chosen.predicted} with {_top(case)[0][1]:.0%}" for case in cases)
    return ReportFigure(f"gallery_{file_stem(label)}", title, caption, alt, figure, gallery_table(cases))


def gallery_table(cases: Sequence[ShownCase]) -> pd.DataFrame:
    """Return one row a case: image_id, label, predicted, kind, prob_<CLASS>..., and the answers that counted."""
    rows = []
    for case in cases:
        chosen = case.chosen
        row: dict[str, object] = {
            "image_id": chosen.image_id,
            "label": chosen.label,
            "predicted": chosen.predicted,
            "kind": chosen.kind,
        }
        row |= {f"prob_{name}": value for name, value in chosen.probabilities.items()}
        rows.append(
            row
            | {"answers": "; ".join(f"{name} = {answer}: {value:+.3f}" for name, answer, value in case.attributions)}
        )
    return pd.DataFrame(rows)


def _say(axis: Axes, case: ShownCase, left: float) -> None:
    """Write a case's probabilities, whose bars begin at `left`, and answers into an empty axis, from the top down, in
    inches.
    """
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(ROW, 0)
    place, longest = 0.1, 0.74 - left
    for name, value in _top(case):
        predicted, right = name == case.chosen.predicted, name == case.chosen.label
        colour = (PRIMARY if right else SECONDARY) if predicted else FAINT
        axis.barh(place, longest * value, 0.11, left=left, color=colour)
        axis.text(
            0.0, place, truncate(name, NAME), va="center", fontsize=7, fontweight="bold" if predicted else "normal"
        )
        # The share stands behind its bar, and says which class is the true one.
        axis.text(
            left + 0.02 + longest * value,
            place,
            f"{value:.0%}" + (" true" if right else ""),
            va="center",
            fontsize=7,
            color=INK,
        )
        place += 0.15
    place += 0.02
    for name, answer, value in case.attributions:
        said = f"fields missing: {answer}" if name == MISSING_FLAGS else f"{name} = {answer}"
        sign = "−" if value < 0 else "+"
        lines = textwrap.wrap(f"{sign}{abs(100 * value):.0f}  {said}", LETTERS, subsequent_indent="     ")
        for line in lines:
            axis.text(0.0, place, line, va="center", fontsize=7)
            place += 0.115


def _top(case: ShownCase) -> list[tuple[str, float]]:
    """Return the likeliest classes and the true one, the likeliest first."""
    ordered = sorted(case.chosen.probabilities.items(), key=lambda item: -item[1])
    top = ordered[:MOST_CLASSES]
    if case.chosen.label not in dict(top):
        top[-1] = (case.chosen.label, case.chosen.probabilities[case.chosen.label])
    return top


COLUMNS = ("predicted_a", "predicted_b", "p_true_a", "p_true_b")


# Letters that fit above a panel, and those of a class's name among them.
LINE, DISAGREEMENT_NAME = 20, 13


@styled
def draw_disagreement(
    found: Disagreement, cases: Sequence[tuple[ShownCase, ShownCase | None]], names: tuple[str, str]
) -> ReportFigure:
    """Draw one case a row: the photograph, and what each of two runs said and where it looked.

    Args:
        found: what the cases were chosen from.
        cases: what each run makes of the same image; None for the second if it reads no image.
        names: of the two runs.
    """
    said_of = {
        row[0]: row[1:] for row in found.chosen[["image_id", "label", *COLUMNS]].itertuples(index=False, name=None)
    }
    titles = {
        image_id: (_words(names[0], label, said_a, sure_a), _words(names[1], label, said_b, sure_b))
        for image_id, (label, said_a, said_b, sure_a, sure_b) in said_of.items()
    }
    lines = max(title.count("\n") + 1 for pair in titles.values() for title in pair)
    rows, data = len(cases), []
    figure, axes = new_figure(rows * (WIDTH / 3 + 0.12 + 0.12 * lines), rows, 3)
    for (first, second), (plain, left, right) in zip(cases, zip(*[iter(axes)] * 3, strict=True), strict=True):
        label, said_a, said_b, sure_a, sure_b = said_of[first.chosen.image_id]
        _panel(plain, first.image, f"true: {truncate(label, DISAGREEMENT_NAME)}")
        sides = ((left, first, said_a, sure_a), (right, second, said_b, sure_b))
        for (axis, case, said, sure), name, title in zip(sides, names, titles[first.chosen.image_id], strict=True):
            picture = first.image if case is None else overlay(case.image, case.saliency[said])
            _panel(axis, picture, title)
            data.append((first.chosen.image_id, label, name, said, sure))
    counts = found.counts
    caption = (
        f"Of {len(found.table)} test photographs that both runs were tested on, both are right on {counts['both_right']}, only "
        f"{names[0]} on {counts['only_a_right']}, only {names[1]} on {counts['only_b_right']}, none on {counts['both_wrong']}. Shown are "
        "those in which the probabilities of the true class differ most, a patient once, classes in turn; with the predicted class, the "
        "probability of the true one, and the heat of the predicted class (Grad-CAM)."
    )
    if any(second is None for _, second in cases):
        caption += f" {names[1]} reads no photograph, so it has no heat."
    alt = "; ".join(f"true {label}: {name} says {said}, {sure:.0%} for {label}" for _, label, name, said, sure in data)
    frame = pd.DataFrame(data, columns=["image_id", "label", "run", "predicted", "probability_of_true_class"])
    return ReportFigure("disagreement", f"Where {names[0]} and {names[1]} differ", caption, alt, figure, frame)


def _panel(axis: Axes, picture: NDArray[np.uint8], title: str) -> None:
    axis.imshow(picture, interpolation="none")
    axis.set_title(title, fontsize=7, fontweight="normal")
    axis.set_axis_off()


def _words(name: str, label: str, said: str, sure: float) -> str:
    """Say above a panel what a run said of an image, in lines that fit; a run's name is never cut, it may differ at
    its end.
    """
    parts = (
        f"{truncate(said, DISAGREEMENT_NAME)}, {'right' if said == label else 'wrong'}",
        f"{truncate(label, DISAGREEMENT_NAME)} {sure:.0%}",
    )
    line = "; ".join(parts)
    return "\n".join([textwrap.fill(name, LINE), *([line] if len(line) <= LINE else parts)])
