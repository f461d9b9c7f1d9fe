import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dualrefnet.data.loader import AugmentationDraw, draw, shade, warp
from dualrefnet.recipe import AugmentationSection

STILL = {"horizontal_flip": 0, "vertical_flip": 0, "scale": (1, 1), "rotation": 0}
PLAIN = {"brightness": 0, "contrast": 0, "saturation": 0, "noise": 0}
sections = st.builds(
    AugmentationSection,
    horizontal_flip=st.floats(0, 1),
    vertical_flip=st.floats(0, 1),
    scale=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted).map(tuple),
    rotation=st.just(0.0),
    brightness=st.floats(0, 1),
    contrast=st.floats(0, 1),
    saturation=st.floats(0, 1),
    noise=st.floats(0, 0.5),
)


def noise_images(count=4, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def smooth_images(side, count=3):
    """Pictures of slow waves, sampled at pixel centres, so that the same picture can be had at any size."""
    x = (torch.arange(side) + 0.5) / side
    waves = [torch.sin(2 * x[:, None] * k + 1.5 * x[None, :] + k) / 2 + 0.5 for k in range(1, 4)]
    return torch.stack(waves).expand(count, 3, side, side).clone()


def test_an_identity_draw_leaves_the_picture_unchanged():
    draws = draw(4, AugmentationSection(**STILL, **PLAIN), seed=1, epoch=0)
    assert torch.equal(draws.geometry, torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(4, 2, 3))
    assert torch.equal(draws.photometry, torch.tensor([1.0, 1, 1, 0]).expand(4, 4))
    images = noise_images()
    torch.testing.assert_close(shade(warp(images, draws.geometry), draws.photometry), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "axis"), [("horizontal_flip", 3), ("vertical_flip", 2)])
def test_a_flip_is_exact_in_bytes(name, axis):
    draws = draw(3, AugmentationSection(**(STILL | PLAIN | {name: 1})), 0, 0)
    images = torch.randint(256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(warp(images / 255, draws.geometry).mul(255).round(), images.flip(axis))


def test_a_quarter_turn_is_exact_in_bytes():
    images = torch.randint(256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    turned = warp(images / 255, torch.tensor([[[0.0, -1, 0], [1, 0, 0]]])).mul(255).round()
    assert torch.equal(turned, torch.rot90(images, 1, (2, 3))) or torch.equal(turned, torch.rot90(images, -1, (2, 3)))


def test_a_crop_shows_that_part_of_the_picture():
    ramp = (torch.arange(64) + 0.5).expand(1, 3, 64, 64) / 64
    half = warp(ramp, torch.tensor([[[0.5, 0, -0.5], [0, 0.5, 0]]]))
    assert half.min() == pytest.approx(0, abs=0.02)
    assert half.max() == pytest.approx(0.5, abs=0.02)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rotation=st.sampled_from([0.0, 45.0, 180.0]))
def test_warping_the_picture_and_its_target_of_twice_the_size_commute(seed, rotation):
    geometry = draw(3, AugmentationSection(rotation=rotation, scale=(0.5, 1.0)), seed, 0).geometry
    target, image = smooth_images(128), smooth_images(64)
    small = functional.avg_pool2d(warp(target, geometry), 2)
    # Away from the border, where mirroring makes an edge that the smaller picture can't show.
    inside = (
        warp(
            torch.ones(3, 1, 64, 64).index_fill(2, torch.tensor([0, 63]), 0).index_fill(3, torch.tensor([0, 63]), 0),
            geometry,
        )
        == 1
    )
    assert ((small - warp(image, geometry)).abs() * inside).max() < 0.02


@settings(max_examples=50, deadline=None)
@given(section=sections, seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 500))
def test_without_rotation_the_crop_stays_inside_and_every_choice_in_its_range(section, seed, epoch):
    draws = draw(20, section, seed, epoch)
    corners = torch.tensor([[x, y, 1.0] for x in (-1, 1) for y in (-1, 1)])
    assert (draws.geometry @ corners.T).abs().max() <= 1 + 1e-6
    scale = draws.geometry[:, 0, :2].norm(dim=1)
    assert (scale >= section.scale[0] - 1e-6).all()
    assert (scale <= section.scale[1] + 1e-6).all()
    for column, strength in enumerate((section.brightness, section.contrast, section.saturation)):
        assert ((draws.photometry[:, column] - 1).abs() <= strength + 1e-6).all()
    assert (draws.photometry[:, 3] >= 0).all()
    assert (draws.photometry[:, 3] <= section.noise + 1e-6).all()


