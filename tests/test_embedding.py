"""Class separation in the fused features, and its map."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import silhouette_samples, silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from dualrefnet.analysis.embedding import (
    MEASURES,
    EmbeddingComparison,
    Features,
    compare_embeddings,
    draw_embedding,
    draw_separation,
    embed,
    embed_features,
    measure_separation,
    neighbours_right,
)
from dualrefnet.analysis.opened_run import open_run
from dualrefnet.errors import RunError
from dualrefnet.run import Run
from readable import assert_readable

CLASSES = ("A", "B", "C")


def features(
    values: NDArray[np.floating], labels: NDArray[np.int64], groups: NDArray[np.int64] | None = None, name: str = "run"
) -> Features:
    ids = tuple(f"image {number}" for number in range(len(labels)))
    return Features(
        name, CLASSES, ids, labels, np.arange(len(labels)) if groups is None else groups, values.astype(np.float32)
    )


def blobs(apart: float, seed: int = 0, images: int = 90) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Return unequal classes whose centres are `apart` along axes of very unlike scale."""
    labels = np.repeat([0, 1, 2], [images // 2, images // 3, images - images // 2 - images // 3])
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(images, 6)) + apart * np.eye(6)[labels]) * [1, 10, 100, 1, 1, 1] + 5, labels


def test_classes_far_apart_have_right_neighbours_and_sklearns_silhouette() -> None:
    values, labels = blobs(apart=30)
    (found,) = embed_features([features(values, labels)], images=90, samples=20)
    standardised = StandardScaler().fit_transform(values.astype(np.float32).astype(float))
    by_image = silhouette_samples(standardised, labels)
    assert found.value("knn_balanced_accuracy").value == 1
    assert found.value("silhouette").value == pytest.approx(silhouette_score(standardised, labels), abs=1e-9)
    assert found.value("silhouette_balanced").value == pytest.approx(
        np.mean([by_image[labels == label].mean() for label in range(3)]), abs=1e-9
    )
    # Classes of unlike size and spread: the two means are not the same number.
    assert found.value("silhouette").value != pytest.approx(found.value("silhouette_balanced").value, abs=1e-4)
    assert found.value("silhouette").value > 0.35


def test_an_images_own_patient_is_no_neighbour() -> None:
    # Every patient has 6 images in one place, far from all others of the class; the next patients are of the other
    # class.
    places, labels, groups = [], [], []
    for patient in range(8):
        for image in range(6):
            places.append([10.0 * patient + 0.01 * image, 0.1 * image])
            labels.append(patient % 2)
            groups.append(patient)
    points, truth = np.array(places), np.array(labels)
    # With the own patient among them all neighbours would be right.
    assert (KNeighborsClassifier(5).fit(points, truth).predict(points) == truth).all()
    assert not neighbours_right(points, truth, np.array(groups)).any()
    measured = measure_separation({"run": points}, truth, groups, samples=10)
    assert measured.value("run", "knn_balanced_accuracy").value == 0


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), images=st.integers(3, 30), patients=st.integers(2, 8))
def test_neighbours_are_those_of_a_plain_search(seed: int, images: int, patients: int) -> None:
    generator = np.random.default_rng(seed)
    points, labels = generator.normal(size=(images, 3)), generator.integers(3, size=images)
    groups = np.concatenate([[0, 1], generator.integers(patients, size=images)])[:images]
    expected = []
    for place in range(images):
        others = [other for other in range(images) if groups[other] != groups[place]]
        nearest = sorted(others, key=lambda other: float(((points[other] - points[place]) ** 2).sum()))[:5]
        votes = [labels[other] for other in nearest]
        winner = max(votes, key=lambda label: (votes.count(label), -votes.index(label)))
        expected.append(winner == labels[place])
    assert neighbours_right(points, labels, groups).tolist() == expected


