"""Rows read back exactly, and what was finished survives a kill, a full disk and a second run."""

import dataclasses
import json
import math
import resource
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ampo_fast.jsonl import dump_line
from ampo_fast.stage_files import (
    RowWriter,
    embeddings_path,
    group_from_row,
    raw_rewards,
    read_embeddings,
    read_rows,
    row_from_group,
    row_from_scored,
    row_from_selected,
    scored_from_row,
    selected_from_row,
    write_rows_atomic,
)
from ampo_fast.types import Candidate, CandidateGroup, GivenResponse, Prompt, ScoredGroup, SelectedGroup

NAN = math.nan


def candidate(text, logp=(-0.1, -2.5), **options):
    return Candidate(content=text, token_ids=(5, 2), logp=logp, **options)


def make_group(prompt_id="p", num=4, **options):
    messages = ({"role": "system", "content": "Kurz, bitte: é\u2028"}, {"role": "user", "content": "Why?\nSay."})
    candidates = tuple(candidate(f"answer {i}", finish_reason="length" if i == 1 else "stop") for i in range(num))
    return CandidateGroup(
        prompt=Prompt(id=prompt_id, messages=messages, **options), prompt_ids=(1, 7, 3), candidates=candidates
    )


def make_scored(prompt_id="p", num=4):
    raw = (0.1, NAN, 1 / 3, 0.7)[:num]
    valid = tuple(not math.isnan(value) for value in raw)
    reward = tuple(value / 0.7 for value in raw)
    embedding = torch.randn(num, 3, generator=torch.Generator().manual_seed(num))
    group = make_group(prompt_id, num)
    return ScoredGroup(group=group, reward_raw=raw, reward=reward, valid=valid, embedding=embedding)


def make_selected(prompt_id="p"):
    return SelectedGroup(scored=make_scored(prompt_id), positive=(3,), negative=(0, 2), cost=1.25)


def through_json(row):
    return json.loads(dump_line(row))


def without_given(group):
    return dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, responses=()))


def same(a, b):
    """Equal numbers, NaN equal to NaN."""
    return len(a) == len(b) and all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b, strict=True))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_the_rewards_of_several_scorers_come_back():
    two = dataclasses.replace(make_scored(), reward_by_scorer=((0.0, NAN, 1 / 3, 1.0), (0.2, 1.0, 1 / 3, 0.4)))
    row = through_json(row_from_scored(two))
    assert row["responses"][1]["reward_by_scorer"] == [None, 1.0]
    assert raw_rewards(row)[2] == (1 / 3, 1 / 3)
    again = scored_from_row(row, two.embedding).reward_by_scorer
    assert len(again) == 2
    assert all(same(a, b) for a, b in zip(again, two.reward_by_scorer, strict=True))


def test_row_has_the_stated_keys_in_every_stage():
    keys = ["content", "token_ids", "logp", "finish_reason", "version", "reward_raw", "reward", "selected"]
    for row in (row_from_group(make_group()), row_from_scored(make_scored()), row_from_selected(make_selected())):
        assert list(row)[:4] == ["id", "prompt", "prompt_ids", "responses"]
        assert all(list(response) == keys for response in row["responses"])
    assert [r["selected"] for r in row["responses"]] == ["negative", None, "negative", "positive"]
    assert (row["cost"], row["skip_reason"]) == (1.25, None)


def test_groups_read_back_equal():
    group = make_group()
    assert without_given(group_from_row(through_json(row_from_group(group)))) == group


def test_scored_groups_read_back_equal_with_nan_as_null():
    scored = make_scored()
    row = through_json(row_from_scored(scored))
    assert raw_rewards(row) == [0.1, None, 1 / 3, 0.7]
    again = scored_from_row(row, scored.embedding)
    assert same(again.reward_raw, scored.reward_raw)
    assert same(again.reward, scored.reward)
    assert again.valid == scored.valid
    assert without_given(again.group) == scored.group


def test_selected_groups_read_back_equal_in_order():
    selected = make_selected()
    again = selected_from_row(through_json(row_from_selected(selected)), selected.scored.embedding)
    assert (again.positive, again.negative, again.cost, again.skip_reason) == ((3,), (0, 2), 1.25, None)
    assert again.is_trained