def test_the_choices_fill_their_ranges_and_have_their_probabilities():
    section = AugmentationSection(
        horizontal_flip=0.25, vertical_flip=0, scale=(0.5, 1.0), rotation=0, brightness=0.4, noise=0.1
    )
    draws = draw(4000, section, 0, 0)
    assert (draws.geometry[:, 0, 0] < 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert (draws.geometry[:, 1, 1] > 0).all()
    assert draws.geometry[:, 1, 1].mean() == pytest.approx(0.75, abs=0.01)
    assert draws.photometry[:, 0].std() == pytest.approx(0.8 / np.sqrt(12), abs=0.01)
    assert draws.photometry[:, 3].mean() == pytest.approx(0.05, abs=0.003)


def test_rotation_is_by_up_to_the_degrees_asked_for():
    geometry = draw(2000, AugmentationSection(**(STILL | {"rotation": 30})), 0, 0).geometry
    degrees = torch.rad2deg(torch.atan2(geometry[:, 1, 0], geometry[:, 0, 0]))
    assert degrees.abs().max() <= 30.001
    assert degrees.min() < -28
    assert degrees.max() > 28
    torch.testing.assert_close(torch.linalg.det(geometry[:, :, :2]), torch.ones(2000))


def test_the_draws_of_an_image_are_the_same_whatever_the_batch_and_differ_by_seed_and_epoch():
    section = AugmentationSection(rotation=90)
    draws = draw(50, section, 3, 7)
    again = draw(50, section, 3, 7)
    assert torch.equal(draws.geometry, again.geometry)
    rows = np.array([40, 2, 17])
    chosen = draws.of(rows)
    assert isinstance(chosen, AugmentationDraw)
    assert torch.equal(chosen.geometry, draws.geometry[[40, 2, 17]])
    assert torch.equal(chosen.photometry, draws.photometry[[40, 2, 17]])
    images = noise_images(50)
    torch.testing.assert_close(warp(images[rows], chosen.geometry), warp(images, draws.geometry)[rows])
    for other in (draw(50, section, 4, 7), draw(50, section, 3, 8)):
        assert (other.geometry != draws.geometry).any()


def test_changing_one_setting_leaves_the_other_choices_as_they_were():
    first = draw(30, AugmentationSection(brightness=0.1), 0, 0)
    second = draw(30, AugmentationSection(brightness=0.5, vertical_flip=0), 0, 0)
    assert torch.equal(first.photometry[:, 1:], second.photometry[:, 1:])
    assert torch.equal(first.geometry[:, 0], second.geometry[:, 0])


def test_drawing_does_not_touch_the_global_random_numbers():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    np_state = np.random.get_state()[1].copy()  # noqa: NPY002
    draw(10, AugmentationSection(), 0, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == np_state).all()  # noqa: NPY002


def photometry(brightness=1.0, contrast=1.0, saturation=1.0, noise=0.0, count=4):
    return torch.tensor([[brightness, contrast, saturation, noise]]).expand(count, 4)


def test_saturation_zero_gives_the_grey_of_bt_601():
    images = noise_images()
    grey = shade(images, photometry(saturation=0))
    expected = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(grey, expected.expand_as(grey))


def test_brightness_multiplies_and_contrast_stretches_about_the_mean():
    images = noise_images() * 0.4 + 0.2
    torch.testing.assert_close(shade(images, photometry(brightness=1.2)), images * 1.2)
    torch.testing.assert_close(
        shade(images, photometry(contrast=0)), images.mean(dim=(1, 2, 3), keepdim=True).expand_as(images)
    )


def test_each_image_has_its_own_factors():
    images = noise_images(2) * 0.5
    both = shade(images, torch.tensor([[1.0, 1, 1, 0], [0.5, 1, 1, 0]]))
    torch.testing.assert_close(both, torch.stack([images[0], images[1] / 2]))


def test_the_noise_has_the_sd_asked_for_and_follows_from_the_generator():
    images = torch.full((2, 3, 64, 64), 0.5)
    noisy = [shade(images, photometry(noise=0.05, count=2), torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(noisy[0], noisy[1])
    assert (noisy[0] - 0.5).std() == pytest.approx(0.05, rel=0.03)


@settings(max_examples=30, deadline=None)
@given(section=sections, seed=st.integers(0, 10**6))
def test_the_result_stays_in_range(section, seed):
    draws = draw(4, section, seed, 0)
    result = shade(warp(noise_images(seed=seed), draws.geometry), draws.photometry, torch.Generator().manual_seed(seed))
    assert torch.isfinite(result).all()
    assert result.min() >= 0
    assert result.max() <= 1
