import contextlib
import copy
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import dualrefnet
from dualrefnet.errors import RecipeError
from dualrefnet.recipe import Recipe, load_recipe, parse_overrides, recipe_text, shipped_recipes


def leaves(values, path=()):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def fields(section=Recipe, path=()):
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, (*path, name))
        else:
            yield (*path, name), field


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_loads_under_its_own_name_and_every_key_of_it_arrives(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    for path, value in leaves(yaml.safe_load(recipe_text(name))):
        read = recipe
        for part in path:
            read = getattr(read, part)
        assert (list(read) if isinstance(read, tuple) else read) == value, path


def test_the_recipes_that_ship_and_only_the_papers_may_leak():
    paper = {"isic_2019_paper", "pad_ufes_20_paper"}
    assert {*shipped_recipes()} == paper | {
        "isic_2019",
        "pad_ufes_20",
        "pad_ufes_20_frozen",
        "pad_ufes_20_m3",
        "sample",
    }
    assert {name for name in shipped_recipes() if load_recipe(name).data.protocol == "paper"} == paper


def test_the_paper_recipes_hold_the_constants_of_the_paper():
    pad, isic = load_recipe("pad_ufes_20_paper"), load_recipe("isic_2019_paper")
    for recipe in (pad, isic):
        loss = recipe.loss
        assert (loss.classification, loss.reconstruction, loss.penalty) == (0.5, 1.0, 1.0)
        assert (recipe.training.optimizer, recipe.training.batch_size, recipe.training.epochs) == ("sgd", 32, 70)
        assert recipe.model.metadata_widths == (64, 128, 256, 512)
        assert recipe.model.hidden == 256
        assert recipe.image.size == 224
    training = [(r.training.learning_rate, r.training.weight_decay, r.training.plateau_patience) for r in (pad, isic)]
    assert training == [(0.01, 1e-3, 5), (0.001, 1e-5, 20)]
    assert (pad.loss.penalty_strength, isic.loss.penalty_strength) == (0.3, 0.2)


def test_every_key_of_a_recipe_is_read_somewhere_in_the_package():
    package = Path(dualrefnet.__file__).parent
    source = "\n".join(file.read_text(encoding="utf-8") for file in package.rglob("*.py") if file.name != "recipe.py")
    unread = [".".join(path) for path, _ in fields() if not re.search(rf"\.{path[-1]}\b", source)]
    assert unread == []


def test_every_key_whose_name_does_not_say_it_all_is_described():
    plain = {"name", "seed", "description", "enabled", "epochs", "batch_size", "optimizer", "device"}
    plain |= {"learning_rate", "weight_decay", "plateau_factor", "minimum_learning_rate"}
    assert [path for path, field in fields() if not field.description and path[-1] not in plain] == []


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("training.epoch", "epochs"),
        ("trainig.epochs", "training"),
        ("image.colour_constancey", "colour_constancy"),
        ("sed", "seed"),
        ("TRAINING.epochs", "training"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(key, suggestion):
    with pytest.raises(RecipeError, match=rf"unknown key '{key.split('.')[0]}.*did you mean '{suggestion}'\?"):
        load_recipe("sample", {key: 3})


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("training.epochs=3", "training.epochs", 3),
        ("training.learning_rate=1e-3", "training.learning_rate", 0.001),
        ("training.learning_rate=0.5", "training.learning_rate", 0.5),
        ("model.metadata_widths=[8, 16]", "model.metadata_widths", (8, 16)),
        ("augmentation.scale=[0.5,1]", "augmentation.scale", (0.5, 1.0)),
        ("image.clahe=false", "image.clahe", False),
        ("image.clahe=on", "image.clahe", True),
        ("training.momentum=0.5", "training.momentum", 0.5),
        ("training.early_stopping=null", "training.early_stopping", None),
        ("image.gamma=", "image.gamma", None),
        ("data.root=/a=b/c", "data.root", "/a=b/c"),
    ],
)
def test_overrides_are_read_as_yaml(text, key, value):
    section, name = key.split(".")
    assert getattr(getattr(load_recipe("sample", parse_overrides([text])), section), name) == value


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text", ["training.epochs", "=3", "training.epochs=[1", "data.root=2020-13-45", f"name={NESTED}"]
)
def test_an_override_that_cannot_be_read_is_named(text):
    with pytest.raises(RecipeError, match=re.escape(text[:20])):
        parse_overrides([text])


