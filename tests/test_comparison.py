import json
import time

import numpy as np
import pytest

from dualrefnet.evaluation.bootstrap import wilson_interval
from dualrefnet.evaluation.comparison import (
    bootstrap_intervals,
    flat_measures,
    paired_difference,
    pooled_bootstrap,
    with_intervals,
)
from dualrefnet.evaluation.metrics import compute_metrics
from resampling import CLASSES, lay_out, predictions

LABELS, GROUPS = predictions(0, 50)[0], np.arange(50) // 4


def seeds_of(labels: np.ndarray, seeds: range, skill: int = 4) -> list[np.ndarray]:
    """One array of probabilities a seed; each label adds up to `skill` to its score."""
    generators = [np.random.default_rng(seed) for seed in seeds]
    scores = [generator.integers(1, 6, size=(len(labels), 3)).astype(float) for generator in generators]
    for generator, one in zip(generators, scores, strict=True):
        one[np.arange(len(labels)), labels] += generator.integers(0, skill + 1, size=len(labels))
    return [one / one.sum(axis=1, keepdims=True) for one in scores]


def test_values_intervals_and_differences_are_those_of_laid_out_resamples() -> None:
    systems = {"a": seeds_of(LABELS, range(1, 4), 6), "b": seeds_of(LABELS, range(9, 12), 3)}
    found = pooled_bootstrap(LABELS, systems, GROUPS, CLASSES, samples=30, malignant=["C"])

    def measure(rows: np.ndarray) -> dict[str, dict[str, float]]:
        result = {}
        for name, seeds in systems.items():
            each = [flat_measures(compute_metrics(LABELS[rows], one[rows], CLASSES, ["C"])) for one in seeds]
            result[name] = {key: float(np.mean([values[key] for values in each])) for key in each[0]}
        return result

    point, drawn = measure(np.arange(50)), [measure(rows) for rows in lay_out(GROUPS, 30)]
    for key in (
        "accuracy",
        "balanced_accuracy",
        "auc_macro_ovr",
        "f1_macro",
        "per_class.B.ppv",
        "malignant.auc",
        "ece",
    ):
        for name in systems:
            value = found.value(name, key)
            expected = np.nanquantile([one[name][key] for one in drawn], [0.025, 0.975])
            assert [value.value, value.low, value.high] == pytest.approx([point[name][key], *expected])
        differences = np.array([one["a"][key] - one["b"][key] for one in drawn])
        difference = found.difference("a", "b", key)
        expected = [point["a"][key] - point["b"][key], *np.nanquantile(differences, [0.025, 0.975])]
        assert [difference.value, difference.low, difference.high] == pytest.approx(expected)
        tail = min((differences <= 0).sum(), (differences >= 0).sum())
        assert (difference.p, difference.samples) == (pytest.approx(min(1, 2 * (tail + 1) / 31)), 30)
    assert (found.images, found.groups, found.samples) == (50, 13, 30)


def test_one_seed_gives_what_the_functions_for_one_and_two_models_give() -> None:
    (a,), (b,) = seeds_of(LABELS, range(2, 3)), seeds_of(LABELS, range(3, 4))
    found = pooled_bootstrap(LABELS, {"a": [a], "b": [b]}, GROUPS, CLASSES, samples=150)
    for measure, interval in bootstrap_intervals(LABELS, a, GROUPS, CLASSES, samples=150).items():
        value = found.value("a", measure)
        assert (value.low, value.high) == interval
    pair = paired_difference(LABELS, a, b, GROUPS, CLASSES, samples=150)
    assert found.difference("a", "b", "balanced_accuracy") == pair


def test_seeds_that_err_on_different_patients_narrow_the_interval_and_duplicates_of_a_seed_do_not() -> None:
    labels = np.random.default_rng(2).integers(3, size=300)
    seeds = seeds_of(labels, range(4))
    systems = {"one": seeds[:1], "duplicates": seeds[:1] * 4, "seeds": seeds}
    found = pooled_bootstrap(labels, systems, np.arange(300), CLASSES, samples=400)
    one, duplicates, several = (found.value(name, "accuracy") for name in systems)
    assert (duplicates.low, duplicates.high) == pytest.approx((one.low, one.high))
    assert several.high - several.low < 0.85 * (one.high - one.low)


