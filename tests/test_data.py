"""Every format read, and every kind of bad input refused by file and line."""

import builtins
import csv
import gzip
import json
import math
import os
import sys
import types
from pathlib import Path

import pytest

from ampo_fast.data import load_prompts
from ampo_fast.data_formats import FORMATS
from ampo_fast.types import GivenResponse

USER = {"role": "user", "content": "Why is the sky blue?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def load_one(tmp_path):
    def load(row, **options):
        (prompt,) = load_prompts(write(tmp_path / "data.jsonl", row), **options)
        return prompt

    return load


def contents(prompt):
    return [(response.content, response.reward) for response in prompt.responses]


# --- tables, lists, and columns of other names ----------------------------------------------------

ODD = {"prompt": "question", "chosen": "good", "rejected": "bad", "chosen_score": "s1", "rejected_score": "s2"}


def test_a_table_gives_what_jsonl_gives(tmp_path):
    row = {"id": "a", "prompt": 'Say "hi",\nor not', "chosen": "hi 日本", "rejected": "0.5"}
    scored = row | {"chosen_score": 1e-3, "rejected_score": -2}
    expected = load_prompts(write(tmp_path / "data.jsonl", scored))
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        path = tmp_path / f"data.{suffix}"
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            table = csv.writer(file, delimiter=delimiter)  # Windows line ends, as spreadsheets write them
            table.writerows([scored.keys(), scored.values()])
        assert load_prompts(str(path)) == expected


def test_a_list_in_one_json_file_is_rows_and_lines_under_that_name_too(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    path = tmp_path / "data.json"
    path.write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    listed = load_prompts(str(path))
    assert [(p.id, p.where) for p in listed] == [("1", f"{path}: row 1"), ("2", f"{path}: row 2")]
    assert load_prompts(write(path, *rows)) == listed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,chosen,rejected\na,b,c\na,b\n", r":3: 2 cells under 3 names"),
        ("prompt,chosen,chosen\na,b,c\n", r":1: two columns of one name"),
        ('prompt,chosen,rejected\na,"b"x,c\n', r":2: ',' expected after '\"'"),
        ("prompt,chosen,rejected,chosen_score,rejected_score\na,b,c,high,1\n", r":2: the reward of chosen .*'high'"),
        ("prompt,chosen,rejected\na,b,\n", r":2: missing field 'rejected'"),
        ("prompt,chosen,rejected\n", r"is empty"),
        ("", r"is empty"),
    ],
)
def test_broken_tables_name_file_and_line(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(path), needs_responses=True)


def test_columns_say_what_the_data_calls_a_formats_fields(load_one):
    row = {"question": "q", "good": "a", "bad": "b", "s1": 3, "s2": 1, "prompt": "another thing"}
    prompt = load_one(row, needs_responses=True, columns=ODD)
    assert (prompt.messages[0]["content"], contents(prompt)) == ("q", [("a", 3.0), ("b", 1.0)])


def test_a_misspelt_column_is_refused_with_the_fields_there_are(load_one):
    row = {"question": "q", "good": "a", "bad": "b", "s1": 3, "s3": 1}
    with pytest.raises(
        ValueError, match=r":1: data\.columns\.rejected_score = 's2' is no field; there are question, good"
    ):
        load_one(row, needs_responses=True, columns=ODD)
    assert load_one({"question": "q"}, columns=ODD).messages[0]["content"] == "q"  # held-out prompts need no more


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{"prompt": USER["content"]}, {"prompt": [USER]}, {"messages": [USER]}])
def test_prompts_only(load_one, row):
    prompt = load_one(row)
    assert prompt.messages == (USER,)
    assert prompt.responses == ()


def test_system_turn_and_several_turns_are_kept_and_other_keys_dropped(load_one):
    turns = [SYSTEM, USER, assistant("Light."), {"role": "user", "content": "More?", "name": "Ada"}]
    assert load_one({"prompt": turns}).messages == (*turns[:3], {"role": "user", "content": "More?"})


def test_multi_response(load_one):
    responses = [{"content": "a", "reward": 1, "generator": "m"}, {"content": "", "reward": 0.1}]
    prompt = load_one({"prompt": [USER], "responses": responses})
    assert prompt.responses == (GivenResponse(content="a", reward=1.0), GivenResponse(content="", reward=0.1))
    assert type(prompt.responses[0].reward) is float


def test_stage_rows_give_their_raw_reward(load_one):
    response = {"content": "a", "token_ids": [1], "reward_raw": 7.5, "reward": 1.0, "selected": "positive"}
    assert contents(load_one({"id": "x", "prompt": [USER], "responses": [response]})) == [("a", 7.5)]


