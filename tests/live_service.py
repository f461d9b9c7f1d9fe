"""A stand-in model behind the real service, and a real server around it in a thread or a process."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from dualrefnet.errors import DataError
from dualrefnet.recipe import ImageSection
from dualrefnet.runtime.metadata import FieldSpec
from dualrefnet.runtime.prediction import Explanation, Prediction
from dualrefnet.service.app import create_app
from dualrefnet.service.server import Served, Server, bind, uvicorn_options
from dualrefnet.service.settings import ServiceSettings

SIZE = 32
QUICK = ServiceSettings(page=False, linger=0.2, idle_timeout=1.0, body_timeout=2.0)


class StandInPredictor:
    """Has the interface of a predictor; its predictions depend on images and metadata, so that none can be mixed up."""

    classes, malignant = ("BCC", "NEV"), ("BCC",)
    title, name, class_names = "stand-in data", "stand_in", {"BCC": "basal cell carcinoma", "NEV": "naevus"}
    fields = (
        FieldSpec("age", "numeric", "years", maximum=120),
        FieldSpec("region", "categorical"),
        FieldSpec("itch", "boolean"),
    )
    size, description = SIZE, {"measured": None}
    # A grey stays what it is.
    image = ImageSection(size=SIZE, colour_constancy="none", clahe=False)
    decision, shortcut = None, None

    def __init__(self, delay: float = 0.0, reads_image: bool = True, needs_image: bool = True) -> None:
        self.delay, self.reads_image, self.needs_image = delay, reads_image, needs_image
        self.batches: list[int] = []

    def categories(self, name: str) -> tuple[str, ...]:
        return ("FACE", "ARM") if name == "region" else ()

    def check_metadata(self, form: Mapping[str, Any]) -> None:
        unknown = sorted(set(form) - {field.name for field in self.fields})
        if unknown:
            raise DataError(f"unknown metadata fields: {', '.join(unknown)}")
        if isinstance(form.get("age"), str):
            raise DataError("age must be a number")

    def predict_lesions(
        self, prepared: Sequence[Sequence[np.ndarray | None]], metadata: Sequence[dict[str, Any]]
    ) -> list[Prediction]:
        self.batches.append(sum(map(len, prepared)))
        time.sleep(self.delay)
        return [self.answer(lesion, form) for lesion, form in zip(prepared, metadata, strict=True)]

    def answer(self, lesion: Sequence[np.ndarray | None], form: Mapping[str, Any]) -> Prediction:
        there = [image.mean() for image in lesion if image is not None]
        share = float(np.mean(there)) / 255 if there else 0.5
        warnings = [f"age {form['age']}"] if form.get("age") is not None else []
        probabilities = {"BCC": share, "NEV": 1 - share}
        label = "BCC" if share >= 0.5 else "NEV"
        return Prediction(label, probabilities, share, warnings, None, ("BCC",), share > 0.3)

    def explain_array(
        self, prepared: np.ndarray | None, form: Mapping[str, Any], label: str | None = None
    ) -> Explanation:
        time.sleep(self.delay)
        saliency = np.linspace(-0.1, 0.4, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
        fields = {name: 0.125 for name, value in form.items() if value is not None}
        return Explanation(label or "BCC", 0.5, None if prepared is None else saliency, fields)


def picture(grey: int = 200, kind: str = "PNG", side: int = 40) -> bytes:
    """Return the bytes of an image of one grey."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (grey, grey, grey)).save(stream, kind)
    return stream.getvalue()


def multipart(parts: Sequence[tuple[str, bytes]], boundary: str = "xyz") -> tuple[bytes, dict[str, str]]:
    """Return body and headers of named parts, written by hand."""
    lines = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
        for name, value in parts
    ]
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return b"".join(lines) + f"--{boundary}--\r\n".encode(), headers


def question(grey: int = 200, **form: Any) -> dict[str, Any]:
    """Return the arguments of a good request."""
    return {"files": [("images", ("x.png", picture(grey)))], "data": {"metadata": json.dumps(form)}}


def post_head(*lines: str, length: int | None = None) -> bytes:
    """Return the head of a request for a prediction, whose body has the boundary `xyz`."""
    sized = [] if length is None else [f"Content-Length: {length}"]
    kind = "Content-Type: multipart/form-data; boundary=xyz"
    return "\r\n".join(["POST /v1/predict HTTP/1.1", "Host: localhost", kind, *sized, *lines, "", ""]).encode()


# Where the bytes of an image begin.
BEGUN = b'--xyz\r\nContent-Disposition: form-data; name="images"\r\n\r\n'


@contextmanager
def live(predictor: Any = None, settings: ServiceSettings = QUICK) -> Iterator[httpx.Client]:
    """Run the real server in a thread; give a client of it."""
    app = create_app(predictor or StandInPredictor(), settings)
    with closing(bind("127.0.0.1", 0)) as listener:
        server = Server(uvicorn.Config(app, **uvicorn_options(Served(source=".", settings=settings))))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_for(lambda: server.started)
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=20) as client:
                wait_for(lambda: client.get("/readyz").status_code == 200)
                yield client
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


@dataclass
class Process:
    """A server in a process of its own."""

    popen: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.base}/readyz", timeout=5).status_code == 200
        return False

    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextmanager
def running(
    tmp_path: Path, delay: float = 0.0, settings: ServiceSettings = QUICK, command: Sequence[str] = ()
) -> Iterator[Process]:
    """Run a command that serves, or else the stand-in, which takes `delay` seconds for a prediction."""
    with closing(bind("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    served = Served(source=tmp_path, settings=settings, port=port).model_dump_json()
    stand_in = [sys.executable, str(Path(__file__).with_name("serve_stand_in.py")), served, str(delay)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        arguments = [*command, "--port", str(port)] if command else stand_in
        popen = subprocess.Popen(arguments, stdout=file, stderr=file, env={**os.environ, "COLUMNS": "500"})
    process = Process(popen, port, log)
    try:
        wait_for(lambda: popen.poll() is not None or process.ready, 120)
        assert popen.poll() is None, log.read_text()
        yield process
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait(30)


def wait_for(condition: Any, seconds: float = 20) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen in time"
        time.sleep(0.01)


def metric(base: httpx.URL | str, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples with these labels."""
    families = text_string_to_metric_families(httpx.get(f"{base}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def connect(client: httpx.Client, seconds: float = 10) -> socket.socket:
    """Return a connection of its own to the server of a client."""
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=seconds)


def converse(client: httpx.Client, sent: bytes) -> bytes:
    """Send raw bytes over a connection of their own; return all that comes until it closes."""
    with connect(client) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """Return all that comes until the connection closes."""
    found = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            found += piece
    return found


def status_of(answer: bytes) -> int:
    """Return the status of a raw response."""
    return int(answer.split(b" ", 2)[1])
