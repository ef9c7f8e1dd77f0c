"""The numbers of one step: names as TRL's where TRL has one. M responses, N candidates."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ampo_fast.packing import MicroBatch, kept_candidates, packed_length
from ampo_fast.select import reward_spread
from ampo_fast.types import PackedBatch, ScoredGroup, SelectedGroup
from ampo_fast.unshared import padded_tokens


def group_metrics(groups: Sequence[SelectedGroup], reward_tol: float, step: int) -> dict[str, float]:
    """Rewards, lengths, health of the pool, and the selected against the pool; step: updates done before this one."""
    scored = [group.scored for group in groups]
    pool = [(s, i) for s in scored for i in range(len(s.valid))]
    kept = [(g.scored, i) for g in groups for i in kept_candidates(g)]
    lengths = [len(_candidate(s, i).token_ids) for s, i in pool]
    rewards = [[r for r, ok in zip(s.reward_raw, s.valid, strict=True) if ok] for s in scored]
    logp = [value for s, i in pool for value in _candidate(s, i).logp]
    unique = [len({c.content.strip() for c in s.group.candidates}) / len(s.valid) for s in scored]
    trained = [group for group in groups if group.is_trained]
    metrics = {
        "reward": _mean([r for values in rewards for r in values]),
        "reward_std": _mean([statistics.stdev(values) for values in rewards if len(values) > 1]),
        "frac_reward_zero_std": _mean([reward_spread(s) <= reward_tol for s in scored]),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": _clipped(pool),
        "group/size": len(pool) / len(groups),
        "group/unique_ratio": _mean(unique),
        "group/invalid": sum(not ok for s in scored for ok in s.valid),
        "group/count": len(groups),
        "group/trained": len(trained),
        "group/degenerate": 1.0 - len(trained) / len(groups),
        "group/coverage_cost": _mean([group.cost for group in trained]),
        "pool/distinctness": _mean([distinctness(s, range(len(s.valid))) for s in scored]),
        "selected/distinctness": _mean([distinctness(g.scored, kept_candidates(g)) for g in trained]),
        "selected/reward": _mean([s.reward_raw[i] for s, i in kept]),
        "selected/mean_length": _mean([len(_candidate(s, i).token_ids) for s, i in kept]),
        "selected/clipped_ratio": _clipped(kept),
        "positive/reward": _mean([g.scored.reward_raw[i] for g in trained for i in g.positive]),
        "negative/reward": _mean([g.scored.reward_raw[i] for g in trained for i in g.negative]),
    }
    for number, rewards in enumerate(zip(*(s.reward_by_scorer for s in scored), strict=True), 1):
        pairs = [pair for values, s in zip(rewards, scored, strict=True) for pair in zip(values, s.valid, strict=True)]
        metrics[f"reward/{number}"] = _mean([reward for reward, ok in pairs if ok])
    if logp:
        metrics["entropy"] = -_mean(logp)
    ages = [step - _candidate(s, i).version for s, i in pool if _candidate(s, i).logp]  # given responses have no age
    if ages:
        metrics |= {"staleness/mean": _mean(ages), "staleness/max": max(ages)}
    return metrics


def is_fresh(groups: Sequence[SelectedGroup], step: int) -> bool:
    """Whether the weights about to be updated, of version `step`, wrote everything that is trained on."""
    return all(_candidate(g.scored, i).version == step for g in groups for i in kept_candidates(g))


def distinctness(scored: ScoredGroup, indices: Sequence[int]) -> float:
    """Mean distance between two different candidates' embeddings."""
    points = scored.embedding[list(indices)]
    return torch.pdist(points).mean().item() if len(points) > 1 else math.nan


class LogpGap(NamedTuple):
    """|trainer - engine| over the tokens of one group: what was sampled from against what is trained."""

    total: float
    highest: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class TrainedGroup:
    """How the policy sees one trained group: per-token log-probs of its responses, and how far the engine's are off."""

    positive: list[float]
    negative: list[float]
    difference: LogpGap | None
    """None: the engine's log-probs are not known."""


