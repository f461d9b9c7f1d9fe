"""What a hostile client may send. After each attack the service must still answer a good request, and rightly."""

import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from dualrefnet.service.schemas import PREDICTION_ROUTE, Refusal
from dualrefnet.service.server import Served
from dualrefnet.service.settings import ServiceSettings
from dualrefnet.service.uploads import parse_metadata
from live_service import QUICK, converse, live, multipart, picture, question, read_all, status_of, wait_for

DOCUMENTED = {200, *PREDICTION_ROUTE}
GOOD = ("images", picture())


@pytest.fixture(scope="module")
def served() -> Iterator[httpx.Client]:
    with live(settings=QUICK.model_copy(update={"max_upload": 2**20, "max_pixels": 1_000_000})) as client:
        yield client


@pytest.fixture
def client(served: httpx.Client) -> Iterator[httpx.Client]:
    yield served
    still_answers(served)


def still_answers(client: httpx.Client) -> None:
    body = client.post("/v1/predict", **question(51, age=61)).json()
    assert body["malignancy"] == pytest.approx(0.2)
    assert body["warnings"] == ["age 61"]
    held = [line for line in client.get("/metrics").text.splitlines() if line.startswith("dualrefnet_queue_")]
    assert held
    assert all(float(line.split()[-1]) == 0 for line in held)


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
            data[place : place + chance.randint(1, 16)] = chance.choice(
                [b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\r\n--xyz"]
            )
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


@examples(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | TEXTS | VALUES.map(lambda value: json.dumps(value).encode()))
def test_metadata_are_parsed_or_refused_and_nothing_else(raw: bytes) -> None:
    form = refused = None
    try:
        form = parse_metadata(raw)
    except Refusal as refusal:
        refused = refusal.status
    if form is None:
        assert refused in (400, 422)
        return
    # What was taken is what strict JSON says.
    assert form == json.loads(raw)
    json.dumps(form, allow_nan=False).encode("ascii")
    assert all(isinstance(value, str | int | float | bool | None) for value in form.values())


@examples(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_bodies_of_every_kind(served: httpx.Client, data: st.DataObject) -> None:
    chance = data.draw(st.randoms(use_true_random=False))
    content, headers = multipart([GOOD, ("metadata", b'{"age": 61, "region": "FACE"}')])
    response = served.post("/v1/predict", content=mutated(content, chance), headers=headers)
    assert response.status_code in DOCUMENTED - {500, 503}


METADATA = {
    "NaN": (b'{"age": NaN}', 400),
    "infinity": (b'{"age": -Infinity}', 400),
    "beyond a float": (b'{"age": 1e400}', 400),
    "a huge number": (b'{"age": ' + b"9" * 5000 + b"}", 400),
    "a large number": (b'{"age": 90071992547409930}', 400),
    "a name twice": (b'{"age": 1, "age": 2}', 400),
    "a name twice, written otherwise": (b'{"age": 1, "\\u0061ge": 2}', 400),
    "deep lists": (b'{"age": ' + b"[" * 8000 + b"]" * 8000 + b"}", 400),
    "deep objects": (b'{"a":' * 2500 + b"1" + b"}" * 2500, 400),
    "a list for a value": (b'{"age": [1]}', 422),
    "an object for a value": (b'{"age": {"$gt": 0}}', 422),
    "a text": (b'"age"', 422),
    "nothing": (b"", 400),
    "null": (b"null", 422),
    "two values": (b"{} {}", 400),
    "a mark of bytes": (b"\xef\xbb\xbf{}", 400),
    "UTF-16": ('{"age": 1}'.encode("utf-16"), 400),
    "half a character": (b'{"region": "\\ud800"}', 400),
    "half a character in a name": (b'{"\\udfff": 1}', 400),
    "invalid UTF-8": (b'{"region": "\xc3\x28"}', 400),
    "a long name": (b'{"' + b"a" * 201 + b'": 1}', 400),
    "a zero in a text": (b'{"region": "FA\\u0000CE"}', 200),
    "right to left": ('{"region": "\u202eECAF\u202c"}'.encode(), 200),
    "four bytes": ('{"region": "\U0001f9d1\u200d\U0001f52c \U00020bb7"}'.encode(), 200),
    "a pair of halves": (b'{"region": "\\ud83e\\uddd1"}', 200),
    "a name right to left": ('{"\u202eega": 1}'.encode(), 422),
    "a name of Python": (b'{"__proto__": 1, "__class__": 2}', 422),
    "markup": (b'{"region": "<script>alert(1)</script>"}', 200),
    "minus nothing": (b'{"age": -0.0}', 200),
}


@pytest.mark.parametrize("name", METADATA)
def test_hostile_metadata(client: httpx.Client, name: str) -> None:
    form, status = METADATA[name]
    assert send(client, GOOD, ("metadata", form)) == status
    assert send(client, GOOD, ("metadata", form), path="/v1/explain") == status


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *middle: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(middle) + chunk(b"IEND", b"")


def tiff(width: int, height: int, tile: int) -> bytes:
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (277, 3, 1),
        (322, 4, tile),
        (323, 4, tile),
        (324, 4, 200),
        (325, 4, 64),
    ]
    lines = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + lines + struct.pack("<I", 0) + b"\0" * 200


def animated() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (900, 900), (number, 0, 0)) for number in range(30)]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], duration=10)
    return stream.getvalue()


