import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from dualrefnet.evaluation.bootstrap import bootstrap_intervals, paired_difference, wilson_interval, with_intervals
from dualrefnet.evaluation.metrics import Ranking, Resampler, compute_metrics

CLASSES = ["A", "B", "C"]


def predictions(seed: int, images: int, skill: int = 4) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(len(CLASSES), size=images)
    # Whole numbers: many tied scores.
    scores = generator.integers(1, 6, size=(images, len(CLASSES))).astype(float)
    scores[np.arange(images), labels] += generator.integers(0, skill + 1, size=images)
    return labels, scores / scores.sum(axis=1, keepdims=True)


def flat(metrics: dict) -> dict[str, float | None]:
    values = {key: value for key, value in metrics.items() if not isinstance(value, (dict, list))}
    values |= {f"malignant.{key}": value for key, value in metrics["malignant"].items()}
    return values | {
        f"per_class.{name}.{key}": value for name, inner in metrics["per_class"].items() for key, value in inner.items()
    }


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(2, 40), patients=st.integers(2, 8))
def test_a_weighted_resample_measures_exactly_what_the_laid_out_sample_measures(
    seed: int, images: int, patients: int
) -> None:
    labels, scores = predictions(seed, images)
    generator = np.random.default_rng(seed)
    groups = np.concatenate([np.arange(patients), generator.integers(patients, size=images)])[:images]
    times = generator.integers(0, 4, size=groups.max() + 1)
    times[0] += 1
    chosen = np.repeat(np.arange(images), times[groups])
    expected = flat(compute_metrics(labels[chosen], scores[chosen], CLASSES, malignant=["C"]))
    measured = Resampler(labels, scores, groups, CLASSES, ["C"]).measure(times[:, None].astype(float))
    for key, column in measured.items():
        if expected[key] is None:
            assert np.isnan(column[0]), key
        else:
            assert column[0] == pytest.approx(expected[key]), key


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 50))
def test_the_weighted_auc_is_exact_with_ties(seed: int, levels: int) -> None:
    generator = np.random.default_rng(seed)
    score, positive = generator.integers(levels, size=60) / levels, np.arange(60) % 3 == 0
    groups, times = generator.integers(12, size=60), generator.integers(0, 4, size=12)
    groups[:12], times[:4] = np.arange(12), 1
    laid_out = np.repeat(np.arange(60), times[groups])
    measured = Ranking.of(score, positive, groups).auc(times[:, None].astype(float))
    assert measured[0] == pytest.approx(roc_auc_score(positive[laid_out], score[laid_out]), abs=1e-12)


def test_intervals_hold_their_value_are_reproducible_and_depend_on_the_seed() -> None:
    labels, scores = predictions(0, 300)
    groups = np.arange(300) // 2
    intervals = bootstrap_intervals(labels, scores, groups, CLASSES, samples=200, malignant=["B"])
    values = flat(compute_metrics(labels, scores, CLASSES, malignant=["B"]))
    for key in (
        "accuracy",
        "auc_macro_ovr",
        "f1_macro",
        "precision_macro",
        "kappa",
        "per_class.A.npv",
        "malignant.auc",
    ):
        low, high = intervals[key]
        assert low < values[key] < high
    assert intervals == bootstrap_intervals(labels, scores, groups, CLASSES, samples=200, malignant=["B"])
    assert intervals != bootstrap_intervals(labels, scores, groups, CLASSES, samples=200, malignant=["B"], seed=1)
    assert intervals.groups == 150
    assert intervals.samples_without == {"A": 0, "B": 0, "C": 0}


def test_the_names_of_patients_change_nothing() -> None:
    labels, scores = predictions(1, 400)
    numbers = np.arange(400) // 4
    names = np.array([f"patient {number}" for number in numbers])
    assert bootstrap_intervals(labels, scores, names, CLASSES, samples=50) == bootstrap_intervals(
        labels, scores, numbers, CLASSES, samples=50
    )


def test_copies_of_one_patients_image_do_not_narrow_the_interval() -> None:
    labels, scores = predictions(2, 100)
    once = bootstrap_intervals(labels, scores, np.arange(100), CLASSES, samples=500)
    copied = bootstrap_intervals(
        np.repeat(labels, 5), np.repeat(scores, 5, axis=0), np.repeat(np.arange(100), 5), CLASSES, samples=500
    )
    by_image = bootstrap_intervals(
        np.repeat(labels, 5), np.repeat(scores, 5, axis=0), np.arange(500), CLASSES, samples=500
    )
    assert copied["accuracy"] == pytest.approx(once["accuracy"])
    widths = [high - low for low, high in (once["accuracy"], by_image["accuracy"])]
    assert widths[1] < 0.6 * widths[0]


def test_the_interval_of_accuracy_is_near_wilsons_when_each_patient_has_one_image() -> None:
    labels, scores = predictions(3, 1000)
    hits = int((scores.argmax(axis=1) == labels).sum())
    drawn = bootstrap_intervals(labels, scores, np.arange(1000), CLASSES, samples=2000)["accuracy"]
    assert drawn == pytest.approx(wilson_interval(hits, 1000), abs=0.006)


