"""The server as a process: what happens to requests when it is told to stop, and what it says when it can't start."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dualrefnet.errors import DataError
from dualrefnet.run import Run
from dualrefnet.service.server import bind
from live_service import Process, metric, multipart, picture, post_head, question, running, wait_for


@dataclass
class Sent:
    """One request, as its client saw it: what came back, and the status if that is whole."""

    answer: bytes = b""
    status: int | None = None


BODY, _ = multipart([("images", picture(51)), ("metadata", b'{"age": 61}')])


class Client(threading.Thread):
    """Asks again and again, over one connection (`keep`) or a new one for each request, until there is none."""

    def __init__(self, port: int, keep: bool) -> None:
        super().__init__()
        self.port, self.found = port, list[Sent]()
        self.request = post_head(*([] if keep else ["Connection: close"]), length=len(BODY)) + BODY
        self.start()

    def run(self) -> None:
        connection = None
        with suppress(OSError):
            while True:
                self.found.append(Sent())
                connection = connection or socket.create_connection(("127.0.0.1", self.port), timeout=20)
                connection.sendall(self.request)
                if self.read_one(connection, self.found[-1]):
                    connection.close()
                    connection = None

    @staticmethod
    def read_one(connection: socket.socket, sent: Sent) -> bool:
        """Read one response; return whether it says that the connection ends."""

        def more() -> bytes:
            piece = connection.recv(65536)
            if not piece:
                raise ConnectionResetError
            return piece

        while b"\r\n\r\n" not in sent.answer:
            sent.answer += more()
        head, _, body = sent.answer.partition(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
        while len(body) < int(fields[b"content-length"]):
            body += more()
        sent.answer = head + b"\r\n\r\n" + body
        sent.status = int(head.split(b" ")[1])
        return fields.get(b"connection") == b"close"


def join_all(clients: list[Client]) -> list[Sent]:
    for client in clients:
        client.join(20)
    return [sent for client in clients for sent in client.found]


def predictions(process: Process) -> list[dict]:
    return [event for event in process.events() if event.get("route") == "/v1/predict"]


def test_no_accepted_request_is_lost_when_the_service_stops_under_load(tmp_path: Path) -> None:
    with running(tmp_path, delay=0.05) as process:
        clients = [Client(process.port, keep=number < 8) for number in range(16)]
        time.sleep(1.0)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(20) == 0
        found = join_all(clients)
        answered = [sent for sent in found if sent.status is not None]
        assert len(answered) > 50
        for sent in answered:
            assert sent.status == 200, sent.answer
            assert json.loads(sent.answer.partition(b"\r\n\r\n")[2])["malignancy"] == pytest.approx(0.2)
        # Without an answer there was no request: either no connection, or it was closed before a byte of an answer.
        lost = [sent for sent in found if sent.status is None]
        assert len(lost) == len(clients)
        assert all(not sent.answer for sent in lost)
        # What the service has accepted stands in its log, and each of these was read by a client.
        assert [event["status"] for event in predictions(process)] == [200] * len(answered)


def test_after_the_signal_no_connection_is_taken_and_what_was_accepted_is_answered(tmp_path: Path) -> None:
    with running(tmp_path, delay=1.0) as process:
        client = Client(process.port, keep=True)
        time.sleep(0.3)
        process.popen.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", process.port))
        assert process.popen.wait(20) == 0
        assert [sent.status for sent in join_all([client])] == [200, None]


def test_a_port_that_is_taken_is_told_in_one_line_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DataError, match=f"port {port}.*--port"):
            bind("127.0.0.1", port)
    bind("127.0.0.1", port).close()
    with pytest.raises(DataError, match="no address"):
        bind("nowhere.invalid", 0)


def command_line(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "dualrefnet", "serve", str(folder), "--no-page", *more]


def workers_of(process: Process) -> list[psutil.Process]:
    """Return the parent's children that spawn a server."""
    found = []
    for child in psutil.Process(process.popen.pid).children():
        with suppress(psutil.Error):
            if any("spawn_main" in word for word in child.cmdline()):
                found.append(child)
    return found