def test_degenerate_group_keeps_its_reason():
    selected = SelectedGroup(scored=make_scored(), positive=(), negative=(), cost=NAN, skip_reason="rewards equal")
    row = through_json(row_from_selected(selected))
    assert row["cost"] is None
    again = selected_from_row(row, selected.scored.embedding)
    assert again.skip_reason == "rewards equal"
    assert not again.is_trained
    assert math.isnan(again.cost)


def test_given_rewards_travel_as_raw_rewards():
    given = (GivenResponse(content="answer 0", reward=0.25), GivenResponse(content="answer 1", finish_reason="length"))
    group = make_group(num=2, responses=given)
    row = through_json(row_from_group(group))
    assert raw_rewards(row) == [0.25, None]
    assert group_from_row(row) == group


def test_given_rewards_of_other_texts_are_not_taken():
    group = make_group(num=1, responses=(GivenResponse(content="something else", reward=0.25),))
    assert raw_rewards(row_from_group(group)) == [None]


@given(st.floats(), st.floats(), st.text())
def test_every_number_and_text_reads_back_exactly(reward, logp, text):
    group = dataclasses.replace(make_group(), candidates=(candidate(text, logp=(logp,)),))
    scored = ScoredGroup(group=group, reward_raw=(reward,), reward=(reward,), valid=(True,), embedding=torch.ones(1, 1))
    line = dump_line(row_from_scored(scored))
    assert "NaN" not in line.replace(json.dumps(text, ensure_ascii=False), "")
    assert "Infinity" not in line.replace(json.dumps(text, ensure_ascii=False), "")
    again = scored_from_row(json.loads(line), scored.embedding)
    assert again.group.candidates[0].content == text
    assert same(again.reward_raw, (reward if math.isfinite(reward) else NAN,))
    assert same(again.group.candidates[0].logp, (logp if math.isfinite(logp) else NAN,))


def test_row_without_tokens_says_how_to_make_one():
    row = {"id": "p", "prompt": [], "responses": [{"content": "a"}]}
    with pytest.raises(ValueError, match=r"x\.jsonl:3: not a row of a stage file .*token_ids.*ampo-fast generate"):
        group_from_row(row, "x.jsonl:3")


# --- whole files ------------------------------------------------------------------------------------------------------


def test_rows_and_embeddings_are_written_and_read_in_order(tmp_path):
    path = tmp_path / "step_000001.jsonl"
    groups = [make_selected("a"), make_selected("b")]
    write_rows_atomic(path, groups)
    rows = read_rows(path)
    assert [row["id"] for row in rows] == ["a", "b"]
    blocks = read_embeddings(path, [4, 4])
    assert torch.equal(torch.stack(blocks), torch.stack([group.scored.embedding for group in groups]))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_000001.jsonl", "step_000001.safetensors"]


def test_plain_rows_are_written_with_or_without_embeddings(tmp_path):
    rows = [row_from_group(make_group("a", num=2))]
    write_rows_atomic(tmp_path / "x.jsonl", rows)
    assert read_rows(tmp_path / "x.jsonl") == rows
    assert not embeddings_path(tmp_path / "x.jsonl").exists()
    write_rows_atomic(tmp_path / "x.jsonl", rows, [torch.eye(2)])
    assert torch.equal(read_embeddings(tmp_path / "x.jsonl", [2])[0], torch.eye(2))


