"""The server as a process: what happens to requests when it is told to stop, and what it says when it can't start."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dualrefnet.errors import DataError
from dualrefnet.run import Run
from dualrefnet.service.server import Served, bind
from dualrefnet.service.settings import ServiceSettings
from live_service import QUICK, multipart, picture, question, wait_for

STAND_IN = Path(__file__).with_name("serve_stand_in.py")


@dataclass
class Process:
    """A server that runs."""

    popen: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def running(
    tmp_path: Path, delay: float = 0.0, settings: ServiceSettings = QUICK, command: list[str] | None = None
) -> Iterator[Process]:
    port = free_port()
    served = Served(source=tmp_path, settings=settings, port=port).model_dump_json()
    log = tmp_path / "log"
    arguments = [*command, "--port", str(port)] if command else [sys.executable, str(STAND_IN), served, str(delay)]
    with log.open("wb") as file:
        popen = subprocess.Popen(arguments, stdout=file, stderr=file, env={**os.environ, "COLUMNS": "500"})
    process = Process(popen, port, log)
    try:
        wait_for(lambda: popen.poll() is not None or ready(process), 120)
        assert popen.poll() is None, log.read_text()
        yield process
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait(30)


def ready(process: Process) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{process.base}/readyz", timeout=5).status_code == 200
    return False


@dataclass
class Sent:
    """One request, as its client saw it.

    Attributes:
        connected: whether the connection was there.
        whole: whether all of the request was handed to the system.
        answer: what came back until the connection closed.
        status: of the answer, if it is whole.
    """

    connected: bool = False
    whole: bool = False
    answer: bytes = b""
    status: int | None = None


BODY, HEADERS = multipart([("images", picture(51)), ("metadata", b'{"age": 61}')])


def talk(port: int, found: list[Sent], keep: bool, stop: threading.Event) -> None:
    """Ask again and again, over one connection (`keep`) or a new one for each question, until there is no connection
    any more.
    """
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: {HEADERS['Content-Type']}\r\nContent-Length: {len(BODY)}\r\n"
    connection = None
    while not stop.is_set():
        sent = Sent()
        found.append(sent)
        try:
            if connection is None:
                connection = socket.create_connection(("127.0.0.1", port), timeout=20)
            sent.connected = True
            connection.sendall(
                f"{head}{'' if keep else 'Connection: close'}{'' if keep else chr(13) + chr(10)}\r\n".encode() + BODY
            )
            sent.whole = True
            ended = read_one(connection, sent)
        except OSError:
            return
        if (ended and keep) or not keep:
            connection.close()
            connection = None


def read_one(connection: socket.socket, sent: Sent) -> bool:
    """Read one answer; return whether it said that the connection ends."""
    while b"\r\n\r\n" not in sent.answer:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionResetError
        sent.answer += piece
    head, _, body = sent.answer.partition(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionResetError
        body += piece
    sent.answer = head + b"\r\n\r\n" + body
    sent.status = int(head.split(b" ")[1])
    return fields.get(b"connection") == b"close"


def test_no_accepted_request_is_lost_when_the_service_stops_under_load(tmp_path: Path) -> None:
    kept: list[Sent] = []
    new: list[Sent] = []
    stop = threading.Event()
    with running(tmp_path, delay=0.05) as process:
        threads = [threading.Thread(target=talk, args=(process.port, kept, True, stop)) for _ in range(8)]
        threads += [threading.Thread(target=talk, args=(process.port, new, False, stop)) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(20) == 0
        stop.set()
        for thread in threads:
            thread.join(20)
        answered = [sent for sent in kept + new if sent.status is not None]
        assert len(answered) > 50
        for sent in answered:
            assert sent.status == 200, sent.answer
            assert json.loads(sent.answer.partition(b"\r\n\r\n")[2])["malignancy"] == pytest.approx(0.2)
        # Without an answer there was no request: either no connection, or it was closed before a byte of an answer.
        lost = [sent for sent in kept + new if sent.status is None]
        assert len(lost) == len(threads)
        assert all(not sent.answer for sent in lost)
        # What the service has accepted stands in its log, and each of these was read by a client.
        logged = [
            event for event in process.events() if event["event"] == "request" and event["route"] == "/v1/predict"
        ]
        assert {event["status"] for event in logged} == {200}
        assert len(logged) == len(answered)


def test_after_the_signal_no_connection_is_taken_and_what_was_accepted_is_answered(tmp_path: Path) -> None:
    with running(tmp_path, delay=1.0) as process:
        found: list[Sent] = []
        thread = threading.Thread(target=talk, args=(process.port, found, True, threading.Event()))
        thread.start()
        time.sleep(0.3)
        process.popen.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", process.port))
        assert process.popen.wait(20) == 0
        thread.join(20)
        assert [sent.status for sent in found] == [200, None]


def test_idle_connections_do_not_hold_the_service_up(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        idle = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(5)]
        time.sleep(0.2)
        started = time.perf_counter()
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(20) == 0
        assert time.perf_counter() - started < 15
        for connection in idle:
            assert connection.recv(10) == b""
            connection.close()


@pytest.mark.slow  # About 15 s.
@pytest.mark.parametrize("how", ["second signal", "grace is over"])
def test_a_stop_can_be_forced(tmp_path: Path, how: str) -> None:
    settings = QUICK.model_copy(update={"grace": 1.0 if how == "grace is over" else 45.0})
    with running(tmp_path, delay=3.0, settings=settings) as process:
        # The warm-up has taken 3 s; this question takes as long.
        found: list[Sent] = []
        thread = threading.Thread(target=talk, args=(process.port, found, False, threading.Event()))
        thread.start()
        time.sleep(0.3)
        process.popen.send_signal(signal.SIGTERM)
        if how == "second signal":
            time.sleep(0.3)
            process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(20) == 1
        thread.join(20)
        assert found[0].status == 503
        assert b'"stopping"' in found[0].answer
        assert any("without answering 1 request" in event["event"] for event in process.events())


def test_a_port_that_is_taken_is_told_in_one_line_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DataError, match=f"port {port}.*--port"):
            bind("127.0.0.1", port)
    bind("127.0.0.1", port).close()
    with pytest.raises(DataError, match="no address"):
        bind("nowhere.invalid", 0)


def command_line(run: Run, *more: str) -> list[str]:
    return [sys.executable, "-m", "dualrefnet", "serve", str(run.path), "--no-page", *more]


def metric(base: str, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{base}/metrics").text)
    return sum(
        s.value for family in families for s in family.samples if s.name == name and labels.items() <= s.labels.items()
    )


@pytest.mark.slow  # About 40 s: two workers load torch twice.
def test_workers_share_the_port_and_their_numbers_and_stop_without_losing_a_request(
    tiny_run: Run, tmp_path: Path
) -> None:
    with running(tmp_path, command=command_line(tiny_run, "--workers", "2")) as process:
        workers = serving(process)
        assert len(workers) == 2
        cores = [set(worker.cpu_affinity()) for worker in workers]
        assert not cores[0] & cores[1] or os.cpu_count() == 1
        for _ in range(30):
            assert httpx.post(f"{process.base}/v1/predict", **question(age=61), timeout=20).status_code == 200
        assert metric(process.base, "dualrefnet_requests_total", route="/v1/predict", status="200") == 30
        # A worker that dies is replaced.
        workers[0].kill()
        wait_for(lambda: len(serving(process)) == 2 and workers[0].pid not in [one.pid for one in serving(process)], 60)
        found: list[Sent] = []
        threads = [
            threading.Thread(target=talk, args=(process.port, found, False, threading.Event())) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(40) == 0
        for thread in threads:
            thread.join(20)
        assert sum(sent.status == 200 for sent in found) > 20
        assert {sent.status for sent in found} <= {200, None}
        assert all(not sent.answer for sent in found if sent.status is None)
        asked = [event for event in process.events() if event.get("route") == "/v1/predict"]
        assert len(asked) == 30 + sum(sent.status == 200 for sent in found)


@pytest.mark.slow  # About 15 s.
def test_workers_do_not_outlive_a_parent_that_is_killed(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A parent that is killed can't clear up.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running(tmp_path, command=command_line(tiny_run, "--workers", "2")) as process:
        workers = serving(process)
        process.popen.kill()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive
        bind("127.0.0.1", process.port).close()


def serving(process: Process) -> list[psutil.Process]:
    """Return the workers: of the parent's children, those that spawn a server."""
    found = []
    for child in psutil.Process(process.popen.pid).children():
        with suppress(psutil.Error):
            if any("spawn_main" in word for word in child.cmdline()):
                found.append(child)
    return found


