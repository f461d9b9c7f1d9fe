from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualrefnet.recipe import ImageSection
from dualrefnet.runtime.preprocessing import clahe_lightness, preprocess, shades_of_gray, to_square


def picture(height, width, seed=0):
    small = np.random.default_rng(seed).integers(40, 220, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    side=st.sampled_from([32, 96, 224]),
    fit=st.sampled_from(["squash", "crop"]),
)
def test_any_picture_becomes_a_square_of_bytes(height, width, side, fit):
    square = to_square(picture(height, width), side, fit)
    assert square.shape == (side, side, 3)
    assert square.dtype == np.uint8


def test_squash_keeps_the_whole_picture_and_crop_its_middle():
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, :100, 0] = image[:, 100:200, 1] = image[:, 200:, 2] = 200
    squashed = to_square(image, 30, "squash")
    assert [squashed[15, column].argmax() for column in (2, 15, 27)] == [0, 1, 2]
    np.testing.assert_array_equal(to_square(image, 30, "crop"), np.broadcast_to((0, 200, 0), (30, 30, 3)))


@pytest.mark.parametrize("axis", [0, 1])
def test_crop_takes_the_middle_whichever_side_is_longer(axis):
    stripes = np.zeros((60, 60, 3), np.uint8)
    longer = np.concatenate([stripes, stripes + 90, stripes], axis=axis)
    assert (to_square(longer, 32, "crop") == 90).all()


def test_shrinking_averages_so_that_nothing_aliases():
    board = np.zeros((448, 448, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 200
    assert (to_square(board, 224, "squash") == 100).all()


def test_a_picture_of_the_right_size_is_left_alone():
    image = picture(64, 64)
    np.testing.assert_array_equal(to_square(image, 64, "squash"), image)
    np.testing.assert_array_equal(to_square(image, 64, "crop"), image)


def test_the_order_is_colour_constancy_then_clahe_then_resize():
    image = picture(300, 400)
    expected = to_square(clahe_lightness(shades_of_gray(image, 6), 1.0, 12), 96, "squash")
    np.testing.assert_array_equal(preprocess(image, ImageSection(size=96)), expected)


def test_the_settings_of_the_recipe_arrive():
    image = picture(120, 160)
    plain = ImageSection(size=64, colour_constancy="none", clahe=False)
    np.testing.assert_array_equal(preprocess(image, plain), to_square(image, 64, "squash"))
    default = preprocess(image, ImageSection(size=64))
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


def test_a_side_of_its_own_wins_over_the_recipes():
    assert preprocess(picture(100, 100), ImageSection(size=64), 128).shape == (128, 128, 3)


def test_the_same_settings_twice_and_from_several_threads_give_the_same_bytes():
    pictures = [picture(150 + 10 * seed, 200, seed) for seed in range(8)]
    section = ImageSection(size=96)
    alone = [preprocess(image, section) for image in pictures]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for one, other in zip(alone, pool.map(lambda image: preprocess(image, section), pictures), strict=True):
                np.testing.assert_array_equal(one, other)
