"""Run the service: uvicorn in this process, or in several workers that share a port."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from filelock import BaseFileLock, FileLock, Timeout
from pydantic import BaseModel, ConfigDict
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.supervisors import Multiprocess

from dualrefnet import progress
from dualrefnet.errors import DataError, DualRefNetError
from dualrefnet.progress import note, warn
from dualrefnet.service.observability import FOLDER_VARIABLE, log_to_stderr, traceback_of
from dualrefnet.service.settings import ServiceSettings, read_keys

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("dualrefnet.service")
# The exit status that tells uvicorn not to start a worker again.
STARTUP_FAILURE = 3
FAILED = "failed"
LOCAL = ("127.0.0.1", "::1", "localhost")
# Seconds between two looks whether a client that has sent all it will is still there.
LOOK = 0.1
_LOCKS: list[BaseFileLock] = []


class Served(BaseModel):
    """What is served, and how: a run folder or that of a bundle (`source`), and `port` 0 for a free one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    settings: ServiceSettings = ServiceSettings()
    api_key_file: Path | None = None
    variant: str = "float32"
    device: str = "cpu"
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1


def serve(served: Served) -> int:
    """Serve until a signal, and answer every accepted request first; return 1 if some had to be given up."""
    if served.host not in LOCAL and not read_keys(served.api_key_file):
        warn(
            f"the service listens on {served.host} without an API key: whoever reaches this machine may use it. "
            "Set keys with --api-key-file or DUALREFNET_API_KEY, or leave --host out"
        )
    # As nohup wants it.
    ignores_hang_up = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    # Before the model is loaded, so that a port in use is reported at once.
    with bind(served.host, served.port) as listener:
        host = f"[{served.host}]" if ":" in served.host else served.host
        address = f"http://{host}:{listener.getsockname()[1]}{served.settings.root_path}/"
        note(f"serving {served.source} on {address} (stop with Ctrl+C)")
        if served.workers > 1:
            return _serve_workers(served, listener, ignores_hang_up)
        app = load_app(served)
        server = Server(uvicorn.Config(app, **uvicorn_options(served)))
        if not ignores_hang_up:
            signal.signal(signal.SIGHUP, server.handle_exit)
        server.run([listener])
    given_up: int = app.state.inference.given_up
    if given_up:
        log.error("stopped without answering %d requests", given_up)
    return 1 if given_up else 0


def bind(host: str, port: int) -> socket.socket:
    """Take a port, or raise a DataError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise DataError(f"{host} is no address of this machine: {error.strerror}") from None
    try:
        # A port that was just released may be taken again; one in use may not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise DataError(f"can't listen on {host} port {port}: {error.strerror}; choose another with --port") from None
    return listener


def uvicorn_options(served: Served) -> dict[str, Any]:
    """Return uvicorn's settings; slow headers are a reverse proxy's work: see deployment/nginx.conf."""
    return {
        # The parser and the loop of every install, so that limits and errors are the same everywhere.
        "http": HalfClosedProtocol,
        "loop": "asyncio",
        "ws": "none",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "backlog": 2048,
        # uvicorn counts the connection that asks.
        "limit_concurrency": served.settings.connections + 1,
        "timeout_keep_alive": 5,
        "timeout_graceful_shutdown": max(1, round(served.settings.grace)),
        "h11_max_incomplete_event_size": 16 * 1024,
    }


class Server(uvicorn.Server):
    """uvicorn's server; a second SIGTERM stops it at once, and the process returns instead of dying of the signal."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


class HalfClosedProtocol(H11Protocol):
    """uvicorn's protocol, for clients too that close their side of the connection after a request.

    Such a client looks like one that has gone, until something is written to it: an interim response, which clients
    skip, makes the machine of one that has gone reset the connection.
    """

    half_closed = False

    def eof_received(self) -> bool:  # type: ignore[override]
        self.half_closed = self.cycle is not None and not (self.cycle.more_body or self.cycle.response_complete)
        if self.half_closed:
            self._look()
        return self.half_closed

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        if not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.loop.call_later(LOOK, self._look)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Otherwise there is another request that came before the end.
        if self.half_closed and self.cycle.response_complete:
            self.transport.close()


def load_app(served: Served) -> FastAPI:
    """Load the model, twice: see `create_app`."""
    log_to_stderr()
    from dualrefnet.deploy.predictor import Predictor
    from dualrefnet.service.app import create_app

    settings = served.settings.model_copy(update={"api_keys": read_keys(served.api_key_file)})
    predictor, explainer = (Predictor.load(served.source, served.device, served.variant) for _ in range(2))
    return create_app(predictor, settings, explainer)


class Workers(Multiprocess):
    """uvicorn's supervisor; a closed terminal ends the service instead of starting its workers anew."""

    def handle_hup(self) -> None:
        self.handle_term()


def _serve_workers(served: Served, listener: socket.socket, ignores_hang_up: bool) -> int:
    log_to_stderr()
    with tempfile.TemporaryDirectory(prefix="dualrefnet-workers-") as folder:
        os.environ[FOLDER_VARIABLE] = folder
        try:
            config = uvicorn.Config(
                # Workers are new processes. No key is handed over, but the name of their file.
                partial(make_worker_app, served, Path(folder)),
                factory=True,
                workers=served.workers,
                # A worker on a busy machine may be late to say that it lives.
                timeout_worker_healthcheck=20,
                **uvicorn_options(served),
            )
            workers = Workers(config, [listener])
            if ignores_hang_up:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            workers.run()
        finally:
            del os.environ[FOLDER_VARIABLE]
        if (Path(folder) / FAILED).exists():
            raise DataError("no worker could start; see the error above")
    return 0


def make_worker_app(served: Served, folder: Path) -> FastAPI:
    """Load the application in a worker; called by uvicorn."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_stop_with_parent, args=(folder,), daemon=True).start()
    try:
        _limit_cores(served.workers, folder)
        return load_app(served)
    except DualRefNetError as error:
        progress.error(str(error))
    except Exception as error:
        log.critical("a worker can't start", extra={"error": type(error).__name__, "where": traceback_of(error)})
    (folder / FAILED).touch()
    raise SystemExit(STARTUP_FAILURE)


def _stop_with_parent(folder: Path) -> None:
    """Stop this worker when its parent is killed, and clear up for it: the port and the folder would stay."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)


def _limit_cores(workers: int, folder: Path) -> None:
    """Give this worker cores of its own.

    Torch, onnxruntime and OpenCV start as many threads as there are cores, and workers that each used all of them would
    slow each other down. Locks on files, which end with their worker, tell which cores are free.
    """
    if not hasattr(os, "sched_setaffinity"):
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
        return
    cores = sorted(os.sched_getaffinity(0))
    number = max(1, len(cores) // workers)
    for slot in range(workers):
        lock = FileLock(folder / f"cores-{slot}.lock", blocking=False)
        with suppress(Timeout):
            lock.acquire()
            _LOCKS.append(lock)
            os.sched_setaffinity(0, {cores[(slot * number + index) % len(cores)] for index in range(number)})
            return
