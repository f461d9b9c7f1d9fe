from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score

from dualrefnet.analysis.cases import Disagreement, find_disagreement, shared_images
from dualrefnet.errors import RunError
from dualrefnet.evaluation.comparison import paired_difference
from dualrefnet.files import write_csv, write_yaml
from dualrefnet.recipe import load_recipe
from dualrefnet.run import Run

CLASSES = ["A", "B", "C"]
# image, patient, label, what A said and how sure it was of the true class, the same of B.
ROWS = [
    ("i0", "p0", "A", "A", 0.9, "A", 0.8),
    ("i1", "p0", "A", "A", 0.9, "B", 0.1),
    ("i2", "p1", "A", "A", 0.8, "B", 0.1),
    ("i3", "p1", "A", "A", 0.95, "B", 0.1),
    ("i4", "p2", "A", "A", 0.6, "C", 0.3),
    ("i5", "p3", "B", "B", 0.55, "A", 0.4),
    ("i6", "p4", "B", "A", 0.2, "B", 0.7),
    ("i7", "p5", "C", "A", 0.1, "C", 0.9),
    ("i8", "p6", "C", "B", 0.3, "A", 0.2),
    ("i9", "p7", "C", "C", 0.6, "C", 0.6),
]


def run_of(folder: Path, rows: list[tuple], which: int, classes: list[str] = CLASSES) -> Run:
    """Write what is read of a run; `which` is the place of its answer in a row."""
    table = []
    for row in rows:
        image, label, said, sure = row[0], row[2], row[which], row[which + 1]
        scores = dict.fromkeys(classes, 0.0) | {label: sure}
        other = said if said != label else next(name for name in classes if name != label)
        scores[other] += 1 - sure
        table.append(
            {
                "image_id": image,
                "split": "test",
                "label": label,
                "predicted": said,
                **{f"prob_{n}": v for n, v in scores.items()},
            }
        )
    predictions = pd.DataFrame(table)
    validation = predictions.iloc[:2].assign(image_id=["v0", "v1"], split="val")
    write_csv(folder / "predictions.csv", pd.concat([validation, predictions]))
    split = pd.DataFrame(
        [(row[0], row[1], row[2], "test") for row in rows] + [("v0", "q0", "A", "val"), ("v1", "q1", "B", "val")],
        columns=["image_id", "patient_id", "label", "split"],
    )
    write_csv(folder / "split.csv", split)
    write_yaml(folder / "recipe.yaml", load_recipe("sample").model_dump(mode="json"))
    return Run(folder)


@pytest.fixture
def found(tmp_path: Path) -> Disagreement:
    return find_disagreement(run_of(tmp_path / "a", ROWS, 3), run_of(tmp_path / "b", ROWS, 5), cases=3, samples=200)


def test_images_are_sorted_into_the_four_cells(found: Disagreement) -> None:
    assert found.counts == {"both_right": 2, "only_a_right": 5, "only_b_right": 2, "both_wrong": 1}
    assert found.table["image_id"].tolist() == [row[0] for row in ROWS]
    assert found.table.set_index("image_id").loc["i6"].to_dict() == {
        "label": "B",
        "predicted_a": "A",
        "predicted_b": "B",
        "p_true_a": pytest.approx(0.2),
        "p_true_b": pytest.approx(0.7),
        "kind": "only_b_right",
    }
    assert (found.patients, found.only_a, found.only_b) == (8, 0, 0)


def test_the_difference_is_that_of_the_balanced_accuracies_over_patients(found: Disagreement) -> None:
    labels = [row[2] for row in ROWS]
    a, b = (balanced_accuracy_score(labels, [row[place] for row in ROWS]) for place in (3, 5))
    assert (found.balanced_accuracy_a, found.balanced_accuracy_b) == pytest.approx((a, b))
    assert (a, b) == pytest.approx(((1 + 1 / 2 + 1 / 3) / 3, (1 / 5 + 1 / 2 + 2 / 3) / 3))
    assert found.difference.value == pytest.approx(a - b)
    # The same bootstrap on answers given with certainty.
    truth = np.array([CLASSES.index(label) for label in labels])
    certain = [np.eye(3)[[CLASSES.index(row[place]) for row in ROWS]] for place in (3, 5)]
    expected = paired_difference(truth, *certain, [row[1] for row in ROWS], CLASSES, samples=200)
    assert [found.difference.low, found.difference.high] == pytest.approx([expected.low, expected.high])
    assert found.difference.p == pytest.approx(expected.p)


