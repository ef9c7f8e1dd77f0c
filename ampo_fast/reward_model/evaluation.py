"""Scores against preferences: pairs in, accuracy and calibration out, by margin and by length; ranks in larger groups.

Shapes: n pairs of different reward, N responses of a group. gap = score of the preferred response minus the other's.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ampo_fast.jsonl import without_nan
from ampo_fast.reward_model.calibration import (
    best_of_n_regret,
    brier_score,
    clustered_standard_error,
    expected_calibration_error,
    log_loss,
    reliability,
    sigmoid,
    spearman,
    wilson_interval,
)
from ampo_fast.reward_model.data import conversation_key
from ampo_fast.types import Prompt

_LENGTH_EDGES = (-math.inf, -math.log(2.0), -math.log(1.1), math.log(1.1), math.log(2.0), math.inf)
_LENGTH_NAMES = (
    "preferred less than half as long",
    "preferred shorter",
    "within 10%",
    "preferred longer",
    "preferred more than twice as long",
)
_NUM_MARGIN_BUCKETS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTable:
    """Every two responses of a group whose rewards differ, the higher reward preferred."""

    gap_n: np.ndarray
    margin_n: np.ndarray
    """Reward of the preferred minus the other's, above 0."""
    length_ratio_n: np.ndarray
    """log of the preferred one's characters over the other's."""
    prompt_n: list[str]
    subset_n: list[str]
    tie_gap_t: np.ndarray
    """Score gaps of the pairs of equal reward, first minus second: they have no preferred response."""


def pair_table(groups: Sequence[Prompt], scores: Sequence[Sequence[float]]) -> PairTable:
    """Raises ValueError for scores that are not finite, which a model gives whose weights are not, or overflow."""
    wrong = [group.id for group, score in zip(groups, scores, strict=True) if not all(map(math.isfinite, score))]
    if wrong:
        named = f"{', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}"
        raise ValueError(f"the model's scores are NaN or infinite in {len(wrong)} of {len(groups)} groups: {named}")
    gap, margin, ratio, prompt, subset, ties = [], [], [], [], [], []
    for group, score in zip(groups, scores, strict=True):
        key = conversation_key(group)
        numbered = zip(group.responses, score, strict=True)
        for (one, s_one), (two, s_two) in itertools.combinations(numbered, 2):
            difference = one.reward - two.reward
            if difference == 0.0:
                ties.append(s_one - s_two)
                continue
            sign = 1.0 if difference > 0.0 else -1.0
            gap.append(sign * (s_one - s_two))
            margin.append(abs(difference))
            ratio.append(sign * math.log(max(len(one.content), 1) / max(len(two.content), 1)))
            prompt.append(key)
            subset.append(group.subset)
    return PairTable(
        gap_n=np.array(gap), margin_n=np.array(margin), length_ratio_n=np.array(ratio), prompt_n=prompt,
        subset_n=subset, tie_gap_t=np.array(ties),
    )  # fmt: skip


def pair_measures(table: PairTable) -> dict[str, float]:
    """Accuracy (equal scores: no hit), "the longer one wins" (equal lengths: 1/2), log loss, Brier, ECE. Raises for no pairs."""
    if not len(table.gap_n):
        raise ValueError("no pair has two different rewards: nothing to measure")
    p_n, ratio_n = sigmoid(table.gap_n), table.length_ratio_n
    return {
        "accuracy": float(np.mean(table.gap_n > 0)),
        "accuracy_longer_wins": float(np.mean((ratio_n > 0) + 0.5 * (ratio_n == 0))),
        "log_loss": log_loss(table.gap_n),
        "brier": brier_score(p_n),
        "ece": expected_calibration_error(p_n),
    }


def evaluate_scores(groups: Sequence[Prompt], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """All measures as numbers, lists and dicts that JSON can hold (null for what is not defined)."""
    table = pair_table(groups, scores)
    hit_n = table.gap_n > 0
    result: dict[str, Any] = {
        **pair_measures(table),
        "num_pairs": len(hit_n),
        "num_prompts": len(set(table.prompt_n)),
        "num_ties": len(table.tie_gap_t),
        "accuracy_interval": list(wilson_interval(int(hit_n.sum()), len(hit_n))),
        "accuracy_se_by_prompt": clustered_standard_error(hit_n, table.prompt_n),
    }
    if len(table.tie_gap_t):
        result["tie_confidence"] = float(np.mean(sigmoid(np.abs(table.tie_gap_t))))
    result["by_margin"] = _by_margin(table)
    result["by_length"] = _buckets(hit_n, table.length_ratio_n, _LENGTH_EDGES, _LENGTH_NAMES)
    if any(table.subset_n):
        result["by_subset"] = _by_subset(table)
    result["reliability"] = [
        {"low": b.low, "high": b.high, "count": b.count, "confidence": b.confidence, "accuracy": b.accuracy,
         "interval": list(b.interval)}
        for b in reliability(sigmoid(table.gap_n)) if b.count
    ]  # fmt: skip
    return without_nan(result | group_measures(groups, scores))


def _by_margin(table: PairTable) -> list[dict[str, Any]]:
    inner = np.quantile(table.margin_n, np.linspace(0, 1, _NUM_MARGIN_BUCKETS + 1))[1:-1]
    edges = [-math.inf, *np.unique(inner[inner < table.margin_n.max()]).tolist(), math.inf]
    lows = [0.0, *edges[1:-1]]
    highs = [*edges[1:-1], float(table.margin_n.max())]
    names = [f"({low:.3g}, {high:.3g}]" for low, high in zip(lows, highs, strict=True)]
    return _buckets(table.gap_n > 0, table.margin_n, edges, names)


def _by_subset(table: PairTable) -> list[dict[str, Any]]:
    """In the order in which the data names them."""
    names = list(dict.fromkeys(table.subset_n))
    index_n = np.array([names.index(subset) for subset in table.subset_n])
    edges = [i - 0.5 for i in range(len(names) + 1)]
    return _buckets(table.gap_n > 0, index_n, edges, [name or "(none)" for name in names])


def _buckets(
    hit_n: np.ndarray, value_n: np.ndarray, edges: Sequence[float], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Accuracy with Wilson's interval of the pairs in each (edge, next edge]; empty buckets are left out."""
    found = []
    for name, low, high in zip(names, edges[:-1], edges[1:], strict=True):
        inside = (value_n > low) & (value_n <= high)
        count, hits = int(inside.sum()), int(hit_n[inside].sum())
        if count:
            interval = list(wilson_interval(hits, count))
            found.append({"bucket": name, "count": count, "accuracy": hits / count, "interval": interval})
    return found


def group_measures(groups: Sequence[Prompt], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Means over the groups of three responses and more: Spearman, best-of-N regret, and a random pick's regret; {} for none."""
    wide = [
        ([r.reward for r in group.responses], list(score))
        for group, score in zip(groups, scores, strict=True)
        if len(group.responses) > 2
    ]
    if not wide:
        return {}
    rank = [value for reward, score in wide if not math.isnan(value := spearman(score, reward))]
    regret = [best_of_n_regret(score, reward) for reward, score in wide]
    blind = [max(reward) - statistics.fmean(reward) for reward, _ in wide]
    return {
        "num_groups": len(wide),
        "mean_group_size": statistics.fmean(len(reward) for reward, _ in wide),
        "spearman": statistics.fmean(rank) if rank else math.nan,
        "spearman_se": _standard_error(rank),
        "best_of_n_regret": statistics.fmean(regret),
        "best_of_n_regret_se": _standard_error(regret),
        "random_pick_regret": statistics.fmean(blind),
    }


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
