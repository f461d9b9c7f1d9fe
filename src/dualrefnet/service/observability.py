"""The service's log: one line of JSON for each event, never with anything that a client has sent."""

# also: What the service counts for Prometheus.

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from pathlib import Path

import psutil

from dualrefnet.errors import DependencyError

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
except ImportError:
    raise DependencyError("the web service needs prometheus-client: pip install 'dualrefnet[deploy]'") from None


# Of a record only these may be written; whatever else a library hangs on one stays out.
KNOWN = ("id", "route", "status", "ms", "bytes_in", "bytes_out", "error", "where")


def where(error: BaseException) -> list[str]:
    """Return where an error arose, innermost last, without its message: that may quote what was sent."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return lines if cause is None else [*where(cause), f"then {type(error).__name__}", *lines]


class OneLine(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update({name: getattr(record, name) for name in KNOWN if hasattr(record, name)})
        if record.exc_info and record.exc_info[1] is not None:
            line |= {"error": type(record.exc_info[1]).__name__, "where": where(record.exc_info[1])}  # type: ignore[dict-item]
        return json.dumps(line, ensure_ascii=True)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Write everything that the service and the server log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("dualrefnet").setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn").setLevel(level)
    # uvicorn's own line of a request has the path and what stands behind its question mark.
    logging.getLogger("uvicorn.access").disabled = True
    # These two quote what they can't read.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    logging.getLogger("PIL").setLevel(logging.ERROR)


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


PHOTOGRAPHS = (1, 2, 4, 8, 16, 32)


# Several workers write into this folder, and whichever is asked adds up; the library reads the variable when it is
# imported.
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class Observed:
    """Counters of one process; `page` tells those of all of its workers together."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        # Of its own: one process may make several services, in tests.
        self._registry = CollectorRegistry()
        own = self._registry
        self._requests = Counter(
            "dualrefnet_requests", "Requests answered, by route and status.", ["route", "status"], registry=own
        )
        self._rejected = Counter(
            "dualrefnet_rejected", "Requests that were refused or given up, by reason.", ["reason"], registry=own
        )
        self._seconds = Histogram(
            "dualrefnet_request_seconds",
            "From the lines before the body to the answer.",
            ["route"],
            buckets=SECONDS,
            registry=own,
        )
        self._batches = Histogram(
            "dualrefnet_batch_photographs",
            "Photographs that the model reads at once.",
            ["lane"],
            buckets=PHOTOGRAPHS,
            registry=own,
        )
        self._queue = Gauge(
            "dualrefnet_queue_requests", "Requests that are held.", ["lane"], registry=own, multiprocess_mode="livesum"
        )
        self._held = Gauge(
            "dualrefnet_queue_bytes",
            "Bytes of bodies that are held.",
            ["lane"],
            registry=own,
            multiprocess_mode="livesum",
        )
        self._folder = os.environ.get(FOLDER_VARIABLE)
        if self._folder:
            forget_the_dead(Path(self._folder))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count one request that got no answer."""
        self._rejected.labels(reason).inc()

    def batch(self, lane: str, photographs: int) -> None:
        """Count one reading of the model."""
        self._batches.labels(lane).observe(photographs)

    def held(self, lane: str, requests: int, size: int) -> None:
        """Tell how many requests and bytes are held now."""
        self._queue.labels(lane).set(requests)
        self._held.labels(lane).set(size)

    def page(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        if not self._folder:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together, path=self._folder)  # type: ignore[no-untyped-call]
        return generate_latest(together)

    def close(self) -> None:
        """Take what this process holds out of the sums."""
        if self._folder:
            mark_process_dead(os.getpid(), self._folder)  # type: ignore[no-untyped-call]


def forget_the_dead(folder: Path) -> None:
    """Take out of the sums what workers held that were killed."""
    for file in folder.glob("gauge_live*_*.db"):
        process = file.stem.rsplit("_", 1)[1]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            file.unlink(missing_ok=True)