KEYS = [".".join(path) for path, _ in fields()]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=10), values, max_size=3))
def test_any_value_of_any_key_is_read_or_refused(overrides):
    with contextlib.suppress(RecipeError):
        recipe = load_recipe("sample", overrides)
        assert load_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.fold": 5}, "fold 5 doesn't exist"),
        ({"data.fold": 1}, "for the protocol grouped-cv"),
        ({"model.method": "metadata_only", "metadata.tier": "M0"}, "needs metadata"),
        ({"data.rows": "all"}, "needs images"),
        ({"data.description": "d.yaml"}, "for data.dataset csv_table"),
        ({"augmentation.scale": [0.9, 0.5]}, "low <= high"),
        ({"augmentation.scale": [0, 1]}, "low <= high"),
        ({"model.init_parts": "encoder"}, "name it with model.init_from"),
        ({"model.init_from": "r", "model.weights": "none"}, "leave one out"),
        ({"training.warm_up": 0.1, "training.schedule": "constant"}, "for training.schedule one_cycle"),
        ({"training.layer_decay": 0.5, "training.encoder": "frozen"}, "an encoder that is fine-tuned"),
        ({"training.freeze_stages": 1, "model.method": "metadata_only"}, "an encoder that is fine-tuned"),
        ({"tune": {"model.dropout": {}}}, "tune.model.dropout: give `low` < `high`"),
        ({"tune": {"model.dropout": {"low": 1, "high": 1}}}, "give `low` < `high`"),
        ({"tune": {"model.dropout": {"low": 0, "high": 1, "log": True}}}, "must be above 0"),
        ({"tune": {"model.dropout": {"low": 0, "values": [1, 2]}}}, "not both"),
        ({"tune": {"model.dropout": {"values": [1]}}}, "nothing to choose from"),
        ({"tune": {"model.dropout": {"lo": 1}}}, "unknown key 'tune.model.dropout.lo'; did you mean 'low'"),
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe("sample", overrides)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.epochs", 0),
        ("training.epochs", 1.5),
        ("training.epochs", "three"),
        ("training.device", ""),
        ("training.device", "meta"),
        ("training.learning_rate", float("inf")),
        ("loss.classification", float("nan")),
        ("image.size", 100),
        ("data.folds", 2),
        ("data.root", ["a", "b"]),
        ("model.hidden", 1e9),
        ("model.metadata_widths", []),
        ("model.metadata_widths", [64, -1]),
        ("name", "../escape"),
        ("name", ""),
        ("name", "x" * 300),
        ("training", None),
        ("seed", -1),
        ("data.root.x", 1),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(key, value):
    with pytest.raises(RecipeError, match=key.split(".")[0]):
        load_recipe({"name": "x", "data": {"root": "somewhere"}}, {key: value})


def test_overrides_change_a_copy():
    mapping = {"name": "x", "training": {"epochs": 3}}
    before = copy.deepcopy(mapping)
    recipe = load_recipe(mapping, {"training.batch_size": 4, "model.hidden": 8})
    assert mapping == before
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.model.hidden) == (3, 4, 8)
    assert load_recipe(recipe, {"training.epochs": 99}).training.epochs == 99
    assert recipe.training.epochs == 3


def test_a_file_wins_over_a_shipped_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sample").write_text("name: mine\n")
    assert load_recipe("sample").name == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [x", "isn't YAML"),
        (b"\xff\xfe\x00", "isn't YAML"),
        (b"- name\n", "`key: value`"),
        (b"", "`key: value`"),
        (b"description: no name\n", "name: Field required"),
        (b"name: x\ntraining:\n  epochs: 3\ntraining:\n  batch_size: 4\n", "'training' stands twice"),
        (b"name: x\ntraining: {epochs: 3, epochs: 4}\n", "'epochs' stands twice"),
        (f"name: {NESTED}".encode(), "nested too deeply"),
        (b"name: x\n" + b"# more\n" * 200_000, "more than"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(file)
