"""Measures a policy on held-out prompts: reward, drift from the start, and measures that nothing trains on."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ampo_fast import distributed
from ampo_fast.config import Config
from ampo_fast.embeddings import Embedder
from ampo_fast.model import Policy
from ampo_fast.packing import group_length, idle_batch, pack_responses, token_runs
from ampo_fast.rewards import RewardFn, score_groups
from ampo_fast.rollouts.batches import rank_batches, shared_answers
from ampo_fast.rollouts.protocol import RolloutEngine
from ampo_fast.types import CandidateGroup, Prompt, Sampling, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    scored: list[ScoredGroup]
    metrics: dict[str, float]


def evaluate(
    policy: Policy,
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    reward_fn: RewardFn,
    embedder: Embedder,
    config: Config,
    start: Callable[[], AbstractContextManager[Policy]],
) -> Evaluation:
    """Answers held-out prompts at the training temperature with fixed noise, scores them, and measures drift.

    Each rank answers its share; the result is every rank's. start gives the start policy, sharded as the policy
    is, for the comparison alone: what it has to load is dropped again.
    """
    sampling = config.rollout.sampling(config.eval.seed)
    lengths = [len(policy.encode_prompt(prompt.messages)) for prompt in prompts]
    ranks = rank_batches(lengths, config.eval.samples, config.rollout.batch_rows, sampling.max_new_tokens)
    shares = [[i for batch in batches for i in batch] for batches in ranks]
    mine = shares[distributed.rank()]
    own_groups = _answers(engine, [[prompts[i] for i in share] for share in shares], config.eval.samples, sampling)
    engine.rest()
    own_scored = score_groups(own_groups, reward_fn, embedder, config)
    own_logp = [response_logp(policy, own_groups, config.optim.micro_batch_tokens)]
    with start() as first:
        own_logp.append(response_logp(first, own_groups, config.optim.micro_batch_tokens))
    del first
    if distributed.is_sharded(policy):
        gc.collect()  # a sharded module is part of a cycle, and nothing else would free the start policy's shards soon
    parts = distributed.all_gather((mine, own_scored, own_logp))
    by_index = {i: group for indices, scored, _ in parts for i, group in zip(indices, scored, strict=True)}
    scored = [by_index[i] for i in range(len(prompts))]
    groups = [group.group for group in scored]
    own_R, start_R = (torch.cat([logp[i] for _, _, logp in parts]) for i in range(2))
    return Evaluation(scored=scored, metrics=_reward_metrics(scored) | _text_metrics(groups) | _drift(own_R, start_R))


def _answers(
    engine: RolloutEngine, shares: Sequence[Sequence[Prompt]], n: int, sampling: Sampling
) -> list[CandidateGroup]:
    """This rank's share of the groups."""
    engine.start()
    if engine.answers_for_all:
        return shared_answers(lambda: engine.generate([p for share in shares for p in share], n, sampling), shares)
    return engine.generate(shares[distributed.rank()], n, sampling)


def response_logp(policy: Policy, groups: Sequence[CandidateGroup], max_tokens: int) -> torch.Tensor:
    """Log-prob of every response token at temperature 1, [R] float32 on the CPU, groups in order.

    Of a sharded policy every rank must ask, each for its own groups: who has fewer forwards keeps the others company.
    """
    whole = [range(len(group.candidates)) for group in groups]
    runs = token_runs([group_length(*each) for each in zip(groups, whole, strict=True)], max_tokens)
    missing = max(distributed.all_gather(len(runs))) - len(runs) if distributed.is_sharded(policy) else 0
    batches = (pack_responses([groups[i] for i in run], [whole[i] for i in run], policy.device) for run in runs)
    logp = [policy.token_logp(batch).cpu() for batch in batches]
    for _ in range(missing):
        policy.token_logp(idle_batch(policy.device))
    if distributed.is_sharded(policy):
        distributed.reshard(policy)
    return torch.cat(logp) if logp else torch.empty(0)


def _reward_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """eval/reward is over the answers that have one; eval/unscored says how many have none, or a collapse could hide there."""
    means = [statistics.fmean(kept) for group in scored if (kept := [r for r in group.reward_raw if math.isfinite(r)])]
    unscored = statistics.fmean(not math.isfinite(reward) for group in scored for reward in group.reward_raw)
    return {"eval/reward": statistics.fmean(means) if means else math.nan, "eval/unscored": unscored}


def _text_metrics(groups: Sequence[CandidateGroup]) -> dict[str, float]:
    candidates = [candidate for group in groups for candidate in group.candidates]
    stopped = statistics.fmean(candidate.finish_reason == "stop" for candidate in candidates)
    return {
        "eval/mean_length": statistics.fmean(len(candidate.token_ids) for candidate in candidates),
        "eval/eos_rate": stopped,
        "eval/clipped_ratio": 1.0 - stopped,
        "eval/distinct_2": distinct_2([candidate.content for candidate in candidates]),
    }


def distinct_2(texts: Sequence[str]) -> float:
    """Share of distinct word pairs among all word pairs of all texts (Li et al. 2016); falls as answers become alike."""
    pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def _drift(own_R: torch.Tensor, start_R: torch.Tensor) -> dict[str, float]:
    """Per token of the policy's own samples: KL = E[log pi - log pi_0], entropy = -E[log pi], perplexity = exp(-E[log pi_0])."""
    own, start = own_R.double().mean().item(), start_R.double().mean().item()
    return {"eval/kl": own - start, "eval/entropy": -own, "eval/perplexity_start": math.exp(-start)}
