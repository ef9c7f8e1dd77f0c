"""The step over ranks and micro-batches, as far as one process can show it; test_distributed.py has the processes."""

import copy
import dataclasses
import math
import shutil

import pytest
import torch
from builders import config, scored

from ampo_fast import distributed
from ampo_fast.config import ModelConfig
from ampo_fast.model import Policy
from ampo_fast.packing import MicroBatch, balanced_shares, group_tokens, idle_batch, packed_length, rank_micro_batches
from ampo_fast.progress import TrainingProgress
from ampo_fast.step_metrics import sharing_metrics
from ampo_fast.types import SelectedGroup
from ampo_fast.update import Updater


def selected(i, lengths):
    group = scored([float(j) for j in range(len(lengths))], i, lengths=lengths)
    return SelectedGroup(scored=group, positive=(len(lengths) - 1,), negative=tuple(range(len(lengths) - 1)), cost=0.0)


def ended(group, token):
    """The group with this as the last token of every other candidate."""
    scored_group = group.scored
    candidates = [
        dataclasses.replace(c, token_ids=(*c.token_ids[:-1], token)) if i % 2 else c
        for i, c in enumerate(scored_group.group.candidates)
    ]
    whole = dataclasses.replace(scored_group.group, candidates=tuple(candidates))
    return dataclasses.replace(group, scored=dataclasses.replace(scored_group, group=whole))


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
        dealt = [g for batches in ranks for batch in batches for g in batch.groups]
        assert sorted(g.scored.group.prompt.id for g in dealt) == [f"p{i}" for i in range(7)]
        assert all(sum(group_tokens(g, 40) for g in batch.groups) <= 40 for batches in ranks for batch in batches)
    assert rank_micro_batches(groups[:1], 40, 2) == [[MicroBatch((groups[0],))], [MicroBatch()]]


def gradients(policy, updater, groups, budget):
    """(loss, trained groups by prompt, gradient of every parameter) of the groups under a budget of tokens."""
    plans = rank_micro_batches(groups, budget, 1)
    loss, mine, num_tokens = updater._backward(plans, len(groups), TrainingProgress(1))
    assert num_tokens == sum(group_tokens(group, budget) for group in groups)
    grads = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    updater.optimizer.zero_grad()
    return loss.item(), mine, grads, plans[0]


SPLIT_LOSSES = {
    "AMPO": {"beta": 0.5},
    "REFADynamic": {"beta": 0.5, "eos_penalty": "budgeted", "eos_lambda": 30.0, "eos_budget": 6},
    "BMC": {"beta": 0.2, "delta": 0.5},
    "SWEPO": {},
    "DPO": {},
    "PlackettLuce": {"beta": 0.1},
}


