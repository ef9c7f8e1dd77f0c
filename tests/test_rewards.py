import math

import pytest
import torch
from builders import config, group, prompt

from ampo_fast.rewards import (
    check_missing,
    check_scores,
    make_reward,
    normalize_rewards,
    normalizer_for,
    relevance,
    score_groups,
    valid_candidates,
)
from ampo_fast.types import Candidate, CandidateGroup, GivenResponse, Prompt

NAN = math.nan


class FakeEmbedder:
    num_windowed = 0

    def embed(self, texts):
        return torch.stack(
            [torch.nn.functional.normalize(torch.tensor([1.0, len(t) / 10, t.count("e")]), dim=0) for t in texts]
        )


def test_normalisation_rules_by_hand_and_over_the_valid_only():
    raw, valid = (1.0, 3.0, 2.0, 99.0), (True, True, True, False)
    assert normalize_rewards(raw, valid, "none")[:3] == (1.0, 3.0, 2.0)
    assert normalize_rewards(raw, valid, "minmax")[:3] == (0.0, 1.0, 0.5)
    z = normalize_rewards(raw, valid, "zscore")
    assert z[:3] == pytest.approx((-math.sqrt(1.5), math.sqrt(1.5), 0.0))
    assert normalize_rewards((0.0,), (True,), "sigmoid") == (0.5,)
    for rule in ("none", "minmax", "zscore", "sigmoid"):
        assert math.isnan(normalize_rewards(raw, valid, rule)[3])
    assert normalize_rewards((2.0, 2.0), (True, True), "minmax") == (0.5, 0.5)
    assert normalize_rewards((2.0, 2.0), (True, True), "zscore") == (0.0, 0.0)


def test_win_rates_are_against_the_other_valid_candidates():
    rates = normalize_rewards((1.0, 3.0, 2.0, 99.0), (True, True, True, False), "win_rate")

    def s(x):
        return 1 / (1 + math.exp(-x))

    assert rates[:3] == pytest.approx(((s(-2) + s(-1)) / 2, (s(2) + s(1)) / 2, 0.5), abs=1e-12)
    assert math.isnan(rates[3])
    assert normalize_rewards((7.0, 7.0), (True, True), "win_rate") == (0.5, 0.5)


def test_several_rewards_are_normalised_one_by_one_and_averaged():
    settings = config(
        reward={"kind": ["toy_rewards:vowels", "toy_rewards:sometimes_missing"], "max_missing_share": 0.5}
    )
    groups = [group(["abe", "xyz", "aeiou", "lost"])]
    found = make_reward(settings)(groups)
    vowels, lengths = [2 / 4, 0.0, 5 / 6], [3.0, 3.0, 5.0]
    assert found[0][:3] == [pytest.approx(pair) for pair in zip(vowels, lengths, strict=True)]
    (scored,) = score_groups(groups, make_reward(settings), FakeEmbedder(), settings)
    assert scored.valid == (True, True, True, False)  # one of its rewards is missing
    kept = [True] * 3
    rates = [normalize_rewards(values, kept, "win_rate") for values in (vowels, lengths)]
    assert scored.reward[:3] == pytest.approx([(a + b) / 2 for a, b in zip(*rates, strict=True)], abs=1e-12)
    assert scored.reward_raw[:3] == pytest.approx([(a + b) / 2 for a, b in zip(vowels, lengths, strict=True)])
    assert scored.reward_by_scorer[1][:3] == (3.0, 3.0, 5.0)
    with pytest.raises(ValueError, match=r"p0\[3\]"):
        check_missing(groups, found, 0.0)


@pytest.mark.parametrize(
    ("loss", "kind", "rule"),
    [
        ("CaPO", "relevance", "win_rate"),
        ("AMPO", "relevance", "minmax"),
        ("GroupContrastive", "relevance", "minmax"),
        ("REFADynamic", "relevance", "minmax"),
        ("AMPO", ["relevance", "m:f"], "win_rate"),
        ("MMPO", "relevance", "none"),
    ],
)
def test_the_automatic_rule_goes_by_the_loss_and_the_number_of_rewards(loss, kind, rule):
    settings = config(loss={"name": loss}, reward={"kind": kind})
    assert normalizer_for(settings) == rule
    assert normalizer_for(config(loss={"name": loss}, reward={"kind": kind, "normalize": "zscore"})) == "zscore"


def test_the_automatic_rule_of_a_loss_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"loss\.name = 'AMPOO'; known: AMPO, "):
        normalizer_for(config(loss={"name": "AMPOO"}))


def test_empty_duplicate_and_unscored_candidates_are_invalid():
    made = group(["a", "", "a ", "b", "c"], finish=["stop", "stop", "stop", "stop", "length"])
    assert valid_candidates(made, (1.0, 1.0, 1.0, NAN, 1.0)) == (True, False, False, False, True)
    assert valid_candidates(made, (1.0,) * 5, "exclude") == (True, False, False, True, False)


