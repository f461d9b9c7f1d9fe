from pathlib import Path

import numpy as np
import pytest

from dualrefnet.data.store import ImageStore, Part, fill_derived_store
from dualrefnet.errors import DataError

COUNT, SIDE = 10, 4
PARTS = {"mean": Part("float32", ()), "half": Part("uint8", (SIDE // 2, SIDE // 2, 3))}


@pytest.fixture
def source(tmp_path: Path) -> ImageStore:
    folder = tmp_path / "stores" / "pictures"
    folder.mkdir(parents=True)
    np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8).tofile(folder / "images.u8")
    return ImageStore(folder, tuple(f"image{number}" for number in range(COUNT)), SIDE, {})


def compute(pictures):
    return {"mean": pictures.mean(axis=(1, 2, 3)), "half": pictures[:, ::2, ::2]}


def test_rows_hold_what_is_computed_from_the_pictures(source: ImageStore) -> None:
    store = fill_derived_store(source, "test", {"a": 1}, PARTS, compute, batch=3)
    rows = np.array([9, 0, 4])
    pictures, values = source.read(rows), store.read(rows)
    np.testing.assert_allclose(values["mean"], pictures.mean(axis=(1, 2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(values["half"], pictures[:, ::2, ::2])


def test_a_filled_store_is_found_again_and_other_settings_have_another_one(source: ImageStore) -> None:
    calls = []

    def counting(pictures):
        calls.append(len(pictures))
        return compute(pictures)

    first = fill_derived_store(source, "test", {"a": 1}, PARTS, counting, batch=4)
    assert calls == [4, 4, 2]
    assert fill_derived_store(source, "test", {"a": 1}, PARTS, counting).path == first.path
    assert calls == [4, 4, 2]
    assert fill_derived_store(source, "test", {"a": 2}, PARTS, counting).path != first.path
    assert sum(calls) == 2 * COUNT


def test_a_filling_that_was_cut_short_goes_on_where_it_stopped(source: ImageStore) -> None:
    seen: list[int] = []

    def dying(pictures):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(pictures))
        return compute(pictures)

    with pytest.raises(KeyboardInterrupt):
        fill_derived_store(source, "test", {}, PARTS, dying, batch=3)
    again: list[int] = []

    def going_on(pictures):
        again.append(len(pictures))
        return compute(pictures)

    shown: list[tuple[int, int]] = []
    store = fill_derived_store(
        source, "test", {}, PARTS, going_on, batch=3, progress=lambda done, total: shown.append((done, total))
    )
    assert again == [3, 1]
    assert shown == [(9, COUNT), (10, COUNT)]
    np.testing.assert_array_equal(store.read(np.arange(COUNT))["half"], source.read(np.arange(COUNT))[:, ::2, ::2])


def test_a_part_of_another_shape_is_refused(source: ImageStore) -> None:
    with pytest.raises(ValueError, match="half must be"):
        fill_derived_store(source, "test", {}, PARTS, lambda pictures: {**compute(pictures), "half": pictures})


def test_a_damaged_store_is_told(source: ImageStore) -> None:
    store = fill_derived_store(source, "test", {}, PARTS, compute)
    (store.path / "half").write_bytes(b"short")
    with pytest.raises(DataError, match="damaged; delete that folder"):
        fill_derived_store(source, "test", {}, PARTS, compute)
