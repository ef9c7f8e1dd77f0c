"""Real gloo processes under torchrun on the tiny model: ranks change nothing but the time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import runs
import torch
from runs import HERE, command, comparable, environment, reached, torchrun, workers, write_run
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from ampo_fast import distributed
from ampo_fast.checkpoint import checkpoint_dirs, load_checkpoint
from ampo_fast.config import ModelConfig, OptimConfig, load_config
from ampo_fast.model import Policy
from ampo_fast.optimizer import make_optimizer
from ampo_fast.packing import idle_batch
from ampo_fast.trainer import train

NO_EVAL = {"prompts": 0}
VARIANTS = {
    "ten": {"run": {"steps": 10}, "checkpoint": {"asynchronous": True}},
    # One group a step, so that in every step one of two ranks has nothing to train on.
    "idle": {"run": {"steps": 3}, "eval": NO_EVAL, "optim": {"prompts_per_step": 1}},
    "split": {"run": {"steps": 3}, "eval": NO_EVAL, "optim": {"micro_batch_tokens": 130}},
    "degenerate": {"run": {"steps": 2}, "eval": NO_EVAL, "reward": {"kind": "toy_rewards:constant"}},
    # A budget that some groups are longer than: their log-probs come first, in forwards that all ranks make.
    "reference": {
        "run": {"steps": 3}, "eval": NO_EVAL, "loss": {"name": "SWEPO"}, "optim": {"micro_batch_tokens": 60},
    },
    # Given pairs, whose reference log-probs are kept token by token; the third step's were computed by the first two.
    "given": {
        "run": {"steps": 3}, "eval": NO_EVAL, "loss": {"name": "BMC"}, "optim": {"micro_batch_tokens": 40},
        "rollout": {"engine": "data", "prompts_per_round": 0}, "reward": {"kind": "data"}, "select": {"k": 1},
    },
    # A rank with nothing to train on beside one whose pairs, of unlike lengths, run in two calls.
    "unshared": {
        "run": {"steps": 4}, "eval": NO_EVAL, "model": {"attention": "unshared"}, "optim": {"prompts_per_step": 1},
        "rollout": {"engine": "data", "prompts_per_round": 0}, "reward": {"kind": "data"}, "select": {"k": 1},
    },
    "bfloat16": {"run": {"steps": 2}, "eval": NO_EVAL, "model": {"dtype": "bfloat16"}},
    "recomputed": {"run": {"steps": 3}, "eval": NO_EVAL, "optim": {"activation_checkpointing": True}},
    "lora": {
        "run": {"steps": 3}, "eval": NO_EVAL, "loss": {"name": "SWEPO"}, "model": {"lora": {"rank": 4}},
        "optim": {"activation_checkpointing": True},
    },
}  # fmt: skip
if find_spec("peft") is None:
    del VARIANTS["lora"]


def write_variants(tmp_path, tiny_model):
    pairs = [{"id": f"g{i}", "prompt": f"q{i}", "chosen": "aei" * (i + 2), "rejected": "aexyz"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for name in ("given", "unshared"):
        VARIANTS[name]["data"] = {"train": str(tmp_path / "pairs.jsonl")}
    return {
        name: write_run(tmp_path, tiny_model, f"{name}.toml", **(v | {"run": v["run"] | {"name": name, "timeout_s": 300}}))
        for name, v in VARIANTS.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(tiny_model, tmp_path_factory):
    """Every variant trained by two processes; -> the directory of the runs."""
    root = tmp_path_factory.mktemp("two")
    configs = write_variants(root, tiny_model)
    argv = [*torchrun(2), str(HERE / "ranks.py"), *map(str, configs.values())]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [json.loads(line)["run_dir"] for line in done.stdout.splitlines()] == [
        str(root / "runs" / name) for name in VARIANTS
    ]
    return root / "runs"


@pytest.fixture(scope="module")
def one_rank(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each rank has: another number of threads sums in another order
    try:
        for path in write_variants(root, tiny_model).values():
            train(load_config(str(path)))
    finally:
        torch.set_num_threads(threads)
    return root / "runs"


def column(run_dir, name):
    return torch.tensor([row[name] for row in comparable(run_dir) if name in row], dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("degenerate", "bfloat16")])
def test_two_ranks_train_as_one(one_rank, two_ranks, name):
    for metric in ("loss", "grad_norm", "positive/logp", "negative/logp", "rewards/margins"):
        one, two = column(one_rank / name, metric), column(two_ranks / name, metric)
        assert len(one) == VARIANTS[name]["run"]["steps"]
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-7, msg=lambda m, metric=metric: f"{metric}: {m}")
    first = "rollouts/step_000001.jsonl"
    assert (two_ranks / name / first).read_bytes() == (one_rank / name / first).read_bytes()


def test_ranks_share_the_reference_log_probs_of_given_responses_each_computed_once(one_rank, two_ranks):
    found = []
    for root in (one_rank, two_ranks):
        (file,) = (root / "given/reference").glob("*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found.append((file.name, {(row["id"], row["index"]): row["logp"] for row in rows}))
        assert len(rows) == len(found[-1][1]) == 8
    (name, one), (same_name, two) = found
    assert name == same_name
    for key, logps in one.items():
        assert two[key] == pytest.approx(logps, rel=1e-5, abs=1e-6)


def test_the_metrics_of_two_ranks_have_the_names_and_values_of_one(one_rank, two_ranks):
    one, two = comparable(one_rank / "ten"), comparable(two_ranks / "ten")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in ("num_tokens", "group/trained", "reward", "completions/mean_length", "eval/reward", "epoch"):
            assert a.get(key) == b.get(key), key
        for key in ("eval/kl", "eval/entropy"):
            assert a.get(key) == (None if b.get(key) is None else pytest.approx(b[key], rel=1e-5, abs=1e-6))
    rows = [json.loads(line) for line in (two_ranks / "ten/eval/after.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["e0", "e1", "e2", "e3"]
    assert not list((two_ranks / "ten/rollouts").glob("*partial*"))


def test_degenerate_groups_skip_the_step_on_every_rank(two_ranks, tiny_model):
    rows = comparable(two_ranks / "degenerate")
    assert [row["group/trained"] for row in rows] == [0, 0]
    start, end = (load_file(Path(d) / "model.safetensors") for d in (tiny_model, two_ranks / "degenerate/final"))
    assert all(torch.equal(start[name], end[name]) for name in end)


def test_bfloat16_ranks_sample_what_they_train_and_keep_float32_checkpoints(two_ranks):
    # The replica and the shards compute in bfloat16 by different kernels; a wrong weight would be off by whole nats.
    difference = column(two_ranks / "bfloat16", "sampling/sampling_logp_difference/mean")
    assert len(difference)
    assert difference.max() < 0.02
    (_, newest) = checkpoint_dirs(two_ranks / "bfloat16/checkpoints")[-1]
    assert {t.dtype for shard in newest.glob("*.safetensors") for t in load_file(shard).values()} == {torch.float32}


def test_the_export_of_shards_is_the_checkpoint_and_loads_on_one_rank(two_ranks):
    run_dir = two_ranks / "ten"
    policy = Policy.load(ModelConfig(path=str(run_dir / "final")))
    exported = {name: p.clone() for name, p in policy.model.named_parameters()}
    (step, newest) = checkpoint_dirs(run_dir / "checkpoints")[-1]
    assert step == 10
    header = json.loads((newest / "state.json").read_text())
    assert header["world_size"] == 2
    assert header["crc32"].keys() == {shard.name for shard in newest.glob("*.safetensors")}
    assert len(header["crc32"]) == 2
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    optimizer = make_optimizer(policy.parameters(), OptimConfig())
    load_checkpoint(newest, policy, optimizer)
    assert all(torch.equal(exported[name], p) for name, p in policy.model.named_parameters())
    assert {float(optimizer.state[p]["step"]) for p in policy.parameters()} == {10.0}


@pytest.mark.skipif("lora" not in VARIANTS, reason="needs peft")
def test_the_adapter_of_two_ranks_is_that_of_one_and_loads_on_one(one_rank, two_ranks, tiny_model):
    one, two = (load_file(root / "lora/final/adapter/adapter_model.safetensors") for root in (one_rank, two_ranks))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    start, end = (load_file(Path(d) / "model.safetensors") for d in (tiny_model, two_ranks / "lora/final"))
    assert start.keys() == end.keys()
    assert sum(not torch.equal(start[name], end[name]) for name in end) == 14
    policy = Policy.load(ModelConfig(path=str(tiny_model), lora={"rank": 4}))
    (_, newest) = checkpoint_dirs(two_ranks / "lora/checkpoints")[-1]
    load_checkpoint(newest, policy, make_optimizer(policy.parameters(), OptimConfig()))  # the same hash of the base
    saved = {f"base_model.model.{n.replace('.default.', '.')}": p for n, p in policy.model.named_parameters()}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in two.items())


def test_two_to_one_to_four_ranks(two_ranks, tiny_model, tmp_path):
    """A checkpoint of two ranks, saved again by four, holds the same bits for one."""
    (_, newest) = checkpoint_dirs(two_ranks / "ten/checkpoints")[-1]
    argv = [*torchrun(4), str(HERE / "resave.py"), str(tiny_model), str(newest), str(tmp_path / "four")]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout)
    assert said["meta"] == [False, True, True, True]  # only rank 0 ever holds the whole model
    seen_by_four = torch.tensor(said["logp"])
    # bfloat16 would round -1234.56 to -1232: what the loss meets, and what is kept, is float32.
    assert said["bfloat16"]["ref"] == pytest.approx([-1234.56, -3.25], abs=1e-4)
    assert set(said["bfloat16"]["types"]) == {"torch.float32"}
    states = []
    for path in (newest, tmp_path / "four/step_000010"):
        policy = Policy.load(ModelConfig(path=str(tiny_model)))
        optimizer = make_optimizer(policy.parameters(), OptimConfig())
        load_checkpoint(path, policy, optimizer)
        # Their forward came after one without gradients, which leaves FSDP's root whole and deaf to what is loaded.
        torch.testing.assert_close(seen_by_four, policy.token_logp(idle_batch()), rtol=1e-5, atol=1e-6)
        moments = {f"{n}.{k}": v for n, p in policy.named_parameters() for k, v in optimizer.state[p].items()}
        states.append(dict(policy.named_parameters()) | moments)
    assert len(list((tmp_path / "four/step_000010").glob("*.safetensors"))) == 4
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# --- kills and other accidents ----------------------------------------------------------------------------------------


def start(config, *more):
    argv, env = command(config, *more, ranks=2)
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(running, run_dir, mark):
    deadline = time.monotonic() + 300
    while running.poll() is None and time.monotonic() < deadline and not reached(run_dir, mark):
        time.sleep(0.002)
    assert running.poll() is None, f"the run ended before {mark}: {running.communicate()[1][-2000:]}"


@pytest.mark.parametrize(
    ("mark", "victims"), [("step_000003.partial", [1]), ('"step": 4, "loss"', [0]), ("step_000006.partial", [0, 1])]
)
def test_kill_9_of_a_rank_and_resume_give_the_same_metrics_bit_for_bit(two_ranks, tiny_model, tmp_path, mark, victims):
    """While sampling, between an update and its checkpoint, and while the checkpoint of step 6 is written."""
    config = write_variants(tmp_path, tiny_model)["ten"]
    run_dir = tmp_path / "runs/ten"
    running = start(config)
    wait_for(running, run_dir, mark)
    ranks = workers(running.pid)
    for victim in victims:
        os.kill(ranks[victim], signal.SIGKILL)
    _, err = running.communicate(timeout=300)
    assert running.returncode != 0
    if victims == [1]:
        assert "rank 0 of 2 in step" in err
        assert "last seen: rank 1 in" in err
    resumed = start(config, "--resume", "auto")
    _, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, err[-4000:]
    assert comparable(run_dir) == comparable(two_ranks / "ten")
    for name in ("rollouts/step_000009.jsonl", "eval/after.jsonl"):
        assert (run_dir / name).read_bytes() == (two_ranks / "ten" / name).read_bytes()


def test_a_rank_that_hangs_is_named_with_its_phase(tiny_model, tmp_path):
    config = write_run(tmp_path, tiny_model, run={"steps": 50, "timeout_s": 20.0}, eval=NO_EVAL)
    running = start(config)
    wait_for(running, tmp_path / "runs/r", '"step": 1, "loss"')
    ranks = workers(running.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and 0 in workers(running.pid):
        time.sleep(0.1)
    os.kill(ranks[1], signal.SIGKILL)
    _, err = running.communicate(timeout=120)
    assert re.search(r"rank 0 of 2 in step \d+, \w+: another rank stopped, or did not answer within 20 s", err)
    assert re.search(r"last seen: rank 1 in step \d+, \w+", err)


def test_sigterm_to_one_rank_stops_all_with_a_checkpoint_and_one_rank_goes_on(two_ranks, tiny_model, tmp_path):
    config = write_variants(tmp_path, tiny_model)["ten"]
    run_dir = tmp_path / "runs/ten"
    running = start(config)
    wait_for(running, run_dir, '"step": 1, "loss"')
    os.kill(workers(running.pid)[1], signal.SIGTERM)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err[-4000:]
    assert json.loads(out.splitlines()[-1])["stopped"] == "SIGTERM"
    train(load_config(str(config)), resume=True)  # by one rank: equal within rounding
    for metric in ("loss", "eval/reward"):
        torch.testing.assert_close(column(run_dir, metric), column(two_ranks / "ten", metric), rtol=1e-5, atol=1e-7)


def rank_process(code, **env):
    values = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", **env}
    return subprocess.Popen(
        [sys.executable, "-c", f"from ampo_fast import distributed\nwith distributed.process_group({code}): pass"],
        env=environment() | values, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_missing_rank_is_named(free_port):
    _, err = rank_process("3", RANK="0", MASTER_PORT=free_port).communicate(timeout=120)
    assert "TimeoutError: rank 0 waited 3 s (run.timeout_s) for rank 1 of 2" in err


def test_a_missing_rank_0_is_named(free_port):
    _, err = rank_process("2", RANK="1", MASTER_PORT=free_port).communicate(timeout=120)
    assert f"ConnectionError: rank 1 of 2 found nobody at MASTER_ADDR:MASTER_PORT = 127.0.0.1:{free_port}" in err


def test_a_duplicated_rank_is_named(free_port):
    main = rank_process("60", RANK="0", MASTER_PORT=free_port, WORLD_SIZE="3")
    twins = [rank_process("60", RANK="1", MASTER_PORT=free_port, WORLD_SIZE="3") for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while all(twin.poll() is None for twin in twins) and time.monotonic() < deadline:
            time.sleep(0.05)
        ended = [twin.communicate()[1] for twin in twins if twin.poll() is not None]
        assert len(ended) == 1
        assert "RANK = 1 of 3 is claimed by" in ended[0]
    finally:
        for process in (main, *twins):
            process.kill()
            process.wait()


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2 is not one of WORLD_SIZE = 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": ""}, "without MASTER_ADDR"),
    ],
)
def test_an_environment_that_is_no_group_is_refused(monkeypatch, values, message):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), distributed.process_group(5):
        pass


ROUTED = """
import torch
from torch import nn
from ampo_fast import distributed

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
    def forward(self, x, chosen):
        return sum(self.experts[i](x).sum() for i in chosen)

