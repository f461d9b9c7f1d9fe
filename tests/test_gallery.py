"""The cases that a gallery shows."""

import pandas as pd

from dualrefnet.explain.gallery import RIGHT, WRONG, choose_cases


def _predictions(rows: list[tuple[str, str, float]]) -> pd.DataFrame:
    """Rows (image id, label, probability of A) of a model for A and B."""
    table = pd.DataFrame(rows, columns=["image_id", "label", "prob_A"])
    table["prob_B"] = 1 - table["prob_A"]
    return table.assign(predicted=["A" if p > 0.5 else "B" for p in table["prob_A"]])


def test_the_surest_of_each_class_are_chosen_right_before_wrong() -> None:
    table = _predictions([("a1", "A", 0.6), ("a2", "A", 0.9), ("a3", "A", 0.7), ("a4", "A", 0.2), ("a5", "A", 0.1), ("b1", "B", 0.8)])
    cases = choose_cases(table, list("uvwxyz"), ["A", "B"], each=2)
    assert [(case.image_id, case.label, case.kind) for case in cases] == [
        ("a2", "A", RIGHT), ("a3", "A", RIGHT), ("a5", "A", WRONG), ("a4", "A", WRONG), ("b1", "B", WRONG),
    ]  # fmt: skip
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
