import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from dualrefnet.evaluation.bootstrap import Bootstrap, images_of, wilson_interval
from dualrefnet.evaluation.comparison import metrics_with_intervals
from dualrefnet.evaluation.curves import (
    ALL_MALIGNANT,
    GRID,
    KINDS,
    Curves,
    OneVersusRest,
    class_curves,
    compute_reliability,
    curve_statistics,
    draw_curves,
)
from dualrefnet.evaluation.metrics import Ranking
from readable import assert_readable
from resampling import CLASSES, Floats, ece, lay_out, predictions

NAMES = ["MEL", "NV", "background_father = BRAZIL", "AK", "seborrhoeic keratosis", "DF", "melanoma, invasive", "VASC"]


def two_class(scores: list[float]) -> Floats:
    return np.array([[1 - score, score] for score in scores])


def one_of(curves: Curves, name: str) -> OneVersusRest:
    (found,) = [one for one in curves.of if one.name == name]
    return found


def expected_roc(positive: NDArray[np.bool_], score: Floats) -> Floats:
    """Scikit-learn's curve at the grid; a hair to the right, where a vertical piece has its upper end."""
    x, y, _ = roc_curve(positive, score, drop_intermediate=False)
    return np.interp(GRID + 1e-9, x, y)


def expected_precision(positive: NDArray[np.bool_], score: Floats) -> Floats:
    precision, recall, _ = precision_recall_curve(positive, score)
    # Ascending thresholds; the last point (recall 0, precision 1) belongs to none.
    precision, recall = precision[:-1], recall[:-1]
    return np.array([precision[np.flatnonzero((recall >= goal - 1e-12) & (recall > 0))[-1]] for goal in GRID])


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), images=st.integers(4, 120), levels=st.sampled_from([2, 6, 10**6]))
def test_the_point_curves_are_those_of_scikit_learn(seed: int, images: int, levels: int) -> None:
    labels, scores = predictions(seed, images, levels=levels)
    curves = class_curves(labels, scores, Bootstrap(np.arange(images), 1), CLASSES)
    assert [one.name for one in curves.of] == CLASSES
    for index, one in enumerate(curves.of):
        truth, score = labels == index, scores[:, index]
        assert one.roc.y == pytest.approx(expected_roc(truth, score), abs=1e-6)
        assert one.precision_recall.y == pytest.approx(expected_precision(truth, score), abs=1e-12)
        assert one.roc.area.value == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
        assert one.precision_recall.area.value == pytest.approx(average_precision_score(truth, score), abs=1e-12)
        assert (one.positives, one.prevalence) == (truth.sum(), truth.mean())


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([2, 5, 40]))
def test_a_weighted_resample_has_the_curves_of_the_laid_out_sample(seed: int, levels: int) -> None:
    generator = np.random.default_rng(seed)
    score, truth = generator.integers(levels, size=60) / levels, generator.random(60) < 0.3
    groups, times = generator.integers(12, size=60), generator.integers(0, 4, size=(5, 12))
    measured = curve_statistics(Ranking.of(score, truth, groups), times.astype(float))
    for row, counts in enumerate(times):
        laid_out = np.repeat(np.arange(60), counts[groups])
        if not 0 < truth[laid_out].sum() < len(laid_out):
            assert all(np.isnan(values[row]).all() for values in measured.values())
            continue
        assert measured["roc"][row] == pytest.approx(expected_roc(truth[laid_out], score[laid_out]), abs=1e-6)
        assert measured["precision_recall"][row] == pytest.approx(
            expected_precision(truth[laid_out], score[laid_out]), abs=1e-12
        )
        assert measured["auc"][row] == pytest.approx(roc_auc_score(truth[laid_out], score[laid_out]), abs=1e-12)
        assert measured["ap"][row] == pytest.approx(
            average_precision_score(truth[laid_out], score[laid_out]), abs=1e-12
        )


