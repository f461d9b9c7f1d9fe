"""Shapley values of a run: sums, words, seeds, and every way that a method reads a photograph."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dualrefnet.analysis import shap as shapley
from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.analysis.shap import MetadataShap, explain_metadata
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.errors import RunError
from dualrefnet.models.base import Method
from dualrefnet.models.registry import new_model
from dualrefnet.recipe import MetadataSection, Recipe, load_recipe
from dualrefnet.run import Run
from dualrefnet.training.train import train_recipe


@torch.inference_mode()
def outspoken(opened: OpenedRun, model: Method) -> Method:
    """Of a model that has learned little, a copy whose answers differ: every class's logit has mean 0 and sd 3 over
    the test side.
    """
    loud = copy.deepcopy(model).eval()
    pictures = opened.pictures("test")
    batch = pictures.batch(np.arange(len(pictures)))
    # Each photograph with its own form and with three others.
    images, forms = opened.images(batch), torch.cat([batch.metadata.roll(shift, dims=0) for shift in range(4)])
    logits = loud(None if images is None else images.repeat(4, 1, 1, 1), forms).logits
    mean, spread = logits.mean(dim=0), logits.std(dim=0)
    loud.register_forward_hook(lambda _, __, output: output._replace(logits=3 * (output.logits - mean) / spread))
    return loud


@pytest.fixture(scope="module")
def opened(tiny_run: Run) -> OpenedRun:
    as_trained = open_run(tiny_run)
    return replace(as_trained, model=outspoken(as_trained, as_trained.model))


@pytest.fixture(scope="module")
def by_field(opened: OpenedRun) -> MetadataShap:
    return explain_metadata(opened, images=10, background=8, permutations=2)


def test_base_and_values_add_up_to_what_the_run_predicted(tiny_run: Run) -> None:
    result = explain_metadata(open_run(tiny_run), images=10, background=4, permutations=1)
    written = tiny_run.predictions.set_index("image_id").loc[list(result.image_ids)]
    np.testing.assert_allclose(result.prediction, written[[f"prob_{name}" for name in result.classes]], atol=1e-5)
    np.testing.assert_allclose(result.base + result.values.sum(axis=1), result.prediction, atol=1e-6)
    assert [result.classes[label] for label in result.labels] == written["label"].tolist()


def test_what_one_class_gains_the_others_lose(opened: OpenedRun, by_field: MetadataShap) -> None:
    np.testing.assert_allclose(by_field.base + by_field.values.sum(axis=1), by_field.prediction, atol=1e-5)
    np.testing.assert_allclose(by_field.values.sum(axis=2), 0, atol=1e-5)
    assert by_field.values.shape == by_field.errors.shape == (10, 22, 6)
    assert by_field.values.dtype == np.float32
    assert np.abs(by_field.values).max() > 0.01
    assert np.ptp(by_field.prediction, axis=0).max() > 0.01
    assert (by_field.side, by_field.images_in_all, by_field.background) == ("test", len(opened.examples("test")), 8)


@torch.inference_mode()
def test_the_base_is_the_mean_of_this_photograph_with_the_forms_of_training_patients(opened: OpenedRun) -> None:
    result = explain_metadata(opened, images=6, background=10_000, permutations=1)
    train = torch.from_numpy(opened.examples("train").metadata)
    assert result.background == len(train)
    pictures = opened.pictures("test")
    for row, image_id in enumerate(result.image_ids[:2]):
        image = opened.images(pictures.batch(np.array([pictures.image_ids.index(image_id)])))
        assert image is not None
        probabilities = opened.model(image.expand(len(train), -1, -1, -1), train).logits.softmax(dim=1)
        np.testing.assert_allclose(result.base[row], probabilities.mean(dim=0), atol=1e-5)
    assert np.abs(result.base[0] - result.base[1]).max() > 1e-3


def test_the_words_are_those_of_the_lesion_table(opened: OpenedRun, by_field: MetadataShap) -> None:
    rows = opened.dataset.table.set_index("image_id").loc[list(by_field.image_ids)]
    names = [player.name for player in by_field.players]
    assert [words[names.index("age")] for words in by_field.words] == [f"{age:g} years" for age in rows["age"]]
    assert [words[names.index("region")] for words in by_field.words] == rows["region"].tolist()
    spelt = {"True": "yes", "False": "no"}
    assert [words[names.index("smoke")] for words in by_field.words] == [
        spelt.get(value, "not recorded, imputed") for value in rows["smoke"]
    ]
    gaps = rows[["smoke", "diameter_1"]].isna()
    assert gaps.to_numpy().any()
    assert not gaps.to_numpy().all()
    np.testing.assert_array_equal(by_field.answered[:, [names.index("smoke"), names.index("diameter_1")]], ~gaps)
    empty = rows["smoke"].isna().to_numpy()
    assert {by_field.words[row][-1] for row in np.flatnonzero(empty)} == {"13 of 13"}
    assert by_field.players[-1].kind == "missing"


def test_columns_share_out_the_same_difference_as_fields(opened: OpenedRun, by_field: MetadataShap) -> None:
    by_column = explain_metadata(opened, images=10, background=8, by="column", permutations=1)
    assert by_column.values.shape == (10, opened.metadata.width, 6)
    assert [player.name for player in by_column.players] == opened.metadata.names
    np.testing.assert_allclose(by_column.base, by_field.base, atol=1e-6)
    np.testing.assert_allclose(by_column.values.sum(axis=1), by_field.values.sum(axis=1), atol=1e-5)


def test_the_seed_fixes_all_and_an_image_has_the_same_values_in_any_choice(
    opened: OpenedRun, by_field: MetadataShap
) -> None:
    seen: list[tuple[int, int]] = []
    again = explain_metadata(
        opened, images=10, background=8, permutations=2, progress=lambda done, whole: seen.append((done, whole))
    )
    np.testing.assert_array_equal(again.values, by_field.values)
    assert seen == [(number, 10) for number in range(1, 11)]
    whole = explain_metadata(opened, images=10_000, background=8, permutations=2)
    places = [whole.image_ids.index(image_id) for image_id in by_field.image_ids]
    np.testing.assert_allclose(whole.values[places], by_field.values, atol=1e-6)
    other = explain_metadata(opened, images=10, background=8, permutations=2, seed=1)
    assert other.image_ids != by_field.image_ids
    np.testing.assert_array_equal(
        other.image_ids, [image_id for image_id in whole.image_ids if image_id in other.image_ids]
    )


def test_asking_a_few_forms_at_once_gives_the_same_values(
    opened: OpenedRun, by_field: MetadataShap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapley, "MOST_ROWS", 7)
    monkeypatch.setattr(shapley, "BATCH", 3)
    np.testing.assert_allclose(
        explain_metadata(opened, images=10, background=8, permutations=2).values, by_field.values, atol=1e-6
    )


def test_table_ranking_and_top_players_say_the_same_numbers(by_field: MetadataShap) -> None:
    table = by_field.table()
    assert list(table.columns) == ["image_id", "class", "player", "field", "kind", "answer", "value", "error"]
    assert len(table) == 10 * 22 * 6
    cells = table.set_index(["image_id", "class", "player"])
    for row, player, number in [(0, 0, 0), (3, 21, 5), (9, 7, 2)]:
        cell = cells.loc[(by_field.image_ids[row], by_field.classes[number], by_field.players[player].name)]
        assert cell["value"] == by_field.values[row, player, number]
        assert cell["error"] == by_field.errors[row, player, number]
        assert cell["answer"] == by_field.words[row][player]
        assert cell["kind"] == by_field.players[player].kind
    ranking = by_field.ranking()
    means = table.assign(value=table["value"].abs()).groupby(["player", "class"])["value"].mean()
    for line in ranking.to_dict("records"):
        assert line["importance"] == pytest.approx(means[line["player"], line["class"]], rel=1e-5)
    totals = ranking.groupby("player", sort=False)["importance"].sum()
    assert totals.is_monotonic_decreasing
    top = by_field.top_groups(4, "MEL", 22)
    own = cells.loc[by_field.image_ids[4], "MEL"]
    assert [name for name, _, _ in top] == own["value"].abs().sort_values(ascending=False, kind="stable").index.tolist()
    assert top[0] == (top[0][0], own.loc[top[0][0], "answer"], pytest.approx(own.loc[top[0][0], "value"]))
    assert by_field.top_groups(4, "MEL") == top[:3]


@pytest.mark.parametrize(
    "changes",
    [
        {"model.method": "concat"},
        {"model.method": "metablock"},
        {"model.method": "visual"},
        {"model.method": "ensemble"},
        {"model.fusion": "cross_attention"},
        {"model.metadata_encoder": "transformer"},
    ],
    ids=str,
)
@torch.inference_mode()
def test_of_every_kind_of_method_the_values_add_up_to_what_it_says_of_the_photograph(
    opened: OpenedRun, tiny_recipe: Recipe, changes: dict[str, Any]
) -> None:
    recipe = load_recipe(tiny_recipe, changes)
    torch.manual_seed(0)
    model = outspoken(opened, new_model(recipe, opened.metadata.width, 6)[0])
    untrained = replace(opened, recipe=recipe, model=model)
    result = explain_metadata(untrained, images=6, background=3, permutations=1)
    pictures = opened.pictures("test")
    batch = pictures.batch(np.array([pictures.image_ids.index(image_id) for image_id in result.image_ids]))
    expected = model(opened.images(batch), batch.metadata).logits.softmax(dim=1)
    np.testing.assert_allclose(result.base + result.values.sum(axis=1), expected, atol=2e-4)
    assert np.abs(result.values).max() > 0.01


def test_stored_features_of_a_frozen_encoder_give_the_same_values(opened: OpenedRun, by_field: MetadataShap) -> None:
    frozen = replace(opened, recipe=load_recipe(opened.recipe, {"training.encoder": "frozen"}))
    assert frozen.examples("test").features
    np.testing.assert_allclose(
        explain_metadata(frozen, images=10, background=8, permutations=2).values, by_field.values, atol=1e-5
    )


def test_without_a_photograph_all_images_have_the_same_base(
    tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = load_recipe(tiny_recipe, {"model.method": "metadata_only", "training.epochs": 1})
    run = train_recipe(recipe, tmp_path_factory.mktemp("shapley") / "metadata_only")
    result = explain_metadata(open_run(run), images=8, background=6, permutations=1)
    assert not result.reads_image
    np.testing.assert_allclose(result.base, np.tile(result.base[0], (8, 1)), atol=1e-6)
    written = run.predictions.set_index("image_id").loc[list(result.image_ids)]
    np.testing.assert_allclose(
        result.base + result.values.sum(axis=1), written[[f"prob_{name}" for name in result.classes]], atol=1e-4
    )


def test_a_model_that_reads_no_metadata_is_refused(opened: OpenedRun, tiny_recipe: Recipe) -> None:
    model, _, _ = new_model(load_recipe(tiny_recipe, {"model.method": "no_metadata"}), opened.metadata.width, 6)
    without = MetadataEncoder.fit(opened.rows("train"), opened.dataset.schema, MetadataSection(tier="M0"))
    for blind in (replace(opened, model=model), replace(opened, metadata=without)):
        with pytest.raises(RunError, match="reads no metadata"):
            explain_metadata(blind)
