import threading
from itertools import chain

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dualrefnet.data.loader import Examples, draw, fill_recipe_store, warp
from dualrefnet.data.schema import Dataset, DatasetSchema
from dualrefnet.data.store import fill_store
from dualrefnet.errors import DataError
from dualrefnet.recipe import AugmentationSection, ImageSection, load_recipe

SIDE = 32


def examples(count, store=None, rows=None):
    labels = np.arange(count, dtype=np.int64) % 3
    metadata = np.arange(count, dtype=np.float32)[:, None].repeat(2, axis=1)
    return Examples(tuple(f"i{number}" for number in range(count)), labels, metadata, store, rows)


def rows_of(batches):
    return [batch.rows.tolist() for batch in batches]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven images of one grey each, in a store; image n is 20 n."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(11):
        cv2.imwrite(str(folder / f"i{number}.png"), np.full((40, 40, 3), 20 * number, np.uint8))
    table = pd.DataFrame(
        {"image_id": [f"i{n}" for n in range(11)], "image_path": [str(folder / f"i{n}.png") for n in range(11)]}
    )
    section = ImageSection(size=SIDE, colour_constancy="none", clahe=False)
    return fill_store(table, section, cache=tmp_path_factory.mktemp("cache"))


@settings(max_examples=60)
@given(count=st.integers(0, 40), size=st.integers(1, 12), world=st.integers(1, 4))
def test_in_order_every_row_comes_once_over_all_ranks(count, size, world):
    data, rows = examples(count), list(range(count))
    for rank in range(world):
        assert list(chain(*rows_of(data.in_order(size, rank, world)))) == rows[rank::world]
    assert rows_of(data.in_order(size)) == [rows[start : start + size] for start in range(0, count, size)]


@settings(max_examples=60)
@given(count=st.integers(2, 60), size=st.integers(2, 16), world=st.integers(1, 3), seed=st.integers(0, 99))
def test_shuffled_ranks_share_each_batch_and_no_row_comes_twice(count, size, world, seed):
    data, epoch = examples(count), seed % 7
    whole = rows_of(data.shuffled(size, seed, epoch))
    shares = [rows_of(data.shuffled(size, seed, epoch, rank, world)) for rank in range(world)]
    assert len(whole) == data.steps(size) == max(1, count // size)
    assert all(len(share) == len(whole) for share in shares)
    for step, batch in enumerate(whole):
        assert len(batch) == min(size, count)
        assert sorted(row for share in shares for row in share[step]) == sorted(batch)
        sizes = [len(share[step]) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    assert len(set(chain(*whole))) == sum(map(len, whole))


def test_a_batch_holds_what_belongs_to_its_rows():
    for batch in examples(10).shuffled(4, 0, 0):
        assert batch.images is None
        assert batch.metadata.tolist() == [[row, row] for row in batch.rows]
        assert batch.labels.tolist() == (batch.rows % 3).tolist()
        assert (batch.labels.dtype, batch.metadata.dtype) == (torch.int64, torch.float32)


def test_a_data_set_none_of_whose_images_is_there_says_where_they_were_looked_for(tmp_path):
    schema = DatasetSchema(name="t", title="T", classes=("A",))
    table = pd.DataFrame({"image_id": ["x1", "x2"], "image_path": None})
    with pytest.raises(DataError, match=r"no image of the 2 rows is there; .*images/x1\.jpg"):
        fill_recipe_store(load_recipe("sample"), Dataset(table, schema, tmp_path))


def test_a_reader_that_stops_early_leaves_no_thread():
    before = threading.active_count()
    batches = examples(100).in_order(2)
    next(batches)
    batches.close()
    assert threading.active_count() == before


PLAIN = {"brightness": 0, "contrast": 0, "saturation": 0, "noise": 0}
share = st.floats(0, 1)
sections = st.builds(
    AugmentationSection,
    scale=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted).map(tuple),
    rotation=st.just(0.0),
    noise=st.floats(0, 0.5),
    **dict.fromkeys(("horizontal_flip", "vertical_flip", "brightness", "contrast", "saturation"), share),
)


def noise_images(count=4, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def smooth_images(side, count=3):
    """Pictures of slow waves, sampled at pixel centres, so that the same image can be had at any size."""
    x = (torch.arange(side) + 0.5) / side
    waves = [torch.sin(2 * x[:, None] * k + 1.5 * x[None, :] + k) / 2 + 0.5 for k in range(1, 4)]
    return torch.stack(waves).expand(count, 3, side, side).clone()


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), rotation=st.sampled_from([0.0, 45.0, 180.0]))
def test_warping_the_image_and_its_target_of_twice_the_size_commute(seed, rotation):
    geometry = draw(3, AugmentationSection(rotation=rotation, scale=(0.5, 1.0)), seed, 0).geometry
    target, image = smooth_images(128), smooth_images(64)
    small = functional.avg_pool2d(warp(target, geometry), 2)
    # Away from the border, where mirroring makes an edge that the smaller image can't show.
    frame = functional.pad(torch.ones(3, 1, 62, 62), (1, 1, 1, 1))
    inside = warp(frame, geometry) == 1
    assert ((small - warp(image, geometry)).abs() * inside).max() < 0.02


@settings(max_examples=50)
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


def test_the_draws_of_an_image_are_the_same_whatever_the_batch_and_differ_by_seed_and_epoch():
    section = AugmentationSection(rotation=90)
    draws = draw(50, section, 3, 7)
    assert torch.equal(draws.geometry, draw(50, section, 3, 7).geometry)
    rows = np.array([40, 2, 17])
    chosen = draws.of(rows)
    assert torch.equal(chosen.geometry, draws.geometry[[40, 2, 17]])
    assert torch.equal(chosen.photometry, draws.photometry[[40, 2, 17]])
    images = noise_images(50)
    torch.testing.assert_close(warp(images[rows], chosen.geometry), warp(images, draws.geometry)[rows])
    for other in (draw(50, section, 4, 7), draw(50, section, 3, 8)):
        assert (other.geometry != draws.geometry).any()


def photometry(brightness=1.0, contrast=1.0, saturation=1.0, noise=0.0, count=4):
    return torch.tensor([[brightness, contrast, saturation, noise]]).expand(count, 4)