def test_bands_and_intervals_are_those_of_laid_out_resamples() -> None:
    labels, scores = predictions(0, 90)
    groups = np.arange(90) // 3
    curves = class_curves(labels, scores, Bootstrap(groups, 70, 5, 0.8), CLASSES)
    draws = lay_out(groups, 70, 5)
    for index, one in enumerate(curves.of):
        for curve, along, area in (
            (one.roc, expected_roc, roc_auc_score),
            (one.precision_recall, expected_precision, average_precision_score),
        ):
            drawn = [along(labels[rows] == index, scores[rows, index]) for rows in draws]
            assert np.array([curve.low, curve.high]) == pytest.approx(np.quantile(drawn, [0.1, 0.9], axis=0), abs=1e-6)
            areas = [area(labels[rows] == index, scores[rows, index]) for rows in draws]
            assert [curve.area.low, curve.area.high] == pytest.approx(np.quantile(areas, [0.1, 0.9]), abs=1e-12)


def test_four_images_by_hand() -> None:
    # Ill: .9 and .6; well: .8 and .1. All but the last are called ill.
    curves = class_curves([1, 0, 1, 0], two_class([0.9, 0.8, 0.6, 0.1]), Bootstrap([1, 2, 3, 4], 1), ["well", "ill"])
    ill = one_of(curves, "ill")
    assert ill.roc.y.tolist() == [0.5] * 50 + [1.0] * 51
    assert ill.roc.area.value == 0.75
    assert ill.precision_recall.y == pytest.approx([1.0] * 51 + [2 / 3] * 50)
    assert ill.precision_recall.area.value == pytest.approx(5 / 6)
    assert ill.roc.decision == (0.5, 1)
    assert ill.precision_recall.decision == (1, pytest.approx(2 / 3))


def test_single_images_are_no_group_of_their_own() -> None:
    assert images_of(1200, 30, "patients") == images_of(1200, 30, "patient") == "1,200 test images of 30 patients"
    assert images_of(80, 80, "image", "images") == "80 images"


def test_curves_are_reproducible_and_ignore_the_order_of_rows_and_the_names_of_patients() -> None:
    labels, scores = predictions(2, 120)
    groups = np.arange(120) // 4
    first = class_curves(labels, scores, Bootstrap(groups, 60), CLASSES).frame("roc")
    named = [f"patient {group}" for group in groups]
    assert first.equals(class_curves(labels, scores, Bootstrap(named, 60), CLASSES).frame("roc"))
    assert not first.equals(class_curves(labels, scores, Bootstrap(groups, 60, 1), CLASSES).frame("roc"))
    turned = class_curves(labels[::-1], scores[::-1], Bootstrap(groups[::-1], 60), CLASSES).frame("roc")
    assert turned["y"].to_numpy() == pytest.approx(first["y"].to_numpy(), nan_ok=True)


def test_what_has_no_curve_is_named_and_has_no_panel() -> None:
    labels, scores = predictions(3, 40)
    with_fourth = np.hstack([scores * 0.9, np.full((40, 1), 0.1)])
    curves = class_curves(labels, with_fourth, Bootstrap(np.arange(40), 5), [*CLASSES, "D"], ["D"])
    assert [one.name for one in curves.of] == CLASSES
    assert len(curves.notes) == 2
    assert "D" in curves.notes[0]
    for kind in KINDS:
        figure = draw_curves(curves, kind)
        assert len(figure.figure.axes) == 3
        assert curves.notes[0] in figure.caption
    alone = class_curves(np.zeros(40, dtype=int), scores, Bootstrap(np.arange(40), 5), CLASSES)
    assert alone.of == ()
    assert list(alone.frame("roc").columns) == ["class", "curve", "part", "x", "y", "low", "high"]
    assert_readable(draw_curves(alone, "roc"))


def test_resamples_without_a_class_are_skipped_for_it_counted_and_named() -> None:
    labels, scores = predictions(4, 60)
    labels[labels == 2] = 1
    labels[0] = 2
    bootstrap = Bootstrap(np.arange(60), 300)
    curves = class_curves(labels, scores, bootstrap, CLASSES)
    expected = metrics_with_intervals(labels, scores, bootstrap, CLASSES)["bootstrap"]["samples_without"]
    assert {one.name: one.samples_without for one in curves.of} == expected
    assert any(f"C ({expected['C']})" in note for note in curves.notes)
    assert np.isfinite(one_of(curves, "C").roc.low).all()