def test_shown_are_the_largest_differences_of_every_class_and_each_patient_once(found: Disagreement) -> None:
    # i2 gives way to i3 of the same patient, and i4 to the only one of class B.
    assert found.chosen["image_id"].tolist() == ["i3", "i1", "i5", "i7", "i6"]
    assert found.chosen["kind"].tolist() == ["only_a_right"] * 3 + ["only_b_right"] * 2
    assert list(found.chosen.columns) == list(found.table.columns)


def test_a_patient_is_shown_once_even_if_each_run_is_right_about_one_image(tmp_path: Path) -> None:
    rows = [
        ("i0", "p0", "A", "A", 0.9, "B", 0.2),
        ("i1", "p0", "A", "B", 0.1, "A", 0.95),
        ("i2", "p1", "B", "B", 0.6, "B", 0.6),
    ]
    found = find_disagreement(run_of(tmp_path / "a", rows, 3), run_of(tmp_path / "b", rows, 5), samples=10)
    assert found.chosen["image_id"].tolist() == ["i1"]


def test_exchanged_runs_give_the_exchanged_answer(found: Disagreement, tmp_path: Path) -> None:
    other = find_disagreement(run_of(tmp_path / "b2", ROWS, 5), run_of(tmp_path / "a2", ROWS, 3), cases=3, samples=200)
    assert other.difference.difference == pytest.approx(-found.difference.value)
    assert (other.difference.low, other.difference.high) == pytest.approx(
        (-found.difference.high, -found.difference.low)
    )
    swapped = {"only_a_right": "only_b_right", "only_b_right": "only_a_right"}
    for kind, name in swapped.items():
        images = found.chosen.loc[found.chosen["kind"] == name, "image_id"].tolist()
        assert other.chosen.loc[other.chosen["kind"] == kind, "image_id"].tolist() == images


def test_orders_of_rows_and_classes_do_not_matter_and_images_of_one_run_only_are_counted(
    found: Disagreement, tmp_path: Path
) -> None:
    rows = [*ROWS[::-1], ("extra", "p9", "A", "A", 0.9, "A", 0.9)]
    other = find_disagreement(
        run_of(tmp_path / "a2", ROWS, 3), run_of(tmp_path / "b2", rows, 5, ["C", "A", "B"]), cases=3, samples=200
    )
    assert (other.only_a, other.only_b) == (0, 1)
    pd.testing.assert_frame_equal(other.table, found.table)
    assert other.difference == found.difference


def test_runs_that_can_not_be_compared_are_refused_in_words(tmp_path: Path) -> None:
    a = run_of(tmp_path / "a", ROWS, 3)
    with pytest.raises(RunError, match="different classes"):
        find_disagreement(a, run_of(tmp_path / "classes", ROWS, 5, [*CLASSES, "D"]))
    with pytest.raises(RunError, match="share no test image"):
        find_disagreement(a, run_of(tmp_path / "images", [("x" + row[0], *row[1:]) for row in ROWS], 5))
    relabelled = [("i9", "p7", "A", "C", 0.2, "C", 0.2) if row[0] == "i9" else row for row in ROWS]
    with pytest.raises(RunError, match="1 of 10 test images have another label"):
        find_disagreement(a, run_of(tmp_path / "labels", relabelled, 5))
    regrouped = [(row[0], "p7" if row[0] == "i8" else row[1], *row[2:]) for row in ROWS]
    with pytest.raises(RunError, match="the same patient"):
        find_disagreement(a, run_of(tmp_path / "patients", regrouped, 5))
    with pytest.raises(RunError, match=r"has no predictions.csv"):
        find_disagreement(a, Run(tmp_path / "nothing"))


def test_patients_may_be_called_otherwise_but_there_must_be_two() -> None:
    a = pd.DataFrame({"image_id": ["1", "2", "3"], "label": "A", "group": ["p", "p", "q"]})
    assert shared_images(a, a.assign(group=["x", "x", "y"]))["group"].tolist() == ["p", "p", "q"]
    with pytest.raises(RunError, match="of one patient"):
        shared_images(a.iloc[:2], a)


def test_a_real_run_agrees_with_itself(tiny_run: Run) -> None:
    found = find_disagreement(tiny_run, tiny_run, samples=20)
    assert found.counts["only_a_right"] == found.counts["only_b_right"] == 0
    assert found.chosen.empty
    assert found.balanced_accuracy_a == pytest.approx(tiny_run.metrics["balanced_accuracy"])
    assert (found.difference.low, found.difference.high) == (0, 0)
    assert sum(found.counts.values()) == len(found.table) == (tiny_run.split["split"] == "test").sum()
