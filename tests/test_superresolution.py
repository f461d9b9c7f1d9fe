import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.loader import Examples, draw, fill_recipe_store
from dualrefnet.files import write_tensors
from dualrefnet.models.registry import new_model
from dualrefnet.models.superresolution import fill_targets, make_target, psnr, split_native, ssim
from dualrefnet.models.superresolution_networks import NETWORKS, enlarge
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.run import Run
from dualrefnet.training.loop import Trainer


@given(seed=st.integers(0, 10**6))
def test_targets_stay_in_range_although_bicubic_overshoots(seed):
    image = torch.randint(0, 2, (1, 3, 6, 6), generator=torch.Generator().manual_seed(seed)).float()
    target = make_target("bicubic", image)
    assert target.min() >= 0
    assert target.max() <= 1


def test_bilinear_has_the_known_weights_three_quarters_and_one_quarter():
    image = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2).expand(1, 3, 2, 2)
    target = make_target("bilinear", image)
    torch.testing.assert_close(target[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_native_input_is_the_mean_of_two_by_two_and_the_target_is_the_photograph():
    photograph = torch.rand(2, 3, 6, 10)
    image, target = split_native(photograph)
    assert image.shape == (2, 3, 3, 5)
    torch.testing.assert_close(image[1, 2, 1, 4], photograph[1, 2, 2:4, 8:10].mean())
    assert torch.equal(target, photograph)


@given(error=st.floats(0.001, 1))
def test_psnr_of_an_even_error_is_minus_twenty_log_of_it(error):
    target = torch.zeros(2, 3, 4, 4)
    prediction = target.clone()
    prediction[1] = error
    values = psnr(prediction, target)
    assert values[0] == math.inf
    assert values[1].item() == pytest.approx(-20 * math.log10(error), abs=1e-3)


def test_ssim_of_flat_images_is_the_luminance_term() -> None:
    # Without any structure only (2 a b + C1) / (a² + b² + C1) is left, C1 = .01².
    a, b = torch.full((2, 3, 16, 16), 0.2), torch.full((2, 3, 16, 16), 0.6)
    assert ssim(a, b).tolist() == pytest.approx([(2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)] * 2, rel=1e-5)
    assert ssim(a, a).tolist() == [1, 1]
    with pytest.raises(ValueError, match="same dimensions"):
        ssim(a, b[:, :, :8])


CPU = torch.device("cpu")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    write_tensors(tmp_path / "ninasr_b0.safetensors", NETWORKS["ninasr_b0"].build().state_dict())
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
    network = NETWORKS["ninasr_b0"].build()
    torch.manual_seed(3)
    network = NETWORKS["ninasr_b0"].build().eval()
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


def test_input_and_stored_target_show_the_same_crop(recipe: Recipe, tmp_path: Path) -> None:
    """A picture whose target is itself, enlarged: after augmentation the halved target must still be the input."""
    quiet = load_recipe(
        recipe, {f"augmentation.{name}": 0 for name in ("brightness", "contrast", "saturation", "noise")}
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
