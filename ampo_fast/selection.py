"""Which responses to train on: 1 positive and k informative negatives of each group, and the distances underneath.

Shapes: n stacked candidates, N candidates of a group, B groups, P positives, E embedding.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ampo_fast import selection_reference as reference
from ampo_fast.validation import check_finite, check_offsets

try:
    from ampo_fast import _C
except ImportError:  # a checkout that was never built: the torch path still answers, and resolve_impl says so
    _C = None

log = logging.getLogger(__name__)

STRATEGIES = ("bottom_k", "coreset", "k_center", "opt_select", "opt_select_exact", "best_worst", "random")
_METRICS = ("euclidean", "sqeuclidean", "cosine")


class Selection(NamedTuple):
    """Indices are int64 and local to the group; -1 fills what could not be chosen."""

    positive: torch.Tensor
    """[B, P] by descending reward."""
    negative: torch.Tensor
    """[B, k] ascending."""
    cost: torch.Tensor
    """[B] coverage cost; NaN for a degenerate group."""
    lower_bound: torch.Tensor
    """[B] no k negatives cost less."""
    proven: torch.Tensor
    """[B] True where the cost is known to be the optimum."""


def select_responses(
    embeddings: torch.Tensor,
    rewards: torch.Tensor,
    k: int,
    *,
    strategy: str,
    group_offsets: torch.Tensor | None = None,
    positives: int = 1,
    coverage: str = "candidates",
    valid: torch.Tensor | None = None,
    positive_ok: torch.Tensor | None = None,
    tie_tol: float | None = None,
    keys: torch.Tensor | None = None,
    seed: int = 0,
    time_limit: float | None = None,
    impl: str = "auto",
) -> Selection:
    """Chooses the best responses and k negatives of every group.

    cost = sum_i w_i min_{j in S} ||e_i - e_j||_2, w_i = exp(mean r - r_i) (AMPO, arXiv 2502.18293, OptSelect), i over
    the valid candidates other than the positives (coverage "all": over those too), the mean over the valid ones.
    Strategies: bottom_k (lowest rewards), coreset (k-means, lowest reward of each cluster), k_center (farthest first,
    the positive covered), opt_select (local search on the cost, <= 5 x optimum), opt_select_exact (proven, or the best
    known at time_limit seconds per group), best_worst (k = 1), random.

    Args:
        embeddings: float [n, E], rewards: float [n], stacked group after group by group_offsets int64 [B + 1].
        valid: bool [n]; False is never selected and counted nowhere. positive_ok: bool [n]; False can only be negative.
        tie_tol: a candidate with reward >= the positive's - tie_tol is no negative.
        keys: int64 [B], stable ids that seed "random" and "coreset" together with `seed`.
    Raises:
        ValueError: k < 1, an unknown strategy, shapes that do not fit, NaN among the valid.
    """
    impl = resolve_impl(impl)
    _check_choice("strategy", strategy, STRATEGIES)
    _check_choice("coverage", coverage, ("candidates", "all"))
    if k < 1 or positives < 1:
        raise ValueError(f"k = {k} and positives = {positives}; both must be at least 1")
    if strategy == "best_worst" and k != 1:
        raise ValueError(f'strategy "best_worst" keeps one negative, k is {k}')
    if embeddings.ndim != 2 or rewards.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings must be [n, E] and rewards [n], got {tuple(embeddings.shape)}, {tuple(rewards.shape)}"
        )
    n = rewards.shape[0]
    offsets = check_offsets("group_offsets", torch.tensor([0, n]) if group_offsets is None else group_offsets, n)
    valid = _mask("valid", valid, n)
    positive_ok = _mask("positive_ok", positive_ok, n)
    rewards, embeddings = rewards.detach().cpu().double(), embeddings.detach().cpu()
    check_finite("rewards", rewards[valid])
    check_finite("embeddings", embeddings[valid])
    blocks = _distance_blocks(embeddings, offsets, impl)
    instances = []
    for b, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        group = slice(start, end)
        generator = torch.Generator().manual_seed(_group_seed(seed, b if keys is None else int(keys[b])))
        sides = _sides(rewards[group], valid[group], positive_ok[group], positives, tie_tol)
        instances.append(_instance(blocks[b], embeddings[group], rewards[group], k, coverage, *sides, generator))
    chosen = _choose(instances, strategy, k, time_limit, impl)
    return _stack(instances, chosen, positives, k)


def resolve_impl(impl: str) -> str:
    """Which path runs, "cpp" or "torch": auto takes cpp where the extension is built, else torch, and says so once.

    Raises ValueError for "cpp" without the extension.
    """
    _check_choice("impl", impl, ("auto", "torch", "cpp"))
    if impl == "cpp" and _C is None:
        raise ValueError(
            'impl = "cpp" needs the compiled extension: pip install the package (a C++ compiler is enough)'
        )
    if impl == "auto" and _C is None:
        _log_torch_once()
    return "torch" if impl == "torch" or _C is None else "cpp"


@functools.cache
def _log_torch_once() -> None:
    log.warning("the compiled selector is not built; selection runs in torch, slower")


def _distance_blocks(embeddings: torch.Tensor, offsets: torch.Tensor, impl: str) -> list[torch.Tensor]:
    """One [N, N] matrix a group."""
    sizes = offsets.diff().tolist()
    if impl == "torch" or embeddings.dtype == torch.float64:
        return [reference.distances(points) for points in embeddings.split(sizes)]
    flat = torch.from_numpy(_C.pairwise(embeddings.float().numpy(), offsets.numpy()))
    return [block.view(n, n) for block, n in zip(flat.split([n * n for n in sizes]), sizes, strict=True)]


def _instance(
    distance_NN: torch.Tensor,
    point_NE: torch.Tensor,
    reward_N: torch.Tensor,
    k: int,
    coverage: str,
    chosen_positives: list[int],
    eligible: list[int],
    counted: list[int],
    generator: torch.Generator,
) -> reference.Instance | None:
    """The group's problem; None where it has no positive or no negative."""
    if not chosen_positives or not eligible:
        return None
    weight_N = torch.zeros_like(reward_N)
    weight_N[counted] = (reward_N[counted].mean() - reward_N[counted]).exp()
    clients = counted if coverage == "all" else [i for i in counted if i not in chosen_positives]
    return reference.Instance(
        distance_NN=distance_NN.double(),
        point_NE=point_NE,
        reward_N=reward_N,
        eligible=tuple(eligible),
        clients=tuple(clients),
        weight_N=weight_N,
        positives=tuple(chosen_positives),
        k=min(k, len(eligible)),
        generator=generator,
    )


