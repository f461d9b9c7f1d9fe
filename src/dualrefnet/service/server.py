"""One connection of the server: uvicorn's, with what that doesn't bound."""

# also: Run the service: uvicorn in this process, or in several workers that share a port.

from __future__ import annotations

import asyncio
import http
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

import h11
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import MutableHeaders
from uvicorn.protocols.http.h11_impl import H11Protocol

from dualrefnet.deploy.predictor import refuse_shortcut, shortcut_of
from dualrefnet.errors import DataError, DependencyError, DualRefNetError
from dualrefnet.progress import console, remark, warn
from dualrefnet.service.middleware import safe_headers
from dualrefnet.service.observability import FOLDER_VARIABLE, log_to_stderr, where
from dualrefnet.service.schemas import error_bytes
from dualrefnet.service.settings import ServiceSettings, read_keys

try:
    import uvicorn
    from uvicorn.config import STARTUP_FAILURE
    from uvicorn.supervisors.multiprocess import Multiprocess, Process
except ImportError:
    raise DependencyError("the web service needs uvicorn: pip install 'dualrefnet[deploy]'") from None

if TYPE_CHECKING:
    from fastapi import FastAPI


# Bytes of the lines before the body.
MAX_HEAD = 16 * 1024


class Connection(H11Protocol):
    """uvicorn's connection, which lets a client take any time for its first lines, and closes idle ones in the face of
    a request.

    What is added: a time for the lines before the body, a number of connections, errors in the service's own form, and
    a last moment
    for requests on open connections when the service stops.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._service = self.config.loaded_app.state.service
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > self._service.settings.connections:
            self._refuse(503, "too_many_connections", "too many connections are open; ask again")
            return
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what has come, and see whether the lines before the body are whole."""
        # The parser bounds only what isn't whole: a piece at a time, a head of any length would be too large before it
        # is.
        step = MAX_HEAD if self.conn.their_state is h11.IDLE else len(data)
        for start in range(0, len(data), step):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + step])
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None and self.conn.trailing_data[0]:
            self._wait_for_head()

    def send_400_response(self, msg: str) -> None:
        """Answer what isn't HTTP; `msg` is uvicorn's, and says no more than that."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        codes = {431: "headers_too_large", 501: "not_implemented"}
        self._refuse(
            status,
            codes.get(status, "not_http"),
            "the request isn't HTTP as it should be, or the lines before its body are too large",
        )

    def shutdown(self) -> None:
        """Stop: a request that is being answered is; one that comes within a moment is too, and told that the
        connection ends.
        """
        self._service.standing.stop()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            return
        self.loop.call_later(self._service.settings.linger, self._close_if_idle)

    def _close_if_idle(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        # Half a request is waited for; its timer is running.
        if idle and not self.conn.trailing_data[0] and not self.transport.is_closing():
            self.transport.close()

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self._service.settings.header_timeout, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.conn.trailing_data[0]:
            self._refuse(408, "slow", "the lines before the body came too slowly")
        else:
            self.transport.close()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer without the application, and close."""
        if self.cycle is not None and not self.cycle.response_complete:
            # The application is at work on a request whose body turned out to be no HTTP.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = uuid.uuid4().hex
            content = error_bytes(code, message, request_id)
            headers = MutableHeaders(
                {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
            )
            safe_headers(headers, request_id)
            phrase = http.HTTPStatus(status).phrase
            lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers.raw)
            self.transport.write(f"HTTP/1.1 {status} {phrase}\r\n".encode() + lines + b"\r\n" + content)
        self._stop_timer()
        self.transport.close()


log = logging.getLogger("dualrefnet.service")


# Workers start as new processes; this is how they learn what to serve. It holds no key, but the file's name.
VARIABLE = "DUALREFNET_SERVICE"


KEEP_ALIVE = 5


BACKLOG = 2048


# Seconds beyond the grace period after which a worker that still lives is killed.
PATIENCE = 15


_KEPT_OPEN: list[IO[str]] = []


LOCAL = ("127.0.0.1", "::1", "localhost")


class Served(BaseModel):
    """What is served, and how.

    Attributes:
        source: a run folder, or that of an exported bundle.
        settings: limits and habits.
        api_key_file: keys, one a line.
        variant: of a bundle.
        device: where the model computes.
        host: address to listen on.
        port: port to listen on; 0: a free one.
        workers: processes.
    """

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
    """Serve until a signal comes; every accepted request is answered first.

    SIGTERM and SIGINT stop the service within `settings.grace` seconds, a second one at once.

    Args:
        served: what, and how.

    Returns:
        0, or 1 if requests had to be given up.

    Raises:
        DataError: the port can't be had, or a key can't be read.
        RunError: the folder holds no model, or one that mustn't be served (see `refuse_shortcut`).
    """
    if served.source.is_dir():
        # Before anything is loaded; `create_app` asks again, for whoever serves the application in another way.
        refuse_shortcut(shortcut_of(served.source), served.source, served.settings.accept_missingness_shortcut)
    with_key = bool(read_keys(served.api_key_file))
    if served.host not in LOCAL and not with_key:
        warn(
            f"the service listens on {served.host} without an API key: whoever reaches this machine may use it. Name keys with "
            "--api-key-file or DUALREFNET_API_KEY, or leave --host out"
        )
    # Before the model is loaded: a port that is taken is told at once.
    listener = bind(served.host, served.port)
    host = f"[{served.host}]" if ":" in served.host else served.host
    remark(
        f"serving {served.source} on http://{host}:{listener.getsockname()[1]}{served.settings.root_path}/ (stop with Ctrl+C)"
    )
    try:
        return _serve_many(served, listener) if served.workers > 1 else _serve_one(served, listener)
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """Take a port.

    Raises:
        DataError: it can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise DataError(f"{host} is no address of this machine: {error.strerror}") from None
    try:
        # A port that has just been left may be taken again; one that is in use may not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise DataError(f"can't listen on {host} port {port}: {error.strerror}; choose another with --port") from None
    listener.set_inheritable(True)
    return listener


def make_app() -> FastAPI:
    """Load what the environment names, and return the application; each worker does."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        return _load(Served.model_validate_json(os.environ[VARIABLE]))
    except DualRefNetError as error:
        # In a worker nobody else would say it in one line; and starting it again would fail again.
        console.print(f"[bold red]error:[/bold red] {error}", soft_wrap=True, markup=True)
    except Exception as error:
        log.critical("a worker can't start", extra={"error": type(error).__name__, "where": where(error)})
    raise SystemExit(STARTUP_FAILURE)


