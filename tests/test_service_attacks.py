"""What a hostile client may send. After each attack the service must still answer a good request, and rightly."""

import io
import json
import math
import random
import re
import resource
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from dualrefnet.deploy.predictor import Predictor
from dualrefnet.run import Run
from dualrefnet.service.app import create_app
from dualrefnet.service.schemas import PREDICTION_ROUTE, Refusal
from dualrefnet.service.uploads import parse_metadata
from live_service import (
    BEGUN,
    QUICK,
    StandInPredictor,
    connect,
    converse,
    live,
    metric,
    multipart,
    picture,
    post_head,
    question,
    read_all,
    running,
    status_of,
    wait_for,
)

DOCUMENTED = {200, *PREDICTION_ROUTE}
GOOD = ("images", picture())
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def served() -> Iterator[httpx.Client]:
    limits = {"max_upload": 2**20, "max_pixels": 1_000_000, "decode_timeout": 0.5}
    with live(settings=QUICK.model_copy(update=limits)) as client:
        yield client


@pytest.fixture
def client(served: httpx.Client) -> Iterator[httpx.Client]:
    yield served
    still_answers(served)


def still_answers(client: httpx.Client) -> None:
    body = client.post("/v1/predict", **question(51, age=61)).json()
    assert body["malignancy"] == pytest.approx(0.2)
    assert body["warnings"] == ["age 61"]
    for name in ("dualrefnet_queue_requests", "dualrefnet_queue_bytes"):
        assert metric(client.base_url, name) == 0


def send(client: httpx.Client, *parts: tuple[str, bytes], path: str = "/v1/predict") -> int:
    content, headers = multipart(parts)
    response = client.post(path, content=content, headers=headers)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"code", "message", "request_id"}
        assert "Traceback" not in response.text
    return response.status_code


def mutated(seed: bytes, chance: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(max(1, len(data)))
        kind = chance.randrange(4)
        if kind == 0:
            data[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            start = chance.randrange(len(seed))
            data[place:place] = seed[start : start + chance.randint(1, 64)]
        else:
            blocks = [b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\r\n--xyz"]
            data[place : place + chance.randint(1, 16)] = chance.choice(blocks)
    return bytes(data)


def test_a_thousand_damaged_images(client: httpx.Client) -> None:
    chance = random.Random(0)
    seeds = [picture(kind=kind, side=64) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP")]
    found = [send(client, ("images", mutated(seeds[number % len(seeds)], chance))) for number in range(1000)]
    assert set(found) <= {200, 400, 422}
    assert found.count(422) > 300


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["age", "region", "itch"]) | st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)
TEXTS = st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))


@examples(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | TEXTS | VALUES.map(lambda value: json.dumps(value).encode()))
def test_metadata_are_parsed_or_refused_and_nothing_else(raw: bytes) -> None:
    refused, metadata = None, {}
    try:
        metadata = parse_metadata(raw)
    except Refusal as refusal:
        refused = refusal.status
    if refused is not None:
        assert refused in (400, 422)
        return
    # What was taken is what strict JSON says.
    assert metadata == json.loads(raw)
    json.dumps(metadata, allow_nan=False).encode("ascii")
    assert all(isinstance(value, str | int | float | bool | None) for value in metadata.values())


