"""How well scores predict preferences: accuracy, calibration, rank agreement. Pure functions on numpy arrays.

Shapes: n pairs, N responses of one group. p is the predicted probability that the preferred response of a pair wins;
conf = max(p, 1 - p), hit = p > 1/2. Pairs of equal reward have no preferred response and are left out by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
NUM_BINS = 15


def wilson_interval(hits: float, count: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a share: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n); (0, 1) for none.

    Wilson (1927), JASA 22. Raises ValueError unless 0 <= hits <= count.
    """
    if not 0 <= hits <= count:
        raise ValueError(f"hits = {hits} must be in [0, count = {count}]")
    if count == 0:
        return 0.0, 1.0
    z = Z_95
    share, scale = hits / count, 1.0 + z * z / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1.0 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def sigmoid(gap: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(gap, dtype=float)))


def brier_score(p: np.ndarray) -> float:
    """mean (1 - p)^2: the preferred response did win (Brier 1950)."""
    return float(np.mean((1.0 - _probabilities(p)) ** 2))


def log_loss(gap: np.ndarray) -> float:
    """mean -log sigmoid(score gap), in nats."""
    return float(np.mean(np.logaddexp(0.0, -np.asarray(gap, dtype=float))))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    low: float
    high: float
    count: int
    confidence: float
    """Mean conf of the pairs in the bin; NaN where empty."""
    accuracy: float
    interval: tuple[float, float]


def reliability(p: np.ndarray, num_bins: int = NUM_BINS) -> list[ReliabilityBin]:
    """The pairs by conf in bins of equal width on [0, 1], low edge included; 1 is in the last, the lower half is empty."""
    p = _probabilities(p)
    confidence, hit = np.maximum(p, 1.0 - p), p > 0.5
    place = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    bins = []
    for i in range(num_bins):
        inside = place == i
        count, hits = int(inside.sum()), int(hit[inside].sum())
        bins.append(
            ReliabilityBin(
                low=i / num_bins,
                high=(i + 1) / num_bins,
                count=count,
                confidence=float(confidence[inside].mean()) if count else math.nan,
                accuracy=hits / count if count else math.nan,
                interval=wilson_interval(hits, count),
            )
        )
    return bins


def expected_calibration_error(p: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """sum_b n_b/n |accuracy_b - confidence_b| (Naeini et al. 2015; Guo et al., arXiv 1706.04599, eq. 3)."""
    bins = [b for b in reliability(p, num_bins) if b.count]
    return math.fsum(b.count * abs(b.accuracy - b.confidence) for b in bins) / len(p)


def clustered_standard_error(hit: np.ndarray, cluster: Sequence[object]) -> float:
    """Standard error of the mean of `hit` where pairs of one cluster (prompt) are not independent.

    Liang & Zeger's: sqrt(G/(G-1) sum_g (sum_{i in g} (hit_i - mean))^2) / n over G clusters; NaN for one cluster.
    """
    hit = np.asarray(hit, dtype=float)
    _, index = np.unique(np.asarray([str(c) for c in cluster]), return_inverse=True)
    sums = np.bincount(index, weights=hit - hit.mean())
    if len(sums) < 2:
        return math.nan
    return float(math.sqrt(len(sums) / (len(sums) - 1) * np.sum(sums**2)) / len(hit))


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    values = np.asarray(values, dtype=float)
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[index]


def spearman(score: Sequence[float], reward: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; NaN where one side does not vary or there are fewer than two."""
    if len(score) != len(reward):
        raise ValueError(f"{len(score)} scores but {len(reward)} rewards")
    a, b = (ranks(v) - (len(v) + 1) / 2.0 for v in (score, reward))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0.0 else math.nan


def best_of_n_regret(score: Sequence[float], reward: Sequence[float]) -> float:
    """max reward - reward of the highest score (ties: lowest index): what picking by score loses."""
    reward = np.asarray(reward, dtype=float)
    return float(reward.max() - reward[int(np.argmax(np.asarray(score)))])


def _probabilities(p: np.ndarray) -> np.ndarray:
    p = np.asarray(p, dtype=float)
    if p.size == 0:
        raise ValueError("no pairs: nothing to measure")
    if not np.all((p >= 0.0) & (p <= 1.0)):
        raise ValueError("p must hold probabilities in [0, 1], NaN excluded")
    return p