with distributed.process_group(60):
    model = nn.Sequential(Experts())
    model.forward = lambda x, chosen: model[0](x, chosen)
    distributed.shard(model, [model[0]], torch.float32, ())
    rank = distributed.rank()
    model(torch.full((2, 4), 1.0 + rank), [[0, 1], [0, 2]][rank]).backward()
    got = [distributed.whole(expert.weight.grad)[0, 0].item() for expert in model[0].experts]
    assert got == [6.0, 2.0, 4.0], got
"""


@pytest.mark.skipif(not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="needs a newer torch than 2.11")
def test_experts_that_one_rank_alone_uses_get_their_own_gradient():
    for status, err in runs.two_ranks(ROUTED):
        assert status == 0, err[-2000:]


def test_a_torch_that_would_mix_up_the_gradients_of_such_experts_is_refused():
    older = """
from torch.distributed.fsdp import FSDPModule
if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
    del FSDPModule.set_reduce_scatter_unused_params
"""
    checked = ROUTED.replace("    got =", "    distributed.check_gradients(model)\n    got =")
    for status, err in runs.two_ranks(older + checked):
        assert status != 0
        assert "used different parameters of the model (0.experts.1.weight, 0.experts.2.weight, ...)" in err


def test_without_torchrun_there_is_one_rank_and_nothing_to_wait_for(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with distributed.process_group(5):
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        assert distributed.all_gather("a") == distributed.gather("a") == ["a"]
        assert distributed.on_main(lambda: 3) == distributed.from_main(3) == 3