def test_ratings_by_name_are_kept_and_their_mean_stands_in_for_a_missing_reward(load_one):
    responses = [
        {"content": "a", "scores": {"help": 4, "honest": 1.5}},
        {"content": "b", "scores": {"help": 4, "honest": None}},
        {"content": "c", "scores": {"help": 4, "judge": "me"}, "reward": 0.5},
        {"content": "d", "scores": [3, 4], "reward": 0.25},
    ]
    prompt = load_one({"prompt": [USER], "responses": responses})
    assert contents(prompt) == [("a", 2.75), ("b", None), ("c", 0.5), ("d", 0.25)]
    assert [response.scores for response in prompt.responses] == [
        {"help": 4.0, "honest": 1.5}, {"help": 4.0, "honest": None}, {"help": 4.0}, {},
    ]  # fmt: skip


def ultrafeedback(*ratings):
    aspects = ("instruction_following", "honesty")
    completions = [
        {
            "model": "m", "response": f"answer {i}", "overall_score": 10.0, "fine-grained_score": 1.0,
            "annotations": {a: {"Rating": r, "Rationale": "..."} for a, r in zip(aspects, pair, strict=True)},
        }
        for i, pair in enumerate(ratings)
    ]  # fmt: skip
    return {"source": "evol", "instruction": USER["content"], "models": ["m"], "completions": completions}


def test_ultrafeedback_rewards_are_the_mean_of_the_aspects(load_one):
    prompt = load_one(ultrafeedback(("5", "4"), ("1", "N/A")))
    assert prompt.messages == (USER,)
    assert contents(prompt) == [("answer 0", 4.5), ("answer 1", None)]
    assert prompt.responses[1].scores == {"instruction_following": 1.0, "honesty": None}


@pytest.mark.parametrize("number", ["NaN", "null", "Infinity", "-Infinity"])
def test_reward_that_is_no_finite_number_becomes_none(tmp_path, number):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"prompt": "q", "responses": [{{"content": "a", "reward": {number}}}]}}\n')
    assert contents(load_prompts(str(path))[0]) == [("a", None)]


def test_ampo_pool_comes_before_the_columns_selected_from_it(load_one):
    row = {
        "prompt_id": "p9",
        "prompt": USER["content"],
        "all_generated_responses": ["a", "b", "c"],
        "all_reward_scores": [1.0, 2.0, math.nan],
        "A0": [USER, assistant("b")],
        "A1": [USER, assistant("a")],
        "score_A0": 2.0,
        "score_A1": 1.0,
    }
    prompt = load_one(row)
    assert prompt.id == "p9"
    assert contents(prompt) == [("a", 1.0), ("b", 2.0), ("c", None)]


