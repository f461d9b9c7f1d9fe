"""Shapley values: of known models, of a run, of every kind of method; feature groups; figures."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.analysis.shap import (
    MISSING_FLAGS,
    FeatureGroup,
    FieldValues,
    MetadataShap,
    attribute_prediction,
    draw_beeswarm,
    draw_importance,
    draw_waterfall,
    explain_metadata,
    make_feature_groups,
    read_field_values,
)
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import DatasetSchema, MetadataField
from dualrefnet.models.base import Method
from dualrefnet.models.registry import new_model
from dualrefnet.recipe import MetadataSection, Recipe, load_recipe
from dualrefnet.run import Run

Floats = NDArray[np.float64]


def columns(*groups: tuple[int, ...]) -> tuple[FeatureGroup, ...]:
    return tuple(FeatureGroup(f"p{number}", f"p{number}", "numeric", group) for number, group in enumerate(groups))


def alone(count: int) -> tuple[FeatureGroup, ...]:
    return columns(*((number,) for number in range(count)))


def all_orders(
    classify: Callable[[Any], Floats], form: Any, background: Any, players: tuple[FeatureGroup, ...]
) -> Floats:
    """The definition: what a player's coming adds, averaged over all orders."""
    total = 0.0
    orders = list(permutations(range(len(players))))
    for order in orders:
        forms, added = background.copy(), [None] * len(players)
        before = classify(forms).mean(axis=0)
        for number in order:
            forms[:, list(players[number].columns)] = form[list(players[number].columns)]
            after = classify(forms).mean(axis=0)
            added[number] = after - before
            before = after
        total = total + np.array(added)
    return np.asarray(total / len(orders))


def test_two_answers_that_multiply_share_their_product_as_computed_by_hand() -> None:
    def classify(forms: Any) -> Floats:
        return np.stack([forms[:, 0] * forms[:, 1], forms[:, 0] - forms[:, 1]], axis=1).astype(float)

    # Nobody: 1 * 2 = 2; the first alone 3 * 2 = 6; the second alone 1 * 5 = 5; both 15.
    form, background = np.array([3, 5], np.float32), np.array([[1, 2]], np.float32)
    result = attribute_prediction(classify, form, background, alone(2), 1, 0)
    np.testing.assert_allclose(result.values[:, 0], [((6 - 2) + (15 - 5)) / 2, ((5 - 2) + (15 - 6)) / 2])
    np.testing.assert_allclose(result.values[:, 1], [2, -3])
    np.testing.assert_allclose(result.base, [2, -1])


def test_where_more_answers_act_together_the_estimate_nears_the_definition_and_its_error_is_told() -> None:
    generator = np.random.default_rng(3)
    form, background = generator.normal(size=5).astype(np.float32), generator.normal(size=(6, 5)).astype(np.float32)
    first, second = generator.normal(size=(5, 16)) * 2, generator.normal(size=(16, 3))

    def classify(forms: Any) -> Floats:
        logits = np.tanh(forms @ first) @ second
        return np.asarray(torch.from_numpy(logits).softmax(dim=1).numpy())

    exact = all_orders(classify, form, background, alone(5))
    gaps = {}
    for count in (4, 400):
        result = attribute_prediction(classify, form, background, alone(5), count, 0)
        gaps[count] = np.abs(result.values - exact)
        assert (gaps[count] <= 4 * result.errors + 1e-9).mean() > 0.9
    assert 1e-9 < gaps[400].max() < gaps[4].max() / 3
    assert gaps[400].max() < 0.005


def test_a_model_that_changes_its_mind_is_refused_and_so_is_nan() -> None:
    form, background = np.ones(3, np.float32), np.zeros((2, 3), np.float32)
    generator = np.random.default_rng(0)
    with pytest.raises(ArithmeticError, match=r"away from the predicted probability, more than 0\.0001"):
        attribute_prediction(lambda forms: generator.random((len(forms), 2)), form, background, alone(3), 1, 0)
    with pytest.raises(ArithmeticError, match="nan"):
        attribute_prediction(lambda forms: np.full((len(forms), 2), np.nan), form, background, alone(3), 1, 0)


