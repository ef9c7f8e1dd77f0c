"""Subset selection for one group, in plain torch: the definition of correct, and the path that always runs.

Shapes: N candidates, F eligible candidates (facilities), C covered candidates (clients), E embedding. Indices are ints.
Costs are rounded to integers held in float64 (`round_costs`, `Coverage`), so that sums are exact in any order and every
path, thread count and machine decides alike; the compiled selector makes the same choices from the same distances.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_MASK = (1 << 64) - 1
_RANDOM_STRATEGY, _KMEANS_START = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One group's problem: choose k of `eligible` to cover `clients`, weighted by exp(mean reward - reward)."""

    point_NE: torch.Tensor
    reward_N: torch.Tensor
    """[N] float64"""
    positives: tuple[int, ...]
    eligible: tuple[int, ...]
    clients: tuple[int, ...]
    valid: tuple[int, ...]
    k: int
    seed: int
    key: int

    def cost(self, chosen: Sequence[int]) -> float:
        """sum over clients of w_i min_{j in chosen} ||e_i - e_j|| (AMPO, arXiv 2502.18293, OptSelect)."""
        return self.shifted(float((self.weights() * self._nearest(chosen)).sum()))

    def has_lost(self, chosen: Sequence[int]) -> bool:
        """Whether a client that is not at a chosen point has a weight below the smallest double."""
        return bool(((self.weights() == 0.0) & (self._nearest(chosen) > 0.0)).any())

    def _nearest(self, chosen: Sequence[int]) -> torch.Tensor:
        return distances(self.point_NE)[list(self.clients)][:, list(chosen)].double().amin(1)

    def shifted(self, summed: float) -> float:
        """A sum over those weights() with what they lack; 0 stays 0 where the shift overflows."""
        return summed * self.shift() if summed else 0.0

    def weights(self) -> torch.Tensor:
        """exp(lowest reward - reward) of the clients, float64: cannot overflow, and decides alone."""
        lowest = min(float(self.reward_N[i]) for i in self.valid)
        return torch.tensor([math.exp(lowest - float(self.reward_N[i])) for i in self.clients], dtype=torch.float64)

    def shift(self) -> float:
        """What those weights lack: exp(mean reward - lowest reward)."""
        rewards = [float(self.reward_N[i]) for i in self.valid]
        mean_over_lowest = sum(rewards) / len(rewards) - min(rewards)
        return math.exp(mean_over_lowest) if mean_over_lowest < 709.0 else math.inf

    def by_reward(self, indices: Sequence[int]) -> list[int]:
        return sorted(indices, key=lambda i: (float(self.reward_N[i]), i))


def distances(point_NE: torch.Tensor, metric: str = "euclidean") -> torch.Tensor:
    """[N, E] -> [N, N]; differences before squares, so near-duplicates keep their digits and the diagonal is 0."""
    point_NE = point_NE if point_NE.dtype == torch.float64 else point_NE.float()
    if metric == "cosine":
        top_N1 = point_NE.abs().amax(1, keepdim=True) if point_NE.shape[1] else point_NE.new_zeros(len(point_NE), 1)
        is_zero_N = top_N1[:, 0] == 0
        unit_NE = torch.nn.functional.normalize(point_NE / top_N1.masked_fill(top_N1 == 0, 1.0), dim=1)
        half_NN = 0.5 * torch.cdist(unit_NE, unit_NE, compute_mode="donot_use_mm_for_euclid_dist").square()
        return half_NN.masked_fill(is_zero_N[:, None] != is_zero_N[None], 1.0)
    if metric == "sqeuclidean":  # not the square of a root, which is no whole number where the sum of squares is one
        rows = [(point_NE - point_E).square().sum(1) for point_E in point_NE]
        return torch.stack(rows) if rows else point_NE.new_empty(0, 0)
    return torch.cdist(point_NE, point_NE, compute_mode="donot_use_mm_for_euclid_dist")


