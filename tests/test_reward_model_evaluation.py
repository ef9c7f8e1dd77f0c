"""Scores against preferences, by hand; and the command on files."""

import gc
import json
import math
import weakref
from dataclasses import replace

import pytest
from builders import prompt
from conftest import make_tiny_model

from ampo_fast import cli
from ampo_fast.evaluate import Scorer, implicit_rewards
from ampo_fast.model import Policy
from ampo_fast.reward_model.config import RewardModelConfig
from ampo_fast.reward_model.evaluation import evaluate_scores, pair_table
from ampo_fast.reward_model.model import RewardModel
from ampo_fast.types import GivenResponse, Prompt


def group(rewards, lengths=None, question="why?"):
    lengths = lengths or range(10, 10 + len(rewards))
    given = tuple(GivenResponse(content="x" * n, reward=r) for n, r in zip(lengths, rewards, strict=True))
    return Prompt(id=question, messages=prompt(0, question).messages, responses=given)


def test_pairs_are_oriented_by_reward_and_ties_kept_apart():
    table = pair_table([group([0.2, 0.9, 0.2], [10, 20, 10])], [[1.0, 3.0, 0.5]])
    assert table.gap_n.tolist() == [2.0, 2.5]
    assert table.margin_n.tolist() == pytest.approx([0.7, 0.7])
    assert table.length_ratio_n.tolist() == pytest.approx([math.log(2), math.log(2)])
    assert table.tie_gap_t.tolist() == [0.5]


