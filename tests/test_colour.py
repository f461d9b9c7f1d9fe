import threading

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dualrefnet.runtime.preprocessing import clahe_lightness, shades_of_gray

images = arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)))


def reference(image, p, gamma=None):
    """The formula as it is printed, in floating point."""
    pixels = image.astype(np.float64) / 255
    if gamma is not None:
        pixels = pixels**gamma
    light = np.mean(pixels**p, axis=(0, 1)) ** (1 / p)
    if not light.any():
        return image
    light = np.maximum(light / np.sqrt(np.sum(light**2)), 1e-6)
    pixels = np.clip(pixels / (np.sqrt(3) * light), 0, 1)
    return 255 * (pixels if gamma is None else pixels ** (1 / gamma))


def photograph(seed=0, side=240, low=90, high=170):
    """A smooth, moderately coloured picture."""
    small = np.random.default_rng(seed).integers(low, high, (12, 12, 3), dtype=np.uint8)
    return cv2.resize(small, (side, side), interpolation=cv2.INTER_LINEAR)


@settings(deadline=None)
@given(image=images, p=st.sampled_from([1.0, 2.0, 6.0, 12.5]), gamma=st.sampled_from([None, 2.2]))
def test_shades_of_gray_is_the_formula_to_one_level(image, p, gamma):
    assert np.abs(shades_of_gray(image, p, gamma) - reference(image, p, gamma)).max() <= 1


@pytest.mark.parametrize("p", [1, 6])
@pytest.mark.parametrize("colour", [(200, 120, 80), (1, 2, 3), (10, 10, 10)])
def test_a_picture_of_one_colour_becomes_grey(colour, p):
    result = shades_of_gray(np.full((20, 30, 3), colour, np.uint8), p).astype(int)
    assert np.ptp(result, axis=2).max() <= 1
    assert result.max() - result.min() <= 1


def test_p_of_one_is_grey_world():
    image = np.rint(photograph(1) * np.array([1.2, 1.0, 0.7])).astype(np.uint8)
    means = image.reshape(-1, 3).mean(axis=0)
    grey_world = image * (np.linalg.norm(means) / np.sqrt(3) / means)
    np.testing.assert_allclose(shades_of_gray(image, 1), np.clip(grey_world, 0, 255), atol=1)
    assert np.ptp(shades_of_gray(image, 1).reshape(-1, 3).mean(axis=0)) < 1


@pytest.mark.parametrize("p", [1000, 1e6])
def test_large_p_is_max_rgb(p):
    image = photograph(2, low=10, high=60)
    peak = image.reshape(-1, 3).max(axis=0) + np.array([0, 30, 60], np.uint8)
    image[0, 0] = peak
    max_rgb = np.clip(image * (np.linalg.norm(peak.astype(float)) / np.sqrt(3) / peak), 0, 255)
    np.testing.assert_allclose(shades_of_gray(image, p), max_rgb, atol=2)


def test_grey_light_changes_nothing():
    image = np.repeat(photograph(3)[..., :1], 3, axis=2)
    np.testing.assert_array_equal(shades_of_gray(image), image)


def test_a_black_picture_and_a_black_channel_stay_black():
    black = np.zeros((5, 5, 3), np.uint8)
    np.testing.assert_array_equal(shades_of_gray(black), black)
    image = photograph(4)
    image[..., 2] = 0
    assert shades_of_gray(image)[..., 2].max() == 0


def test_the_colour_of_the_light_hardly_matters():
    # Division by the light undoes a von Kries change of it, as long as nothing was clipped.
    image = photograph(5, low=60, high=140)
    warm = np.rint(image * np.array([1.2, 1.0, 0.8])).astype(np.uint8)
    before = np.abs(warm.astype(int) - image).mean()
    first, second = (shades_of_gray(picture).astype(float) for picture in (image, warm))
    # What is left is the brightness, which differs by one factor for all channels.
    assert np.abs(first * (second.mean() / first.mean()) - second).mean() < before / 10


def test_the_input_is_not_changed_and_views_are_read():
    image = photograph(6)
    copy = image.copy()
    view = image[::-2, ::3]
    for function in (shades_of_gray, clahe_lightness):
        np.testing.assert_array_equal(function(view), function(np.ascontiguousarray(view)))
        function(image)
        np.testing.assert_array_equal(image, copy)


@pytest.mark.parametrize("clip", [1.0, 2.0])
def test_clahe_leaves_a_and_b_unchanged(clip):
    image = photograph(7)
    result = clahe_lightness(image, clip)
    before, after = (cv2.cvtColor(picture, cv2.COLOR_RGB2LAB).astype(int) for picture in (image, result))
    # One level is what 8-bit LAB loses on the way to RGB and back, without any CLAHE.
    assert np.abs(after - before)[..., 1:].max() <= 1
    assert np.abs(after - before)[..., 0].max() >= 10


def test_clahe_equalises_the_lightness_as_opencv_does():
    image = photograph(8)
    lightness = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[..., 0]
    expected = cv2.createCLAHE(1.0, (12, 12)).apply(lightness)
    result = cv2.cvtColor(clahe_lightness(image), cv2.COLOR_RGB2LAB)[..., 0]
    assert np.abs(result.astype(int) - expected).max() <= 2


def test_the_channel_order_of_the_lineage_differs_and_keeps_the_colours():
    image = photograph(9)
    image[..., 0] = np.clip(image[..., 0] + 60, 0, 255)
    correct, other = clahe_lightness(image), clahe_lightness(image, channel_order="hm_compat")
    assert np.abs(correct.astype(int) - other).max() > 5
    # Red and blue change places twice, so the picture isn't recoloured.
    assert other[..., 0].mean() > other[..., 2].mean() + 30
    np.testing.assert_array_equal(other, clahe_lightness(np.ascontiguousarray(image[..., ::-1]))[..., ::-1])


@pytest.mark.parametrize(("side", "grid"), [(16, 64), (17, 12), (50, 1)])
def test_clahe_takes_any_picture_and_grid(side, grid):
    image = photograph(10, side)
    assert clahe_lightness(image, 1.0, grid).shape == image.shape


def test_settings_of_one_call_do_not_stay_for_the_next():
    image = photograph(11)
    first = clahe_lightness(image, 1.0, 12)
    assert (clahe_lightness(image, 4.0, 4) != first).any()
    np.testing.assert_array_equal(clahe_lightness(image, 1.0, 12), first)


def test_threads_do_not_disturb_each_other():
    # Sides that the grid doesn't divide: OpenCV's filter then also keeps an enlarged copy of the picture in its
    # buffers.
    pictures = [photograph(seed, side=250 + 30 * seed) for seed in range(4)]
    expected = [clahe_lightness(picture) for picture in pictures]
    wrong = []

    def work(index):
        for _ in range(30):
            if (clahe_lightness(pictures[index]) != expected[index]).any():
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
