import contextlib
import hashlib
import io
import json
import stat
import tempfile
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualrefnet.data import fetch, pad_ufes_20
from dualrefnet.data.fetch import RELEASES, Source, fetch_dataset, unpack
from dualrefnet.errors import DataError


class Server(ThreadingHTTPServer):
    def handle_error(self, request, address):
        # A client that hangs up is part of these tests.
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        step = server.script.pop(0) if server.script else {}
        content = step.get("content", server.content)
        if "status" in step:
            return self.reply(step["status"], b"no", {"Content-Type": "text/plain"})
        headers = {"Content-Type": step.get("type", "application/octet-stream")}
        if server.etag:
            headers["ETag"] = server.etag
        threading.Event().wait(step.get("wait", 0))
        start, wanted = 0, self.headers.get("Range")
        valid = self.headers.get("If-Range") in (None, server.etag)
        if wanted and server.ranges and valid:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, content[start:], headers, step.get("cut"), step.get("endless"))

    def reply(self, status, body, headers, cut=None, endless=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not endless:
            self.send_header("Content-Length", str(len(body)))
        self.close_connection = endless
        self.end_headers()
        self.wfile.write(body[:cut])
        self.server.sent += len(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


def noise(size):
    return np.random.default_rng(0).bytes(size)


def archive_of(members, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def link():
    """A symbolic link `images` that leads to /etc."""
    info = zipfile.ZipInfo("images")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF_SECONDS", 0.0)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    server = Server(("127.0.0.1", 0), Handler)
    # requests: headers of each; script: what to do wrong, request by request; sent: bytes of bodies.
    server.requests, server.script, server.sent = [], [], 0
    server.content, server.etag, server.ranges = (
        archive_of({"metadata.csv": b"img_id\n", "noise.bin": noise(600_000)}),
        '"v1"',
        True,
    )
    server.url = f"http://127.0.0.1:{server.server_port}/data.zip"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def get(server, monkeypatch):
    """Fetch the server's file as the release of PAD-UFES-20."""

    def get(root, **changes):
        sha256, size = hashlib.sha256(server.content).hexdigest(), len(server.content)
        source = replace(Source(server.url, "data.zip", sha256, size, "."), **changes)
        monkeypatch.setitem(RELEASES, "pad_ufes_20", replace(RELEASES["pad_ufes_20"], sources=(source,)))
        return fetch_dataset("pad_ufes_20", root, accept_licence=True)

    return get


def begun(root, content, version):
    (root / "data.zip.partial").write_bytes(content)
    (root / "data.zip.partial.version").write_text(version)


def test_a_release_is_downloaded_verified_unpacked_and_recorded(server, get, tmp_path):
    made = get(tmp_path / "new" / "folder")
    root = tmp_path / "new" / "folder"
    assert made == [root / "metadata.csv", root / "noise.bin"]
    assert (root / "noise.bin").read_bytes() == noise(600_000)
    record = json.loads((root / "fetched.json").read_text())
    (entry,) = record["files"]
    assert record["licence"] == "CC BY 4.0"
    assert entry["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert (entry["bytes"], entry["url"], entry["verified"]) == (len(server.content), server.url, "sha256")
    assert sorted(path.name for path in root.iterdir()) == ["data.zip", "fetched.json", "metadata.csv", "noise.bin"]


def test_what_is_done_is_not_done_again(server, get, tmp_path):
    first = get(tmp_path)
    asked = len(server.requests)
    # The archive may go once it is unpacked.
    (tmp_path / "data.zip").unlink()
    assert get(tmp_path) == first
    assert len(server.requests) == asked
    (tmp_path / "noise.bin").unlink()
    assert get(tmp_path) == first
    assert (tmp_path / "noise.bin").exists()


def test_a_connection_cut_half_way_is_taken_up_where_it_broke_off(server, get, tmp_path):
    server.script = [{"cut": 400_000}]
    get(tmp_path)
    assert len(server.requests) == 2
    kept = int(server.requests[1]["Range"].removeprefix("bytes=").rstrip("-"))
    # At most the chunk that was under way is asked for twice.
    assert 400_000 - fetch.CHUNK <= kept <= 400_000
    assert server.requests[1]["If-Range"] == '"v1"'
    assert server.sent == 400_000 + len(server.content) - kept
    assert (tmp_path / "noise.bin").read_bytes() == noise(600_000)


def test_a_later_run_resumes_an_interrupted_one(server, get, tmp_path, monkeypatch, capsys):
    def interrupt(seconds):
        raise KeyboardInterrupt

    server.script = [{"cut": 300_000}]
    with monkeypatch.context() as patch:
        patch.setattr(fetch.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get(tmp_path)
    kept = (tmp_path / "data.zip.partial").stat().st_size
    assert kept > 200_000
    assert "run it again to resume" in " ".join(capsys.readouterr().err.split())
    get(tmp_path)
    assert server.requests[-1]["Range"] == f"bytes={kept}-"
    assert not list(tmp_path.glob("*.partial*"))


def test_a_server_without_ranges_starts_from_zero_aloud(server, get, tmp_path, capsys):
    server.ranges = False
    server.script = [{"cut": 400_000}]
    get(tmp_path)
    assert "starts from zero" in " ".join(capsys.readouterr().err.split())
    assert server.sent == 400_000 + len(server.content)
    assert (tmp_path / "noise.bin").read_bytes() == noise(600_000)


@pytest.mark.parametrize("version", ['"v1"', None])
def test_a_file_that_changed_meanwhile_is_not_stitched_together(server, get, tmp_path, version):
    old = server.content
    server.content, server.etag = archive_of({"metadata.csv": b"img_id\n", "noise.bin": noise(600_000)[::-1]}), '"v2"'
    assert len(server.content) == len(old)
    begun(tmp_path, old[:300_000], version or "")
    if version is None:
        (tmp_path / "data.zip.partial.version").unlink()
    get(tmp_path)
    assert (tmp_path / "noise.bin").read_bytes() == noise(600_000)[::-1]


def test_without_a_network_it_is_said_within_seconds_what_to_do(server, get, tmp_path):
    server.server_close()
    started = time.monotonic()
    with pytest.raises(DataError, match=r"is there a network\?.* Open https://data.mendeley.com"):
        get(tmp_path)
    assert time.monotonic() - started < 10


def test_a_server_that_never_answers_is_not_waited_for(server, get, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_ANSWER_SECONDS", 0.2)
    server.script = [{"wait": 2}]
    with pytest.raises(DataError, match="no answer within"):
        get(tmp_path)


def test_a_server_that_sends_without_end_is_stopped_at_the_published_size(server, get, tmp_path):
    server.script = [{"endless": True, "content": server.content + noise(10**6)}]
    with pytest.raises(DataError, match="more than the published"):
        get(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_server_errors_are_tried_again_and_in_the_end_given_up(server, get, tmp_path):
    server.script = [{"status": 503}, {"status": 429}, {"status": 500}]
    get(tmp_path / "a")
    assert len(server.requests) == 4
    server.script = [{"status": 503}] * 50
    with pytest.raises(DataError, match="503"):
        get(tmp_path / "b")


@pytest.mark.parametrize(
    "step",
    [
        {"status": 403},
        {"status": 404},
        {"type": "text/html", "content": b"<html>"},
        {"content": b"<!doctype html>" * 99},
    ],
)
def test_an_answer_for_browsers_says_what_to_do_in_one(server, get, tmp_path, step):
    server.script = [step]
    with pytest.raises(DataError) as caught:
        get(tmp_path, size=0)
    for words in (
        "https://data.mendeley.com/datasets/zr7vgbcyr2/1",
        "Download All",
        str(tmp_path / "zr7vgbcyr2-1.zip"),
        "dualrefnet fetch pad_ufes_20",
    ):
        assert words in str(caught.value)
    assert len(server.requests) == 1
    assert not (tmp_path / "data.zip").exists()


def test_the_archive_that_a_browser_gets_is_unpacked_with_its_parts(tmp_path):
    parts = {
        f"images/imgs_part_{part}.zip": archive_of({f"imgs_part_{part}/PAT_{part}.png": noise(part * 1000)})
        for part in (1, 2, 3)
    }
    whole = {f"a long title/{name}": content for name, content in {"metadata.csv": b"img_id\n", **parts}.items()}
    (tmp_path / "zr7vgbcyr2-1.zip").write_bytes(archive_of({**whole, "__MACOSX/a long title/._metadata.csv": b"x"}))
    made = fetch_dataset("pad_ufes_20", tmp_path, accept_licence=True)
    assert made == [tmp_path / "images", tmp_path / "metadata.csv"]
    folders = pad_ufes_20.image_folders(tmp_path)
    assert sorted(path.name for folder in folders for path in folder.glob("*.png")) == [
        "PAT_1.png",
        "PAT_2.png",
        "PAT_3.png",
    ]
    assert not list(tmp_path.rglob("imgs_part_*.zip"))
    (tmp_path / "zr7vgbcyr2-1.zip").unlink()
    assert fetch_dataset("pad_ufes_20", tmp_path, accept_licence=True) == made


def test_the_licence_must_be_accepted(tmp_path):
    for name, words in (("pad_ufes_20", "CC BY 4.0"), ("isic_2019", "CC BY-NC 4.0")):
        with pytest.raises(DataError) as caught:
            fetch_dataset(name, tmp_path / "new", accept_licence=False)
        assert words in str(caught.value)
        assert "--accept-licence" in str(caught.value)
        assert RELEASES[name].schema.citation in str(caught.value)
    assert not (tmp_path / "new").exists()


EVIL = {
    "parent": {"../escaped.txt": b"x"},
    "deep parent": {"images/../../escaped.txt": b"x"},
    "absolute": {"/tmp/escaped.txt": b"x"},
    "backslash": {"..\\escaped.txt": b"x"},
    "drive": {"C:escaped.txt": b"x"},
    "a link": {link(): "/etc", "images/passwd": b"x"},
    "inside a part": {"images/part.zip": archive_of({"../../../escaped.txt": b"x"})},
}


@pytest.mark.parametrize("kind", EVIL)
def test_archives_that_lead_out_of_the_folder_are_refused_entirely(tmp_path, kind):
    (tmp_path / "evil.zip").write_bytes(archive_of({"good.txt": b"fine", **EVIL[kind]}))
    with pytest.raises(DataError, match="leads out"):
        unpack(tmp_path / "evil.zip", tmp_path / "root" / "sub")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil.zip", "root", "sub"]


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


# Made once: an archive holds the time, and hypothesis wants the same bytes for the same draws.
MUTABLE = archive_of(
    {"a/b.txt": b"some text " * 9, "c.txt": b"more", "part.zip": archive_of({"d.txt": b"inner"}, zipfile.ZIP_STORED)}
)


@settings(max_examples=150)
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