# --- exact arithmetic and keyed randomness -----------------------------------------------------------------------------


def exact_scale(largest: float, terms: int) -> float:
    """The power of two by which costs up to `largest` can be multiplied and `terms` of them added up below 2^52, so exactly."""
    if largest <= 0.0:
        return 1.0
    return math.ldexp(1.0, min(1000, 51 - math.frexp(largest)[1] - math.frexp(float(terms))[1]))


def round_costs(cost: torch.Tensor, terms: int, limit: float = math.inf) -> tuple[torch.Tensor, float]:
    """(rint(min(cost, limit) * scale), scale of exact_scale)."""
    cost = cost.clamp(max=limit)
    scale = exact_scale(float(cost.max()) if cost.numel() else 0.0, terms)
    return (cost * scale).round(), scale


def _mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def keyed_bits(seed: int, key: int, stream: int) -> Callable[[int], int]:
    """Counter-based random 64-bit numbers: a pure function of its arguments (splitmix64's finaliser)."""
    state = _mix64(_mix64(_mix64(seed & _MASK) ^ (key & _MASK)) ^ stream)
    return lambda index: _mix64(state ^ _mix64(index))


# --- strategies --------------------------------------------------------------------------------------------------------


def bottom_k(instance: Instance) -> list[int]:
    """The k lowest rewards; equal ones by lowest index."""
    return instance.by_reward(instance.eligible)[: instance.k]


def random_subset(instance: Instance) -> list[int]:
    bits = keyed_bits(instance.seed, instance.key, _RANDOM_STRATEGY)
    return sorted(instance.eligible, key=lambda i: (bits(i), i))[: instance.k]


def farthest_first(point_NE: torch.Tensor, k: int, covered: Sequence[int], eligible: Sequence[int]) -> list[int]:
    """Greedy k-center (Gonzalez 1985): k times the eligible point farthest from all so far, ties to the lowest index.

    `covered` points are not returned; where there are none the first pick is the first eligible point. Streams over the
    points: no N x N matrix.
    """
    point_NE = point_NE if point_NE.dtype == torch.float64 else point_NE.float()
    left_N = torch.zeros(len(point_NE), dtype=torch.bool)
    left_N[list(eligible)] = True
    nearest_N = torch.full((len(point_NE),), math.inf, dtype=point_NE.dtype)
    for i in covered:
        nearest_N = torch.minimum(nearest_N, (point_NE - point_NE[i]).square().sum(1))
    chosen: list[int] = []
    while len(chosen) < k:
        pick = int(nearest_N.masked_fill(~left_N, -1.0).argmax())
        chosen.append(pick)
        left_N[pick] = False
        nearest_N = torch.minimum(nearest_N, (point_NE - point_NE[pick]).square().sum(1))
    return chosen


def k_center(instance: Instance) -> list[int]:
    """Farthest first from the positives, which are covered points and not returned."""
    return farthest_first(instance.point_NE, instance.k, instance.positives, instance.eligible)


def coreset(instance: Instance) -> list[int]:
    """k-means on the eligible candidates, then the lowest reward of each cluster (AMPO-Coreset); filled by lowest reward."""
    eligible = list(instance.eligible)
    squared_FF = distances(instance.point_NE[eligible], "sqeuclidean").double()
    label = k_means(squared_FF, instance.k, keyed_bits(instance.seed, instance.key, _KMEANS_START))
    members = {cluster: [eligible[i] for i, c in enumerate(label) if c == cluster] for cluster in set(label)}
    chosen = [instance.by_reward(group)[0] for group in members.values()]
    rest = [i for i in instance.by_reward(eligible) if i not in chosen]
    return chosen + rest[: instance.k - len(chosen)]