# A form in small: two numbers, a yes-or-no question, a category with an alias and a code for "asked, not known".
SCHEMA = DatasetSchema(
    name="small",
    title="Small",
    classes=("A", "B"),
    fields=(
        MetadataField(name="age", kind="numeric", unit="years", tier="M1"),
        MetadataField(name="smoke", kind="boolean"),
        MetadataField(
            name="origin",
            kind="categorical",
            categories=("BRAZIL", "ITALY"),
            missing_codes=("UNK",),
            aliases={"BRASIL": "BRAZIL"},
        ),
        MetadataField(name="size", kind="numeric"),
        MetadataField(name="never_asked", kind="categorical"),
    ),
)


ROWS = pd.DataFrame(
    {
        "age": [60.0, 40.0, 51.5, 50.0],
        "smoke": ["True", np.nan, "False", "True"],
        "origin": ["BRASIL", "UNK", np.nan, "SPAIN"],
        "size": [np.nan, 4.0, 2.0, 1.0],
        "never_asked": [np.nan] * 4,
    },
    dtype=object,
).astype({"age": float, "size": float})


def fit(**settings: Any) -> MetadataEncoder:
    return MetadataEncoder.fit(ROWS, SCHEMA, MetadataSection(**settings))


def test_by_field_there_is_a_player_for_each_question_and_one_for_all_flags() -> None:
    encoder = fit(tier="M3", imputation="zero")
    players = make_feature_groups(encoder, "field")
    assert encoder.names[:7] == [
        "age",
        "smoke_False",
        "smoke_True",
        "origin_BRAZIL",
        "origin_ITALY",
        "origin_UNK",
        "size",
    ]
    assert players == (
        FeatureGroup("age", "age", "numeric", (0,)),
        FeatureGroup("smoke", "smoke", "boolean", (1, 2)),
        FeatureGroup("origin", "origin", "categorical", (3, 4, 5)),
        FeatureGroup("size", "size", "numeric", (6,)),
        FeatureGroup(MISSING_FLAGS, MISSING_FLAGS, "missing", (7, 8, 9, 10)),
    )
    assert [player.kind for player in make_feature_groups(fit(tier="M2"), "field")] == [
        "numeric",
        "boolean",
        "categorical",
        "numeric",
    ]


def test_answers_are_told_in_words_and_what_was_imputed_is_told_apart() -> None:
    encoder = fit(tier="M3", imputation="neural")
    answers = read_field_values(make_feature_groups(encoder, "field"), encoder, ROWS)
    assert answers.texts == (
        ("60 years", "yes", "BRAZIL", "not recorded, imputed", "2 of 4"),
        ("40 years", "not recorded, imputed", "not known", "4", "2 of 4"),
        ("51.5 years", "no", "not recorded, imputed", "2", "2 of 4"),
        ("50 years", "yes", "unknown to the model, imputed", "1", "2 of 4"),
    )
    mean, spread = ROWS["age"].mean(), ROWS["age"].std(ddof=0)
    np.testing.assert_allclose(answers.colours[:, 0], (ROWS["age"] - mean) / spread, rtol=1e-5)
    np.testing.assert_array_equal(answers.colours[:, 1], [1, np.nan, 0, 1])
    assert np.isnan(answers.colours[:, 2]).all()
    assert np.isnan(answers.colours[0, 3])
    np.testing.assert_array_equal(answers.colours[:, 4], 2)
    assert (
        answers.known.tolist()
        == [[True, True, True, False, True], [True, False, True, True, True]] + [[True, True, False, True, True]] * 2
    )
    zero = fit(tier="M2", imputation="zero", unknown="missing", merge_aliases=False)
    assert read_field_values(make_feature_groups(zero, "field"), zero, ROWS).texts[:2] == (
        ("60 years", "yes", "unknown to the model", "not recorded"),
        ("40 years", "not recorded", "not recorded", "4"),
    )


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
    # In another batch float32 sums come out a little otherwise.
    np.testing.assert_allclose(whole.values[places], by_field.values, atol=5e-6)
    other = explain_metadata(opened, images=10, background=8, permutations=2, seed=1)
    assert other.image_ids != by_field.image_ids
    np.testing.assert_array_equal(
        other.image_ids, [image_id for image_id in whole.image_ids if image_id in other.image_ids]
    )


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