@pytest.mark.slow  # About 35 s: the program starts four times.
def test_the_command_serves_with_keys_and_warns_of_an_open_door(tiny_run: Run, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-for-this-test # of nobody\n")
    keys.chmod(0o600)
    with running(tmp_path, command=command_line(tiny_run, "--api-key-file", str(keys), "--max-upload", "1")) as process:
        assert httpx.get(f"{process.base}/v1/model").status_code == 401
        body = httpx.get(f"{process.base}/v1/model", headers={"X-API-Key": "a-key-for-this-test"}).json()
        assert body["limits"]["bytes"] == 2**20
        assert "a-key-for-this-test" not in " ".join(psutil.Process(process.popen.pid).cmdline())
        second = subprocess.run(
            [*command_line(tiny_run), "--port", str(process.port)], capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 2
        assert f"can't listen on 127.0.0.1 port {process.port}" in second.stderr
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(30) == 0
        assert "warning" not in process.log.read_text()
    nothing = [*command_line(tiny_run, "--workers", "2", "--port", "0")]
    nothing[4] = str(tmp_path)
    failed = subprocess.run(nothing, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2
    assert "has no model.json" in failed.stderr
    assert "no worker could start" in failed.stderr
    with running(tmp_path, command=command_line(tiny_run, "--host", "0.0.0.0")) as process:
        assert "without an API key" in process.log.read_text()


def test_workers_numbers_are_added_up_and_those_of_dead_ones_forgotten(tmp_path: Path) -> None:
    code = (
        "import os; from dualrefnet.service.observability import Metrics; metrics = Metrics(); metrics.responded('/v1/predict', 200, 0.1); "
        "metrics.held('predict')(2, 100); print(metrics.render().decode()); {end}"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def worker(end: str) -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-c", code.format(end=end)], env=environment, capture_output=True, text=True, check=False
        )
        families = text_string_to_metric_families(done.stdout)
        return {sample.name: sample.value for family in families for sample in family.samples}

    counts = [worker(end) for end in ("os._exit(9)", "metrics.close()", "metrics.close()")]
    assert [found["dualrefnet_requests_total"] for found in counts] == [1, 2, 3]
    assert [found["dualrefnet_queue_requests"] for found in counts] == [2, 2, 2]
    assert [found["dualrefnet_queue_bytes"] for found in counts] == [100, 100, 100]
