"""The service's log: one line of JSON for each event, never with anything that a client has sent."""

from __future__ import annotations

import json
import logging
import time
import traceback

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
        line = {"time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "event": record.getMessage()}
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
