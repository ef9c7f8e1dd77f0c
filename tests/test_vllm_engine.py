"""The real vLLM on a CPU: trained with, synced, killed. tests/vllm_env.sh makes an environment where none is skipped."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomli_w
import torch
from builders import config
from conftest import make_tiny_model
from runs import torchrun

from ampo_fast.metrics import read_metrics
from ampo_fast.model import Policy
from ampo_fast.random_streams import stream_seed
from ampo_fast.rollouts.engines import make_engine
from ampo_fast.stage_files import read_rows
from ampo_fast.types import Sampling
from ampo_fast.vllm.requests import BadAnswer, answer_room, read_candidate, request_fields

HERE = Path(__file__).parent
SMOLLM = "package:smollm2-135m-instruct"
needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed; tests/vllm_env.sh makes an environment that has it"
)


def run(*argv):
    env = os.environ | {"PYTHONPATH": str(HERE), "VLLM_CPU_KVCACHE_SPACE": "2"}
    done = subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def case(name, model, dtype="float32"):
    return run(str(HERE / "vllm_cases.py"), name, str(model), dtype)


# The other runs with SmolLM2, in CI, have a tied head.
@pytest.fixture(
    scope="module", params=[pytest.param(True, id="tied", marks=pytest.mark.slow), pytest.param(False, id="untied")]
)
def served_model(request, tmp_path_factory):
    return tiny_for_vllm(tmp_path_factory.mktemp("served"), tie_word_embeddings=request.param)


def tiny_for_vllm(folder, **settings):
    """A tiny model with attention heads of a size that vLLM's CPU kernels have."""
    return make_tiny_model(folder, hidden_size=128, intermediate_size=128, **settings)


def write_run(tmp_path, engine, steps=3, model=SMOLLM):
    rows = [
        {"id": f"t{i}", "prompt": f"Say one thing about {w}."} for i, w in enumerate(["tea", "sun", "rain", "wolf"])
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run": {"name": "r", "dir": str(tmp_path), "steps": steps, "trackers": [], "timeout_s": 300.0},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "model": {"path": str(model)},
        "rollout": {
            "engine": engine, "n": 4, "max_new_tokens": 24, "truncated": "keep",
            "options": {"enforce_eager": True, "max_model_len": 512},
        },
        "reward": {"kind": "toy_rewards:vowels"},
        "embed": {"model": "policy"},
        "select": {"k": 3},
        "optim": {"prompts_per_step": 2, "lr": 1e-4, "warmup_ratio": 0.0},
    }  # fmt: skip
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(values))
    return str(path)


def assert_engine_and_trainer_equal(run_dir):
    """-> the steps' metrics."""
    steps = [row for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]
    for row in steps:
        assert row["sync/logp_difference"] <= 0.001
        assert row["sync/logp_change"] > 10 * row["sync/logp_difference"]
        if row["staleness/max"] == 0:
            assert row["sampling/sampling_logp_difference/mean"] <= 0.001
    return steps


@needs_vllm
@pytest.mark.parametrize("engine", ["vllm", "vllm-server"])
def test_three_steps_of_training_keep_engine_and_trainer_equal(engine, tmp_path):
    summary = run("-m", "ampo_fast.cli", "train", write_run(tmp_path, engine))
    assert summary["steps"] == 3
    steps = assert_engine_and_trainer_equal(tmp_path / "r")
    assert [row["step"] for row in steps] == [1, 2, 3]
    # The server samples the next step's answers while this one is trained.
    assert [row["staleness/max"] for row in steps] == ([0, 1, 1] if engine == "vllm-server" else [0, 0, 0])


@needs_vllm
@pytest.mark.parametrize("engine", ["vllm", "vllm-server"])
def test_two_ranks_train_with_one_server_or_an_engine_each(engine, tmp_path):
    model = tiny_for_vllm(tmp_path / "model")  # SmolLM2 beside two trainers takes minutes on two cores
    summary = run(*torchrun(2)[1:], "-m", "ampo_fast.cli", "train", write_run(tmp_path, engine, steps=2, model=model))
    assert summary["steps"] == 2
    steps = assert_engine_and_trainer_equal(tmp_path / "r")
    assert [row["staleness/max"] for row in steps] == ([0, 1] if engine == "vllm-server" else [0, 0])
    assert [row["group/size"] for row in steps] == [4, 4]
    for number in (1, 2):
        assert len(read_rows(tmp_path / f"r/rollouts/step_{number:06d}.jsonl")) == 2


@needs_vllm
def test_vllm_has_the_weight_transfer_api_that_the_adapter_was_written_for():
    """Its shape alone: NCCL needs GPUs."""
    result = case("transfer", "-")
    assert result["missing_routes"] == []
    assert result["world_size"] == 3
    assert result["metadata"] == [["a.weight", "torch.bfloat16", [2, 3]]]


@needs_vllm
def test_every_sync_arrives_and_a_head_left_out_is_noticed(served_model):
    result = case("sync", served_model)
    assert max(result["gaps"]) <= 0.001
    assert max(result["canary"]) <= 0.001
    assert min(result["changes"]) > 0.01
    assert result["versions"] == [2]
    assert result["again"]
    assert result["crowd"] == [100, 100, 100]
    assert "trainer mean" in result["without_head"]


@needs_vllm
@pytest.mark.parametrize(
    ("model", "dtype", "limit"),
    [
        ("tiny", "bfloat16", 0.05),
        pytest.param(
            SMOLLM,
            "bfloat16",
            0.05,
            marks=[
                pytest.mark.slow,
                pytest.mark.xfail(
                    torch.backends.cpu.get_cpu_capability() != "AVX512",
                    reason="vLLM's own bfloat16 rounding: 0.054 was measured on a machine with AVX2",
                ),
            ],
        ),
        pytest.param(SMOLLM, "bfloat16:float16", 0.05, marks=pytest.mark.slow),
    ],
)
def test_half_precision_stays_within_what_it_must(model, dtype, limit, tmp_path):
    result = case("sync", tiny_for_vllm(tmp_path) if model == "tiny" else model, dtype)
    assert max(result["gaps"]) <= limit
    assert max(result["canary"]) <= limit


@pytest.mark.parametrize(
    ("trainer", "engine", "computes_in", "tolerance"),
    [
        ("float32", None, torch.float32, 0.001),
        ("bfloat16", None, torch.bfloat16, 0.15),
        ("bfloat16", "float16", torch.float16, 0.15),
        ("bfloat16", "float32", torch.float32, 0.15),
        ("float32", "float16", torch.float16, 0.15),
    ],
)
def test_the_engine_may_compute_in_a_type_of_its_own(tiny_model, trainer, engine, computes_in, tolerance):
    model = {"path": str(tiny_model), "dtype": trainer}
    options = {"dtype": engine, "base_urls": ["http://127.0.0.1:9"]}
    settings = config(model=model, rollout={"engine": "vllm-server", "options": options})
    made = make_engine(settings, Policy.load(settings.model))
    assert made.compute_dtype == computes_in
    assert made.canary.tolerance == tolerance


@needs_vllm
@pytest.mark.slow
def test_kill_9_of_a_real_server_during_generation_loses_nothing(served_model):
    result = case("kill", served_model)
    assert result["restarted"]
    assert result["sizes"] == [8, 8, 8]
    assert result["gap"] <= 0.001
    assert result["versions"] == [1]


@needs_vllm
@pytest.mark.slow
def test_a_real_server_that_ran_already_gets_our_weights(served_model):
    result = case("running", served_model)
    assert result["gap"] <= 0.001
    assert result["is_alive"]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
@pytest.mark.parametrize("engine", ["vllm", "vllm-server"])
def test_without_vllm_the_error_says_how_to_get_it(engine, tiny_policy):
    with pytest.raises(ValueError, match=r"pip install ampo_fast\[vllm\]"):
        make_engine(config(rollout={"engine": engine}), tiny_policy)


def test_a_request_states_everything_that_shapes_the_distribution(tiny_policy):
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=9, seed=3, step=4)
    fields = request_fields(tiny_policy, "p", 6, sampling)
    assert fields["seed"] == stream_seed(3, 4, "p") >> 1
    assert fields["seed"] + 1_000_000 < 2**63  # vLLM adds the candidate's index
    assert (fields["n"], fields["temperature"], fields["top_p"], fields["top_k"]) == (6, 0.7, 0.9, 5)
    assert fields["stop_token_ids"] == list(tiny_policy.stop_ids)
    assert request_fields(tiny_policy, "q", 6, sampling)["seed"] != fields["seed"]


@pytest.mark.parametrize(
    ("tokens", "logp", "reason", "match"),
    [
        ([20, 21], [-1.0, -1.0], "abort", "broken off"),
        ([20, 21], [-1.0], "length", "2 tokens with 1"),
        ([], [], "length", "0 tokens"),
        ([20, 10**6], [-1.0, -1.0], "length", "vocabulary"),
        ([20, 21], [-1.0, float("nan")], "length", "log-probs"),
        ([20, 21], [-1.0, 2.0], "length", "log-probs"),
        ([20, 21], [-1.0, -1.0], "stop", "end-of-turn"),
        ([1, 21], [-1.0, -1.0], "length", "end-of-turn"),
        ([20, 21, 22], [-1.0] * 3, "length", "3 tokens where the limit is 2"),
        ([20, 21, 1], [-1.0] * 3, "stop", "3 tokens where the limit is 2"),
        ([20], [-1.0], "length", "1 tokens where the limit is 2"),
    ],
)
def test_answers_that_contradict_themselves_are_refused(tiny_policy, tokens, logp, reason, match):
    with pytest.raises(BadAnswer, match=match):
        read_candidate(tiny_policy, tokens, logp, reason, room=2, version=0)


def test_a_whole_answer_is_read(tiny_policy):
    stop = tiny_policy.stop_ids[0]
    candidate = read_candidate(tiny_policy, [20, 21, stop], [-1.0, -0.1234567, 0.0], "stop", room=8, version=7)
    assert candidate.token_ids == (20, 21, stop)
    assert candidate.logp == (-1.0, -0.123457, 0.0)
    assert candidate.content == tiny_policy.decode([20, 21])
    assert (candidate.finish_reason, candidate.version) == ("stop", 7)


def test_an_answer_may_be_cut_where_the_context_ends():
    assert answer_room(range(5), 8, None) == 8
    assert answer_room(range(5), 8, 13) == 8
    assert answer_room(range(5), 8, 12) == 7
