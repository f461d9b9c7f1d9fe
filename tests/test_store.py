import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dualrefnet.data import store as store_module
from dualrefnet.data.images import decode_image
from dualrefnet.data.store import READY, ImageStore, Part, delete_if_changed, fill_derived_store, fill_store, open_store
from dualrefnet.errors import DataError
from dualrefnet.recipe import ImageSection
from dualrefnet.runtime.preprocessing import preprocess

SIDE = 32


SECTION = ImageSection(size=SIDE)


COUNT = 12


# Fills a store slowly, and tells every image that it has done.
SLOW = """
import sys, time
from pathlib import Path
import pandas as pd
from dualrefnet.data import store as store_module
from dualrefnet.recipe import ImageSection
decode = store_module.decode_image
def slowly(path):
    time.sleep(0.05)
    print("decoded", flush=True)
    return decode(path)
store_module.decode_image = slowly
print("ready", flush=True)
store_module.fill_store(
    pd.read_csv(sys.argv[1]), ImageSection(size=int(sys.argv[3])), cache=Path(sys.argv[2]), workers=1,
    progress=lambda done, total: print("done", flush=True),
)
"""


@pytest.fixture
def table(tmp_path):
    """Twelve images, each unlike the others and of a size of its own."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(COUNT):
        small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"i{number}.png"), cv2.resize(small, (60 + number, 70)))
    return pd.DataFrame(
        {"image_id": [f"i{n}" for n in range(COUNT)], "image_path": [str(folder / f"i{n}.png") for n in range(COUNT)]}
    )


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded from here on."""
    names = []

    def counting(path):
        names.append(os.path.basename(path))
        return decode_image(path)

    monkeypatch.setattr(store_module, "decode_image", counting)
    return names


def right(store, table, section=SECTION, side=SIDE):
    assert store.image_ids == tuple(table["image_id"])
    assert store.side == side
    rows = store.read(store.rows_of(list(table["image_id"])))
    for row, (image_id, path) in enumerate(zip(table["image_id"], table["image_path"], strict=True)):
        if image_id not in store.broken:
            np.testing.assert_array_equal(rows[row], preprocess(decode_image(path), section, side))
    return True


def partial_folder(cache):
    (folder,) = (cache / "stores").glob("*.partial")
    return folder


def ready_rows(cache):
    return int((np.fromfile(partial_folder(cache) / "status.u8", np.uint8) == READY).sum())