def test_measures_by_hand():
    log3 = math.log(3)
    groups = [group([1.0, 0.0], [30, 10]), group([0.0, 0.4], [10, 10], "how?"), group([0.1, 0.1], question="who?")]
    result = evaluate_scores(groups, [[log3, 0.0], [log3, 0.0], [0.0, log3]])
    assert result["accuracy"] == 0.5
    assert result["accuracy_longer_wins"] == 0.75
    assert result["brier"] == pytest.approx((0.25**2 + 0.75**2) / 2)
    assert result["ece"] == pytest.approx(0.25)
    assert result["log_loss"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert (result["num_pairs"], result["num_prompts"], result["num_ties"]) == (2, 2, 1)
    assert result["tie_confidence"] == pytest.approx(0.75)
    assert [(b["count"], b["accuracy"]) for b in result["by_length"]] == [(1, 0.0), (1, 1.0)]
    assert sum(b["count"] for b in result["by_margin"]) == 2
    assert "spearman" not in result


def test_larger_groups_are_ranked():
    result = evaluate_scores([group([0.0, 1.0, 0.5]), group([0.0, 1.0, 0.4])], [[0, 2, 1], [0, 1, 2]])
    assert result["spearman"] == pytest.approx((1.0 + 0.5) / 2)
    assert result["best_of_n_regret"] == pytest.approx(0.3)
    assert result["random_pick_regret"] == pytest.approx((0.5 + (1 - 1.4 / 3)) / 2)
    assert result["num_pairs"] == 6
    assert result["accuracy"] == pytest.approx(5 / 6)


def test_margin_buckets_hold_every_pair_once():
    groups = [group([0.0, m], question=str(m)) for m in (0.1, 0.2, 0.2, 0.3, 0.9, 1.0, 1.0)]
    result = evaluate_scores(groups, [[0.0, 1.0]] * 7)
    assert sum(b["count"] for b in result["by_margin"]) == 7
    assert len(evaluate_scores(groups[:1], [[0.0, 1.0]])["by_margin"]) == 1
    with pytest.raises(ValueError, match="no pair has two different rewards"):
        evaluate_scores([group([1.0, 1.0])], [[0.0, 1.0]])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    rows = [
        {"prompt": f"q{i}", "chosen": "a" * (i + 2), "rejected": "b", "chosen_score": 1 + i, "rejected_score": 0.5}
        for i in range(4)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_evaluate_answers_with_json_and_a_page(tiny_model, pairs, tmp_path, capsys):
    model = RewardModel.load(RewardModelConfig(path=str(tiny_model)), max_tokens=64, seed=0)
    model.export(tmp_path / "rm", [])
    page = tmp_path / "page.html"
    arguments = ["evaluate", "--reward-model", str(tmp_path / "rm"), "--pairs", str(pairs)]
    assert cli.main([*arguments, "--json", "--html", str(page)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    questions = [("q%d" % i, "a" * (i + 2)) for i in range(4)]  # noqa: UP031
    scores = [
        [s.item() for s in model([model.encode(Prompt(id="", messages=prompt(0, q).messages, responses=tuple(
            GivenResponse(content=text) for text in (answer, "b"))))])]
        for q, answer in questions
    ]  # fmt: skip
    assert result["accuracy"] == sum(a > b for a, b in scores) / 4
    assert result["num_pairs"] == 4
    text = page.read_text()
    assert "Reliability" in text
    assert "By margin" in text
    assert cli.main([*arguments, "--limit", "2"]) == 0
    assert "on 2 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_named(score):
    with pytest.raises(ValueError, match=r"scores are NaN or infinite in 1 of 2 groups: why"):
        evaluate_scores([group([1.0, 0.0]), group([1.0, 0.0])], [[0.0, 1.0], [score, 1.0]])


def test_a_models_implicit_reward_over_itself_is_zero(tiny_model):
    rows = implicit_rewards(str(tiny_model), str(tiny_model), 0.1, [group([1.0, 0.0])])
    assert rows == [[0.0, 0.0]]


def test_implicit_rewards_are_beta_times_the_log_ratio(tiny_model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = make_tiny_model(tmp_path / "other", intermediate_size=48)
    question = group([1.0, 0.0], [3, 6])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = []
    for response in question.responses:
        start = tokenizer.apply_chat_template(list(question.messages), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(start + response.content + "<|end|>", add_special_tokens=False, return_tensors="pt").input_ids
        first = len(tokenizer(start, add_special_tokens=False).input_ids)
        sums = []
        for path in (other, tiny_model):
            logp = AutoModelForCausalLM.from_pretrained(path)(ids).logits.log_softmax(-1)[0, :-1]
            sums.append(logp.gather(1, ids[0, 1:, None])[first - 1 :].sum().item())
        expected.append(0.5 * (sums[0] - sums[1]))
    with torch.no_grad():
        (found,) = implicit_rewards(str(other), str(tiny_model), 0.5, [question])
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_pair_that_is_longer_than_the_model_was_made_for_is_refused(tmp_path):
    small = str(make_tiny_model(tmp_path / "small", max_position_embeddings=40))
    short, long = group([1.0, 0.0], [3, 6]), replace(group([1.0, 0.0], [3, 60]), id="long")
    assert implicit_rewards(small, small, 0.1, [short]) == [[0.0, 0.0]]
    with pytest.raises(ValueError, match=r"made for 40 tokens; .* longer in 1 of 2 rows: long; leave them out"):
        implicit_rewards(small, small, 0.1, [short, long])


def test_a_reference_of_another_vocabulary_is_refused_before_a_model_is_read(tiny_model, tmp_path, monkeypatch):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    data = json.loads((other / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(data))
    monkeypatch.setattr(Policy, "load", None)
    with pytest.raises(ValueError, match=r"other has another vocabulary.*2 differ"):
        implicit_rewards(str(tiny_model), str(other), 0.1, [group([1.0, 0.0])])


def test_one_of_the_two_models_is_in_memory_at_a_time(tiny_model, monkeypatch):
    alive, load = [], Policy.load

    def watched(config):
        gc.collect()
        assert not any(policy() for policy in alive)
        policy = load(config)
        alive.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr(Policy, "load", watched)
    implicit_rewards(str(tiny_model), str(tiny_model), 0.1, [group([1.0, 0.0])])
    assert len(alive) == 2


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "either --reward-model"),
        ({"reward_model": "a", "policy": "b", "reference": "c"}, "either --reward-model"),
        ({"policy": "b"}, "needs --reference"),
        ({"reward_model": "a", "beta": 0.0}, "--beta = 0"),
    ],
)
def test_a_scorer_that_is_not_one_is_named(fields, match):
    with pytest.raises(ValueError, match=match):
        Scorer(**fields)


def test_an_untrained_head_is_refused(tiny_model, pairs, capsys):
    assert cli.main(["evaluate", "--reward-model", str(tiny_model), "--pairs", str(pairs)]) == 2
    assert "--reward-model" in capsys.readouterr().err


def test_rewardbench_rows_are_read_by_subset(tiny_model, tmp_path, capsys):
    models = {"chosen_model": "x", "rejected_model": "y"}
    rows = [
        {"prompt": f"q{i}", "chosen": "good", "rejected": "bad", "subset": subset, "id": i % 2} | models
        for i, subset in enumerate(["easy", "easy", "hard"])
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", "--policy", str(tiny_model), "--reference", str(tiny_model), "--pairs", str(path)]
    assert cli.main([*arguments, "--json", "--html", str(tmp_path / "page.html")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["num_pairs"], result["accuracy"], result["log_loss"]) == (3, 0.0, pytest.approx(math.log(2)))
    assert [(b["bucket"], b["count"]) for b in result["by_subset"]] == [("easy", 2), ("hard", 1)]
    assert "By subset" in (tmp_path / "page.html").read_text()


def test_subsets_are_measured_one_by_one():
    groups = [replace(group([1.0, 0.0], question=q), subset=s) for q, s in (("a", "x"), ("b", "y"), ("c", "y"))]
    result = evaluate_scores(groups, [[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    assert [(b["bucket"], b["count"], b["accuracy"]) for b in result["by_subset"]] == [("x", 1, 1.0), ("y", 2, 0.5)]
    assert "by_subset" not in evaluate_scores([group([1.0, 0.0])], [[1.0, 0.0]])