@pytest.mark.parametrize("before", [[], [USER]])
def test_ampo_columns_in_numeric_order(load_one, before):
    row = {"prompt": USER["content"]}
    for i in range(12):
        row |= {f"A{i}": [*before, assistant(f"answer {i}")], f"score_A{i}": i / 10}
    prompt = load_one(row)
    assert prompt.messages == (USER,)
    assert contents(prompt) == [(f"answer {i}", i / 10) for i in range(12)]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({}, (1.0, 0.0)),
        ({"margin": 0.25}, (0.25, 0.0)),
        ({"chosen_score": 8, "rejected_score": 3, "margin": 5}, (8.0, 3.0)),
    ],
)
@pytest.mark.parametrize("is_chat", [True, False])
def test_preference_pair_with_a_prompt(load_one, scores, expected, is_chat):
    row = {"prompt": [USER], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    if not is_chat:
        row = {"prompt": USER["content"], "chosen": "good", "rejected": "bad"}
    prompt = load_one(row | scores)
    assert prompt.messages == (USER,)
    assert contents(prompt) == [("good", expected[0]), ("bad", expected[1])]


def test_implicit_prompt_of_chat_pairs_is_what_they_share(load_one):
    turns = [SYSTEM, USER]
    prompt = load_one({"chosen": [*turns, assistant("good")], "rejected": [*turns, assistant("bad")]})
    assert prompt.messages == (SYSTEM, USER)
    assert contents(prompt) == [("good", 1.0), ("bad", 0.0)]


def test_implicit_prompt_of_text_pairs_ends_at_a_whole_word(load_one):
    prompt = load_one({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert prompt.messages == ({"role": "user", "content": "The sky is"},)
    assert contents(prompt) == [("blue.", 1.0), ("black.", 0.0)]


def test_ultrafeedback_binarized_keeps_the_whole_conversation(load_one):
    turns = [USER, assistant("Scattering."), {"role": "user", "content": "Of what?"}]
    row = {
        "prompt": USER["content"],
        "prompt_id": "abc",
        "chosen": [*turns, assistant("light")],
        "rejected": [*turns, assistant("cheese")],
        "messages": [*turns, assistant("light")],
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    }
    prompt = load_one(row)
    assert prompt.id == "abc"
    assert prompt.messages == tuple(turns)
    assert contents(prompt) == [("light", 8.5), ("cheese", 4.0)]


# --- sources --------------------------------------------------------------------------------------


def test_gzip_and_blank_last_line(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"prompt": "a"}\n{"prompt": "b"}\n  \n')
    assert [prompt.id for prompt in load_prompts(str(path))] == ["1", "2"]


def test_cut_gzip_file_is_an_error(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-12])
    with pytest.raises(ValueError, match=r"data\.jsonl\.gz is not a whole gzip file"):
        load_prompts(str(path))


def write_parquet(path, rows):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return str(path)


def test_parquet_gives_what_jsonl_gives(tmp_path):
    rows = [
        {"id": i, "prompt": [USER], "responses": [{"content": "a", "reward": 0.1}, {"content": "b", "reward": None}]}
        for i in range(3)
    ]
    from_parquet = load_prompts(write_parquet(tmp_path / "x.parquet", rows))
    assert from_parquet == load_prompts(write(tmp_path / "x.jsonl", *rows))
    assert from_parquet[2].id == "2"


def test_parquet_errors_name_the_row_and_the_file(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": None}]
    with pytest.raises(ValueError, match=r"x\.parquet: row 2: fields \(none\) fit no known format"):
        load_prompts(write_parquet(tmp_path / "x.parquet", rows))
    (tmp_path / "y.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"y\.parquet cannot be read as Parquet"):
        load_prompts(str(tmp_path / "y.parquet"))
    with pytest.raises(ValueError, match="does not exist"):
        load_prompts(str(tmp_path / "z.parquet"))


@pytest.mark.parametrize(("source", "module"), [("x.parquet", "pyarrow"), ("some/set", "datasets")])
def test_missing_package_says_what_to_install(monkeypatch, tmp_path, source, module):
    monkeypatch.chdir(tmp_path)
    Path("x.parquet").touch()
    real_import = builtins.__import__

    def no_import(name, *args, **kwargs):
        if name.partition(".")[0] == module:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_import)
    with pytest.raises(ImportError, match=f"pip install {module}"):
        load_prompts(source)


def fake_datasets(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_data_set_name_with_and_without_split(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"prompt": "a"}]

    fake_datasets(monkeypatch, load_dataset)
    assert load_prompts("org/set")[0].messages[0]["content"] == "a"
    load_prompts("org/set:train_prefs")
    assert asked == [("org/set", "train"), ("org/set", "train_prefs")]


def test_unreachable_hub_is_a_clear_error(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("Couldn't reach 'org/set' on the Hub")

    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(ValueError, match=r"'org/set' is not a file.*Couldn't reach.*give a file"):
        load_prompts("org/set")


def test_quickstart_prompts_ship_and_do_not_overlap():
    train, held_out = load_prompts("package:quickstart_train"), load_prompts("package:quickstart_eval")
    assert (len(train), len(held_out)) == (96, 32)
    assert train[0].id == "train-001"
    assert held_out[0].id == "eval-01"
    texts = [prompt.messages[0]["content"].lower() for prompt in (*train, *held_out)]
    assert len(set(texts)) == 128


def test_unknown_packaged_prompts_name_the_known_ones():
    with pytest.raises(ValueError, match="package:quickstart_train"):
        load_prompts("package:quickstat")


@pytest.mark.parametrize(
    ("name", "num_prompts", "num_responses"),
    [
        ("alpaca_multi_dev_tiny.jsonl", 64, 1024),
        ("human_multi_dev.jsonl", 30, 180),
        ("pairs_dev.jsonl.gz", 2507, 5014),
        ("prompts_dev.jsonl", 980, 0),
    ],
)
def test_real_data_reads_whole(name, num_prompts, num_responses):
    beside = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("AMPO_FAST_DATA", beside)) / name
    if not path.exists():
        pytest.skip("needs the directory that AMPO_FAST_DATA names")
    prompts = load_prompts(str(path))
    assert len(prompts) == num_prompts
    assert sum(len(prompt.responses) for prompt in prompts) == num_responses
    assert all(response.reward is not None for prompt in prompts for response in prompt.responses)


# --- ids ------------------------------------------------------------------------------------------


def test_ids_from_id_prompt_id_or_the_row_number(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        {"id": 7, "prompt_id": "no", "prompt": "a"},
        {"prompt_id": "p", "prompt": "b"},
        {"prompt": "c"},
    )
    assert [prompt.id for prompt in load_prompts(path)] == ["7", "p", "3"]


def test_a_missing_file_is_named_by_its_field(tmp_path):
    for name in ("no.jsonl", "no.parquet"):
        with pytest.raises(ValueError, match=r"^data\.train = '.*no\..*' does not exist"):
            load_prompts(str(tmp_path / name), field="data.train")


def test_a_prompt_knows_its_line_whatever_its_id(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "a"}, {"id": "second", "prompt": "b"})
    assert [prompt.where for prompt in load_prompts(path)] == [f"{path}:1", f"{path}:2"]


def test_repeated_id_names_both_lines(tmp_path):
    path = write(tmp_path / "x.jsonl", {"id": "a", "prompt": "1"}, {"prompt": "2"}, {"id": "a", "prompt": "3"})
    with pytest.raises(ValueError, match=r"x\.jsonl:3: id 'a' is already at .*x\.jsonl:1"):
        load_prompts(path)


def test_pairs_over_one_prompt_may_share_its_id(tmp_path):
    rows = [{"id": "a", "prompt": "q", "chosen": f"good {i}", "rejected": "bad"} for i in range(3)]
    prompts = load_prompts(write(tmp_path / "x.jsonl", *rows))
    assert [prompt.id for prompt in prompts] == ["a", "a#2", "a#3"]
    rows[2]["prompt"] = "another"
    with pytest.raises(ValueError, match=r"x\.jsonl:3: id 'a' is already at"):
        load_prompts(write(tmp_path / "x.jsonl", *rows))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n\n{"prompt": "b"}\n', r"x\.jsonl:2: empty line"),
        ('{"prompt": "a"}\n{"prompt": \n', r"x\.jsonl:2: not JSON: .* at column 1[12]"),
        ('{"prompt": ' + "[" * 100_000, r"x\.jsonl:1: nested too deeply"),
        ('{"prompt": "a"}\n["b"]\n', r"x\.jsonl:2: expected a JSON object, got list"),
        ("", r"x\.jsonl is empty"),
        ("\n", r"x\.jsonl is empty"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(path))


@pytest.mark.parametrize("row", [{"prompt": "a \ud83d b"}, {"prompt": "a", "responses": [{"content": "\udc00"}]}])
def test_half_a_character_names_the_line(tmp_path, row):
    whole = {"prompt": "\ud83d\ude00", "responses": [{"content": "\U0001f600", "reward": 1.0}]}
    path = tmp_path / "half.jsonl"
    path.write_text(json.dumps(whole) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"half\.jsonl:2: \\u(d83d|dc00) is half a character"):
        load_prompts(str(path))
    path.write_text(json.dumps(whole) + "\n")
    assert load_prompts(str(path))[0].messages[0]["content"] == "\U0001f600"


def test_text_that_is_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not UTF-8"):
        load_prompts(str(path))


def test_missing_file_unknown_suffix_and_directory(tmp_path):
    with pytest.raises(ValueError, match=r"no\.jsonl' does not exist"):
        load_prompts(str(tmp_path / "no.jsonl"))
    (tmp_path / "x.txt").write_text("prompt\na\n")
    with pytest.raises(ValueError, match=r"must end in \.jsonl, \.jsonl\.gz, \.json, \.parquet, \.csv"):
        load_prompts(str(tmp_path / "x.txt"))
    with pytest.raises(ValueError, match=r"must end in"):
        load_prompts(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        load_prompts("./nothing")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"fields \(question\) fit no known format; known: multi-response \(prompt, responses\)"),
        ({"prompt": "a", "chosen": "b"}, r"missing field 'rejected' of the format 'preference pair'; known: "),
        ({"responses": []}, r"missing field 'prompt' of the format 'multi-response'"),
        ({"prompt": "a", "all_generated_responses": ["b"]}, "missing field 'all_reward_scores'"),
        ({"prompt": "a", "A0": "x", "A1": "y", "score_A0": 1}, "missing field 'score_A1'"),
        ({"prompt": "a", "responses": [{"reward": 1}]}, r"responses\[0\]: missing field 'content'"),
        ({"prompt": "a", "responses": [{"content": "b"}]}, r"responses\[0\]: missing field 'reward'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 1}, "missing field 'rejected_score'"),
        ({"chosen": [USER, assistant("a")], "rejected": [SYSTEM, assistant("b")]}, "rejected does not begin with"),
        ({"chosen": "abc", "rejected": "abd"}, "share no prompt"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "share no prompt"),
        ({"prompt": "other", "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}, "does not begin"),
        ({"prompt": "a", "all_generated_responses": ["b"], "all_reward_scores": []}, "1 all_generated_responses but 0"),
    ],
)
def test_missing_fields_are_named_with_the_known_formats(tmp_path, row, message):
    path = write(tmp_path / "x.jsonl", row)
    with pytest.raises(ValueError, match=r"x\.jsonl:1: .*" + message):
        load_prompts(path)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([SYSTEM], "no user turn"),
        ([], "no user turn"),
        ([USER, assistant("a")], "must end with a user turn, its last turn is the assistant's"),
        ("  ", "last user turn is empty"),
    ],
)
def test_prompt_must_end_with_a_user_turn(tmp_path, turns, message):
    path = write(tmp_path / "x.jsonl", {"prompt": "fine"}, {"prompt": turns})
    with pytest.raises(ValueError, match=r"x\.jsonl:2: .*" + message):
        load_prompts(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3}, "prompt must be text or a list of chat turns, got int"),
        ({"prompt": ["a"]}, r"prompt\[0\] must be a chat turn \{role, content\}, got str"),
        ({"prompt": [{"role": "human", "content": "a"}]}, r"prompt\[0\]\.role = 'human'"),
        ({"prompt": [{"role": "user", "content": ["a"]}]}, r"prompt\[0\]\.content must be text, got list"),
        ({"prompt": "a", "responses": "b"}, "responses must be a list"),
        ({"prompt": "a", "responses": ["b"]}, r"responses\[0\] must be"),
        ({"prompt": "a", "responses": [{"content": 1, "reward": 1}]}, r"responses\[0\]\.content must be text"),
        ({"prompt": "a", "responses": [{"content": "b", "reward": "1"}]}, "reward must be a number or null, got str"),
        ({"prompt": "a", "responses": [{"content": "b", "reward": True}]}, "got bool"),
        ({"prompt": "a", "chosen": "b", "rejected": 5}, "rejected must be text or a list"),
        ({"prompt": "a", "chosen": "b", "rejected": [USER]}, "rejected must be text or end with an assistant turn"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "rejected must be text or end with an assistant turn"),
        ({"prompt": "a", "all_generated_responses": "b", "all_reward_scores": [1]}, "must be a list, got str"),
        (
            ultrafeedback(("5", "high")),
            r"completions\[0\]\.honesty\.Rating must be a number as text, or N/A, got 'high'",
        ),
        (
            {"instruction": "a", "completions": [{"response": "b"}]},
            r"completions\[0\] must be \{response, annotations\}",
        ),
        ({"instruction": "a", "completions": "b"}, "completions must be a list"),
        ({"prompt": "a", "id": 1.5}, "id must be text or an integer, got float"),
    ],
)
def test_wrong_types_are_named(tmp_path, row, message):
    path = write(tmp_path / "x.jsonl", row)
    with pytest.raises(ValueError, match=r"x\.jsonl:1: .*" + message):
        load_prompts(path)


