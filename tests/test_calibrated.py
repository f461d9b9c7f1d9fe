import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import log_loss

from dualrefnet.display.format import calibration_line
from dualrefnet.errors import RunError
from dualrefnet.evaluation.calibration import ERRORS, Calibration, compare_errors, fit_calibration, measure_calibrated
from dualrefnet.evaluation.metrics import adaptive_calibration_error, brier_score, expected_calibration_error
from dualrefnet.files import read_json
from dualrefnet.recipe import load_recipe
from dualrefnet.run import Run
from dualrefnet.runtime.calibration import apply_temperature

CLASSES = ["A", "B", "MEL"]


def sure_model(
    seed: int, images: int, planted: float = 2.0
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Draw labels from probabilities, make these `planted` times too sure, and give two images to a patient."""
    generator = np.random.default_rng(seed)
    scores = generator.dirichlet(np.full(3, 0.7), images)
    labels = (generator.random(images)[:, None] > scores.cumsum(axis=1)[:, :-1]).sum(axis=1)
    sure = scores**planted / (scores**planted).sum(axis=1, keepdims=True)
    return labels, sure, np.arange(images) // 2


def test_what_was_fitted_survives_its_json_and_does_what_it_says() -> None:
    labels, scores, groups = sure_model(0, 4000)
    calibration = fit_calibration(labels, scores, groups, CLASSES, ["MEL"], samples=50)
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json(), allow_nan=False))) == calibration
    assert calibration.temperature == pytest.approx(2, rel=0.1)
    low, high = calibration.temperature_interval or (0, 0)
    assert 1 < low < calibration.temperature < high
    assert (calibration.images, calibration.groups) == (4000, 2000)
    warm = apply_temperature(scores, calibration.temperature)
    assert calibration.probabilities(scores) == pytest.approx(warm)
    # On the images of the fit the promises hold by construction.
    rows = np.arange(4000)
    assert calibration.prediction_sets(scores)[rows, labels].mean() >= 0.9
    by_class = calibration.prediction_sets(scores, by_class=True)
    assert all(by_class[labels == index, index].mean() >= 0.9 for index in range(3))
    referred = calibration.refer(scores)
    assert referred is not None
    assert referred[labels == 2].mean() >= 0.95
    assert (referred == (warm[:, 2] >= calibration.referral)).all()


def test_without_resamples_there_is_no_interval_and_the_values_are_the_same() -> None:
    labels, scores, groups = sure_model(1, 120)
    with_intervals, without = (
        fit_calibration(labels, scores, groups, CLASSES, ["MEL"], samples=samples) for samples in (20, 0)
    )
    assert (without.temperature_interval, without.referral_interval) == (None, None)
    assert replace(with_intervals, temperature_interval=None, referral_interval=None) == without
    assert Calibration.from_json(json.loads(json.dumps(without.to_json()))) == without
    text = json.dumps(measure_calibrated(without, labels, scores, groups, samples=0), allow_nan=False)
    assert "ci95" not in text
    assert "chance" not in text


def test_what_is_weak_about_a_fit_is_said() -> None:
    labels = np.array([0] * 12 + [1] * 12)
    scores = np.tile([0.5, 0.3, 0.2], (24, 1))
    groups = np.arange(24)
    none = fit_calibration(labels, scores, groups, CLASSES, [], samples=0)
    assert (none.referral, none.refer(scores)) == (None, None)
    assert none.class_thresholds["MEL"] == 0
    assert any("MEL (0)" in remark for remark in none.remarks)
    assert any("no malignant class" in remark for remark in none.remarks)
    assert Calibration.from_json(none.to_json()) == none
    unseen = fit_calibration(labels, scores, groups, CLASSES, ["MEL"], samples=10)
    assert unseen.referral is None
    assert any("no validation image is malignant" in remark for remark in unseen.remarks)
    assert measure_calibrated(unseen, labels, scores, groups, 10)["referral"] is None
    right = fit_calibration([0, 1], [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]], [0, 1], CLASSES, ["B"], samples=10)
    assert right.temperature == 1
    assert any("every validation image is right" in remark for remark in right.remarks)
    useless = fit_calibration(
        [0, 0, 1, 2], [[0.1, 0.8, 0.1]] * 2 + [[0.8, 0.1, 0.1]] * 2, range(4), CLASSES, [], samples=0
    )
    assert any("end of its range" in remark for remark in useless.remarks)


def test_a_file_that_is_no_calibration_is_refused() -> None:
    for values in ({}, {"classes": ["A"]}, {"fitted_on": None, "conformal": {}, "referral": None}):
        with pytest.raises(ValueError, match="isn't a calibration"):
            Calibration.from_json(values)


def test_the_errors_before_and_after_are_those_of_their_own_definitions() -> None:
    labels, scores, groups = sure_model(2, 300)
    calibration = fit_calibration(*sure_model(3, 300), CLASSES, ["MEL"], samples=0)
    measured = measure_calibrated(calibration, labels, scores, groups, samples=100)
    for side, probabilities in (("before", scores), ("after", calibration.probabilities(scores))):
        assert measured[side]["ece"] == expected_calibration_error(labels, probabilities)
        assert measured[side]["adaptive_ece"] == adaptive_calibration_error(labels, probabilities)
        assert measured[side]["brier"] == brier_score(labels, probabilities)
        assert measured[side]["log_loss"] == pytest.approx(log_loss(labels, probabilities))
    for key in ERRORS:
        assert measured["difference"][key] == measured["after"][key] - measured["before"][key]
    # A model twice too sure: the temperature helps, and beyond doubt.
    assert measured["difference"]["log_loss_ci95"][1] < 0
    assert measured["difference"]["brier_ci95"][1] < 0
    assert measured["after"]["ece"] < measured["after"]["ece_by_chance"][1] < measured["before"]["ece"]


def test_the_resampled_errors_are_those_of_every_laid_out_resample() -> None:
    labels, scores, groups = sure_model(4, 90)
    # Two decimals, so that confidences are tied.
    scores = np.maximum(scores, 0.01).round(2)
    scores /= scores.sum(axis=1, keepdims=True)
    warm = apply_temperature(scores, 1.7)
    found = compare_errors(labels, {"before": scores, "after": warm}, groups, 60, 8, 0.95)
    generator, drawn = np.random.default_rng(8), []
    for _ in range(60):
        rows = np.concatenate([np.flatnonzero(groups == group) for group in generator.integers(45, size=45)])
        both = [
            [
                measure(labels[rows], one[rows])
                for measure in (expected_calibration_error, adaptive_calibration_error, brier_score)
            ]
            + [log_loss(labels[rows], one[rows], labels=range(3))]
            for one in (scores, warm)
        ]
        drawn.append([*both, np.subtract(both[1], both[0]).tolist()])
    bounds = np.quantile(drawn, [0.025, 0.975], axis=0)
    for place, side in enumerate(("before", "after", "difference")):
        for column, key in enumerate(ERRORS):
            assert found[side][f"{key}_ci95"] == pytest.approx(bounds[:, place, column].tolist()), (side, key)


def test_an_error_by_chance_is_what_true_probabilities_give() -> None:
    generator = np.random.default_rng(5)
    labels, scores, groups = sure_model(6, 150, planted=1)
    found = compare_errors(labels, {"before": scores, "after": scores}, groups, 400, 0, 0.95)["before"]
    errors = []
    for _ in range(400):
        truth = (generator.random(150)[:, None] > scores.cumsum(axis=1)[:, :-1]).sum(axis=1)
        errors.append([expected_calibration_error(truth, scores), adaptive_calibration_error(truth, scores)])
    for place, key in enumerate(("ece_by_chance", "adaptive_ece_by_chance")):
        mean, high = found[key]
        assert mean == pytest.approx(np.mean(errors, axis=0)[place], rel=0.06)
        assert high == pytest.approx(np.quantile(errors, 0.95, axis=0)[place], rel=0.1)


def test_referral_and_sets_are_measured_on_the_other_side() -> None:
    calibration = fit_calibration(*sure_model(7, 600), CLASSES, ["MEL"], 0.8, 0.9, samples=0)
    labels, scores, groups = sure_model(8, 600)
    measured = measure_calibrated(calibration, labels, scores, groups, samples=100)
    held = calibration.prediction_sets(scores)[np.arange(600), labels]
    conformal, referral = measured["conformal"], measured["referral"]
    assert conformal["promised"] == 0.8
    assert conformal["marginal"]["coverage"] == pytest.approx(held.mean())
    assert conformal["marginal"]["promise"] == "within"
    referred = calibration.refer(scores)
    assert referred is not None
    assert referral["sensitivity"] == pytest.approx(referred[labels == 2].mean())
    assert referral["missed"] == (~referred[labels == 2]).sum()
    assert (referral["wanted"], referral["threshold"]) == (0.9, calibration.referral)
    assert measured["selective"]["table"][0]["accuracy"] == pytest.approx((scores.argmax(axis=1) == labels).mean())


def test_a_run_holds_what_its_validation_predictions_give(tiny_run: Run) -> None:
    calibration, classes = tiny_run.calibration, tiny_run.model["classes"]
    rows = tiny_run.predictions.query("split == 'val'")
    labels = rows["label"].map(classes.index).to_numpy()
    scores = rows[[f"prob_{name}" for name in classes]].to_numpy()
    groups = tiny_run.split.set_index("image_id")["patient_id"].loc[rows["image_id"]].to_numpy()
    again = fit_calibration(
        labels, scores, groups, classes, tiny_run.model["malignant"], samples=50, seed=tiny_run.recipe.seed
    )
    # Reading a CSV may change the last digit of a number.
    assert again.temperature == pytest.approx(calibration.temperature, rel=1e-6)
    assert again.temperature_interval == pytest.approx(calibration.temperature_interval, rel=1e-6)
    assert again.threshold == pytest.approx(calibration.threshold, rel=1e-6)
    assert again.class_thresholds == pytest.approx(calibration.class_thresholds, rel=1e-6)
    assert (again.referral, again.sensitivity) == pytest.approx(
        (calibration.referral, calibration.sensitivity), rel=1e-6
    )
    assert (again.per_class, again.groups, again.remarks) == (
        calibration.per_class,
        calibration.groups,
        calibration.remarks,
    )
    values = tiny_run.metrics["calibrated"]
    assert values["temperature"] == calibration.temperature
    assert values["before"]["ece"] == pytest.approx(tiny_run.metrics["ece"])
    assert values["before"]["log_loss"] == pytest.approx(tiny_run.metrics["log_loss"])
    assert values["conformal"]["promised"] == tiny_run.recipe.evaluation.coverage == 0.9
    assert values["selective"]["table"][0]["accuracy"] == pytest.approx(tiny_run.metrics["accuracy"])


def test_an_older_run_says_how_to_get_its_calibration(tiny_run: Run, tmp_path) -> None:
    for name in ("metrics.json", "recipe.yaml"):
        (tmp_path / name).write_bytes((tiny_run.path / name).read_bytes())
    with pytest.raises(RunError, match="dualrefnet evaluate"):
        _ = Run(tmp_path).calibration
    (tmp_path / "calibration.json").write_text('{"classes": [')
    with pytest.raises(RunError, match="dualrefnet evaluate"):
        _ = Run(tmp_path).calibration
    assert read_json(tiny_run.calibration_file)["fitted_on"]["split"] == "val"


def test_the_recipe_refuses_promises_that_nobody_can_keep() -> None:
    for key, value in (
        ("coverage", 1.0),
        ("coverage", 0.0),
        ("referral_sensitivity", 0.0),
        ("referral_sensitivity", 1.1),
    ):
        with pytest.raises(Exception, match=key):
            load_recipe("sample", {f"evaluation.{key}": value})


def test_using_a_calibration_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, dualrefnet.evaluation.calibration; print({'torch', 'matplotlib', 'timm'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )


def test_the_line_of_the_terminal_says_what_was_measured() -> None:
    measured = {
        "temperature": 1.246,
        "before": {"ece": 0.1234},
        "after": {"ece": 0.0567},
        "conformal": {"promised": 0.9, "marginal": {"mean_size": 1.76, "coverage": 0.875}},
        "referral": {"sensitivity": 0.931, "referred": 0.52, "wanted": 0.95},
    }
    line = calibration_line(measured)
    assert line == (
        "temperature 1.25: expected calibration error 0.123 -> 0.057; conformal sets of 1.8 classes: coverage 88% "
        "(target 90%); referral of 52%: sensitivity 93% (target 95%)"
    )
    assert calibration_line(measured | {"referral": None}) == line.rpartition("; ")[0]
