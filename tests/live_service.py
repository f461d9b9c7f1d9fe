"""A stand-in model behind the real service, and a real server around it in a thread."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from dualrefnet.data.images import decode_image
from dualrefnet.errors import DataError
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
    decision, shortcut = None, None

    def __init__(self, delay: float = 0.0, reads_image: bool = True, needs_image: bool = True) -> None:
        self.delay, self.reads_image, self.needs_image = delay, reads_image, needs_image
        self.batches: list[int] = []
        self.threads: set[str] = set()

    def categories(self, name: str) -> tuple[str, ...]:
        return ("FACE", "ARM") if name == "region" else ()

    def decode(self, source: bytes, *, max_bytes: int, max_pixels: int) -> np.ndarray:
        return decode_image(source, max_bytes=max_bytes, max_pixels=max_pixels)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        return np.full((SIZE, SIZE, 3), round(float(image.mean())), dtype=np.uint8)

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
        self.threads.add(threading.current_thread().name)
        time.sleep(self.delay)
        return [self.answer(lesion, form) for lesion, form in zip(prepared, metadata, strict=True)]

    def answer(self, lesion: Sequence[np.ndarray | None], form: Mapping[str, Any]) -> Prediction:
        there = [picture for picture in lesion if picture is not None]
        share = float(np.mean([picture.mean() for picture in there])) / 255 if there else 0.5
        said = [f"age {form['age']}"] if form.get("age") is not None else []
        return Prediction(
            "BCC" if share >= 0.5 else "NEV", {"BCC": share, "NEV": 1 - share}, share, said, None, ("BCC",), share > 0.3
        )

    def explain_array(
        self, prepared: np.ndarray | None, form: Mapping[str, Any], label: str | None = None
    ) -> Explanation:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.delay)
        heat = None if prepared is None else np.linspace(-0.1, 0.4, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
        return Explanation(
            label or "BCC", 0.5, heat, {name: 0.125 for name, value in form.items() if value is not None}
        )


def picture(grey: int = 200, kind: str = "PNG", side: int = 40) -> bytes:
    """Return the bytes of a photograph of one grey."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (grey, grey, grey)).save(stream, kind)
    return stream.getvalue()


def multipart(parts: Sequence[tuple[str, bytes]], boundary: str = "xyz") -> tuple[bytes, dict[str, str]]:
    """Return body and headers of named parts, written by hand."""
    lines = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
        for name, value in parts
    ]
    return b"".join(lines) + f"--{boundary}--\r\n".encode(), {
        "Content-Type": f"multipart/form-data; boundary={boundary}"
    }


def question(grey: int = 200, **form: Any) -> dict[str, Any]:
    """Return the arguments of a good request."""
    return {"files": [("images", ("x.png", picture(grey)))], "data": {"metadata": json.dumps(form)}}


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


def wait_for(condition: Any, seconds: float = 20) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen in time"
        time.sleep(0.01)


def converse(client: httpx.Client, sent: bytes, seconds: float = 10) -> bytes:
    """Send raw bytes over a connection of their own; return all that comes until it closes."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=seconds) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """Return all that comes until the connection closes."""
    found = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return found
        if not piece:
            return found
        found += piece


def status_of(answer: bytes) -> int:
    """Return the status of a raw answer."""
    return int(answer.split(b" ", 2)[1])
