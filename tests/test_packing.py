"""What of a group is packed where."""

import pytest
from builders import scored

from ampo_fast.packing import idle_batch, longest_batch, pack, token_runs
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
