"""The vllm-server engine under torchrun: rank 0 asks the servers, and both ranks train on what they answer."""

import collections
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
from builders import group, prompt
from runs import HERE, environment, torchrun, two_ranks, workers, write_run

from ampo_fast import distributed
from ampo_fast.config import load_config
from ampo_fast.data import load_prompts
from ampo_fast.http_client import HttpError
from ampo_fast.metrics import read_metrics
from ampo_fast.random_streams import stream_seed
from ampo_fast.rollouts.batches import shared_answers
from ampo_fast.rollouts.protocol import IncompleteBatch
from ampo_fast.sampler import PromptSampler
from ampo_fast.stage_files import read_rows
from ampo_fast.trainer import train
from ampo_fast.vllm import process
from ampo_fast.vllm.canary import SyncError


def write(tmp_path, tiny_model, **options):
    return write_run(
        tmp_path, tiny_model, run={"steps": 3, "timeout_s": 120.0}, optim={"prompts_per_step": 4}, eval={"every": 0},
        rollout={"engine": "vllm-server", "options": options}, checkpoint={"every": 1},
        embed={"model": "package:all-minilm-l6-v2"},
    )  # fmt: skip


def seeds(path, index):
    """What each prompt of the round is asked with."""
    config = load_config(str(path))
    prompts = PromptSampler(load_prompts(config.data.train), config.prompts_per_round, config.run.seed).round(index)
    return [str(stream_seed(config.run.seed, index, p.id) >> 1) for p in prompts]


def start(config, tmp_path, *more):
    argv = [*torchrun(2), str(HERE / "ranks_served.py"), str(config), *more]
    env = environment() | {"FAKE_VLLM_DIR": str(tmp_path)}
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answers(path):
    return [[(r["token_ids"], r["selected"], r["version"]) for r in row["responses"]] for row in read_rows(path)]


def wait_for(running, is_there):
    deadline = time.monotonic() + 200
    while running.poll() is None and time.monotonic() < deadline and not is_there():
        time.sleep(0.01)
    assert is_there(), running.communicate()[1][-3000:] if running.poll() is not None else "too late"


def test_both_ranks_train_on_what_rank_0_was_answered_and_a_kill_repeats_nothing(tiny_model, tmp_path, monkeypatch):
    config = write(tmp_path, tiny_model)
    run_dir = tmp_path / "runs/r"
    partial = run_dir / "rollouts/step_000002.partial.jsonl"
    (tmp_path / f"fault.hang.{seeds(config, 1)[0]}").touch()  # in the round that is sampled ahead
    running = start(config, tmp_path)
    wait_for(running, lambda: partial.exists() and partial.read_bytes().count(b"\n") == 3)
    os.kill(workers(running.pid)[0], signal.SIGKILL)
    assert running.wait(timeout=100) != 0
    resumed = start(config, tmp_path, "--resume")
    _, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err[-4000:]

    asked = collections.Counter(line.split()[1] for line in (tmp_path / "answered.log").read_text().splitlines())
    assert [asked[seed] for index in range(3) for seed in seeds(config, index)] == [1] * 12
    steps = [row for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]
    assert [row["staleness/max"] for row in steps] == [0, 1, 1]
    for row in steps:
        assert row["sync/logp_difference"] < 1e-3 < row["sync/logp_change"]
    assert not list((run_dir / "rollouts").glob("*partial*"))

    one = tmp_path / "one"
    one.mkdir()
    monkeypatch.setenv("FAKE_VLLM_DIR", str(one))
    fake = [sys.executable, str(HERE / "fake_vllm.py"), "--model", str(tiny_model), "--port"]
    monkeypatch.setattr(process, "serve_command", lambda *a: lambda port: [*fake, str(port)])
    train(load_config(str(write(one, tiny_model))))
    alone = [row for row in read_metrics(one / "runs/r/metrics.jsonl") if "loss" in row]
    for name in ("loss", "grad_norm", "reward", "group/trained", "num_tokens"):
        assert [row[name] for row in steps[:2]] == pytest.approx([row[name] for row in alone[:2]], rel=1e-5)
    for name in ("rollouts/step_000001.jsonl", "rollouts/step_000002.jsonl", "eval/before.jsonl"):
        assert answers(run_dir / name) == answers(one / "runs/r" / name)


