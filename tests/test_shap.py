"""Shapley values: of known models, of a run, of every kind of method; feature groups; figures."""

import copy
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dualrefnet.analysis import shap as shapley
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
from dualrefnet.errors import DependencyError, RunError, install_hint
from dualrefnet.models.base import Method
from dualrefnet.models.registry import new_model
from dualrefnet.recipe import MetadataSection, Recipe, load_recipe
from dualrefnet.run import Run
from dualrefnet.training.train import train_recipe
from readable import assert_readable

Floats = NDArray[np.float64]


def columns(*groups: tuple[int, ...]) -> tuple[FeatureGroup, ...]:
    return tuple(FeatureGroup(f"p{number}", f"p{number}", "numeric", group) for number, group in enumerate(groups))


def alone(count: int) -> tuple[FeatureGroup, ...]:
    return columns(*((number,) for number in range(count)))


def drawn(seed: int, width: int, others: int) -> tuple[np.random.Generator, Any, Any]:
    generator = np.random.default_rng(seed)
    return generator, *(generator.normal(size=size).astype(np.float32) for size in (width, (others, width)))


def all_orders(
    classify: Callable[[Any], Floats], row: Any, background: Any, groups: tuple[FeatureGroup, ...]
) -> Floats:
    """The definition: what a group's coming adds, averaged over all orders."""
    total = []
    for order in permutations(range(len(groups))):
        rows, added = background.copy(), [np.empty(0)] * len(groups)
        before = classify(rows).mean(axis=0)
        for number in order:
            rows[:, list(groups[number].columns)] = row[list(groups[number].columns)]
            after = classify(rows).mean(axis=0)
            added[number], before = after - before, after
        total.append(np.array(added))
    return np.asarray(np.mean(total, axis=0))


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
def test_of_a_linear_model_each_value_is_the_weight_times_the_distance_from_the_mean(
    seed: int, width: int, classes: int, others: int
) -> None:
    generator, row, background = drawn(seed, width, others)
    weights = generator.normal(size=(width, classes))
    result = attribute_prediction(lambda rows: rows @ weights, row, background, alone(width), 1, 0)
    np.testing.assert_allclose(result.values, weights * (row - background.mean(axis=0))[:, None], atol=1e-5)
    np.testing.assert_allclose(result.base, background.mean(axis=0) @ weights, atol=1e-5)
    np.testing.assert_allclose(result.prediction, row @ weights, atol=1e-5)
    np.testing.assert_allclose(result.errors, 0, atol=1e-5)


def test_two_values_that_multiply_share_their_product_as_computed_by_hand() -> None:
    def classify(rows: Any) -> Floats:
        return np.stack([rows[:, 0] * rows[:, 1], rows[:, 0] - rows[:, 1]], axis=1).astype(float)

    # Nobody: 1 * 2 = 2; the first alone 3 * 2 = 6; the second alone 1 * 5 = 5; both 15.
    row, background = np.array([3, 5], np.float32), np.array([[1, 2]], np.float32)
    result = attribute_prediction(classify, row, background, alone(2), 1, 0)
    np.testing.assert_allclose(result.values[:, 0], [((6 - 2) + (15 - 5)) / 2, ((5 - 2) + (15 - 6)) / 2])
    np.testing.assert_allclose(result.values[:, 1], [2, -3])
    np.testing.assert_allclose(result.base, [2, -1])


def test_where_more_values_act_together_the_estimate_nears_the_definition_within_its_error() -> None:
    generator, row, background = drawn(3, 5, 6)
    first, second = generator.normal(size=(5, 16)) * 2, generator.normal(size=(16, 3))

    def classify(rows: Any) -> Floats:
        return np.asarray(torch.from_numpy(np.tanh(rows @ first) @ second).softmax(dim=1).numpy())

    exact = all_orders(classify, row, background, alone(5))
    gaps = {}
    for count in (4, 400):
        result = attribute_prediction(classify, row, background, alone(5), count, 0)
        gaps[count] = np.abs(result.values - exact)
        assert (gaps[count] <= 4 * result.errors + 1e-9).mean() > 0.9
    assert 1e-9 < gaps[400].max() < min(gaps[4].max() / 3, 0.005)


