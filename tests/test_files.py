import csv
import errno
import math
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from dualrefnet.errors import DataError
from dualrefnet.files import (
    PARTIAL,
    atomic_folder,
    atomic_path,
    locked,
    read_csv,
    read_json,
    write_csv,
    write_json,
    write_tensors,
    write_text,
)


@pytest.fixture
def full_disk(tmp_path):
    point = tmp_path / "disk"
    point.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(point)], capture_output=True).returncode:
        pytest.skip("this machine doesn't let a test mount a small disk")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


def test_an_error_in_the_block_keeps_the_old_file_and_leaves_no_neighbour(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")

    def interrupted():
        with atomic_path(file) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_parent_folder_is_made_and_the_rights_are_those_of_the_umask(tmp_path):
    file = tmp_path / "deep" / "er" / "a.txt"
    write_text(file, "ä\n")
    assert file.read_bytes() == b"\xc3\xa4\n"
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_readers_never_see_half_a_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, ["0" * 200_000])
    seen, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            seen.add(len(read_json(file)[0]))

    reader = threading.Thread(target=read)
    reader.start()
    for length in (100_000, 200_000) * 15:
        write_json(file, ["0" * length])
    stop.set()
    reader.join()
    assert seen <= {100_000, 200_000}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_json_that_other_programs_cannot_read_is_refused_and_the_old_file_stays(tmp_path, value):
    file = tmp_path / "a.json"
    write_json(file, 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(file, {"x": value})
    assert read_json(file) == 1


def test_tensors_that_share_memory_or_lie_channels_last_come_back_equal(tmp_path):
    whole = torch.arange(24.0).reshape(1, 2, 3, 4)
    tensors = {"a": whole, "view": whole[:, :1], "half": whole.bfloat16()}
    tensors["last"] = whole.to(memory_format=torch.channels_last)
    write_tensors(tmp_path / "a.safetensors", tensors, {"format": "1"})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 10**6),
        lambda path: write_csv(path, pd.DataFrame({"x": ["y" * 1000] * 1000})),
        lambda path: write_tensors(path, {"x": torch.zeros(10**6)}),
    ],
    ids=["text", "csv", "tensors"],
)
def test_a_full_disk_is_told_in_one_line_and_the_old_file_stays(full_disk, write):
    file = full_disk / "state"
    write_text(file, "old")
    with pytest.raises(DataError, match=r"disk is full.*state was not written; free some space"):
        write(file)
    assert file.read_text() == "old"
    assert os.listdir(full_disk) == ["state"]


def kinds(folder):
    """Return what is in a folder, with the kind of each."""
    return {path.name: stat.S_IFMT(path.lstat().st_mode) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "name", ["folder", "pipe", "link", "dangling", "file/below", "n" * 300, "/proc/x", "/dev/full"]
)
def test_only_regular_files_are_replaced_and_a_place_that_cant_be_is_one_line(tmp_path, name):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = kinds(tmp_path)
    with pytest.raises(DataError, match=r"; name another") as caught:
        write_text(tmp_path / name, "x")
    assert "\n" not in str(caught.value)
    assert kinds(tmp_path) == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EROFS])
def test_a_lock_that_cannot_be_is_one_line(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(DataError, match=r"without locks|can't be written"), locked(tmp_path / "lock"):
        pass


def test_errors_of_what_is_read_meanwhile_are_not_of_the_file_that_is_written(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        (tmp_path / "missing").read_bytes()


def test_json_that_is_none_is_a_value_error(tmp_path):
    for text in ("{", "[" * 10**5):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"Expecting|deeply"):
            read_json(tmp_path / "a.json")


def test_what_killed_writes_have_left_is_swept_and_what_others_are_writing_is_not(tmp_path):
    (tmp_path / f".of_a_dead_process{PARTIAL}").write_text("half")
    (tmp_path / f".folder{PARTIAL}").mkdir()
    for name in (".hidden", ".x.partial", "b.partial"):
        (tmp_path / name).write_text("kept")
    with atomic_folder(tmp_path / "a") as folder, atomic_path(tmp_path / "b") as file:
        program = "import sys; from dualrefnet.files import write_text; write_text(sys.argv[1], 'c')"
        subprocess.run([sys.executable, "-c", program, tmp_path / "c"], check=True)
        assert folder.is_dir()
        assert file.is_file()
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", ".x.partial", "b.partial", "a", "b", "c"}


@example(["1"], "=x")
@given(st.lists(st.text(st.sampled_from("'=+-@\t\ra1.e"), max_size=6), min_size=1), st.sampled_from(["x", "=x", "-1"]))
def test_no_cell_of_a_csv_is_a_formula_and_every_text_is_read_again(texts: list[str], name: str) -> None:
    table = pd.DataFrame({name: texts, "number": np.linspace(-1, 1, len(texts))})
    with tempfile.TemporaryDirectory() as folder:
        write_csv(Path(folder) / "a.csv", table)
        rows = list(csv.reader((Path(folder) / "a.csv").open(newline="", encoding="utf-8")))
        again = read_csv(Path(folder) / "a.csv", dtype={name: str}, keep_default_na=False)
    for cell in (cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))):
        assert math.isfinite(float(cell))
    pd.testing.assert_frame_equal(again, table, check_dtype=False)


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2, dtype=torch.float64)}
    header = {f"key {number}": "ä\n\x1f" for number in range(20)}
    # Each process has its own order, and each mapping in it.
    for number in range(5):
        write_tensors(tmp_path / f"{number}", dict(sorted(tensors.items(), reverse=number % 2 > 0)), header)
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(5)}) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == header
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