def test_missing_wrong_and_broken_embeddings_are_clear_errors(tmp_path):
    path = tmp_path / "x.jsonl"
    write_rows_atomic(path, [make_scored("a")])
    with pytest.raises(ValueError, match=r"x\.safetensors holds 4 embeddings, .*x\.jsonl has 5 responses"):
        read_embeddings(path, [2, 3])
    embeddings_path(path).write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"x\.safetensors does not hold embeddings"):
        read_embeddings(path, [4])
    embeddings_path(path).unlink()
    with pytest.raises(ValueError, match="run `ampo-fast embed`"):
        read_embeddings(path, [4])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"x\.jsonl:2: not JSON"),
        ("", r"x\.jsonl:2: empty line"),
        ('{"id": 3, "prompt": [], "responses": []}', r"x\.jsonl:2: .*id must be text"),
        ('{"id": "b", "prompt": "q", "responses": []}', r"x\.jsonl:2: .*prompt must be a list"),
        ('{"id": "b", "prompt": []}', r"x\.jsonl:2: .*responses must be a list"),
        ('{"id": "b", "prompt": ["q"], "responses": []}', r"x\.jsonl:2: .*prompt must be a list of messages"),
        ('{"id": "b", "prompt": [{"content": "q"}], "responses": []}', r"x\.jsonl:2: .*each with role"),
        ('{"id": "b", "prompt": [], "responses": [{"content": null}]}', r"x\.jsonl:2: .*each with text content"),
        (
            '{"id": "b", "prompt": [{"role": "user", "content": "q"}], "responses": [{"content": "", "selected": "best"}]}',
            r"x\.jsonl:2: .*selected = 'best' must be positive, negative or null",
        ),
        (
            '{"id": "a", "prompt": [{"role": "user", "content": "q"}], "responses": []}',
            r"x\.jsonl:2: id 'a' is already at .*x\.jsonl:1",
        ),
    ],
)
def test_broken_rows_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    good = dump_line(row_from_group(make_group("a")))
    path.write_text(good + line + "\n" + good)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


# --- RowWriter --------------------------------------------------------------------------------------------------------


def test_writer_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "x.jsonl"
    with RowWriter(path) as writer:
        assert writer.rows == []
        writer.write([make_group("a")])
    with RowWriter(path) as writer:
        assert [row["id"] for row in writer.rows] == ["a"]
        writer.write([make_group("b"), make_group("c")])
    assert [row["id"] for row in read_rows(path)] == ["a", "b", "c"]


@pytest.mark.parametrize("num_bytes_lost", [1, 2, 40])
def test_torn_last_line_is_dropped(tmp_path, num_bytes_lost):
    path = tmp_path / "x.jsonl"
    with RowWriter(path) as writer:
        writer.write([make_group("a"), make_group("b")])
    path.write_bytes(path.read_bytes()[:-num_bytes_lost])
    with RowWriter(path) as writer:
        assert [row["id"] for row in writer.rows] == ["a"]
        writer.write([make_group("b")])
    assert [row["id"] for row in read_rows(path)] == ["a", "b"]


def test_a_batch_that_is_made_again_adds_only_what_its_file_lacks(tmp_path):
    path = tmp_path / "x.jsonl"
    for ids in ("a", "ab"):
        with RowWriter(path) as writer:
            writer.write([make_group(each) for each in ids])
    assert [row["id"] for row in read_rows(path)] == ["a", "b"]


def test_file_torn_within_its_first_line_starts_anew(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a", "pro')
    with RowWriter(path) as writer:
        assert writer.rows == []
    assert path.read_bytes() == b""


def test_a_full_disk_is_named_with_the_file(tmp_path):
    path = tmp_path / "x.jsonl"
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = RowWriter(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"x\.jsonl"):
            writer.write([make_group("a")])
        with pytest.raises(OSError, match=r"x\.jsonl"):
            writer.__exit__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_rows_are_in_the_file_when_write_returns(tmp_path):
    path = tmp_path / "x.jsonl"
    with RowWriter(path) as writer:
        writer.write([make_group("a")])
        assert [row["id"] for row in read_rows(path)] == ["a"]


def test_finished_groups_come_back_with_the_prompts_as_given(tmp_path):
    path = tmp_path / "x.jsonl"
    given = (GivenResponse(content="answer 0", reward=None), GivenResponse(content="answer 1", reward=NAN))
    group = make_group("a", num=2, responses=given)
    with RowWriter(path) as writer:
        writer.write([group, make_group("other")])
    with RowWriter(path) as writer:
        done = writer.groups([group.prompt, make_group("new").prompt])
    assert list(done) == ["a"]
    assert done["a"].prompt is group.prompt
    assert done["a"] == group
