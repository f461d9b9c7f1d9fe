import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dualrefnet.evaluation.bootstrap import bootstrap_intervals, paired_difference
from dualrefnet.evaluation.comparison import flat_measures, holm, pooled_bootstrap
from dualrefnet.evaluation.metrics import compute_metrics

CLASSES = ["A", "B", "C"]
P_VALUES = st.lists(st.one_of(st.none(), st.just(float("nan")), st.floats(0, 1)), max_size=12)


def predictions(seed: int, labels: NDArray[np.int64], skill: int = 4) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    scores = generator.integers(1, 6, size=(len(labels), len(CLASSES))).astype(float)
    scores[np.arange(len(labels)), labels] += generator.integers(0, skill + 1, size=len(labels))
    return scores / scores.sum(axis=1, keepdims=True)


def laid_out(
    labels: NDArray[np.int64], seeds: list[NDArray[np.float64]], groups: NDArray[np.int64], samples: int
) -> dict[str, NDArray[np.float64]]:
    """Draw patients one by one, lay out all their images, measure, average over seeds: slow and plain."""
    generator = np.random.default_rng(0)
    count = len(np.unique(groups))
    rows = []
    for _ in range(samples):
        drawn = generator.integers(count, size=count)
        images = np.concatenate([np.flatnonzero(groups == group) for group in drawn])
        measured = [flat_measures(compute_metrics(labels[images], scores[images], CLASSES, ["C"])) for scores in seeds]
        rows.append({key: np.mean([values[key] for values in measured]) for key in measured[0]})
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def test_values_intervals_and_differences_are_those_of_laid_out_samples() -> None:
    labels = np.random.default_rng(0).integers(3, size=50)
    groups = np.arange(50) // 4
    systems = {
        name: [predictions(seed, labels, skill) for seed in range(first, first + 3)]
        for name, first, skill in (("a", 1, 6), ("b", 9, 3))
    }
    found = pooled_bootstrap(labels, systems, groups, CLASSES, samples=30, malignant=["C"])
    naive = {name: laid_out(labels, seeds, groups, 30) for name, seeds in systems.items()}
    for measure in (
        "accuracy",
        "balanced_accuracy",
        "auc_macro_ovr",
        "f1_macro",
        "per_class.B.ppv",
        "malignant.auc",
        "ece",
    ):
        for name, seeds in systems.items():
            whole = [flat_measures(compute_metrics(labels, scores, CLASSES, ["C"]))[measure] for scores in seeds]
            value = found.value(name, measure)
            assert value.value == pytest.approx(np.mean(whole))
            assert (value.low, value.high) == pytest.approx(tuple(np.nanquantile(naive[name][measure], [0.025, 0.975])))
        differences = naive["a"][measure] - naive["b"][measure]
        difference = found.difference("a", "b", measure)
        assert difference.difference == pytest.approx(found.value("a", measure).value - found.value("b", measure).value)
        assert (difference.low, difference.high) == pytest.approx(tuple(np.nanquantile(differences, [0.025, 0.975])))
        tail = min((differences <= 0).sum(), (differences >= 0).sum())
        assert difference.p == pytest.approx(min(1, 2 * (tail + 1) / 31))
        assert difference.samples == 30
    assert (found.images, found.groups, found.samples) == (50, 13, 30)


def test_one_seed_gives_what_the_functions_for_one_and_two_models_give() -> None:
    labels = np.random.default_rng(1).integers(3, size=90)
    groups = np.arange(90) // 2
    a, b = predictions(2, labels), predictions(3, labels)
    found = pooled_bootstrap(labels, {"a": [a], "b": [b]}, groups, CLASSES, samples=150)
    for measure, interval in bootstrap_intervals(labels, a, groups, CLASSES, samples=150).items():
        value = found.value("a", measure)
        assert (value.low, value.high) == interval
    pair = paired_difference(labels, a, b, groups, CLASSES, samples=150)
    difference = found.difference("a", "b", "balanced_accuracy")
    assert [difference.low, difference.high] == pair["ci95"]
    assert (difference.difference, difference.p, difference.samples) == (
        pytest.approx(pair["difference"]),
        pair["p"],
        pair["samples"],
    )


def test_seeds_that_err_on_different_patients_make_the_interval_narrower_and_copies_of_a_seed_do_not() -> None:
    labels = np.random.default_rng(2).integers(3, size=300)
    systems = {
        "one": [predictions(0, labels)],
        "copies": [predictions(0, labels)] * 4,
        "seeds": [predictions(seed, labels) for seed in range(4)],
    }
    found = pooled_bootstrap(labels, systems, np.arange(300), CLASSES, samples=400)
    one, copies, seeds = (found.value(name, "accuracy") for name in systems)
    assert (copies.low, copies.high) == pytest.approx((one.low, one.high))
    assert seeds.high - seeds.low < 0.85 * (one.high - one.low)


