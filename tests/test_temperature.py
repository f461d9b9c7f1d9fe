import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

import dualrefnet.runtime.calibration
from dualrefnet.evaluation.calibration import HIGHEST, LOWEST, fit_temperature, temperature_interval
from dualrefnet.runtime.calibration import FLOOR, apply_temperature


def truthful(seed: int, images: int, count: int, spread: float = 2.0) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draw probabilities, and labels as often as they say."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, spread, (images, count))
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (generator.random(images)[:, None] > scores.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return labels, scores


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(dualrefnet.runtime.calibration)
    assert (result.failed, result.attempted) == (0, 1)


@pytest.mark.parametrize("planted", [0.5, 1.0, 2.5])
def test_a_planted_temperature_is_found_again(planted: float) -> None:
    labels, scores = truthful(0, 20_000, 5)
    # A model that is `planted` times too sure of itself: its logits are the true ones times that.
    sure = scores**planted / (scores**planted).sum(axis=1, keepdims=True)
    assert fit_temperature(labels, sure) == pytest.approx(planted, rel=0.03)
    assert apply_temperature(sure, planted) == pytest.approx(scores)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(20, 60), count=st.integers(2, 8))
def test_it_is_the_minimum_that_scipy_finds_and_the_likeliest_class_stays(seed: int, images: int, count: int) -> None:
    labels, scores = truthful(seed, images, count)
    found = fit_temperature(labels, scores)
    assert (apply_temperature(scores, found).argmax(axis=1) == scores.argmax(axis=1)).all()

    def loss(logarithm: float) -> float:
        return float(log_loss(labels, apply_temperature(scores, np.exp(logarithm)), labels=range(count)))

    if (scores.argmax(axis=1) == labels).all():
        assert found == 1
        return
    best = minimize_scalar(loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded", options={"xatol": 1e-8})
    assert loss(np.log(found)) <= best.fun + 1e-9


def test_probabilities_of_zero_are_handled_and_one_changes_nothing() -> None:
    scores = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    assert apply_temperature(scores, 1) == pytest.approx(scores, abs=1e-12)
    warm = apply_temperature(scores, 20)
    assert warm[0, 1] == pytest.approx(FLOOR**0.05 / (1 + 2 * FLOOR**0.05))
    assert warm.sum(axis=1) == pytest.approx(1)
    # Sure, and wrong in one case of four: the right confidence is .75 against .25, 3 : 1 = FLOOR^(-1/T).
    sure = np.eye(2)[[0, 0, 0, 0]]
    expected = np.log(1 / FLOOR) / np.log(3)
    assert expected > HIGHEST
    assert fit_temperature([0, 0, 0, 1], sure) == pytest.approx(HIGHEST)
    nearly = np.tile([0.99, 0.01], (4, 1))
    assert fit_temperature([0, 0, 0, 1], nearly) == pytest.approx(np.log(99) / np.log(3))


def test_a_model_that_is_always_right_gives_no_temperature() -> None:
    assert fit_temperature([0, 1, 1], [[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]) == 1
    with pytest.raises(ValueError, match="above 0"):
        apply_temperature([[0.5, 0.5]], 0)


def test_the_interval_agrees_with_refitting_every_laid_out_resample() -> None:
    labels, scores = truthful(3, 120, 4)
    sure = scores**2 / (scores**2).sum(axis=1, keepdims=True)
    groups = np.arange(120) // 3
    low, high = temperature_interval(labels, sure, groups, samples=100, seed=5) or (np.nan, np.nan)
    generator, fitted = np.random.default_rng(5), []
    for _ in range(100):
        rows = np.concatenate([np.flatnonzero(groups == group) for group in generator.integers(40, size=40)])
        fitted.append(fit_temperature(labels[rows], sure[rows]))
    assert (low, high) == pytest.approx(np.quantile(fitted, [0.025, 0.975]).tolist(), rel=1e-3)
    assert temperature_interval([0, 1], [[0.9, 0.1], [0.2, 0.8]], np.arange(2), samples=5) is None
