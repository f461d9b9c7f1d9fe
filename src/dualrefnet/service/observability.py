"""The service's log (one line of JSON an event, never with anything that a client sent) and its Prometheus metrics."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

# Of a record only these are written; whatever else a library attaches stays out.
FIELDS = ("id", "route", "status", "ms", "bytes_in", "bytes_out", "error", "where")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
# Several workers write into this folder, and whichever is scraped adds them up; prometheus_client reads the variable
# when it is imported.
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def traceback_of(error: BaseException) -> list[str]:
    """Return where an error arose, innermost last, without its message: that may quote what was sent."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return lines if cause is None else [*traceback_of(cause), f"then {type(error).__name__}", *lines]


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update({name: getattr(record, name) for name in FIELDS if hasattr(record, name)})
        if record.exc_info and record.exc_info[1] is not None:
            line |= {"error": type(record.exc_info[1]).__name__, "where": traceback_of(record.exc_info[1])}
        return json.dumps(line)


class Seldom(logging.Filter):
    """Lets a message pass once a minute: out of file descriptors, asyncio writes it thousands of times a second."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage().split("\n", 1)[0]
        seldom = record.created - self._passed.get(message, 0) > 60
        if seldom:
            self._passed[message] = record.created
        return seldom


def log_to_stderr() -> None:
    """Write what the service and the server log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("dualrefnet", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("asyncio").addFilter(Seldom())
    # It quotes what it can't parse.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


class Metrics:
    """The metrics of one process; `render` gives those of all its workers together."""

    def __init__(self) -> None:
        # Its own registry: one process may make several services, in tests.
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dualrefnet_requests", "Responses, by route and status.", ["route", "status"], registry=registry
        )
        self.rejected = Counter(
            "dualrefnet_rejected", "Requests refused or abandoned, by reason.", ["reason"], registry=registry
        )
        self.seconds = Histogram(
            "dualrefnet_request_seconds", "From headers to response.", ["route"], buckets=SECONDS, registry=registry
        )
        self.batches = Histogram(
            "dualrefnet_batch_photographs", "Images in a batch.", ["lane"], buckets=BATCH_SIZES, registry=registry
        )
        gauge = partial(Gauge, labelnames=["lane"], registry=registry, multiprocess_mode="livesum")
        self._queue = gauge("dualrefnet_queue_requests", "Requests that are held.")
        self._bytes = gauge("dualrefnet_queue_bytes", "Bytes of bodies that are held.")
        self._folder = os.environ.get(FOLDER_VARIABLE)
        if self._folder:
            forget_dead_workers(Path(self._folder))

    def held(self, lane: str) -> Callable[[int, int], None]:
        """Return what is called with the requests and bytes that are held."""
        requests, size = self._queue.labels(lane), self._bytes.labels(lane)

        def observe(held: int, held_bytes: int) -> None:
            requests.set(held)
            size.set(held_bytes)

        return observe

    def render(self) -> bytes:
        if not self._folder:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together, path=self._folder)  # type: ignore[no-untyped-call]
        return generate_latest(together)

    def close(self) -> None:
        """Take the gauges of this process out of the sums."""
        if self._folder:
            mark_process_dead(os.getpid(), self._folder)  # type: ignore[no-untyped-call]


def forget_dead_workers(folder: Path) -> None:
    """Take out of the sums the gauges of workers that were killed."""
    for process in {file.stem.rsplit("_", 1)[1] for file in folder.glob("gauge_live*_*.db")}:
        if process.isdigit() and not psutil.pid_exists(int(process)):
            mark_process_dead(int(process), str(folder))  # type: ignore[no-untyped-call]
