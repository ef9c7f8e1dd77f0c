"""The numbers of a step against ones worked out by hand."""

import dataclasses
import math

import pytest
import torch
from builders import scored

from ampo_fast.losses import ResponseStats
from ampo_fast.packing import pack
from ampo_fast.step_metrics import group_metrics, is_fresh, logp_difference, policy_metrics, trained_groups
from ampo_fast.types import SelectedGroup


def chosen(rewards, positive, negative, i=0, **more):
    return SelectedGroup(scored=scored(rewards, i, **more), positive=positive, negative=negative, cost=0.5)


GROUPS = [
    chosen([0.1, 0.9, 0.4], (1,), (0, 2), 0, lengths=[2, 3, 1]),
    chosen([0.2, 0.6], (1,), (0,), 1, lengths=[4, 2]),
]


def test_trainer_and_engine_are_compared_token_by_token():
    """The engine's log-probs are -1 throughout; differences of both signs do not make each other up."""
    batch = pack(GROUPS)  # positives first: 3, 2, 1 and 2, 4 tokens
    logp_R = torch.tensor([-0.5, -1.5, -1.0, -0.8, -1.2, -1.0, -1.1, -0.9, -1.0, -1.0, -1.0, -1.0])
    lengths = batch.response_offsets.diff()
    logp_M = torch.stack([part.sum() for part in logp_R.split(lengths.tolist())])
    assert torch.allclose(logp_M, -lengths.float())
    groups = trained_groups(ResponseStats(logp_M, lengths, batch.reward_M, batch.group_offsets, logp_R=logp_R), batch)
    for fresh, name in ((True, "sampling/sampling_logp_difference"), (False, "staleness/logp_difference")):
        found = logp_difference(groups, fresh)
        assert found == {f"{name}/mean": pytest.approx(1.6 / 12), f"{name}/max": pytest.approx(0.5)}
    unknown = dataclasses.replace(batch, sampled_logp_R=None)
    groups += trained_groups(ResponseStats(logp_M, lengths, batch.reward_M, batch.group_offsets), unknown)
    assert logp_difference(groups, True) == {}


def test_margins_are_between_mean_log_probs_of_the_two_sides():
    batch = pack(GROUPS)
    logp_M = torch.tensor([-3.0, -4.0, -0.5, -1.0, -1.0])  # a token: -1, -2, -0.5 and -0.5, -0.25
    stats = ResponseStats(
        logp_M, batch.response_offsets.diff(), batch.reward_M, batch.group_offsets, logp_R=torch.zeros(12)
    )
    assert policy_metrics(trained_groups(stats, batch)) == {
        "positive/logp": pytest.approx(-0.75),
        "negative/logp": pytest.approx(-2.75 / 3),
        "rewards/margins": pytest.approx((1.0 - 0.5 - 0.25) / 3),
        "rewards/accuracies": pytest.approx(1 / 3),
    }


def test_the_pool_and_what_was_selected_of_it_by_hand():
    cut = ["stop", "length", "stop"]
    first = chosen([0.1, 0.9, math.nan], (1,), (0,), 0, valid=[True, True, False], finish=cut, lengths=[2, 3, 7])
    equal = dataclasses.replace(chosen([0.4, 0.4], (), (), 1, lengths=[4, 4]), skip_reason="equal", cost=math.nan)
    found = group_metrics([first, equal], reward_tol=0.0, step=3)
    assert found["reward"] == pytest.approx(1.8 / 4)  # the invalid one counted nowhere
    assert found["reward_std"] == pytest.approx((0.8 / math.sqrt(2) + 0.0) / 2)
    assert found["frac_reward_zero_std"] == 0.5
    lengths = [found[f"completions/{name}"] for name in ("mean_length", "min_length", "max_length")]
    assert lengths == [4.0, 2, 7]
    assert found["completions/clipped_ratio"] == pytest.approx(1 / 5)
    assert (found["group/size"], found["group/invalid"], found["group/count"]) == (2.5, 1, 2)
    assert (found["group/trained"], found["group/degenerate"], found["group/coverage_cost"]) == (1, 0.5, 0.5)
    assert (found["selected/reward"], found["selected/mean_length"], found["selected/clipped_ratio"]) == (0.5, 2.5, 0.5)
    assert (found["positive/reward"], found["negative/reward"], found["entropy"]) == (0.9, 0.1, 1.0)
    assert (found["staleness/mean"], found["staleness/max"]) == (3, 3)
    assert is_fresh([first], 0)
    assert not is_fresh([first], 3)
