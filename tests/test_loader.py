import threading

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualrefnet.data.loader import Examples
from dualrefnet.data.store import fill_store
from dualrefnet.recipe import ImageSection

SIDE = 32


def examples(count, store=None, rows=None):
    labels = np.arange(count, dtype=np.int64) % 3
    metadata = np.arange(count, dtype=np.float32)[:, None].repeat(2, axis=1)
    return Examples(tuple(f"i{number}" for number in range(count)), labels, metadata, store, rows)


def rows_of(batches):
    return [batch.rows.tolist() for batch in batches]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eleven pictures of one grey each, in a store; picture n is 20 n."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(11):
        cv2.imwrite(str(folder / f"i{number}.png"), np.full((40, 40, 3), 20 * number, np.uint8))
    table = pd.DataFrame(
        {"image_id": [f"i{n}" for n in range(11)], "image_path": [str(folder / f"i{n}.png") for n in range(11)]}
    )
    section = ImageSection(size=SIDE, colour_constancy="none", clahe=False)
    return fill_store(table, section, cache=tmp_path_factory.mktemp("cache"))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 40), size=st.integers(1, 12), world=st.integers(1, 4))
def test_in_order_every_row_comes_once_over_all_ranks(count, size, world):
    shares = [
        [row for batch in rows_of(examples(count).in_order(size, rank, world)) for row in batch]
        for rank in range(world)
    ]
    assert sorted(row for share in shares for row in share) == list(range(count))
    assert all(share == sorted(share) for share in shares)
    assert rows_of(examples(count).in_order(size)) == [
        list(range(count))[start : start + size] for start in range(0, count, size)
    ]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 60),
    size=st.integers(2, 16),
    world=st.integers(1, 3),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
)
def test_shuffled_ranks_part_each_batch_and_no_row_comes_twice(count, size, world, seed, epoch):
    data = examples(count)
    whole = rows_of(data.shuffled(size, seed, epoch))
    shares = [rows_of(data.shuffled(size, seed, epoch, rank, world)) for rank in range(world)]
    assert len(whole) == data.steps(size) == max(1, count // size)
    assert all(len(share) == len(whole) for share in shares)
    for step, batch in enumerate(whole):
        assert len(batch) == min(size, count)
        assert sorted(row for share in shares for row in share[step]) == sorted(batch)
        assert max(len(share[step]) for share in shares) - min(len(share[step]) for share in shares) <= 1
    seen = [row for batch in whole for row in batch]
    assert len(seen) == len(set(seen))


def test_shuffled_follows_from_seed_and_epoch():
    data = examples(40)
    assert rows_of(data.shuffled(8, 1, 2)) == rows_of(data.shuffled(8, 1, 2))
    assert rows_of(data.shuffled(8, 1, 2)) != rows_of(data.shuffled(8, 1, 3))
    assert rows_of(data.shuffled(8, 1, 2)) != rows_of(data.shuffled(8, 2, 2))


def test_the_rows_left_out_of_an_incomplete_batch_change_with_the_epoch():
    data = examples(10)
    left = [
        set(range(10)) - {row for batch in rows_of(data.shuffled(4, 0, epoch)) for row in batch} for epoch in range(60)
    ]
    assert all(len(rows) == 2 for rows in left)
    assert set().union(*left) == set(range(10))


def test_a_batch_holds_what_belongs_to_its_rows():
    for batch in examples(10).shuffled(4, 0, 0):
        assert batch.images is None
        np.testing.assert_array_equal(
            batch.metadata.numpy(), np.stack([batch.rows, batch.rows], axis=1).astype(np.float32)
        )
        assert batch.labels.tolist() == (batch.rows % 3).tolist()
        assert batch.labels.dtype == torch.int64
        assert batch.metadata.dtype == torch.float32


def test_the_pictures_are_those_of_the_rows_as_channels_last_bytes(pictures):
    # The examples are some of the store's pictures, in another order.
    ids = ["i7", "i2", "i10", "i0"]
    data = examples(4, pictures, pictures.rows_of(ids))
    for batches in (data.in_order(3), data.shuffled(2, 5, 0)):
        for batch in batches:
            assert batch.images.shape == (len(batch.rows), 3, SIDE, SIDE)
            assert batch.images.dtype == torch.uint8
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            expected = [20 * int(ids[row][1:]) for row in batch.rows]
            assert batch.images.amax(dim=(1, 2, 3)).tolist() == batch.images.amin(dim=(1, 2, 3)).tolist() == expected


def test_a_batch_may_be_written_to_without_changing_the_store(pictures):
    data = examples(11, pictures, pictures.rows_of([f"i{n}" for n in range(11)]))
    batch = next(data.in_order(11))
    batch.images.zero_()
    assert next(data.in_order(11)).images.max() == 200


def test_an_error_in_reading_ahead_reaches_the_reader():
    data = examples(6)
    broken = Examples(data.image_ids, data.labels[:4], data.metadata, None, None)
    with pytest.raises(IndexError):
        list(broken.in_order(2))


def test_a_reader_that_stops_early_leaves_no_thread():
    before = threading.active_count()
    batches = examples(100).in_order(2)
    next(batches)
    batches.close()
    assert threading.active_count() == before
