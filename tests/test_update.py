"""The step over ranks and micro-batches, as far as one process can show it; test_distributed.py has the processes."""

import copy
import dataclasses

import pytest
import torch
from builders import config, scored

from ampo_fast.config import ModelConfig
from ampo_fast.model import Policy
from ampo_fast.packing import balanced_shares, group_tokens, idle_batch, packed_length, rank_micro_batches
from ampo_fast.types import SelectedGroup
from ampo_fast.update import Updater, _named_out_of_memory


def selected(i, lengths):
    group = scored([float(j) for j in range(len(lengths))], i, lengths=lengths)
    return SelectedGroup(scored=group, positive=(len(lengths) - 1,), negative=tuple(range(len(lengths) - 1)), cost=0.0)


def test_shares_are_balanced_complete_and_may_be_empty():
    weights = [9, 1, 1, 1, 5, 4]
    shares = balanced_shares(weights, 2)
    assert sorted(i for share in shares for i in share) == list(range(6))
    assert [sum(weights[i] for i in share) for share in shares] == [11, 10]
    assert balanced_shares([3], 3) == [[0], [], []]


def test_every_rank_has_as_many_micro_batches():
    groups = [selected(i, [4 + i, 5, 6]) for i in range(7)]
    for num_ranks in (1, 2, 3, 16):
        ranks = rank_micro_batches(groups, 40, num_ranks)
        assert len({len(batches) for batches in ranks}) == 1
        dealt = [g for batches in ranks for batch in batches for g in batch]
        assert sorted(g.scored.group.prompt.id for g in dealt) == [f"p{i}" for i in range(7)]
        assert all(sum(map(group_tokens, batch)) <= 40 for batches in ranks for batch in batches)
    assert rank_micro_batches(groups[:1], 40, 2) == [[[groups[0]]], [[]]]


@pytest.mark.parametrize("loss", ["AMPO", "REFADynamic", "DPO", "SimPO", "KTO", "PlackettLuce", "ORPO", "InfoNCA"])
def test_an_idle_rank_adds_exactly_nothing(tiny_policy, tiny_model, loss):
    sections = {"loss": {"name": loss, "nll_weight": 0.5}, "model": {"path": str(tiny_model)}}
    updater = Updater(config(**sections), tiny_policy)
    batch = idle_batch()
    if updater.loss_fn.uses_reference:
        batch = dataclasses.replace(batch, ref_logp_M=torch.zeros(2))
    value, _ = tiny_policy(batch, updater.loss_fn, float("inf"), eos_id=updater.eos_id)
    value.backward()
    assert value.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in tiny_policy.parameters())
    updater.optimizer.zero_grad()


def test_the_preflight_runs_the_longest_batch_and_changes_nothing(tiny_model):
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    before = copy.deepcopy(policy.state_dict())
    sections = {"rollout": {"max_new_tokens": 10}, "optim": {"prompts_per_step": 8, "micro_batch_tokens": 150}}
    updater = Updater(config(**sections), policy)
    assert updater.preflight(13) == 3 * packed_length(13, [10] * 4)  # three groups fit 150 tokens, four would not
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    assert all(p.grad is None for p in policy.parameters())
    assert not updater.optimizer.state


def test_out_of_memory_says_what_to_change():
    with pytest.raises(MemoryError, match=r"1 tokens.*micro_batch_tokens.*activation_checkpointing.*max_new_tokens"), (
        _named_out_of_memory(idle_batch())
    ):  # fmt: skip
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_activation_checkpointing_changes_no_gradient(tiny_model):
    grads = []
    for wanted in (False, True):
        policy = Policy.load(ModelConfig(path=str(tiny_model)))
        calls = count_calls(policy)
        if wanted:
            policy.checkpoint_activations()
        updater = Updater(config(), policy)
        loss, _ = policy(idle_batch(), updater.loss_fn, 1)
        loss.backward()
        grads.append([p.grad for p in policy.parameters()])
        assert len(calls) == (2 if wanted else 1)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def count_calls(policy):
    """Grows by one whenever the first block's MLP runs."""
    calls = []
    policy.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls
