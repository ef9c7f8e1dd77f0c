"""The numbers of one step: names as TRL's where TRL has one. M responses, N candidates."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ampo_fast.types import PackedBatch, ScoredGroup, SelectedGroup


def group_metrics(groups: Sequence[SelectedGroup], reward_tol: float) -> dict[str, float]:
    """Rewards, lengths, health of the pool, and the selected against the pool."""
    scored = [group.scored for group in groups]
    pool = [(s, i) for s in scored for i in range(len(s.valid))]
    kept = [(g.scored, i) for g in groups for i in (*g.positive, *g.negative)]
    lengths = [len(_candidate(s, i).token_ids) for s, i in pool]
    rewards = [[r for r, ok in zip(s.reward_raw, s.valid, strict=True) if ok] for s in scored]
    logp = [value for s, i in pool for value in _candidate(s, i).logp]
    unique = [len({c.content.strip() for c in s.group.candidates}) / len(s.valid) for s in scored]
    spreads = [max(values) - min(values) if values else 0.0 for values in rewards]
    trained = [group for group in groups if group.is_trained]
    metrics = {
        "reward": _mean([r for values in rewards for r in values]),
        "reward_std": _mean([statistics.stdev(values) for values in rewards if len(values) > 1]),
        "frac_reward_zero_std": _mean([spread <= reward_tol for spread in spreads]),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": _clipped(pool),
        "group/size": len(pool) / len(groups),
        "group/unique_ratio": _mean(unique),
        "group/invalid": sum(not ok for s in scored for ok in s.valid),
        "group/trained": len(trained),
        "group/degenerate": 1.0 - len(trained) / len(groups),
        "group/coverage_cost": _mean([group.cost for group in trained]),
        "pool/distinctness": _mean([distinctness(s, range(len(s.valid))) for s in scored]),
        "selected/distinctness": _mean([distinctness(g.scored, (*g.positive, *g.negative)) for g in trained]),
        "selected/reward": _mean([s.reward_raw[i] for s, i in kept]),
        "selected/mean_length": _mean([len(_candidate(s, i).token_ids) for s, i in kept]),
        "selected/clipped_ratio": _clipped(kept),
        "positive/reward": _mean([g.scored.reward_raw[i] for g in trained for i in g.positive]),
        "negative/reward": _mean([g.scored.reward_raw[i] for g in trained for i in g.negative]),
    }
    if logp:
        metrics["entropy"] = -_mean(logp)
    return metrics


def distinctness(scored: ScoredGroup, indices: Sequence[int]) -> float:
    """Mean distance between two different candidates' embeddings."""
    points = scored.embedding[list(indices)]
    return torch.pdist(points).mean().item() if len(points) > 1 else math.nan


def policy_metrics(stats: Sequence[Any], batches: Sequence[PackedBatch]) -> dict[str, float]:
    """How the policy sees the trained responses: per-token log-probs of both sides, margins, how often the positive leads."""
    positive, negative, margins, leads = [], [], [], []
    for part, batch in zip(stats, batches, strict=True):
        average = (part.logp_M / part.length_M).float().cpu()
        is_positive = batch.positive_M.cpu()
        positive += average[is_positive].tolist()
        negative += average[~is_positive].tolist()
        for start, end in zip(batch.group_offsets[:-1], batch.group_offsets[1:], strict=True):
            values, side = average[start:end], is_positive[start:end]
            gaps = (values[side].max() - values[~side]).tolist()
            margins += gaps
            leads += [gap > 0 for gap in gaps]
    return {
        "positive/logp": _mean(positive),
        "negative/logp": _mean(negative),
        "rewards/margins": _mean(margins),
        "rewards/accuracies": _mean(leads),
    }


def logp_difference(stats: Sequence[Any], batches: Sequence[PackedBatch]) -> dict[str, float]:
    """|trainer - engine| per token, per response: what the engine sampled from against what is trained."""
    gaps: list[float] = []
    for part, batch in zip(stats, batches, strict=True):
        if batch.sampled_logp_R is None:
            return {}
        ends = batch.response_offsets.tolist()
        engine = torch.stack([batch.sampled_logp_R[a:b].sum() for a, b in itertools.pairwise(ends)])
        gaps += ((part.logp_M - engine).abs() / part.length_M).tolist()
    return {
        "sampling/sampling_logp_difference/mean": _mean(gaps),
        "sampling/sampling_logp_difference/max": max(gaps),
    }


def _candidate(scored: ScoredGroup, i: int):
    return scored.group.candidates[i]


def _clipped(rows: Sequence[tuple[ScoredGroup, int]]) -> float:
    return _mean([_candidate(s, i).finish_reason == "length" for s, i in rows])


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