def test_figures_draw_the_numbers_of_their_tables() -> None:
    labels, scores = predictions(1, 200, 4)
    curves = class_curves(labels, scores, Bootstrap(np.arange(200) // 2, 40, 7), list("ABCD"), ["B", "C"])
    for kind in KINDS:
        figure, table = draw_curves(curves, kind), curves.frame(kind)
        assert figure.data.equals(table)
        sizes = table[table["class"] == ALL_MALIGNANT].groupby("part").size().to_dict()
        chance = {"chance": 1} if kind == "precision_recall" else {}
        assert sizes == {"area": 1, "curve": 101, "decision": 1} | chance
        for axis, one in zip(figure.figure.axes, curves.of, strict=True):
            part = table[table["class"] == one.name].set_index("part")
            guess, curve, decision = axis.lines
            assert curve.get_ydata() == pytest.approx(part.loc["curve", "y"].to_numpy())
            assert (decision.get_xdata()[0], decision.get_ydata()[0]) == tuple(part.loc["decision", ["x", "y"]])
            assert guess.get_ydata() == pytest.approx([0, 1] if kind == "roc" else [one.prevalence] * 2)
            value, low, high = part.loc["area", ["y", "low", "high"]]
            assert [text.get_text()[3:].strip() for text in axis.texts] == [f"{value:.2f} [{low:.2f}, {high:.2f}]"]
        assert "200 test images of 100 patients" in figure.caption


def test_reliability_is_that_of_laid_out_resamples() -> None:
    labels, scores = predictions(7, 150)
    groups = np.arange(150) // 3
    result = compute_reliability(labels, scores, Bootstrap(groups, 80, 2), bins=5)
    assert result.ece == pytest.approx(ece(labels, scores, bins=5), abs=1e-12)
    right, confidence = scores.argmax(axis=1) == labels, scores.max(axis=1)
    draws, checked = lay_out(groups, 80, 2), 0
    for row in result.table.itertuples():
        in_bin = (confidence > row.low) & (confidence <= row.high)
        assert (row.count, row.patients) == (in_bin.sum(), len(set(groups[in_bin])))
        if row.count:
            assert (row.confidence, row.accuracy) == pytest.approx((confidence[in_bin].mean(), right[in_bin].mean()))
        if 0 < row.accuracy < 1:
            checked += 1
            drawn = [right[rows][in_bin[rows]].mean() for rows in draws if in_bin[rows].any()]
            assert [row.accuracy_low, row.accuracy_high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    assert checked >= 2
    with pytest.raises(ValueError, match="bins must be at least 1"):
        compute_reliability(labels, scores, Bootstrap(groups, 2), bins=0)


def test_bins_in_which_all_resamples_agree_have_wilsons_interval_or_none() -> None:
    # Of the bins of .2, (.4, .6] holds one patient, half right; (.6, .8] three, all right; (.8, 1] two, none right.
    scores = two_class([0.45, 0.55, 0.7, 0.7, 0.7, 0.75, 0.9, 0.9])
    labels, groups = [1, 1, 1, 1, 1, 1, 0, 0], ["p", "p", "q", "q", "r", "s", "t", "u"]
    table = compute_reliability(labels, scores, Bootstrap(groups, 50), bins=5).table
    assert table["patients"].tolist() == [0, 0, 1, 3, 2]
    assert table["accuracy"].to_numpy() == pytest.approx([np.nan, np.nan, 0.5, 1, 0], nan_ok=True)
    bounds = table[["accuracy_low", "accuracy_high"]].to_numpy()
    assert np.isnan(bounds[:3]).all()
    assert bounds[3] == pytest.approx(wilson_interval(3, 3))
    assert bounds[4] == pytest.approx(wilson_interval(0, 2))
