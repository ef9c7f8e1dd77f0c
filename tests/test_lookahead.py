"""Rounds sampled ahead of the training: on a thread, of one version, kept when something breaks."""

import copy
import itertools
import sys
import threading
import time
from pathlib import Path

import pytest
from builders import config, prompt
from runs import write_run

from ampo_fast.config import load_config
from ampo_fast.embeddings import make_embedder
from ampo_fast.metrics import read_metrics
from ampo_fast.progress import TrainingProgress
from ampo_fast.rewards import make_reward
from ampo_fast.rollouts.decoding import TransformersEngine
from ampo_fast.rollouts.lookahead import Lookahead
from ampo_fast.rollouts.protocol import IncompleteBatch
from ampo_fast.rollouts.rounds import RoundMaker
from ampo_fast.sampler import PromptSampler
from ampo_fast.stage_files import read_rows
from ampo_fast.trace import TRACE_FILE, Trace, read_spans
from ampo_fast.trainer import train
from ampo_fast.vllm import process

HERE = Path(__file__).parent
PROMPTS = [prompt(i, f"say {word}") for i, word in enumerate(["tea", "sun", "rain", "wind"])]


class SlowEngine(TransformersEngine):
    """Answers as servers do, on any thread, once `gate` is open; breaks off after `whole` prompts where that is not None."""

    answers_singly = answers_for_all = True

    def __init__(self, policy):
        super().__init__(copy.deepcopy(policy), 64)  # as a server's: the main thread runs the policy meanwhile
        self.gate, self.whole, self.asked = threading.Event(), None, []
        self.threads = set()

    def generate(self, prompts, n, sampling, keep=None):
        self.threads.add(threading.current_thread().name.rpartition("_")[0])
        assert self.gate.wait(20)
        self.asked.append([prompt.id for prompt in prompts])
        groups = []
        for one in prompts[: self.whole]:
            groups += super().generate([one], n, sampling, keep)
        if self.whole is None:
            return groups
        raise IncompleteBatch("the server is gone")


def rounds(engine, policy, folder, steps=3):
    settings = config(
        run={"steps": steps}, reward={"kind": "toy_rewards:vowels"}, embed={"model": "policy"}, optim={"prompts_per_step": 2},
        rollout={"engine": "vllm-server", "n": 4, "max_new_tokens": 6, "truncated": "keep"},
    )  # fmt: skip
    embedder = make_embedder(settings, policy)
    sampler, reward = PromptSampler(PROMPTS, 2, 0), make_reward(settings, embedder)
    return RoundMaker(settings, policy, engine, sampler, reward, embedder, folder, [], Trace(folder / TRACE_FILE))


@pytest.fixture
def progress():
    with TrainingProgress(3, 0) as progress:
        yield progress


def versions(selected):
    return {c.version for s in selected for c in s.scored.group.candidates}


def test_the_next_round_is_made_while_this_one_is_trained_and_no_further(tiny_policy, tmp_path, progress):
    engine = SlowEngine(tiny_policy)
    engine.gate.set()
    made = rounds(engine, tiny_policy, tmp_path)
    for step in range(3):
        assert versions(made.selected(step, step, progress)) == {max(0, step - 1)}
        made.wait(progress)
        engine.version = step + 1
    assert len(engine.asked) == 3  # no fourth round: the run ends
    assert engine.threads == {"MainThread".rpartition("_")[0], "rollouts"}
    made.close()


def test_weights_wait_for_the_requests_under_way(tiny_policy, tmp_path, progress):
    engine = SlowEngine(tiny_policy)
    engine.gate.set()
    made = rounds(engine, tiny_policy, tmp_path)
    made.selected(0, 0, progress)
    made.wait(progress)
    engine.gate.clear()
    made.selected(1, 1, progress)  # comes back although the third round is not answered
    opener = threading.Timer(0.3, engine.gate.set)
    opener.start()
    started = time.monotonic()
    made.wait(progress)
    assert time.monotonic() - started > 0.2
    assert engine.gate.is_set()
    made.selected(2, 2, progress)
    metrics = made.overlap_metrics
    assert 0 < metrics["overlap/hidden_s"] < metrics["overlap/generate_s"]
    spans = read_spans(tmp_path / TRACE_FILE)
    assert [span["name"] for span in spans if span["lane"] == "rollouts"] == ["generate round 2", "generate round 3"]
    made.close()