@examples(max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_bodies_of_every_kind(served: httpx.Client, data: st.DataObject) -> None:
    chance = data.draw(st.randoms(use_true_random=False))
    content, headers = multipart([GOOD, ("metadata", b'{"age": 61, "region": "FACE"}')])
    response = served.post("/v1/predict", content=mutated(content, chance), headers=headers)
    assert response.status_code in DOCUMENTED - {403, 500, 503}


METADATA: dict[int, list[bytes]] = {
    400: [
        *(b'{"age": NaN}', b'{"age": -Infinity}', b'{"age": 1e400}', b'{"age": 90071992547409930}', b"", b"{} {}"),
        *(b'{"age": ' + b"9" * 5000 + b"}", b'{"age": 1, "age": 2}', b'{"age": 1, "\\u0061ge": 2}'),
        *(b'{"age": ' + b"[" * 8000 + b"]" * 8000 + b"}", b'{"a":' * 2500 + b"1" + b"}" * 2500),
        # A byte order mark, UTF-16, halves of characters, invalid UTF-8, a long name.
        *(b"\xef\xbb\xbf{}", '{"age": 1}'.encode("utf-16"), b'{"region": "\\ud800"}', b'{"\\udfff": 1}'),
        *(b'{"region": "\xc3\x28"}', b'{"' + b"a" * 201 + b'": 1}'),
    ],
    422: [
        *(b'{"age": [1]}', b'{"age": {"$gt": 0}}', b'"age"', b"null", b'{"__proto__": 1, "__class__": 2}'),
        '{"\u202eega": 1}'.encode(),
    ],
    200: [
        *(b'{"region": "FA\\u0000CE"}', b'{"region": "\\ud83e\\uddd1"}', b'{"region": "<script>alert(1)</script>"}'),
        *(
            '{"region": "\u202eECAF\u202c"}'.encode(),
            '{"region": "\U0001f9d1\u200d\U0001f52c"}'.encode(),
            b'{"age": -0.0}',
        ),
    ],
}


@pytest.mark.parametrize(
    ("status", "number"), [(status, n) for status, all_ in METADATA.items() for n in range(len(all_))]
)
def test_hostile_metadata(client: httpx.Client, status: int, number: int) -> None:
    for path in ("/v1/predict", "/v1/explain"):
        assert send(client, GOOD, ("metadata", METADATA[status][number]), path=path) == status


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *middle: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(middle) + chunk(b"IEND", b"")


def tiff(width: int, height: int, tile: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 322: tile, 323: tile, 324: 200, 325: 64}
    lines = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + lines + struct.pack("<I", 0) + b"\0" * 200


def animated() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (900, 900), (number, 0, 0)) for number in range(30)]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], duration=10)
    return stream.getvalue()


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG that refines the same coefficients again and again."""

    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 255, marker, len(content) + 2) + content

    runs = math.ceil(math.ceil(side / 8) ** 2 / 32767)
    size = math.ceil(15 * runs / 8)
    data = int((("0" + "1" * 14) * runs).ljust(8 * size, "1"), 2).to_bytes(size, "big")
    scan = segment(0xDA, b"\x01\x01\x00\x01\x3f\x10") + data.replace(b"\xff", b"\xff\0")
    head = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00")
    return b"\xff\xd8" + head + segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0") + scan * scans + b"\xff\xd9"


ZEROS = zlib.compress(bytes(200_000_000), 9)
PIXELS = chunk(b"IDAT", zlib.compress(bytes(64 * 193)))
BOMBS = {
    "50,000 x 50,000": (png(50_000, 50_000, chunk(b"IDAT", zlib.compress(bytes(1000)))), 422),
    "2^31 x 2^31": (png(2**31 - 1, 2**31 - 1, chunk(b"IDAT", b"")), 422),
    "no pixels": (png(0, 0, chunk(b"IDAT", b"")), 422),
    "more pixels than its size": (png(64, 64, chunk(b"IDAT", ZEROS)), 200),
    "a text of 200 MB": (png(64, 64, chunk(b"iTXt", b"x\0\1\0\0\0" + ZEROS), PIXELS), 422),
    "a profile of 200 MB": (png(64, 64, chunk(b"iCCP", b"x\0\0" + ZEROS), PIXELS), 422),
    "80,000 chunks": (png(64, 64, chunk(b"tEXt", b"") * 80_000, PIXELS), 422),
    "200,000 segments": (picture(kind="JPEG").replace(b"\xff\xd8", b"\xff\xd8" + b"\xff\xe5\0\2" * 200_000, 1), 422),
    "20,000 scans": (jpeg_of_scans(900, 20_000), 422),
    "a tile of 60,000 x 60,000": (tiff(64, 64, 60_000), 422),
    "an animation": (animated(), 200),
    "0 bytes": (b"", 422),
    "one byte": (b"\xff", 422),
    "only a beginning": (b"\x89PNG\r\n\x1a\n", 422),
    "a script": (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", 422),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", 422),
}


def memory_of(process: psutil.Process) -> int:
    """Return the bytes that a server and its decoders hold."""
    found = 0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found += one.memory_info().rss
    return found


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_neither_time_nor_memory(client: httpx.Client, name: str) -> None:
    data, status = BOMBS[name]
    before, started = memory_of(psutil.Process()), time.perf_counter()
    assert send(client, ("images", data)) == status
    assert time.perf_counter() - started < 2
    assert memory_of(psutil.Process()) - before < 150 * 2**20


def decoders(parent: int | None = None) -> list[psutil.Process]:
    children = psutil.Process(parent).children(recursive=True)
    return [child for child in children if "dualrefnet.service.decoder" in child.cmdline()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_decoders_that_end_are_replaced_and_the_next_image_is_decoded(client: httpx.Client, number: int) -> None:
    for process in decoders():
        process.send_signal(number)
    # Until the service has noticed.
    time.sleep(0.3)
    for _ in range(4):
        still_answers(client)


def test_others_are_answered_while_bombs_end_every_decoder() -> None:
    found: list[int] = []
    # Few scans of many pixels: nothing but time tells that something is wrong.
    bomb = ("images", jpeg_of_scans(7000, 90))
    with live(settings=QUICK.model_copy(update={"decode_timeout": 0.5})) as client:
        threads = [threading.Thread(target=lambda: found.append(send(client, bomb))) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert send(client, GOOD) == 200
        for thread in threads:
            thread.join()
        assert found == [422] * 4
        still_answers(client)


def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(client: httpx.Client) -> None:
    for length in (2**20 + 1, 2 * 2**30, 10**18):
        started = time.perf_counter()
        assert status_of(converse(client, post_head(length=length))) == 413
        assert time.perf_counter() - started < 0.2 + QUICK.linger
    # A client that asks before it sends is told no, and not "100 Continue".
    assert status_of(converse(client, post_head("Expect: 100-continue", length=2_000_000))) == 413


def test_a_body_without_a_length_is_cut_when_it_is_too_large(client: httpx.Client) -> None:
    def send_blocks(connection: socket.socket, most: int) -> None:
        connection.sendall(post_head("Transfer-Encoding: chunked"))
        for block in (BEGUN, *[b"x" * 65536] * most):
            connection.sendall(f"{len(block):x}\r\n".encode() + block + b"\r\n")

    with connect(client) as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
        send_blocks(connection, 20_000)
    # A client that looks is told why.
    with connect(client) as connection:
        send_blocks(connection, 20)
        assert status_of(read_all(connection)) == 413


METADATA_BEGUN = b'--xyz\r\nContent-Disposition: form-data; name="metadata"\r\n\r\n{"age": '
SLOW = {
    "no body": (b"", b""),
    "an image a byte": (BEGUN, b"x"),
    "metadata a byte": (METADATA_BEGUN, b"1"),
    "a boundary a byte": (b"--xyz\r\n", b"x"),
    "a whole body, and more to come": (multipart([GOOD])[0], b"x"),
}


def test_slow_clients_are_cut_off(client: httpx.Client) -> None:
    found: dict[str, tuple[float, bytes]] = {}

    def attack(name: str) -> None:
        begun, drop = SLOW[name]
        started, answer = time.perf_counter(), b""
        with connect(client, 0.2) as connection, suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(post_head(length=1000) + begun)
            while time.perf_counter() - started < 12:
                with suppress(TimeoutError):
                    piece = connection.recv(65536)
                    if not piece:
                        break
                    answer += piece
                connection.sendall(drop)
        found[name] = (time.perf_counter() - started, answer)

    threads = [threading.Thread(target=attack, args=(name,)) for name in SLOW]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    assert client.post("/v1/predict", **question()).status_code == 200
    assert time.perf_counter() - started < 2
    for thread in threads:
        thread.join()
    for name, (seconds, answer) in found.items():
        assert seconds < QUICK.body_timeout + QUICK.linger + 2, name
        assert status_of(answer) == 408, name


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_client_that_closes_its_side_after_a_request_is_answered(version: bytes) -> None:
    body, _ = multipart([GOOD])
    with live(StandInPredictor(delay=0.3)) as client:
        # A second request in the row, where the version has rows.
        request = (post_head(length=len(body)) + body).replace(b"1.1", version)
        with connect(client) as connection:
            connection.sendall(request * 2)
            connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
        assert re.findall(rb"HTTP/1\.1 (\d{3}) ", answer.replace(b" 100 ", b"")) == [b"200"] * (
            2 if version == b"1.1" else 1
        )
        assert (b" 100 Continue" in answer) == (version == b"1.1")
        still_answers(client)


def raw(first: bytes, *lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([first, b"Host: localhost", *lines, b"Connection: close", b"", b""]) + body


GET, POST = b"GET /healthz HTTP/1.1", b"POST /v1/predict HTTP/1.1"
CHUNKED, TYPE = b"Transfer-Encoding: chunked", b"Content-Type: multipart/form-data; boundary="
REQUESTS: dict[int, list[bytes]] = {
    # Large heads.
    431: [
        *(raw(GET, b"X: " + b"a" * 100_000), raw(GET, *[b"X%d: a" % number for number in range(5000)])),
        raw(b"GET /" + b"a" * 100_000 + b" HTTP/1.1"),
    ],
    # No host, two hosts, no HTTP, HTTP/2.
    400: [
        *(GET + b"\r\n\r\n", raw(GET, b"Host: y"), b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        # Lengths and codings.
        raw(POST, b"Content-Length: 5", b"Content-Length: 6", body=b"hello"),
        *(raw(POST, b"Content-Length: " + length) for length in (b"-1", b"abc", b"9" * 5000)),
        *(raw(POST, b"Transfer-Encoding: gzip, chunked"), raw(POST, CHUNKED, TYPE + b"x", body=b"zz\r\n")),
        # Headers.
        *(raw(GET, b"X: a\0b"), raw(GET, b"X : a"), raw(POST, TYPE + b"a" * 10_000)),
    ],
    # A proxy's request, and other protocols.
    404: [
        raw(b"GET http://elsewhere.example/ HTTP/1.1"),
        raw(b"GET / HTTP/1.1", b"Upgrade: websocket", b"Connection: Upgrade"),
        raw(b"GET / HTTP/1.1", b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings"),
        raw(b"CONNECT elsewhere.example:443 HTTP/1.1"),
    ],
    405: [raw(b"DESTROY /v1/predict HTTP/1.1"), raw(b"TRACE /v1/predict HTTP/1.1")],
    415: [
        raw(POST, b"Content-Type: " + b"a" * 10_000),
        raw(POST, b"Content-Length: 5", CHUNKED, body=b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n"),
    ],
    200: [raw(GET, b"X: a", b" Y: b")],
}


@pytest.mark.parametrize(
    ("status", "number"), [(key, place) for key, all_ in REQUESTS.items() for place in range(len(all_))]
)
def test_requests_that_are_not_as_they_should_be(client: httpx.Client, status: int, number: int) -> None:
    answer = converse(client, REQUESTS[status][number])
    assert status_of(answer) == status, answer
    # One request, one response: nothing of the body is taken for another.
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", answer)) == 1


def test_requests_in_a_row_on_one_connection_are_answered_in_order(client: httpx.Client) -> None:
    body, _ = multipart([("images", picture(255))])
    first = post_head("X-Request-ID: one", length=len(body)) + body
    rows = first + b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-ID: two\r\n\r\nrubbish that is no request\r\n\r\n"
    answer = converse(client, rows)
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", answer) == [b"200", b"200", b"400"]
    assert answer.index(b"x-request-id: one") < answer.index(b"x-request-id: two")


PATHS = [
    *("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/%2e%2e/v1/model", "/%00", "/v1/predict%00", "//healthz"),
    *("/..%5c..%5cwindows", r"/\\host\share", "/%c0%ae%c0%ae/", "/%ff%fe", "/file:///etc/passwd", "/%F0%9F%A7%91"),
    *("/v1/model/../../docs", "/%u0041", "/%"),
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_lead_nowhere(client: httpx.Client, path: str) -> None:
    answer = converse(client, raw(f"GET {path} HTTP/1.1".encode()))
    assert status_of(answer) in (400, 404)
    assert b"root:" not in answer


NAMES = [
    *("../../../../etc/passwd", "/etc/passwd", r"..\..\boot.ini", r"C:\x.jpg", r"\\host\share\x", "a\0.jpg", "con"),
    *("\u202egpj.exe", "\U0001f9d1.jpg", "", "." * 5000, '"; name="metadata', "x.jpg;type=text/html", "%2e%2e%2fx"),
]


def test_names_of_files_are_not_looked_at(
    client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        content = part(f'Content-Disposition: form-data; name="images"; filename="{name}"', value=picture())
        response = client.post("/v1/predict", content=content + b"--x--\r\n", headers=MULTIPART)
        assert response.status_code in (200, 400), name
        assert len(name) < 4 or name not in response.text
    assert not list(tmp_path.iterdir())


def part(*lines: str, value: bytes = b"{}") -> bytes:
    return b"--x\r\n" + "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + value + b"\r\n"


NAMED = 'Content-Disposition: form-data; name="metadata"'
PARTS = {
    "no name": part("Content-Disposition: form-data"),
    "no headers": part(),
    "not form-data": part('Content-Disposition: attachment; name="metadata"'),
    "an empty name": part('Content-Disposition: form-data; name=""'),
    "a name of emoji": part('Content-Disposition: form-data; name="\U0001f9d1"'),
    "a name like it": part('Content-Disposition: form-data; name="metadata\u200b"'),
    "two dispositions": part(NAMED, 'Content-Disposition: form-data; name="images"'),
    "a header of 10,000 letters": part(NAMED, "X: " + "a" * 10_000),
    "100 headers": part(NAMED, *[f"X{number}: a" for number in range(100)]),
    "a header without a colon": part("nonsense"),
    "10,000 parts": part(NAMED) * 10_000,
    "10,000 nameless parts": part() * 10_000,
    "parts in a part": part(
        NAMED, "Content-Type: multipart/mixed; boundary=y", value=b'--y\r\n\r\n{"age": 1}\r\n--y--'
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_are_not_as_they_should_be(client: httpx.Client, name: str) -> None:
    started = time.perf_counter()
    response = client.post("/v1/predict", content=PARTS[name] + b"--x--\r\n", headers=MULTIPART)
    # What isn't form-data is ignored, and then there is no image.
    assert response.status_code in (400, 422)
    assert time.perf_counter() - started < 1


def test_images_never_touch_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    # Opening any temporary file would fail.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    large = io.BytesIO()
    Image.frombytes("RGB", (1500, 1500), random.Random(1).randbytes(1500 * 1500 * 3)).save(large, "PNG")
    assert len(large.getvalue()) > 6 * 2**20
    with live() as client:
        assert client.post("/v1/predict", files={"images": ("x", large.getvalue())}).status_code == 200


SITE = "https://lesions.example.org"
ALLOWED = QUICK.model_copy(update={"allow_origins": (SITE,)})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8000", "Origin": "http://evil.example:8000", "Sec-Fetch-Site": "same-origin"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "localhost:9999"}, 200),
        ({"Host": "[::1]:9999"}, 200),
        ({"Host": "192.168.0.7"}, 200),
        ({"Host": "lesions.example.org"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:80", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1"}, 200),
        ({"Origin": SITE, "Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_other_web_sites_are_refused(client: httpx.Client, headers: dict[str, str], status: int) -> None:
    assert client.get("/v1/model", headers=headers).status_code == status
    response = client.post("/v1/predict", **question(), headers=headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers
    assert client.get("/healthz", headers=headers).status_code == 200


def test_allowed_web_sites_are_answered_and_others_are_not() -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    browser = {"Origin": SITE, "Sec-Fetch-Site": "cross-site"}
    with live(settings=ALLOWED) as client:
        preflight = client.options("/v1/predict", headers={**browser, **asks})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == SITE
        assert "x-api-key" in preflight.headers["access-control-allow-headers"].lower()
        for response in (client.post("/v1/predict", **question(), headers=browser), client.get("/no", headers=browser)):
            assert response.status_code in (200, 404)
            assert response.headers["access-control-allow-origin"] == SITE
        assert client.get("/v1/model", headers={"Host": "lesions.example.org"}).status_code == 200
        other = {"Origin": "https://evil.example"}
        assert client.post("/v1/predict", **question(), headers=other).status_code == 403
        assert "access-control-allow-origin" not in client.options("/v1/predict", headers={**other, **asks}).headers


def test_a_network_that_computes_no_numbers_is_an_error_and_never_ready(tiny_run: Run, sample_root: Path) -> None:
    predictor = Predictor.load(tiny_run)
    with torch.no_grad():
        next(predictor.network.model.parameters()).fill_(math.nan)
    image = next((sample_root / "images").iterdir()).read_bytes()
    with TestClient(create_app(predictor, QUICK), base_url="http://localhost") as client:
        for path in ("/v1/predict", "/v1/explain"):
            response = client.post(path, files={"images": image})
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "not_finite"
        assert client.get("/readyz").json()["error"]["code"] == "broken"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_the_service_ends_whatever_its_decoders_do_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    killed = number == signal.SIGKILL
    settings = QUICK.model_copy(update={"decode_timeout": 1.0 if killed else 60.0, "grace": 2.0})
    body, _ = multipart([("images", jpeg_of_scans(7000, 90))])
    with running(tmp_path, settings=settings) as process, httpx.Client(base_url=process.base) as client:
        children = decoders(process.popen.pid)
        connections = [connect(client) for _ in children]
        for connection in connections:
            connection.sendall(post_head(length=len(body)) + body)
        time.sleep(0.5)
        process.popen.send_signal(number)
        if not killed:
            # A terminal and systemd send a signal to the whole group.
            for child in children:
                child.send_signal(number)
        assert process.popen.wait(10) == (-signal.SIGKILL if killed else 1)
        statuses = [status_of(answer) for answer in map(read_all, connections) if answer]
        assert statuses == ([] if killed else [503] * len(children))
        assert not psutil.wait_procs(children, timeout=15)[1]
    assert not list(folder.iterdir())


def test_few_file_descriptors_do_not_fill_the_log(tmp_path: Path) -> None:
    with running(tmp_path) as process, httpx.Client(base_url=process.base) as client:
        resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (40, 40))
        idle = [connect(client) for _ in range(60)]
        time.sleep(1.5)
        for connection in idle:
            connection.close()
        wait_for(lambda: process.ready)
        still_answers(client)
        assert len(process.log.read_bytes()) < 20_000


@pytest.mark.slow  # About 6 s.
def test_two_gigabytes_take_no_memory(tmp_path: Path) -> None:
    block = b"x" * 2**20
    with running(tmp_path) as process, httpx.Client(base_url=process.base, timeout=60) as client:
        still_answers(client)
        memory = psutil.Process(process.popen.pid)
        highest = before = memory_of(memory)
        for length in (f"Content-Length: {2 * 2**30}", "Transfer-Encoding: chunked"):
            sent = 0
            with connect(client) as connection, suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(post_head(length))
                for sent in range(2048):
                    piece = block if sent else BEGUN + block
                    head = f"{len(piece):x}\r\n".encode()
                    connection.sendall(head + piece + b"\r\n" if "chunked" in length else piece)
                    highest = max(highest, memory_of(memory))
            assert sent < 2047, "it took all of it"
        # A body up to the limit (64 MB) is held while it comes.
        assert highest - before < 200 * 2**20
        still_answers(client)


@pytest.mark.slow  # About 30 s.
def test_memory_of_large_images_is_given_back(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.effect_noise((7000, 7000), 20).convert("RGB").save(stream, "JPEG", quality=60)
    with running(tmp_path) as process, httpx.Client(base_url=process.base, timeout=60) as client:
        before = memory_of(psutil.Process(process.popen.pid))
        for _ in range(20):
            assert send(client, ("images", stream.getvalue())) == 200
        time.sleep(1)
        assert memory_of(psutil.Process(process.popen.pid)) - before < 300 * 2**20
