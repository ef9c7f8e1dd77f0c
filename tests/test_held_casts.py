"""Weights of frozen layers are cast once a batch of candidates, and the candidates are those of autocast alone."""

import contextlib

import pytest
import torch
from builders import prompt
from torch.utils._python_dispatch import TorchDispatchMode

from ampo_fast.config import ModelConfig
from ampo_fast.model import Policy
from ampo_fast.rollouts import decoding
from ampo_fast.rollouts.decoding import TransformersEngine
from ampo_fast.types import Sampling


class CastWeights(TorchDispatchMode):
    """Counts the casts from float32 of matrices as large as the model's smallest frozen one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].ndim == 2 and args[0].numel() >= 512:
            self.count += (kwargs or {}).get("dtype") == torch.bfloat16
        return function(*args, **(kwargs or {}))


@pytest.fixture
def policy(tiny_model):
    pytest.importorskip("peft")  # imports triton, which test_kernels must be the first to do
    policy = Policy.load(ModelConfig(path=str(tiny_model), dtype="bfloat16", lora={"rank": 2}))
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            parameter.data += 0.1
    return policy


def sampled(policy, tokens):
    with CastWeights() as casts:
        groups = TransformersEngine(policy, 64).generate([prompt(0, "hi")], 2, Sampling(max_new_tokens=tokens))
    return [(c.token_ids, c.logp) for c in groups[0].candidates], casts.count


def test_a_frozen_weight_is_cast_once_for_all_tokens(policy):
    num_frozen = 2 * 7 + 1  # the linear layers of two blocks, and the head
    assert [sampled(policy, tokens)[1] for tokens in (3, 9)] == [num_frozen] * 2


def test_the_candidates_are_those_of_autocast_alone(policy, monkeypatch):
    held, _ = sampled(policy, 9)
    monkeypatch.setattr(decoding, "held_casts", lambda *args: contextlib.nullcontext())
    alone, num_casts = sampled(policy, 9)
    assert held == alone
    assert num_casts > 100


def test_what_is_put_in_is_taken_out_again_and_what_is_trained_stays(policy):
    with decoding.held_casts(policy.model, torch.bfloat16):
        patched = {name for name, module in policy.model.named_modules() if "forward" in vars(module)}
    assert len(patched) == 15
    assert not [name for name in patched if "lora_" in name]
    assert not [module for module in policy.model.modules() if "forward" in vars(module)]
