"""Cases: the most confident predictions of a run, disagreements of two runs, and their figures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from dualrefnet.analysis import gradcam as gradcam_maps
from dualrefnet.analysis.cases import RIGHT, WRONG, ChosenCase, ShownCase, choose_cases, draw_gallery, show_cases
from dualrefnet.analysis.disagreement import Disagreement, find_disagreement, shared_images
from dualrefnet.analysis.gradcam import draw_gradcam, gradcam, overlay
from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.shap import MISSING_FLAGS
from dualrefnet.data.images import find_masks, read_mask
from dualrefnet.display.figure import WIDTH, ReportFigure, inline_svg
from dualrefnet.errors import RunError
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.files import write_csv, write_json, write_yaml
from dualrefnet.recipe import load_recipe
from dualrefnet.run import Run
from resampling import paired_difference
from suite_folder import write_model


def predicted(*rows: tuple[str, str, float]) -> pd.DataFrame:
    """Rows (image id, label, probability of A) of a model for A and B."""
    table = pd.DataFrame(rows, columns=["image_id", "label", "prob_A"])
    return table.assign(prob_B=1 - table["prob_A"], predicted=np.where(table["prob_A"] > 0.5, "A", "B"))


def test_the_most_confident_of_each_class_are_chosen_right_before_wrong() -> None:
    table = predicted(
        ("a1", "A", 0.6), ("a2", "A", 0.9), ("a3", "A", 0.7), ("a4", "A", 0.2), ("a5", "A", 0.1), ("b1", "B", 0.8)
    )
    cases = choose_cases(table, list("uvwxyz"), ["A", "B"], each=2)
    assert [case.image_id for case in cases] == ["a2", "a3", "a5", "a4", "b1"]
    assert [case.kind for case in cases] == [RIGHT, RIGHT, WRONG, WRONG, WRONG]
    assert (cases[2].label, cases[2].predicted, cases[2].probabilities) == ("A", "B", {"A": 0.1, "B": 0.9})


def test_a_patient_is_shown_once_for_each_class_and_kind() -> None:
    table = predicted(("a1", "A", 0.95), ("a2", "A", 0.9), ("a3", "A", 0.7), ("a4", "A", 0.1))
    cases = choose_cases(table, ["p", "p", "q", "p"], ["A", "B"], each=2)
    assert [case.image_id for case in cases] == ["a1", "a3", "a4"]


def test_the_order_of_the_rows_has_no_say() -> None:
    table = predicted(("a1", "A", 0.9), ("a2", "A", 0.9), ("a3", "A", 0.9))
    groups = pd.Series(["p", "q", "r"])
    found = choose_cases(table, groups, ["A", "B"], each=1)
    assert found == choose_cases(table[::-1], groups[::-1], ["A", "B"], each=1)
    assert [case.image_id for case in found] == ["a1"]


def test_of_equal_classes_the_second_is_the_next_in_their_order() -> None:
    assert ChosenCase("a1", "A", "B", WRONG, {"A": 0.2, "B": 0.4, "C": 0.2, "D": 0.2}).second == "A"
    assert ChosenCase("a1", "A", "A", RIGHT, {"A": 0.4, "B": 0.1, "C": 0.5}).second == "A"


@pytest.fixture(scope="module")
def cases(opened: OpenedRun) -> list[ChosenCase]:
    test = opened.run.predictions.query("split == 'test'")
    found = choose_cases(test, opened.groups.loc[test["image_id"]], opened.classes, each=2)
    assert {case.kind for case in found} == {RIGHT, WRONG}
    return found


@pytest.fixture(scope="module")
def shown(opened: OpenedRun, cases: list[ChosenCase]) -> list[ShownCase]:
    masks = find_masks(opened.dataset.root)
    # One without a mask, and one without attributions.
    del masks[cases[1].image_id]
    values = {case.image_id: [("age", f"{row} years", 0.1)] for row, case in enumerate(cases) if row}
    with pytest.MonkeyPatch.context() as patch:
        # Images of 32 px have maps of one place.
        patch.setattr(gradcam_maps, "FEWEST_PLACES", 1)
        return show_cases(opened, cases, None, values, masks)


def test_cases_are_shown_in_their_order_with_images_masks_and_attributions(
    opened: OpenedRun, cases: list[ChosenCase], shown: list[ShownCase]
) -> None:
    assert [case.chosen for case in shown] == cases
    assert opened.store is not None
    masks = find_masks(opened.dataset.root)
    paths = opened.dataset.table.set_index("image_id")["image_path"]
    for number, case in enumerate(shown):
        image_id = case.chosen.image_id
        np.testing.assert_array_equal(case.image, opened.store.read(opened.store.rows_of([image_id]))[0])
        if number == 1:
            assert case.mask is None
        else:
            expected = read_mask(masks[image_id], Path(paths[image_id]), 32, opened.recipe.image.fit)
            np.testing.assert_array_equal(case.mask, expected)
        assert case.attributions == ([("age", f"{number} years", 0.1)] if number else [])


def test_saliency_is_that_of_the_predicted_the_true_and_the_second_class(
    opened: OpenedRun, shown: list[ShownCase]
) -> None:
    examples = opened.image_examples("test")
    for case in shown:
        chosen = case.chosen
        assert list(case.saliency) == list(dict.fromkeys([chosen.predicted, chosen.label, chosen.second]))
        batch = examples.batch(np.array([examples.image_ids.index(chosen.image_id)]))
        images = opened.images(batch)
        assert images is not None
        for name, saliency in case.saliency.items():
            target = torch.tensor([opened.classes.index(name)])
            alone = gradcam(opened.model, images, batch.metadata, target).saliency[0].numpy()
            np.testing.assert_allclose(saliency, alone, rtol=1e-3, atol=1e-5 * max(1.0, float(alone.max())))
    assert any(saliency.any() for case in shown for saliency in case.saliency.values())


CLASSES = ["A", "B", "C"]
# Image, patient, label, what A predicted and its probability of the true class, the same of B.
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
    """Write what is read of a run; `which` is the place of its prediction in a row."""
    table = []
    for image_id, _, label, *both in rows:
        found, probability = both[which - 3 : which - 1]
        scores = dict.fromkeys(classes, 0.0) | {label: probability}
        scores[found if found != label else next(name for name in classes if name != label)] += 1 - probability
        columns = {f"prob_{name}": value for name, value in scores.items()}
        table.append({"image_id": image_id, "split": "test", "label": label, "predicted": found, **columns})
    predictions = pd.DataFrame(table)
    validation = predictions.iloc[:2].assign(image_id=["v0", "v1"], split="val")
    write_csv(folder / "predictions.csv", pd.concat([validation, predictions]))
    split = [(*row[:3], "test") for row in rows] + [
        (f"v{place}", f"q{place}", rows[place][2], "val") for place in (0, 1)
    ]
    write_csv(folder / "split.csv", pd.DataFrame(split, columns=["image_id", "patient_id", "label", "split"]))
    recipe = load_recipe("sample")
    write_yaml(folder / "recipe.yaml", recipe.model_dump(mode="json"))
    source = {"kind": "none", "description": "", "sha256": None, "mean": [0.5] * 3, "std": [0.2] * 3}
    write_model(folder, recipe, list(classes), [source])
    metrics = compute_metrics([0, 1], np.eye(len(classes))[:2], list(classes))
    about = {"dataset": "sample", "drawn": True, "leakage": {}, "unit": "patient"}
    write_json(folder / "metrics.json", {**metrics, **about})
    return Run(folder)


@pytest.fixture
def found(tmp_path: Path) -> Disagreement:
    return find_disagreement(run_of(tmp_path / "a", ROWS, 3), run_of(tmp_path / "b", ROWS, 5), cases=3, samples=200)


def test_images_are_sorted_into_the_four_cells(found: Disagreement) -> None:
    assert found.counts == {"both_right": 2, "only_a_right": 5, "only_b_right": 2, "both_wrong": 1}
    assert found.table["image_id"].tolist() == [row[0] for row in ROWS]
    row = found.table.set_index("image_id").loc["i6"]
    assert row.tolist() == ["B", "A", "B", pytest.approx(0.2), pytest.approx(0.7), "only_b_right"]
    assert (found.patients, found.only_a, found.only_b, found.unit) == (8, 0, 0, "patient")


def test_the_difference_is_that_of_the_balanced_accuracies_over_patients(found: Disagreement) -> None:
    labels = [row[2] for row in ROWS]
    a, b = (balanced_accuracy_score(labels, [row[place] for row in ROWS]) for place in (3, 5))
    assert (found.balanced_accuracy_a, found.balanced_accuracy_b) == pytest.approx((a, b))
    assert found.difference.value == pytest.approx(a - b)
    # The same bootstrap on predictions with certainty.
    truth = np.array([CLASSES.index(label) for label in labels])
    certain = [np.eye(3)[[CLASSES.index(row[place]) for row in ROWS]] for place in (3, 5)]
    bootstrap = Bootstrap([row[1] for row in ROWS], 200)
    expected = paired_difference(truth, *certain, bootstrap, CLASSES, "balanced_accuracy")
    assert [found.difference.low, found.difference.high] == pytest.approx([expected.low, expected.high])
    assert found.difference.p == pytest.approx(expected.p)


def test_classes_are_compared_on_the_same_resamples(found: Disagreement) -> None:
    rows = found.per_class.set_index(["measure", "class"])
    for name in CLASSES:
        own = [row for row in ROWS if row[2] == name]
        a, b = (np.mean([row[place] == name for row in own]) for place in (3, 5))
        one = rows.loc[("sensitivity", name)]
        values = (one["images"], one["value"], one["reference_value"], one["difference"])
        assert values == pytest.approx((len(own), a, b, a - b))
        assert one["low"] <= one["difference"] <= one["high"]
        others = [row for row in ROWS if row[3] == name]
        assert rows.loc[("ppv", name), "value"] == pytest.approx(np.mean([row[2] == name for row in others]))
    assert (rows["p_holm"].dropna() >= rows["p"].dropna()).all()


def test_exchanged_runs_give_the_difference_with_the_other_sign_and_the_same_cases(
    found: Disagreement, tmp_path: Path
) -> None:
    other = find_disagreement(Run(tmp_path / "b"), Run(tmp_path / "a"), cases=3, samples=200)
    assert other.difference.value == pytest.approx(-found.difference.value)
    assert (other.difference.low, other.difference.high) == pytest.approx(
        (-found.difference.high, -found.difference.low)
    )
    assert (other.counts["only_a_right"], other.counts["only_b_right"]) == (2, 5)
    assert set(other.chosen["image_id"]) == set(found.chosen["image_id"])


def test_shown_are_the_largest_differences_of_every_class_and_each_patient_once(found: Disagreement) -> None:
    # i2 gives way to i3 of the same patient, and i4 to the only one of class B.
    assert found.chosen["image_id"].tolist() == ["i3", "i1", "i5", "i7", "i6"]
    assert found.chosen["kind"].tolist() == ["only_a_right"] * 3 + ["only_b_right"] * 2


def test_a_patient_is_shown_once_even_if_each_run_is_right_about_one_image(tmp_path: Path) -> None:
    rows = [
        ("i0", "p0", "A", "A", 0.9, "B", 0.2),
        ("i1", "p0", "A", "B", 0.1, "A", 0.95),
        ("i2", "p1", "B", "B", 0.6, "B", 0.6),
    ]
    found = find_disagreement(run_of(tmp_path / "a", rows, 3), run_of(tmp_path / "b", rows, 5), samples=10)
    assert found.chosen["image_id"].tolist() == ["i1"]


def test_orders_of_rows_and_classes_do_not_matter_and_images_of_one_run_only_are_counted(
    found: Disagreement, tmp_path: Path
) -> None:
    rows = [*ROWS[::-1], ("extra", "p9", "A", "A", 0.9, "A", 0.9)]
    other = find_disagreement(
        Run(tmp_path / "a"), run_of(tmp_path / "b2", rows, 5, ["C", "A", "B"]), cases=3, samples=200
    )
    assert (other.only_a, other.only_b) == (0, 1)
    pd.testing.assert_frame_equal(other.table, found.table)
    assert other.difference == found.difference


def test_runs_that_can_not_be_compared_are_refused_in_words(tmp_path: Path) -> None:
    a = run_of(tmp_path / "a", ROWS, 3)
    relabelled = [*ROWS[:-1], ("i9", "p7", "A", "C", 0.2, "C", 0.2)]
    regrouped = [(row[0], "p7" if row[0] == "i8" else row[1], *row[2:]) for row in ROWS]
    for message, other in {
        "different classes": run_of(tmp_path / "classes", ROWS, 5, [*CLASSES, "D"]),
        "share no test image": run_of(tmp_path / "images", [("x" + row[0], *row[1:]) for row in ROWS], 5),
        "1 of 10 test images have another label": run_of(tmp_path / "labels", relabelled, 5),
        "the same patient": run_of(tmp_path / "patients", regrouped, 5),
        r"has no split\.csv": Run(tmp_path / "nothing"),
    }.items():
        with pytest.raises(RunError, match=message):
            find_disagreement(a, other)


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


LONG = ("squamous cell carcinoma", "BASAL CELL CARCINOMA", "actinic keratosis", "melanocytic nevus", "x")


def shown_case(label: str, probabilities: dict[str, float], seed: int = 0) -> ShownCase:
    generator = np.random.default_rng(seed)
    saliency = {name: generator.random((32, 32)).astype(np.float32) for name in probabilities}
    predicted = max(probabilities, key=lambda name: probabilities[name])
    chosen = ChosenCase(f"id{seed}", label, predicted, RIGHT if predicted == label else WRONG, probabilities)
    values = [("background_father", "BRAZIL", 0.124), (MISSING_FLAGS, "13 of 13", -0.31)]
    mask = np.arange(32) < np.full((32, 1), 8)
    return ShownCase(chosen, generator.integers(0, 255, (32, 32, 3), dtype=np.uint8), saliency, mask, values)


def images_of(drawn: ReportFigure) -> list[np.ndarray]:
    return [np.asarray(axis.images[0].get_array()) for axis in drawn.figure.axes if axis.images]


@pytest.mark.parametrize("names", [("BCC", "MEL", "NEV", "ACK"), LONG])
def test_the_gallery_and_gradcam_show_each_case_with_its_maps(names: tuple[str, ...]) -> None:
    first, second, *rest = names
    probabilities = {first: 0.75, second: 0.2} | dict.fromkeys(rest, 0.05 / len(rest))
    right, wrong = shown_case(first, probabilities), shown_case(second, probabilities, seed=1)
    gallery = draw_gallery([right, wrong], first, "a name", "lesion")
    images = images_of(gallery)
    for place, case in enumerate((right, wrong)):
        assert (images[2 * place] == case.image).all()
        assert (images[2 * place + 1] == overlay(case.image, case.saliency[first])).all()
    row = gallery.data.iloc[0]
    assert (row["image_id"], row["kind"], row[f"prob_{first}"]) == ("id0", RIGHT, 0.75)
    assert row["answers"] == "background_father = BRAZIL: +0.124; missing fields (flags) = 13 of 13: -0.310"
    maps = draw_gradcam([right, wrong], "The first two.", encoders=3)
    assert maps.data["class"].tolist() == [first, second, first, second]
    assert maps.data["column"].tolist() == ["predicted", "other"] * 2
    inside = [
        case.saliency[name][:, :8].sum() / case.saliency[name].sum() for case in (right, wrong) for name in names[:2]
    ]
    assert maps.data["in_mask"].tolist() == pytest.approx(inside, rel=1e-5)
    assert draw_gradcam([right], "One.", rest[0]).data["class"].tolist() == [first, rest[0]]
    for drawn in (gallery, maps):
        inline_svg(drawn)
        assert drawn.figure.get_figwidth() == WIDTH