def trained_groups(stats: Any, batch: PackedBatch) -> list[TrainedGroup]:
    """The groups of one micro-batch, in order; stats is what the loss returned for it."""
    average_M = (stats.logp_M / stats.length_M).float().cpu()
    is_positive_M = batch.positive_M.cpu()
    gaps = _engine_gaps(stats, batch)
    groups = []
    for (start, end), gap in zip(itertools.pairwise(batch.group_offsets.tolist()), gaps, strict=True):
        values, side = average_M[start:end], is_positive_M[start:end]
        groups.append(TrainedGroup(values[side].tolist(), values[~side].tolist(), gap))
    return groups


def _engine_gaps(stats: Any, batch: PackedBatch) -> list[LogpGap | None]:
    """One for each group. Token by token: summed over a response, differences of both signs would hide each other."""
    rows_B = batch.response_offsets[batch.group_offsets].diff().tolist()
    if batch.sampled_logp_R is None:
        return [None] * len(rows_B)
    gap_R = (stats.logp_R - batch.sampled_logp_R).abs().cpu()
    return [LogpGap(part.sum().item(), part.max().item(), len(part)) for part in gap_R.split(rows_B)]


def policy_metrics(groups: Sequence[TrainedGroup]) -> dict[str, float]:
    """Per-token log-probs of both sides, margins, how often the positive leads."""
    margins = [max(group.positive) - value for group in groups for value in group.negative]
    return {
        "positive/logp": _mean([value for group in groups for value in group.positive]),
        "negative/logp": _mean([value for group in groups for value in group.negative]),
        "rewards/margins": _mean(margins),
        "rewards/accuracies": _mean([margin > 0 for margin in margins]),
    }


def sharing_metrics(plans: Sequence[Sequence[MicroBatch]], is_shared: bool, is_recomputed: bool) -> dict[str, float]:
    """What all ranks forward: how many groups are split, what their first forward costs, what shared prompts save.

    plans: each rank's micro-batches. perf/prefix_saved is the share of tokens that stay out because a prompt runs once for
    several responses. perf/wasted_tokens are those that the layers run beside num_tokens: the first forward of split groups,
    copies of prompts and padding where prompts are not shared, and all once more where activations are recomputed.
    """
    micros = [micro for plan in plans for micro in plan if micro.groups]
    split = [micro for micro in micros if micro.part]
    packed, alone, first_pass, ran = 0, 0, 0, 0
    for micro in micros:
        own_packed, sequences = 0, []
        for group in micro.groups:
            prompt = len(group.scored.group.prompt_ids)
            lengths = [len(_candidate(group.scored, i).token_ids) for i in micro.part or kept_candidates(group)]
            own_packed += packed_length(prompt, lengths)
            sequences += [packed_length(prompt, [length]) for length in lengths]
        own_ran = own_packed if is_shared else padded_tokens(sequences)
        packed += own_packed
        alone += sum(sequences)
        first_pass += own_ran if micro.part else 0
        ran += own_ran * (1 + is_recomputed)
    return {
        "perf/split_groups": len({id(micro.groups[0]) for micro in split}),
        "perf/tokens_without_gradient": first_pass,
        "perf/prefix_saved": 1.0 - packed / alone if is_shared else 0.0,
        "perf/wasted_tokens": first_pass + ran - packed,
    }


def logp_difference(groups: Sequence[TrainedGroup], fresh: bool) -> dict[str, float]:
    """|trainer - engine| over the responses' tokens, in nats, where the engine's log-probs are known.

    Of one version (fresh) it is the mismatch of two implementations, and has TRL's name. Otherwise the policy's own
    movement since the responses were sampled is in it, and it is named for that.
    """
    if any(group.difference is None for group in groups):
        return {}
    totals, highest, counts = zip(*(group.difference for group in groups), strict=True)
    name = "sampling/sampling_logp_difference" if fresh else "staleness/logp_difference"
    return {f"{name}/mean": sum(totals) / sum(counts), f"{name}/max": max(highest)}


def _candidate(scored: ScoredGroup, i: int):
    return scored.group.candidates[i]


def _clipped(rows: Sequence[tuple[ScoredGroup, int]]) -> float:
    return _mean([_candidate(s, i).finish_reason == "length" for s, i in rows])


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
