import dataclasses
import math

import pytest
from builders import config, scored

from ampo_fast.select import RewardTolerance, _split_at_mean, select_groups, why_untrained
from ampo_fast.types import SelectedGroup


def test_one_positive_and_k_negatives_with_lower_rewards():
    (chosen,) = select_groups([scored((0.1, 0.9, 0.5, 0.9, 0.2, 0.3))], config(), 1e-6)
    assert chosen.positive == (1,)
    assert len(chosen.negative) == 3
    assert not {1, 3} & set(chosen.negative)  # 3 ties with the positive
    assert math.isfinite(chosen.cost)
    assert chosen.is_trained


def test_cut_responses_are_never_the_positive_by_default():
    finish = ["stop", "length", "stop", "stop"]
    group = scored((0.1, 0.9, 0.5, 0.2), finish=finish)
    assert select_groups([group], config(), 1e-6)[0].positive == (2,)
    assert select_groups([group], config(rollout={"truncated": "keep"}), 1e-6)[0].positive == (1,)


@pytest.mark.parametrize(
    ("group", "reason", "field"),
    [
        (scored((0.5, 0.5, 0.5)), "equal", "reward.kind"),
        (scored((0.5, 0.1, 0.2), valid=[True, False, False]), "fewer than two", "rollout.temperature"),
        (scored((0.5, 0.1), finish=["length", "length"]), "cut", "rollout.max_new_tokens"),
        (scored((0.5, 0.9), finish=["stop", "length"]), "no response has a lower reward", "rollout.truncated"),
        (
            scored((0.5, 0.9), finish=["stop", "length"], by_scorer=((0.5, 0.9), (0.5, 0.9))),
            "better than another",
            "rollout.truncated",
        ),
    ],
)
def test_degenerate_groups_are_left_out_with_the_reason_and_the_fields_that_decide_it(group, reason, field):
    chosen = select_groups([group, scored((0.1, 0.9))], config(), 1e-6)
    assert reason in chosen[0].skip_reason
    assert not chosen[0].is_trained
    assert chosen[1].is_trained
    older = dataclasses.replace(chosen[0], skip_reason="in other words")
    assert why_untrained([older]) == "in other words (1 of 1); see rollouts/"
    assert why_untrained(chosen[:1]).startswith(f"{chosen[0].skip_reason} (1 of 1); see ")
    assert field in why_untrained(chosen[:1]).partition("; see ")[2]


def test_the_commonest_reason_is_the_one_that_is_said():
    groups = [scored((0.5, 0.5)), scored((0.5, 0.1), 1, finish=["length"] * 2), scored((0.5, 0.5), 2)]
    assert "equal within the tolerance (2 of 3)" in why_untrained(select_groups(groups, config(), 1e-6))


def test_invalid_candidates_are_never_selected():
    (chosen,) = select_groups([scored((0.1, math.nan, 0.5, 0.2), valid=[True, False, True, True])], config(), 1e-6)
    assert chosen.positive == (2,)
    assert chosen.negative == (0, 3)


def test_random_depends_on_the_prompt_not_on_its_neighbours():
    settings = config(select={"strategy": "random"})
    groups = [scored(tuple(i * 0.1 for i in range(8)), i) for i in range(4)]
    together = [g.negative for g in select_groups(groups, settings, 1e-6)]
    reverse = [g.negative for g in select_groups(groups[::-1], settings, 1e-6)][::-1]
    assert together == reverse
    assert len(set(together)) > 1


def test_tolerance_follows_the_median_spread_of_the_run():
    tolerance = RewardTolerance(None)
    assert tolerance.update([scored((0.0, 2.0)), scored((0.0, 4.0)), scored((0.0, 6.0))]) == pytest.approx(1e-6 + 4e-3)
    assert RewardTolerance(0.5).update([scored((0.0, 2.0))]) == 0.5


def test_losses_with_a_target_for_ties_train_on_them():
    tie, pair = scored((0.5, 0.5)), scored((0.1, 0.9))
    one = {"select": {"k": 1}}
    soft = select_groups([tie, pair], config(loss={"name": "MMPO"}, **one), 1e-6)
    assert [(g.positive, g.negative) for g in soft] == [((0,), (1,)), ((1,), (0,))]
    hard = select_groups([tie, pair], config(loss={"name": "DPO"}, **one), 1e-6)
    assert [g.is_trained for g in hard] == [False, True]


