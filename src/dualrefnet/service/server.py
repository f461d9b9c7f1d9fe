"""Run the service: uvicorn in this process, or in several workers that share a port."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from dualrefnet.errors import DataError, DependencyError, DualRefNetError
from dualrefnet.progress import console, note, warn
from dualrefnet.service.observability import FOLDER_VARIABLE, log_to_stderr, traceback_of
from dualrefnet.service.settings import ServiceSettings, read_keys

try:
    import uvicorn
except ImportError:
    raise DependencyError("the web service needs uvicorn: pip install 'dualrefnet[deploy]'") from None

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("dualrefnet.service")
# Workers are new processes; this tells them what to serve. It holds no key, but the name of the file.
VARIABLE = "DUALREFNET_SERVICE"
# The exit status that tells uvicorn not to start a worker again.
STARTUP_FAILURE = 3
FAILED = "failed"
LOCAL = ("127.0.0.1", "::1", "localhost")
_LOCKS: list[IO[str]] = []


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
    """Serve until a signal; every accepted request is answered first.

    SIGTERM and SIGINT stop the service within `settings.grace` seconds; with one worker, a second one at once.

    Returns:
        0, or 1 if requests had to be given up.

    Raises:
        DataError: the port is not available, a key can't be read, or no worker could start.
        RunError: the folder holds no model, or one that must not be served.
    """
    if served.host not in LOCAL and not read_keys(served.api_key_file):
        warn(
            f"the service listens on {served.host} without an API key: whoever reaches this machine may use it. "
            "Set keys with --api-key-file or DUALREFNET_API_KEY, or leave --host out"
        )
    # Before the model is loaded, so that a port in use is reported at once.
    listener = bind(served.host, served.port)
    port = listener.getsockname()[1]
    host = f"[{served.host}]" if ":" in served.host else served.host
    note(f"serving {served.source} on http://{host}:{port}{served.settings.root_path}/ (stop with Ctrl+C)")
    if served.workers > 1:
        listener.close()
        return _serve_workers(served.model_copy(update={"port": port}))
    with listener:
        app = load_app(served)
        Server(uvicorn.Config(app, **uvicorn_options(served))).run([listener])
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
    """Return uvicorn's settings. What it doesn't bound - slow headers, silent connections - is a reverse proxy's work:
    see
    deployment/nginx.conf.
    """
    return {
        # The parser and the loop of every install, so that limits and errors are the same everywhere.
        "http": "h11",
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


def load_app(served: Served) -> FastAPI:
    """Load the model, twice: see `create_app`."""
    log_to_stderr()
    from dualrefnet.deploy.predictor import Predictor
    from dualrefnet.service.app import create_app

    settings = served.settings.model_copy(update={"api_keys": read_keys(served.api_key_file)})
    predictor, explainer = (Predictor.load(served.source, served.device, served.variant) for _ in range(2))
    return create_app(predictor, settings, explainer)


def _serve_workers(served: Served) -> int:
    log_to_stderr()
    with tempfile.TemporaryDirectory(prefix="dualrefnet-workers-") as folder:
        os.environ |= {FOLDER_VARIABLE: folder, VARIABLE: served.model_dump_json()}
        try:
            uvicorn.run(
                "dualrefnet.service.server:make_worker_app",
                factory=True,
                host=served.host,
                port=served.port,
                workers=served.workers,
                # A worker on a busy machine may be late to say that it lives.
                timeout_worker_healthcheck=20,
                **uvicorn_options(served),
            )
        finally:
            del os.environ[FOLDER_VARIABLE], os.environ[VARIABLE]
        if (Path(folder) / FAILED).exists():
            raise DataError("no worker could start; see the error above")
    return 0


def make_worker_app() -> FastAPI:
    """Load what the environment names; called by uvicorn in each worker."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    served, folder = Served.model_validate_json(os.environ[VARIABLE]), Path(os.environ[FOLDER_VARIABLE])
    try:
        _limit_cores(served.workers, folder)
        return load_app(served)
    except DualRefNetError as error:
        console.print(f"[bold red]error:[/bold red] {error}", soft_wrap=True, markup=True)
    except Exception as error:
        log.critical("a worker can't start", extra={"error": type(error).__name__, "where": traceback_of(error)})
    (folder / FAILED).touch()
    raise SystemExit(STARTUP_FAILURE)


def _stop_with_parent() -> None:
    """Stop this worker when its parent is killed: it would keep the port otherwise."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _limit_cores(workers: int, folder: Path) -> None:
    """Give this worker cores of its own: torch, onnxruntime and OpenCV start as many threads as there are cores, and
    workers that each used all of them would slow each other down. Locks on files, which end with their worker, tell
    which cores are free.
    """
    if not hasattr(os, "sched_setaffinity"):
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
        return
    import fcntl

    cores = sorted(os.sched_getaffinity(0))
    number = max(1, len(cores) // workers)
    for slot in range(workers):
        file = (folder / f"cores-{slot}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _LOCKS.append(file)
        os.sched_setaffinity(0, {cores[(slot * number + index) % len(cores)] for index in range(number)})
        return
