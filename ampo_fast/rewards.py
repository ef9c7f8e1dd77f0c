"""Rewards: groups of candidates in, one raw scalar each out, and the one place where they are normalised.

N candidates of a group, S scorers.
"""

from __future__ import annotations

import math
import statistics
import string
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ampo_fast import losses
from ampo_fast.assets import resolve_model
from ampo_fast.config import Config, is_given
from ampo_fast.embeddings import Embedder, SentenceEncoder
from ampo_fast.engine_config import HttpConfig, read_options
from ampo_fast.http_reward import HttpScorer
from ampo_fast.losses.margins import calibrated_reward
from ampo_fast.margins_fit import sigmoid
from ampo_fast.python_reward import PythonScorer
from ampo_fast.reward_model.config import RewardModelConfig
from ampo_fast.reward_model.model import RewardModel
from ampo_fast.rollouts.segments import GIVEN, REWRITTEN
from ampo_fast.types import CandidateGroup, GivenResponse, Prompt, ScoredGroup

Number = float | None
Reward = Number | tuple[Number, ...]
"""A candidate's raw reward, or one per scorer where there are several."""
RewardFn = Callable[[Sequence[CandidateGroup]], list[list[Reward]]]
"""Groups -> for each group one raw reward per candidate; None or NaN where there is none."""

_KINDS = "relevance, data, data:SCORE, classifier:PATH, http://URL or MODULE:FUNCTION"

TextReward = Callable[[Sequence[Prompt], Sequence[str]], Sequence[Number]]
"""One prompt for each response."""


def make_reward(config: Config, encoder: Embedder | None = None, kind: str | None = None) -> RewardFn:
    """The scorer that `kind` names, default those of reward.kind: several give a tuple of rewards per candidate.

    An encoder that is already loaded is used again by `relevance`.
    """
    kinds, field = ((kind,), "eval.reward") if kind else (config.reward.kinds, "reward.kind")
    scorers = [_make_scorer(config, encoder, each, field) for each in kinds]
    return scorers[0] if len(scorers) == 1 else _side_by_side(scorers)


def _side_by_side(scorers: Sequence[RewardFn]) -> RewardFn:
    def reward_fn(groups: Sequence[CandidateGroup]) -> list[list[Reward]]:
        found = [scorer(groups) for scorer in scorers]
        return [list(zip(*of_group, strict=True)) for of_group in zip(*found, strict=True)]

    return reward_fn


def _make_scorer(config: Config, encoder: Embedder | None, kind: str, field: str) -> RewardFn:
    if config.rollout.segment_tokens and kind == "data":
        return lambda groups: [[GIVEN, REWRITTEN] for _ in groups]
    if kind == "data":
        return lambda groups: [[response.reward for response in group.prompt.responses] for group in groups]
    if kind.startswith("data:"):
        return lambda groups: [_given_scores(group.prompt, kind.removeprefix("data:")) for group in groups]
    if kind == "relevance":
        model = encoder if isinstance(encoder, SentenceEncoder) else SentenceEncoder("package:all-minilm-l6-v2")
        return _on_texts(lambda prompts, responses: relevance(prompts, responses, model))
    if kind.startswith("classifier:"):
        return _Classifier(
            kind.removeprefix("classifier:"), config.optim.micro_batch_tokens, f"the classifier of {field}"
        )
    if kind.startswith(("http://", "https://")):
        return _on_texts(HttpScorer(kind, read_options(HttpConfig, config.reward.options, "reward.options")))
    if ":" not in kind:
        raise ValueError(f"{field} = {kind!r}; use {_KINDS}")
    return _on_texts(PythonScorer(kind, field))


def check_scorers(config: Config) -> None:
    """Raises ValueError for a scorer that is known to be none before anything is loaded; imports a user's function."""
    named = [(kind, "reward.kind") for kind in config.reward.kinds]
    if config.data.eval and config.eval.reward:
        named.append((config.eval.reward, "eval.reward"))
    for kind, field in named:
        if kind.startswith("classifier:"):
            resolve_model(kind.removeprefix("classifier:"), f"the classifier of {field}")
        elif not (kind == "relevance" or is_given(kind)):
            _make_scorer(config, None, kind, field)


