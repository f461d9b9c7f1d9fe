import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dualrefnet.recipe import ImageSection
from dualrefnet.runtime.preprocessing import clahe_lightness, preprocess, shades_of_gray, to_square

images = arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)))


def smooth(height=240, width=240, seed=0, low=90, high=170):
    small = np.random.default_rng(seed).integers(low, high, (12, 12, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def reference(image, p, gamma=None):
    """Shades of Gray as the formula is printed, in floating point."""
    pixels = image.astype(np.float64) / 255
    if gamma is not None:
        pixels = pixels**gamma
    light = np.mean(pixels**p, axis=(0, 1)) ** (1 / p)
    if not light.any():
        return image
    light = np.maximum(light / np.sqrt(np.sum(light**2)), 1e-6)
    pixels = np.clip(pixels / (np.sqrt(3) * light), 0, 1)
    return 255 * (pixels if gamma is None else pixels ** (1 / gamma))


@given(image=images, p=st.sampled_from([1.0, 2.0, 6.0, 12.5]), gamma=st.sampled_from([None, 2.2]))
def test_shades_of_gray_is_the_formula_to_one_level(image, p, gamma):
    assert np.abs(shades_of_gray(image, p, gamma) - reference(image, p, gamma)).max() <= 1


@pytest.mark.parametrize("clip", [1.0, 2.0])
def test_clahe_equalises_the_lightness_as_opencv_does_and_leaves_a_and_b(clip):
    image = smooth(seed=7)
    before, after = (cv2.cvtColor(one, cv2.COLOR_RGB2LAB).astype(int) for one in (image, clahe_lightness(image, clip)))
    # One level is what 8-bit LAB loses on the way to RGB and back, without any CLAHE.
    assert np.abs(after - before)[..., 1:].max() <= 1
    assert np.abs(after - before)[..., 0].max() >= 10
    expected = cv2.createCLAHE(clip, (12, 12)).apply(before[..., 0].astype(np.uint8))
    assert np.abs(after[..., 0] - expected).max() <= 2


def test_the_channel_order_of_the_lineage_differs_and_keeps_the_colours():
    image = smooth(seed=9)
    image[..., 0] = np.clip(image[..., 0] + 60, 0, 255)
    correct, other = clahe_lightness(image), clahe_lightness(image, channel_order="hm_compat")
    assert np.abs(correct.astype(int) - other).max() > 5
    # Red and blue change places twice, so the image keeps its colours.
    np.testing.assert_array_equal(other, clahe_lightness(np.ascontiguousarray(image[..., ::-1]))[..., ::-1])


@settings(max_examples=40)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    side=st.sampled_from([32, 96, 224]),
    fit=st.sampled_from(["squash", "crop"]),
)
def test_any_image_becomes_a_square_of_bytes(height, width, side, fit):
    square = to_square(smooth(height, width), side, fit)
    assert (square.shape, square.dtype) == ((side, side, 3), np.uint8)


def test_every_setting_of_the_recipe_arrives_in_the_papers_order():
    image = smooth(300, 400)
    default = preprocess(image, ImageSection(size=64))
    expected = to_square(clahe_lightness(shades_of_gray(image, 6), 1.0, 12), 64, "squash")
    np.testing.assert_array_equal(default, expected)
    plain = ImageSection(size=64, colour_constancy="none", clahe=False)
    np.testing.assert_array_equal(preprocess(image, plain), to_square(image, 64, "squash"))
    for change in (
        {"colour_constancy": "none"},
        {"minkowski_p": 1},
        {"gamma": 2.2},
        {"clahe": False},
        {"clahe_clip": 4},
        {"clahe_grid": 3},
        {"clahe_channel_order": "hm_compat"},
        {"fit": "crop"},
    ):
        assert (preprocess(image, ImageSection(size=64, **change)) != default).any(), change
    assert preprocess(image, ImageSection(size=64), 128).shape == (128, 128, 3)
