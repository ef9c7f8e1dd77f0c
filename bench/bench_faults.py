"""Kills runs in many places and resumes them: `python bench/bench_faults.py [--ranks 1 2] [--out FILE]`.

A tiny model is trained, killed with SIGKILL (one rank or all; while sampling, after an update, while a checkpoint is
written, right after it, twice in a row), and resumed with --resume auto. Every resumed run must leave the metrics and
rollouts of the run that was never stopped, bit for bit. One row a fault in bench/results/faults.csv; the last line is
one JSON object: kills, resumed_identical (a share), steps_lost_max (optimizer steps whose work was done again).
"""

import argparse
import csv
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import make_tiny_model  # noqa: E402
from runs import command, comparable, reached, workers, write_run  # noqa: E402

from ampo_fast.checkpoint import checkpoint_dirs  # noqa: E402
from ampo_fast.metrics import read_metrics  # noqa: E402

STEPS = 8
# (name, where to kill, which ranks; None: all). Marks: the beginning of a file's name, or a text in the metrics.
FAULTS = [
    ("one rank, sampling", ["step_000005.partial"], -1),
    ("all ranks, sampling", ["step_000005.partial"], None),
    ("one rank, after an update", ['"step": 4, "loss"'], 0),
    ("all ranks, after an update", ['"step": 4, "loss"'], None),
    ("one rank, saving", ["step_000004.partial"], -1),
    ("all ranks, saving", ["step_000004.partial"], None),
    ("all ranks, saved", ["step_000006"], None),
    ("all ranks, twice in a row", ["step_000003.partial", '"step": 6, "loss"'], None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/faults.csv")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny_model(Path(scratch) / "model")
        for ranks in options.ranks:
            whole = new_run(Path(scratch), model, f"whole{ranks}")
            finish(start(whole, ranks))
            for name, marks, victim in FAULTS:
                run = new_run(Path(scratch), model, f"r{ranks}_{len(rows)}")
                lost = [kill_at(run, ranks, mark, victim, i > 0) for i, mark in enumerate(marks)]
                finish(start(run, ranks, "--resume", "auto"))
                row = {"fault": name, "ranks": ranks, "kills": len(marks), "steps_lost": max(lost)}
                rows.append(row | {"identical": is_identical(run_dir(whole), run_dir(run))} | machine())
                print(f"{ranks} ranks, {name}: {rows[-1]['identical']=}, steps lost {max(lost)}", flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    summary = {
        "kills": sum(row["kills"] for row in rows),
        "resumed_identical": sum(row["identical"] for row in rows) / len(rows),
        "steps_lost_max": max(row["steps_lost"] for row in rows),
    }
    print(json.dumps(summary))


def new_run(scratch: Path, model: Path, name: str) -> Path:
    (scratch / name).mkdir()
    sections = {"run": {"steps": STEPS, "timeout_s": 120.0}, "checkpoint": {"every": 1}, "eval": {"every": 4}}
    return write_run(scratch / name, model, **sections)


def run_dir(config: Path) -> Path:
    return config.parent / "runs/r"


def start(config: Path, ranks: int, *more: str) -> subprocess.Popen:
    argv, env = command(config, *more, ranks=ranks if ranks > 1 else None)
    return subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(running: subprocess.Popen) -> None:
    _, err = running.communicate(timeout=600)
    if running.returncode != 0:
        raise RuntimeError(f"a run that was left alone failed:\n{err[-3000:]}")


def kill_at(config: Path, ranks: int, mark: str, victim: int | None, is_resumed: bool) -> int:
    """Kills a run at the mark; -> how many finished steps the newest checkpoint lacks."""
    running = start(config, ranks, *(("--resume", "auto") if is_resumed else ()))
    deadline = time.monotonic() + 300
    while running.poll() is None and time.monotonic() < deadline and not reached(run_dir(config), mark):
        time.sleep(0.001)
    if running.poll() is not None:
        raise RuntimeError(f"the run ended before {mark}:\n{running.communicate()[1][-3000:]}")
    alive = workers(running.pid) if ranks > 1 else {0: running.pid}
    for pid in alive.values() if victim is None else [list(alive.values())[victim]]:
        os.kill(pid, signal.SIGKILL)
    running.communicate(timeout=300)
    metrics = run_dir(config) / "metrics.jsonl"
    done = max((row["step"] for row in read_metrics(metrics) if "loss" in row), default=0) if metrics.exists() else 0
    saved = checkpoint_dirs(run_dir(config) / "checkpoints")
    return max(0, done - (saved[-1][0] if saved else 0))


def is_identical(a: Path, b: Path) -> bool:
    files = sorted(path.relative_to(a) for path in (*a.glob("rollouts/*.jsonl"), *a.glob("eval/*.jsonl")))
    same_files = all((a / name).read_bytes() == (b / name).read_bytes() for name in files)
    return bool(files) and same_files and comparable(a) == comparable(b)


def machine() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    today = datetime.date.today().isoformat()
    return {"device": f"{platform.machine()} CPU", "torch": torch.__version__, "commit": commit, "date": today}


if __name__ == "__main__":
    main()
