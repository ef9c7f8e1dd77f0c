"""What the issue calls bad input, and what is held out."""

import json
import logging
import os
from pathlib import Path

import pytest
from builders import prompt

from ampo_fast.losses.reward_model import BradleyTerry, MMPOReward
from ampo_fast.reward_model.config import RewardDataConfig
from ampo_fast.reward_model.data import (
    by_prompt,
    check_margins,
    conversation_key,
    hold_out,
    load_groups,
)
from ampo_fast.types import GivenResponse, Prompt


def pair(question="why?", scores=(0.9, 0.1), texts=("good", "bad"), **more):
    row = {"prompt": question, "chosen": texts[0], "rejected": texts[1]}
    if scores:
        row |= {"chosen_score": scores[0], "rejected_score": scores[1]}
    return row | more


def load(tmp_path, rows, **settings):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_groups(RewardDataConfig(train=str(path), **settings))


def group(rewards, chosen=None, question="why?"):
    chosen = chosen or [None] * len(rewards)
    given = [GivenResponse(content=f"r{i}", reward=r, is_chosen=c) for i, (r, c) in enumerate(zip(rewards, chosen))]  # noqa: B905
    return Prompt(id="g", messages=prompt(0, question).messages, responses=tuple(given))


def test_pairs_carry_score_and_label(tmp_path):
    (found,) = load(tmp_path, [pair()])
    assert [(r.reward, r.is_chosen) for r in found.responses] == [(0.9, True), (0.1, False)]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (pair(scores=None, margin=-0.5), r"pairs\.jsonl:2: margin = -0\.5.*chosen minus rejected"),
        (pair(margin=-0.8), r"pairs\.jsonl:2: margin = -0\.8, but the scores' difference is 0\.8"),
        (pair(scores=(0.1, 0.9), margin=0.8), r"pairs\.jsonl:2: margin = 0\.8"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 1.0}, r"pairs\.jsonl:2.*rejected_score"),
    ],
)
def test_margins_of_the_wrong_sign_and_one_sided_scores_name_the_line(tmp_path, row, match):
    with pytest.raises(ValueError, match=match):
        load(tmp_path, [pair(), row])


def test_labels_against_scores_are_settled_as_told(tmp_path, caplog):
    rows = [pair(), pair("how?", (0.2, 0.7))]
    with pytest.raises(ValueError, match=r'below the rejected one in 1 of 2 pairs \(2\).*"scores".*"drop"'):
        load(tmp_path, rows)
    with caplog.at_level(logging.WARNING):
        trusted = load(tmp_path, rows, disagreement="scores")
    assert [r.reward for r in trusted[1].responses] == [0.2, 0.7]
    assert "disagree in 1 of 2" in caplog.text
    assert len(load(tmp_path, rows, disagreement="drop")) == 1


def test_missing_scores_are_left_out_until_they_are_too_many(tmp_path):
    def row(rewards):
        return {
            "prompt": "p",
            "id": str(rewards),
            "responses": [{"content": str(i), "reward": r} for i, r in enumerate(rewards)],
        }

    rows = [row([1, 2, None]), row([3, 4, 5])]
    assert [len(g.responses) for g in load(tmp_path, rows)] == [2, 3]
    with pytest.raises(ValueError, match=r"1 of 6 responses have no finite score.*max_missing_share = 0\.1: .*\[2\]"):
        load(tmp_path, rows, max_missing_share=0.1)


def test_equal_scores_and_constant_margins_are_refused_where_nothing_can_be_learnt():
    ties = [group([1.0, 1.0]), group([2.0, 2.0])]
    with pytest.raises(ValueError, match=r"equal scores.*BradleyTerry.*MMPOReward takes 1/2"):
        check_margins(ties, BradleyTerry)
    with pytest.raises(ValueError, match=r"every margin here is 1\.0.*label smoothing"):
        check_margins([group([1.0, 0.0]), group([0.0, 1.0])], MMPOReward)
    check_margins([group([1.0, 0.0]), group([0.0, 1.0])], BradleyTerry)
    check_margins([group([1.0, 0.5]), group([1.0, 1.0])], MMPOReward)
    with pytest.raises(ValueError, match=r"every margin here is 0\.0"):
        check_margins(ties, MMPOReward)


def test_a_prompts_pairs_become_one_group():
    rows = [group([0.9, 0.1]), group([0.5, 0.1, 0.4]), group([0.2, 0.3], question="how?")]
    why, how = by_prompt(rows)
    assert {r.content: r.reward for r in why.responses} == pytest.approx({"r0": 0.7, "r1": 0.1, "r2": 0.4})
    assert len(how.responses) == 2


def test_prompts_are_held_out_whole_whatever_the_order():
    rows = [group([1.0, i / 10], question=f"q{i % 5}") for i in range(10)]
    train, held = hold_out(rows, 0.4, seed=1)
    assert {conversation_key(g) for g in train}.isdisjoint(conversation_key(g) for g in held)
    assert (len(train), len(held)) == (6, 4)
    again = hold_out(rows[::-1], 0.4, seed=1)[1]
    assert {conversation_key(g) for g in again} == {conversation_key(g) for g in held}
    assert any(
        {conversation_key(g) for g in hold_out(rows, 0.4, s)[1]} != {conversation_key(g) for g in held}
        for s in range(2, 9)
    )
    with pytest.raises(ValueError, match="one prompt"):
        hold_out(rows[:1], 0.4, 0)


@pytest.mark.skipif("AMPO_FAST_DATA" not in os.environ, reason="needs the directory that AMPO_FAST_DATA names")
def test_real_pairs_are_read_and_the_longer_answer_mostly_wins():
    groups = load_groups(RewardDataConfig(train=str(Path(os.environ["AMPO_FAST_DATA"]) / "pairs_dev.jsonl.gz")))
    assert len(groups) == 2507
    longer = [len(g.responses[0].content) > len(g.responses[1].content) for g in groups]
    assert 0.74 < sum(longer) / len(longer) < 0.78
    assert len(by_prompt(groups)) == 407