def test_a_repeat_counts_where_the_first_one_does_not():
    finish = ["length", "stop", "stop", "stop", "stop"]
    repeated = group(["a", "a", "b", "b", "b"], finish=finish)
    rewards = [1.0, 1.0, math.nan, 2.0, 2.0]
    assert valid_candidates(repeated, rewards, "exclude") == (False, True, False, True, False)


def test_missing_rewards_are_masked_until_they_are_too_many():
    groups = [group(["a", "b", "c", "d"])]
    check_missing(groups, [[1.0, None, 2.0, 3.0]], 0.25)
    with pytest.raises(ValueError, match=r"p0\[1\], p0\[3\]"):
        check_missing(groups, [[1.0, None, 2.0, math.inf]], 0.25)


def test_user_function_rewards_and_embeddings_meet_in_the_scored_group():
    settings = config(reward={"kind": "toy_rewards:sometimes_missing", "max_missing_share": 0.5})
    groups = [group(["ab", "abc", "abcd", "abcde"])]
    (scored,) = score_groups(groups, make_reward(settings), FakeEmbedder(), settings)
    assert scored.reward_raw[:3] == (2.0, 3.0, 4.0)
    assert scored.valid == (True, True, True, False)
    assert scored.reward[:3] == (0.0, 0.5, 1.0)
    assert scored.embedding.shape == (4, 3)


@pytest.mark.parametrize(
    ("kind", "match"),
    [("nonsense", "reward.kind"), ("no_such_module:f", "imported")],
)
def test_unknown_scorers_are_named(kind, match):
    with pytest.raises(ValueError, match=match):
        make_reward(config(reward={"kind": kind}))


def test_a_scorer_of_held_out_answers_is_named_by_its_own_field():
    for kind in ("nonsense", "toy_rewards:nope"):
        with pytest.raises(ValueError, match=rf"^eval\.reward = '{kind}'"):
            make_reward(config(), kind=kind)


def given_group(*responses):
    candidates = tuple(Candidate(content=given.content, token_ids=(3, 1)) for given in responses)
    owner = Prompt(id="x", messages=prompt().messages, responses=responses)
    return CandidateGroup(prompt=owner, prompt_ids=(1,), candidates=candidates)


def given_config(kind):
    return config(reward={"kind": kind}, rollout={"engine": "data"})


def test_given_rewards_come_from_the_data():
    given = given_group(GivenResponse(content="a", reward=0.5), GivenResponse(content="b", reward=None))
    assert make_reward(given_config("data"))([given]) == [[0.5, None]]


def test_a_given_score_is_a_reward_by_its_name_alone_or_beside_others():
    given = given_group(
        GivenResponse(content="a", reward=0.5, scores={"help": 4.0, "honest": None}),
        GivenResponse(content="b", reward=0.25, scores={"help": 2.0}),
    )
    assert make_reward(given_config("data:help"))([given]) == [[4.0, 2.0]]
    assert make_reward(given_config(["data:help", "data"]))([given]) == [[(4.0, 0.5), (2.0, 0.25)]]
    assert make_reward(given_config("data:honest"))([given]) == [[None, None]]
    with pytest.raises(ValueError, match=r"data:harm.*the responses of prompt x have only help, honest"):
        make_reward(given_config("data:harm"))([given])


def test_a_score_that_the_data_lacks_is_refused_before_anything_is_sampled():
    rated = GivenResponse(content="a", scores={"help": 4.0})
    prompts = [Prompt(id=str(i), messages=prompt().messages, responses=(rated,), where=f"x.jsonl:{i}") for i in (1, 2)]
    check_scores(prompts, ["data:help", "data"])
    with pytest.raises(ValueError, match=r"'data:helpfulness': the responses of prompt x\.jsonl:1 have only help"):
        check_scores(prompts, ["data", "data:helpfulness"])


def test_relevance_prefers_a_finished_answer_to_the_point():
    from ampo_fast.embeddings import SentenceEncoder

    encoder = SentenceEncoder("package:all-minilm-l6-v2")
    asked = prompt(0, "Briefly, why do leaves change color in autumn?")
    answers = [
        "Leaves change because green chlorophyll breaks down and other pigments show in autumn.",
        "Leaves change because green chlorophyll breaks down and other pigments show in autumn",
        "The stock market closed higher today after a strong report on jobs was published.",
        "Leaves change color. Leaves change color. Leaves change color. Leaves change color.",
        "Briefly, why do leaves change color in autumn?",
        "",
    ]
    good, unfinished, off_topic, repeated, parrot, empty = relevance([asked] * 6, answers, encoder)
    assert good > 0.5
    assert unfinished == pytest.approx(good / 2, rel=0.05)
    assert off_topic < 0.25 * good
    assert repeated < 0.5 * good
    assert parrot < 0.1
    assert empty == 0.0
