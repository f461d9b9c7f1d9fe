import contextlib
import io
import stat
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualrefnet.data.fetch import unpack
from dualrefnet.errors import DataError


def noise(size):
    return np.random.default_rng(0).bytes(size)


def archive_of(members, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def link(name, target):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target


EVIL = {
    "parent": {"../escaped.txt": b"x"},
    "deep parent": {"images/../../escaped.txt": b"x"},
    "absolute": {"/tmp/escaped.txt": b"x"},
    "backslash": {"..\\escaped.txt": b"x"},
    "drive": {"C:escaped.txt": b"x"},
    "inside a part": {"images/part.zip": archive_of({"../../../escaped.txt": b"x"})},
}


@pytest.mark.parametrize("kind", EVIL)
def test_archives_that_lead_out_of_the_folder_are_refused_whole(tmp_path, kind):
    (tmp_path / "evil.zip").write_bytes(archive_of({"good.txt": b"fine", **EVIL[kind]}))
    with pytest.raises(DataError, match="leads out"):
        unpack(tmp_path / "evil.zip", tmp_path / "root" / "sub")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil.zip", "root", "sub"]


def test_links_in_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(*link("images", "/etc"))
        archive.writestr("images/passwd", b"x")
    with pytest.raises(DataError, match="a link"):
        unpack(tmp_path / "evil.zip", tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_bombs_are_refused_whether_or_not_their_header_is_honest(tmp_path):
    bomb = archive_of({"zeros": bytes(5_000_000)})
    (tmp_path / "bomb.zip").write_bytes(bomb)
    with pytest.raises(DataError, match="too much for its size"):
        unpack(tmp_path / "bomb.zip", tmp_path / "root")
    # The size stands in the local header and in the directory; both now promise one byte.
    (tmp_path / "bomb.zip").write_bytes(bomb.replace((5_000_000).to_bytes(4, "little"), (1).to_bytes(4, "little")))
    with pytest.raises(DataError):
        unpack(tmp_path / "bomb.zip", tmp_path / "root")
    (tmp_path / "nested.zip").write_bytes(archive_of({"part.zip": bomb}, zipfile.ZIP_STORED))
    with pytest.raises(DataError, match=r"part\.zip promises"):
        unpack(tmp_path / "nested.zip", tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


@pytest.mark.parametrize("part", [0.2, 0.5, 0.95])
def test_a_damaged_archive_leaves_nothing_behind(tmp_path, part):
    content = archive_of({"good.txt": b"fine", "noise.bin": noise(50_000)})
    (tmp_path / "cut.zip").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DataError, match="damaged"):
        unpack(tmp_path / "cut.zip", tmp_path / "root")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(flipped)
    with pytest.raises(DataError, match="damaged"):
        unpack(tmp_path / "flipped.zip", tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a.txt", b"1")
        archive.writestr("a.txt", b"2")
    with pytest.raises(DataError, match="can't be unpacked"):
        unpack(tmp_path / "twice.zip", tmp_path / "root")


def test_unpacking_goes_into_folders_that_are_there_and_spares_other_files(tmp_path):
    root = tmp_path / "root"
    (root / "images" / "imgs_part_1").mkdir(parents=True)
    (root / "images" / "imgs_part_1" / "mine.txt").write_text("mine")
    (root / "images" / "imgs_part_1" / "PAT_1.png").write_text("half of")
    (tmp_path / "part.zip").write_bytes(archive_of({"imgs_part_1/PAT_1.png": b"whole"}))
    assert unpack(tmp_path / "part.zip", root / "images") == [root / "images" / "imgs_part_1"]
    assert (root / "images" / "imgs_part_1" / "mine.txt").read_text() == "mine"
    assert (root / "images" / "imgs_part_1" / "PAT_1.png").read_bytes() == b"whole"


# Made once: an archive holds the time, and hypothesis wants the same bytes for the same draws.
MUTABLE = archive_of(
    {"a/b.txt": b"some text " * 9, "c.txt": b"more", "part.zip": archive_of({"d.txt": b"inner"}, zipfile.ZIP_STORED)}
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_unpack_or_are_a_data_error_and_leave_nothing_else(data):
    file = bytearray(MUTABLE)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(file) - 1))
        file[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        archive, root = Path(folder) / "x.zip", Path(folder) / "root"
        archive.write_bytes(file)
        with contextlib.suppress(DataError):
            unpack(archive, root)
        assert sorted(path.name for path in Path(folder).iterdir()) == ["root", "x.zip"]
        assert not list(root.glob(".unpacking-*"))