def start(table, cache, tmp_path, side=SIDE):
    table.to_csv(tmp_path / "table.csv", index=False)
    command = [sys.executable, "-c", SLOW, str(tmp_path / "table.csv"), str(cache), str(side)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_every_row_is_the_preprocessed_image(table, cache):
    progress = []
    store = fill_store(table, SECTION, cache=cache, progress=lambda done, total: progress.append((done, total)))
    assert right(store, table)
    assert store.broken == {}
    assert progress == [(n + 1, COUNT) for n in range(COUNT)]
    assert list((cache / "stores").glob("*.partial")) == []


def test_a_changed_file_or_setting_gives_another_store(table, cache):
    paths = {fill_store(table, SECTION, cache=cache).path}
    for change in ({"clahe": False}, {"minkowski_p": 5}, {"fit": "crop"}, {"size": 64}):
        section = ImageSection(**({"size": SIDE} | change))
        store = fill_store(table, section, cache=cache)
        assert right(store, table, section, section.size)
        paths.add(store.path)
    shutil.copyfile(table["image_path"][1], table["image_path"][0])
    changed = fill_store(table, SECTION, cache=cache)
    assert right(changed, table)
    paths.add(changed.path)
    paths.add(fill_store(table.iloc[:5], SECTION, cache=cache).path)
    assert len(paths) == 7


def test_broken_images_are_listed_and_the_others_are_there(table, cache):
    contents = {"i2": b"", "i4": Path(table["image_path"][4]).read_bytes()[:200], "i6": b"this is text, not a image"}
    for image_id, content in contents.items():
        Path(table["image_path"][int(image_id[1:])]).write_bytes(content)
    store = fill_store(table, SECTION, cache=cache)
    assert list(store.broken) == ["i2", "i4", "i6"]
    assert "i2.png" in store.broken["i2"]
    assert "damaged or truncated" in store.broken["i4"]
    assert right(store, table)
    assert fill_store(table, SECTION, cache=cache) == store


def test_an_image_that_was_replaced_by_one_of_the_same_size_and_time_is_found(table, cache):
    for image_id in ("i2", "i5"):  # Uncompressed, so that all have one size.
        file = Path(table["image_path"][int(image_id[1:])])
        Image.fromarray(cv2.imread(str(file))).save(file, "BMP")
    store = fill_store(table, SECTION, cache=cache)
    assert delete_if_changed(store, table, SECTION, None) == []
    file, state = Path(table["image_path"][2]), os.stat(table["image_path"][2])
    derived = cache / "derived" / "features"
    derived.mkdir(parents=True)
    for content in (file.read_bytes()[:-3000] + bytes(3000), bytes(state.st_size)):
        file.write_bytes(content)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert fill_store(table, SECTION, cache=cache) == store
        assert delete_if_changed(store, table, SECTION, None) == ["i2"]
        assert not derived.exists()
        store = fill_store(table, SECTION, cache=cache)
        assert right(store, table)
    assert list(store.broken) == ["i2"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_filling_goes_on_where_it_stopped(table, cache, decoded, error):
    def interrupt(done, total):
        if done == 5:
            raise error

    with pytest.raises(error):
        fill_store(table, SECTION, cache=cache, workers=1, progress=interrupt)
    ready = ready_rows(cache)
    assert 5 <= ready < COUNT
    decoded.clear()
    progress = []
    store = fill_store(table, SECTION, cache=cache, workers=1, progress=lambda done, total: progress.append(done))
    assert len(decoded) == COUNT - ready
    assert progress == list(range(ready + 1, COUNT + 1))
    assert right(store, table)


def test_a_killed_filling_goes_on_where_it_stopped(table, cache, decoded, tmp_path):
    process = start(table, cache, tmp_path)
    done = 0
    for line in process.stdout:
        done += line == "done\n"
        if done == 4:
            process.kill()
            break
    assert process.wait() == -9
    ready = ready_rows(cache)
    assert 4 <= ready < COUNT
    store = fill_store(table, SECTION, cache=cache)
    assert len(decoded) == COUNT - ready
    assert right(store, table)


def test_two_processes_at_once_fill_one_right_store_and_decode_each_image_once(table, cache, decoded, tmp_path):
    processes = [start(table, cache, tmp_path) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    said = [process.stdout.read() for process in processes]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert sum(text.count("decoded") for text in said) == COUNT
    assert right(fill_store(table, SECTION, cache=cache), table)
    assert decoded == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB, and a function that makes it larger."""
    point = tmp_path / "disk"
    point.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(point)], capture_output=True).returncode:
        pytest.skip("this machine doesn't let a test mount a small disk")
    yield point, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(point)], check=True)
    subprocess.run(["umount", "-l", str(point)], check=True)


def test_a_disk_without_room_is_reported_before_any_work(table, small_disk, decoded):
    disk, enlarge = small_disk
    with pytest.raises(DataError, match=r"needs 0.00 GiB in .* free; free some space, or set DUALREFNET_CACHE"):
        fill_store(table, ImageSection(size=64), cache=disk)
    assert decoded == []
    enlarge("1m")
    assert right(fill_store(table, ImageSection(size=64), cache=disk), table, ImageSection(size=64), 64)


def test_a_disk_that_fills_up_while_images_are_written_loses_nothing(table, small_disk, decoded, monkeypatch):
    # As on a system that can't reserve space, beside other programs that write.
    disk, enlarge = small_disk
    section = ImageSection(size=64)
    usage = shutil.disk_usage(disk)
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(DataError, match=r"the disk is full: .* what is done is kept, free some space and run again"):
        fill_store(table, section, cache=disk, workers=1)
    ready = ready_rows(disk)
    assert 0 < ready < COUNT
    enlarge("1m")
    decoded.clear()
    store = fill_store(table, section, cache=disk, workers=1)
    assert len(decoded) == COUNT - ready
    assert right(store, table, section, 64)


@pytest.mark.parametrize("damage", ["images.u8", "index.json", "broken.csv", "half an index", "half the images"])
def test_a_damaged_store_is_reported_with_what_to_do(table, cache, damage):
    path = fill_store(table, SECTION, cache=cache).path
    if damage.startswith("half"):
        file = path / ("index.json" if damage.endswith("index") else "images.u8")
        file.write_bytes(file.read_bytes()[:100])
    else:
        (path / damage).unlink()
    with pytest.raises(DataError, match="damaged; delete that folder"):
        open_store(path)
    shutil.rmtree(path)
    assert right(fill_store(table, SECTION, cache=cache), table)


ROWS, EDGE = 10, 4


PARTS = {"mean": Part("float32", ()), "half": Part("uint8", (EDGE // 2, EDGE // 2, 3))}


@pytest.fixture
def source(tmp_path: Path) -> ImageStore:
    folder = tmp_path / "stores" / "images"
    folder.mkdir(parents=True)
    np.random.default_rng(0).integers(0, 256, (ROWS, EDGE, EDGE, 3), dtype=np.uint8).tofile(folder / "images.u8")
    return ImageStore(folder, tuple(f"image{number}" for number in range(ROWS)), EDGE, {})


def compute(images):
    return {"mean": images.mean(axis=(1, 2, 3)), "half": images[:, ::2, ::2]}


def test_rows_hold_what_is_computed_from_the_images(source: ImageStore) -> None:
    store = fill_derived_store(source, "test", {"a": 1}, PARTS, compute, batch=3)
    rows = np.array([9, 0, 4])
    images, values = source.read(rows), store.read(rows)
    np.testing.assert_allclose(values["mean"], images.mean(axis=(1, 2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(values["half"], images[:, ::2, ::2])


def test_a_filling_that_was_cut_short_goes_on_where_it_stopped(source: ImageStore) -> None:
    seen: list[int] = []

    def dying(images):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(images))
        return compute(images)

    with pytest.raises(KeyboardInterrupt):
        fill_derived_store(source, "test", {}, PARTS, dying, batch=3)
    again: list[int] = []

    def going_on(images):
        again.append(len(images))
        return compute(images)

    shown: list[tuple[int, int]] = []
    store = fill_derived_store(
        source, "test", {}, PARTS, going_on, batch=3, progress=lambda done, total: shown.append((done, total))
    )
    assert again == [3, 1]
    assert shown == [(9, ROWS), (10, ROWS)]
    np.testing.assert_array_equal(store.read(np.arange(ROWS))["half"], source.read(np.arange(ROWS))[:, ::2, ::2])
