"""Responses with a prompt each: padded to like lengths, and as if each had run alone."""

import pytest
import torch
from conftest import make_tiny_model
from test_model import RAGGED

from ampo_fast import distributed, unshared
from ampo_fast.config import ModelConfig
from ampo_fast.model import Policy
from ampo_fast.packing import pack_responses
from ampo_fast.unshared import padded_calls

BATCH = pack_responses(RAGGED, [range(len(g.candidates)) for g in RAGGED])
KINDS = {
    "mamba": {"state_size": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2, "num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_models_that_cannot_share_a_prompt_do_not_see_the_padding(tmp_path, monkeypatch, kind):
    """State spaces, windows and convolutions."""
    policy = Policy.load(ModelConfig(path=str(make_tiny_model(tmp_path / "m", kind, **KINDS[kind]))))
    assert not policy.is_shared
    model, alone = policy.model.base_model, []
    for group in RAGGED:
        for candidate in group.candidates:
            ids = torch.tensor([[*group.prompt_ids, *candidate.token_ids]])
            alone.append(model(input_ids=ids).last_hidden_state[0, len(group.prompt_ids) - 1 : -1])
    run, ran = unshared._run, []
    monkeypatch.setattr(unshared, "_run", lambda model, ids: ran.append(tuple(ids.shape)) or run(model, ids))
    got = unshared.hidden_rows(policy.model, BATCH, is_sharded=False, max_padded=100.0)
    assert ran == [(6, 11)]
    torch.testing.assert_close(got, torch.cat(alone), atol=2e-5, rtol=1e-5)


def test_calls_hold_like_lengths_and_every_sequence_once():
    lengths = [100, 9, 10, 98, 10, 31, 1]
    calls = padded_calls(lengths)
    assert calls == [[0, 3], [5], [2, 4, 1], [6]]
    assert padded_calls(lengths, 1.0) == [[0], [3], [5], [2, 4], [1], [6]]
    for call in calls:
        assert lengths[call[0]] * len(call) <= 1.25 * sum(lengths[i] for i in call)


def test_a_rank_with_fewer_calls_makes_up_for_them_and_changes_nothing(tiny_policy, monkeypatch):
    own = len(padded_calls([5, 11, 8, 6, 8, 8]))
    monkeypatch.setattr(distributed, "all_gather", lambda count: [count, count + 2])
    ran, grads, rows = [], [], []
    hook = tiny_policy.model.base_model.register_forward_pre_hook(lambda *_: ran.append(1))
    for is_sharded in (False, True):
        ran.clear()
        rows.append(unshared.hidden_rows(tiny_policy.model, BATCH, is_sharded))
        assert len(ran) == own + 2 * is_sharded
        rows[-1].square().sum().backward()
        grads.append([p.grad.clone() for p in tiny_policy.parameters() if p.grad is not None])
        tiny_policy.zero_grad()
    hook.remove()
    assert torch.equal(*rows)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
