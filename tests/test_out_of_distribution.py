import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from dualrefnet import Predictor
from dualrefnet.analysis.non_lesion_images import DOCUMENTS, MEDICAL, PHOTOGRAPHS, PLAIN
from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.analysis.out_of_distribution import (
    CLOSE_LESION,
    DIRECTIONS,
    EVERYDAY,
    LESIONS,
    SKIN,
    OutOfDistributionMeasured,
    draw_out_of_distribution,
    fit_score,
    measure_out_of_distribution,
    save_score,
    share_interval,
    summarise,
)
from dualrefnet.errors import DataError, RunError
from dualrefnet.evaluation.bootstrap import wilson_interval
from dualrefnet.models.inference import VectorKeeper, predict_logits
from dualrefnet.run import Run
from dualrefnet.runtime.out_of_distribution import OutOfDistributionScore


def vectors(number: int, length: int, seed: int) -> np.ndarray:
    """Return vectors as encoders give them: not negative, of unequal spread, correlated."""
    mixing = np.random.default_rng(99).normal(size=(length, length)) * np.linspace(2, 0.2, length)
    return np.maximum(np.random.default_rng(seed).normal(size=(number, length)) @ mixing.T + 3, 0)


@pytest.fixture(scope="module")
def fitted() -> OutOfDistributionScore:
    return fit_score(vectors(300, 80, 1), vectors(209, 80, 2))


def test_the_distance_of_few_numbers_is_that_of_ledoit_and_wolfs_covariance() -> None:
    train, held_out, new = vectors(200, 6, 1), vectors(50, 6, 2), vectors(30, 6, 3)
    distance = fit_score(train, held_out).vector
    # Five directions and what is beside them are all of six, so nothing is left out.
    assert len(distance.variances) == 5
    reference = LedoitWolf().fit(train)
    np.testing.assert_allclose(distance.measure(new) * distance.scale, reference.mahalanobis(new), rtol=1e-4)
    assert distance.scale == pytest.approx(reference.mahalanobis(held_out).std(), rel=1e-4)