def check_scores(prompts: Sequence[Prompt], kinds: Sequence[str]) -> None:
    """Raises ValueError, before anything is sampled, where a data:SCORE of reward.kind is not in the data."""
    for kind in kinds:
        if kind.startswith("data:"):
            for prompt in prompts:
                _given_scores(prompt, kind.removeprefix("data:"))


def _given_scores(prompt: Prompt, name: str) -> list[Number]:
    """One of the ratings that came with the prompt's responses. Raises ValueError where none of them has it."""
    if not any(name in response.scores for response in prompt.responses):
        known = sorted({known for response in prompt.responses for known in response.scores})
        have = f"only {', '.join(known)}" if known else "no scores by name"
        raise ValueError(
            f"reward.kind = 'data:{name}': the responses of prompt {prompt.where or prompt.id} have {have}"
        )
    return [response.scores.get(name) for response in prompt.responses]


def relevance(prompts: Sequence[Prompt], responses: Sequence[str], encoder: Embedder) -> list[float]:
    """Is the answer about the question, in a few finished sentences? In [0, 1].

    cosine(question, answer) by a sentence encoder, times the share of distinct word triples (no repetition), times the
    share of word triples not copied from the question, times 1/2 where it breaks off without a closing mark, times a
    length factor that is 1 from 8 to 40 words. A rule, not a judge: it knows nothing of truth.
    """
    question_NE = encoder.embed([prompt.messages[-1]["content"] for prompt in prompts])
    cosine_N = (question_NE * encoder.embed(list(responses))).sum(1).clamp(0.0, 1.0).tolist()
    scores = []
    for prompt, response, cosine in zip(prompts, responses, cosine_N, strict=True):
        num_words = len(response.split())
        length = min(1.0, num_words / 8, 40 / max(num_words, 1))
        finished = 1.0 if response.rstrip().endswith((".", "!", "?", '"', ")")) else 0.5
        triples, asked = _triples(response), set(_triples(prompt.messages[-1]["content"]))
        distinct = len(set(triples)) / len(triples) if triples else 1.0
        own = 1.0 - sum(triple in asked for triple in triples) / len(triples) if triples else 1.0
        scores.append(cosine * distinct * own * finished * length)
    return scores


def _triples(text: str) -> list[tuple[str, ...]]:
    words = [word.strip(string.punctuation) for word in text.lower().split()]
    return list(zip(words, words[1:], words[2:], strict=False))


class _Classifier:
    """A HuggingFace sequence classifier with one output, over the chat template of prompt + response."""

    def __init__(self, path: str, max_tokens: int, field: str) -> None:
        self.model = RewardModel.load(RewardModelConfig(path=path), field=field)
        self.max_tokens = max_tokens

    def __call__(self, groups: Sequence[CandidateGroup]) -> list[list[float]]:
        given = [
            replace(group.prompt, responses=tuple(GivenResponse(content=c.content) for c in group.candidates))
            for group in groups
        ]
        scores = self.model.score_groups(self.model.encode_all(given), self.max_tokens)
        return [score.tolist() for score in scores]


def _on_texts(score: TextReward) -> RewardFn:
    def reward_fn(groups: Sequence[CandidateGroup]) -> list[list[Reward]]:
        prompts = [group.prompt for group in groups for _ in group.candidates]
        responses = [candidate.content for group in groups for candidate in group.candidates]
        rewards = iter(score(prompts, responses))
        return [[next(rewards) for _ in group.candidates] for group in groups]

    return reward_fn


def score_groups(
    groups: Sequence[CandidateGroup], reward_fn: RewardFn, embedder: Embedder, config: Config
) -> list[ScoredGroup]:
    """Rewards, validity, normalised rewards and embeddings of every candidate. Raises when too many rewards are missing."""
    if not groups:  # a rank that had no prompts
        return []
    rewards = reward_fn(groups)
    check_missing(groups, rewards, config.reward.max_missing_share)
    texts = [candidate.content for group in groups for candidate in group.candidates]
    embeddings = embedder.embed(texts).split([len(group.candidates) for group in groups])
    return [
        score_group(group, raw, embedding, config)
        for group, raw, embedding in zip(groups, rewards, embeddings, strict=True)
    ]