def bombs() -> dict[str, tuple[bytes, int]]:
    zeros = zlib.compress(bytes(200_000_000), 9)
    return {
        "50,000 x 50,000": (png(50_000, 50_000, chunk(b"IDAT", zlib.compress(bytes(1000)))), 422),
        "2^31 x 2^31": (png(2**31 - 1, 2**31 - 1, chunk(b"IDAT", b"")), 422),
        "no pixels": (png(0, 0, chunk(b"IDAT", b"")), 422),
        "more pixels than its size": (png(64, 64, chunk(b"IDAT", zeros)), 200),
        "a text of 200 MB": (
            png(64, 64, chunk(b"iTXt", b"x\0\1\0\0\0" + zeros), chunk(b"IDAT", zlib.compress(bytes(64 * 193)))),
            422,
        ),
        "a profile of 200 MB": (
            png(64, 64, chunk(b"iCCP", b"x\0\0" + zeros), chunk(b"IDAT", zlib.compress(bytes(64 * 193)))),
            422,
        ),
        "a tile of 60,000 x 60,000": (tiff(64, 64, 60_000), 422),
        "a TIFF of 65,000 x 65,000": (tiff(65_000, 65_000, 64), 422),
        "an animation": (animated(), 200),
        "0 bytes": (b"", 422),
        "one byte": (b"\xff", 422),
        "only a beginning": (b"\x89PNG\r\n\x1a\n", 422),
        "a script": (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", 422),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", 422),
    }


def test_bombs_are_told_by_their_first_bytes_and_take_no_memory(client: httpx.Client) -> None:
    process = psutil.Process()
    send(client, GOOD)
    for name, (data, status) in bombs().items():
        before, started = process.memory_info().rss, time.perf_counter()
        assert send(client, ("images", data)) == status, name
        assert time.perf_counter() - started < 5, name
        assert process.memory_info().rss - before < 150 * 2**20, name


def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(client: httpx.Client) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    for length in (2**20 + 1, 2 * 2**30, 10**18):
        started = time.perf_counter()
        assert status_of(converse(client, head + f"Content-Length: {length}\r\n\r\n".encode())) == 413
        assert time.perf_counter() - started < 0.2 + QUICK.linger
    # A client that asks before it sends is told no, and not "100 Continue".
    expecting = head + b"Content-Length: 2000000\r\nExpect: 100-continue\r\n\r\n"
    assert status_of(converse(client, expecting)) == 413