def _stop_with_parent() -> None:
    """Stop this worker when its parent is killed: nobody else would, and it would go on holding the port."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _load(served: Served) -> FastAPI:
    log_to_stderr()
    if served.workers > 1:
        _limit_cores(served.workers, Path(os.environ[FOLDER_VARIABLE]))
    from dualrefnet.deploy.predictor import Predictor
    from dualrefnet.service.app import create_app

    settings = served.settings.model_copy(update={"api_keys": read_keys(served.api_key_file)})
    predictor, explainer = (Predictor.load(served.source, served.device, served.variant) for _ in range(2))
    return create_app(predictor, settings, explainer)


def _limit_cores(workers: int, folder: Path) -> None:
    """Give this worker cores of its own: torch, onnxruntime and OpenCV count the cores that they may use, and compute
    with as many threads.

    Workers that each used all cores would stop each other. Which cores are free is told by locks on files, which end
    with their worker.
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
        _KEPT_OPEN.append(file)
        os.sched_setaffinity(0, {cores[(slot * number + index) % len(cores)] for index in range(number)})
        return


def configure(served: Served, app: Any, **more: Any) -> uvicorn.Config:
    """Return uvicorn's settings.

    Args:
        served: how it is served.
        app: the application, or the name of what makes it.
        more: settings of uvicorn.
    """

    return uvicorn.Config(
        app,
        http=Connection,
        # The parser and the loop that every install has, so that limits and errors are the same everywhere.
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # Nothing here asks where a client is.
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(served.settings.grace)),
        h11_max_incomplete_event_size=MAX_HEAD,
        workers=served.workers,
        **more,
    )


class StoppableServer(uvicorn.Server):
    """uvicorn's server, which a second SIGTERM forces too."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, or stop at once."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def _serve_one(served: Served, listener: socket.socket) -> int:
    app = _load(served)
    server = StoppableServer(configure(served, app))
    server.run([listener])
    given_up = app.state.service.standing.given_up
    if given_up:
        log.error("stopped without answering %d requests", given_up)
    return 1 if given_up else 0


class _Workers(Multiprocess):
    """uvicorn's supervisor, which closes the port first when it stops, and kills workers at a second signal.

    Attributes:
        forced: whether it did.
        failed: whether a worker couldn't start, and another wouldn't either.
    """

    forced = failed = False

    def keep_subprocess_alive(self) -> None:
        """Replace workers that have ended.

        uvicorn also kills those that don't answer for some seconds; on a busy machine these may be at work on requests.
        """
        for index, process in enumerate(self.processes):
            if process.exitcode is None or self.should_exit.is_set():
                continue
            process.join()
            if process.exitcode == STARTUP_FAILURE:
                self.failed = True
                self.should_exit.set()
                return
            log.error("worker %s died and is replaced", process.pid)
            self.processes[index] = Process(self.config, self.sockets)
            self.processes[index].start()

    def terminate_all(self) -> None:
        """Ask the workers to stop."""
        # As long as it is open here, the system accepts connections that nobody will answer.
        for listener in self.sockets:
            listener.close()
        super().terminate_all()

    def join_all(self) -> None:
        """Wait for the workers."""
        self.signal_queue.clear()
        deadline = time.monotonic() + self.config.timeout_graceful_shutdown + PATIENCE  # type: ignore[operator]
        while any(process.process.is_alive() for process in self.processes):
            if self.signal_queue or time.monotonic() > deadline:
                self.forced = True
                for process in self.processes:
                    process.process.kill()
            time.sleep(0.05)
        super().join_all()


def _serve_many(served: Served, listener: socket.socket) -> int:
    log_to_stderr()
    if served.settings.page:
        # Named in the environment now, so that all workers share it.
        from dualrefnet.page.upload import private_folder

        private_folder()
    with tempfile.TemporaryDirectory(prefix="dualrefnet-workers-") as folder:
        os.environ |= {FOLDER_VARIABLE: folder, VARIABLE: served.model_dump_json()}
        try:
            workers = _Workers(configure(served, "dualrefnet.service.server:make_app", factory=True), [listener])
            workers.run()
        finally:
            del os.environ[FOLDER_VARIABLE], os.environ[VARIABLE]
    if workers.failed:
        raise DataError("no worker could start; what stands above tells why")
    return 1 if workers.forced else 0
