"""Kills runs in many places and resumes them: `python bench/bench_faults.py [--ranks 1 2] [--only TEXT] [--missing]`.

A tiny model is trained, killed with SIGKILL (one rank or all; while sampling, after an update, while a checkpoint is
written, before it gets its name, right after it, twice in a row; with checkpoints written at once and beside the training),
and resumed as --resume auto does. Every resumed run must leave the metrics and rollouts of the run that was never stopped,
bit for bit. One row a fault in bench/results/faults.csv, in the place of its older one; the last line is one JSON object over
all rows of the file: kills, resumed_identical (a share), steps_lost_max (finished optimizer steps that the newest checkpoint
lacked).

Ranks are forked from this process, which has imported everything once. A rank that comes to the place of a fault says so
and waits there, so that the kill hits that place and not the one after.
"""

import argparse
import contextlib
import csv
import datetime
import json
import os
import platform
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rows import commit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import make_tiny_model  # noqa: E402
from runs import comparable, write_run  # noqa: E402

from ampo_fast import checkpoint, checkpoint_writer, trainer  # noqa: E402
from ampo_fast.checkpoint import checkpoint_dirs  # noqa: E402
from ampo_fast.config import load_config  # noqa: E402
from ampo_fast.metrics import read_metrics  # noqa: E402
from ampo_fast.rollouts.decoding import TransformersEngine  # noqa: E402