def _choose(
    instances: Sequence[reference.Instance | None], strategy: str, k: int, time_limit: float | None, impl: str
) -> list[tuple[list[int], float, bool]]:
    """(negatives, lower bound, proven) of each group."""
    live = [instance for instance in instances if instance is not None]
    if strategy == "opt_select_exact":
        found = [reference.opt_select_exact(instance, time_limit) for instance in live]
    elif strategy == "opt_select" and impl == "cpp":
        found = [(chosen, i.lower_bound(), False) for chosen, i in zip(_swap_all(live, k), live, strict=True)]
    else:
        found = [(_BY_NAME[strategy](instance), instance.lower_bound(), False) for instance in live]
    rest = iter(found)
    return [([], math.nan, False) if instance is None else next(rest) for instance in instances]


def _swap_all(instances: Sequence[reference.Instance], k: int) -> list[list[int]]:
    """opt_select of all groups at once: the reference's starts, the compiled swaps."""
    if not instances:
        return []
    starts = [reference.opt_start(instance) for instance in instances]
    padded = np.array([start + [-1] * (k - len(start)) for start in starts], dtype=np.int64)
    sizes = [len(instance.reward_N) for instance in instances]
    eligible = [np.isin(np.arange(n), instance.eligible) for n, instance in zip(sizes, instances, strict=True)]
    weights = [np.zeros(n) for n in sizes]
    for weight, instance in zip(weights, instances, strict=True):
        weight[list(instance.clients)] = instance.weight_N[list(instance.clients)].numpy()
    chosen, _ = _C.kmedoids_swap(
        np.concatenate([instance.distance_NN.float().numpy().ravel() for instance in instances]),
        np.concatenate(weights),
        np.concatenate(eligible),
        np.cumsum([0, *sizes]),
        padded,
    )
    return [[i for i in row if i >= 0] for row in chosen.tolist()]