def test_a_system_does_not_differ_from_itself_and_a_known_difference_is_found() -> None:
    labels = np.arange(300) % 3
    right = np.eye(3)[labels] * 0.7 + 0.1
    # Each tenth image is one that only the first system gets right.
    wrong = right.copy()
    wrong[::10] = np.roll(right[::10], 1, axis=1)
    found = pooled_bootstrap(labels, {"good": [right], "same": [right], "bad": [wrong]}, np.arange(300), CLASSES)
    same, good = found.difference("same", "good", "accuracy"), found.difference("good", "bad", "accuracy")
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert (good.value, good.p) == pytest.approx((0.1, 2 / 1001))
    # A share of 30 in 300: standard error sqrt(.1 * .9 / 300).
    assert (good.low, good.high) == pytest.approx((0.1 - 1.96 * 0.0173, 0.1 + 1.96 * 0.0173), abs=0.006)
    mirrored = found.difference("bad", "good", "accuracy")
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-0.1, -good.high, -good.low))


def test_a_metric_without_resamples_has_its_value_and_no_interval() -> None:
    a, b = seeds_of(LABELS, range(2))
    found = pooled_bootstrap(LABELS, {"a": [a], "b": [b]}, GROUPS, CLASSES, samples=20)
    expected = [compute_metrics(LABELS, scores, CLASSES)["mcc"] for scores in (a, b)]
    value, difference = found.value("a", "mcc"), found.difference("a", "b", "mcc")
    assert (value.value, difference.value) == pytest.approx((expected[0], expected[0] - expected[1]))
    assert np.isnan([value.low, difference.low, difference.p]).all()


def test_a_value_undefined_for_one_seed_is_undefined() -> None:
    never_c = np.tile([0.6, 0.2, 0.2], (50, 1))
    systems = {"a": [*seeds_of(LABELS, range(1)), never_c]}
    found = pooled_bootstrap(LABELS, systems, GROUPS, CLASSES, samples=20)
    assert np.isnan(found.value("a", "per_class.C.ppv").value)
    assert found.value("a", "per_class.C.sensitivity").value > 0