@pytest.mark.parametrize("name", SPLIT_LOSSES)
def test_a_group_in_parts_has_the_gradient_of_the_whole(tiny_model, name):
    loss = {"name": name, "params": SPLIT_LOSSES[name], "nll_weight": 0.1}
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    updater = Updater(config(loss=loss, model={"path": str(tiny_model)}), policy)
    if updater.reference is not None:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    # One candidate is not selected, but counts in its group's baseline.
    first = dataclasses.replace(selected(0, [3, 9, 12, 5, 6]), positive=(3,), negative=(0, 1, 2))
    groups = [first, selected(1, [2, 4]), selected(2, [13, 1, 7])]
    groups = [ended(group, policy.stop_ids[0]) for group in groups]  # else an EOS penalty is of nothing
    whole_loss, whole, whole_grads, plan = gradients(policy, updater, groups, 100)
    assert [len(micro.groups) for micro in plan] == [3]
    split_loss, split, split_grads, plan = gradients(policy, updater, groups, 17)
    assert [micro.part for micro in plan] == [(3, 0), (1,), (2,), (), (2,), (0, 1)]
    assert split_loss == pytest.approx(whole_loss, rel=1e-6)
    by_value = [sorted((g.positive, g.negative) for g in groups) for groups in (whole, split)]
    for (a, b), (c, d) in zip(*by_value, strict=True):
        assert (a, b) == (pytest.approx(c, rel=1e-6), pytest.approx(d, rel=1e-6))
    scale = max(g.abs().max().item() for g in whole_grads.values())
    assert scale > 1e-6
    for key, grad in whole_grads.items():
        torch.testing.assert_close(split_grads[key], grad, atol=2e-6 * scale, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


def test_a_response_over_the_budget_names_the_prompt_and_the_way_out():
    said = r"prompt p3 \(4 tokens\) and one response of 12 pack to 15 .*micro_batch_tokens = 14"
    with pytest.raises(ValueError, match=said):
        rank_micro_batches([selected(3, [3, 12])], 14, 1)


def test_gradients_are_reduced_over_ranks_in_the_last_micro_batch_alone(tiny_model, monkeypatch):
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    updater, wanted = Updater(config(), policy), []
    monkeypatch.setattr(
        distributed, "sync_gradients", lambda module, is_last: wanted.append((module is policy, is_last))
    )
    *_, plan = gradients(policy, updater, [selected(0, [3, 9, 12, 5]), selected(1, [2, 4]), selected(2, [3, 1])], 20)
    assert len(plan) > 2
    assert wanted == [(True, False)] * (len(plan) - 1) + [(True, True)]


def test_three_steps_without_a_finite_gradient_in_a_row_end_the_run(tiny_model):
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    updater, weight = Updater(config(), policy), policy.head.weight

    def step(scale):
        before = weight.detach().clone()
        with torch.no_grad():
            weight[7, 3] = scale
        updater.step([selected(0, [3, 9, 6])], 0, TrainingProgress(1), is_comparable=False)
        assert torch.equal(weight[:7], before[:7]) == math.isnan(scale)

    for scale in (math.nan, math.nan, 0.1, math.nan, math.nan):
        step(scale)
    with pytest.raises(ValueError, match=r"3 steps in a row.*optim\.lr"):
        step(math.nan)


def test_the_reference_moves_on_steps_without_a_trained_group(tiny_model):
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    sections = {"model": {"path": str(tiny_model)}, "loss": {"name": "DPO"}, "reference": {"every": 2}}
    updater = Updater(config(**sections), policy)
    with torch.no_grad():
        policy.head.weight.add_(0.1)
    skipped = dataclasses.replace(selected(0, [3, 4]), skip_reason="none")
    own, reference = policy.head.weight, updater.reference.model.head.weight
    for step in (0, 1):
        metrics = updater.step([skipped], step, TrainingProgress(1), is_comparable=False)
        assert torch.equal(own, reference) == (step == 1)
    assert metrics["num_tokens"] == 0


def test_wasted_tokens_are_those_that_run_beside_the_trained_ones():
    groups = [selected(0, [3, 5]), selected(1, [2, 6])]  # 4 + 2 + 4 and 4 + 1 + 5 packed tokens
    whole, split = rank_micro_batches(groups, 100, 1), rank_micro_batches(groups[:1], 8, 1)
    wasted = {
        name: sharing_metrics(plans, is_shared, is_recomputed)["perf/wasted_tokens"]
        for name, plans, is_shared, is_recomputed in (
            ("shared", whole, True, False), ("recomputed", whole, True, True), ("split", split, True, False),
            ("unshared", whole, False, False), ("unshared and recomputed", whole, False, True),
        )
    }  # fmt: skip
    # Alone they are 6 + 8 and 5 + 9 tokens; 9, 8 and 6 pad to 27, and 5 runs by itself.
    assert wasted == {
        "shared": 0, "recomputed": 20, "split": 14, "unshared": 32 - 20, "unshared and recomputed": 64 - 20,
    }  # fmt: skip


def test_an_idle_rank_adds_exactly_nothing(tiny_policy, tiny_model):
    updater = Updater(config(model={"path": str(tiny_model)}), tiny_policy)
    batch = idle_batch()
    value, _ = tiny_policy(batch, updater._no_gradient(batch), 1)
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
    assert updater.preflight(130) == packed_length(130, [10] * 2)  # a group of four would be split
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    assert all(p.grad is None for p in policy.parameters())
    assert not updater.optimizer.state


def test_out_of_memory_says_what_to_change_and_keeps_a_snapshot(tiny_policy, tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    written = []
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)  # there is nothing to write without a GPU
    monkeypatch.setattr(tiny_policy, "forward", out_of_memory)
    updater = Updater(config(run={"dir": str(tmp_path / "runs"), "name": "big"}), tiny_policy)
    with pytest.raises(
        MemoryError, match=r"micro_batch_tokens.*activation_checkpointing.*max_new_tokens.*big\.out_of_memory\.rank0"
    ):
        updater.preflight(7)
    assert written == [str(tmp_path / "runs/big.out_of_memory.rank0.pickle")]


@pytest.mark.parametrize("budget", [1000, 14])
def test_out_of_memory_inside_a_step_says_what_to_change(tiny_model, tmp_path, monkeypatch, budget):
    """In the forward of whole groups, and in the first one of a group in parts."""

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: None)
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    sections = {"run": {"dir": str(tmp_path), "name": "big"}, "optim": {"micro_batch_tokens": budget}}
    updater = Updater(config(**sections), policy)
    monkeypatch.setattr(policy, "forward" if budget == 1000 else "token_logp", out_of_memory)
    with pytest.raises(MemoryError, match=r"on rank 0 in a micro-batch of \d+ tokens.*micro_batch_tokens"):
        updater.step([selected(0, [3, 9, 6])], 0, TrainingProgress(1), is_comparable=False)


