import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from dualrefnet import Predictor
from dualrefnet.analysis.non_lesion_images import DOCUMENTS, MEDICAL, PHOTOGRAPHS, PLAIN
from dualrefnet.analysis.opened_run import OpenedRun
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
    summarise,
)
from dualrefnet.deploy.network import TorchNetwork
from dualrefnet.errors import RunError
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
    distance = fit_score(train, held_out).distances[0][0]
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
    distance = fit_score(train, vectors(50, length, 2)).distances[0][0]
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
    [(vector, shares)] = fitted.distances
    np.testing.assert_allclose(fitted.score(new) * fitted.limit, vector.measure(new) + shares.measure(roots), rtol=1e-6)
    scores = np.sort(fitted.score(vectors(209, 80, 2)))
    # Of 209 the 206th is the limit: 206 is 98% of 210, rounded up.
    assert scores[205] == pytest.approx(1)
    assert (scores > 1 + 1e-9).sum() == 3
    assert fitted.share_nearer(float(np.median(scores))) == pytest.approx(0.5, abs=0.01)
    assert [fitted.share_nearer(value) for value in (-1.0, float(scores.max()) + 1)] == [0, 1]


def test_new_photographs_are_warned_of_as_rarely_as_meant_and_others_often(fitted: OutOfDistributionScore) -> None:
    new = fitted.score(vectors(4000, 80, 6))
    assert 0.005 < (new > 1).mean() < 0.06
    # As strong as photographs, but in other places; and in the same places, but stronger.
    other = vectors(200, 80, 7)
    assert (fitted.score(other[:, ::-1]) > 1).mean() > 0.99
    assert (fitted.score(3 * other) > 1).mean() > 0.99


def test_unfit_input_is_refused(fitted: OutOfDistributionScore) -> None:
    with pytest.raises(ValueError, match="2 vectors"):
        fit_score(vectors(1, 5, 0), vectors(9, 5, 0))
    with pytest.raises(ValueError, match="2 vectors"):
        fit_score(vectors(9, 5, 0), vectors(9, 6, 0))
    with pytest.raises(ValueError, match=r"\(N, 80\)"):
        fitted.score(vectors(3, 81, 0))


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


def test_vectors_of_the_predictor_are_those_of_the_run(opened: OpenedRun) -> None:
    examples = opened.image_examples("test")
    network = TorchNetwork(opened.model, opened.recipe.image.size, opened.normalisation, opened.device)
    images = examples.batch(np.arange(7)).images.permute(0, 2, 3, 1).numpy()
    output = network(images, None, examples.metadata[:7])
    np.testing.assert_allclose(output.vectors, opened.vectors(examples, np.arange(7)), atol=1e-5)
    expected = opened.model(opened.encode(examples.batch(np.arange(7))), torch.from_numpy(examples.metadata[:7]))
    np.testing.assert_allclose(output.logits, expected.logits.detach(), atol=1e-5)


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


