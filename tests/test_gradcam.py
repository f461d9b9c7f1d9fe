"""Grad-CAM against its definition, and how much of it lies in lesions."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from dualrefnet.analysis.gradcam import (
    Localisation,
    energy_inside,
    gradcam,
    localise,
    overlay,
    pointing_game,
)
from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.data.images import read_mask
from dualrefnet.errors import DataError
from dualrefnet.models.base import Architecture, Method
from dualrefnet.models.encoders import BACKBONES, Encoder, WeightsSource
from dualrefnet.models.ensemble import Ensemble
from dualrefnet.models.registry import METHODS, NEUTRAL, new_model
from dualrefnet.recipe import ModelSection, load_recipe
from dualrefnet.run import Run
from stand_in import build, set_linear

WIDTH, CLASSES = 5, 4


WITH_IMAGE = [name for name, method in METHODS.items() if method.reads_image]


TRANSFORMERS = [name for name, spec in BACKBONES.items() if spec.kind == "transformer"]


class Pixels(nn.Module):
    """An encoder's network whose map is the image."""

    def forward_features(self, image: Tensor) -> Tensor:
        return image


def linear_on_pixels(weight: list[list[float]]) -> Method:
    """Return scores = weight @ (mean colour of the image)."""
    model = build("no_metadata", 3, WIDTH)
    model.encoder.body = Pixels()
    set_linear(model.classifier, weight)
    return model


def new(method: str, backbone: str = "mobilenet_v2", size: int = 64, **overrides: object) -> Method:
    torch.manual_seed(0)
    values = {
        "model.method": method,
        "model.backbone": backbone,
        "model.weights": "none",
        "image.size": size,
        **overrides,
    }
    if method == "ensemble":
        values["model.members"] = (backbone, "mobilenet_v2", "efficientnet_lite0")
    return new_model(load_recipe({"name": "gradcam"}, values), WIDTH, CLASSES)[0].eval()


def inputs(size: int = 64, count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=generator), torch.randn(count, WIDTH, generator=generator)


def by_hand(model: Method, position: int, images: Tensor, metadata: Tensor, targets: Tensor) -> Tensor:
    """Compute (B, h, w) from the definition with autograd alone, tokens left as tokens."""
    encoder = model.encoders[position]
    tokens = BACKBONES[encoder.name].class_token
    layer, kept = encoder.body.blocks[-1].norm1 if tokens else encoder.last_map, []

    def keep(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    hook = layer.register_forward_hook(keep)
    logits = model(images, metadata).logits
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[range(len(images)), targets].sum(), kept[0])
    values = kept[0].detach()
    if tokens:
        side = images.shape[-1] // encoder.stride
        weights = gradient[:, 1:].mean(dim=1)
        return torch.einsum("bd,bnd->bn", weights, values[:, 1:]).clamp(min=0).view(-1, side, side)
    return torch.einsum("bd,bdhw->bhw", gradient.mean(dim=(2, 3)), values).clamp(min=0)


def state(model: Method) -> tuple[object, ...]:
    modules = list(model.modules())
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks) for module in modules
    ]
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    return (
        [module.training for module in modules],
        hooks,
        [parameter.requires_grad for parameter in model.parameters()],
        [gradient is None for gradient in gradients],
        [float(gradient.sum()) for gradient in gradients if gradient is not None],
        {name: float(value.double().sum()) for name, value in model.state_dict().items()},
    )


def test_heat_of_a_linear_model_is_known() -> None:
    # z_c = sum_k w_ck mean(A_k), so dz / dA_k = w_ck / (h w) everywhere, and heat = ReLU(sum_k w_ck A_k) / (h w).
    model = linear_on_pixels([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]])
    image = torch.tensor([[[[1.0, 0.0], [2.0, -8.0]], [[0.0, 3.0], [1.0, 2.0]], [[5.0, 1.0], [1.0, 4.0]]]])
    found = gradcam(model, image.repeat(2, 1, 1, 1), torch.zeros(2, WIDTH), torch.tensor([0, 1]))
    # Class 0: 1 A_0 + 2 A_1; class 1: A_2 - A_1.
    expected = torch.tensor([[[1.0, 6.0], [4.0, 0.0]], [[5.0, 0.0], [0.0, 2.0]]]) / 4
    torch.testing.assert_close(found.saliency, expected)
    torch.testing.assert_close(found.maps[0], expected)
    assert not (found.saliency.amax(dim=(1, 2)) == 0).any()


