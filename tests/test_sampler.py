import json
from dataclasses import replace

import pytest
from builders import config, prompt
from conftest import make_tiny_model

from ampo_fast.config import ModelConfig
from ampo_fast.model import Policy
from ampo_fast.sampler import PromptSampler, admit_prompts, load_rows, read_prompts


@pytest.mark.parametrize(("num_prompts", "per_round"), [(10, 4), (7, 7), (5, 3), (12, 4)])
def test_every_prompt_once_an_epoch_and_no_prompt_twice_a_round(num_prompts, per_round):
    sampler = PromptSampler([prompt(i) for i in range(num_prompts)], per_round, seed=1)
    rounds = [[p.id for p in sampler.round(i)] for i in range(num_prompts * 3)]
    assert all(len(set(ids)) == per_round for ids in rounds)
    flat = [i for ids in rounds for i in ids]
    for epoch in range(3):
        assert len(set(flat[epoch * num_prompts : (epoch + 1) * num_prompts])) == num_prompts
    assert flat[:num_prompts] != flat[num_prompts : 2 * num_prompts]


def test_a_round_is_a_pure_function_of_its_index():
    prompts = [prompt(i) for i in range(9)]
    assert PromptSampler(prompts, 4, 0).round(11) == PromptSampler(prompts, 4, 0).round(11)
    assert PromptSampler(prompts, 4, 0).round(0) != PromptSampler(prompts, 4, 1).round(0)


def test_too_few_prompts_are_named():
    with pytest.raises(ValueError, match="needs 4 prompts"):
        PromptSampler([prompt(0)], 4, 0)


def test_overlong_prompts_are_counted_and_too_many_are_an_error(tiny_policy, caplog):
    from builders import config

    prompts = [prompt(i, "hi") for i in range(9)] + [replace(prompt(9, "x" * 200), where="x.jsonl:10")]
    settings = config(data={"max_prompt_tokens": 50, "max_overlong_share": 0.1})
    assert len(admit_prompts(prompts, tiny_policy, settings, "data.train")) == 9
    assert "1 of 10 prompts longer than 50 tokens: x.jsonl:10" in caplog.text
    with pytest.raises(ValueError, match=r"data\.train: 2 of 11 .*\(x\.jsonl:10, p10\); raise"):
        admit_prompts([*prompts, prompt(10, "y" * 200)], tiny_policy, settings, "data.train")


@pytest.mark.parametrize("engine", ["transformers", "data"])
def test_prompts_and_answers_that_could_pass_the_limit_of_the_rope_are_refused(tmp_path, engine):
    rope = {"rope_type": "dynamic", "factor": 4.0}
    directory = make_tiny_model(tmp_path / "m", rope_parameters=rope, max_position_embeddings=64)
    policy = Policy.load(ModelConfig(path=str(directory)))
    prompts = [prompt(0, "x" * 10), prompt(1, "x" * 20), prompt(2, "x" * 60)]
    longest = len(policy.encode_prompt(prompts[1].messages))

    def admit(new, field="data.train"):
        sections = {"rollout": {"max_new_tokens": new, "engine": engine}, "model": {"path": str(directory)}}
        sections |= {"reward": {"kind": "data"}} if engine == "data" else {}
        data = {"max_prompt_tokens": longest, "max_overlong_share": 0.5}  # the last one is left out, and does not count
        return admit_prompts(prompts, policy, config(data=data, **sections), field)

    assert admit(64 - longest) == prompts[:2]
    said = rf"model\.path = .*/m.*: a sequence over 64 tokens .*dynamic.*data\.eval \({longest} tokens\).*lower data\.max_prompt"
    with pytest.raises(ValueError, match=said):
        admit(65 - longest, "data.eval")


# --- all of a run's prompts -------------------------------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_config(tmp_path, num_rows=10, **sections):
    train = write_rows(tmp_path / "train.jsonl", [{"id": f"t{i}", "prompt": "x" * (1 + i)} for i in range(num_rows)])
    held_out = write_rows(tmp_path / "eval.jsonl", [{"id": f"e{i}", "prompt": "y"} for i in range(5)])
    defaults = {"data": {"train": train, "eval": held_out}, "optim": {"prompts_per_step": 4}, "eval": {"prompts": 3}}
    return config(**{name: defaults.get(name, {}) | sections.get(name, {}) for name in defaults | sections})


def prompts_of(settings, policy):
    return read_prompts(settings, policy, load_rows(settings))