def score_group(group: CandidateGroup, raw: Sequence[Reward], embedding: torch.Tensor, config: Config) -> ScoredGroup:
    """Several rewards are normalised one by one and averaged (arXiv 2502.02588); reward_raw is the mean of the raw ones."""
    by_scorer = list(zip(*(tuple(map(_number, _as_tuple(value))) for value in raw), strict=True))
    reward_raw = _means(by_scorer)
    valid = valid_candidates(group, reward_raw, config.rollout.truncated)
    rule = normalizer_for(config)
    return ScoredGroup(
        group=group,
        reward_raw=reward_raw,
        reward=_means([normalize_rewards(numbers, valid, rule) for numbers in by_scorer]),
        valid=valid,
        embedding=embedding,
        reward_by_scorer=tuple(by_scorer) if len(by_scorer) > 1 else (),
    )


def _as_tuple(reward: Reward) -> tuple[Number, ...]:
    return reward if isinstance(reward, tuple) else (reward,)


def _number(value: Number) -> float:
    return math.nan if value is None else float(value)


def _means(by_scorer: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """[N]: each candidate's mean over the scorers; one scorer's rewards as they are."""
    if len(by_scorer) == 1:
        return tuple(by_scorer[0])
    return tuple(math.fsum(rewards) / len(rewards) for rewards in zip(*by_scorer, strict=True))


def check_missing(groups: Sequence[CandidateGroup], rewards: Sequence[Sequence[Reward]], max_share: float) -> None:
    """Stops a run whose scorer fails: more missing rewards than max_share of all, with the rows."""
    missing = [
        f"{group.prompt.id}[{i}]"
        for group, raw in zip(groups, rewards, strict=True)
        for i, value in enumerate(raw)
        if not all(math.isfinite(_number(number)) for number in _as_tuple(value))
    ]
    total = sum(len(group.candidates) for group in groups)
    if len(missing) > max_share * total:
        raise ValueError(
            f"{len(missing)} of {total} rewards are missing or not finite, more than reward.max_missing_share = "
            f"{max_share}: {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}"
        )


def valid_candidates(
    group: CandidateGroup, reward_raw: Sequence[float], truncated: str = "negative"
) -> tuple[bool, ...]:
    """False for an empty response, a repeat of an earlier valid one, a missing reward, and a cut one where those are excluded."""
    seen: set[str] = set()
    valid = []
    for candidate, reward in zip(group.candidates, reward_raw, strict=True):
        text = candidate.content.strip()
        is_cut = candidate.finish_reason == "length" and truncated == "exclude"
        valid.append(bool(text) and text not in seen and math.isfinite(reward) and not is_cut)
        if valid[-1]:
            seen.add(text)
    return tuple(valid)


def normalizer_for(config: Config) -> str:
    """reward.normalize, with auto resolved: win_rate for several rewards, whose scales do not compare; else the loss's own."""
    if config.reward.normalize != "auto":
        return config.reward.normalize
    return "win_rate" if len(config.reward.kinds) > 1 else losses.loss_class(config.loss.name).default_normalize


def normalize_rewards(raw: Sequence[float], valid: Sequence[bool], rule: str) -> tuple[float, ...]:
    """Applies one rule over the group's valid candidates; NaN elsewhere. A group without spread maps to 0 (1/2 for minmax
    and win_rate)."""
    kept = [value for value, ok in zip(raw, valid, strict=True) if ok]
    if not kept:
        return tuple(math.nan for _ in raw)
    if rule == "win_rate":
        rates = iter(_win_rates(kept))
        return tuple(next(rates) if ok else math.nan for ok in valid)
    low, high, mean = min(kept), max(kept), statistics.fmean(kept)
    std = statistics.pstdev(kept)
    scale = {
        "none": lambda r: r,
        "minmax": lambda r: (r - low) / (high - low) if high > low else 0.5,
        "zscore": lambda r: (r - mean) / std if std > 0 else 0.0,
        "sigmoid": sigmoid,
    }[rule]
    return tuple(scale(value) if ok else math.nan for value, ok in zip(raw, valid, strict=True))


def _win_rates(rewards: Sequence[float]) -> list[float]:
    reward_1N = torch.tensor([rewards], dtype=torch.float64)
    return calibrated_reward(reward_1N, torch.ones_like(reward_1N, dtype=torch.bool))[0].tolist()
