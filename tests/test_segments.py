"""SAPO: which segment is cut, what the pair is made of, what is drawn again, and a run of it that is resumed."""

import copy
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
from builders import config, scored
from runs import comparable, write_run

from ampo_fast.config import load_config
from ampo_fast.rewards import make_reward
from ampo_fast.rollouts.decoding import TransformersEngine
from ampo_fast.rollouts.engines import make_engine
from ampo_fast.rollouts.given import DataEngine
from ampo_fast.rollouts.replay import ReplayBuffer
from ampo_fast.rollouts.segments import SegmentEngine, cut_segment
from ampo_fast.trainer import train
from ampo_fast.types import GivenResponse, Prompt, Sampling, SelectedGroup


def pair(prompt_id="a", better="abcdefgh"):
    given = (GivenResponse(content="xyz", reward=0.1), GivenResponse(content=better, reward=0.9))
    return Prompt(id=prompt_id, messages=({"role": "user", "content": "go"},), responses=given)


def test_a_segment_leaves_the_last_three_tokens_and_a_short_answer_goes_whole():
    cuts = {cut_segment(10, 4, seed) for seed in range(1000)}
    assert cuts == {(0, 4), (1, 5), (2, 6), (3, 7)}
    assert {cut_segment(6, 4, seed) for seed in range(9)} == {(0, 4)}
    assert {cut_segment(3, 4, seed) for seed in range(9)} == {(0, 3)}


class FakeWriter:
    def __init__(self, policy, written):
        self.policy, self.written, self.asked = policy, written, []

    def complete(self, contexts, keys, n, sampling):
        self.asked.append((contexts, keys, n, sampling.max_new_tokens))
        return [[(list(self.written), [])] for _ in contexts]


@pytest.mark.parametrize(("written", "is_end"), [((40, 41, 42, 43), False), ((40, 1), True)])
def test_the_other_answer_is_beginning_segment_and_end_unless_the_turn_ends(tiny_policy, written, is_end):
    given = tiny_policy.encode_response("abcdefgh")  # 9 tokens
    writer = FakeWriter(tiny_policy, written)
    (group,) = SegmentEngine(DataEngine(tiny_policy), writer, 3).generate([pair()], 1, Sampling(step=3))
    answer, other = group.candidates
    assert answer.token_ids == given  # the better one of the two
    ((context,), keys, n, length) = writer.asked[0]
    assert (keys, n, length) == (["a"], 1, 3)
    begin = len(context) - len(group.prompt_ids)
    assert context == group.prompt_ids + given[:begin]
    end = () if is_end else given[begin + 3 :]
    assert other.token_ids == given[:begin] + written[:3] + end
    assert other.finish_reason == "stop"
    assert other.content == tiny_policy.decode(other.token_ids[:-1])


def test_an_answer_rewritten_to_its_end_without_an_end_is_cut(tiny_policy):
    writer = FakeWriter(tiny_policy, (40, 41, 42))
    (group,) = SegmentEngine(DataEngine(tiny_policy), writer, 9).generate([pair(better="ab")], 1, Sampling())
    assert group.candidates[1].token_ids == (40, 41, 42)
    assert group.candidates[1].finish_reason == "length"


def test_it_is_a_pure_function_of_prompts_and_sampling(tiny_policy):
    def made(prompts, **sampling):
        engine = SegmentEngine(DataEngine(tiny_policy), TransformersEngine(tiny_policy, 64), 4)
        return [group.candidates for group in engine.generate(prompts, 1, Sampling(**sampling))]

    prompts = [pair("a"), pair("b", "much longer than that")]
    first = made(prompts, seed=1, step=2)
    assert first == made(prompts, seed=1, step=2)
    assert first[::-1] == made(prompts[::-1], seed=1, step=2)
    assert first != made(prompts, seed=1, step=3)


def test_the_engine_of_the_config_writes_with_the_policy_unless_told_otherwise(tiny_policy):
    settings = config(rollout={"engine": "data", "segment_tokens": 4, "batch_rows": 3}, reward={"kind": "data"})
    reference = copy.copy(tiny_policy)
    own, other = (make_engine(settings, tiny_policy, writer) for writer in (None, reference))
    assert (own.given.policy, own.writer.policy, own.writer.batch_rows, own.tokens) == (tiny_policy, tiny_policy, 3, 4)
    assert (other.given.policy, other.writer.policy) == (tiny_policy, reference)


def test_the_given_answer_has_the_higher_reward_also_after_a_restart():
    settings = config(rollout={"engine": "data", "segment_tokens": 4}, reward={"kind": "data"})
    assert make_reward(settings)([SimpleNamespace(prompt=pair())]) == [[1.0, 0.0]]
    with pytest.raises(ValueError, match=r"rollout\.segment_tokens = 4.*'relevance'"):
        config(rollout={"segment_tokens": 4})


