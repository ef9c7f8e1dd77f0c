"""Rows of bench/results/*.csv: a measurement, and what it was measured on. A number without its row does not exist."""

from __future__ import annotations

import contextlib
import csv
import datetime
import importlib.metadata
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ampo_fast.memory import status_kib

FIELDS = ("op", "variant", "mode", "shape", "dtype", "median_ms", "p20_ms", "p80_ms", "peak_mib", "roofline_pct",
          "device", "versions", "commit", "date", "note")  # fmt: skip


def append(path: Path, rows: Sequence[dict], extra: Sequence[str] = ()) -> None:
    """Appends rows under the header FIELDS + extra; fields a row lacks stay empty. ValueError where the header differs."""
    header = [*FIELDS, *extra]
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        with path.open(newline="") as file:
            found = next(csv.reader(file))
        if found != header:
            raise ValueError(f"{path} has the columns {found}, the new rows have {header}; move the old file away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def context(*packages: str) -> dict:
    """device, versions, commit and date of this run."""
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return {
        "device": f"{len(os.sched_getaffinity(0))}-core {_cpu_name()}",
        "versions": f"python {platform.python_version()} {versions}",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def timings(seconds: Sequence[float]) -> dict:
    """median_ms, p20_ms and p80_ms of samples in seconds."""
    ordered = sorted(1e3 * s for s in seconds)
    last = len(ordered) - 1
    return {
        "median_ms": f"{statistics.median(ordered):.4g}",
        "p20_ms": f"{ordered[round(0.2 * last)]:.4g}",
        "p80_ms": f"{ordered[round(0.8 * last)]:.4g}",
    }


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def alternate(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    keep: Callable[[dict[str, list[float]], dict[str, object]], None] = lambda seconds, results: None,
) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Times the calls in turn, so that a slow minute of the machine hits all -> (seconds by name, last result by name).

    keep(seconds, results) is called in the end, also where SIGTERM, which a time limit sends, is that end: then with the
    calls that were timed at least once. A call that raises is called no more; once the others are done, and kept, its error
    goes on.
    """
    seconds: dict[str, list[float]] = {}
    results: dict[str, object] = {}
    errors: dict[str, Exception] = {}
    try:
        with _sigterm_exits():
            for i in range(repeats):
                for name in [name for name in calls if name not in errors]:
                    try:
                        if i == 0:  # warm-up; the first timing follows at once, so that a limit met later costs nothing
                            calls[name]()
                        spent, results[name] = timed(calls[name])
                    except Exception as error:
                        print(f"failed: {name}: {type(error).__name__}: {error}", flush=True)
                        traceback.print_exc()
                        errors[name] = error.with_traceback(None)  # which would hold on to the failed call's memory
                        continue
                    seconds.setdefault(name, []).append(spent)
    finally:
        keep(seconds, results)
    for error in errors.values():
        raise error
    return seconds, results


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """As an exception, which `finally` sees; by default the process ends where it is."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def peak_mib(call: Callable[[], object]) -> str:
    """What the call added to the resident memory at its height, in MiB; "" where the kernel does not say (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
        before = status_kib("VmHWM")
        call()
        return f"{(status_kib('VmHWM') - before) / 1024:.1f}"
    except OSError:
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name", platform.machine())
    return f"{name} (family {found['cpu family']} model {found['model']})" if "cpu family" in found else name


def commit() -> str:
    """The checkout's commit, "-dirty" where files differ from it; outside a checkout or without git what AMPO_FAST_COMMIT
    says, else "unknown"."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = done.stdout.strip()
    except OSError:  # rows are asked for after the measuring: a machine without git must not lose them
        found = ""
    return found or os.environ.get("AMPO_FAST_COMMIT") or "unknown"
