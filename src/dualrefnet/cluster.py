"""A Ray cluster, for the runs of a suite and for batch prediction."""

from __future__ import annotations

import threading
from typing import Any

from dualrefnet.errors import DependencyError, RunError, install_hint

# Seconds in which a cluster must answer; Ray itself waits for minutes, or for ever.
PATIENCE = 20.0


def require_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise DependencyError(
            f"Ray isn't installed; it comes with the extra `scale`: {install_hint('scale')}"
        ) from None
    return ray


def connect(address: str, **options: Any) -> Any:
    """Connect to a cluster (`auto`, `ray://...`, `host:port`), or start Ray here (`local`); return the module `ray`."""
    ray, failures = require_ray(), []

    def start() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", **options)
        except Exception as error:
            failures.append(error)

    if address == "local":
        start()
    elif address.startswith("ray://"):
        # A client belongs to the thread that made it.
        _wait_for_server(address)
        start()
    else:
        thread = threading.Thread(target=start, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        if thread.is_alive():
            raise _silence(address)
    if failures:
        raise RunError(f"no Ray cluster answers at {address}: {' '.join(str(failures[0]).split())}") from failures[0]
    return ray


def _wait_for_server(address: str) -> None:
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(address.removeprefix("ray://"), [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(PATIENCE)
        except grpc.FutureTimeoutError:
            raise _silence(address) from None


def _silence(address: str) -> RunError:
    return RunError(f"no Ray cluster answers at {address} within {PATIENCE:.0f} seconds; is it running there?")