@pytest.mark.slow  # About 40 s: two workers load torch twice.
def test_workers_share_the_port_and_their_metrics_and_stop_without_losing_a_request(
    tiny_run: Run, tmp_path: Path
) -> None:
    with running(tmp_path, command=command_line(tiny_run.path, "--workers", "2")) as process:
        workers = workers_of(process)
        assert len(workers) == 2
        cores = [set(worker.cpu_affinity()) for worker in workers]
        assert not cores[0] & cores[1] or os.cpu_count() == 1
        for _ in range(30):
            assert httpx.post(f"{process.base}/v1/predict", **question(age=61), timeout=20).status_code == 200
        assert metric(process.base, "dualrefnet_requests_total", route="/v1/predict", status="200") == 30
        # A worker that dies is replaced.
        dead = workers[0].pid
        workers[0].kill()
        wait_for(lambda: len(workers_of(process)) == 2 and dead not in [one.pid for one in workers_of(process)], 60)
        clients = [Client(process.port, keep=False) for _ in range(6)]
        time.sleep(1.5)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(40) == 0
        found = join_all(clients)
        answered = sum(sent.status == 200 for sent in found)
        assert answered > 20
        assert {sent.status for sent in found} <= {200, None}
        assert all(not sent.answer for sent in found if sent.status is None)
        assert len(predictions(process)) == 30 + answered


@pytest.mark.slow  # About 30 s.
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_workers_do_not_outlive_their_parent_and_leave_nothing(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    with running(tmp_path, command=command_line(tiny_run.path, "--workers", "2")) as process:
        children = psutil.Process(process.popen.pid).children(recursive=True)
        process.popen.send_signal(number)
        process.popen.wait(20)
        assert not psutil.wait_procs(children, timeout=20)[1]
        bind("127.0.0.1", process.port).close()
    assert not list(folder.glob("dualrefnet-*"))


@pytest.mark.slow  # About 35 s: the program starts four times.
def test_the_command_serves_with_keys_and_warns_without(tiny_run: Run, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-for-this-test # of nobody\n")
    keys.chmod(0o600)
    command = command_line(tiny_run.path, "--api-key-file", str(keys), "--max-upload", "1")
    with running(tmp_path, command=command) as process:
        assert httpx.get(f"{process.base}/v1/model").status_code == 401
        body = httpx.get(f"{process.base}/v1/model", headers={"X-API-Key": "a-key-for-this-test"}).json()
        assert body["limits"]["bytes"] == 2**20
        assert "a-key-for-this-test" not in " ".join(psutil.Process(process.popen.pid).cmdline())
        second = subprocess.run(
            [*command_line(tiny_run.path), "--port", str(process.port)], capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 2
        assert f"can't listen on 127.0.0.1 port {process.port}" in second.stderr
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(30) == 0
        assert "warning" not in process.log.read_text()
    # The start of a run, whose model isn't there yet.
    shutil.copy(tiny_run.path / "recipe.yaml", tmp_path)
    nothing = command_line(tmp_path, "--workers", "2", "--port", "0")
    failed = subprocess.run(nothing, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2
    assert "isn't a run folder" in failed.stderr
    assert "no worker could start" in failed.stderr
    with running(tmp_path, command=command_line(tiny_run.path, "--host", "0.0.0.0")) as process:
        assert "without an API key" in process.log.read_text()


def test_metrics_of_workers_are_added_up_and_gauges_of_dead_ones_forgotten(tmp_path: Path) -> None:
    code = (
        "import os; from dualrefnet.service.observability import Metrics; metrics = Metrics(); "
        "metrics.requests.labels('/v1/predict', '200').inc(); metrics.held('predict')(2, 100); "
        "print(metrics.render().decode()); {end}"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def worker(end: str) -> dict[str, float]:
        command = [sys.executable, "-c", code.format(end=end)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        families = text_string_to_metric_families(done.stdout)
        return {sample.name: sample.value for family in families for sample in family.samples}

    counts = [worker(end) for end in ("os._exit(9)", "metrics.close()", "metrics.close()")]
    assert [found["dualrefnet_requests_total"] for found in counts] == [1, 2, 3]
    assert [found["dualrefnet_queue_requests"] for found in counts] == [2, 2, 2]
    assert [found["dualrefnet_queue_bytes"] for found in counts] == [100, 100, 100]
