"""`ampo-fast evaluate`: a reward model, or a policy's implicit rewards, on pairs or groups of any file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ampo_fast.assets import resolve_model
from ampo_fast.config import ModelConfig
from ampo_fast.evaluation import response_logp
from ampo_fast.model import Policy
from ampo_fast.model_card import versions
from ampo_fast.model_files import read_tokenizer
from ampo_fast.report.reward_page import write_evaluation_page
from ampo_fast.reward_model.config import RewardDataConfig, RewardModelConfig
from ampo_fast.reward_model.data import load_groups
from ampo_fast.reward_model.evaluation import evaluate_scores
from ampo_fast.reward_model.model import RewardModel
from ampo_fast.types import Candidate, CandidateGroup, Prompt

_MAX_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """What gives the scores: a reward model's directory, or a policy, its reference and beta."""

    reward_model: str | None = None
    policy: str | None = None
    reference: str | None = None
    beta: float = 0.1

    def __post_init__(self) -> None:
        if (self.reward_model is None) == (self.policy is None):
            raise ValueError("give either --reward-model DIR, or --policy DIR with --reference DIR")
        if self.policy is not None and self.reference is None:
            raise ValueError("--policy needs --reference DIR: an implicit reward is beta (log pi - log pi_ref)")
        if not self.beta > 0.0:
            raise ValueError(f"--beta = {self.beta}; it must be above 0")

    @property
    def name(self) -> str:
        if self.reward_model is not None:
            return self.reward_model
        return f"{self.beta:g} (log {self.policy} - log {self.reference})"

    def score(self, groups: Sequence[Prompt]) -> list[list[float]]:
        if self.reward_model is None:
            return implicit_rewards(self.policy, self.reference, self.beta, groups)
        model = RewardModel.load(RewardModelConfig(path=self.reward_model), field="--reward-model")
        return [score.tolist() for score in model.score_groups(model.encode_all(groups), _MAX_TOKENS)]


def evaluate_file(scorer: Scorer, pairs: str, html: Path | None = None, limit: int | None = None) -> dict[str, Any]:
    """Scores the file's responses and measures them against its rewards; writes a page where `html` names one.

    Pairs whose label and scores disagree count by their scores. limit: only the first so many prompts or pairs.
    """
    groups = load_groups(RewardDataConfig(train=pairs, eval=pairs, disagreement="scores"), "--pairs")[:limit]
    result = {"scored_by": scorer.name, "pairs": pairs} | evaluate_scores(groups, scorer.score(groups))
    if html is not None:
        facts = [("scored by", scorer.name), ("pairs", pairs)]
        write_evaluation_page(html, result, facts, versions())
    return result


def implicit_rewards(policy: str, reference: str, beta: float, groups: Sequence[Prompt]) -> list[list[float]]:
    """beta (log pi(y) - log pi_ref(y)) of each response, summed over its tokens and end of turn (arXiv 2305.18290).

    One model is in memory at a time. Raises ValueError, before one is read, where they do not read and write the same tokens.
    """
    configs = [
        ModelConfig(path=resolve_model(path, option))
        for path, option in ((policy, "--policy"), (reference, "--reference"))
    ]
    check_same_vocabulary(*(read_tokenizer(config.path, config) for config in configs), policy, reference)
    first, second = (_sums(Policy.load(config), groups) for config in configs)
    return [[beta * (a - b) for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]


def check_same_vocabulary(ours: Any, theirs: Any, policy: str, reference: str) -> None:
    """A log-ratio needs the same tokens on both sides. Raises ValueError for another vocabulary or chat template."""
    vocabulary, other = ours.get_vocab(), theirs.get_vocab()
    if vocabulary != other:
        count = sum(other.get(token) != index for token, index in vocabulary.items())
        raise ValueError(
            f"the reference {reference} has another vocabulary ({len(other)} tokens, {policy}: {len(vocabulary)}; "
            f"{count} differ): their log-probs do not compare; use the model that training started from"
        )
    if ours.chat_template != theirs.chat_template:
        raise ValueError(f"the reference {reference} has another chat template than {policy}")


def _sums(policy: Policy, groups: Sequence[Prompt]) -> list[list[float]]:
    """log pi of each response, in nats. Raises ValueError where one is longer than the model was made for."""
    made = [_candidates(policy, group) for group in groups]
    _check_lengths(policy, made)
    logp_R = response_logp(policy, made, _MAX_TOKENS).double()
    lengths = [len(candidate.token_ids) for group in made for candidate in group.candidates]
    sums = iter([part.sum().item() for part in logp_R.split(lengths)])
    return [list(itertools.islice(sums, len(group.candidates))) for group in made]


def _check_lengths(policy: Policy, groups: Sequence[CandidateGroup]) -> None:
    """Beyond its positions a model is not itself, and a rope that changes there changes for all that run beside."""
    limit = policy.usable_length or math.inf
    long = [
        group.prompt.where or group.prompt.id
        for group in groups
        if len(group.prompt_ids) + max(len(candidate.token_ids) for candidate in group.candidates) > limit
    ]
    if long:
        raise ValueError(
            f"{policy.source} was made for {limit} tokens; prompt and response are longer in {len(long)} of {len(groups)} "
            f"rows: {', '.join(long[:5])}{', ...' if len(long) > 5 else ''}; leave them out of the file"
        )


def _candidates(policy: Policy, group: Prompt) -> CandidateGroup:
    candidates = tuple(
        Candidate(content=r.content, token_ids=policy.encode_response(r.content)) for r in group.responses
    )
    return CandidateGroup(prompt=group, prompt_ids=policy.encode_prompt(group.messages), candidates=candidates)


def summary_text(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    low, high = result["accuracy_interval"]
    lines = [
        f"accuracy {result['accuracy']:.4f} (95%: {low:.4f} to {high:.4f}) on {result['num_pairs']} pairs, "
        f"{result['num_ties']} ties left out; the longer answer wins {result['accuracy_longer_wins']:.4f}",
        f"brier {result['brier']:.4f}  ece {result['ece']:.4f}  log loss {result['log_loss']:.4f}",
    ]
    for key, title in (("by_margin", "margin"), ("by_length", "length"), ("by_subset", "subset")):
        for bucket in result.get(key, ()):
            low, high = bucket["interval"]
            lines.append(
                f"  {title} {bucket['bucket']}: {bucket['accuracy']:.4f} ({low:.4f} to {high:.4f}), {bucket['count']} pairs"
            )
    if "num_groups" in result:
        lines.append(
            f"{result['num_groups']} groups: spearman {result['spearman']}, best-of-N regret "
            f"{result['best_of_n_regret']:.4f} (a random pick: {result['random_pick_regret']:.4f})"
        )
    return "\n".join(lines)
