"""The vllm-server engine under torchrun: rank 0 asks the servers, and both ranks train on what they answer."""

import collections
import os
import signal
import subprocess
import time

import pytest
from runs import HERE, environment, torchrun, workers, write_run

from ampo_fast import distributed, vllm_process
from ampo_fast.config import load_config
from ampo_fast.http_client import HttpError
from ampo_fast.metrics import read_metrics
from ampo_fast.rollouts import IncompleteBatch, stream_seed
from ampo_fast.stage_files import read_rows

NUM_CANARY = 2  # samples, where a round's prompt has six


def served(tmp_path, tiny_model, **options):
    options = {"request_timeout_s": 300.0} | options
    return write_run(
        tmp_path, tiny_model, run={"steps": 3, "timeout_s": 120.0}, checkpoint={"every": 1, "save_best": False},
        rollout={"engine": "vllm-server", "prompts_per_round": 4, "options": options}, eval={"every": 0},
        optim={"prompts_per_step": 4},
    )  # fmt: skip


def start(config, tmp_path, *more):
    argv = [*torchrun(2), str(HERE / "ranks_served.py"), str(config), *more]
    env = environment() | {"FAKE_VLLM_DIR": str(tmp_path)}
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answers(tmp_path):
    """How often each seed was answered, canaries left out."""
    return collections.Counter(line.split()[1] for line in (tmp_path / "answered.log").read_text().splitlines())


def test_both_ranks_train_on_what_rank_0_asked_for_and_a_kill_repeats_nothing(tiny_model, tmp_path):
    config = served(tmp_path, tiny_model)
    run_dir = tmp_path / "runs/r"
    (tmp_path / "fault.hang").touch()  # the first prompt that is not the canary's: the evaluation's
    (tmp_path / "fault.hang").unlink()
    running = start(config, tmp_path)
    partial = run_dir / "rollouts/step_000001.partial.jsonl"
    deadline = time.monotonic() + 120
    while not (run_dir / "eval/before.jsonl").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "fault.hang").touch()