_BY_NAME = {
    "bottom_k": reference.bottom_k,
    "best_worst": reference.bottom_k,
    "coreset": reference.coreset,
    "k_center": reference.k_center,
    "opt_select": reference.opt_select,
    "random": reference.random_subset,
}


def _sides(
    reward_N: torch.Tensor, valid_N: torch.Tensor, ok_N: torch.Tensor, positives: int, tie_tol: float | None
) -> tuple[list[int], list[int], list[int]]:
    """(positives by descending reward, eligible negatives, all valid candidates); ties to the lowest index."""
    counted = valid_N.nonzero()[:, 0].tolist()
    order = sorted((i for i in counted if ok_N[i]), key=lambda i: (-float(reward_N[i]), i))
    chosen = order[:positives]
    eligible = [i for i in counted if i not in chosen]
    if chosen and tie_tol is not None:
        limit = float(reward_N[chosen[-1]]) - tie_tol
        eligible = [i for i in eligible if float(reward_N[i]) < limit]
    return chosen, eligible, counted


def _stack(
    instances: Sequence[reference.Instance | None],
    chosen: Sequence[tuple[list[int], float, bool]],
    positives: int,
    k: int,
) -> Selection:
    def table(lists: Sequence[Sequence[int]], width: int) -> torch.Tensor:
        filled = [[*values, *[-1] * (width - len(values))] for values in lists]
        return torch.tensor(filled, dtype=torch.int64).reshape(len(lists), width)

    costs = [math.nan if i is None else i.cost(row[0]) for i, row in zip(instances, chosen, strict=True)]
    return Selection(
        positive=table([() if instance is None else instance.positives for instance in instances], positives),
        negative=table([row[0] for row in chosen], k),
        cost=torch.tensor(costs),
        lower_bound=torch.tensor([row[1] for row in chosen]),
        proven=torch.tensor([row[2] for row in chosen], dtype=torch.bool),
    )


def pairwise_distances(
    points: torch.Tensor, *, metric: str = "euclidean", group_offsets: torch.Tensor | None = None, impl: str = "auto"
) -> torch.Tensor:
    """All distances between points [n, E] -> [n, n] float32 (float64 for float64), zeros on the diagonal.

    metric: "euclidean", "sqeuclidean", or "cosine" (1 - cos). With group_offsets [B + 1]: one [N, N] block per group,
    flattened and concatenated. Raises ValueError for NaN, shapes that do not fit, an unknown metric.
    """
    impl = resolve_impl(impl) if metric == "euclidean" else "torch"
    _check_choice("metric", metric, _METRICS)
    if points.ndim != 2:
        raise ValueError(f"points must be [n, E], got {tuple(points.shape)}")
    check_finite("points", points)
    n = points.shape[0]
    offsets = check_offsets("group_offsets", torch.tensor([0, n]) if group_offsets is None else group_offsets, n)
    if metric == "euclidean":
        blocks = _distance_blocks(points.detach().cpu(), offsets, impl)
    else:
        blocks = [reference.distances(part, metric) for part in points.detach().cpu().split(offsets.diff().tolist())]
    if group_offsets is None:
        return blocks[0]
    return torch.cat([block.flatten() for block in blocks]) if blocks else points.new_empty(0)