@pytest.mark.parametrize(("number", "length"), [(40, 150), (300, 150)])
def test_the_distance_of_many_numbers_keeps_the_leading_directions_and_the_sum_of_the_variances(
    number: int, length: int
) -> None:
    train, new = vectors(number, length, 1), vectors(20, length, 3)
    distance = fit_score(train, vectors(50, length, 2)).vector
    kept = min(DIRECTIONS, number // 2)
    assert distance.directions.shape == (kept, length)
    np.testing.assert_allclose(distance.directions @ distance.directions.T, np.eye(kept), atol=1e-5)
    reference = LedoitWolf().fit(train).covariance_
    np.testing.assert_allclose(distance.variances, np.linalg.eigvalsh(reference)[::-1][:kept], rtol=1e-4)
    beside = np.eye(length) - distance.directions.T @ distance.directions
    covariance = distance.directions.T * distance.variances @ distance.directions + distance.rest * beside
    assert np.trace(covariance) == pytest.approx(np.trace(reference), rel=1e-4)
    centred = new - train.mean(axis=0)
    np.testing.assert_allclose(
        distance.measure(new) * distance.scale,
        np.einsum("ij,jk,ik->i", centred, np.linalg.inv(covariance), centred),
        rtol=1e-3,
    )


def test_the_score_adds_both_distances_and_is_one_at_the_limit(fitted: OutOfDistributionScore) -> None:
    new = vectors(10, 80, 5)
    roots = np.sqrt(new / new.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(
        fitted.score(new) * fitted.limit, fitted.vector.measure(new) + fitted.shares.measure(roots), rtol=1e-6
    )
    scores = np.sort(fitted.score(vectors(209, 80, 2)))
    # Of 209 the 206th is the limit: 206 is 98% of 210, rounded up.
    assert scores[205] == pytest.approx(1)
    assert (scores > 1 + 1e-9).sum() == 3


def test_new_photographs_are_warned_of_as_rarely_as_meant_and_others_often(fitted: OutOfDistributionScore) -> None:
    new = fitted.score(vectors(4000, 80, 6))
    assert 0.005 < (new > 1).mean() < 0.06
    # As strong as photographs, but in other places; and in the same places, but stronger.
    other = vectors(200, 80, 7)
    assert (fitted.score(other[:, ::-1]) > 1).mean() > 0.99
    assert (fitted.score(3 * other) > 1).mean() > 0.99


def test_a_vector_that_is_not_finite_has_no_score_and_disturbs_no_other(fitted: OutOfDistributionScore) -> None:
    rows = vectors(6, 80, 8)
    alone = fitted.score(rows)
    rows[1, 3], rows[4, 0] = np.nan, np.inf
    scores = fitted.score(rows)
    assert np.isnan(scores[[1, 4]]).all()
    np.testing.assert_array_equal(scores[[0, 2, 3, 5]], alone[[0, 2, 3, 5]])
    train, held_out = vectors(60, 80, 1), vectors(30, 80, 2)
    with_gaps = np.insert(train, 7, np.nan, axis=0), np.insert(held_out, 3, np.inf, axis=0)
    np.testing.assert_allclose(fit_score(*with_gaps).score(rows[:1]), fit_score(train, held_out).score(rows[:1]))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_neither_the_order_of_the_numbers_nor_their_unit_matters(seed: int, unit: float) -> None:
    train, held_out, new = (vectors(number, 30, seed + place) for place, number in enumerate((40, 30, 10)))
    scores = fit_score(train, held_out).score(new)
    order = np.random.default_rng(seed).permutation(30)
    np.testing.assert_allclose(fit_score(train[:, order], held_out[:, order]).score(new[:, order]), scores, rtol=1e-3)
    np.testing.assert_allclose(fit_score(train * unit, held_out * unit).score(new * unit), scores, rtol=1e-3)


def test_equal_vectors_and_vectors_of_nothing_are_borne() -> None:
    same = np.ones((30, 8))
    fitted = fit_score(same, same[:10])
    assert np.isfinite(fitted.score(np.vstack([same[:1], np.zeros((1, 8))]))).all()
    assert fitted.score(np.zeros((1, 8)))[0] > 1
    assert np.isfinite(fit_score(np.zeros((30, 8)), np.zeros((10, 8))).score(np.zeros((2, 8)))).all()


def test_unfit_input_is_refused(fitted: OutOfDistributionScore) -> None:
    with pytest.raises(ValueError, match="2 vectors"):
        fit_score(vectors(1, 5, 0), vectors(9, 5, 0))
    with pytest.raises(ValueError, match="2 vectors"):
        fit_score(vectors(9, 5, 0), vectors(9, 6, 0))
    with pytest.raises(ValueError, match=r"\(N, 80\)"):
        fitted.score(vectors(3, 81, 0))


def test_the_share_that_is_nearer_is_told(fitted: OutOfDistributionScore) -> None:
    scores = fitted.score(vectors(209, 80, 2))
    assert fitted.share_nearer(float(np.median(scores))) == pytest.approx(0.5, abs=0.01)
    assert [fitted.share_nearer(value) for value in (-1.0, float(scores.max()) + 1)] == [0, 1]
    assert 0.97 < fitted.share_nearer(1.0) < 1


def test_the_file_is_small_holds_no_photographs_vector_and_gives_the_same_scores(tmp_path: Path) -> None:
    train = vectors(300, 1280, 1).astype(np.float32)
    fitted = fit_score(train, vectors(100, 1280, 2))
    save_score(fitted, tmp_path / "score.safetensors")
    assert (tmp_path / "score.safetensors").stat().st_size < 1_000_000
    loaded, new = OutOfDistributionScore.load(tmp_path / "score.safetensors"), vectors(9, 1280, 3)
    np.testing.assert_array_equal(loaded.score(new), fitted.score(new))
    assert (loaded.training, loaded.validation, loaded.limit) == (300, 100, fitted.limit)
    kept = load_file(tmp_path / "score.safetensors")
    centred = train - train.mean(axis=0)
    likeness = kept["vector.directions"] @ centred.T / np.linalg.norm(centred, axis=1)
    assert np.abs(likeness).max() < 0.9


def test_a_damaged_or_foreign_file_says_what_to_do(tmp_path: Path, fitted: OutOfDistributionScore) -> None:
    run = Run(tmp_path)
    save_score(fitted, run.out_of_scope_file)
    complete = run.out_of_scope_file.read_bytes()
    assert run.out_of_scope.limit == fitted.limit
    for bad in (b"", complete[:100], complete[:-10], complete.replace(b'"format":"1"', b'"format":"9"')):
        run.out_of_scope_file.write_bytes(bad)
        with pytest.raises(RunError, match="dualrefnet evaluate"):
            _ = run.out_of_scope


@pytest.fixture(scope="module")
def opened(tiny_run: Run) -> OpenedRun:
    return open_run(tiny_run)


def test_vectors_are_kept_of_what_is_classified_and_the_answer_stays(opened: OpenedRun) -> None:
    examples = opened.image_examples("test")
    keeper = VectorKeeper(opened.model)
    arguments = (opened.recipe.image.size, opened.normalisation, opened.device)
    kept = predict_logits(keeper, examples.in_order(7), *arguments).logits
    assert torch.equal(kept, predict_logits(opened.model, examples.in_order(7), *arguments).logits)
    found = keeper.take()
    assert found is not None
    np.testing.assert_allclose(found, opened.vectors(examples, np.arange(len(examples))), atol=1e-5)
    assert found.shape == (len(examples), 1280)
    assert keeper.take() is None
    assert not opened.model.training


def test_evaluation_fits_the_score_and_counts_false_alarms(opened: OpenedRun) -> None:
    said = opened.run.metrics["out_of_scope"]
    examples = opened.image_examples("test")
    scores = opened.run.out_of_scope.score(opened.vectors(examples, np.arange(len(examples))))
    assert said["images"] == len(examples) == len(scores)
    assert said["false_alarms"] == (scores > 1).sum()
    assert said["false_alarm_rate"] == pytest.approx((scores > 1).mean())
    low, high = said["false_alarm_rate_ci95"]
    assert 0 <= low <= said["false_alarm_rate"] <= high <= 1
    sides = opened.split["split"].value_counts()
    assert (said["training"], said["validation"]) == (sides["train"], sides["val"])


def test_the_predictor_gives_the_score_of_the_evaluation(opened: OpenedRun) -> None:
    predictor = Predictor.load(opened.run)
    rows = opened.rows("test").head(5)
    scores = opened.run.out_of_scope.score(opened.vectors(opened.image_examples("test"), np.arange(5)))
    predictions = predictor.predict_many(list(rows["image_path"]), [{}] * 5)
    np.testing.assert_allclose([prediction.out_of_scope for prediction in predictions], scores, rtol=1e-4)


def test_the_predictor_warns_beyond_the_limit_and_only_there(
    opened: OpenedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, path = Predictor.load(opened.run), opened.rows("test")["image_path"].iloc[0]
    for value, warned in ((0.99, False), (1.01, True), (50.0, True)):
        monkeypatch.setattr(OutOfDistributionScore, "score", lambda _, rows, value=value: np.full(len(rows), value))
        prediction = predictor.predict(path, {})
        assert prediction.out_of_scope == value
        assert ("doesn't look like" in prediction.warnings[0]) is warned
    assert f"all {opened.run.out_of_scope.validation} validation images" in prediction.warnings[0]
    monkeypatch.setattr(OutOfDistributionScore, "score", lambda _, rows: np.full(len(rows), np.nan))
    assert predictor.predict(path, {}).out_of_scope is None


def test_an_older_run_says_once_that_it_has_no_check(
    tiny_run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    older = Run(shutil.copytree(tiny_run.path, tmp_path / "older"))
    older.out_of_scope_file.unlink()
    predictor = Predictor.load(older)
    picture = np.full((64, 64, 3), 99, np.uint8)
    prediction = predictor.predict_many([picture, picture], [{}, {}])[1]
    assert capfd.readouterr().err.count("no out-of-distribution score") == 1
    assert prediction.out_of_scope is None
    assert not any("doesn't look like" in warning for warning in prediction.warnings)
    with pytest.raises(RunError, match="dualrefnet evaluate"):
        _ = older.out_of_scope
    save_score(fit_score(vectors(9, 5, 0), vectors(9, 5, 1)), older.out_of_scope_file)
    with pytest.raises(RunError, match="another model"):
        Predictor.load(older)


def hand_made() -> pd.DataFrame:
    random = np.random.default_rng(0)
    parts = [
        (LESIONS, [f"p{number // 2}" for number in range(40)], random.uniform(0.2, 1.1, 40)),
        (PHOTOGRAPHS, [f"f{number // 4}" for number in range(24)], random.uniform(0.7, 5, 24)),
        (DOCUMENTS, [f"d{number // 4}" for number in range(24)], random.uniform(2, 5, 24)),
        (PLAIN, ["a", "a", "b", "b"], np.array([0.5, 2, 3, 4.0])),
        (MEDICAL, ["m"] * 4, np.array([0.5, 0.6, 2, 3])),
        (SKIN, [f"p{number}" for number in range(15)], random.uniform(0.4, 1.5, 15)),
        (CLOSE_LESION, [f"p{number}" for number in range(15)], random.uniform(0.3, 1.2, 15)),
    ]
    return pd.concat(
        [pd.DataFrame({"group": name, "source": source, "score": score}) for name, source, score in parts],
        ignore_index=True,
    )


def test_the_table_counts_and_ranks_each_group_against_the_lesions() -> None:
    scores = hand_made()
    table = summarise(scores, 300, 0).set_index("group")
    assert list(table.index) == [LESIONS, PHOTOGRAPHS, DOCUMENTS, PLAIN, EVERYDAY, MEDICAL, SKIN, CLOSE_LESION]
    lesions = scores.loc[scores["group"] == LESIONS, "score"]
    for name in (PHOTOGRAPHS, PLAIN, SKIN):
        values = scores.loc[scores["group"] == name, "score"]
        truth = np.r_[np.zeros(len(lesions)), np.ones(len(values))]
        assert table.loc[name, "auroc"] == pytest.approx(roc_auc_score(truth, np.r_[lesions, values]))
        assert table.loc[name, "flagged"] == pytest.approx((values > 1).mean())
    assert np.isnan(table.loc[LESIONS, "auroc"])
    assert table.loc[EVERYDAY, ["pictures", "sources"]].tolist() == [52, 14]
    for name in (PHOTOGRAPHS, EVERYDAY, SKIN):
        assert table.loc[name, "auroc_low"] < table.loc[name, "auroc"] < table.loc[name, "auroc_high"]
    # Two files are too few to draw from.
    assert table.loc[[PLAIN, MEDICAL], ["auroc_low", "auroc_high", "flagged_low", "flagged_high"]].isna().all(axis=None)


def test_intervals_draw_sources_not_pictures() -> None:
    # Ten sources of which half are flagged as wholes: as wide as for ten pictures, however many are cut of each.
    flagged = np.repeat([True, False], 5)
    low, high = share_interval(flagged, np.arange(10), 4000, 0)
    assert share_interval(np.repeat(flagged, 100), np.repeat(np.arange(10), 100), 4000, 0) == (low, high)
    # The binomial of ten: 2.5% and 97.5% points.
    assert (low, high) == (0.2, 0.8)
    assert share_interval(np.zeros(60, bool), np.repeat(np.arange(6), 10), 100, 0) == wilson_interval(0, 6)
    assert share_interval(np.ones(60, bool), np.repeat(np.arange(6), 10), 100, 0) == wilson_interval(6, 6)
    assert np.isnan(share_interval(flagged, np.repeat(np.arange(2), 5), 100, 0)).all()


seen: list[tuple[int, int]] = []


@pytest.fixture(scope="module")
def measured(opened: OpenedRun) -> OutOfDistributionMeasured:
    with pytest.MonkeyPatch.context() as patch:
        # Tests' pictures are small, and so is what can be cut out of them.
        patch.setattr("dualrefnet.analysis.non_lesion_images.LEAST_PIXELS", 8)
        patch.setattr("dualrefnet.analysis.non_lesion_images.CROPS", 2)
        return measure_out_of_distribution(
            opened, images=20, samples=100, progress=lambda done, total: seen.append((done, total))
        )


def test_a_run_is_measured_against_all_groups(opened: OpenedRun, measured: OutOfDistributionMeasured) -> None:
    scores = measured.scores
    counts = scores["group"].value_counts()
    assert counts[LESIONS] == measured.images == min(20, len(opened.image_examples("test")))
    assert counts[SKIN] == counts[CLOSE_LESION] > 0
    assert set(scores.loc[scores["group"] == SKIN, "source"]) <= set(scores.loc[scores["group"] == LESIONS, "source"])
    assert measured.skin_auroc is not None
    skin, close = (scores.loc[scores["group"] == name, "score"] for name in (SKIN, CLOSE_LESION))
    assert measured.skin_auroc[0] == pytest.approx(
        roc_auc_score(np.r_[np.ones(len(skin)), np.zeros(len(close))], np.r_[skin, close])
    )
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_without_masks_there_is_no_skin(opened: OpenedRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder of masks"):
        measure_out_of_distribution(opened, masks=tmp_path / "none", images=10)
    section_of = hand_made()[lambda table: ~table["group"].isin([SKIN, CLOSE_LESION])]
    assert SKIN not in set(summarise(section_of, 50, 0)["group"])


def test_the_figure_shows_every_score_and_no_source(measured: OutOfDistributionMeasured) -> None:
    pytest.importorskip("matplotlib")
    figure = draw_out_of_distribution(measured)
    assert list(figure.data.columns) == ["group", "score"]
    lines = [line for axis in figure.figure.axes for line in axis.lines if line.get_marker() != "None"]
    drawn = sorted(float(value) for line in lines for value in np.asarray(line.get_xdata()))
    assert drawn == pytest.approx(sorted(measured.scores["score"]))