def test_intervals_are_those_of_laid_out_samples_of_patients() -> None:
    values, labels = blobs(apart=2)
    generator = np.random.default_rng(3)
    # Patients with one class each, so that a class can vanish from a sample.
    groups = np.where(labels == 2, 100 + np.arange(len(labels)) % 2, generator.integers(20, size=len(labels)))
    found = measure_separation({"run": values}, labels, groups, samples=50, seed=5)
    silhouette, right = silhouette_samples(values, labels), neighbours_right(values, labels, pd.factorize(groups)[0])
    names = pd.unique(groups)
    drawn = np.random.default_rng(5).multinomial(len(names), np.full(len(names), 1 / len(names)), size=50)
    expected: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for times in drawn:
        rows = np.concatenate(
            [np.flatnonzero(groups == name) for name, often in zip(names, times, strict=True) for _ in range(often)]
        )
        expected["silhouette"].append(silhouette[rows].mean())
        present = np.unique(labels[rows])
        expected["silhouette_balanced"].append(
            np.mean([silhouette[rows][labels[rows] == label].mean() for label in present])
        )
        expected["knn_balanced_accuracy"].append(
            np.mean([right[rows][labels[rows] == label].mean() for label in present])
        )
    assert any(2 not in labels[np.isin(groups, names[times > 0])] for times in drawn)
    for measure, numbers in expected.items():
        assert found.drawn["run"][measure] == pytest.approx(np.array(numbers))
        value = found.value("run", measure)
        assert (value.low, value.high) == pytest.approx(tuple(np.quantile(numbers, [0.025, 0.975])))
    assert (found.groups, found.images, found.samples) == (22, 90, 50)


def test_runs_that_can_not_be_mapped_are_refused_in_words() -> None:
    values, labels = blobs(apart=2)
    cases = {
        "aren't finite": features(np.where(np.arange(90)[:, None] == 3, np.nan, values), labels),
        "the same for all images": features(np.ones((90, 6)), labels),
        "at least 5 test images": features(values, np.zeros(90, dtype=int)),
        "and 2 patients": features(values, labels, np.zeros(90, dtype=int)),
    }
    for message, case in cases.items():
        with pytest.raises(RunError, match=message):
            embed_features([case], images=90, samples=10)


def test_the_better_run_is_named_and_a_tie_is_called_one() -> None:
    near, labels = blobs(apart=1, images=300)
    far, _ = blobs(apart=30, images=300)
    worse, better = embed_features(
        [features(near, labels, name="near"), features(far, labels, name="far")], images=300, samples=200
    )
    comparison = EmbeddingComparison(worse, better)
    found = comparison.difference("silhouette")
    assert found.value == pytest.approx(worse.value("silhouette").value - better.value("silhouette").value)
    assert found.low < found.value < found.high < 0
    assert comparison.better("silhouette") is better
    assert "far separates the classes better (near" in comparison.sentence("silhouette")
    assert EmbeddingComparison(better, worse).better("silhouette") is better
    # The same features, but for a little noise.
    noisy = near + 0.3 * np.random.default_rng(5).normal(size=near.shape)
    first, second = embed_features(
        [features(near, labels, name="near"), features(noisy, labels, name="noisy")], images=300, samples=200
    )
    tie = EmbeddingComparison(first, second)
    found = tie.difference("knn_balanced_accuracy")
    assert found.low <= 0 <= found.high
    assert tie.better("knn_balanced_accuracy") is None
    assert "there is no clear difference" in tie.sentence("knn_balanced_accuracy")