def test_a_system_does_not_differ_from_itself_and_a_known_difference_is_found() -> None:
    labels = np.arange(300) % 3
    right = np.eye(3)[labels] * 0.7 + 0.1
    # Each tenth image is one that only the first system gets right.
    wrong = right.copy()
    wrong[::10] = np.roll(right[::10], 1, axis=1)
    found = pooled_bootstrap(
        labels, {"good": [right], "same": [right], "bad": [wrong]}, np.arange(300), CLASSES, samples=1000
    )
    same, good = found.difference("same", "good", "accuracy"), found.difference("good", "bad", "accuracy")
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert good.difference == pytest.approx(0.1)
    # A share of 30 in 300: standard error sqrt(.1 * .9 / 300).
    assert (good.low, good.high) == pytest.approx((0.1 - 1.96 * 0.0173, 0.1 + 1.96 * 0.0173), abs=0.006)
    assert good.p == pytest.approx(2 / 1001)
    mirrored = found.difference("bad", "good", "accuracy")
    assert (mirrored.difference, mirrored.low, mirrored.high, mirrored.p) == pytest.approx(
        (-0.1, -good.high, -good.low, good.p)
    )


def test_a_measure_without_resamples_has_its_value_and_no_interval() -> None:
    labels = np.arange(60) % 3
    a, b = predictions(0, labels), predictions(1, labels)
    found = pooled_bootstrap(labels, {"a": [a], "b": [b]}, np.arange(60), CLASSES, samples=20)
    expected = [compute_metrics(labels, scores, CLASSES)["mcc"] for scores in (a, b)]
    value, difference = found.value("a", "mcc"), found.difference("a", "b", "mcc")
    assert value.value == pytest.approx(expected[0])
    assert difference.difference == pytest.approx(expected[0] - expected[1])
    assert np.isnan([value.low, value.high, difference.low, difference.high, difference.p]).all()


def test_a_value_undefined_for_one_seed_is_undefined() -> None:
    labels = np.arange(60) % 3
    never_c = np.full((60, 3), 0.2)
    never_c[:, 0] = 0.6
    found = pooled_bootstrap(labels, {"a": [predictions(0, labels), never_c]}, np.arange(60), CLASSES, samples=20)
    assert np.isnan(found.value("a", "per_class.C.ppv").value)
    assert found.value("a", "per_class.C.sensitivity").value > 0


def test_wrong_input_is_refused_with_the_reason() -> None:
    labels = np.arange(30) % 3
    scores = predictions(0, labels)
    with pytest.raises(ValueError, match="no predictions of b"):
        pooled_bootstrap(labels, {"a": [scores], "b": []}, np.arange(30), CLASSES)
    with pytest.raises(ValueError, match="no predictions of any system"):
        pooled_bootstrap(labels, {}, np.arange(30), CLASSES)
    with pytest.raises(ValueError, match="labels must have the shape"):
        pooled_bootstrap(labels, {"a": [scores], "b": [scores[:-1]]}, np.arange(30), CLASSES)
    with pytest.raises(ValueError, match="level"):
        pooled_bootstrap(labels, {"a": [scores]}, np.arange(30), CLASSES, level=95)
    found = pooled_bootstrap(labels, {"a": [scores]}, np.arange(30), CLASSES, samples=5)
    with pytest.raises(ValueError, match=r"unknown measure 'bacc'; known: accuracy"):
        found.value("a", "bacc")
    with pytest.raises(ValueError, match=r"0\.\.1"):
        holm([0.2, 1.2])


def test_holm_by_hand() -> None:
    # Sorted .01, .02, .03, .04 times 4, 3, 2, 1 is .04, .06, .06, .04; a later one is never below an earlier one.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_does_not_count_comparisons_that_were_not_made() -> None:
    result = holm([0.01, None, float("nan"), 0.04])
    assert [result[0], result[3]] == pytest.approx([0.02, 0.04])
    assert np.isnan(result[1:3]).all()


@given(p_values=P_VALUES, data=st.data())
def test_holm_raises_keeps_the_order_stays_below_one_and_ignores_the_places(
    p_values: list[float | None], data: st.DataObject
) -> None:
    adjusted = holm(p_values)
    pairs = sorted(
        (p, corrected) for p, corrected in zip(p_values, adjusted, strict=True) if p is not None and not np.isnan(p)
    )
    for p, corrected in pairs:
        assert p <= corrected <= min(1, p * len(pairs)) + 1e-15
    assert [corrected for _, corrected in pairs] == sorted(corrected for _, corrected in pairs)
    if pairs:
        assert pairs[0][1] == pytest.approx(min(1, pairs[0][0] * len(pairs)))
    order = data.draw(st.permutations(range(len(p_values))))
    shuffled = holm([p_values[place] for place in order])
    assert np.array_equal(shuffled, [adjusted[place] for place in order], equal_nan=True)


def test_a_table_of_twelve_systems_takes_seconds() -> None:
    labels = np.random.default_rng(0).integers(3, size=1036)
    systems = {f"{index}": [predictions(3 * index + seed, labels) for seed in range(3)] for index in range(12)}
    started = time.perf_counter()
    found = pooled_bootstrap(labels, systems, np.arange(1036) // 2, CLASSES)
    assert time.perf_counter() - started < 60
    low, high = found.value("3", "accuracy").low, found.value("3", "accuracy").high
    assert low < found.value("3", "accuracy").value < high