def test_a_body_without_a_length_is_cut_when_it_is_too_large(client: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\n'
        while True:
            yield b"x" * 65536

    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\nTransfer-Encoding: chunked\r\n\r\n"
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(head)
        cut = False
        started = time.perf_counter()
        for piece in endless():
            try:
                connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            except (BrokenPipeError, ConnectionResetError):
                cut = True
                break
            assert time.perf_counter() - started < 5
        assert cut
    # A client that looks is told why.
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(head)
        for _, piece in zip(range(20), endless(), strict=False):
            connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        assert status_of(read_all(connection)) == 413


def test_slow_clients_are_cut_off(client: httpx.Client) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n\r\n"
    found: dict[str, tuple[float, bytes]] = {}

    def attack(name: str, begin: bytes, drop: bytes, every: float) -> None:
        started = time.perf_counter()
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=0.01) as connection:
            connection.sendall(begin)
            answer, last = b"", started
            while time.perf_counter() - started < 12:
                try:
                    if every and time.perf_counter() - last > every:
                        last = time.perf_counter()
                        connection.sendall(drop)
                    piece = connection.recv(65536)
                    if not piece:
                        break
                    answer += piece
                except TimeoutError:
                    continue
                except (BrokenPipeError, ConnectionResetError):
                    break
        found[name] = (time.perf_counter() - started, answer)

    attacks = {
        "no body": (head, b"", 0),
        "a body a byte": (head, b"x", 0.2),
        "a part a byte": (head + b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\n', b"x", 0.2),
    }
    threads = [threading.Thread(target=attack, args=(name, *values)) for name, values in attacks.items()]
    for thread in threads:
        thread.start()
    still_served = time.perf_counter()
    assert client.post("/v1/predict", **question()).status_code == 200
    assert time.perf_counter() - still_served < 2
    for thread in threads:
        thread.join()
    for name, (seconds, answer) in found.items():
        assert seconds < QUICK.body_timeout + QUICK.linger + 2, name
        # Or the bytes so far can't be multipart.
        assert status_of(answer) in (400, 408), name
    assert status_of(found["no body"][1]) == 408


def raw(first: bytes, *lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([first, b"Host: x", *lines, b"Connection: close", b"", b""]) + body


REQUESTS = {
    "huge header": (raw(b"GET /healthz HTTP/1.1", b"X: " + b"a" * 100_000), {431}),
    "many headers": (raw(b"GET /healthz HTTP/1.1", *[b"X%d: a" % number for number in range(5000)]), {431}),
    "huge path": (raw(b"GET /" + b"a" * 100_000 + b" HTTP/1.1"), {431}),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", {400}),
    "two hosts": (raw(b"GET /healthz HTTP/1.1", b"Host: y"), {400}),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", {400}),
    "HTTP/2 begins": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
    "two lengths": (
        raw(b"POST /v1/predict HTTP/1.1", b"Content-Length: 5", b"Content-Length: 6", body=b"hello"),
        {400},
    ),
    "length and chunks": (
        raw(
            b"POST /v1/predict HTTP/1.1",
            b"Content-Length: 5",
            b"Transfer-Encoding: chunked",
            body=b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        ),
        {400, 415},
    ),
    "negative length": (raw(b"POST /v1/predict HTTP/1.1", b"Content-Length: -1"), {400}),
    "length of letters": (raw(b"POST /v1/predict HTTP/1.1", b"Content-Length: abc"), {400}),
    "other coding": (raw(b"POST /v1/predict HTTP/1.1", b"Transfer-Encoding: gzip, chunked"), {400}),
    "chunks that aren't": (
        raw(
            b"POST /v1/predict HTTP/1.1",
            b"Transfer-Encoding: chunked",
            b"Content-Type: multipart/form-data; boundary=x",
            body=b"zz\r\n",
        ),
        {400},
    ),
    "folded header": (raw(b"GET /healthz HTTP/1.1", b"X: a", b" Y: b"), {200, 400}),
    "zero in a header": (raw(b"GET /healthz HTTP/1.1", b"X: a\0b"), {400}),
    "space before the colon": (raw(b"GET /healthz HTTP/1.1", b"X : a"), {400}),
    "a web socket": (
        raw(
            b"GET / HTTP/1.1",
            b"Upgrade: websocket",
            b"Connection: Upgrade",
            b"Sec-WebSocket-Key: eA==",
            b"Sec-WebSocket-Version: 13",
        ),
        {404},
    ),
    "h2c": (
        raw(b"GET / HTTP/1.1", b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMA"),
        {404},
    ),
    "a method of its own": (raw(b"DESTROY /v1/predict HTTP/1.1"), {405}),
    "a proxy's request": (raw(b"GET http://elsewhere.example/ HTTP/1.1"), {404}),
    "CONNECT": (raw(b"CONNECT elsewhere.example:443 HTTP/1.1"), {404, 405}),
    "TRACE": (raw(b"TRACE /v1/predict HTTP/1.1"), {405}),
    "a type of 10,000 letters": (raw(b"POST /v1/predict HTTP/1.1", b"Content-Type: " + b"a" * 10_000), {415}),
    "a boundary of 10,000 letters": (
        raw(b"POST /v1/predict HTTP/1.1", b"Content-Type: multipart/form-data; boundary=" + b"a" * 10_000),
        {400},
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_that_are_not_as_they_should_be(client: httpx.Client, name: str) -> None:
    sent, statuses = REQUESTS[name]
    answer = converse(client, sent)
    assert status_of(answer) in statuses, answer
    # One request, one answer: nothing of the body is taken for another.
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", answer)) == 1


def test_requests_in_a_row_on_one_connection_are_answered_in_order(client: httpx.Client) -> None:
    body, headers = multipart([("images", picture(255))])
    one = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: {headers['Content-Type']}\r\nContent-Length: {len(body)}\r\n"
    first = one.encode() + b"X-Request-ID: one\r\n\r\n" + body
    rows = first + b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-ID: two\r\n\r\nrubbish that is no request\r\n\r\n"
    answer = converse(client, rows)
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", answer) == [b"200", b"200", b"400"]
    assert answer.index(b"x-request-id: one") < answer.index(b"x-request-id: two")


PATHS = (
    *(
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/%2e%2e/v1/model",
        "/%00",
        "/v1/predict%00",
        "/..%5c..%5cwindows",
        "//healthz",
    ),
    *(
        "/\\\\host\\share",
        "/%c0%ae%c0%ae/",
        "/%ff%fe",
        "/%F0%9F%A7%91",
        "/file:///etc/passwd",
        "/v1/model/../../docs",
        "/%u0041",
        "/%",
    ),
)


def test_paths_lead_nowhere(client: httpx.Client) -> None:
    for path in PATHS:
        answer = converse(client, raw(f"GET {path} HTTP/1.1".encode()))
        assert status_of(answer) in (400, 404), path
        assert b"root:" not in answer


NAMES = (
    *(
        "../../../../etc/passwd",
        "/etc/passwd",
        "..\\..\\boot.ini",
        "C:\\x.jpg",
        "\\\\host\\share\\x",
        "a\0.jpg",
        "%2e%2e%2fx",
        "\u202egpj.exe",
    ),
    *("\U0001f9d1.jpg", "", "." * 5000, "con", '"; name="metadata', "x.jpg;type=text/html", "=?utf-8?q?x?="),
)


def test_names_of_files_are_not_looked_at(
    client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        lines = f'--x\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\nContent-Type: text/html\r\n\r\n'
        content = lines.encode("utf-8") + picture() + b"\r\n--x--\r\n"
        response = client.post(
            "/v1/predict", content=content, headers={"Content-Type": "multipart/form-data; boundary=x"}
        )
        assert response.status_code in (200, 400), name
        assert not name or len(name) < 4 or name not in response.text
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
        NAMED, "Content-Type: multipart/mixed; boundary=y", value=b'--y\r\n\r\n{"age": 1}\r\n--y--\r\n'
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_are_not_as_they_should_be(client: httpx.Client, name: str) -> None:
    started = time.perf_counter()
    content = PARTS[name] + b"--x--\r\n"
    response = client.post("/v1/predict", content=content, headers={"Content-Type": "multipart/form-data; boundary=x"})
    # What isn't form-data is ignored, and then there is no image.
    assert response.status_code in (400, 422)
    assert time.perf_counter() - started < 1


def test_wrong_keys_tell_nothing(client: httpx.Client) -> None:
    for key in (b"x" * 8000, b"\xff" * 100, b"' OR 1=1 --", b"Bearer Bearer"):
        for header in (b"X-API-Key: ", b"Authorization: Bearer ", b"Authorization: "):
            assert status_of(converse(client, raw(b"GET /v1/model HTTP/1.1", header + key))) == 200


def test_images_never_touch_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    # Opening any temporary file would fail.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    large = io.BytesIO()
    Image.frombytes("RGB", (1500, 1500), random.Random(1).randbytes(1500 * 1500 * 3)).save(large, "PNG")
    assert len(large.getvalue()) > 6 * 2**20
    with live() as client:
        assert client.post("/v1/predict", files={"images": ("x", large.getvalue())}).status_code == 200


def serve_apart(settings: ServiceSettings, log: Path) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("serve_stand_in.py")
    chosen = Served(source=Path(), settings=settings, port=free_port())
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, str(script), chosen.model_dump_json()], stdout=file, stderr=file, env={**os.environ}
        )


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.slow  # About 6 s.
def test_two_gigabytes_take_no_memory(tmp_path: Path) -> None:
    process = serve_apart(QUICK, tmp_path / "log")
    try:
        port = json.loads(process.args[-1])["port"]  # type: ignore[index]
        base = f"http://127.0.0.1:{port}"
        wait_for(lambda: _ready(base), 60)
        with httpx.Client(base_url=base, timeout=60) as client:
            assert client.post("/v1/predict", **question()).status_code == 200
            memory = psutil.Process(process.pid)
            highest = before = memory.memory_info().rss
            for length in (f"Content-Length: {2 * 2**30}", "Transfer-Encoding: chunked"):
                sent = 0
                with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                    kind = "Content-Type: multipart/form-data; boundary=x"
                    connection.sendall(f"POST /v1/predict HTTP/1.1\r\nHost: x\r\n{kind}\r\n{length}\r\n\r\n".encode())
                    block = b"x" * 2**20
                    begin = b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\n'
                    try:
                        while sent < 2 * 2**30:
                            piece = begin + block if sent == 0 else block
                            connection.sendall(
                                f"{len(piece):x}\r\n".encode() + piece + b"\r\n" if "chunked" in length else piece
                            )
                            sent += len(piece)
                            highest = max(highest, memory.memory_info().rss)
                    except (BrokenPipeError, ConnectionResetError):
                        pass
                assert sent < 2 * 2**30, "it took all of it"
            # A body up to the limit (64 MB) is held while it comes.
            assert highest - before < 200 * 2**20
            assert client.post("/v1/predict", **question()).status_code == 200
    finally:
        process.terminate()
        assert process.wait(30) == 0


def _ready(base: str) -> bool:
    try:
        return httpx.get(f"{base}/readyz").status_code == 200
    except httpx.TransportError:
        return False