# --- the replay buffer ------------------------------------------------------------------------------------------------


def group(i, reason=None):
    sides = {"positive": (), "negative": ()} if reason else {"positive": (1,), "negative": (0,)}
    return SelectedGroup(scored=scored([0.0, 1.0], i), cost=0.0, skip_reason=reason, **sides)


def ids(groups):
    return [int(g.scored.group.prompt.id[1:]) for g in groups]


def test_a_round_draws_as_many_as_it_has_none_twice_from_the_newest():
    buffer = ReplayBuffer(6, 0, None)
    for index in range(10):
        drawn = ids(buffer.draw(index, [group(2 * index), group(2 * index + 1)]))
        assert len(set(drawn)) == 2
        assert set(drawn) <= set(range(2 * index - 4, 2 * index + 2))
        assert ids(buffer.draw(index, [])) == drawn  # the round's second step


def test_the_seldom_drawn_are_drawn_more_often():
    # Times drawn 1 and 0, so weights 1/2 and 1: the old one is drawn with probability 1/3.
    counts, old, new = Counter(), group(0), group(1)
    for seed in range(2000):
        buffer = ReplayBuffer(9, seed, None)
        buffer.draw(0, [old])
        counts[ids(buffer.draw(1, [new]))[0]] += 1
    assert counts[0] / 2000 == pytest.approx(1 / 3, abs=0.04)


def test_groups_that_are_left_out_are_not_kept_and_fill_up_a_round():
    buffer = ReplayBuffer(9, 0, None)
    assert ids(buffer.draw(0, [group(0, "equal"), group(1), group(2, "equal")])) == [1, 0, 2]
    assert set(ids(buffer.draw(1, [group(3), group(4, "equal")]))) == {1, 3}


def test_a_resumed_buffer_reads_the_rounds_before_and_draws_the_same():
    rounds = [[group(3 * i + j) for j in range(3)] for i in range(6)]
    whole, resumed = ReplayBuffer(7, 5, None), ReplayBuffer(7, 5, rounds.__getitem__)
    drawn = [ids(whole.draw(i, new)) for i, new in enumerate(rounds)]
    assert ids(resumed.draw(4, rounds[4])) == drawn[4]
    assert ids(resumed.draw(5, rounds[5])) == drawn[5]


# --- runs -------------------------------------------------------------------------------------------------------------


def resumed_equals_whole(path, run, from_step):
    train(load_config(str(path)))
    whole = comparable(run)
    for folder in run.glob("checkpoints/step_*"):
        if int(folder.name[5:]) > from_step:
            shutil.rmtree(folder)
    train(load_config(str(path)), resume=True)
    return comparable(run) == whole


def test_sapo_runs_from_the_config_and_is_resumed(tiny_model, tmp_path):
    rows = [{"id": str(i), "prompt": f"q{i}", "chosen": "aeiou" * (i + 2), "rejected": "xyz"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_run(
        tmp_path, tiny_model, data={"train": str(tmp_path / "pairs.jsonl")}, reward={"kind": "data"},
        rollout={"engine": "data", "segment_tokens": 5, "replay": 8, "max_new_tokens": 60, "prompts_per_round": 2},
        loss={"name": "DPO"}, reference={"every": 1, "decay": 0.5}, select={"k": 1}, eval={"prompts": 0},
        run={"steps": 4}, checkpoint={"every": 1, "keep_last": 9},
    )  # fmt: skip
    run = tmp_path / "runs/r"
    assert resumed_equals_whole(path, run, from_step=2)
    files = sorted(run.glob("rollouts/*.jsonl"))
    assert len(files) == 4
    for row in (json.loads(line) for file in files for line in file.read_text().splitlines()):
        given, other = row["responses"]
        assert given["content"] == rows[int(row["id"])]["chosen"]
        assert (given["reward_raw"], other["reward_raw"]) == (1.0, 0.0)
        assert given["token_ids"] != other["token_ids"]
        same = [a == b for a, b in zip(given["token_ids"], other["token_ids"], strict=False)]
        assert all(same[: same.index(False)])
    assert not list((run / "reference").glob("*.jsonl"))  # no log-probs of answers that change are kept


def test_replayed_groups_of_several_negatives_are_the_same_from_a_file(tiny_model, tmp_path):
    path = write_run(
        tmp_path, tiny_model, rollout={"replay": 7}, eval={"prompts": 0}, checkpoint={"every": 1, "keep_last": 9}
    )
    assert resumed_equals_whole(path, tmp_path / "runs/r", from_step=4)