def test_a_row_of_metadata_is_predicted_once() -> None:
    asked: list[bytes] = []

    def classify(rows: Any) -> Floats:
        asked.extend(row.tobytes() for row in rows)
        return np.stack([rows.prod(axis=1), rows.sum(axis=1)], axis=1).astype(float)

    row, background = np.array([1, 0, 1], np.float32), np.array([[0, 0, 0], [0, 1, 1], [0, 0, 0]], np.float32)
    attribute_prediction(classify, row, background, alone(3), 4, 0)
    # The row itself is asked for once more, to find a model that isn't deterministic.
    assert len(asked) == len(set(asked)) + 1


@pytest.mark.parametrize("value", ["random", "nan"])
def test_a_model_that_is_not_deterministic_is_refused_and_so_is_nan(value: str) -> None:
    generator = np.random.default_rng(0)
    classify = lambda rows: generator.random((len(rows), 2)) * (1 if value == "random" else np.nan)  # noqa: E731
    with pytest.raises(ArithmeticError, match=r"away from the predicted probability, more than 0\.0001"):
        attribute_prediction(classify, np.ones(3, np.float32), np.zeros((2, 3), np.float32), alone(3), 1, 0)


@pytest.mark.parametrize("groups", [[(0,), (1,)], [(0,), (1, 2), (2,)], [(0, 1), (2, 3)]])
def test_every_column_must_belong_to_one_group(groups: list[tuple[int, ...]]) -> None:
    row, background = np.ones(3, np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="each of the 3 columns must belong to one group"):
        attribute_prediction(lambda rows: rows, row, background, columns(*groups), 1, 0)


def test_the_seed_fixes_the_orders_and_the_callers_random_numbers_stay_as_they_were() -> None:
    _, row, background = drawn(4, 6, 4)
    classify = lambda rows: np.exp(rows.sum(axis=1, keepdims=True)).astype(float)  # noqa: E731
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    values = [attribute_prediction(classify, row, background, alone(6), 1, seed).values for seed in (5, 5, 6)]
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    np.testing.assert_array_equal(values[0], values[1])
    assert np.abs(values[0] - values[2]).max() > 1e-6


def test_without_shap_the_message_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shap", None)
    monkeypatch.delitem(sys.modules, "dualrefnet.analysis.shap")
    with pytest.raises(DependencyError, match=re.escape(install_hint("explain"))):
        importlib.import_module("dualrefnet.analysis.shap")
    assert shapley.attribute_prediction is attribute_prediction


# Two numbers, a boolean, a category with an alias and a code for what isn't known, and one without any value.
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


def test_by_field_there_is_a_group_for_each_field_and_one_for_all_flags() -> None:
    assert make_feature_groups(fit(tier="M3", imputation="zero"), "field") == (
        FeatureGroup("age", "age", "numeric", (0,)),
        FeatureGroup("smoke", "smoke", "boolean", (1, 2)),
        FeatureGroup("origin", "origin", "categorical", (3, 4, 5)),
        FeatureGroup("size", "size", "numeric", (6,)),
        FeatureGroup(MISSING_FLAGS, MISSING_FLAGS, "missing", (7, 8, 9, 10)),
    )
    without_flags = make_feature_groups(fit(tier="M2"), "field")
    assert [group.kind for group in without_flags] == ["numeric", "boolean", "categorical", "numeric"]