def test_a_runs_prompts_come_from_the_config(tiny_policy, tmp_path):
    limit = len(tiny_policy.encode_prompt(prompt(0, "x" * 9).messages))
    found = prompts_of(run_config(tmp_path, data={"max_prompt_tokens": limit}), tiny_policy)
    assert [p.id for p in found.sampler.prompts] == [f"t{i}" for i in range(9)]
    assert (found.sampler.prompts_per_round, found.longest) == (4, limit)
    assert [p.id for p in found.held_out] == ["e0", "e1", "e2"]
    assert len(found.read) == 10


def test_the_longest_prompt_has_the_most_tokens_whatever_the_characters(tiny_policy, tmp_path):
    texts = ["x" * 100] * 64 + ["\N{GRINNING FACE}" * 90]  # a character of four tokens
    longest = len(tiny_policy.encode_prompt(prompt(0, texts[-1]).messages))
    train = write_rows(tmp_path / "long.jsonl", [{"id": str(i), "prompt": text} for i, text in enumerate(texts)])

    def read(budget):
        sections = {"data": {"train": train}, "optim": {"micro_batch_tokens": budget}}
        settings = run_config(tmp_path, rollout={"max_new_tokens": 30}, **sections)
        return read_prompts(settings, tiny_policy, load_rows(settings))

    assert read(longest + 30).longest == longest
    with pytest.raises(ValueError, match=rf"micro_batch_tokens = {longest + 29} .*at least {longest + 30}"):
        read(longest + 29)


def test_given_answers_that_will_be_cut_are_counted_at_the_start(tiny_policy, tmp_path, caplog):
    rows = [{"id": str(i), "prompt": f"q{i}", "chosen": "a" * (3 + 10 * (i < 2)), "rejected": "b"} for i in range(8)]
    data = {"train": write_rows(tmp_path / "pairs.jsonl", rows)}
    offline = {"reward": {"kind": "data"}, "eval": {"reward": "toy_rewards:vowels"}}

    def read(limit):
        settings = run_config(tmp_path, data=data, rollout={"engine": "data", "max_new_tokens": limit}, **offline)
        read_prompts(settings, tiny_policy, load_rows(settings))

    read(14)
    assert caplog.text == ""
    read(13)
    assert "2 of 16 answers that were looked at are longer than rollout.max_new_tokens = 13" in caplog.text
    assert "the longest has 14 tokens" in caplog.text


def test_active_pairs_are_chosen_before_rounds_are_made_of_them(tiny_policy, tmp_path):
    rows = [{"id": str(i), "prompt": f"q{i}", "chosen": "aei" * (i + 1), "rejected": "xyz"} for i in range(6)]
    offline = {"rollout": {"engine": "data"}, "reward": {"kind": "data"}, "eval": {"reward": "toy_rewards:vowels"}}
    data = {"train": write_rows(tmp_path / "pairs.jsonl", rows), "active_pairs": 4}
    found = prompts_of(run_config(tmp_path, data=data, **offline), tiny_policy)
    assert len(found.sampler.prompts) == 4
    with pytest.raises(ValueError, match=r"needs 4 prompts.*the data has 3"):
        prompts_of(run_config(tmp_path, data=data | {"active_pairs": 3}, **offline), tiny_policy)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"prompts_per_step": 40}}, r"needs 40 prompts.*the data has 10"),
        ({"optim": {"micro_batch_tokens": 8}}, r"micro_batch_tokens = 8 cannot hold the longest prompt"),
        (
            {"data": {"max_prompt_tokens": 2, "max_overlong_share": 1.0}},
            r"data\.train: no prompt .*max_prompt_tokens = 2",
        ),
        ({"data": {"eval": "nowhere.jsonl"}}, r"nowhere\.jsonl"),
        (
            {"rollout": {"max_new_tokens": 100_000}, "optim": {"micro_batch_tokens": 200_000}},
            r"was made for \d+ positions; the longest prompt of data\.train .*lower data\.max_prompt_tokens or rollout",
        ),
        (
            {"rollout": {"engine": "vllm-server", "options": {"max_model_len": 77}, "max_new_tokens": 64}},
            r"rollout\.options\.max_model_len = 77: the longest prompt of data\.train \(14 tokens\) .* = 64 pass that",
        ),
    ],
)
def test_prompts_that_a_run_cannot_use_are_refused(tiny_policy, tmp_path, sections, message):
    with pytest.raises(ValueError, match=message):
        prompts_of(run_config(tmp_path, **sections), tiny_policy)
