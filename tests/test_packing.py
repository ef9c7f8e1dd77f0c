"""What of a group is packed where."""

import dataclasses

import pytest
from builders import group, scored

from ampo_fast.packing import (
    MicroBatch,
    group_parts,
    group_tokens,
    idle_batch,
    longest_batch,
    micro_batches,
    pack,
    pack_micro_batch,
    pack_responses,
    token_runs,
)
from ampo_fast.types import SelectedGroup


def selected(rewards, positive, negative, i=0, **more):
    return SelectedGroup(scored=scored(rewards, i, **more), cost=0.0, positive=positive, negative=negative)


def test_rewards_and_sides_are_in_packed_order_and_the_baseline_counts_what_was_not_selected():
    groups = [
        selected([0.1, 0.9, 0.5, 0.3], positive=(1,), negative=(3, 0)),
        selected([0.7, 0.2, 0.4, 0.0], positive=(0, 2), negative=(1,), i=1, valid=[True, True, True, False]),
    ]
    batch = pack(groups)
    assert batch.positive_M.tolist() == [True, False, False, True, True, False]
    assert batch.reward_M.tolist() == pytest.approx([0.9, 0.3, 0.1, 0.7, 0.4, 0.2])
    assert batch.baseline_B.tolist() == pytest.approx([1.8 / 4, 1.3 / 3])
    assert batch.group_offsets.tolist() == [0, 3, 6]


def test_groups_without_meaning_have_one_positive_each_and_it_is_the_best():
    batch = longest_batch(2, prompt_length=5, num_responses=3, response_length=4)
    assert batch.positive_M.tolist() == batch.reward_M.bool().tolist() == [True, False, False] * 2
    assert idle_batch().positive_M.tolist() == [True, False]


def test_runs_hold_whole_items_in_order():
    assert token_runs([3, 3, 3, 9, 1], 6) == [[0, 1], [2], [3], [4]]
    assert token_runs([], 6) == []


def test_where_every_token_its_position_its_target_and_its_engines_log_prob_lie():
    made = [
        group(["a", "b", "c"], 0, prompt_ids=(1, 2, 3), lengths=[3, 1, 2]),
        group(["d"], 1, prompt_ids=(4,), lengths=[2]),
    ]
    numbered = [
        dataclasses.replace(
            each,
            candidates=tuple(
                dataclasses.replace(c, logp=tuple(-(100 * g + 10 * i + t) for t in range(len(c.logp))))
                for i, c in enumerate(each.candidates)
            ),
        )
        for g, each in enumerate(made, 1)
    ]
    batch = pack_responses(numbered, [(2, 0), (0,)])
    assert batch.token_T.tolist() == [1, 2, 3, 20, 20, 21, 4, 20]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 3, 4, 0, 1]
    assert batch.row_R.tolist() == [2, 3, 2, 4, 5, 6, 7]
    assert batch.target_R.tolist() == [20, 21, 20, 21, 22, 20, 21]
    assert batch.sampled_logp_R.tolist() == [-120, -121, -100, -101, -102, -200, -201]
    assert (batch.response_offsets.tolist(), batch.group_offsets.tolist()) == ([0, 2, 5, 7], [0, 2, 3])
    assert [(s.start, s.prompt_length, s.response_lengths) for s in batch.segments] == [(0, 3, (1, 2)), (6, 1, (1,))]
    given = dataclasses.replace(numbered[1].candidates[0], logp=())
    unknown = dataclasses.replace(numbered[1], candidates=(given,))
    assert pack_responses([numbered[0], unknown], [(0,), (0,)]).sampled_logp_R is None


def test_micro_batches_are_full_to_the_last_token_and_no_fuller():
    groups = [
        selected([0.9, 0.1], (0,), (1,), i, lengths=[3, 4], prompt_ids=(1, 2)) for i in range(3)
    ]  # 2 + 2 + 3 tokens
    sizes = {budget: [len(micro.groups) for micro in micro_batches(groups, budget)] for budget in (21, 20, 14, 13, 7)}
    assert sizes == {21: [3], 20: [2, 1], 14: [2, 1], 13: [1, 1, 1], 7: [1, 1, 1]}
    parts = micro_batches(groups[:1], 6)
    assert [micro.part for micro in parts] == [(0,), (1,)]
    assert not any(micro.is_whole for micro in [*parts, MicroBatch()])
    assert (group_tokens(groups[0], 7), group_tokens(groups[0], 6)) == (7, 4 + 5)
    assert [pack_micro_batch(micro).target_R.numel() for micro in parts] == [3, 4]
    with pytest.raises(ValueError, match="one response of 4 pack to 5 tokens"):
        group_parts(groups[0], 4)
    # What follows a group in parts begins a micro-batch of its own.
    small = selected([0.9, 0.1], (0,), (1,), 3, lengths=[1, 1], prompt_ids=(1,))
    assert [(len(m.groups), m.part) for m in micro_batches([groups[0], small, small], 6)] == [
        (1, (0,)), (1, (1,)), (2, ()),
    ]  # fmt: skip
