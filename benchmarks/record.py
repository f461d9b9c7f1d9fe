"""What all benchmarks share: interleaved timing, a name for the machine, and one table and one CSV a benchmark."""

from __future__ import annotations

import datetime
import math
import os
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pandas as pd
import psutil
import torch
from rich.console import Console
from rich.table import Table

import dualrefnet
from dualrefnet.files import write_csv

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every case once a round, so that whatever else the machine does meets all of them alike.

    Args:
        cases: name -> what is timed.
        rounds: how often each case is timed.
        warmup: rounds before these, which aren't counted.
        clock: `time.process_time` counts the seconds of this process alone, whatever else the machine does.

    Returns:
        Case -> seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names, order = list(cases), random.Random(0)
    for number in range(-warmup, rounds):
        # None always follows the same one, whose data and threads would be what it meets.
        order.shuffle(names)
        for name in names:
            started = clock()
            cases[name]()
            if number >= 0:
                seconds[name].append(clock() - started)
    return seconds


def how(rounds: int, base: str) -> str:
    """Return the sentence that stands below every table of compared cases."""
    return (
        f"all cases in one run, in turn in each of {rounds} rounds; value: median; ratio: to {base!r}, median "
        "of the rounds' ratios"
    )


def compare(
    seconds: Mapping[str, list[float]], unit: Literal["images/s", "s"], base: str, images: int = 1
) -> pd.DataFrame:
    """Make a table of timed cases.

    Args:
        seconds: as `interleaved` returns them.
        unit: `images/s`, with ratios that say how many times as fast as `base`; or `s`, how many times as long.
        base: the case that the others are compared with.
        images: how many images one timing is about, for `images/s`.

    Returns:
        Columns `case, value, low, high, unit, ratio, ratio_to, rounds`: the median, the extremes, and the median of the
        ratios of the same round.
    """
    rows = []
    for case, times in seconds.items():
        values = [images / taken for taken in times] if unit == "images/s" else times
        pairs = zip(seconds[base], times, strict=True)
        ratios = [before / now if unit == "images/s" else now / before for before, now in pairs]
        rows.append(
            {
                "case": case,
                "value": statistics.median(values),
                "low": min(values),
                "high": max(values),
                "unit": unit,
                "ratio": statistics.median(ratios),
                "ratio_to": base,
                "rounds": len(times),
            }
        )
    return pd.DataFrame(rows)


def measure_process(command: Sequence[object], log: Path, environment: Mapping[str, str]) -> dict[str, float]:
    """Run a command in one thread a process; return what it and its children took.

    Args:
        command: the program and its arguments.
        log: where its output goes.
        environment: further variables.

    Returns:
        `s`, wall seconds; `cpu_s`; and `peak_mib`, the most memory at once, sampled every 3 seconds: PSS, in which a
        page that several processes share counts once.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    started, peak = time.perf_counter(), 0
    with log.open("w") as output:
        running = subprocess.Popen([*map(str, command)], stdout=output, stderr=subprocess.STDOUT, env=variables)
        watched = psutil.Process(running.pid)
        while True:
            ended, status, used = os.wait4(running.pid, os.WNOHANG)
            if ended:
                break
            try:
                processes = (watched, *watched.children(recursive=True))
                peak = max(peak, sum(one.memory_full_info().pss for one in processes))
            except psutil.Error:
                continue
            time.sleep(3)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed; see {log}")
    cpu = used.ru_utime + used.ru_stime
    return {"s": time.perf_counter() - started, "cpu_s": cpu, "peak_mib": peak / 2**20}


def record(name: str, table: pd.DataFrame, note: str, out: Path = RESULTS) -> Path:
    """Print a benchmark's table and write it as `<date>-<hardware>-torch<version>-<name>.csv`.

    Args:
        name: of the benchmark.
        table: any columns; those of the environment are added to the CSV.
        note: how it was measured; stands below the table and in the CSV.
        out: folder.

    Returns:
        The file; one of the same name (the same day, machine and torch) is replaced.
    """
    today = datetime.date.today().isoformat()
    environment: dict[str, str | int] = {
        "date": today,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "dualrefnet": dualrefnet.__version__,
        **{package: version(package) for package in ("torch", "timm", "opencv-python-headless", "pillow", "numpy")},
        "note": note,
    }
    path = out / f"{today}-{hardware()}-torch{torch.__version__.split('+')[0]}-{name}.csv"
    write_csv(path, table.assign(benchmark=name, **environment))
    shown = Table(
        title=f"{name}, {hardware()}, torch {torch.__version__}",
        caption=note,
        title_justify="left",
        caption_justify="left",
    )
    printed = table.drop(columns=["ratio_to", "rounds"], errors="ignore")
    for column in printed.columns:
        shown.add_column(column, justify="left" if printed[column].dtype.kind not in "fi" else "right")
    for row in printed.itertuples(index=False):
        shown.add_row(*(_cell(value) for value in row))
    Console().print(shown)
    print(path)
    return path


def hardware() -> str:
    """Return a name of this machine for a file name, such as `amd-epyc-2core` or `intel-xeon-16core-nvidia-h200`."""
    cpu = torch.cpu.get_capabilities().get("cpu_name") or "cpu"
    parts = [str(cpu), f"{os.cpu_count()}core"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _git_commit() -> str:
    """Return the commit of the code, with `+changes` if `src` or `benchmarks` differ from it; empty without git."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--", "src", "benchmarks/*.py") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", HERE.parent, *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
