"""The cases that a gallery shows."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.data.images import find_masks
from dualrefnet.run import Run

pytest.importorskip("captum")

from dualrefnet.analysis.cases import RIGHT, WRONG, ChosenCase, ShownCase, choose_cases, show_cases
from dualrefnet.analysis.gradcam import gradcam


def _predictions(rows: list[tuple[str, str, float]]) -> pd.DataFrame:
    """Rows (image id, label, probability of A) of a model for A and B."""
    table = pd.DataFrame(rows, columns=["image_id", "label", "prob_A"])
    table["prob_B"] = 1 - table["prob_A"]
    return table.assign(predicted=["A" if p > 0.5 else "B" for p in table["prob_A"]])


def test_the_surest_of_each_class_are_chosen_right_before_wrong() -> None:
    table = _predictions(
        [("a1", "A", 0.6), ("a2", "A", 0.9), ("a3", "A", 0.7), ("a4", "A", 0.2), ("a5", "A", 0.1), ("b1", "B", 0.8)]
    )
    cases = choose_cases(table, list("uvwxyz"), ["A", "B"], each=2)
    assert [(case.image_id, case.label, case.kind) for case in cases] == [
        ("a2", "A", RIGHT),
        ("a3", "A", RIGHT),
        ("a5", "A", WRONG),
        ("a4", "A", WRONG),
        ("b1", "B", WRONG),
    ]
    assert cases[2].predicted == "B"
    assert cases[2].probabilities == {"A": 0.1, "B": 0.9}


def test_a_patient_is_shown_once_for_each_class_and_kind() -> None:
    table = _predictions([("a1", "A", 0.95), ("a2", "A", 0.9), ("a3", "A", 0.7), ("a4", "A", 0.1)])
    cases = choose_cases(table, ["p", "p", "q", "p"], ["A", "B"], each=2)
    assert [case.image_id for case in cases] == ["a1", "a3", "a4"]


def test_the_order_of_the_rows_has_no_say() -> None:
    table = _predictions([("a1", "A", 0.9), ("a2", "A", 0.9), ("a3", "A", 0.9)])
    groups = pd.Series(["p", "q", "r"])
    there = choose_cases(table, groups, ["A", "B"], each=1)
    back = choose_cases(table[::-1], groups[::-1], ["A", "B"], each=1)
    assert there == back
    assert [case.image_id for case in there] == ["a1"]


def test_of_equal_classes_the_second_is_the_next_in_their_order() -> None:
    case = ChosenCase("a1", "A", "B", WRONG, {"A": 0.2, "B": 0.4, "C": 0.2, "D": 0.2})
    assert case.second == "A"
    assert ChosenCase("a1", "A", "A", RIGHT, {"A": 0.4, "B": 0.1, "C": 0.5}).second == "A"


@pytest.fixture(scope="module")
def opened(tiny_run: Run) -> OpenedRun:
    return open_run(tiny_run, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def cases(opened: OpenedRun) -> list[ChosenCase]:
    test = opened.run.predictions.query("split == 'test'")
    found = choose_cases(test, opened.groups.loc[test["image_id"]], opened.classes, each=2)
    assert {case.kind for case in found} == {RIGHT, WRONG}
    return found


@pytest.fixture(scope="module")
def shown(opened: OpenedRun, cases: list[ChosenCase]) -> list[ShownCase]:
    masks = find_masks(opened.dataset.root)
    # One without a mask, and one that nothing was said of.
    del masks[cases[1].image_id]
    answers = {case.image_id: [("age", f"{row} years", 0.1)] for row, case in enumerate(cases) if row}
    return show_cases(opened, cases, None, answers, masks)


def test_cases_are_shown_in_their_order_with_the_stores_pictures(
    opened: OpenedRun, cases: list[ChosenCase], shown: list[ShownCase]
) -> None:
    assert [case.chosen for case in shown] == cases
    assert opened.store is not None
    for case in shown:
        stored = opened.store.read(opened.store.rows_of([case.chosen.image_id]))[0]
        assert case.image.dtype == np.uint8
        assert case.image.shape == (32, 32, 3)
        assert (case.image == stored).all()
    assert shown[0].attributions == []
    assert [case.attributions for case in shown[1:]] == [[("age", f"{row} years", 0.1)] for row in range(1, len(cases))]


def test_heat_is_asked_for_the_predicted_the_true_and_the_second_class(
    opened: OpenedRun, shown: list[ShownCase]
) -> None:
    examples = opened.pictures("test")
    for case in shown:
        chosen = case.chosen
        assert list(case.saliency) == list(dict.fromkeys([chosen.predicted, chosen.label, chosen.second]))
        batch = examples.batch(np.array([examples.image_ids.index(chosen.image_id)]))
        images = opened.images(batch)
        assert images is not None
        for name, heat in case.saliency.items():
            alone = (
                gradcam(opened.model, images, batch.metadata, torch.tensor([opened.classes.index(name)]))
                .heat[0]
                .numpy()
            )
            assert heat.shape == (32, 32)
            assert heat.min() >= 0
            np.testing.assert_allclose(heat, alone, rtol=1e-3, atol=1e-5 * max(1.0, float(alone.max())))
    # Something to compare there was.
    assert max(float(heat.max()) for case in shown for heat in case.saliency.values()) > 0


def test_one_more_class_can_be_asked_for(opened: OpenedRun, cases: list[ChosenCase]) -> None:
    for asked in opened.classes:
        (case,) = show_cases(opened, cases[:1], asked)
        assert set(case.saliency) == {cases[0].predicted, cases[0].label, cases[0].second, asked}


def test_masks_are_the_outlines_of_the_drawn_lesions_and_none_where_there_is_no_file(
    opened: OpenedRun, cases: list[ChosenCase], shown: list[ShownCase]
) -> None:
    assert shown[1].mask is None
    for case in [shown[0], *shown[2:]]:
        file = Path(opened.dataset.root) / "masks" / f"{case.chosen.image_id}.png"
        drawn = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
        assert drawn is not None
        assert case.mask is not None
        assert case.mask.dtype == bool
        # 64 px become 32; only at the edge can the two ways of shrinking differ.
        expected = cv2.resize(drawn, (32, 32), interpolation=cv2.INTER_AREA) > 127
        assert (case.mask == expected).mean() > 0.98
        assert 0 < case.mask.mean() < 1
    assert show_cases(opened, cases[:1])[0].mask is None


def test_progress_counts_the_images(opened: OpenedRun, cases: list[ChosenCase]) -> None:
    steps: list[tuple[int, int]] = []
    show_cases(opened, cases[:3], progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(KeyError):
        show_cases(opened, [ChosenCase("nobody", "ACK", "ACK", RIGHT, dict.fromkeys(opened.classes, 0.1))])
