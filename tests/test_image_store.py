import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from dualrefnet.data import store as image_store
from dualrefnet.data.images import decode_image
from dualrefnet.data.store import READY, default_cache, fill_store, open_store
from dualrefnet.errors import DataError
from dualrefnet.recipe import ImageSection
from dualrefnet.runtime.preprocessing import preprocess

SIDE = 32
SECTION = ImageSection(size=SIDE)
COUNT = 12

# Fills a store slowly, and tells every picture that it has done.
SLOW = """
import sys, time
from pathlib import Path
import pandas as pd
from dualrefnet.data import image_store
from dualrefnet.recipe import ImageSection
decode = image_store.decode_image
def slowly(path):
    time.sleep(0.05)
    print("decoded", flush=True)
    return decode(path)
image_store.decode_image = slowly
print("ready", flush=True)
image_store.fill_store(
    pd.read_csv(sys.argv[1]), ImageSection(size=int(sys.argv[3])), cache=Path(sys.argv[2]), workers=1,
    progress=lambda done, total: print("done", flush=True),
)
"""


@pytest.fixture
def table(tmp_path):
    """Twelve pictures, each unlike the others and of a size of its own."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
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

    monkeypatch.setattr(image_store, "decode_image", counting)
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


def test_every_row_is_the_preprocessed_picture(table, cache):
    progress = []
    store = fill_store(table, SECTION, cache=cache, progress=lambda done, total: progress.append((done, total)))
    assert right(store, table)
    assert store.broken == {}
    assert progress == [(n + 1, COUNT) for n in range(COUNT)]
    assert list((cache / "stores").glob("*.partial")) == []


def test_rows_are_read_in_any_order_and_may_be_written_to(table, cache):
    store = fill_store(table, SECTION, cache=cache)
    rows = store.rows_of(["i5", "i0", "i5"])
    assert rows.tolist() == [5, 0, 5]
    images = store.read(rows)
    np.testing.assert_array_equal(images[0], images[2])
    images[:] = 0
    assert right(store, table)
    with pytest.raises(KeyError):
        store.rows_of(["nothing"])


def test_the_order_of_the_table_and_a_side_of_its_own_are_kept(table, cache):
    turned = table.iloc[::-1]
    assert right(fill_store(turned, SECTION, cache=cache), turned)
    assert right(fill_store(table, SECTION, 64, cache), table, side=64)


def test_the_second_call_decodes_nothing(table, cache, monkeypatch):
    first = fill_store(table, SECTION, cache=cache)

    def refuse(path):
        raise AssertionError("decoded again")

    monkeypatch.setattr(image_store, "decode_image", refuse)
    assert fill_store(table, SECTION, cache=cache) == first


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


def test_a_moved_data_set_keeps_its_store(table, cache, tmp_path):
    first = fill_store(table, SECTION, cache=cache)
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    moved = table.assign(image_path=table["image_path"].str.replace("/pictures/", "/elsewhere/"))
    assert fill_store(moved, SECTION, cache=cache) == first


def test_a_native_target_of_twice_the_size_is_the_store_of_a_larger_input(table, cache):
    twice = fill_store(table, SECTION, 64, cache)
    assert fill_store(table, ImageSection(size=64), cache=cache) == twice


def test_broken_pictures_are_listed_and_the_others_are_there(table, cache):
    contents = {"i2": b"", "i4": Path(table["image_path"][4]).read_bytes()[:200], "i6": b"this is text, not a picture"}
    for image_id, content in contents.items():
        Path(table["image_path"][int(image_id[1:])]).write_bytes(content)
    store = fill_store(table, SECTION, cache=cache)
    assert list(store.broken) == ["i2", "i4", "i6"]
    assert "i2.png" in store.broken["i2"]
    assert "damaged or truncated" in store.broken["i4"]
    assert right(store, table)
    assert fill_store(table, SECTION, cache=cache) == store


def test_a_broken_picture_that_pandas_would_call_missing_keeps_its_name(table, cache):
    named = table.assign(image_id=["NA", "null", *table["image_id"][2:]])
    for path in table["image_path"][:2]:
        Path(path).write_bytes(b"")
    assert list(fill_store(named, SECTION, cache=cache).broken) == ["NA", "null"]


def test_pictures_that_are_mended_are_read(table, cache):
    file = Path(table["image_path"][3])
    content = file.read_bytes()
    for data, broken in ((content[:100], ["i3"]), (content, [])):
        file.write_bytes(data)
        store = fill_store(table, SECTION, cache=cache)
        assert list(store.broken) == broken
        assert right(store, table)


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


def test_a_broken_picture_is_still_listed_after_an_interruption(table, cache):
    Path(table["image_path"][0]).write_bytes(b"")

    def interrupt(done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_store(table, SECTION, cache=cache, workers=1, progress=interrupt)
    assert list(fill_store(table, SECTION, cache=cache).broken) == ["i0"]


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


def test_two_processes_at_once_fill_one_right_store_and_decode_each_picture_once(table, cache, decoded, tmp_path):
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


def test_a_disk_without_room_is_told_before_any_work(table, small_disk, decoded):
    disk, enlarge = small_disk
    with pytest.raises(DataError, match=r"needs 0.00 GiB in .* free; free some space, or set DUALREFNET_CACHE"):
        fill_store(table, ImageSection(size=64), cache=disk)
    assert decoded == []
    enlarge("1m")
    assert right(fill_store(table, ImageSection(size=64), cache=disk), table, ImageSection(size=64), 64)


def test_a_disk_that_fills_up_while_pictures_are_written_loses_nothing(table, small_disk, decoded, monkeypatch):
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


def test_a_disk_with_room_for_the_pictures_alone_keeps_them(table, small_disk, decoded):
    disk, enlarge = small_disk
    # 36,864 bytes of pictures and their marks are 10 pages of 16; the rest of the disk is taken, but for one page.
    (disk / "other").write_bytes(bytes(4096 * 5))
    long = table.assign(image_id=["x" * 1000 + image_id for image_id in table["image_id"]])
    with pytest.raises(DataError, match="the disk is full"):
        fill_store(long, SECTION, cache=disk)
    assert ready_rows(disk) == COUNT
    enlarge("1m")
    decoded.clear()
    store = fill_store(long, SECTION, cache=disk)
    assert decoded == []
    assert right(store, long)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_space_that_cannot_be_reserved_is_told_and_nothing_half_made_stays(table, cache, monkeypatch, number):
    def no_space(file, start, length):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(DataError, match="the disk is full"):
            fill_store(table, SECTION, cache=cache)
    assert not (partial_folder(cache) / "images.u8").exists()
    assert right(fill_store(table, SECTION, cache=cache), table)


def test_other_errors_of_the_disk_are_not_called_full(table, cache, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(image_store, "decode_image", failing)
    with pytest.raises(OSError, match="Input/output error"):
        fill_store(table, SECTION, cache=cache)


@pytest.mark.parametrize("file", ["images.u8", "status.u8"])
def test_a_half_written_partial_folder_is_filled_again(table, cache, file):
    with pytest.raises(KeyboardInterrupt):
        fill_store(table, SECTION, cache=cache, progress=_interrupt_at_once)
    damaged = partial_folder(cache) / file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert right(fill_store(table, SECTION, cache=cache), table)


def _interrupt_at_once(done, total):
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["images.u8", "index.json", "broken.csv", "half an index", "half the pictures"])
def test_a_damaged_store_is_told_with_what_to_do(table, cache, damage):
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


def test_a_table_without_pictures_and_a_vanished_picture_are_told(table, cache):
    with pytest.raises(DataError, match="no image to prepare"):
        fill_store(table.iloc[:0], SECTION, cache=cache)
    Path(table["image_path"][7]).unlink()
    with pytest.raises(DataError, match="the image of i7 has vanished"):
        fill_store(table, SECTION, cache=cache)


def test_the_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DUALREFNET_CACHE", str(tmp_path / "a"))
    assert default_cache() == tmp_path / "a"
    monkeypatch.delenv("DUALREFNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_cache() == tmp_path / "b" / "dualrefnet"