def made_up(classes: int, groups: int, images: int = 120) -> MetadataShap:
    """As many classes and groups as a page may have to hold, with long names."""
    labels = ("MEL", "NV", "BCC", "AK", "seborrhoeic keratosis", "DF", "melanoma, invasive", "squamous cell carcinoma")
    generator = np.random.default_rng(classes)
    values = generator.normal(size=(images, groups, classes)) * generator.exponential(0.05, size=(1, groups, 1))
    values -= values.mean(axis=2, keepdims=True)
    names = ["skin_cancer_history", "background_father", "anatom_site_general", "age", "background_mother"]
    every = [
        FeatureGroup(f"{names[number % 5]}{number // 5 or ''}", "f", "categorical", (number,))
        for number in range(groups - 1)
    ]
    texts = ["not recorded, imputed", "NETHERLANDS", "lower extremity", "85 years", "CZECH"]
    base = np.full((images, classes), 1 / classes)
    colours = np.where(np.arange(groups) % 2, generator.normal(size=(images, groups)), np.nan).astype(np.float32)
    return MetadataShap(
        values=values.astype(np.float32),
        errors=np.full(values.shape, 0.004, np.float32),
        base=base.astype(np.float32),
        prediction=(base + values.sum(axis=1)).astype(np.float32),
        groups=(*every, FeatureGroup(MISSING_FLAGS, MISSING_FLAGS, "missing", (groups - 1,))),
        classes=labels[:classes],
        image_ids=tuple(f"ISIC_{number:07d}" for number in range(images)),
        labels=generator.integers(classes, size=images),
        fields=FieldValues(
            ((*(texts[number % 5] for number in range(groups - 1)), "13 of 13"),) * images,
            colours,
            generator.random((images, groups)) < 0.8,
        ),
        by="field",
        split="test",
        total_images=5066,
        background=50,
        permutations=1,
        seed=0,
        reads_image=True,
    )


def test_figures_hold_the_values_in_percentage_points_and_add_up_the_small_ones() -> None:
    result = made_up(3, 93)
    importance = 100 * np.abs(result.values).mean(axis=0)
    order = np.argsort(-importance.sum(axis=1))
    data = draw_importance(result).data.pivot(index="player", columns="class", values="points")[list(result.classes)]
    assert len(data) == 16
    np.testing.assert_allclose(data.loc["78 others"], importance[order[15:]].sum(axis=0), rtol=1e-4)
    first = result.groups[order[0]].name
    np.testing.assert_allclose(data.loc[first], importance[order[0]], rtol=1e-4)
    swarm = draw_beeswarm(result, "NV").data
    of_first = result.groups[np.argsort(-np.abs(result.values[:, :, 1]).mean(axis=0))[0]].name
    points = 100 * result.values[:, [group.name for group in result.groups].index(of_first), 1]
    np.testing.assert_allclose(swarm.loc[swarm["player"] == of_first, "points"], points)
    steps = draw_waterfall(result, result.image_ids[7], "BCC").data
    assert len(steps) == 10
    assert steps["start"].iloc[0] == pytest.approx(100 * result.base[7, 2], rel=1e-4)
    assert steps["end"].iloc[-1] == pytest.approx(100 * result.prediction[7, 2], rel=1e-4)
    np.testing.assert_allclose(steps["start"].iloc[1:], steps["end"].iloc[:-1])
    with pytest.raises(ValueError, match="not in tuple"):
        draw_waterfall(result, "nobody", "BCC")