def test_the_predictor_warns_beyond_the_limit_and_only_there(
    opened: OpenedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, paths = Predictor.load(opened.run), list(opened.rows("test")["image_path"].head(5))
    scores = opened.run.out_of_scope.score(opened.vectors(opened.image_examples("test"), np.arange(5)))
    predictions = predictor.predict_many(paths, [{}] * 5)
    np.testing.assert_allclose([prediction.out_of_scope for prediction in predictions], scores, rtol=1e-4)
    for value, warned in ((0.99, False), (1.01, True), (50.0, True)):
        monkeypatch.setattr(OutOfDistributionScore, "score", lambda _, rows, value=value: np.full(len(rows), value))
        prediction = predictor.predict(paths[0], {})
        assert prediction.out_of_scope == value
        assert ("doesn't look like" in prediction.warnings[0]) is warned
    assert f"all {opened.run.out_of_scope.validation} validation images" in prediction.warnings[0]
    monkeypatch.setattr(OutOfDistributionScore, "score", lambda _, rows: np.full(len(rows), np.nan))
    assert predictor.predict(paths[0], {}).out_of_scope is None


def test_a_run_without_the_score_says_so_once_and_with_every_prediction(
    tiny_run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    older = Run(shutil.copytree(tiny_run.path, tmp_path / "older"))
    older.out_of_scope_file.unlink()
    predictor = Predictor.load(older)
    image = np.full((64, 64, 3), 99, np.uint8)
    for prediction in predictor.predict_many([image, image], [{}, {}]):
        assert prediction.out_of_scope is None
        assert "not checked" in prediction.warnings[0]
    assert capfd.readouterr().err.count("no out-of-distribution score") == 1
    with pytest.raises(RunError, match="dualrefnet evaluate"):
        _ = older.out_of_scope
    save_score(fit_score(vectors(9, 5, 0), vectors(9, 5, 1)), older.out_of_scope_file)
    with pytest.raises(RunError, match="another model"):
        Predictor.load(older)


def hand_made() -> pd.DataFrame:
    random = np.random.default_rng(0)
    # Group -> images, images a source, lowest and highest score.
    parts = {LESIONS: (40, 2, 0.2, 1.1), PHOTOGRAPHS: (24, 4, 0.7, 5), DOCUMENTS: (24, 4, 2, 5), PLAIN: (4, 2, 0.5, 4)}
    parts |= {MEDICAL: (4, 4, 0.5, 3), SKIN: (15, 1, 0.4, 1.5), CLOSE_LESION: (15, 1, 0.3, 1.2)}
    tables = []
    for name, (images, each, low, high) in parts.items():
        # Crops are of the patients of the test images.
        owner = LESIONS if name in (SKIN, CLOSE_LESION) else name
        sources = [f"{owner} {number // each}" for number in range(images)]
        tables.append(pd.DataFrame({"group": name, "source": sources, "score": random.uniform(low, high, images)}))
    return pd.concat(tables, ignore_index=True)


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


@pytest.fixture(scope="module")
def measured(opened: OpenedRun) -> OutOfDistributionMeasured:
    with pytest.MonkeyPatch.context() as patch:
        # Tests' pictures are small, and so is what can be cut out of them.
        patch.setattr("dualrefnet.analysis.non_lesion_images.LEAST_PIXELS", 8)
        patch.setattr("dualrefnet.analysis.non_lesion_images.CROPS", 2)
        return measure_out_of_distribution(opened, images=20, samples=100)


def test_a_run_is_measured_against_all_groups(opened: OpenedRun, measured: OutOfDistributionMeasured) -> None:
    scores = measured.scores
    counts = scores["group"].value_counts()
    assert counts[LESIONS] == measured.images == min(20, len(opened.image_examples("test")))
    assert counts[SKIN] == counts[CLOSE_LESION] > 0
    assert set(scores.loc[scores["group"] == SKIN, "source"]) <= set(scores.loc[scores["group"] == LESIONS, "source"])
    assert measured.skin_auroc is not None
    skin, close = (scores.loc[scores["group"] == name, "score"] for name in (SKIN, CLOSE_LESION))
    assert measured.skin_auroc.value == pytest.approx(
        roc_auc_score(np.r_[np.ones(len(skin)), np.zeros(len(close))], np.r_[skin, close])
    )


def test_the_figure_shows_every_score_and_no_source(measured: OutOfDistributionMeasured) -> None:
    pytest.importorskip("matplotlib")
    figure = draw_out_of_distribution(measured)
    assert list(figure.data.columns) == ["group", "score"]
    lines = [line for axis in figure.figure.axes for line in axis.lines if line.get_marker() != "None"]
    drawn = sorted(float(value) for line in lines for value in np.asarray(line.get_xdata()))
    assert drawn == pytest.approx(sorted(measured.scores["score"]))