def test_a_snapshot_that_cannot_be_written_hides_nothing(tiny_policy, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    (tmp_path / "runs").touch()  # a file where the directory should be
    monkeypatch.setattr(tiny_policy, "forward", fail)
    with pytest.raises(MemoryError, match="micro_batch_tokens"):
        Updater(config(run={"dir": str(tmp_path / "runs"), "name": "big"}), tiny_policy).preflight(7)


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


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_layers_give_the_same_gradients_and_every_batch_the_same_program(tiny_model):
    from torch._dynamo.utils import counters  # imports triton, which test_kernels must be the first to do

    groups = [[selected(i, lengths)] for i, lengths in enumerate([[5, 9, 7], [12, 3, 4, 8]])]
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    updater = Updater(config(), policy)
    eager = [gradients(policy, updater, group, 1000) for group in groups]
    policy.compile_blocks().checkpoint_activations()
    Policy.load(ModelConfig(path=str(tiny_model)))  # as the replica that samples beside a sharded policy is
    num_programs = []
    for group, (loss, _, grads, _) in zip(groups, eager, strict=True):
        found_loss, _, found, _ = gradients(policy, updater, group, 1000)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert all((found[name] - grad).norm() < 1e-4 * grad.norm() for name, grad in grads.items())
        num_programs.append(counters["stats"]["unique_graphs"])
    assert num_programs[0] > 0
    assert len(set(num_programs)) == 1


def test_steps_without_a_finite_loss_are_left_out_noted_and_end_the_run(tiny_model, capsys):
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    with torch.no_grad():
        policy.head.weight[0, 0] = torch.nan
    updater, progress = Updater(config(), policy), TrainingProgress(9)
    for step in range(2):
        updater.step([selected(0, [3, 4])], step, progress, False)
    assert capsys.readouterr().err.count("loss nan, gradient norm nan: update left out") == 2
    with pytest.raises(ValueError, match=r"3 steps in a row.*optim\.lr or loss\.params\.beta.*rollouts/"):
        updater.step([selected(0, [3, 4])], 2, progress, False)


@pytest.mark.parametrize(
    ("rollout", "dtype", "gap", "warns"),
    [
        ({}, "float32", 0.04, False),
        ({}, "float32", 0.06, True),
        ({}, "bfloat16", 0.14, False),
        ({}, "bfloat16", 0.16, True),
        ({"engine": "vllm", "options": {"dtype": "bfloat16"}}, "float32", 0.14, False),
    ],
)
def test_an_engine_that_samples_from_another_distribution_is_named_once(tiny_model, caplog, rollout, dtype, gap, warns):
    policy = Policy.load(ModelConfig(path=str(tiny_model), dtype=dtype))
    updater = Updater(config(model={"path": str(tiny_model), "dtype": dtype}, rollout=rollout), policy)
    name = "sampling/sampling_logp_difference/mean"
    for step in range(2):
        updater._warn_of_mismatch({name: gap}, step)
        updater._warn_of_mismatch({"staleness/logp_difference/mean": 1.0}, step)
    assert caplog.text.count(f"step 1: {name} is {gap} nats a token") == int(warns)
    assert caplog.text.count("nats a token") == int(warns)


def test_a_step_compares_fresh_answers_with_their_engine(tiny_model, caplog):
    """These say log-prob -1 of every token, and version 0: of a model that is not the trainer's."""
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    updater = Updater(config(), policy)
    updater.step([selected(0, [3, 9, 6])], 1, TrainingProgress(1), is_comparable=True)  # stale
    updater.step([selected(0, [3, 9, 6])], 0, TrainingProgress(1), is_comparable=False)
    assert "another distribution" not in caplog.text
    updater.step([selected(0, [3, 9, 6])], 0, TrainingProgress(1), is_comparable=True)
    assert caplog.text.count("another distribution") == 1


def count_calls(policy):
    """Grows by one whenever the first block's MLP runs."""
    calls = []
    policy.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls
