"""Everything stays on its device: whole runs where the CPU's tensors are refused, with the numbers of the CPU's own runs."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import second_device
import tomli_w
from conftest import make_tiny_model
from runs import environment, write_run
from test_reward_model import make_tiny_bert
from test_reward_model_training import write_pairs

from ampo_fast.metrics import read_metrics

HERE = Path(__file__).parent
PAIR = ["--select.strategy", "best_worst", "--select.k", "1"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return second_device.build(tmp_path_factory.mktemp("second"))


def finished(*command):
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def on_second(library, *command):
    finished(sys.executable, HERE / "second_device.py", library, *command)


def losses(config):
    rows = read_metrics(config.parent / "runs" / "r" / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("mix", ["x + y", "x.index_add_(0, y.long(), x.clone())", "torch.cat([x, y])", "y[x.long()]"])
def test_the_second_device_refuses_the_cpus_tensors(library, mix):
    lines = ["import sys, torch, second_device", "d = second_device.register(sys.argv[1])"]
    lines += ["x, y = torch.zeros(1, device=d), torch.zeros(1)", "x[y.long()]", mix]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), str(library)],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"line 5, .*RuntimeError: .*\bdevice\b", done.stderr, re.DOTALL), done.stderr


def test_sentences_are_encoded_on_the_device_and_their_vectors_are_the_cpus(library):
    code = """
import sys, torch, second_device
device = second_device.register(sys.argv[1])
from ampo_fast import distributed
from ampo_fast.embeddings import SentenceEncoder
texts = ["a cat sat", "it was a very long day for the cat", "x", "the sea " * 700]
on_cpu = SentenceEncoder("package:all-minilm-l6-v2", 2).embed(texts)
distributed.device = lambda: device
encoder = SentenceEncoder("package:all-minilm-l6-v2", 2)
seen = []
encoder.model.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state.device))
vectors = encoder.embed(texts)
assert seen and set(seen) == {device}, seen
assert vectors.device.type == "cpu"
torch.testing.assert_close(vectors, on_cpu, atol=1e-5, rtol=0)
"""
    finished(sys.executable, "-c", code, library)


@pytest.mark.parametrize(
    "options",
    [
        ["--embed.model", "package:all-minilm-l6-v2", "--optim.activation_checkpointing", "true"],
        # A group longer than a micro-batch: log-probs first, then the gradient.
        ["--loss.name", "REFADynamic", "--optim.micro_batch_tokens", "70"],
        ["--loss.name", "DPO", *PAIR, "--reference.every", "2", "--reference.decay", "0.5"],
        ["--model.lora.rank", "2", "--loss.name", "DPO", *PAIR],
    ],
    ids=["on-policy", "split groups", "moving reference", "lora"],
)
def test_a_resumed_run_stays_on_its_device_and_has_the_cpus_losses(library, tmp_path, tiny_model, options):
    config = write_run(tmp_path, tiny_model, run={"steps": 4, "trackers": []})
    finished(sys.executable, "-m", "ampo_fast.cli", "train", config, *options)
    expected = losses(config)
    shutil.rmtree(tmp_path / "runs/r/checkpoints/step_000004")
    for path in (tmp_path / "runs/r/rollouts").glob("step_000003*"):
        path.unlink()
    on_second(library, "train", config, *options, "--resume", "auto")
    assert losses(config) == pytest.approx(expected, rel=1e-3)
    assert losses(config) != expected  # the sums run in another order: it did train there


REWARD_RUN = """
import sys, torch, second_device
library, where = sys.argv[1:3]
from ampo_fast import distributed
if where == "second":
    device = second_device.register(library)
    distributed.device = lambda: device
from ampo_fast.config import load_config
from ampo_fast.reward_model.config import RewardModelConfig, RewardTrainingConfig
from ampo_fast.reward_model.model import RewardModel
from ampo_fast.reward_model.training import RewardTrainer, train_reward
config = load_config(sys.argv[3], sys.argv[4:], schema=RewardTrainingConfig)
update = RewardTrainer._update
def fall_over(self, step, items):
    if step == 12:
        raise InterruptedError
    update(self, step, items)
RewardTrainer._update = fall_over
try:
    train_reward(config)
except InterruptedError:
    RewardTrainer._update = update
    train_reward(config, resume=True)
parameters = RewardModel.load(RewardModelConfig(path=str(config.run_dir / "final"))).parameters()
assert {parameter.device for parameter in parameters} == {distributed.device()}
"""


@pytest.mark.parametrize(
    ("make", "model"),
    [(make_tiny_model, {"trained_blocks": 1}), (make_tiny_bert, {"trained_blocks": 0, "pooling": "mean"})],
    ids=["decoder", "encoder"],
)
def test_a_reward_model_trains_and_resumes_on_its_device(library, tmp_path, make, model):
    values = {
        "run": {"dir": str(tmp_path / "runs"), "epochs": 2, "trackers": []},
        "data": {"train": str(write_pairs(tmp_path / "pairs.jsonl")), "eval_share": 0.25, "max_tokens": 64},
        "model": {"path": str(make(tmp_path / "model"))} | model,
        "optim": {"prompts_per_step": 4, "lr": 3e-3, "micro_batch_tokens": 256},
    }
    (tmp_path / "reward.toml").write_text(tomli_w.dumps(values))
    rows = []
    for where in ("host", "second"):
        finished(sys.executable, "-c", REWARD_RUN, library, where, tmp_path / "reward.toml", "--run.name", where)
        found = read_metrics(tmp_path / "runs" / where / "metrics.jsonl")
        rows.append([row["loss"] for row in found if "loss" in row])
    assert len(rows[0]) == 18
    assert rows[1] == pytest.approx(rows[0], rel=1e-3)
    assert rows[1] != rows[0]  # the sums run in another order: it did train there


@pytest.mark.parametrize("options", [[], ["--model.lora.rank", "2"]], ids=["all parameters", "lora"])
def test_bfloat16_by_autocast_stays_on_its_device(library, tmp_path, tiny_model, options):
    config = write_run(
        tmp_path, tiny_model, run={"steps": 2, "trackers": []}, model={"path": str(tiny_model), "dtype": "bfloat16"}
    )
    on_second(library, "train", config, *options)
    assert len(losses(config)) == 2
    assert all(map(math.isfinite, losses(config)))