def test_wrong_input_is_refused_with_the_reason() -> None:
    scores = seeds_of(LABELS, range(1))
    for systems, message in (
        ({"a": scores, "b": []}, "no predictions of b"),
        ({}, "no predictions of any system"),
        ({"a": scores, "b": [scores[0][:-1]]}, "labels must have the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            pooled_bootstrap(LABELS, systems, GROUPS, CLASSES)
    with pytest.raises(ValueError, match=r"unknown measure 'bacc'; known: accuracy"):
        pooled_bootstrap(LABELS, {"a": scores}, GROUPS, CLASSES, samples=5).value("a", "bacc")


def test_the_p_value_of_two_equal_models_is_seldom_small() -> None:
    values = []
    for seed in range(60):
        labels, a = predictions(seed, 150)
        b = seeds_of(labels, range(1000 + seed, 1001 + seed))[0]
        values.append(paired_difference(labels, a, b, np.arange(150), CLASSES, "accuracy", 200, seed).p)
    assert np.mean(np.array(values) < 0.05) <= 0.15


def test_intervals_hold_their_value_are_reproducible_and_ignore_the_names_of_patients() -> None:
    labels, scores = predictions(0, 300)
    numbers = np.arange(300) // 2
    intervals = bootstrap_intervals(labels, scores, numbers, CLASSES, samples=200, malignant=["B"])
    values = flat_measures(compute_metrics(labels, scores, CLASSES, malignant=["B"]))
    for key in (
        "accuracy",
        "auc_macro_ovr",
        "f1_macro",
        "precision_macro",
        "kappa",
        "per_class.A.npv",
        "malignant.auc",
    ):
        assert intervals[key][0] < values[key] < intervals[key][1]
    named = [f"patient {number}" for number in numbers]
    assert intervals == bootstrap_intervals(labels, scores, named, CLASSES, samples=200, malignant=["B"])
    assert intervals != bootstrap_intervals(labels, scores, numbers, CLASSES, samples=200, malignant=["B"], seed=1)
    assert (intervals.groups, intervals.samples_without) == (150, {"A": 0, "B": 0, "C": 0})


def test_duplicates_of_one_patients_image_do_not_narrow_the_interval() -> None:
    labels, scores = predictions(2, 100)
    repeated = np.repeat(labels, 5), np.repeat(scores, 5, axis=0)
    once = bootstrap_intervals(labels, scores, np.arange(100), CLASSES, samples=500)["accuracy"]
    by_patient = bootstrap_intervals(*repeated, np.repeat(np.arange(100), 5), CLASSES, samples=500)["accuracy"]
    by_image = bootstrap_intervals(*repeated, np.arange(500), CLASSES, samples=500)["accuracy"]
    assert by_patient == pytest.approx(once)
    assert by_image[1] - by_image[0] < 0.6 * (once[1] - once[0])


def test_the_interval_of_accuracy_is_near_wilsons_when_each_patient_has_one_image() -> None:
    labels, scores = predictions(3, 1000)
    hits = int((scores.argmax(axis=1) == labels).sum())
    drawn = bootstrap_intervals(labels, scores, np.arange(1000), CLASSES, samples=2000)["accuracy"]
    assert drawn == pytest.approx(wilson_interval(hits, 1000), abs=0.006)


def test_a_class_missing_from_resamples_is_counted_and_named() -> None:
    labels, scores = predictions(4, 60)
    labels[labels == 2], labels[0] = 1, 2
    intervals = bootstrap_intervals(labels, scores, np.arange(60), CLASSES, samples=300)
    # One image among 60 patients is drawn not once in (1 - 1/60)^60 = 36% of the resamples.
    assert 80 < intervals.samples_without["C"] < 140
    assert intervals["per_class.C.sensitivity"][0] in (0, 1)
    result = with_intervals(compute_metrics(labels, scores, CLASSES), intervals)
    assert f"C ({intervals.samples_without['C']})" in result["remarks"][-1]


def test_metrics_json_holds_every_interval_next_to_its_value() -> None:
    labels, scores = predictions(5, 100)
    metrics = compute_metrics(labels, scores, CLASSES, malignant=["A"])
    before = json.dumps(metrics)
    intervals = bootstrap_intervals(labels, scores, np.arange(100), CLASSES, samples=50, malignant=["A"], level=0.9)
    result = with_intervals(metrics, intervals)
    assert json.dumps(metrics) == before
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    keys = list(result)
    assert keys[keys.index("accuracy") + 1] == "accuracy_ci90"
    parts = {"": result, "malignant.": result["malignant"]}
    parts |= {f"per_class.{name}.": values for name, values in result["per_class"].items()}
    beside = {
        prefix + key[:-5]: value
        for prefix, values in parts.items()
        for key, value in values.items()
        if key.endswith("_ci90")
    }
    assert beside == {key: list(interval) for key, interval in intervals.items()}


def test_a_table_of_twelve_systems_and_a_thousand_resamples_of_five_thousand_images_take_seconds() -> None:
    started = time.perf_counter()
    labels = np.random.default_rng(0).integers(3, size=1036)
    systems = {str(index): seeds_of(labels, range(3 * index, 3 * index + 3)) for index in range(12)}
    pooled_bootstrap(labels, systems, np.arange(1036) // 2, CLASSES)
    bootstrap_intervals(*predictions(7, 5000), np.arange(5000) // 2, CLASSES)
    assert time.perf_counter() - started < 60
