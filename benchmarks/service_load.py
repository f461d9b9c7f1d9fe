"""How many requests a second does the service answer, how late is the latest of a hundred, and does its memory stay
where
it is?

A real server (`dualrefnet serve`) is started on this machine; clients on the same machine, each with one connection,
send the next request as soon as the last is answered. They take their share of the processor, so a server of its own
would be somewhat faster. Every answer must be a 200 with probabilities that sum to one; anything else counts as an
error. Memory is that of the server and its workers.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import pandas as pd
import psutil
import typer

from record import RESULTS, record
from synthetic_images import image_table

PICTURES = 16


@dataclass
class Load:
    """What clients have seen.

    Attributes:
        seconds: of each answer.
        finished: when each came, seconds since the start.
        faults: what else happened, counted.
        memory: mebibytes of the server, every second.
    """

    seconds: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)


async def put_under_load(
    url: str, server: psutil.Process, files: list[bytes], form: str, clients: int, duration: float
) -> Load:
    """Let clients ask for a while."""
    load, started = Load(), time.perf_counter()

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as session:
            turn = number
            while time.perf_counter() - started < duration:
                asked = time.perf_counter()
                try:
                    answer = await session.post(
                        "/v1/predict",
                        files={"images": ("photograph.jpg", files[turn % len(files)])},
                        data={"metadata": form},
                    )
                    fault = "" if answer.status_code == 200 else f"status {answer.status_code}"
                    if not fault and abs(sum(answer.json()["probabilities"].values()) - 1) > 1e-6:
                        fault = "probabilities don't sum to one"
                except httpx.HTTPError as error:
                    fault = type(error).__name__
                now = time.perf_counter()
                if fault:
                    load.faults[fault] += 1
                else:
                    load.seconds.append(now - asked)
                    load.finished.append(now - started)
                turn += clients

    async def watch() -> None:
        while True:
            load.memory.append(memory_of(server))
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(client(number) for number in range(clients)))
    watcher.cancel()
    return load


def memory_of(server: psutil.Process) -> float:
    """Return the mebibytes of a server and its workers."""
    total = 0
    for process in [server, *server.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def start_server(model: Path, workers: int, variant: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start the service and wait until it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dualrefnet", "serve", str(model), "--port", str(port), "--workers", str(workers)]
    command += ["--variant", variant, "--no-page"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{url}/readyz", timeout=1).status_code == 200:
                return server, url
        except httpx.HTTPError:
            pass
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}: {' '.join(command)}")
        time.sleep(0.1)
    server.kill()
    raise SystemExit("the server wasn't ready within a minute")


def main(
    model: Annotated[Path, typer.Argument(help="A run folder or an exported bundle.")],
    images: Annotated[Path | None, typer.Option(help="Folder of images; default: drawn ones.")] = None,
    width: int = 1536,
    height: int = 1152,
    clients: Annotated[str, typer.Option(help="How many at once, one measurement each.")] = "1,8,64",
    duration: Annotated[float, typer.Option(help="Seconds of each measurement.")] = 30,
    soak: Annotated[float, typer.Option(help="Seconds of a last, long measurement with 8 clients; 0: none.")] = 0,
    workers: int = 1,
    variant: str = "float32",
    out: Path = RESULTS,
) -> None:
    """Measure; two minutes, and as long as the soak takes."""
    with tempfile.TemporaryDirectory() as folder:
        paths = image_table(Path(folder), images, PICTURES, width, height)["image_path"]
        files = [Path(path).read_bytes() for path in paths]
    form = json.dumps({})
    server, url = start_server(model, workers, variant)
    rows, plan = [], [(int(number), duration) for number in clients.split(",")] + ([(8, soak)] if soak else [])
    try:
        process = psutil.Process(server.pid)
        asyncio.run(put_under_load(url, process, files, form, 2, 5))
        for number, length in plan:
            load = asyncio.run(put_under_load(url, process, files, form, number, length))
            half = len(load.memory) // 2
            rows.append(
                {
                    "case": f"{number} clients, {length:g} s",
                    "requests": len(load.seconds),
                    "per_s": len(load.seconds) / load.finished[-1],
                    "p50_ms": 1000 * float(np.percentile(load.seconds, 50)),
                    "p99_ms": 1000 * float(np.percentile(load.seconds, 99)),
                    "errors": sum(load.faults.values()),
                    "which": json.dumps(load.faults) if load.faults else "",
                    "mib_first_half": float(np.median(load.memory[:half])),
                    "mib_second_half": float(np.median(load.memory[half:])),
                    "mib_peak": max(load.memory),
                }
            )
            print(rows[-1])
        server.terminate()
        status = server.wait(60)
    finally:
        if server.poll() is None:
            server.kill()
    note = (
        f"dualrefnet serve, {workers} worker(s), {variant}, {len(files)} images "
        + (
            f"from a folder, {np.mean([len(file) for file in files]) / 2**10:.0f} KiB each"
            if images
            else f"drawn, {width} x {height}"
        )
        + f", empty form, clients on the same {os.cpu_count()} cores; memory: median of each half; exit status "
        + f"after SIGTERM: {status}"
    )
    record("service_load" + ("-soak" if soak else ""), pd.DataFrame(rows), note, out)


if __name__ == "__main__":
    typer.run(main)