def test_second_format_in_one_file_is_an_error(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "x.jsonl", pair, {"prompt": "a"})
    with pytest.raises(ValueError, match=r"x\.jsonl:2: missing field 'chosen', 'rejected'.*x\.jsonl:1 as 'preference"):
        load_prompts(path)
    path = write(tmp_path / "x.jsonl", {"prompt": "a"}, pair)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: two formats in one source"):
        load_prompts(path)


def test_needs_responses_refuses_bare_prompts(load_one):
    with pytest.raises(ValueError, match=r"x?data\.jsonl:1: no responses; the fields that bring them: responses"):
        load_one({"prompt": "a"}, needs_responses=True)
    assert load_one({"prompt": "a", "chosen": "b", "rejected": "c"}, needs_responses=True).responses


def test_every_format_reads_rows_of_its_required_fields_only():
    assert len({known.name for known in FORMATS}) == len(FORMATS)
    assert all(set(known.marks) & set(known.required) for known in FORMATS)


def test_an_answer_that_a_stage_file_says_was_cut_stays_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    answers = [{"content": "whole", "reward": 1.0, "finish_reason": "stop"}, {"content": "cu", "reward": 2.0}]
    answers += [{"content": "cu", "reward": 2.0, "finish_reason": "length"}]
    answers += [{"content": "other", "reward": 2.0, "finish_reason": "tool_calls"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "q", "responses": answers}))
    (read,) = load_prompts("~/x.jsonl")
    assert [response.finish_reason for response in read.responses] == ["stop", "stop", "length", "stop"]