def test_where_nothing_speaks_for_a_class_heat_is_zero_and_known_as_such() -> None:
    model = linear_on_pixels([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    images = torch.rand(2, 3, 4, 4) + 0.1
    found = gradcam(model, images, torch.zeros(2, WIDTH), torch.tensor([0, 1]))
    assert (found.saliency.amax(dim=(1, 2)) == 0).tolist() == [True, False]
    assert torch.count_nonzero(found.saliency[0]) == 0
    assert torch.isfinite(found.saliency).all()


@pytest.mark.parametrize("method", WITH_IMAGE)
def test_heat_of_every_method_is_that_of_the_definition(method: str) -> None:
    model, (images, metadata) = new(method), inputs()
    if hasattr(model, "decision"):
        model.decision.weights.copy_(torch.tensor([0.5, 0.25, 0.25]))
    warm = False
    for target in range(CLASSES):
        targets = torch.tensor([target, (target + 1) % CLASSES, target])
        found = gradcam(model, images, metadata, targets)
        assert found.saliency.shape == (3, 64, 64)
        assert found.saliency.dtype == torch.float32
        assert found.saliency.min() >= 0
        assert len(found.maps) == len(model.encoders)
        for position, places in enumerate(found.maps):
            assert places.shape == (3, 2, 2)
            expected = by_hand(model, position, images, metadata, targets)
            torch.testing.assert_close(places, expected, rtol=1e-4, atol=1e-7 + 1e-4 * float(expected.max()))
        warm = warm or bool(found.saliency.any())
    assert warm, "or nothing was compared"


@pytest.mark.parametrize("backbone", [name for name, spec in BACKBONES.items() if spec.kind == "cnn"])
def test_heat_of_every_cnn_is_that_of_the_definition(backbone: str) -> None:
    check_encoder(backbone)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", TRANSFORMERS)
def test_heat_of_every_transformer_is_that_of_the_definition(backbone: str) -> None:
    check_encoder(backbone)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", TRANSFORMERS)
def test_heat_of_a_method_that_asks_for_taps_is_that_of_the_definition(backbone: str) -> None:
    check_encoder(backbone, "visual")


def small_vit() -> Encoder:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    body = VisionTransformer(img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    encoder = Encoder("vit_b_16", body, WeightsSource("none", "small", None, NEUTRAL, NEUTRAL))
    encoder.features = 24
    return encoder


def check_encoder(backbone: str, method: str = "dualrefnet") -> None:
    check(new(method, backbone))


def check(model: Method) -> None:
    images, metadata = inputs(count=2)
    side = 64 // model.encoder.stride
    before, warm = state(model), 0
    for target in range(CLASSES):
        targets = torch.full((2,), target)
        found = gradcam(model, images, metadata, targets)
        expected = by_hand(model, 0, images, metadata, targets)
        assert expected.shape == (2, side, side)
        torch.testing.assert_close(found.maps[0], expected, rtol=1e-3, atol=1e-7 + 1e-3 * float(expected.max()))
        warm += int((found.saliency.amax(dim=(1, 2)) > 0).sum())
    assert warm, "or nothing was compared"
    assert state(model) == before


def test_places_of_a_vision_transformer_lie_where_they_lay_in_the_image() -> None:
    # Only the patch in row 1, column 2 differs from the others, so only there can the heat differ; positions are taken
    # away.
    encoder = small_vit()
    nn.init.zeros_(encoder.body.pos_embed)
    section = ModelSection.model_validate({"method": "no_metadata", "backbone": "vit_b_16"})
    model = (
        METHODS["no_metadata"]
        .network(Architecture(image_size=64, metadata_width=0, classes=2, section=section), [encoder])
        .eval()
    )
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, 16:32, 32:48] = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps = torch.cat([gradcam(model, image, torch.empty(1, 0), torch.tensor([target])).maps[0] for target in (0, 1)])
    assert maps.any()
    for places in maps:
        if places.any():
            others = torch.cat([places.flatten()[:6], places.flatten()[7:]])
            torch.testing.assert_close(others, others[:1].expand(15), rtol=1e-3, atol=1e-8)
            assert abs(places[1, 2] - others[0]) > 0.01 * places.max()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("make", [lambda: new("dualrefnet"), lambda: new("ensemble")], ids=["dualrefnet", "ensemble"])
def test_a_model_is_left_as_it_was_found(make: Callable[[], Method], fails: bool) -> None:
    model, (images, metadata) = make(), inputs()
    # In training, one part in evaluation, one parameter frozen, one with a gradient of its own.
    model.train()
    model.encoders[0].eval()
    parameters = list(model.parameters())
    parameters[3].requires_grad_(False)
    parameters[5].grad = torch.full_like(parameters[5], 2.0)
    before = state(model)
    if fails:
        with pytest.raises(RuntimeError, match="out of bounds"):
            gradcam(model, images, metadata, torch.full((3,), 99))
    else:
        gradcam(model, images, metadata, torch.zeros(3, dtype=torch.int64))
    assert state(model) == before
    assert not images.requires_grad
    assert not metadata.requires_grad


def test_an_ensemble_shows_the_mean_of_its_encoders_in_shares_of_their_maximum() -> None:
    encoders = []
    for position in range(3):
        encoder = Encoder(
            "mobilenet_v2", Pixels(), WeightsSource("none", "", None, NEUTRAL, NEUTRAL), position=position
        )
        encoder.features = 3
        encoders.append(encoder)
    section = ModelSection(method="ensemble", members=("mobilenet_v2",) * 3)
    torch.manual_seed(0)
    model = Ensemble(Architecture(image_size=32, metadata_width=WIDTH, classes=2, section=section), encoders).eval()
    # The third has no say: its map is zero, and a zero is what it adds to the mean.
    model.decision.weights.copy_(torch.tensor([0.75, 0.25, 0.0]))
    images, metadata = torch.rand(4, 3, 8, 8), torch.randn(4, WIDTH)
    targets = torch.tensor([0, 1, 0, 1])
    found = gradcam(model, images, metadata, targets)
    expected = torch.zeros(4, 8, 8)
    for position, places in enumerate(found.maps):
        torch.testing.assert_close(places, by_hand(model, position, images, metadata, targets))
        expected += places / places.amax(dim=(1, 2), keepdim=True).clamp(min=1e-30) / 3
    torch.testing.assert_close(found.saliency, expected)
    assert [bool(places.any()) for places in found.maps][2] is False
    assert found.saliency.max() <= 2 / 3 + 1e-6


def test_an_overlay_leaves_the_skin_visible_and_glows_at_the_maximum() -> None:
    picture = np.full((2, 2, 3), 100, dtype=np.uint8)
    seen = overlay(picture, np.array([[0.0, 5.0], [2.5, 0.5]]))
    assert seen.dtype == np.uint8
    # Inferno's colours at 0, 1, .5 and .1 of the maximum; .65 of it covers from half on, in proportion below.
    top, half, little = ((252, 255, 164), (188, 55, 84), (22, 11, 57))
    np.testing.assert_array_equal(seen[0, 0], picture[0, 0])
    for place, colour, cover in (((0, 1), top, 0.65), ((1, 0), half, 0.65), ((1, 1), little, 0.13)):
        np.testing.assert_allclose(seen[place], (1 - cover) * 100 + cover * np.array(colour), atol=1.5)
    np.testing.assert_array_equal(overlay(picture, np.array([[0.0, 10.0], [5.0, 1.0]])), seen)
    np.testing.assert_array_equal(overlay(picture, np.zeros((2, 2))), picture)


@pytest.fixture(scope="module")
def opened(tiny_run: Run) -> OpenedRun:
    return open_run(tiny_run)


@pytest.fixture(scope="module")
def result(opened: OpenedRun) -> Localisation:
    return localise(opened, samples=200)


def square(side: int, *places: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((1, side, side), dtype=bool)
    for place in places:
        mask[0][place] = True
    return mask


@given(arrays(bool, (2, 6, 6)))
def test_even_heat_has_the_share_of_the_area_in_both_measures(mask: np.ndarray) -> None:
    heat = np.full((2, 6, 6), 0.3)
    np.testing.assert_allclose(energy_inside(heat, mask), mask.mean(axis=(1, 2)))
    np.testing.assert_allclose(pointing_game(heat, mask), mask.mean(axis=(1, 2)))


def test_the_hottest_place_decides_the_game_and_equal_ones_share_it() -> None:
    heat = np.array([[[1.0, 2.0], [3.0, 0.5]]])
    assert pointing_game(heat, square(2, (1, 0))).tolist() == [1.0]
    assert pointing_game(heat, square(2, (0, 0), (0, 1), (1, 1))).tolist() == [0.0]
    # What rounding made of equal values is equal.
    heat[0, 0, 1] = 3.0 - 1e-7
    assert pointing_game(heat, square(2, (1, 0))).tolist() == [0.5]


def table_of(energy: list[float], labels: str) -> pd.DataFrame:
    count = len(energy)
    return pd.DataFrame(
        {
            "image_id": [f"i{number}" for number in range(count)],
            "label": list(labels),
            "predicted": "A",
            "energy": energy,
            "energy_baseline": np.linspace(0.1, 0.4, count),
            "pointing": [1.0, 0.0] * (count // 2),
            "pointing_baseline": 1.0,
            "area": np.linspace(0.0, 0.3, count),
        }
    )


def test_a_run_is_measured_on_all_test_images_with_their_own_masks(opened: OpenedRun, result: Localisation) -> None:
    test = opened.rows("test").set_index("image_id")
    assert list(result.table["image_id"]) == list(test.index)
    assert result.images == result.with_mask == len(test)
    assert result.table["label"].tolist() == test["label"].tolist()
    assert (result.empty_masks, result.map_sides) == (0, (1,))
    # A map of one place is even heat: the share of the area, or none at all.
    seen = result.table["energy"].notna()
    assert result.empty_maps == (~seen).sum() < len(test)
    np.testing.assert_allclose(result.table["energy"][seen], result.table["area"][seen], rtol=1e-5)
    np.testing.assert_allclose(result.table["pointing"], np.where(seen, result.table["area"], 0), rtol=1e-5)
    for image_id, area in zip(result.table["image_id"], result.table["area"], strict=True):
        mask = cv2.imread(str(opened.dataset.root / "masks" / f"{image_id}.png"), cv2.IMREAD_GRAYSCALE) > 127
        assert area == pytest.approx(mask.mean(), abs=0.02)
    assert result.table["energy_baseline"].mean() > result.table["area"].mean(), "drawn lesions lie in the middle"
    whole = result.summary.iloc[0]
    assert whole["patients"] == opened.groups.loc[list(test.index[seen])].nunique()


def test_heat_is_that_of_the_class_that_the_run_predicted(opened: OpenedRun, result: Localisation) -> None:
    predictions = opened.run.predictions.set_index("image_id").loc[result.table["image_id"]]
    assert result.table["predicted"].tolist() == predictions["predicted"].tolist()
    examples = opened.pictures("test")
    batch = examples.batch(np.arange(len(examples)))
    targets = torch.tensor([opened.classes.index(name) for name in result.table["predicted"]])
    heat = gradcam(opened.model, opened.images(batch), batch.metadata, targets).saliency.double().numpy()
    paths = opened.rows("test")["image_path"]
    masks = [
        read_mask(opened.dataset.root / "masks" / f"{name}.png", Path(path), 32, "squash")
        for name, path in zip(examples.image_ids, paths, strict=True)
    ]
    np.testing.assert_allclose(result.table["energy"], energy_inside(heat, np.stack(masks)), rtol=1e-4)


def test_images_without_a_mask_and_empty_masks_are_counted_and_left_out(opened: OpenedRun, tmp_path: Path) -> None:
    names = list(opened.rows("test")["image_id"])[:10]
    for number, name in enumerate(names):
        mask = np.zeros((20, 20), dtype=np.uint8)
        mask[5:15, 5:15] = 0 if number in (3, 7) else 255
        cv2.imwrite(str(tmp_path / f"{name}.png"), mask)
    result = localise(opened, tmp_path, samples=20)
    assert list(result.table["image_id"]) == [name for number, name in enumerate(names) if number not in (3, 7)]
    assert (result.with_mask, result.empty_masks) == (10, 2)
    np.testing.assert_allclose(result.table["area"], 0.25, atol=0.02)
    for name in names:
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((20, 20), dtype=np.uint8))
    with pytest.raises(DataError, match="all masks of the 10 test images that have one are empty"):
        localise(opened, tmp_path)
