"""Whole runs on the tiny model: their files, their commands, and what of their metrics must come out the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tomli_w

from ampo_fast.metrics import read_metrics
from ampo_fast.vllm.process import free_port

HERE = Path(__file__).parent


def write_run(tmp_path, tiny_model, file="config.toml", **sections):
    """Data files and a config of six steps in rounds of two; -> the config's path."""
    words = ["tea", "sun", "rain", "wind", "stone", "moss", "wolf", "bread", "lamp", "road"]
    rows = [{"id": f"t{i}", "prompt": f"say {w}"} for i, w in enumerate(words)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "eval.jsonl").write_text(
        "".join(json.dumps({"id": f"e{i}", "prompt": f"name {w}"}) + "\n" for i, w in enumerate(words[:4]))
    )
    values = {
        "run": {"name": "r", "dir": str(tmp_path / "runs"), "steps": 6, "trackers": []},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "model": {"path": str(tiny_model)},
        "rollout": {"n": 6, "max_new_tokens": 24, "batch_rows": 12, "truncated": "keep", "prompts_per_round": 4},
        "reward": {"kind": "toy_rewards:vowels"},
        "embed": {"model": "policy"},
        "select": {"k": 3},
        "optim": {"prompts_per_step": 2, "lr": 3e-3},
        "eval": {"prompts": 4, "every": 3},
        "checkpoint": {"every": 2, "save_best": False},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    path = tmp_path / file
    path.write_text(tomli_w.dumps(values))
    return path


def environment():
    return os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}


def command(config, *more, ranks=None):
    """(argv, environment) of `ampo-fast train`, under torchrun where ranks are given."""
    python = [sys.executable] if ranks is None else torchrun(ranks)
    return [*python, "-m", "ampo_fast.cli", "train", str(config), *more], environment()


def torchrun(ranks):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def two_ranks(code, *argv):
    """Runs the code in two processes that RANK and MASTER_ADDR tell of each other; -> [(exit status, stderr)]."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1")), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, argv)], env=environment() | shared | {"RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    return [(rank.returncode, error) for rank, error in zip(ranks, errors, strict=True)]


def comparable(run_dir):
    timed = ("time/", "perf/")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def of_other_modes(directory):
    """Files below it that others may read more, or less, than the umask says."""
    umask = os.umask(0)
    os.umask(umask)
    return [path for path in directory.rglob("*") if path.is_file() and path.stat().st_mode & 0o777 != 0o666 & ~umask]


def reached(run_dir, mark):
    """Whether a run has come to `mark`: the beginning of a file's name, or (with a quote) a text in its metrics."""
    if mark.startswith('"'):
        path = run_dir / "metrics.jsonl"
        return path.exists() and mark in path.read_text()
    return any(
        path.name.startswith(mark) for folder in ("rollouts", "checkpoints") for path in (run_dir / folder).glob("*")
    )


def workers(torchrun_pid):
    """{rank: process id} of torchrun's children that still live."""
    found = {}
    for pid in Path(f"/proc/{torchrun_pid}/task/{torchrun_pid}/children").read_text().split():
        try:
            content = Path(f"/proc/{pid}/environ").read_text()
        except OSError:  # ended meanwhile
            continue
        pairs = dict(entry.partition("=")[::2] for entry in content.split("\0"))
        if "RANK" in pairs:
            found[int(pairs["RANK"])] = int(pid)
    return found