def test_what_breaks_ahead_is_raised_where_it_is_waited_for_and_what_was_finished_stays(
    tiny_policy, tmp_path, progress
):
    engine = SlowEngine(tiny_policy)
    engine.gate.set()
    made = rounds(engine, tiny_policy, tmp_path)
    made.selected(0, 0, progress)
    made.wait(progress)
    engine.whole = 1
    made.selected(1, 1, progress)
    with pytest.raises(IncompleteBatch, match="the server is gone"):
        made.wait(progress)
    with pytest.raises(IncompleteBatch, match="the server is gone"):
        made.selected(2, 2, progress)
    made.close()
    kept = [row["id"] for row in read_rows(tmp_path / "step_000003.partial.jsonl")]
    assert len(kept) == 1
    engine.whole, engine.version = None, 2
    again = rounds(engine, tiny_policy, tmp_path)
    assert versions(again.selected(2, 2, progress)) == {0, 2}  # the one that was finished, and the other made anew
    assert engine.asked[-1] == [id for id in engine.asked[-2] if id not in kept]
    again.close()


def test_rounds_left_by_a_stopped_run_are_not_made_again(tiny_policy, tmp_path, progress):
    engine = SlowEngine(tiny_policy)
    engine.gate.set()
    first = rounds(engine, tiny_policy, tmp_path)
    expected = [first.selected(i, i, progress) for i in range(3)]
    first.close()
    engine.asked.clear()
    again = rounds(engine, tiny_policy, tmp_path)
    for i in range(3):
        groups = again.selected(i, i, progress)
        assert [g.scored.group.candidates for g in groups] == [g.scored.group.candidates for g in expected[i]]
    assert engine.asked == []
    again.close()


def test_two_rounds_ahead_are_refused():
    ahead = Lookahead(Trace(None))
    ahead.begin(1, list)
    with pytest.raises(ValueError, match="round 1 was made ahead and not taken; round 2"):
        ahead.begin(2, list)
    assert ahead.take(2) is None
    assert ahead.take(1).groups == []
    ahead.close()


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_an_engine_that_shares_the_trainers_cores_cannot_be_ahead(engine):
    with pytest.raises(ValueError, match=r'max_staleness = 1 needs .*set rollout\.engine = "vllm-server" or'):
        config(rollout={"engine": engine, "max_staleness": 1})
    assert config(rollout={"engine": engine}).max_staleness == 0
    assert config(rollout={"engine": "vllm-server"}).max_staleness == 1
    assert config(rollout={"engine": "vllm-server", "max_staleness": 0}).max_staleness == 0


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_tells_how_stale_its_answers_are(tiny_model, tmp_path, monkeypatch, max_staleness):
    monkeypatch.setenv("FAKE_VLLM_DIR", str(tmp_path))
    fake = [sys.executable, str(HERE / "fake_vllm.py"), "--model", str(tiny_model), "--port"]
    monkeypatch.setattr(process, "serve_command", lambda *a: lambda port: [*fake, str(port)])
    path = write_run(
        tmp_path, tiny_model, run={"steps": 4}, checkpoint={"every": 0}, eval={"prompts": 0},
        rollout={"engine": "vllm-server", "prompts_per_round": 2, "max_staleness": max_staleness},
    )  # fmt: skip
    train(load_config(str(path)))
    steps = read_metrics(tmp_path / "runs" / "r" / "metrics.jsonl")
    ages = [0, 1, 1, 1] if max_staleness else [0, 0, 0, 0]
    assert [row["staleness/max"] for row in steps] == ages
    assert [row["staleness/mean"] for row in steps] == ages
    for row, age in zip(steps, ages, strict=True):
        gap = row[f"{'staleness/logp_difference' if age else 'sampling/sampling_logp_difference'}/mean"]
        assert gap > 0.01 if age else gap < 5e-4
        assert ("sampling/sampling_logp_difference/mean" in row) == (not age)
        assert ("overlap/generate_s" in row) == bool(age)
    spans = read_spans(tmp_path / "runs" / "r" / TRACE_FILE)
    lanes = {lane: [s for s in spans if s["lane"] == lane] for lane in ("trainer", "rollouts")}
    assert len(lanes["rollouts"]) == (3 if max_staleness else 0)
    assert {"generate", "score", "forward_backward", "sync"} <= {span["name"] for span in lanes["trainer"]}
    syncs = [span for span in lanes["trainer"] if span["name"] == "sync"]
    for sync, made in itertools.product(syncs, lanes["rollouts"]):
        assert sync["end"] <= made["start"] + 1e-3 or sync["start"] >= made["end"] - 1e-3
