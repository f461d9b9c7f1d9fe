import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dualrefnet.evaluation.bootstrap
from dualrefnet.evaluation.bootstrap import Bootstrap, Difference, Estimate, holm, wilson_interval
from resampling import lay_out

P_VALUES = st.lists(st.one_of(st.none(), st.just(float("nan")), st.floats(0, 1)), max_size=12)


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(dualrefnet.evaluation.bootstrap)
    assert (result.failed, result.attempted) == (0, 2)


def test_ratios_have_the_intervals_of_laid_out_resamples() -> None:
    generator = np.random.default_rng(0)
    groups, included = np.arange(60) // 3, generator.random((60, 4)) < 0.5
    amounts = generator.random((60, 4))
    amounts[:, 1:3], included[:, 3] = [1, 0], False
    bootstrap = Bootstrap(groups, 150, 5)
    means, ones, zeros, nothing = bootstrap.ratios(amounts, included)
    drawn = [amounts[rows, 0][included[rows, 0]].mean() for rows in lay_out(groups, 150, 5)]
    assert means.value == pytest.approx(amounts[included[:, 0], 0].mean())
    assert [means.low, means.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    # All resamples agree here, so the interval is Wilson's, a patient being one case.
    patients = [len(set(groups[included[:, column]])) for column in (1, 2)]
    assert (ones.low, ones.high) == wilson_interval(patients[0], patients[0])
    assert (zeros.low, zeros.high) == wilson_interval(0, patients[1])
    assert np.isnan([nothing.value, nothing.low]).all()


def test_the_json_of_a_value_holds_its_interval_and_none_for_what_is_undefined() -> None:
    assert Estimate(0.5, 0.4, 0.6).to_json("auc", 0.9) == {"auc": 0.5, "auc_ci90": [0.4, 0.6]}
    assert Estimate(float("nan"), 0.4, 0.6).to_json("auc", 0.9) == {"auc": None}
    assert Difference(0.1).to_json("gap", 0.95) == {"gap": 0.1}


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        (np.zeros(10), {}, "at least 2 patients"),
        (np.array([None, *"abcdefghi"], dtype=object), {}, "1 images have no group"),
        (np.arange(10), {"samples": -1}, "samples"),
        (np.arange(10), {"level": 95}, "level"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(groups: object, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bootstrap(groups, **({"samples": 5} | options))  # type: ignore[arg-type]


@given(total=st.integers(1, 500), data=st.data())
def test_wilson_stays_in_the_unit_interval_around_the_proportion(total: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, total))
    low, high = wilson_interval(successes, total)
    assert 0 <= low <= successes / total <= high <= 1
    mirrored = wilson_interval(total - successes, total)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))


def test_holm_by_hand() -> None:
    # Sorted .01, .02, .03, .04 times 4, 3, 2, 1 is .04, .06, .06, .04; a later one is never below an earlier one.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"0\.\.1"):
        holm([0.2, 1.2])


@given(p_values=P_VALUES, data=st.data())
def test_holm_raises_keeps_the_order_stays_below_one_and_ignores_the_positions(
    p_values: list[float | None], data: st.DataObject
) -> None:
    adjusted = holm(p_values)
    pairs = sorted((p, q) for p, q in zip(p_values, adjusted, strict=True) if p is not None and not np.isnan(p))
    # Comparisons that weren't made aren't counted.
    assert int(np.isnan(adjusted).sum()) == len(p_values) - len(pairs)
    for p, corrected in pairs:
        assert p <= corrected <= min(1, p * len(pairs)) + 1e-15
    assert [corrected for _, corrected in pairs] == sorted(corrected for _, corrected in pairs)
    if pairs:
        assert pairs[0][1] == pytest.approx(min(1, pairs[0][0] * len(pairs)))
    order = data.draw(st.permutations(range(len(p_values))))
    shuffled = holm([p_values[index] for index in order])
    assert np.array_equal(shuffled, [adjusted[index] for index in order], equal_nan=True)