def test_values_are_written_as_words_and_what_was_imputed_is_told_apart() -> None:
    encoder = fit(tier="M3", imputation="neural")
    values = read_field_values(make_feature_groups(encoder, "field"), encoder, ROWS)
    assert values.texts == (
        ("60 years", "yes", "BRAZIL", "not recorded, imputed", "2 of 4"),
        ("40 years", "not recorded, imputed", "not known", "4", "2 of 4"),
        ("51.5 years", "no", "not recorded, imputed", "2", "2 of 4"),
        ("50 years", "yes", "unknown to the model, imputed", "1", "2 of 4"),
    )
    age, smoke, origin, size, flags = values.colours.T
    np.testing.assert_allclose(age, (ROWS["age"] - ROWS["age"].mean()) / ROWS["age"].std(ddof=0), rtol=1e-5)
    np.testing.assert_array_equal(smoke, [1, np.nan, 0, 1])
    assert np.isnan([*origin, size[0]]).all()
    np.testing.assert_array_equal(flags, 2)
    known = [[1, 1, 1, 0, 1], [1, 0, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 0, 1, 1]]
    np.testing.assert_array_equal(values.known, known)
    zero = fit(tier="M2", imputation="zero", unknown="missing", merge_aliases=False)
    assert read_field_values(make_feature_groups(zero, "field"), zero, ROWS).texts[:2] == (
        ("60 years", "yes", "unknown to the model", "not recorded"),
        ("40 years", "not recorded", "not recorded", "4"),
    )


def test_a_column_of_a_category_says_yes_or_no_only_where_there_is_a_value() -> None:
    encoder = fit(tier="M3", imputation="neural")
    values = read_field_values(make_feature_groups(encoder, "column"), encoder, ROWS)
    assert values.texts[0][:7] == ("60 years", "no", "yes", "yes", "no", "no", "not recorded, imputed")
    assert values.texts[1][1:7] == (*["not recorded, imputed"] * 2, "no", "no", "yes", "4")
    assert values.texts[1][7:] == ("yes", "no", "no", "yes")
    np.testing.assert_array_equal(values.colours[1, 1:6], [np.nan, np.nan, 0, 0, 1])
    np.testing.assert_array_equal(values.colours[1, 7:], [1, 0, 0, 1])
    assert values.known[1].tolist() == [True, False, False] + [True] * 8


@torch.inference_mode()
def outspoken(opened: OpenedRun, model: Method) -> Method:
    """Of a model that has learned little, a copy whose outputs differ: every class's logit has mean 0 and sd 3 over
    the test split.
    """
    loud = copy.deepcopy(model).eval()
    examples = opened.image_examples("test")
    batch = examples.batch(np.arange(len(examples)))
    # Each image with its own metadata and with those of three others.
    images, rows = opened.images(batch), torch.cat([batch.metadata.roll(shift, dims=0) for shift in range(4)])
    logits = loud(None if images is None else images.repeat(4, 1, 1, 1), rows).logits
    mean, spread = logits.mean(dim=0), logits.std(dim=0)
    loud.register_forward_hook(lambda _, __, output: output._replace(logits=3 * (output.logits - mean) / spread))
    return loud


@pytest.fixture(scope="module")
def loud(opened: OpenedRun) -> OpenedRun:
    return replace(opened, model=outspoken(opened, opened.model))


@pytest.fixture(scope="module")
def by_field(loud: OpenedRun) -> MetadataShap:
    return explain_metadata(loud, images=10, background=8, permutations=2)


def assert_adds_up(result: MetadataShap, run: Run) -> None:
    written = run.predictions.set_index("image_id").loc[list(result.image_ids)]
    np.testing.assert_allclose(result.prediction, written[[f"prob_{name}" for name in result.classes]], atol=1e-5)
    np.testing.assert_allclose(result.base + result.values.sum(axis=1), result.prediction, atol=1e-6)
    assert [result.classes[label] for label in result.labels] == written["label"].tolist()


def test_base_and_values_add_up_to_what_the_run_predicted(opened: OpenedRun) -> None:
    assert_adds_up(explain_metadata(opened, images=10, background=4, permutations=1), opened.run)