def k_center(points: torch.Tensor, k: int, *, seeds: Sequence[int] | None = None, impl: str = "auto") -> torch.Tensor:
    """Greedy k-center (Gonzalez 1985) over points [n, E] -> int64 [k]: the seeds first, then in order of choice.

    Without seeds it starts from point 0. Ties go to the lowest index. Streams over the points: no n x n matrix.
    Raises ValueError for k outside 1 .. n, seeds out of range, repeated or more than k, and NaN.
    """
    _check_choice("impl", impl, ("auto", "torch"))
    n = points.shape[0]
    chosen = list(dict.fromkeys([0] if seeds is None else [int(seed) for seed in seeds]))
    if points.ndim != 2 or not 1 <= k <= n:
        raise ValueError(f"k = {k}, but points are {tuple(points.shape)}; k must be in 1 .. n")
    if (
        not all(0 <= seed < n for seed in chosen)
        or len(chosen) > k
        or (seeds is not None and len(chosen) != len(seeds))
    ):
        raise ValueError(f"seeds = {list(seeds or [])} must be distinct indices below {n}, at most k = {k}")
    check_finite("points", points)
    nearest = torch.full((n,), math.inf, dtype=torch.float64 if points.dtype == torch.float64 else torch.float32)
    for i, index in enumerate(_k_center_order(chosen, k)):
        pick = index if index is not None else int(nearest.argmax())
        if i >= len(chosen):
            chosen.append(pick)
        nearest = torch.minimum(nearest, (points - points[pick]).to(nearest.dtype).square().sum(1))
        nearest[pick] = -1.0
    return torch.tensor(chosen)


def _k_center_order(seeds: Sequence[int], k: int) -> list[int | None]:
    return [*seeds, *[None] * (k - len(seeds))]


def k_medoids(
    distances: torch.Tensor,
    k: int,
    *,
    weights: torch.Tensor | None = None,
    fixed: Sequence[int] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, float]:
    """Weighted k-medoids: k indices (the fixed ones included) with low sum_i w_i min_j d_ij -> (indices ascending, cost).

    Single swaps to a local optimum (<= 5 x the optimum; Arya et al. 2004). Raises ValueError for shapes that do not fit,
    k outside 1 .. n, fixed members out of range, negative weights or NaN.
    """
    _check_choice("impl", impl, ("auto", "torch"))
    n = distances.shape[0]
    kept = [int(i) for i in fixed or ()]
    if distances.shape != (n, n) or not 1 <= k <= n:
        raise ValueError(f"distances must be [n, n] and k in 1 .. n, got {tuple(distances.shape)} and k = {k}")
    if len(set(kept)) != len(kept) or not all(0 <= i < n for i in kept) or len(kept) > k:
        raise ValueError(f"fixed = {kept} must be distinct indices below {n}, at most k = {k}")
    check_finite("distances", distances)
    weight_N = torch.ones(n, dtype=torch.float64) if weights is None else weights.detach().cpu().double()
    if weight_N.shape != (n,) or bool((weight_N < 0).any()):
        raise ValueError(f"weights must be {n} numbers >= 0")
    weighted_NN = weight_N[:, None] * distances.detach().cpu().double()
    free = [i for i in range(n) if i not in kept]
    chosen = kept + reference.farthest_first(distances.detach().cpu(), k - len(kept), kept, free)
    cost = float(weighted_NN[:, chosen].amin(1).sum())
    while True:
        swaps = [
            (float(weighted_NN[:, candidate].amin(1).sum()), candidate)
            for out in chosen
            if out not in kept
            for new in free
            if new not in chosen
            for candidate in [sorted([*(i for i in chosen if i != out), new])]
        ]
        if not swaps or min(swaps)[0] >= cost - 1e-12 * max(cost, 1.0):
            return torch.tensor(sorted(chosen)), cost
        cost, chosen = min(swaps)


def _mask(name: str, mask: torch.Tensor | None, n: int) -> torch.Tensor:
    if mask is None:
        return torch.ones(n, dtype=torch.bool)
    if mask.shape != (n,):
        raise ValueError(f"{name} must have shape [{n}], got {tuple(mask.shape)}")
    return mask.detach().cpu().bool()


def _group_seed(seed: int, key: int) -> int:
    # A fixed mix (splitmix64's), not hash(): the same in every process and version.
    mixed = (seed * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    mixed ^= mixed >> 31
    return mixed >> 1


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}; use one of {', '.join(choices)}")
