from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.analysis.perturbations import (
    BORDER,
    CHANGES,
    GROWN,
    grow,
    perturb_image,
    predict_perturbed,
    read_outlines,
)
from dualrefnet.data.schema import Dataset
from dualrefnet.errors import DataError
from dualrefnet.run import Run
from hand_made import CENTRE, RADIUS, SIDE, SKIN, hand_made


@pytest.fixture(scope="module")
def opened(tiny_run: Run) -> OpenedRun:
    return open_run(tiny_run, device=torch.device("cpu"))


def disc(side: int, radius: int, centre: tuple[int, int] | None = None) -> np.ndarray:
    return cv2.circle(np.zeros((side, side), np.uint8), centre or (side // 2, side // 2), radius, 255, -1) > 0


def test_nothing_of_the_lesion_is_left_where_it_is_filled_and_all_of_it_where_the_rest_is() -> None:
    mask = disc(96, 20)
    picture = np.where(mask[:, :, None], np.array([90, 20, 10], np.uint8), np.array([200, 160, 140], np.uint8))
    before = picture.copy()
    blurred, background, lesion = perturb_image(picture, mask)
    np.testing.assert_array_equal(picture, before)
    # Skin of one colour: the filled lesion can't be told from it.
    assert (background == [200, 160, 140]).all()
    np.testing.assert_array_equal(lesion[mask], picture[mask])
    assert (lesion[~mask] == [200, 160, 140]).all()
    # Blurred: all is a mixture of the two colours, in the middle still nearer to the lesion's than outside.
    assert blurred[48, 48, 0] < blurred[48, 66, 0] < 200
    assert blurred[48, 48, 0] > 90


def test_outside_of_the_border_a_picture_stays_as_it_was() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    mask = disc(96, 15)
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5) > (GROWN + 5 * BORDER) * 96
    blurred, background, lesion = perturb_image(picture, mask)
    assert away.any()
    np.testing.assert_array_equal(blurred[away], picture[away])
    np.testing.assert_array_equal(background[away], picture[away])
    assert len(np.unique(lesion[away].reshape(-1, 3), axis=0)) == 1
    # Nothing of the noise inside the outline survives where it is filled; its contrast is gone where it is blurred.
    assert len(np.unique(background[mask].reshape(-1, 3), axis=0)) == 1
    assert blurred[mask].std(axis=0).max() < 0.2 * picture[mask].std(axis=0).min()


def test_what_fills_is_the_mean_of_the_ring_of_skin_and_not_of_the_picture() -> None:
    mask = disc(100, 10)
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[away <= 30] = [180, 120, 100]
    picture[mask] = [10, 10, 10]
    _, background, lesion = perturb_image(picture, mask)
    assert background[50, 50].tolist() == [180, 120, 100]
    assert lesion[2, 2].tolist() == [180, 120, 100]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 12))
def test_an_outline_grows_on_all_sides_and_holds_itself(x: int, y: int, radius: int) -> None:
    mask = disc(50, radius, (x, y))
    grown = grow(mask)
    assert grown[mask].all()
    rows, columns = np.nonzero(mask)
    for row, column in ((rows.min() - 2, columns[rows.argmin()]), (rows[columns.argmax()], columns.max() + 2)):
        if 0 <= row < 50 and 0 <= column < 50:
            assert grown[row, column]
    assert grown.sum() < (np.sqrt(mask.sum()) + 2 * 4) ** 2


def test_outlines_at_the_edge_and_nearly_everywhere_can_be_filled() -> None:
    picture = np.full((40, 40, 3), 77, np.uint8)
    for mask in (disc(40, 10, (0, 0)), ~disc(40, 6, (38, 38))):
        assert not grow(mask).all()
        for changed in perturb_image(picture, mask):
            assert (changed == 77).all()


def test_outlines_are_read_as_the_model_sees_the_pictures_and_useless_ones_are_counted(
    opened: OpenedRun, tmp_path: Path
) -> None:
    run = hand_made(opened, tmp_path / "run", "centre")
    ids = run.rows("test")["image_id"].tolist()
    folder = tmp_path / "run" / "masks"
    cv2.imwrite(str(folder / f"{ids[1]}.png"), np.zeros((20, 20), np.uint8))
    cv2.imwrite(str(folder / f"{ids[2]}.png"), np.full((20, 20), 255, np.uint8))
    (folder / f"{ids[3]}.png").unlink()
    examples, masks = run.pictures("test"), run.masks()
    assert set(masks) == set(ids) - {ids[3]}
    outlines = read_outlines(run, examples, masks)
    assert outlines.places.tolist() == [place for place in range(len(ids)) if place not in (1, 2, 3)]
    assert outlines.left_out == 2
    np.testing.assert_array_equal(outlines.mask(0), disc(SIDE, RADIUS, CENTRE))
    own = examples.metadata[outlines.places]
    answers = predict_perturbed(run, examples, outlines, [own, own])
    assert list(answers) == list(CHANGES)
    for found in answers.values():
        assert [one.shape for one in found] == [(len(outlines.places), len(run.classes))] * 2
        np.testing.assert_array_equal(found[0], found[1])
    truth = examples.labels[outlines.places]
    assert (answers["lesion_only"][0].argmax(axis=1) == truth).all()
    # The skin's colour is nearest to the colour of the last class.
    assert SKIN > 180
    assert (answers["background_only"][0].argmax(axis=1) == len(run.classes) - 1).all()


def test_masks_are_looked_for_where_they_are_and_a_wrong_folder_is_refused(opened: OpenedRun, tmp_path: Path) -> None:
    wanted = set(opened.rows("test")["image_id"])
    assert set(opened.masks()) == wanted
    (tmp_path / "root").mkdir()
    bare = replace(opened, dataset=Dataset(opened.dataset.table, opened.dataset.schema, tmp_path / "root"))
    assert bare.masks() == {}
    with pytest.raises(DataError, match="there is no folder of masks"):
        opened.masks(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    cv2.imwrite(str(tmp_path / "other" / "stranger.png"), np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="no mask of a test image"):
        opened.masks(tmp_path / "other")