def k_means(squared_FF: torch.Tensor, k: int, bits: Callable[[int], int], max_rounds: int = 100) -> list[int]:
    """Lloyd's algorithm from a k-means++ start (Arthur & Vassilvitskii 2007), from squared distances alone.

    ||x - mean(C)||^2 = sum_{j in C} d2(x, j) / |C| - sum_{j, l in C} d2(j, l) / (2 |C|^2). An empty cluster takes the point
    farthest from its own mean. Fewer clusters than k where there are fewer distinct points.
    """
    squared_FF, _ = round_costs(squared_FF, len(squared_FF) ** 2)
    centers = _plus_plus_start(squared_FF, k, bits)
    label = _assign(squared_FF[centers].T)
    for _ in range(max_rounds):
        member_FK = torch.nn.functional.one_hot(torch.tensor(label), len(centers)).double()
        size_K, summed_FK = member_FK.sum(0), squared_FF @ member_FK
        within_K = (summed_FK * member_FK).sum(0)
        previous, label = label, _assign(summed_FK / size_K - within_K / (2.0 * size_K * size_K))
        if label == previous:
            break
    return label


def _plus_plus_start(squared_FF: torch.Tensor, k: int, bits: Callable[[int], int]) -> list[int]:
    def uniform(index: int) -> float:
        return (bits(index) >> 11) * 2.0**-53

    centers = [int(uniform(0) * len(squared_FF))]
    nearest_F = squared_FF[centers[0]]
    while len(centers) < k and float(nearest_F.sum()) > 0.0:
        above = (nearest_F.cumsum(0) > uniform(len(centers)) * float(nearest_F.sum())).nonzero()
        centers.append(int(above[0]) if len(above) else int(nearest_F.nonzero()[-1]))
        nearest_F = torch.minimum(nearest_F, squared_FF[centers[-1]])
    return centers


def _assign(distance_FK: torch.Tensor) -> list[int]:
    label = [row.index(min(row)) for row in distance_FK.tolist()]
    own = [float(distance_FK[i, c]) for i, c in enumerate(label)]
    for cluster in range(distance_FK.shape[1]):
        if cluster not in label:
            crowded = [i for i, c in enumerate(label) if label.count(c) > 1]
            label[max(crowded, key=lambda i: (own[i], -i))] = cluster
    return label


class Coverage:
    """Choose k rows of weighted_FC (w_i d_ij) so that the column minima sum to least; cost_FC holds it rounded.

    A total of rounded costs is off by half a step for each client. Where that is more than 2^-24 of it, `sharpen` cuts the
    costs off at the best total known, since no better choice holds a dearer cell, and rounds them in finer steps.
    """

    def __init__(self, weighted_FC: torch.Tensor, k: int) -> None:
        self.weighted_FC, self.num_clients = weighted_FC, weighted_FC.shape[1]
        self.terms = self.num_clients * (k + 1)
        self.cost_FC, self.scale = round_costs(weighted_FC, self.terms)

    def total(self, rows: Sequence[int]) -> float:
        return covered_cost(self.cost_FC, rows)

    def is_coarse_at(self, total: float) -> bool:
        return total < 2.0**24 * self.num_clients

    def sharpen(self, rows: Sequence[int]) -> bool:
        """True where the costs changed and the search should go on from `rows`."""
        total = self.total(rows)
        limit = (total + self.num_clients) / self.scale
        if not self.is_coarse_at(total) or exact_scale(limit, self.terms) <= self.scale:
            return False
        self.cost_FC, self.scale = round_costs(self.weighted_FC, self.terms, limit)
        return total > 0.0 or covered_cost(self.weighted_FC, rows) > 0.0

    def lower_bound(self, bound: float, rows: Sequence[int], steps: int) -> float:
        """A rounded `bound` before rounding: lowered by `steps` where rounding could still decide about `rows`."""
        return max(0.0, bound - steps if self.is_coarse_at(self.total(rows)) else bound) / self.scale


def _coverage(instance: Instance) -> Coverage:
    distance_NN = distances(instance.point_NE).double()
    distance_FC = distance_NN[list(instance.eligible)][:, list(instance.clients)]
    return Coverage(instance.weights() * distance_FC, instance.k)