def test_features_of_a_run_are_what_its_model_classifies(tiny_run: Run) -> None:
    opened = open_run(tiny_run, device=torch.device("cpu"))
    examples = opened.examples("test")
    calls: list[tuple[int, int]] = []
    found = embed(opened, samples=20, name="tiny", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (len(examples), len(examples))
    assert found.images == len(found.table) == len(examples)
    assert found.table["image_id"].tolist() == list(examples.image_ids)
    assert found.unit == "patient"
    one_by_one = []
    with torch.inference_mode():
        for row in range(len(examples)):
            batch = examples.batch(np.array([row]))
            one_by_one.append(opened.model(opened.images(batch), batch.metadata).features.numpy()[0])
    values = np.array(one_by_one, dtype=float)
    values = values[:, np.ptp(values, axis=0) > 1e-5 * np.abs(values).max(axis=0)]
    standardised = StandardScaler().fit_transform(values)
    assert found.dimensions == values.shape[1]
    assert found.value("silhouette").value == pytest.approx(silhouette_score(standardised, examples.labels), abs=1e-3)
    groups = opened.groups.loc[list(examples.image_ids)].to_numpy()
    assert found.separation.groups == len(set(groups))
    right = neighbours_right(standardised, examples.labels, pd.factorize(groups)[0])
    by_class = [right[examples.labels == label].mean() for label in np.unique(examples.labels)]
    assert found.value("knn_balanced_accuracy").value == pytest.approx(np.mean(by_class), abs=0.05)


def test_two_runs_are_compared_on_the_images_that_both_tested(tiny_run: Run, tmp_path: Path) -> None:
    device = torch.device("cpu")
    opened = open_run(tiny_run, device=device)
    copy = Run(shutil.copytree(tiny_run.path, tmp_path / "copy"))
    # In another order, and with one patient fewer on the test side.
    split = copy.split
    gone = split.loc[split["split"] == "test", "patient_id"].iloc[0]
    split.loc[split["patient_id"] == gone, "split"] = "val"
    split.iloc[::-1].to_csv(copy.path / "split.csv", index=False)
    calls: list[tuple[int, int]] = []
    found = compare_embeddings(
        opened, open_run(copy, device=device), samples=20, progress=lambda *done: calls.append(done)
    )
    expected = [image for image in opened.examples("test").image_ids if opened.groups[image] != gone]
    for run, name in ((found.first, "tiny"), (found.second, "copy")):
        assert run.table["image_id"].tolist() == expected
        assert (run.name, run.images) == (name, len(expected))
        assert run.table["run"].unique().tolist() == [name]
    assert calls[-1] == (2 * len(expected), 2 * len(expected))
    for measure in MEASURES:
        difference = found.difference(measure)
        assert (difference.value, difference.low, difference.high) == pytest.approx((0, 0, 0), abs=1e-3)
    named = compare_embeddings(opened, open_run(copy, device=device), samples=5, names=("this", "that"))
    assert named.second.value("silhouette").value == pytest.approx(found.second.value("silhouette").value)
    with pytest.raises(RunError, match="can't be compared with itself"):
        compare_embeddings(opened, opened)


def test_maps_and_separations_of_two_runs_are_drawn() -> None:
    near, labels = blobs(apart=1)
    far, _ = blobs(apart=9)
    name = "pad_ufes_20-dualrefnet-efficientnet_lite0-metadata-auxiliary-R-fold4-seed0"
    runs = embed_features([features(near, labels, name="near"), features(far, labels, name=name)], 1000, samples=50)
    comparison = EmbeddingComparison(*runs)
    maps, separation = draw_embedding(*runs), draw_separation(comparison)
    assert_readable(maps)
    assert_readable(separation)
    pd.testing.assert_frame_equal(maps.data, pd.concat([run.table for run in runs]))
    for axis, run in zip(maps.figure.axes, runs, strict=True):
        for dots in axis.collections:
            places = run.table.loc[run.table["class"] == dots.get_label(), ["x", "y"]].to_numpy()
            assert np.asarray(dots.get_offsets()) == pytest.approx(places)
    for row in separation.data.to_dict("records"):
        found = next(run for run in runs if run.name == row["run"]).value(row["measure"])
        assert (row["value"], row["low"], row["high"]) == (found.value, found.low, found.high)
    assert len(draw_embedding(runs[0]).figure.axes) == 1
