"""Subset selection for one group, in plain torch: the definition of correct, and the path that always runs.

Shapes: N candidates, K chosen, E embedding. Distances are [N, N]; indices are Python ints, ascending.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One group's problem: choose K of `eligible` to cover `clients`, weighted."""

    distance_NN: torch.Tensor
    point_NE: torch.Tensor
    reward_N: torch.Tensor
    eligible: tuple[int, ...]
    clients: tuple[int, ...]
    weight_N: torch.Tensor
    positives: tuple[int, ...]
    k: int
    generator: torch.Generator

    def cost(self, chosen: Sequence[int]) -> float:
        """sum over clients of w_i min_{j in chosen} d_ij (AMPO, arXiv 2502.18293, OptSelect)."""
        if not chosen:
            return math.nan
        nearest = self.distance_NN[list(self.clients)][:, list(chosen)].amin(1)
        return float((self.weight_N[list(self.clients)] * nearest).sum())

    def lower_bound(self) -> float:
        """The cost if every eligible candidate could be chosen: no K of them can do better."""
        return self.cost(self.eligible)


def distances(point_NE: torch.Tensor, metric: str = "euclidean") -> torch.Tensor:
    """[N, E] -> [N, N]; differences before squares, so near-duplicates keep their digits and the diagonal is 0."""
    point_NE = point_NE if point_NE.dtype == torch.float64 else point_NE.float()
    if metric == "cosine":
        unit_NE = torch.nn.functional.normalize(point_NE, dim=1)
        return 0.5 * torch.cdist(unit_NE, unit_NE, compute_mode="donot_use_mm_for_euclid_dist").square()
    distance_NN = torch.cdist(point_NE, point_NE, compute_mode="donot_use_mm_for_euclid_dist")
    return distance_NN.square() if metric == "sqeuclidean" else distance_NN


def bottom_k(instance: Instance) -> list[int]:
    """The k lowest rewards; equal ones by lowest index."""
    return sorted(_by_reward(instance, instance.eligible)[: instance.k])


def _by_reward(instance: Instance, indices: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda i: (float(instance.reward_N[i]), i))


def random_subset(instance: Instance) -> list[int]:
    order = torch.randperm(len(instance.eligible), generator=instance.generator).tolist()
    return sorted(instance.eligible[i] for i in order[: instance.k])


def farthest_first(distance_NN: torch.Tensor, k: int, seeds: Sequence[int], eligible: Sequence[int]) -> list[int]:
    """Greedy k-center (Gonzalez 1985): k times the eligible point farthest from all so far, ties to the lowest index.

    Without seeds the first pick is the first eligible point. Seeds cover but are not returned; a point at distance 0 of
    a chosen one comes only after all others.
    """
    left = torch.zeros(distance_NN.shape[0], dtype=torch.bool)
    left[list(eligible)] = True
    nearest = torch.full((distance_NN.shape[0],), math.inf, dtype=distance_NN.dtype)
    for seed in seeds:
        nearest = torch.minimum(nearest, distance_NN[seed])
        left[seed] = False
    chosen: list[int] = []
    while len(chosen) < k and bool(left.any()):
        pick = int(nearest.masked_fill(~left, -1.0).argmax())
        chosen.append(pick)
        left[pick] = False
        nearest = torch.minimum(nearest, distance_NN[pick])
    return chosen


def k_center(instance: Instance) -> list[int]:
    """Farthest first from the positives, which are covered points and not returned."""
    return sorted(farthest_first(instance.distance_NN, instance.k, instance.positives, instance.eligible))


