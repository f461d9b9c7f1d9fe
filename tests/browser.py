"""A browser and a served page for tests, and a model for it that costs nothing."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dualrefnet.data.images import decode_image
from dualrefnet.data.pad_ufes_20 import CLASS_NAMES, CLASSES, FIELDS, MALIGNANT
from dualrefnet.data.schema import MetadataField

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@dataclass
class StandIn:
    """Says melanoma of dark pictures; the more so, the older the patient. Has the face of a Predictor."""

    fields: tuple[MetadataField, ...] = FIELDS
    reads_image: bool = True
    needs_image: bool = True
    drawn: bool = False
    classes: tuple[str, ...] = CLASSES
    malignant: tuple[str, ...] = MALIGNANT
    class_names: dict[str, str] = field(default_factory=lambda: dict(CLASS_NAMES))
    title: str = "PAD-UFES-20"
    name: str = "stand-in"
    size: int = 32
    coverage: float | None = 0.9
    decision: Any = None
    shortcut: str | None = None
    seen: list[tuple[list[bytes], dict[str, Any]]] = field(default_factory=list)

    @property
    def description(self) -> dict[str, Any]:
        return {"dataset": {"title": self.title, "drawn": self.drawn}}

    def categories(self, name: str) -> tuple[str, ...]:
        found = next(one for one in self.fields if one.name == name)
        return tuple(level for level in found.categories if level not in found.aliases) + found.missing_codes

    def decode(self, source: bytes, **limits: int) -> NDArray[np.uint8]:
        return decode_image(source, **limits)

    def prepare(self, source: bytes) -> NDArray[np.uint8]:
        picture = decode_image(source)
        rows, columns = (np.linspace(0, side - 1, self.size).astype(int) for side in picture.shape[:2])
        return picture[np.ix_(rows, columns)]

    def predict_lesion(self, images: Sequence[bytes], form: Mapping[str, Any]) -> SimpleNamespace:
        self.seen.append((list(images), dict(form)))
        dark = 1 - np.mean([self.prepare(image).mean() / 255 for image in images]) if images else 0.3
        melanoma = min(0.98, float(0.6 * dark + 0.003 * form.get("age", 40)))
        rest = (1 - melanoma) / (len(self.classes) - 1)
        probabilities = {label: melanoma if label == "MEL" else rest for label in self.classes}
        order = sorted(probabilities, key=probabilities.__getitem__, reverse=True)
        missing = [one.name for one in self.fields if one.name not in form]
        return SimpleNamespace(
            label=order[0],
            probabilities=probabilities,
            malignancy=sum(probabilities[label] for label in self.malignant),
            warnings=[f"missing and imputed: {', '.join(missing)}"] if missing else [],
            out_of_scope=2.0 if images and dark > 0.95 else 0.5,
            likely=tuple(order[:2]),
            refer=melanoma > 0.3,
            availability="image, 67-100% of fields",
        )

    def explain(self, image: bytes | None, form: Mapping[str, Any], label: str | None) -> SimpleNamespace:
        y, x = np.mgrid[-1 : 1 : self.size * 1j, -1 : 1 : self.size * 1j]
        heat = None if image is None else (0.25 * np.exp(-8 * (x**2 + y**2))).astype(np.float32)
        changes = {name: (0.12 if index % 2 == 0 else -0.04) / (index + 1) for index, name in enumerate(form)}
        return SimpleNamespace(label=label or "MEL", saliency=heat, fields=changes)


def mounted(predictor: StandIn, **settings: Any) -> Any:
    """Return an application with nothing but the page of a model."""
    from anyio import to_thread
    from fastapi import FastAPI

    from dualrefnet.page.mount import mount_page
    from dualrefnet.service.settings import ServiceSettings

    async def ask(images: list[bytes], form: dict[str, Any]) -> Any:
        return await to_thread.run_sync(predictor.predict_lesion, images, form)

    async def explain(image: bytes | None, form: dict[str, Any], label: str | None) -> Any:
        return await to_thread.run_sync(predictor.explain, image, form, label)

    return mount_page(FastAPI(), predictor, ask, explain, ServiceSettings(**settings))  # type: ignore[arg-type]


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Run an app on a free port in a thread; give its address."""
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        if time.monotonic() > deadline or not thread.is_alive():
            raise RuntimeError("the server didn't start")
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def browser() -> Iterator[Any]:
    """Give a headless Chromium; the tests that need it are skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield found
        finally:
            found.close()