STEPS = 8
TIMEOUT_S = 120
# (name, the place of each kill, which rank; None: all). A place is (what, step).
FAULTS = [
    ("one rank, sampling", [("sampling", 4)], -1),
    ("all ranks, sampling", [("sampling", 4)], None),
    ("one rank, after an update", [("updated", 4)], 0),
    ("all ranks, after an update", [("updated", 4)], None),
    ("one rank, writing shards", [("writing", 4)], -1),
    ("all ranks, writing shards", [("writing", 4)], None),
    ("rank 0, shards without a name", [("naming", 4)], 0),
    ("all ranks, checkpoint done", [("named", 6)], None),
    ("all ranks, twice in a row", [("writing", 3), ("updated", 6)], None),
    ("all ranks, twice in one round", [("sampling", 4), ("sampling on", 4)], None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", default="", help="faults whose name has this text")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/faults.csv")
    parser.add_argument("--missing", action="store_true", help="only faults that have no row in --out yet")
    options = parser.parse_args()
    known = read_rows(options.out) if options.missing else []
    done = {(row["fault"], int(row["ranks"]), row["asynchronous"] == "True") for row in known}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny_model(Path(scratch) / "model")
        for ranks in options.ranks:
            for is_async in (False, True):
                faults = [f for f in FAULTS if options.only in f[0] and (f[0], ranks, is_async) not in done]
                for row in measure(Path(scratch) / f"{ranks}{is_async}", model, ranks, is_async, faults):
                    write_row(options.out, row)
    rows = read_rows(options.out)
    summary = {
        "kills": sum(int(row["kills"]) for row in rows),
        "resumed_identical": sum(row["identical"] == "True" for row in rows) / len(rows),
        "steps_lost_max": max(int(row["steps_lost"]) for row in rows),
    }
    print(json.dumps(summary))


def measure(scratch: Path, model: Path, ranks: int, is_async: bool, faults: Sequence[tuple]) -> Iterator[dict]:
    if not faults:
        return
    whole = new_run(scratch / "whole", model, is_async)
    finish(start(whole, ranks))
    for i, (name, places, victim) in enumerate(faults):
        run, started = new_run(scratch / f"run{i}", model, is_async), time.monotonic()
        lost = [kill_at(run, ranks, place, victim, is_resumed=at > 0) for at, place in enumerate(places)]
        finish(start(run, ranks, is_resumed=True))
        identical = is_identical(run_dir(whole), run_dir(run))
        row = {"fault": name, "ranks": ranks, "asynchronous": is_async, "kills": len(places), "steps_lost": max(lost)}
        print(
            f"{ranks} ranks, {'asynchronous' if is_async else 'synchronous'}, {name}: {identical=}, {lost=}", flush=True
        )
        yield row | {"identical": identical, "seconds": f"{time.monotonic() - started:.1f}"} | machine()


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_row(path: Path, row: dict) -> None:
    """Puts the row in the place of an older one of the same fault."""
    row = {key: str(value) for key, value in row.items()}
    key = ("fault", "ranks", "asynchronous")
    rows = [old for old in read_rows(path) if any(old[name] != row[name] for name in key)] + [row]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def new_run(folder: Path, model: Path, is_async: bool) -> Path:
    folder.mkdir(parents=True)
    return write_run(
        folder, model, run={"steps": STEPS, "timeout_s": TIMEOUT_S}, eval={"every": 4}, rollout={"batch_rows": 6},
        checkpoint={"every": 1, "asynchronous": is_async},
    )  # fmt: skip


def run_dir(config: Path) -> Path:
    return config.parent / "runs/r"


# --- ranks ------------------------------------------------------------------------------------------------------------


class Rank:
    """A forked process that trains; `arrived` is readable once it waits at the place of the fault."""

    def __init__(self, work: Callable[[Callable[[], None]], None], log: Path) -> None:
        self.log = log
        self.arrived, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.arrived)
            _child(work, told, log)
        os.close(told)
        self.status: int | None = None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Exit status; a rank that does not end in time is killed and named."""
        deadline = time.monotonic() + 2 * TIMEOUT_S
        while self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.status = os.waitstatus_to_exitcode(status)
                os.close(self.arrived)
            elif time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"rank {self.pid} did not end:\n{self.log.read_text()[-3000:]}")
            else:
                time.sleep(0.01)
        return self.status


def _child(work: Callable[[Callable[[], None]], None], told: int, log: Path) -> None:
    parent = os.getppid()

    def arrive() -> None:
        os.write(told, b"x")
        while os.getppid() == parent:  # until the kill, or the end of this bench
            time.sleep(0.1)
        os._exit(1)

    status = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work(arrive)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def start(
    config: Path, ranks: int, place: tuple[str, int] | None = None, trapped: int = 0, is_resumed: bool = False
) -> list[Rank]:
    port = free_port()

    def work(rank: int) -> Callable[[Callable[[], None]], None]:
        def train(arrive: Callable[[], None]) -> None:
            if ranks > 1:
                os.environ |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            if place and rank == trapped % ranks:
                set_trap(*place, arrive)
            trainer.train(load_config(str(config)), resume=is_resumed)

        return train

    return [Rank(work(rank), config.parent / f"rank{rank}.log") for rank in range(ranks)]


def set_trap(what: str, step: int, arrive: Callable[[], None]) -> None:
    """Makes this process stop for its killer when it comes to the place."""
    if what.startswith("sampling"):
        call = 2 if what == "sampling" else 1  # one batch is written down and not sampled again after the first kill
        trap(TransformersEngine, "generate", arrive,
             lambda _, prompts, n, sampling, *kept: (sampling.seed, sampling.step) == (0, step), call=call)  # fmt: skip
    elif what == "updated":
        trap(trainer.Trainer, "_save", arrive, lambda self: self.step == step)
    else:
        function = {"writing": "write_shards", "naming": "commit", "named": "prune_checkpoints"}[what]
        is_due = (
            (lambda root, _: any(found == step for found, _ in checkpoint_dirs(root)))
            if what == "named"
            else (lambda taken, *_: taken.target.name == f"step_{step:06d}")
        )
        for module in (checkpoint, checkpoint_writer):
            trap(module, function, arrive, is_due)


def trap(owner: object, name: str, arrive: Callable[[], None], is_due: Callable[..., bool], call: int = 1) -> None:
    whole, count = getattr(owner, name), iter(range(1, 10**6))

    def trapped(*args, **kwargs):
        if is_due(*args, **kwargs) and next(count) == call:
            arrive()
        return whole(*args, **kwargs)

    setattr(owner, name, trapped)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def finish(ranks: list[Rank]) -> None:
    failed = [rank for rank in ranks if rank.wait() != 0]
    if failed:
        raise RuntimeError(f"a run that was left alone failed:\n{failed[0].log.read_text()[-3000:]}")


def kill_at(config: Path, num_ranks: int, place: tuple[str, int], victim: int | None, is_resumed: bool) -> int:
    """Kills a run at the place; -> how many finished steps the newest checkpoint lacks."""
    ranks = start(config, num_ranks, place, trapped=victim or 0, is_resumed=is_resumed)
    watched = ranks[victim or 0]
    ready, _, _ = select.select([watched.arrived], [], [], TIMEOUT_S)
    if not ready or not os.read(watched.arrived, 1):
        for rank in ranks:
            rank.kill()
        raise RuntimeError(f"the run did not come to {place}:\n{watched.log.read_text()[-3000:]}")
    for rank in ranks if victim is None else [watched]:
        rank.kill()
    if not all([rank.wait() for rank in ranks]):  # the others meet the loss by themselves
        raise RuntimeError(f"a rank ended well without its peer, killed at {place}")
    metrics = run_dir(config) / "metrics.jsonl"
    done = max((row["step"] for row in read_metrics(metrics) if "loss" in row), default=0) if metrics.exists() else 0
    saved = checkpoint_dirs(run_dir(config) / "checkpoints")
    return max(0, done - (saved[-1][0] if saved else 0))


def is_identical(a: Path, b: Path) -> bool:
    files = sorted(path.relative_to(a) for path in (*a.glob("rollouts/*.jsonl"), *a.glob("eval/*.jsonl")))
    same_files = all((a / name).read_bytes() == (b / name).read_bytes() for name in files)
    return bool(files) and same_files and comparable(a) == comparable(b)


def machine() -> dict[str, str]:
    today = datetime.date.today().isoformat()
    return {"device": f"{platform.machine()} CPU", "torch": torch.__version__, "commit": commit(), "date": today}


if __name__ == "__main__":
    main()
