"""Sleep of the in-process engine: the order of the calls, against a stand-in of vllm.LLM that minds what is in memory."""

from types import SimpleNamespace

import pytest
import torch
from builders import prompt
from fake_vllm import Server

from ampo_fast.config import ModelConfig
from ampo_fast.engine_config import VllmConfig
from ampo_fast.evaluation import response_logp
from ampo_fast.model import Policy
from ampo_fast.types import Sampling
from ampo_fast.vllm.engine import VllmEngine, sleep_level
from ampo_fast.weight_sync import push_weights

PROMPTS = [prompt(0, "say tea"), prompt(1, "say sun")]
SAMPLING = Sampling(max_new_tokens=6)
ALL = {"weights", "kv_cache"}


class SleepyLLM:
    """Has a model of its own, and refuses what vLLM could not do with the memory that it has at the moment."""

    def __init__(self, model, enable_sleep_mode, **given):
        self.server, self.can_sleep = Server(model), enable_sleep_mode
        self.awake, self.calls, self.given = set(ALL), [], given
        self.model_config = SimpleNamespace(max_model_len=512)

    def sleep(self, level):
        assert self.can_sleep
        assert self.awake == ALL
        self.awake = set()
        if level == 2:
            with torch.no_grad():
                for parameter in self.server.policy.parameters():
                    parameter.zero_()
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags=None):
        woken = ALL if tags is None else set(tags)
        assert not woken & self.awake
        self.awake |= woken
        self.calls.append("wake " + ", ".join(sorted(woken)))

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        assert "weights" in self.awake
        self.server.policy.model.load_state_dict(dict(kwargs["weights_iterator"]))
        self.calls.append("reload")

    def reset_prefix_cache(self):
        self.calls.append("forget")
        return self.awake == ALL

    def generate(self, prompts, params, use_tqdm):
        assert self.awake == ALL
        params = params if isinstance(params, list) else [params]
        self.calls.append("generate")
        return [self._answer(ids, fields) for ids, fields in zip(prompts, params, strict=True)]

    def _answer(self, ids, fields):
        if "prompt_logprobs" in fields:
            (choice,) = self.server.score(ids)["choices"]
            rows = [row and {int(t): SimpleNamespace(**v) for t, v in row.items()} for row in choice["prompt_logprobs"]]
            return SimpleNamespace(prompt_logprobs=rows)
        parts = [
            SimpleNamespace(
                index=choice["index"], token_ids=choice["token_ids"], finish_reason=choice["finish_reason"],
                logprobs=[
                    {token: SimpleNamespace(logprob=min(logp, 0.0))}
                    for token, logp in zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
                ],
            )
            for choice in self.server.sample(fields | {"prompt": ids})["choices"]
        ]  # fmt: skip
        return SimpleNamespace(outputs=parts)


@pytest.fixture
def policy(tiny_model):
    return Policy.load(ModelConfig(path=str(tiny_model)))


@pytest.fixture
def make(policy, monkeypatch):
    stand_in = SimpleNamespace(
        LLM=SleepyLLM, SamplingParams=lambda **fields: fields, TokensPrompt=lambda prompt_token_ids: prompt_token_ids
    )
    monkeypatch.setattr("ampo_fast.vllm.engine._import_vllm", lambda: stand_in)

    def build(level):
        engine = VllmEngine(policy, VllmConfig(), "float32")
        engine.sleep_level = level  # as it would be on CUDA
        return engine

    return build


def one_round(engine, policy, version):
    """Samples in two calls, lets the engine rest, trains, syncs; -> what the engine was asked to do meanwhile."""
    calls = engine._llm.calls if engine._llm else []
    before = len(calls)
    kept = []
    groups = [group for one in PROMPTS for group in engine.generate([one], 3, SAMPLING, kept.extend)]
    assert kept == groups
    logp = torch.tensor([value for group in groups for candidate in group.candidates for value in candidate.logp])
    torch.testing.assert_close(response_logp(policy, groups, 100), logp, atol=1e-4, rtol=0)
    engine.rest()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    push_weights(policy, engine, version)
    assert engine.sync_metrics["sync/logp_difference"] < 1e-3 < engine.sync_metrics["sync/logp_change"]
    return engine._llm.calls[before:]


CHECK = ["generate", "generate"]
SYNC = ["wake weights", "reload", "wake kv_cache", "forget", *CHECK]


@pytest.mark.parametrize("level", [1, 2])
def test_it_sleeps_while_others_train_and_wakes_for_the_weights_first(make, policy, level):
    engine = make(level)
    assert one_round(engine, policy, 1) == [*CHECK, "generate", "generate", f"sleep {level}", *SYNC]
    assert one_round(engine, policy, 2) == ["generate", "generate", f"sleep {level}", *SYNC]


def test_it_never_sleeps_at_level_0(make, policy):
    engine = make(0)
    one_round(engine, policy, 1)
    assert one_round(engine, policy, 2) == ["generate", "generate", "reload", "forget", *CHECK]


@pytest.mark.parametrize(("level", "woken"), [(1, ["wake kv_cache, weights"]), (2, SYNC[:4])])
def test_asked_again_without_a_sync_it_has_the_weights_that_it_slept_with(make, policy, level, woken):
    engine = make(level)
    one_round(engine, policy, 1)
    engine.rest()
    engine.rest()  # sleeps already
    engine.start()
    assert engine._llm.calls[-(3 + len(woken)) :] == [f"sleep {level}", *woken, *CHECK]
    one_round(engine, policy, 2)


def test_an_engine_that_was_never_asked_has_nothing_to_give_back(make):
    engine = make(2)
    engine.rest()
    assert engine._llm is None


def test_a_gpu_forgets_the_weights_by_default_and_a_cpu_refuses(make, policy):
    assert [sleep_level(VllmConfig(), device) for device in ("cuda", "cpu")] == [2, 0]
    assert [sleep_level(VllmConfig(sleep_level=level), "cuda") for level in (0, 1, 2)] == [0, 1, 2]
    assert sleep_level(VllmConfig(sleep_level=0), "cpu") == 0
    with pytest.raises(ValueError, match=r"rollout\.options\.sleep_level = 1: .* a cpu; set it to 0"):
        VllmEngine(policy, VllmConfig(sleep_level=1), "float32")


@pytest.mark.parametrize("is_trusted", [False, True])
def test_code_that_comes_with_the_model_is_run_only_where_it_was_asked_for(make, policy, is_trusted):
    policy.trust_remote_code = is_trusted
    engine = make(0)
    engine.start()
    assert engine._llm.given["trust_remote_code"] is is_trusted


def test_a_context_too_short_for_the_canary_is_refused_before_anything_is_started(policy):
    with pytest.raises(ValueError, match=r"rollout\.options\.max_model_len = 256: "):
        VllmEngine(policy, VllmConfig(max_model_len=256), "float32")
