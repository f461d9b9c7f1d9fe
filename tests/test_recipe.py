import contextlib
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
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


def test_the_recipes_that_ship():
    paper, rest = (
        ["isic_2019_paper", "pad_ufes_20_paper"],
        ["isic_2019", "pad_ufes_20", "pad_ufes_20_frozen", "pad_ufes_20_m3", "sample"],
    )
    assert shipped_recipes() == sorted(paper + rest)


def test_only_the_paper_recipes_may_leak():
    for name in shipped_recipes():
        assert (load_recipe(name).data.protocol == "paper") == name.endswith("_paper")


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
    plain = {
        "name",
        "seed",
        "description",
        "enabled",
        "epochs",
        "batch_size",
        "optimizer",
        "learning_rate",
        "weight_decay",
    }
    plain |= {"plateau_factor", "minimum_learning_rate", "device"}
    assert [path for path, field in fields() if not field.description and path[-1] not in plain] == []


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("training.epoch", "epochs"),
        ("trainig.epochs", "training"),
        ("image.colour_constancey", "colour_constancy"),
        ("sed", "seed"),
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


@given(st.lists(st.text(max_size=30), max_size=3))
def test_overrides_of_any_text_are_read_or_refused(arguments):
    with contextlib.suppress(RecipeError):
        assert isinstance(load_recipe("sample", parse_overrides(arguments)), Recipe)


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
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("sample", overrides)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.epochs", 0),
        ("training.epochs", 1.5),
        ("training.epochs", "three"),
        ("training.learning_rate", float("inf")),
        ("loss.classification", float("nan")),
        ("image.size", 100),
        ("image.size", 16),
        ("training.optimizer", "adam"),
        ("data.folds", 2),
        ("name", "../escape"),
        ("name", ""),
        ("name", "a/b"),
        ("training", None),
        ("seed", -1),
        ("data.root.x", 1),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(key, value):
    with pytest.raises(RecipeError, match=key.split(".")[0]):
        load_recipe({"name": "x", "data": {"root": "somewhere"}}, {key: value})


def test_a_resolved_recipe_written_as_yaml_loads_to_the_same():
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert load_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


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
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)