def opt_select(instance: Instance) -> tuple[list[int], float]:
    """(choice, lower bound): weighted k-medoids by single swaps, from a greedy and a bottom-k start; the cheaper local
    optimum, greedy's if equal. At most 5 x the optimum (Arya et al. 2004).
    """
    rows, bound = _local_search(instance, _coverage(instance))
    return [instance.eligible[f] for f in rows], bound


def _local_search(instance: Instance, problem: Coverage) -> tuple[list[int], float]:
    low = [instance.eligible.index(i) for i in bottom_k(instance)]
    ends = [swap(problem.cost_FC, start) for start in (greedy(problem.cost_FC, instance.k), low)]
    rows = min(ends, key=problem.total)
    while problem.sharpen(rows):
        rows = swap(problem.cost_FC, rows)
    return rows, problem.lower_bound(problem.total(rows), rows, problem.terms) / 5


def covered_cost(cost_FC: torch.Tensor, rows: Sequence[int]) -> float:
    return float(cost_FC[list(rows)].amin(0).sum())


def greedy(cost_FC: torch.Tensor, k: int, fixed: Sequence[int] = ()) -> list[int]:
    """Adds the row that lowers the cost most, ties to the lowest (BUILD of Kaufman & Rousseeuw 1990)."""
    chosen = list(fixed)
    while len(chosen) < k:
        left = [f for f in range(len(cost_FC)) if f not in chosen]
        chosen.append(min(left, key=lambda f: (covered_cost(cost_FC, [*chosen, f]), f)))
    return chosen


def swap(cost_FC: torch.Tensor, chosen: Sequence[int], num_fixed: int = 0) -> list[int]:
    """Swaps, eagerly and in index order, until no single swap lowers the cost (Schubert & Rousseeuw 2021).

    For each row that may come in the cheapest removal is taken, ties to the lowest row; the first num_fixed stay.
    """
    chosen = list(chosen)
    cost, candidate, without_swap = covered_cost(cost_FC, chosen), 0, 0
    while without_swap < len(cost_FC) and len(chosen) > num_fixed:
        without_swap += 1
        if candidate not in chosen:
            options = [
                (covered_cost(cost_FC, [*chosen[:s], candidate, *chosen[s + 1 :]]), chosen[s], s)
                for s in range(num_fixed, len(chosen))
            ]
            best_cost, _, slot = min(options)
            if best_cost < cost:
                cost, chosen[slot], without_swap = best_cost, candidate, 0
        candidate = (candidate + 1) % len(cost_FC)
    return chosen


def opt_select_exact(instance: Instance, time_limit: float | None) -> tuple[list[int], float]:
    """(choice, lower bound; infinity where the choice is the optimum): every subset, until done or out of time.

    Among equal optima the first found stays.
    """
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    problem = _coverage(instance)
    best, bound = _local_search(instance, problem)
    is_tried = False
    while problem.total(best) > 0.0:
        best, is_tried = _try_all(problem.cost_FC, best, deadline)
        if not problem.sharpen(best):
            break
    total = problem.total(best)
    if is_tried:
        is_optimal = not problem.is_coarse_at(total)
        bound = math.inf if is_optimal else max(bound, problem.lower_bound(total, best, problem.num_clients))
    return [instance.eligible[f] for f in best], bound


def _try_all(cost_FC: torch.Tensor, best: list[int], deadline: float, block: int = 4096) -> tuple[list[int], bool]:
    """(the cheapest subset of that size, whether all were tried before the deadline)."""
    best_cost = covered_cost(cost_FC, best)
    subsets = itertools.combinations(range(len(cost_FC)), len(best))
    while rows := list(itertools.islice(subsets, block)):
        cost_S = cost_FC[torch.tensor(rows)].amin(1).sum(1)
        at = int(cost_S.argmin())
        if float(cost_S[at]) < best_cost:
            best, best_cost = list(rows[at]), float(cost_S[at])
        if time.monotonic() > deadline:
            return best, False
    return best, True