@torch.inference_mode()
def test_the_base_is_the_mean_of_this_image_with_the_metadata_of_training_patients(loud: OpenedRun) -> None:
    result = explain_metadata(loud, images=6, background=10_000, permutations=1)
    train = torch.from_numpy(loud.examples("train").metadata)
    assert result.background == len(train)
    examples = loud.image_examples("test")
    for row, image_id in enumerate(result.image_ids[:2]):
        image = loud.images(examples.batch(np.array([examples.image_ids.index(image_id)])))
        assert image is not None
        probabilities = loud.model(image.expand(len(train), -1, -1, -1), train).logits.softmax(dim=1)
        np.testing.assert_allclose(result.base[row], probabilities.mean(dim=0), atol=1e-5)
    assert np.abs(result.base[0] - result.base[1]).max() > 1e-3


def test_columns_share_out_the_same_difference_as_fields(loud: OpenedRun, by_field: MetadataShap) -> None:
    by_column = explain_metadata(loud, images=10, background=8, by="column", permutations=1)
    assert [group.name for group in by_column.groups] == loud.metadata.names
    np.testing.assert_allclose(by_column.base, by_field.base, atol=1e-6)
    np.testing.assert_allclose(by_column.values.sum(axis=1), by_field.values.sum(axis=1), atol=1e-5)


