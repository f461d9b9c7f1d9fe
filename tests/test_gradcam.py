from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dualrefnet.errors import RunError
from dualrefnet.models.base import Architecture, Method
from dualrefnet.models.encoders import BACKBONES, Encoder, WeightsSource
from dualrefnet.models.ensemble import Ensemble
from dualrefnet.models.registry import METHODS, NEUTRAL, new_model
from dualrefnet.recipe import ModelSection, load_recipe
from stand_in import build, set_linear

pytest.importorskip("captum")

from dualrefnet.analysis.gradcam import GradCamCase, draw_gradcam, gradcam, overlay

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
    torch.testing.assert_close(found.heat, expected)
    torch.testing.assert_close(found.maps[0], expected)
    assert not found.empty.any()


def test_heat_is_enlarged_bilinearly_to_the_side_of_the_image() -> None:
    class Mean(nn.Module):
        def forward_features(self, image: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(image, 2)

    model = linear_on_pixels([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    model.encoder.body = Mean()
    image = torch.zeros(1, 3, 4, 4)
    image[0, 0, :2, 2:] = 4.0
    found = gradcam(model, image, torch.zeros(1, WIDTH), torch.tensor([0]))
    torch.testing.assert_close(found.maps[0], torch.tensor([[[0.0, 4.0], [0.0, 0.0]]]))
    # Between the middles of two places, at a quarter and three quarters of the way.
    across, down = torch.tensor([0.0, 0.25, 0.75, 1.0]), torch.tensor([1.0, 0.75, 0.25, 0.0])
    torch.testing.assert_close(found.heat, 4 * (down[:, None] * across)[None])


def test_where_nothing_speaks_for_a_class_heat_is_zero_and_known_as_such() -> None:
    model = linear_on_pixels([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    images = torch.rand(2, 3, 4, 4) + 0.1
    found = gradcam(model, images, torch.zeros(2, WIDTH), torch.tensor([0, 1]))
    assert found.empty.tolist() == [True, False]
    assert torch.count_nonzero(found.heat[0]) == 0
    assert torch.isfinite(found.heat).all()


@pytest.mark.parametrize("method", WITH_IMAGE)
def test_heat_of_every_method_is_that_of_the_definition(method: str) -> None:
    model, (images, metadata) = new(method), inputs()
    if hasattr(model, "decision"):
        model.decision.weights.copy_(torch.tensor([0.5, 0.25, 0.25]))
    warm = False
    for target in range(CLASSES):
        targets = torch.tensor([target, (target + 1) % CLASSES, target])
        found = gradcam(model, images, metadata, targets)
        assert found.heat.shape == (3, 64, 64)
        assert found.heat.dtype == torch.float32
        assert found.heat.min() >= 0
        assert len(found.maps) == len(model.encoders)
        for position, places in enumerate(found.maps):
            assert places.shape == (3, 2, 2)
            expected = by_hand(model, position, images, metadata, targets)
            torch.testing.assert_close(places, expected, rtol=1e-4, atol=1e-7 + 1e-4 * float(expected.max()))
        warm = warm or bool(found.heat.any())
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


def test_heat_of_a_small_vision_transformer_is_that_of_the_definition() -> None:
    encoder = small_vit()
    section = ModelSection.model_validate({"method": "concat", "backbone": "vit_b_16"})
    model = (
        METHODS["concat"]
        .network(Architecture(image_size=64, metadata_width=WIDTH, classes=CLASSES, section=section), [encoder])
        .eval()
    )
    check(model)


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
        warm += int((~found.empty).sum())
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


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "small"])
def test_a_frozen_encoder_gives_the_same_heat(backbone: str) -> None:
    model, (images, metadata) = new("concat"), inputs()
    if backbone == "small":
        section = ModelSection.model_validate({"method": "concat", "backbone": "vit_b_16"})
        model = (
            METHODS["concat"]
            .network(Architecture(image_size=64, metadata_width=WIDTH, classes=CLASSES, section=section), [small_vit()])
            .eval()
        )
    targets = torch.tensor([0, 1, 2])
    free = gradcam(model, images, metadata, targets).heat
    assert free.any()
    model.encoder.freeze()
    before = state(model)
    torch.testing.assert_close(gradcam(model, images, metadata, targets).heat, free)
    assert state(model) == before
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


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


def test_heat_is_that_of_evaluation_also_of_a_model_in_training() -> None:
    model, (images, metadata) = new("dualrefnet"), inputs()
    targets = torch.tensor([0, 1, 2])
    expected = gradcam(model, images, metadata, targets).heat
    torch.testing.assert_close(gradcam(model.train(), images, metadata, targets).heat, expected)


def test_the_callers_image_is_not_marked_even_where_it_is_the_map() -> None:
    image = torch.rand(1, 3, 4, 4)
    gradcam(linear_on_pixels([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), image, torch.zeros(1, WIDTH), torch.tensor([0]))
    assert not image.requires_grad
    assert image.grad is None


def test_it_works_where_gradients_are_switched_off() -> None:
    model, (images, metadata) = new("concat"), inputs()
    targets = torch.tensor([0, 1, 2])
    expected = gradcam(model, images, metadata, targets).heat
    with torch.no_grad():
        torch.testing.assert_close(gradcam(model, images, metadata, targets).heat, expected)


def test_images_of_a_batch_dont_meet() -> None:
    model, (images, metadata) = new("dualrefnet"), inputs()
    targets = torch.tensor([0, 1, 2])
    together = gradcam(model, images, metadata, targets).heat
    alone = [gradcam(model, images[i : i + 1], metadata[i : i + 1], targets[i : i + 1]).heat for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-5 * float(together.max()))


def test_the_form_has_a_part_in_the_heat() -> None:
    model, (images, metadata) = new("metablock"), inputs()
    targets = torch.tensor([0, 0, 0])
    assert not torch.allclose(
        gradcam(model, images, metadata, targets).heat, gradcam(model, images, -metadata, targets).heat
    )


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
    torch.testing.assert_close(found.heat, expected)
    assert [bool(places.any()) for places in found.maps][2] is False
    assert found.heat.max() <= 2 / 3 + 1e-6


def test_a_method_that_reads_no_image_has_no_gradcam() -> None:
    with pytest.raises(RunError, match="Metadata only reads no image, so there is no Grad-CAM"):
        gradcam(new("metadata_only"), *inputs(), torch.tensor([0, 1, 2]))


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


@pytest.mark.parametrize("heat", [np.zeros((2, 3)), np.full((2, 2), -1.0), np.full((2, 2), np.nan)])
def test_an_overlay_of_what_is_no_heat_is_refused(heat: np.ndarray) -> None:
    with pytest.raises(ValueError, match="heat"):
        overlay(np.zeros((2, 2, 3), dtype=np.uint8), heat)


def cases() -> list[GradCamCase]:
    picture, mask = np.full((8, 8, 3), 120, dtype=np.uint8), np.zeros((8, 8), dtype=bool)
    mask[:, :2] = True
    even, none = np.ones((8, 8), dtype=np.float32), np.zeros((8, 8), dtype=np.float32)
    return [
        GradCamCase(
            "image 1", picture, {"MEL": even, "NEV": none}, {"MEL": 0.7, "NEV": 0.2}, "NEV", "MEL", "NEV", mask
        ),
        GradCamCase("image 2", picture, {"MEL": even * 3, "NEV": even}, {"MEL": 0.4, "NEV": 0.6}, "NEV", "NEV", "MEL"),
    ]


def test_drawn_cases_carry_their_numbers_and_say_what_they_show() -> None:
    picture = draw_gradcam(cases(), "The first two images.")
    data = picture.data.set_index(["image", "class"])
    assert data["probability"].to_dict() == {
        ("image 1", "MEL"): 0.7,
        ("image 1", "NEV"): 0.2,
        ("image 2", "NEV"): 0.6,
        ("image 2", "MEL"): 0.4,
    }
    assert data["maximum"].tolist() == [1.0, 0.0, 1.0, 3.0]
    assert data.loc[("image 1", "MEL"), "in_mask"] == 0.25
    assert data["in_mask"].isna().tolist() == [False, True, True, True]
    titles = [axis.get_title(loc="left") for axis in picture.figure.axes[:6]]
    assert titles == [
        "image 1\ntrue: NEV",
        "MEL\n70%, predicted",
        "NEV\n20%, no evidence",
        "image 2\ntrue: NEV",
        "NEV\n60%, predicted",
        "MEL\n40%, not predicted",
    ]
    np.testing.assert_array_equal(
        picture.figure.axes[1].images[0].get_array(), overlay(cases()[0].image, cases()[0].saliency["MEL"])
    )
    assert picture.caption.endswith("The first two images.")
    assert "outline" in picture.caption
    assert "encoders" not in picture.caption
    assert "image 1 (true NEV): MEL 70%, 25% of the heat in the lesion" in picture.alt
    assert "mean of the maps of 3 encoders" in draw_gradcam(cases()[1:], "One.", encoders=3).caption
    assert "outline" not in draw_gradcam(cases()[1:], "One.").caption


def test_there_is_one_scale_with_words() -> None:
    figure = draw_gradcam(cases(), "The first two images.").figure
    assert len(figure.axes) == 7
    words = [label.get_text() for label in figure.axes[6].get_xticklabels()]
    assert words == ["little", "half of the maximum", "much"]
    assert "evidence for the class" in figure.axes[6].get_xlabel()
