"""Class separation in the fused features, and its map."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from dualrefnet.analysis import embedding as separation
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
from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.errors import RunError
from dualrefnet.recipe import load_recipe
from dualrefnet.run import Run
from readable import assert_readable

CLASSES = ("A", "B", "C")


def features(
    values: NDArray[np.floating],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64] | None = None,
    name: str = "run",
    hidden: NDArray[np.floating] | None = None,
) -> Features:
    ids = tuple(f"image {number}" for number in range(len(labels)))
    patients = np.arange(len(labels)) if groups is None else groups
    fused = values.astype(np.float32)
    return Features(name, CLASSES, ids, labels, patients, fused, fused if hidden is None else hidden.astype(np.float32))


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
    by_class = [by_image[labels == label].mean() for label in range(3)]
    assert found.value("knn_balanced_accuracy", "fused").value == 1
    assert found.value("silhouette", "fused").value == pytest.approx(by_image.mean(), abs=1e-9)
    assert found.value("silhouette_balanced", "fused").value == pytest.approx(np.mean(by_class), abs=1e-9)
    # Classes of unlike size and spread: the two means are not the same number.
    assert by_image.mean() != pytest.approx(np.mean(by_class), abs=1e-4)
    assert by_image.mean() > 0.35


def test_an_images_own_patient_is_no_neighbour() -> None:
    # Every patient has 6 images in one place, far from all others of the class; the next patients are of the other
    # class.
    groups, image = np.repeat(np.arange(8), 6), np.tile(np.arange(6), 8)
    points, labels = np.stack([10.0 * groups + 0.01 * image, 0.1 * image], axis=1), groups % 2
    # With the own patient among them all neighbours would be right.
    assert (KNeighborsClassifier(5).fit(points, labels).predict(points) == labels).all()
    measured = measure_separation({"run": points}, labels, groups, samples=10)
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
    # The third class has two patients of its own, so that it can vanish from a sample.
    groups = np.where(labels == 2, 100 + np.arange(len(labels)) % 2, generator.integers(20, size=len(labels)))
    other = values + generator.normal(size=values.shape)
    found = measure_separation({"run": values, "other": other}, labels, groups, samples=50, seed=5)
    names = pd.unique(groups)
    drawn = np.random.default_rng(5).multinomial(len(names), np.full(len(names), 1 / len(names)), size=50)
    samples = [
        np.concatenate(
            [np.tile(np.flatnonzero(groups == name), often) for name, often in zip(names, times, strict=True)]
        )
        for times in drawn
    ]
    assert any(2 not in labels[rows] for rows in samples)
    laid_out: dict[str, pd.DataFrame] = {}
    for run, space in (("run", values), ("other", other)):
        silhouette = silhouette_samples(space, labels)
        right = neighbours_right(space, labels, pd.factorize(groups)[0])
        own = np.stack([space[labels == label].mean(axis=0) for label in labels])
        distance = ((space - own) ** 2).sum(axis=1) / ((space - space.mean(axis=0)) ** 2).sum(axis=1).mean()
        table = []
        for rows in samples:
            of_class = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
            balanced = [np.mean([one[rows].mean() for rows in of_class]) for one in (silhouette, distance, right)]
            table.append([silhouette[rows].mean(), *balanced])
        laid_out[run] = pd.DataFrame(table, columns=list(MEASURES))
    for measure in MEASURES:
        expected = laid_out["run"][measure].to_numpy()
        assert found.drawn["run"][measure] == pytest.approx(expected)
        value, difference = found.value("run", measure), found.difference("run", "other", measure)
        assert (value.low, value.high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))
        # Paired: both runs with the same samples.
        bounds = np.quantile(expected - laid_out["other"][measure].to_numpy(), [0.025, 0.975])
        assert (difference.low, difference.high) == pytest.approx(tuple(bounds))
    assert found.groups == 22


def test_units_and_dimensions_that_do_not_vary_change_nothing() -> None:
    values, labels = blobs(apart=2)
    noise = 7 + 1e-6 * np.random.default_rng(0).normal(size=(90, 1))
    changed = np.hstack([values * [1000, 1, 1, 1, 0.01, 1] + 3, np.zeros((90, 1)), noise])
    runs = embed_features(
        [features(values, labels, name="plain"), features(changed, labels, name="changed")], images=90, samples=20
    )
    assert [run.dimensions for run in runs] == [{"fused": 6}, {"fused": 6}]
    for measure in MEASURES:
        assert runs[0].value(measure, "fused").value == pytest.approx(runs[1].value(measure, "fused").value, abs=1e-4)


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
    # The same features, but for a little noise.
    noisy = near + 0.3 * np.random.default_rng(5).normal(size=near.shape)
    runs = [features(values, labels, name=name) for name, values in (("near", near), ("far", far), ("noisy", noisy))]
    worse, better, same = embed_features(runs, images=300, samples=200)
    found = EmbeddingComparison(worse, better).difference("silhouette", "fused")
    values = (worse.value("silhouette", "fused").value, better.value("silhouette", "fused").value)
    assert found.value == pytest.approx(values[0] - values[1])
    assert found.low < found.value < found.high < 0
    compact = EmbeddingComparison(worse, better).difference("within_class_variance", "fused")
    assert compact.low > 0, "classes nearer to each other are less compact"
    for pair in ((worse, better), (better, worse)):
        both = EmbeddingComparison(*pair)
        assert [both.better(measure, "fused") for measure in MEASURES] == ["far"] * len(MEASURES)
    tie = EmbeddingComparison(worse, same)
    found = tie.difference("knn_balanced_accuracy", "fused")
    assert found.low <= 0 <= found.high
    assert tie.better("knn_balanced_accuracy", "fused") == ""


def test_both_vectors_are_measured_where_a_run_has_a_hidden_layer() -> None:
    (fused, labels), (hidden, _) = blobs(apart=1, images=120), blobs(apart=20, images=120)
    one = features(fused, labels, name="one", hidden=hidden)
    (alone,) = embed_features([one], images=120, samples=20)
    assert alone.vectors == ["fused", "hidden"]
    assert alone.test_images == 120
    assert alone.table["vector"].value_counts().to_dict() == {"fused": 120, "hidden": 120}
    for vector, values in (("fused", fused), ("hidden", hidden)):
        space = StandardScaler().fit_transform(values.astype(np.float32).astype(float))
        within = np.mean([space[labels == label].var(axis=0).sum() / space.shape[1] for label in range(3)])
        assert alone.value("within_class_variance", vector).value == pytest.approx(within, abs=1e-9)
        assert alone.value("silhouette", vector).value == pytest.approx(silhouette_samples(space, labels).mean())
    # A network without a hidden layer beside one that has one: its fused features are looked at twice.
    first, second = embed_features([one, features(fused, labels, name="two")], images=120, samples=20)
    assert second.value("silhouette", "hidden") == second.value("silhouette", "fused")
    both = EmbeddingComparison(first, second)
    assert both.difference("silhouette", "fused").value == 0
    assert (both.better("silhouette", "hidden"), both.better("silhouette", "fused")) == ("one", "")


def test_features_of_a_run_are_what_its_model_classifies(opened: OpenedRun) -> None:
    examples = opened.examples("test")
    found = embed(opened, samples=20)
    assert found.images == found.test_images == len(examples)
    assert found.table["image_id"].tolist() == 2 * list(examples.image_ids)
    assert (found.name, found.unit) == ("tiny", "patient")
    batch = examples.batch(np.arange(len(examples)))
    with torch.inference_mode():
        output = opened.model(opened.images(batch), batch.metadata)
    groups = opened.groups.loc[list(examples.image_ids)].to_numpy()
    assert found.separation.groups == len(set(groups))
    for vector, tensor in (("fused", output.features), ("hidden", output.hidden)):
        values = tensor.double().numpy()
        values = values[:, np.ptp(values, axis=0) > 1e-5 * np.abs(values).max(axis=0)]
        assert found.dimensions[vector] == values.shape[1]
        space = {"run": StandardScaler().fit_transform(values)}
        expected = measure_separation(space, examples.labels, groups, samples=20).value("run", "silhouette")
        assert found.value("silhouette", vector).value == pytest.approx(expected.value, abs=1e-3)
    # Stored features of a frozen encoder are the same ones.
    frozen = replace(opened, recipe=load_recipe(opened.recipe, {"training.encoder": "frozen"}))
    assert frozen.examples("test").features
    stored = embed(frozen, samples=20)
    assert stored.value("silhouette", "fused").value == pytest.approx(
        found.value("silhouette", "fused").value, abs=1e-4
    )


def test_two_runs_are_compared_on_the_images_that_both_tested(opened: OpenedRun, tmp_path: Path) -> None:
    copy = Run(shutil.copytree(opened.run.path, tmp_path / "copy"))
    # In another order, and with one patient fewer in the test split.
    split = copy.split
    gone = split.loc[split["split"] == "test", "patient_id"].iloc[0]
    split.loc[split["patient_id"] == gone, "split"] = "val"
    split.iloc[::-1].to_csv(copy.path / "split.csv", index=False)
    second = open_run(copy, device=opened.device)
    found = compare_embeddings(opened, second, ("tiny", "copy"), samples=20)
    expected = [image for image in opened.examples("test").image_ids if opened.groups[image] != gone]
    for run, name in ((found.first, "tiny"), (found.second, "copy")):
        assert run.table["image_id"].tolist() == 2 * expected
        assert (run.name, run.images) == (name, len(expected))
        assert run.table["run"].unique().tolist() == [name]
    for measure in MEASURES:
        difference = found.difference(measure, "hidden")
        assert (difference.value, difference.low, difference.high) == pytest.approx((0, 0, 0), abs=1e-3)


def test_thousands_of_images_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = blobs(apart=3, images=3000)
    groups = np.arange(3000) // 3
    whole = measure_separation({"run": values}, labels, groups, samples=5)
    # 40 rows of distances at a time.
    monkeypatch.setattr(separation, "MEMORY", 1)
    parts = measure_separation({"run": values}, labels, groups, samples=5)
    for measure in MEASURES:
        assert parts.value("run", measure).value == pytest.approx(whole.value("run", measure).value, abs=1e-12)


def test_maps_and_separations_of_two_runs_are_drawn() -> None:
    near, labels = blobs(apart=1)
    far, _ = blobs(apart=9)
    name = "pad_ufes_20-dualrefnet-efficientnet_lite0-metadata-auxiliary-R-fold4-seed0"
    parts = [features(near, labels, name="near", hidden=far), features(far, labels, name=name)]
    runs = embed_features(parts, 1000, samples=50)
    comparison = EmbeddingComparison(*runs)
    maps, separation = draw_embedding(*runs), draw_separation(comparison)
    assert_readable(maps)
    assert_readable(separation)
    pd.testing.assert_frame_equal(maps.data, pd.concat([run.table for run in runs]))
    for row in separation.data.to_dict("records"):
        run = next(run for run in runs if run.name == row["run"])
        found = run.value(row["measure"], row["vector"])
        assert (row["value"], row["low"], row["high"]) == (found.value, found.low, found.high)
    assert len(maps.figure.axes) == 4
    assert len(draw_embedding(runs[0]).figure.axes) == 2
    (plain,) = embed_features([features(near, labels)], 90, samples=20)
    assert len(draw_embedding(plain).figure.axes) == 1
