"""Grad-CAM against its definition, and how much of it lies in lesions."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from dualrefnet.analysis.gradcam import (
    COLUMNS,
    Localisation,
    draw_localisation,
    energy_inside,
    gradcam,
    localise,
    overlay,
    pointing_game,
    summarise,
)
from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.data.images import read_mask
from dualrefnet.errors import DataError, RunError
from dualrefnet.models.backbones import BACKBONES
from dualrefnet.models.base import Architecture, Method
from dualrefnet.models.encoders import Encoder, WeightsSource
from dualrefnet.models.registry import METHODS, NEUTRAL, new_model
from dualrefnet.recipe import ModelSection, load_recipe
from readable import assert_readable
from stand_in import build, set_linear

WIDTH, CLASSES = 5, 4
WITH_IMAGE = [name for name, method in METHODS.items() if method.reads_image]
CNNS = [name for name, spec in BACKBONES.items() if spec.kind == "cnn"]
TRANSFORMERS = [name for name, spec in BACKBONES.items() if spec.kind == "transformer"]


class Pixels(nn.Module):
    """An encoder's network whose map is the image, each `pool` x `pool` places averaged."""

    def __init__(self, pool: int = 1) -> None:
        super().__init__()
        self.pool, self.num_features = pool, 3

    def forward_features(self, image: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(image, self.pool)


def linear_on_pixels(weight: list[list[float]], pool: int = 1) -> Method:
    """Return scores = weight @ (mean colour of the image)."""
    model = build("no_metadata", 3, WIDTH)
    model.encoder.body = Pixels(pool)
    set_linear(model.classifier, weight)
    return model


def new(method: str, backbone: str = "mobilenet_v2") -> Method:
    torch.manual_seed(0)
    values: dict[str, object] = {"model.method": method, "model.backbone": backbone, "model.weights": "none"}
    if method == "ensemble":
        values["model.members"] = (backbone, "mobilenet_v2", "efficientnet_lite0")
    model = new_model(load_recipe({"name": "gradcam"}, {**values, "image.size": 64}), WIDTH, CLASSES)[0].eval()
    if method == "ensemble":
        model.decision.weights.copy_(torch.tensor([0.5, 0.25, 0.25]))
    return model


def made_of(method: str, encoders: list[Encoder], backbone: str, classes: int = CLASSES) -> Method:
    members = (backbone,) * len(encoders) if len(encoders) > 1 else None
    section = ModelSection.model_validate(
        {"method": method, "backbone": backbone} | ({"members": members} if members else {})
    )
    width = 0 if method == "no_metadata" else WIDTH
    architecture = Architecture(image_size=64, metadata_width=width, classes=classes, section=section)
    return METHODS[method].network(architecture, encoders).eval()


def encoder_of(name: str, body: nn.Module, features: int, position: int = 0) -> Encoder:
    encoder = Encoder(name, body, WeightsSource("none", "", None, NEUTRAL, NEUTRAL), position=position)
    encoder.features = features
    return encoder


def small_vit() -> Encoder:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    body = VisionTransformer(img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    return encoder_of("vit_b_16", body, 24)


def inputs(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 64, 64, generator=generator), torch.randn(count, WIDTH, generator=generator)


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
    hooks = [
        len(one._forward_hooks) + len(one._forward_pre_hooks) + len(one._backward_hooks) for one in model.modules()
    ]
    gradients = [None if one.grad is None else float(one.grad.sum()) for one in model.parameters()]
    return (
        [module.training for module in model.modules()],
        hooks,
        [parameter.requires_grad for parameter in model.parameters()],
        gradients,
        {name: float(value.double().sum()) for name, value in model.state_dict().items()},
    )


def check(model: Method) -> None:
    """Grad-CAM of every class and encoder is that of the definition, and the model stays as it was."""
    images, metadata = inputs(count=2)
    before, compared = state(model), False
    for target in range(CLASSES):
        targets = torch.tensor([target, (target + 1) % CLASSES])
        found = gradcam(model, images, metadata, targets)
        assert found.saliency.shape == (2, 64, 64)
        assert found.saliency.dtype == torch.float32
        assert found.saliency.min() >= 0
        assert len(found.maps) == len(model.encoders)
        for position, places in enumerate(found.maps):
            expected = by_hand(model, position, images, metadata, targets)
            assert places.shape == (2, *[64 // model.encoders[position].stride] * 2)
            torch.testing.assert_close(places, expected, rtol=1e-3, atol=1e-7 + 1e-3 * float(expected.max()))
        compared = compared or bool(found.saliency.any())
    assert compared
    assert state(model) == before


def test_saliency_of_a_linear_model_is_known() -> None:
    # z_c = sum_k w_ck mean(A_k), so dz / dA_k = w_ck / (h w) everywhere, and saliency = ReLU(sum_k w_ck A_k) / (h w).
    model = linear_on_pixels([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]])
    image = torch.tensor([[[[1.0, 0.0], [2.0, -8.0]], [[0.0, 3.0], [1.0, 2.0]], [[5.0, 1.0], [1.0, 4.0]]]])
    found = gradcam(model, image.repeat(2, 1, 1, 1), torch.zeros(2, WIDTH), torch.tensor([0, 1]))
    # Class 0: 1 A_0 + 2 A_1; class 1: A_2 - A_1.
    expected = torch.tensor([[[1.0, 6.0], [4.0, 0.0]], [[5.0, 0.0], [0.0, 2.0]]]) / 4
    torch.testing.assert_close(found.saliency, expected)
    torch.testing.assert_close(found.maps[0], expected)


def test_saliency_is_enlarged_bilinearly_to_the_side_of_the_image() -> None:
    model = linear_on_pixels([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]], pool=2)
    image = torch.zeros(1, 3, 4, 4)
    image[0, 0, :2, 2:] = 4.0
    found = gradcam(model, image, torch.zeros(1, WIDTH), torch.tensor([0]))
    torch.testing.assert_close(found.maps[0], torch.tensor([[[0.0, 4.0], [0.0, 0.0]]]))
    # Between the middles of two places, at a quarter and three quarters of the way.
    across, down = torch.tensor([0.0, 0.25, 0.75, 1.0]), torch.tensor([1.0, 0.75, 0.25, 0.0])
    torch.testing.assert_close(found.saliency, 4 * (down[:, None] * across)[None])


def test_where_nothing_speaks_for_a_class_saliency_is_zero() -> None:
    model = linear_on_pixels([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = gradcam(model, torch.rand(2, 3, 4, 4) + 0.1, torch.zeros(2, WIDTH), torch.tensor([0, 1]))
    assert (found.saliency == 0).flatten(1).all(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("method", WITH_IMAGE)
def test_saliency_of_every_method_is_that_of_the_definition(method: str) -> None:
    check(new(method))


@pytest.mark.parametrize("backbone", CNNS)
def test_saliency_of_every_cnn_is_that_of_the_definition(backbone: str) -> None:
    check(new("dualrefnet", backbone))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dualrefnet", "visual"])
@pytest.mark.parametrize("backbone", TRANSFORMERS)
def test_saliency_of_every_transformer_is_that_of_the_definition(backbone: str, method: str) -> None:
    check(new(method, backbone))


def test_places_of_a_vision_transformer_lie_where_they_lay_in_the_image() -> None:
    # Only the patch in row 1, column 2 differs from the others, so only there can saliency differ; positions are
    # taken away.
    encoder = small_vit()
    nn.init.zeros_(encoder.body.pos_embed)
    model = made_of("no_metadata", [encoder], "vit_b_16", classes=2)
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, 16:32, 32:48] = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps = torch.cat([gradcam(model, image, torch.empty(1, 0), torch.tensor([target])).maps[0] for target in (0, 1)])
    assert maps.any()
    for places in maps:
        if places.any():
            others = torch.cat([places.flatten()[:6], places.flatten()[7:]])
            torch.testing.assert_close(others, others[:1].expand(15), rtol=1e-3, atol=1e-8)
            assert abs(places[1, 2] - others[0]) > 0.01 * places.max()


@pytest.mark.parametrize("small", [False, True], ids=["mobilenet_v2", "vit"])
def test_a_frozen_encoder_gives_the_same_saliency_and_so_do_gradients_switched_off(small: bool) -> None:
    model, (images, metadata) = new("concat"), inputs()
    if small:
        model = made_of("concat", [small_vit()], "vit_b_16")
    targets = torch.tensor([0, 1, 2])
    free = gradcam(model, images, metadata, targets).saliency
    assert free.any()
    with torch.no_grad():
        torch.testing.assert_close(gradcam(model, images, metadata, targets).saliency, free)
    model.encoder.freeze()
    before = state(model)
    torch.testing.assert_close(gradcam(model, images, metadata, targets).saliency, free)
    assert state(model) == before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", ["dualrefnet", "ensemble"])
def test_a_model_is_left_as_it_was_found(method: str, fails: bool) -> None:
    model, (images, metadata) = new(method), inputs()
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


def test_saliency_is_of_the_image_as_it_is_also_where_predictions_average_over_views() -> None:
    model, (images, metadata) = new("dualrefnet"), inputs()
    targets = torch.tensor([0, 1, 2])
    expected = gradcam(model, images, metadata, targets).saliency
    model.views = 8
    torch.testing.assert_close(gradcam(model, images, metadata, targets).saliency, expected)
    assert model.views == 8


def test_images_of_a_batch_dont_meet_and_metadata_have_a_part() -> None:
    model, (images, metadata) = new("metablock"), inputs()
    targets = torch.tensor([0, 1, 2])
    together = gradcam(model, images, metadata, targets).saliency
    alone = [gradcam(model, images[i : i + 1], metadata[i : i + 1], targets[i : i + 1]).saliency for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-5 * float(together.max()))
    assert not torch.allclose(together, gradcam(model, images, -metadata, targets).saliency)


def test_an_ensemble_shows_the_mean_of_its_encoders_in_shares_of_their_maximum() -> None:
    torch.manual_seed(0)
    encoders = [encoder_of("mobilenet_v2", Pixels(), 3, position) for position in range(3)]
    model = made_of("ensemble", encoders, "mobilenet_v2", classes=2)
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
    assert [bool(places.any()) for places in found.maps] == [True, True, False]


def test_a_method_that_reads_no_image_has_no_gradcam() -> None:
    with pytest.raises(RunError, match="reads no image, so there is no Grad-CAM"):
        gradcam(new("metadata_only"), *inputs(), torch.tensor([0, 1, 2]))


def test_an_overlay_leaves_the_skin_visible_and_glows_at_the_maximum() -> None:
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    seen = overlay(image, np.array([[0.0, 5.0], [2.5, 0.5]]))
    assert seen.dtype == np.uint8
    # Inferno's colours at 0, 1, .5 and .1 of the maximum; .65 of it covers from half on, in proportion below.
    top, half, little = ((252, 255, 164), (188, 55, 84), (22, 11, 57))
    np.testing.assert_array_equal(seen[0, 0], image[0, 0])
    for place, colour, cover in (((0, 1), top, 0.65), ((1, 0), half, 0.65), ((1, 1), little, 0.13)):
        np.testing.assert_allclose(seen[place], (1 - cover) * 100 + cover * np.array(colour), atol=1.5)
    np.testing.assert_array_equal(overlay(image, np.array([[0.0, 10.0], [5.0, 1.0]])), seen)
    np.testing.assert_array_equal(overlay(image, np.zeros((2, 2))), image)


def square(side: int, *places: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((1, side, side), dtype=bool)
    for place in places:
        mask[0][place] = True
    return mask


@given(arrays(bool, (2, 6, 6)))
def test_even_saliency_has_the_share_of_the_area_in_both_measures(mask: np.ndarray) -> None:
    saliency = np.full((2, 6, 6), 0.3)
    np.testing.assert_allclose(energy_inside(saliency, mask), mask.mean(axis=(1, 2)))
    np.testing.assert_allclose(pointing_game(saliency, mask), mask.mean(axis=(1, 2)))


@given(
    arrays(np.float64, (1, 5, 5), elements=st.floats(0, 1, width=32)), arrays(bool, (1, 5, 5)), st.floats(0.01, 1000)
)
def test_measures_depend_on_shares_alone_and_mask_and_rest_add_up(
    saliency: np.ndarray, mask: np.ndarray, factor: float
) -> None:
    np.testing.assert_allclose(energy_inside(factor * saliency, mask), energy_inside(saliency, mask), equal_nan=True)
    for measure in (energy_inside, pointing_game):
        total = measure(saliency, mask) + measure(saliency, ~mask)
        # Without saliency there is no share, and the game is lost.
        none = np.nan if measure is energy_inside else 0
        np.testing.assert_allclose(total, 1 if saliency.any() else none)


def test_the_maximum_decides_the_game_and_equal_ones_share_it() -> None:
    saliency = np.array([[[1.0, 2.0], [3.0, 0.5]]])
    assert pointing_game(saliency, square(2, (1, 0))).tolist() == [1.0]
    assert pointing_game(saliency, square(2, (0, 0), (0, 1), (1, 1))).tolist() == [0.0]
    # What rounding made of equal values is equal.
    saliency[0, 0, 1] = 3.0 - 1e-7
    assert pointing_game(saliency, square(2, (1, 0))).tolist() == [0.5]


def table_of(energy: list[float], labels: str) -> pd.DataFrame:
    count = len(energy)
    columns = {
        "image_id": [f"i{number}" for number in range(count)],
        "label": list(labels),
        "energy": energy,
        "energy_baseline": np.linspace(0.1, 0.4, count),
        "pointing": [1.0, 0.0] * (count // 2),
        "pointing_baseline": 1.0,
        "area": np.linspace(0.0, 0.3, count),
    }
    return pd.DataFrame(columns)


def test_means_leave_undefined_shares_out_of_their_row_only() -> None:
    table = table_of([0.5, np.nan, 0.7, 0.1], "ABBA")
    index = ["class", "measure"]
    summary = summarise(table, np.array([*"ppqr"]), ("A", "B", "C"), samples=100).set_index(index)
    assert list(summary.index) == [(name, one) for name in ("all images", *"AB") for one in ("energy", "pointing")]
    energy = summary.loc[("all images", "energy")]
    assert (energy["images"], energy["patients"]) == (3, 3)
    # Of images 0, 2, 3 alone: baselines .1, .3, .4 and areas 0, .2, .3.
    assert energy[list(COLUMNS)].tolist() == pytest.approx([1.3 / 3, 0.8 / 3, 0.5 / 3, 0.5 / 3])
    pointing = summary.loc[("all images", "pointing")]
    assert (pointing["images"], pointing["value"], pointing["difference"]) == (4, 0.5, -0.5)
    assert summary.loc[("B", "energy"), ["images", "patients", "value"]].tolist() == [1, 1, 0.7]
    # One patient says nothing of others.
    assert np.isnan(summary.loc[("B", "energy"), "low"])
    assert not np.isnan(summary.loc[("B", "pointing"), "low"])
    alone = summarise(table, np.array([*"pppp"]), ("A", "B"), samples=100)
    assert alone["low"].isna().all()
    assert alone["value"].tolist() == pytest.approx(summary["value"].tolist())


def test_intervals_are_those_of_laid_out_samples_of_patients() -> None:
    random = np.random.default_rng(5)
    table = table_of(list(random.uniform(0, 1, 40)), "AB" * 20)
    patients = np.array([f"p{number}" for number in random.integers(0, 12, 40)])
    summary = summarise(table, patients, ("A", "B"), samples=300, seed=2).set_index(["class", "measure"])
    names = list(dict.fromkeys(patients))
    generator = np.random.default_rng(2)
    drawn: dict[str, list[list[float]]] = {"all images": [], "B": []}
    for _ in range(300):
        chosen = generator.integers(len(names), size=len(names))
        sample = pd.concat([table[patients == names[number]] for number in chosen])
        for name, part in (("all images", sample), ("B", sample[sample["label"] == "B"])):
            value, baseline = part["energy"].mean(), part["energy_baseline"].mean()
            drawn[name].append([value, baseline, value - baseline, part["area"].mean()])
    for name, values in drawn.items():
        expected = np.nanquantile(values, [0.025, 0.975], axis=0)
        row = summary.loc[(name, "energy")]
        found = [[row[f"{prefix}{bound}"] for prefix in COLUMNS.values()] for bound in ("low", "high")]
        np.testing.assert_allclose(found, expected)


@pytest.fixture(scope="module")
def result(opened: OpenedRun) -> Localisation:
    return localise(opened, samples=200)


def test_a_run_is_measured_on_all_test_images_with_their_own_masks(opened: OpenedRun, result: Localisation) -> None:
    test = opened.rows("test").set_index("image_id")
    assert list(result.table["image_id"]) == list(test.index)
    assert result.images == result.with_mask == len(test)
    assert result.table["label"].tolist() == test["label"].tolist()
    assert (result.empty_masks, result.map_sides) == (0, (1,))
    # A map of one place is even: the share of the area, or none at all.
    seen = result.table["energy"].notna()
    assert result.empty_maps == (~seen).sum() < len(test)
    np.testing.assert_allclose(result.table["energy"][seen], result.table["area"][seen], rtol=1e-5)
    np.testing.assert_allclose(result.table["pointing"], np.where(seen, result.table["area"], 0), rtol=1e-5)
    for image_id, area in zip(result.table["image_id"], result.table["area"], strict=True):
        mask = cv2.imread(str(opened.dataset.root / "masks" / f"{image_id}.png"), cv2.IMREAD_GRAYSCALE) > 127
        assert area == pytest.approx(mask.mean(), abs=0.02)
    whole = result.summary.iloc[0]
    assert whole["patients"] == opened.groups.loc[list(test.index[seen])].nunique()


def test_saliency_is_that_of_the_class_that_the_run_predicted(opened: OpenedRun, result: Localisation) -> None:
    predictions = opened.run.predictions.set_index("image_id").loc[result.table["image_id"]]
    assert result.table["predicted"].tolist() == predictions["predicted"].tolist()
    examples = opened.image_examples("test")
    batch = examples.batch(np.arange(len(examples)))
    targets = torch.tensor([opened.classes.index(name) for name in result.table["predicted"]])
    saliency = gradcam(opened.model, opened.images(batch), batch.metadata, targets).saliency.double().numpy()
    masks = [
        read_mask(opened.dataset.root / "masks" / f"{name}.png", Path(path), 32, "squash")
        for name, path in zip(examples.image_ids, opened.rows("test")["image_path"], strict=True)
    ]
    np.testing.assert_allclose(result.table["energy"], energy_inside(saliency, np.stack(masks)), rtol=1e-4)


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


def test_without_masks_the_error_says_where_they_should_be(opened: OpenedRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder of masks .*nowhere"):
        localise(opened, tmp_path / "nowhere")
    cv2.imwrite(str(tmp_path / "another.png"), np.full((20, 20), 255, dtype=np.uint8))
    with pytest.raises(DataError, match="none of the test images has a mask"):
        localise(opened, tmp_path)


def test_the_figure_of_the_localisation_holds_its_summary(result: Localisation) -> None:
    drawn = draw_localisation(result)
    assert_readable(drawn)
    pd.testing.assert_frame_equal(drawn.data, result.summary)