def test_the_seed_fixes_all_and_an_image_has_the_same_values_in_any_choice(
    loud: OpenedRun, by_field: MetadataShap, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = explain_metadata(loud, images=10_000, background=8, permutations=2)
    places = [whole.image_ids.index(image_id) for image_id in by_field.image_ids]
    np.testing.assert_allclose(whole.values[places], by_field.values, atol=1e-6)
    other = explain_metadata(loud, images=10, background=8, permutations=2, seed=1)
    assert other.image_ids != by_field.image_ids
    # Few rows at once.
    monkeypatch.setattr(shapley, "MOST_ROWS", 7)
    few = explain_metadata(loud, images=10, background=8, permutations=2)
    np.testing.assert_allclose(few.values, by_field.values, atol=1e-6)


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
def test_of_every_kind_of_method_the_values_add_up_to_what_it_says_of_the_image(
    opened: OpenedRun, tiny_recipe: Recipe, changes: dict[str, Any]
) -> None:
    recipe = load_recipe(tiny_recipe, changes)
    torch.manual_seed(0)
    model = outspoken(opened, new_model(recipe, opened.metadata.width, 6)[0])
    result = explain_metadata(replace(opened, recipe=recipe, model=model), images=6, background=3, permutations=1)
    examples = opened.image_examples("test")
    batch = examples.batch(np.array([examples.image_ids.index(image_id) for image_id in result.image_ids]))
    expected = model(opened.images(batch), batch.metadata).logits.softmax(dim=1)
    np.testing.assert_allclose(result.base + result.values.sum(axis=1), expected, atol=2e-4)
    assert np.abs(result.values).max() > 0.01


def test_stored_features_of_a_frozen_encoder_give_the_same_values(loud: OpenedRun, by_field: MetadataShap) -> None:
    frozen = replace(loud, recipe=load_recipe(loud.recipe, {"training.encoder": "frozen"}))
    assert frozen.examples("test").features
    found = explain_metadata(frozen, images=10, background=8, permutations=2)
    np.testing.assert_allclose(found.values, by_field.values, atol=1e-5)


def test_without_an_image_all_cases_have_the_same_base(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe, {"model.method": "metadata_only", "training.epochs": 1})
    run = train_recipe(recipe, tmp_path / "metadata_only")
    result = explain_metadata(open_run(run), images=8, background=6, permutations=1)
    assert not result.reads_image
    np.testing.assert_allclose(result.base, np.tile(result.base[0], (8, 1)), atol=1e-6)
    assert_adds_up(result, run)


def test_a_model_that_reads_no_metadata_is_refused(opened: OpenedRun, tiny_recipe: Recipe) -> None:
    model, _, _ = new_model(load_recipe(tiny_recipe, {"model.method": "no_metadata"}), opened.metadata.width, 6)
    without = MetadataEncoder.fit(opened.rows("train"), opened.dataset.schema, MetadataSection(tier="M0"))
    for blind in (replace(opened, model=model), replace(opened, metadata=without)):
        with pytest.raises(RunError, match="reads no metadata"):
            explain_metadata(blind)


def made_up(classes: int, groups: int, images: int = 120) -> MetadataShap:
    """As many classes and groups as a page may have to hold, with long names."""
    labels = ("MEL", "NV", "BCC", "AK", "seborrhoeic keratosis", "DF", "melanoma, invasive", "squamous cell carcinoma")
    names = ["skin_cancer_history", "background_father", "anatom_site_general", "age", "background_mother"]
    texts = ["not recorded, imputed", "NETHERLANDS", "lower extremity", "85 years", "CZECH"]
    generator = np.random.default_rng(classes)
    values = generator.normal(size=(images, groups, classes)) * generator.exponential(0.05, size=(1, groups, 1))
    values -= values.mean(axis=2, keepdims=True)
    every = [
        FeatureGroup(f"{names[number % 5]}{number // 5 or ''}", "f", "categorical", (number,))
        for number in range(groups - 1)
    ]
    base = np.full((images, classes), 1 / classes)
    colours = np.where(np.arange(groups) % 2, generator.normal(size=(images, groups)), np.nan).astype(np.float32)
    of_one = (*(texts[number % 5] for number in range(groups - 1)), "13 of 13")
    return MetadataShap(
        values=values.astype(np.float32),
        errors=np.full(values.shape, 0.004, np.float32),
        base=base.astype(np.float32),
        prediction=(base + values.sum(axis=1)).astype(np.float32),
        groups=(*every, FeatureGroup(MISSING_FLAGS, MISSING_FLAGS, "missing", (groups - 1,))),
        classes=labels[:classes],
        image_ids=tuple(f"ISIC_{number:07d}" for number in range(images)),
        labels=generator.integers(classes, size=images),
        fields=FieldValues((of_one,) * images, colours, generator.random((images, groups)) < 0.8),
        by="field",
        total_images=5066,
        background=50,
        permutations=1,
        seed=0,
        reads_image=True,
    )


@pytest.mark.parametrize(("classes", "groups"), [(2, 3), (8, 22), (8, 93)])
def test_figures_are_readable_with_few_and_many_classes_and_groups(classes: int, groups: int) -> None:
    result = made_up(classes, groups)
    figures = [draw_importance(result), draw_beeswarm(result, result.classes[-1])]
    figures += [draw_waterfall(result, result.image_ids[0], label) for label in (result.classes[0], result.classes[-1])]
    for figure in figures:
        assert_readable(figure)
    assert len({figure.name for figure in figures}) == len(figures)


def test_figures_hold_the_values_in_percentage_points_and_add_up_the_small_ones() -> None:
    result = made_up(3, 93)
    names = [group.name for group in result.groups]
    importance = 100 * np.abs(result.values).mean(axis=0)
    order = np.argsort(-importance.sum(axis=1))
    data = draw_importance(result).data.pivot(index="player", columns="class", values="points")[list(result.classes)]
    assert len(data) == 16
    np.testing.assert_allclose(data.loc["78 others"], importance[order[15:]].sum(axis=0), rtol=1e-4)
    np.testing.assert_allclose(data.loc[names[order[0]]], importance[order[0]], rtol=1e-4)
    swarm, first = draw_beeswarm(result, "NV").data, np.abs(result.values[:, :, 1]).mean(axis=0).argmax()
    np.testing.assert_allclose(swarm.loc[swarm["player"] == names[first], "points"], 100 * result.values[:, first, 1])
    steps = draw_waterfall(result, result.image_ids[7], "BCC").data
    assert len(steps) == 10
    assert steps["start"].iloc[0] == pytest.approx(100 * result.base[7, 2], rel=1e-4)
    assert steps["end"].iloc[-1] == pytest.approx(100 * result.prediction[7, 2], rel=1e-4)
    np.testing.assert_allclose(steps["start"].iloc[1:], steps["end"].iloc[:-1])
