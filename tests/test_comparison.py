import json

import numpy as np
import pytest

from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.comparison import flat_measures, metrics_with_intervals, pooled_bootstrap
from dualrefnet.evaluation.metrics import compute_metrics
from resampling import CLASSES, intervals_of, lay_out, predictions

LABELS, GROUPS = predictions(0, 50)[0], np.arange(50) // 4
MEASURES = ("accuracy", "balanced_accuracy", "auc_macro_ovr", "f1_macro", "per_class.B.ppv", "malignant.auc", "ece")


def seeds_of(labels: np.ndarray, seeds: range, skill: int = 4) -> list[np.ndarray]:
    """One array of probabilities a seed; each label adds up to `skill` to its score."""
    generators = [np.random.default_rng(seed) for seed in seeds]
    scores = [generator.integers(1, 6, size=(len(labels), 3)).astype(float) for generator in generators]
    for generator, one in zip(generators, scores, strict=True):
        one[np.arange(len(labels)), labels] += generator.integers(0, skill + 1, size=len(labels))
    return [one / one.sum(axis=1, keepdims=True) for one in scores]


def test_values_intervals_and_differences_are_those_of_laid_out_resamples() -> None:
    systems = {"a": seeds_of(LABELS, range(1, 4), 6), "b": seeds_of(LABELS, range(9, 12), 3)}
    found = pooled_bootstrap(LABELS, systems, Bootstrap(GROUPS, 30), CLASSES, malignant=["C"])

    def measure(rows: np.ndarray) -> dict[str, dict[str, float]]:
        result = {}
        for name, seeds in systems.items():
            each = [flat_measures(compute_metrics(LABELS[rows], one[rows], CLASSES, ["C"])) for one in seeds]
            result[name] = {key: float(np.mean([values[key] for values in each])) for key in each[0]}
        return result

    point, drawn = measure(np.arange(50)), [measure(rows) for rows in lay_out(GROUPS, 30)]
    for key in MEASURES:
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
    assert (found.images, found.groups) == (50, 13)


def test_a_system_does_not_differ_from_itself_and_a_known_difference_is_found() -> None:
    labels = np.arange(300) % 3
    right = np.eye(3)[labels] * 0.7 + 0.1
    # Each tenth image is one that only the first system gets right.
    wrong = right.copy()
    wrong[::10] = np.roll(right[::10], 1, axis=1)
    systems = {"good": [right], "same": [right], "bad": [wrong]}
    found = pooled_bootstrap(labels, systems, Bootstrap(np.arange(300), 1000), CLASSES)
    same, good = found.difference("same", "good", "accuracy"), found.difference("good", "bad", "accuracy")
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert (good.value, good.p) == pytest.approx((0.1, 2 / 1001))
    # A share of 30 in 300: standard error sqrt(.1 * .9 / 300).
    assert (good.low, good.high) == pytest.approx((0.1 - 1.96 * 0.0173, 0.1 + 1.96 * 0.0173), abs=0.006)
    mirrored = found.difference("bad", "good", "accuracy")
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-0.1, -good.high, -good.low))


def test_what_has_no_resamples_has_no_interval_and_what_is_undefined_for_a_seed_is_undefined() -> None:
    a, b = seeds_of(LABELS, range(2))
    never_c = np.tile([0.6, 0.2, 0.2], (50, 1))
    found = pooled_bootstrap(LABELS, {"a": [a], "b": [b], "never": [a, never_c]}, Bootstrap(GROUPS, 20), CLASSES)
    expected = [compute_metrics(LABELS, scores, CLASSES)["mcc"] for scores in (a, b)]
    value, difference = found.value("a", "mcc"), found.difference("a", "b", "mcc")
    assert (value.value, difference.value) == pytest.approx((expected[0], expected[0] - expected[1]))
    assert np.isnan([value.low, difference.low, difference.p]).all()
    assert np.isnan(found.value("never", "per_class.C.ppv").value)
    assert found.value("never", "per_class.C.sensitivity").value > 0


def test_wrong_input_is_refused_with_the_reason() -> None:
    (scores,) = seeds_of(LABELS, range(1))
    for systems, message in (
        ({"a": [scores], "b": []}, "no predictions of b"),
        ({}, "no predictions of any system"),
        ({"a": [scores], "b": [scores[:-1]]}, "labels must have the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            pooled_bootstrap(LABELS, systems, Bootstrap(GROUPS, 5), CLASSES)
    with pytest.raises(ValueError, match=r"unknown measure 'bacc'; known: accuracy"):
        pooled_bootstrap(LABELS, {"a": [scores]}, Bootstrap(GROUPS, 5), CLASSES).value("a", "bacc")


@pytest.mark.parametrize("level", [0.95, 0.9])
def test_metrics_json_holds_every_interval_next_to_its_value(level: float) -> None:
    labels, scores = predictions(0, 300)
    numbers, suffix = np.arange(300) // 2, f"_ci{100 * level:g}"
    metrics = metrics_with_intervals(labels, scores, Bootstrap(numbers, 200, level=level), CLASSES, ["B"])
    plain = compute_metrics(labels, scores, CLASSES, ["B"])
    found, values = intervals_of(metrics, suffix), flat_measures(plain)
    pooled = pooled_bootstrap(labels, {"": [scores]}, Bootstrap(numbers, 200, level=level), CLASSES, ["B"])
    assert set(found) == set(pooled.drawn[""])
    for key in MEASURES:
        expected = pooled.value("", key)
        assert found[key] == [expected.low, expected.high]
        assert found[key][0] < values[key] < found[key][1]
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    keys = list(metrics)
    assert keys[keys.index("accuracy") + 1] == f"accuracy{suffix}"
    assert [key for key in keys if not key.endswith(suffix)] == [*plain, "bootstrap"]
    without = {"A": 0, "B": 0, "C": 0}
    assert metrics["bootstrap"] == {"samples": 200, "level": level, "groups": 150, "samples_without": without}
    # Names instead of numbers change nothing, another seed does, and without resamples there is no interval.
    named = Bootstrap([f"patient {number}" for number in numbers], 200, level=level)
    assert metrics_with_intervals(labels, scores, named, CLASSES, ["B"]) == metrics
    assert metrics_with_intervals(labels, scores, Bootstrap(numbers, 200, 1, level), CLASSES, ["B"]) != metrics
    assert metrics_with_intervals(labels, scores, Bootstrap(numbers, 0), CLASSES, ["B"]) == plain


def test_a_class_missing_from_resamples_is_counted_and_named() -> None:
    labels, scores = predictions(4, 60)
    labels[labels == 2], labels[0] = 1, 2
    metrics = metrics_with_intervals(labels, scores, Bootstrap(np.arange(60), 300), CLASSES)
    without = metrics["bootstrap"]["samples_without"]["C"]
    # One image among 60 patients is drawn not once in (1 - 1/60)^60 = 36% of the resamples.
    assert 80 < without < 140
    assert metrics["per_class"]["C"]["sensitivity_ci95"][0] in (0, 1)
    assert f"C ({without})" in metrics["remarks"][-1]