def test_samples_in_which_a_class_vanished_are_skipped_counted_and_named() -> None:
    labels, scores = predictions(4, 60)
    labels[labels == 2] = 1
    labels[0] = 2
    classes = [*CLASSES, "never"]
    scores = np.hstack([scores * 0.9, np.full((60, 1), 0.1)])
    intervals = bootstrap_intervals(labels, scores, np.arange(60), classes, samples=300)
    # One image among 60 patients is drawn not once in (1 - 1/60)^60 = 36% of the samples.
    assert 80 < intervals.samples_without["C"] < 140
    assert intervals.samples_without["A"] == 0
    assert "never" not in intervals.samples_without
    assert "per_class.never.sensitivity" not in intervals
    result = with_intervals(compute_metrics(labels, scores, classes), intervals)
    assert any(f"C ({intervals.samples_without['C']})" in remark for remark in result["remarks"])
    assert result["bootstrap"]["samples_without"]["C"] == intervals.samples_without["C"]


def test_with_intervals_sets_each_interval_beside_its_value_and_stays_strict_json() -> None:
    labels, scores = predictions(5, 100)
    metrics = compute_metrics(labels, scores, CLASSES, malignant=["A"])
    before = json.dumps(metrics)
    intervals = bootstrap_intervals(labels, scores, np.arange(100), CLASSES, samples=50, malignant=["A"])
    result = with_intervals(metrics, intervals)
    assert json.dumps(metrics) == before
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    keys = list(result)
    assert keys[keys.index("accuracy") + 1] == "accuracy_ci95"
    for key in (
        "accuracy",
        "balanced_accuracy",
        "auc_macro_ovr",
        "f1_macro",
        "precision_macro",
        "recall_macro",
        "kappa",
        "ece",
    ):
        assert result[f"{key}_ci95"] == list(intervals[key])
    for name in CLASSES:
        for key in ("sensitivity", "specificity", "ppv", "npv", "auc"):
            assert result["per_class"][name][f"{key}_ci95"] == list(intervals[f"per_class.{name}.{key}"])
    assert result["malignant"]["auc_ci95"] == list(intervals["malignant.auc"])
    assert "accuracy_ci90" in with_intervals(
        metrics, bootstrap_intervals(labels, scores, np.arange(100), CLASSES, samples=50, level=0.9)
    )


def test_progress_counts_up_to_all_samples() -> None:
    labels, scores = predictions(6, 30)
    seen: list[tuple[int, int]] = []
    bootstrap_intervals(
        labels, scores, np.arange(30), CLASSES, samples=150, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (150, 150)


def test_a_thousand_samples_of_five_thousand_images_take_seconds() -> None:
    labels, scores = predictions(7, 5000)
    started = time.perf_counter()
    bootstrap_intervals(labels, scores, np.arange(5000) // 2, CLASSES)
    assert time.perf_counter() - started < 20


def test_a_model_differs_not_from_itself_and_differs_from_a_worse_one() -> None:
    labels, good = predictions(8, 300, skill=8)
    poor = predictions(9, 300)[1]
    groups = np.arange(300) // 3
    same = paired_difference(labels, good, good, groups, CLASSES, samples=200)
    assert (same["difference"], same["ci95"], same["p"]) == (0, [0, 0], 1)
    ahead = paired_difference(labels, good, poor, groups, CLASSES, measure="auc_macro_ovr", samples=200)
    behind = paired_difference(labels, poor, good, groups, CLASSES, measure="auc_macro_ovr", samples=200)
    assert ahead["p"] == behind["p"] == pytest.approx(2 / 201)
    assert ahead["difference"] == ahead["a"] - ahead["b"] == -behind["difference"]
    assert ahead["ci95"] == pytest.approx([-behind["ci95"][1], -behind["ci95"][0]])
    assert 0 < ahead["ci95"][0] < ahead["difference"] < ahead["ci95"][1]
    assert ahead["a"] == pytest.approx(compute_metrics(labels, good, CLASSES)["auc_macro_ovr"])


def test_the_p_value_of_two_equal_models_is_seldom_small() -> None:
    values = []
    for seed in range(60):
        labels, a = predictions(seed, 150)
        generator = np.random.default_rng(seed)
        b = generator.integers(1, 6, size=(150, 3)).astype(float)
        b[np.arange(150), labels] += generator.permutation(generator.integers(0, 5, size=150))
        b /= b.sum(axis=1, keepdims=True)
        values.append(
            paired_difference(labels, a, b, np.arange(150), CLASSES, measure="accuracy", samples=200, seed=seed)["p"]
        )
    assert np.mean(np.array(values) < 0.05) <= 0.15


def test_wrong_input_is_refused_with_the_reason() -> None:
    labels, scores = predictions(10, 10)
    with pytest.raises(ValueError, match="at least 2 patients"):
        bootstrap_intervals(labels, scores, np.zeros(10), CLASSES)
    with pytest.raises(ValueError, match="1 images have no group"):
        bootstrap_intervals(labels, scores, np.array([None, *"abcdefghi"], dtype=object), CLASSES)
    with pytest.raises(ValueError, match="groups must have the shape"):
        bootstrap_intervals(labels, scores, np.arange(9), CLASSES)
    with pytest.raises(ValueError, match="samples"):
        bootstrap_intervals(labels, scores, np.arange(10), CLASSES, samples=0)
    with pytest.raises(ValueError, match="level"):
        bootstrap_intervals(labels, scores, np.arange(10), CLASSES, level=95)
    with pytest.raises(ValueError, match="unknown measure 'bacc'"):
        paired_difference(labels, scores, scores, np.arange(10), CLASSES, measure="bacc")


@given(total=st.integers(1, 500), data=st.data())
def test_wilson_stays_in_the_unit_interval_around_the_share(total: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, total))
    low, high = wilson_interval(successes, total)
    assert 0 <= low <= successes / total <= high <= 1
    mirrored = wilson_interval(total - successes, total)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))


def test_wilson_refuses_what_is_no_proportion() -> None:
    for successes, total in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson_interval(successes, total)