def test_a_pair_is_whole_under_the_default_k():
    (chosen,) = select_groups([scored((0.1, 0.9))], config(select={"k": 7}, rollout={"n": 8}), 1e-6)
    assert (chosen.positive, chosen.negative) == ((1,), (0,))


def test_rewards_that_float32_cannot_tell_apart_still_have_an_order():
    group = scored([10000.0001, 10000.0003, 10000.0002, 9999.9])
    (chosen,) = select_groups([group], config(select={"k": 2}), 0.0)
    assert chosen.positive == (1,)
    assert chosen.negative != ()


@pytest.mark.parametrize(
    ("rewards", "finish", "positive"),
    [
        ((0.9, 0.5, 0.1), ("length", "stop", "stop"), ()),
        ((0.9, 0.9, 0.1), ("length", "stop", "stop"), (1,)),
        ((0.5, 0.9, 0.1), ("length", "stop", "stop"), (1,)),
    ],
)
def test_where_the_best_given_response_is_cut_no_worse_one_becomes_the_positive(rewards, finish, positive):
    given = {"rollout": {"engine": "data"}, "reward": {"kind": "data"}, "select": {"k": 1}}
    (chosen,) = select_groups([scored(rewards, finish=finish)], config(**given), 1e-6)
    assert chosen.positive == positive
    if not positive:
        assert "rollout.max_new_tokens" in why_untrained([chosen])
    kept = given | {"rollout": {"engine": "data", "truncated": "keep"}}
    assert select_groups([scored(rewards, finish=finish)], config(**kept), 1e-6)[0].positive == (
        rewards.index(max(rewards)),
    )
    (sampled,) = select_groups([scored(rewards, finish=finish)], config(select={"k": 1}), 1e-6)
    assert sampled.positive == (1,)


@pytest.mark.parametrize(
    ("loss", "finish", "sides"),
    [
        ({"name": "SWEPO"}, "stop", ((1, 2, 4), (0, 3))),
        ({"name": "REFADynamic"}, "stop", ((1, 2, 4), (0, 3))),
        ({"name": "KTO"}, "stop", ((1, 2, 4), (0, 3))),
        ({"name": "KTO"}, "length", ((1, 4), (0, 2, 3))),
        ({"name": "AMPO", "params": {"split": "mean"}}, "stop", ((1, 2, 4), (0, 3))),
        ({"name": "SWEPO", "params": {"split": "best"}}, "stop", ((1,), (0, 2, 3, 4))),
        ({"name": "AMPO"}, "stop", ((1,), (0, 2, 3, 4))),
    ],
    ids=str,
)
def test_a_loss_that_splits_at_the_mean_has_every_kept_response_above_it_as_a_positive(loss, finish, sides):
    group = scored((0.1, 0.9, 0.8, 0.2, 0.7), finish=["stop", "stop", finish, "stop", "stop"])
    (chosen,) = select_groups([group], config(loss=loss, select={"k": 4}), 1e-6)
    assert (chosen.positive, chosen.negative) == sides


def test_the_mean_is_that_of_all_valid_responses_and_the_last_negative_stays_one():
    group = scored((0.9, 0.8, 0.7, 0.0, 0.0, -9.0), valid=[True] * 5 + [False])
    kept = SelectedGroup(scored=group, positive=(0,), negative=(1, 2), cost=0.0)
    assert _split_at_mean(kept, [True] * 6) == kept
    kept = dataclasses.replace(kept, negative=(1, 2, 3))
    split = _split_at_mean(kept, [True] * 6)
    assert (split.positive, split.negative) == ((0, 1, 2), (3,))
    low = dataclasses.replace(kept, scored=scored((0.9, 0.5, 0.5, 0.1, 0.5, -9.0), valid=[True] * 5 + [False]))
    assert _split_at_mean(low, [True] * 6).positive == (0,)  # what equals the mean is not above it