def coreset(instance: Instance) -> list[int]:
    """k-means (k-means++ start) on the eligible candidates, then the lowest reward of each cluster (AMPO-Coreset).

    Clusters of equal points count once; fewer than k distinct points are filled up by lowest reward.
    """
    points = instance.point_NE[list(instance.eligible)].double()
    num_clusters = min(instance.k, len(torch.unique(points, dim=0)))
    label = _k_means(points, num_clusters, instance.generator)
    chosen = []
    for cluster in range(num_clusters):
        members = [instance.eligible[i] for i in (label == cluster).nonzero()[:, 0].tolist()]
        chosen += _by_reward(instance, members)[:1]
    rest = [i for i in _by_reward(instance, instance.eligible) if i not in chosen]
    return sorted(chosen + rest[: instance.k - len(chosen)])


def _k_means(points: torch.Tensor, k: int, generator: torch.Generator, max_iterations: int = 100) -> torch.Tensor:
    """Lloyd's algorithm from a k-means++ start; an empty cluster takes the point farthest from its centre."""
    centers = points[_k_means_plus_plus(points, k, generator)].clone()
    label = torch.full((len(points),), -1)
    for _ in range(max_iterations):
        distance = torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist")
        new_label = distance.argmin(1)
        own = distance.gather(1, new_label[:, None])[:, 0]
        for cluster in range(k):
            if not bool((new_label == cluster).any()):
                crowded = torch.bincount(new_label, minlength=k)[new_label] > 1
                moved = int(own.masked_fill(~crowded, -1.0).argmax())
                new_label[moved] = cluster
                own[moved] = 0.0
        if torch.equal(new_label, label):
            break
        label = new_label
        centers = torch.stack([points[label == cluster].mean(0) for cluster in range(k)])
    return label


def _k_means_plus_plus(points: torch.Tensor, k: int, generator: torch.Generator) -> list[int]:
    first = int(torch.randint(len(points), (1,), generator=generator))
    chosen = [first]
    squared = (points - points[first]).square().sum(1)
    while len(chosen) < k:
        threshold = torch.rand(1, generator=generator, dtype=torch.float64) * squared.sum()
        pick = int((squared.cumsum(0) > threshold).int().argmax())
        chosen.append(pick)
        squared = torch.minimum(squared, (points - points[pick]).square().sum(1))
    return chosen


def opt_select(instance: Instance) -> list[int]:
    """Weighted k-medoids by single swaps to a local optimum, from the better of the k-center and bottom-k starts.

    At most 5 x the optimum (Arya et al. 2004, single-swap k-median). The best swap is taken each time; ties to the
    lowest (out, in) pair.
    """
    chosen = opt_start(instance)
    cost = instance.cost(chosen)
    while True:
        swaps = [
            (instance.cost(candidate), candidate)
            for out in chosen
            for new in instance.eligible
            if new not in chosen
            for candidate in [sorted([*(i for i in chosen if i != out), new])]
        ]
        if not swaps or min(swaps)[0] >= cost - 1e-12 * max(cost, 1.0):
            return chosen
        cost, chosen = min(swaps)


def opt_start(instance: Instance) -> list[int]:
    """The cheaper of the k-center and the bottom-k choice."""
    starts = [k_center(instance), bottom_k(instance)]
    return min(starts, key=lambda start: (instance.cost(start), start))


def opt_select_exact(instance: Instance, time_limit: float | None, block: int = 4096) -> tuple[list[int], float, bool]:
    """Every subset, in blocks, until done or out of time -> (best, lower bound, proven). The first of equal optima wins."""
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    best = opt_select(instance)
    best_cost = instance.cost(best)
    subsets = itertools.combinations(instance.eligible, min(instance.k, len(instance.eligible)))
    weighted = instance.weight_N[list(instance.clients), None] * instance.distance_NN[list(instance.clients)]
    while rows := list(itertools.islice(subsets, block)):
        cost_S = weighted[:, torch.tensor(rows)].amin(2).sum(0)
        at = int(cost_S.argmin())
        if float(cost_S[at]) < best_cost - 1e-12 * max(best_cost, 1.0):
            best, best_cost = list(rows[at]), float(cost_S[at])
        if time.monotonic() > deadline:
            return best, instance.lower_bound(), False
    return best, best_cost, True
