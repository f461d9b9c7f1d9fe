"""Frozen encoders: heads trained on stored features are the same model that reads photographs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from dualrefnet.analysis.evaluate import evaluate_run
from dualrefnet.data.adapters import load_dataset
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.models.registry import METHODS, load_model, new_model
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.run import Run
from dualrefnet.training.train import train_recipe

FROZEN = {"training.encoder": "frozen", "training.epochs": 2, "model.decoder": "bottleneck"}


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> Recipe:
    # ImageNet weights from the installed package: a frozen random encoder would give every image nearly the same
    # vector.
    return load_recipe(tiny_recipe, {"model.backbone": "efficientnet_lite0", "model.weights": "auto", **FROZEN})


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_recipe(recipe, tmp_path_factory.mktemp("frozen") / "run")


def test_a_frozen_run_leaves_an_ordinary_run_folder_without_decoder(run: Run) -> None:
    assert run.finished
    assert not run.checkpoint_file.exists()
    assert run.model["architecture"]["section"]["decoder"] == "none"
    assert run.recipe.model.decoder == "bottleneck", "the recipe stays as it was given"
    assert len(run.history) == 2
    assert "train_reconstruction" not in run.history.columns


def test_the_encoder_is_as_it_was_and_the_rest_has_learned(run: Run, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    start = new_model(recipe, run.model["architecture"]["metadata_width"], 6)[0].state_dict()
    trained = load_file(run.weights_file)
    for name, value in start.items():
        if name.startswith("encoders."):
            assert torch.equal(trained[name], value), name
    assert not torch.equal(trained["head.hidden.weight"], start["head.hidden.weight"])


def test_reading_the_photograph_gives_the_same_probabilities_as_the_stored_features(run: Run, recipe: Recipe) -> None:
    predictor = Predictor.load(run)
    table = load_dataset("sample", recipe.data.root).table.set_index("image_id")
    for _, row in run.predictions.iloc[:4].iterrows():
        form = {field.name: table.loc[row["image_id"], field.name] for field in predictor.fields}
        form = {name: value for name, value in form.items() if not pd.isna(value)}
        prediction = predictor.predict(table.loc[row["image_id"], "image_path"], form)
        answer = row[[f"prob_{name}" for name in predictor.classes]].to_numpy(dtype=float)
        stored = run.calibration.decide(answer[None], [True], [len(form) / len(predictor.fields)]).probabilities[0]
        np.testing.assert_allclose(list(prediction.probabilities.values()), stored, atol=1e-5)


def test_the_same_seed_gives_the_same_parameters(run: Run, recipe: Recipe, tmp_path: Path) -> None:
    again = train_recipe(recipe, tmp_path / "again")
    first, second = load_file(run.weights_file), load_file(again.weights_file)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.metrics == run.metrics
    assert evaluate_run(again) == run.metrics


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dualrefnet"])
def test_every_method_trains_on_frozen_features(method: str, recipe: Recipe, tmp_path: Path) -> None:
    run = train_recipe(load_recipe(recipe, {"model.method": method, "training.epochs": 1}), tmp_path / method)
    assert run.metrics["method"] == method
    assert 0 <= run.metrics["balanced_accuracy"] <= 1
    model = load_model(run.model, run.weights_file)
    if hasattr(model, "decision"):
        weights = model.decision.weights
        assert float(weights.sum()) == pytest.approx(1)


def test_cross_attention_reads_the_stored_map(recipe: Recipe, tmp_path: Path) -> None:
    run = train_recipe(load_recipe(recipe, {"model.fusion": "cross_attention", "training.epochs": 1}), tmp_path / "run")
    assert run.finished
