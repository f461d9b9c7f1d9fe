"""Targets that a network makes: stored once, cropped like the input, and rebuilt by the decoder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.loader import Examples, draw, fill_recipe_store
from dualrefnet.errors import WeightsError
from dualrefnet.files import write_tensors
from dualrefnet.models.registry import new_model
from dualrefnet.models.superresolution import fill_targets
from dualrefnet.models.superresolution_networks import create_network, enlarge
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.run import Run
from dualrefnet.training.loop import Trainer
from dualrefnet.training.train import train_recipe

CPU = torch.device("cpu")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    write_tensors(tmp_path / "ninasr_b0.safetensors", create_network("ninasr_b0").state_dict())
    return tmp_path / "ninasr_b0.safetensors"


@pytest.fixture
def recipe(tiny_recipe: Recipe, weights: Path) -> Recipe:
    return load_recipe(
        tiny_recipe, {"model.target": "ninasr_b0", "model.target_weights": str(weights), "training.epochs": 1}
    )


def test_the_stored_targets_are_the_networks_enlarged_pictures(recipe: Recipe, weights: Path) -> None:
    store = fill_recipe_store(recipe, load_dataset("sample", recipe.data.root))
    targets, source = fill_targets(recipe, store, CPU)
    assert targets is not None
    assert source["kind"] == "file"
    network = create_network("ninasr_b0")
    torch.manual_seed(3)
    network = create_network("ninasr_b0").eval()
    rows = np.array([0, 7])
    stored = targets.read(rows)["target"]
    assert stored.shape == (2, 64, 64, 3)
    # Convolutions of other batch sizes may round otherwise.
    assert np.abs(stored.astype(int) - enlarge(network, store.read(rows)).astype(int)).max() <= 1


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.target": "bilinear"},
        {"model.decoder": "none"},
        {"training.encoder": "frozen"},
        {"model.method": "concat"},
    ],
)
def test_nothing_is_computed_where_nothing_is_rebuilt(recipe: Recipe, overrides: dict[str, str]) -> None:
    changed = load_recipe(recipe, overrides)
    store = fill_recipe_store(changed, load_dataset("sample", changed.data.root))
    assert fill_targets(changed, store, CPU) == (None, None)


def test_missing_weights_of_the_network_are_told(recipe: Recipe) -> None:
    store = fill_recipe_store(recipe, load_dataset("sample", recipe.data.root))
    with pytest.raises(WeightsError, match=r"nowhere\.pt"):
        fill_targets(load_recipe(recipe, {"model.target_weights": "nowhere.pt"}), store, CPU)


def test_a_run_with_such_targets_names_the_network_it_used(recipe: Recipe, tmp_path: Path) -> None:
    run = train_recipe(recipe, tmp_path / "run")
    assert "train_reconstruction" in run.history.columns
    assert "ninasr_b0.safetensors" in (run.path / "fingerprint.json").read_text()


def test_input_and_stored_target_show_the_same_crop(recipe: Recipe, tmp_path: Path) -> None:
    """A picture whose target is itself, enlarged: after augmentation the halved target must still be the input."""
    quiet = load_recipe(
        recipe,
        {
            "augmentation.brightness": 0,
            "augmentation.contrast": 0,
            "augmentation.saturation": 0,
            "augmentation.noise": 0,
        },
    )
    model, _, _ = new_model(quiet, 5, 6)
    neutral = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    trainer = Trainer(model, quiet, Run(tmp_path), torch.ones(6), neutral)
    # Smooth, so that reading between pixels on two grids makes little difference.
    y, x = np.mgrid[0:32, 0:32] / 31
    picture = (255 * np.stack([x, y, x * y], axis=-1)).astype(np.uint8)

    class Pictures:
        def read(self, rows):
            return np.stack([picture] * len(rows))

    class Targets:
        def read(self, rows):
            return {"target": np.stack([picture.repeat(2, axis=0).repeat(2, axis=1)] * len(rows))}

    rows = np.arange(4)
    examples = Examples(
        ("a",) * 4, np.zeros(4, dtype=np.int64), np.zeros((4, 5), np.float32), Pictures(), rows, (), Targets()
    )
    image, target = trainer._inputs(examples.batch(rows), draw(4, quiet.augmentation, 0, 0))
    assert target.shape == (4, 3, 64, 64)
    assert float((torch.nn.functional.avg_pool2d(target, 2) - image).abs().max()) < 0.03
    assert float((image[0] - image[1]).abs().max()) > 0.05, "the crops differ between images"
