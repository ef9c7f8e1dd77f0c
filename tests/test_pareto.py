"""Several rewards: who is on which front, what the selection makes of it, and a run of CaPO from rollout to resumed step."""

import json
import shutil

import pytest
import torch
from builders import config, group, scored
from runs import comparable, write_run

from ampo_fast.config import load_config
from ampo_fast.pareto import dominance, draw_sides
from ampo_fast.select import select_groups
from ampo_fast.stage_files import read_rows, row_from_group
from ampo_fast.stages import embed, score, select
from ampo_fast.trainer import train
from ampo_fast.update import make_loss

# a 0: (3, 1), b 1: (1, 3), c 2: (2, 1), d 3: (1, 1), e 4: (0, 4), f 5: (1, 2); a, b and e are beaten by nobody, e beats nobody.
FIRST, SECOND = (3.0, 1.0, 2.0, 1.0, 0.0, 1.0), (1.0, 3.0, 1.0, 1.0, 4.0, 2.0)
TWO = {"reward": {"kind": ["toy_rewards:vowels", "toy_rewards:brevity"]}}


def judged(i=0, valid=None, **more):
    mean = [(a + b) / 2 for a, b in zip(FIRST, SECOND, strict=True)]
    return scored(mean, i, valid=valid, by_scorer=(FIRST, SECOND), **more)


def test_one_dominates_another_by_no_worse_and_once_better():
    found = dominance(torch.tensor([FIRST, SECOND]))
    pairs = {(0, 2), (0, 3), (2, 3), (1, 3), (1, 5), (5, 3)}
    assert {(i, j) for i, j in found.nonzero().tolist()} == pairs


def test_the_positive_is_of_the_upper_front_and_the_others_of_the_lower_one():
    drawn = {}
    for i in range(40):
        kept, positive = draw_sides(judged(i), [True] * 6, 0)
        drawn.setdefault(positive.index(True), kept)
    # d (3) is the lower front: it beats nobody and is beaten; e (4) neither beats nor is beaten.
    assert drawn == {0: [True, False, False, True, False, False], 1: [False, True, False, True, False, False]}


def test_cut_and_invalid_responses_are_no_positives():
    cut = [False, True, True, True, True, True]
    positives = {draw_sides(judged(i), cut, 0)[1].index(True) for i in range(40)}
    assert positives == {1, 2}  # without a, nobody that may be the positive beats c
    valid = [True, False, True, False, True, False]
    kept, positive = draw_sides(judged(valid=valid), [True] * 6, 0)
    assert (kept, positive.index(True)) == ([True, False, True, False, False, False], 0)


def test_selection_keeps_to_the_fronts_and_names_a_group_without_pairs():
    settings = config(select={"pareto": True}, **TWO)
    nobody = scored([1.0, 1.0], 1, by_scorer=((0.0, 2.0), (2.0, 0.0)))
    first, second = select_groups([judged(), nobody], settings, 1e-6)
    assert first.positive[0] in (0, 1)
    assert first.negative == (3,)
    assert second.skip_reason
    mixed = scored([1.0, 1.5], 1, by_scorer=((0.0, 3.0), (2.0, 0.0)))
    assert "better than another" in select_groups([mixed], settings, 1e-6)[0].skip_reason
    with pytest.raises(ValueError, match=r"p0 has one reward per response.*reward\.kind"):
        select_groups([scored([1.0, 2.0])], settings, 1e-6)


def test_capos_target_is_the_normalised_reward_where_that_is_a_win_rate():
    assert make_loss(config(loss={"name": "CaPO"}, **TWO)).calibrated
    assert not make_loss(config(loss={"name": "CaPO"}, reward={"normalize": "none"})).calibrated
    assert not make_loss(config(loss={"name": "CaPO", "params": {"calibrated": False}})).calibrated


def test_the_stages_alone_score_by_several_rewards_and_select_from_the_fronts(tiny_model, tmp_path):
    texts = ["aaaa", "aab", "zzzz", "zzzzzz", "e"]
    row = row_from_group(group(texts))
    (tmp_path / "1.jsonl").write_text(json.dumps(row) + "\n")
    settings = config(
        model={"path": str(tiny_model)}, embed={"model": "policy"}, select={"pareto": True, "k": 2}, **TWO
    )
    first, second, third, fourth = (tmp_path / f"{i}.jsonl" for i in range(1, 5))
    score(settings, first, second)
    embed(settings, second, third)
    select(settings, third, fourth)
    (row,) = read_rows(fourth)
    assert row["responses"][1]["reward_by_scorer"] == pytest.approx([2 / 4, 1 / 4])
    assert row["responses"][1]["reward_raw"] == pytest.approx(3 / 8)
    # Vowels and brevity: aaaa (.8, .2) and e (.5, .5) are beaten by nobody; zzzzzz is beaten by all, and beats nobody.
    found = {response["content"]: response["selected"] for response in row["responses"]}
    assert [found["aaaa"], found["e"]].count("positive") == 1
    assert found["zzzzzz"] == "negative"


def test_a_run_on_two_rewards_keeps_both_and_goes_on_as_if_never_stopped(tiny_model, tmp_path):
    path = write_run(
        tmp_path, tiny_model, run={"steps": 4}, **TWO, select={"k": 1, "pareto": True}, eval={"prompts": 2, "every": 0},
        loss={"name": "CaPO", "params": {"pairs": "best_vs_rest"}}, checkpoint={"every": 1, "keep_last": 9},
    )  # fmt: skip
    train(load_config(str(path)))
    run = tmp_path / "runs/r"
    whole = comparable(run)
    assert all(row["group/trained"] and row["loss"] > 0 for row in whole if "loss" in row)
    assert {"reward/1", "reward/2"} <= whole[1].keys()
    for file in run.glob("rollouts/*.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            side = {r["selected"]: r["reward_by_scorer"] for r in row["responses"] if r["selected"]}
            assert not side or all(a >= b for a, b in zip(side["positive"], side["negative"], strict=True))
    for step in (2, 3, 4):  # back into the middle of the first round, whose rewards are read from its file
        shutil.rmtree(run / f"checkpoints/step_00000{step}")
    train(load_config(str(path)), resume=True)
    assert comparable(run) == whole