def test_what_ends_rank_0s_engine_ends_both_ranks_with_its_name(tiny_model, tmp_path):
    config = write(tmp_path, tiny_model, restarts=0)
    (tmp_path / f"fault.die.{seeds(config, 1)[2]}").touch()
    running = start(config, tmp_path)
    wait_for(running, lambda: list(tmp_path.glob("taken.die.*")))
    died = time.monotonic()
    _, err = running.communicate(timeout=100)
    assert time.monotonic() - died < 60  # half of run.timeout_s
    for rank in (0, 1):
        assert f"rank {rank} ended: IncompleteBatch: " in err
    assert err.count("the last words of a dying server") >= 2
    kept = tmp_path / "runs/r/rollouts/step_000002.partial.jsonl"
    assert len(read_rows(kept) if kept.stat().st_size else []) < 4
    assert not kept.with_name("step_000002.partial1.jsonl").exists()


@pytest.mark.parametrize(
    "error", [IncompleteBatch("gone"), HttpError("away", True), SyncError("stale"), OSError(28, "full")]
)
def test_our_errors_reach_other_ranks_as_what_they_are(error):
    received = distributed.portable(error)
    assert (type(received), str(received)) == (type(error), str(error))


def test_an_error_that_cannot_be_sent_keeps_its_name_and_words():
    class Local(Exception):
        pass

    assert str(distributed.portable(Local("of no module"))) == "Local: of no module"
    assert pickle.loads(pickle.dumps(distributed.portable(Local("x"))))
    assert distributed.portable(None) is None


def test_one_rank_gets_all_that_it_answers():
    groups = [group(["a"], i) for i in range(3)]
    assert shared_answers(lambda: groups[::-1], [[prompt(i) for i in range(3)]]) == groups
    with pytest.raises(IncompleteBatch, match="gone"), distributed.together():
        raise IncompleteBatch("gone")


AGREEING = """
from ampo_fast import distributed
from ampo_fast.vllm.canary import SyncError
def fail():
    class Local(Exception): pass  # which no other process has
    raise Local("disk full")
with distributed.process_group(60):
    assert distributed.dealt_by_main(lambda: ["of 0", "of 1"]) == f"of {distributed.rank()}"
    with distributed.together():
        pass
    for work in (lambda: distributed.on_main(fail), lambda: distributed.dealt_by_main(fail)):
        try:
            work()
        except Exception as error:
            assert type(error).__name__ == ("Local" if distributed.is_main() else "RuntimeError")
            assert str(error).endswith("disk full")
    with distributed.together():
        if distributed.rank() == 1:
            raise SyncError("vllm of rank 1 is stale")
"""


def test_what_stops_one_rank_stops_the_other_with_the_same_words():
    """As a canary that fails in one rank's own engine."""
    for status, err in two_ranks(AGREEING):
        # Not the last line where torch's own threads are still there as the process ends.
        assert any(
            line.endswith("ampo_fast.vllm.canary.SyncError: vllm of rank 1 is stale") for line in err.splitlines()
        )
        assert status != 0


ENGINES = """
import sys
from types import SimpleNamespace
import torch
from ampo_fast import distributed
from ampo_fast.config import ModelConfig
from ampo_fast.engine_config import VllmConfig
from ampo_fast.model import Policy
from ampo_fast.vllm import engine
from ampo_fast.weight_sync import push_weights
from test_vllm_sleep import SleepyLLM

class Breaking(SleepyLLM):
    breaks = False
    def collective_rpc(self, method, kwargs):
        if self.breaks:
            next(kwargs["weights_iterator"])
            raise OSError("no room on rank 1")
        super().collective_rpc(method, kwargs)

llm = Breaking(sys.argv[1], enable_sleep_mode=False)  # before the group: it reads its model by itself
engine._import_vllm = lambda: SimpleNamespace(
    LLM=lambda **given: llm, SamplingParams=lambda **fields: fields, TokensPrompt=lambda prompt_token_ids: prompt_token_ids
)
with distributed.process_group(60):
    policy = Policy.load(ModelConfig(path=sys.argv[1])).shard()
    own = engine.VllmEngine(policy, VllmConfig(), "float32")
    own.start()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    llm.breaks = distributed.rank() == 1
    try:
        push_weights(policy, own, 1)
    except OSError as error:
        assert str(error) == "no room on rank 1"
    else:
        raise AssertionError("rank 1's engine broke unnoticed")
    llm.breaks = False
    push_weights(policy, own, 1)
    assert own.sync_metrics["sync/logp_difference"] < 1e-3 < own.sync_metrics["sync/logp_change"]
"""


def test_an_engine_that_breaks_in_the_middle_of_the_weights_stops_both_ranks_and_they_can_go_on(tiny_model):
    for status, err in two_ranks(ENGINES, tiny_model):
        assert status == 0, err[-3000:]


def test_a_server_does_not_see_what_torchrun_tells_this_rank(monkeypatch):
    told = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    told |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    seen = process.server_environment()
    assert not told.keys() & seen.keys()
    assert seen["PATH"] == os.environ["PATH"]
