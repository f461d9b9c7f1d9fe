"""Changed inputs: images without the lesion, permuted and replaced metadata, hidden flags."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.perturbations import (
    BORDER,
    CHANGES,
    GROWN,
    find_missing,
    permute_across_groups,
    perturb_image,
    predict_perturbed,
    read_outlines,
    replace_values,
)
from dualrefnet.errors import DataError
from hand_made import CENTRE, RADIUS, SIDE, SKIN, hand_made


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


def test_outlines_are_read_as_the_model_sees_the_pictures_and_useless_ones_are_counted(
    opened: OpenedRun, tmp_path: Path
) -> None:
    run = hand_made(opened, tmp_path / "run", "centre")
    ids = run.rows("test")["image_id"].tolist()
    folder = tmp_path / "run" / "masks"
    cv2.imwrite(str(folder / f"{ids[1]}.png"), np.zeros((20, 20), np.uint8))
    cv2.imwrite(str(folder / f"{ids[2]}.png"), np.full((20, 20), 255, np.uint8))
    (folder / f"{ids[3]}.png").unlink()
    examples, masks = run.image_examples("test"), run.masks()
    assert set(masks) == set(ids) - {ids[3]}
    with pytest.raises(DataError, match="holds no mask"):
        run.masks(tmp_path)
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


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.integers(0, 100))
def test_strangers_are_of_another_patient_each_and_all_are_given_once(groups: list[int], seed: int) -> None:
    largest = max(groups.count(group) for group in groups)
    if len(set(groups)) < 2:
        return
    if 2 * largest > len(groups):
        with pytest.raises(DataError, match="more than half"):
            permute_across_groups(groups, np.random.default_rng(seed))
        return
    given_rows = permute_across_groups(groups, np.random.default_rng(seed))
    assert sorted(given_rows.tolist()) == list(range(len(groups)))
    assert all(groups[row] != groups[other] for row, other in enumerate(given_rows))


def test_replaced_answers_are_those_of_others_and_gaps_stay(opened: OpenedRun) -> None:
    rows, metadata = opened.rows("test"), opened.metadata
    groups = opened.groups.loc[rows["image_id"]].to_numpy()
    # Each row's age is its own, so that the donor is known.
    rows = rows.assign(age=np.arange(len(rows), dtype=float))
    replaced = replace_values(rows, metadata, groups, np.random.default_rng(0))
    donors = replaced["age"].to_numpy().astype(int)
    assert (groups[donors] != groups).all()
    for before, after in zip(find_missing(rows, metadata), find_missing(replaced, metadata), strict=True):
        np.testing.assert_array_equal(before, after)
    missing, not_known = find_missing(rows, metadata)
    assert missing.any()
    assert not_known.any()
    for index, field in enumerate(metadata.fields):
        known = ~missing[:, index] & ~not_known[:, index]
        assert set(replaced[field.name][known]) <= set(rows[field.name][known])
    assert replaced["label"].equals(rows["label"])
    # A value that only one patient has is taken away.
    rows = rows.assign(smoke=pd.Series({0: "True"}, rows.index, dtype=object))
    assert replace_values(rows, metadata, groups, np.random.default_rng(0))["smoke"].isna().all()
