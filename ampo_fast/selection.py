"""Which responses to train on: 1 positive and k informative negatives of each group, and the distances underneath.

Shapes: n stacked candidates, N candidates of a group, B groups, P positives, E embedding.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ampo_fast import selection_reference as reference
from ampo_fast.validation import check_finite, check_offsets, checks_values

try:
    from ampo_fast import _C
except ImportError:  # a checkout that was never built: the torch path still answers, and resolve_impl says so
    _C = None

log = logging.getLogger(__name__)

STRATEGIES = ("bottom_k", "coreset", "k_center", "opt_select", "opt_select_exact", "best_worst", "random")
_MAX_INDICES = 1 << 32
_IMPLS = ("auto", "torch", "cpp", "cuda")
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
    known when time_limit seconds are over, which the groups share), best_worst (k = 1), random.

    Args:
        embeddings: float [n, E], rewards: float [n], stacked group after group by group_offsets int64 [B + 1].
        valid: bool [n]; False is never selected and counted nowhere. positive_ok: bool [n]; False can only be negative.
        tie_tol: a candidate with reward >= the positive's - tie_tol is no negative.
        keys: int64 [B], stable ids that seed "random" and "coreset" together with `seed`.
        impl: "auto" stays on the device for CUDA embeddings where the extension has CUDA (resolve_impl says what fits).
    Raises:
        ValueError: k < 1, an unknown strategy, shapes that do not fit, NaN among the valid.
    """
    _check_choice("impl", impl, _IMPLS)
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
    num_groups = len(offsets) - 1
    if num_groups * max(k, positives) > _MAX_INDICES:
        raise ValueError(f"k = {k} and positives = {positives} ask for more than {_MAX_INDICES} indices; lower them")
    if time_limit is not None and math.isnan(time_limit):
        raise ValueError("time_limit is NaN; use seconds, or None for no limit")
    problem = _Problem(
        points=embeddings.detach(),
        rewards=rewards.detach().cpu().double(),
        valid=_mask("valid", valid, n),
        positive_ok=_mask("positive_ok", positive_ok, n),
        offsets=offsets,
        keys=_keys(keys, num_groups),
        k=k,
        positives=positives,
        strategy=strategy,
        covers_positives=coverage == "all",
        tie_tol=tie_tol,
        seed=seed,
        time_limit=time_limit,
    )
    _check_finite_where("rewards", problem.rewards, problem.valid)
    _check_finite_where("embeddings", problem.points, problem.valid)
    impl = resolve_impl(impl, problem.points, _why_not_select_cuda(problem))
    if impl == "cuda":
        return _select_cuda(problem)
    problem = dataclasses.replace(problem, points=problem.points.cpu())
    chosen = _select_cpp(problem) if impl == "cpp" else _select_torch(problem)
    return Selection(*(tensor.to(embeddings.device) for tensor in chosen))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """The checked arguments of select_responses; points where they came from, the rest on the CPU."""

    points: torch.Tensor
    rewards: torch.Tensor
    valid: torch.Tensor
    positive_ok: torch.Tensor
    offsets: torch.Tensor
    keys: torch.Tensor
    k: int
    positives: int
    strategy: str
    covers_positives: bool
    tie_tol: float | None
    seed: int
    time_limit: float | None


def resolve_impl(impl: str, points: torch.Tensor | None = None, why_not_cuda: str | None = None) -> str:
    """ "cpp", "torch" or "cuda". auto: cuda for CUDA points where it is built and fits, else cpp where that is built, else torch.

    CUDA points that cuda does not take are copied to the host. Each choice is logged once. Raises ValueError for an impl
    asked for by name that cannot run, with what would make it run.
    """
    _check_choice("impl", impl, _IMPLS)
    if impl == "cpp" and _C is None:
        raise ValueError(
            'impl = "cpp" needs the compiled extension: pip install the package (a C++ compiler is enough)'
        )
    is_cuda = points is not None and points.is_cuda
    reason = _why_no_cuda_at_all(is_cuda) or why_not_cuda
    if impl == "cuda" and reason:
        raise ValueError(f'impl = "cuda" cannot run this: {reason}')
    if impl == "auto" and is_cuda and not reason:
        impl = "cuda"
    elif impl == "auto":
        impl = "torch" if _C is None else "cpp"
        _log_once(impl, reason if is_cuda else None)
    return impl


def _why_no_cuda_at_all(is_cuda: bool) -> str | None:
    if _C is None or not _C.has_cuda:
        return "the extension was built without CUDA; install with -C cmake.define.AMPO_CUDA=ON where nvcc is"
    return None if is_cuda else "the points are on the CPU; move them to a CUDA device"


def _why_not_select_cuda(problem: _Problem) -> str | None:
    if problem.strategy in ("coreset", "opt_select_exact"):
        return f'strategy "{problem.strategy}" runs on the host'
    largest = int(problem.offsets.diff().max()) if len(problem.keys) else 0
    if _C is not None and (largest > _C.max_cuda_group or problem.k > _C.max_cuda_k):
        return f"a group of more than {_C.max_cuda_group} candidates, or k above {_C.max_cuda_k}, runs on the host"
    return _why_not_dtype(problem.points)


def _why_not_dtype(points: torch.Tensor) -> str | None:
    return None if points.dtype in (torch.float32, torch.bfloat16) else f"{points.dtype} runs on the host"


@functools.cache
def _log_once(impl: str, why_not_cuda: str | None) -> None:
    if why_not_cuda:
        log.warning("CUDA points are copied to the host for selection: %s", why_not_cuda)
    if impl == "torch":
        log.warning("the compiled selector is not built; selection runs in torch, slower")
    else:
        log.info("selection runs compiled, vector unit: %s", _C.vector_path())


def _select_cuda(problem: _Problem) -> Selection:
    """On the points' device and torch's current stream, without waiting for it. Not yet run on a GPU."""
    device, num_groups = problem.points.device, len(problem.keys)
    points = problem.points.contiguous()
    out = Selection(
        positive=torch.empty(num_groups, problem.positives, dtype=torch.int64, device=device),
        negative=torch.empty(num_groups, problem.k, dtype=torch.int64, device=device),
        cost=torch.empty(num_groups, dtype=torch.float64, device=device),
        lower_bound=torch.empty(num_groups, dtype=torch.float64, device=device),
        proven=torch.empty(num_groups, dtype=torch.bool, device=device),
    )
    with torch.cuda.device(device):
        _C.select_cuda(
            points.data_ptr(),
            points.dtype == torch.bfloat16,
            points.shape[1],
            *_common_arguments(problem),
            [tensor.data_ptr() for tensor in out],
            torch.cuda.current_stream(device).cuda_stream,
        )
    return out


def _common_arguments(problem: _Problem) -> tuple[object, ...]:
    """What both compiled selectors take, in their order."""
    return (
        problem.rewards.numpy(),
        problem.valid.numpy(),
        problem.positive_ok.numpy(),
        problem.offsets.numpy(),
        problem.keys.numpy(),
        STRATEGIES.index(problem.strategy),
        problem.k,
        problem.positives,
        problem.covers_positives,
        math.nan if problem.tie_tol is None else problem.tie_tol,
        problem.seed & 0xFFFFFFFFFFFFFFFF,
    )


def _select_cpp(problem: _Problem) -> Selection:
    limit = math.inf if problem.time_limit is None else problem.time_limit
    positive, negative, cost, lower_bound, proven = _C.select(
        _as_numpy(problem.points), *_common_arguments(problem), limit
    )
    as_tensor = torch.from_numpy
    return Selection(
        as_tensor(positive), as_tensor(negative), as_tensor(cost), as_tensor(lower_bound), as_tensor(proven).bool()
    )


def _as_numpy(points: torch.Tensor) -> np.ndarray:
    """float32 and float64 without a copy, bfloat16 as the uint16 of its bits, anything else as float32."""
    points = points.contiguous()
    if points.dtype == torch.bfloat16:
        return points.view(torch.int16).numpy().view(np.uint16)
    return (points if points.dtype in (torch.float32, torch.float64) else points.float()).numpy()


def _select_torch(problem: _Problem) -> Selection:
    num_groups = len(problem.keys)
    positive = torch.full((num_groups, problem.positives), -1)
    negative = torch.full((num_groups, problem.k), -1)
    cost = torch.full((num_groups,), math.nan, dtype=torch.float64)
    lower_bound, proven = cost.clone(), torch.zeros(num_groups, dtype=torch.bool)
    for b in range(num_groups):
        instance = _instance(problem, b)
        if instance is None:
            continue
        chosen, is_optimal = _choose(instance, problem)
        positive[b, : len(instance.positives)] = torch.tensor(instance.positives)
        negative[b, : len(chosen)] = torch.tensor(sorted(chosen))
        cost[b] = instance.cost(chosen)
        # Single swaps end within 5 x the optimum; other strategies promise nothing.
        is_local = problem.strategy.startswith("opt_select")
        lower_bound[b] = cost[b] if is_optimal else cost[b] / 5 if is_local else 0.0
        proven[b] = lower_bound[b] >= cost[b]
    return Selection(positive, negative, cost, lower_bound, proven)


def _instance(problem: _Problem, b: int) -> reference.Instance | None:
    """Group b's problem; None where it has no positive or no negative."""
    group = slice(int(problem.offsets[b]), int(problem.offsets[b + 1]))
    reward_N = problem.rewards[group]
    sides = _sides(reward_N, problem.valid[group], problem.positive_ok[group], problem.positives, problem.tie_tol)
    positives, eligible, valid = sides
    if not positives or not eligible:
        return None
    return reference.Instance(
        point_NE=problem.points[group],
        reward_N=reward_N,
        positives=tuple(positives),
        eligible=tuple(eligible),
        clients=tuple(i for i in valid if problem.covers_positives or i not in positives),
        valid=tuple(valid),
        k=min(problem.k, len(eligible)),
        seed=problem.seed,
        key=int(problem.keys[b]),
    )


def _choose(instance: reference.Instance, problem: _Problem) -> tuple[list[int], bool]:
    """(negatives, whether they are known to be the cheapest)."""
    if instance.k == len(instance.eligible):
        return list(instance.eligible), True
    if problem.strategy == "opt_select_exact":
        return reference.opt_select_exact(instance, problem.time_limit)
    return _BY_NAME[problem.strategy](instance), False


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


def pairwise_distances(
    points: torch.Tensor, *, metric: str = "euclidean", group_offsets: torch.Tensor | None = None, impl: str = "auto"
) -> torch.Tensor:
    """All distances between points [n, E] -> [n, n] float32 (float64 for float64), zeros on the diagonal.

    metric: "euclidean", "sqeuclidean", or "cosine" (1 - cos; a row of zeros is at 1 from all others). With group_offsets
    [B + 1]: one [N, N] block per group, flattened and concatenated. Raises ValueError for NaN, shapes that do not fit, an
    unknown metric, more entries than memory holds.
    """
    _check_choice("metric", metric, _METRICS)
    if points.ndim != 2:
        raise ValueError(f"points must be [n, E], got {tuple(points.shape)}")
    check_finite("points", points)
    n = points.shape[0]
    offsets = check_offsets("group_offsets", torch.tensor([0, n]) if group_offsets is None else group_offsets, n)
    impl = resolve_impl(impl, points, _why_not_dtype(points))
    if impl == "cuda":
        flat = _pairwise_cuda(points.detach().contiguous(), metric, offsets)
        return flat.view(n, n) if group_offsets is None else flat
    on_cpu = points.detach().cpu()
    if impl == "cpp":
        flat = torch.from_numpy(_C.pairwise(_as_numpy(on_cpu), offsets.numpy(), _METRICS.index(metric)))
    else:
        flat = torch.cat([reference.distances(p, metric).flatten() for p in on_cpu.split(offsets.diff().tolist())])
    flat = flat.to(points.device)
    return flat.view(n, n) if group_offsets is None else flat


def _pairwise_cuda(points: torch.Tensor, metric: str, offsets: torch.Tensor) -> torch.Tensor:
    """On the points' device and torch's current stream, without waiting for it. Not yet run on a GPU."""
    flat = torch.empty(int(offsets.diff().square().sum()), dtype=torch.float32, device=points.device)
    with torch.cuda.device(points.device):
        _C.pairwise_cuda(
            points.data_ptr(),
            points.dtype == torch.bfloat16,
            *points.shape,
            offsets.numpy(),
            _METRICS.index(metric),
            flat.data_ptr(),
            torch.cuda.current_stream(points.device).cuda_stream,
        )
    return flat


def k_center(points: torch.Tensor, k: int, *, seeds: Sequence[int] | None = None, impl: str = "auto") -> torch.Tensor:
    """Greedy k-center (Gonzalez 1985) over points [n, E] -> int64 [k]: the seeds first, then in order of choice.

    Without seeds it starts from point 0. Ties go to the lowest index. Streams over the points: no n x n matrix.
    Raises ValueError for k outside 1 .. n, seeds out of range, repeated or more than k, and NaN.
    """
    if points.ndim != 2 or not 1 <= k <= points.shape[0]:
        raise ValueError(f"k = {k}, but points are {tuple(points.shape)}; k must be in 1 .. n")
    n = points.shape[0]
    first = [int(seed) for seed in seeds] if seeds is not None and len(seeds) else [0]
    if not all(0 <= seed < n for seed in first) or len(set(first)) != len(first) or len(first) > k:
        raise ValueError(f"seeds = {first} must be distinct indices below {n}, at most k = {k}")
    check_finite("points", points)
    impl = resolve_impl(impl, points, _why_not_dtype(points) or _why_not_pool(points.shape[1]))
    if impl == "cuda":
        return _k_center_cuda(points.detach().contiguous(), k, first)
    on_cpu = points.detach().cpu()
    if impl == "cpp":
        return torch.from_numpy(_C.k_center(_as_numpy(on_cpu), k, first)).to(points.device)
    rest = [i for i in range(n) if i not in set(first)]
    return torch.tensor(first + reference.farthest_first(on_cpu, k - len(first), first, rest), device=points.device)


def _k_center_cuda(points: torch.Tensor, k: int, first: list[int]) -> torch.Tensor:
    """One launch a step on torch's current stream, without waiting for it. Not yet run on a GPU."""
    chosen = torch.empty(k, dtype=torch.int64, device=points.device)
    with torch.cuda.device(points.device):
        _C.k_center_cuda(
            points.data_ptr(),
            points.dtype == torch.bfloat16,
            *points.shape,
            k,
            first,
            chosen.data_ptr(),
            torch.cuda.current_stream(points.device).cuda_stream,
        )
    return chosen


def _why_not_pool(dim: int) -> str | None:
    if _C is not None and dim > _C.max_cuda_pool_dim:
        return f"k_center of more than {_C.max_cuda_pool_dim} dimensions runs on the host"
    return None


def k_medoids(
    distances: torch.Tensor,
    k: int,
    *,
    weights: torch.Tensor | None = None,
    fixed: Sequence[int] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, float]:
    """Weighted k-medoids: k indices (the fixed ones included) with low sum_i w_i min_j d_ij -> (indices ascending, cost).

    A greedy start, then single swaps to a local optimum (<= 5 x the optimum for a metric; Arya et al. 2004). Raises
    ValueError for shapes that do not fit, k outside 1 .. n, fixed members out of range, negative entries or NaN.
    """
    impl = resolve_impl(impl, distances, "k_medoids of one problem runs on the host")
    n = distances.shape[0]
    kept = [int(i) for i in fixed or ()]
    if distances.shape != (n, n) or not 1 <= k <= n:
        raise ValueError(f"distances must be [n, n] and k in 1 .. n, got {tuple(distances.shape)} and k = {k}")
    if len(set(kept)) != len(kept) or not all(0 <= i < n for i in kept) or len(kept) > k:
        raise ValueError(f"fixed = {kept} must be distinct indices below {n}, at most k = {k}")
    check_finite("distances", distances)
    weight_N = torch.ones(n, dtype=torch.float64) if weights is None else weights.detach().cpu().double()
    if weight_N.shape != (n,) or not bool((weight_N >= 0).all()) or not bool(weight_N.isfinite().all()):
        raise ValueError(f"weights must be {n} finite numbers >= 0")
    # Row j holds what it costs member j to serve every point.
    weighted_NN = weight_N * distances.detach().cpu().double().T
    if bool((weighted_NN < 0).any()):
        raise ValueError("distances holds a negative entry; k-medoids needs distances >= 0")
    if impl == "cpp":
        chosen = _C.k_medoids(weighted_NN.numpy(), k, kept)
    else:
        rounded_NN, _ = reference.round_costs(weighted_NN, n * (k + 1))
        chosen = reference.swap(rounded_NN, reference.greedy(rounded_NN, k, kept), len(kept))
    return torch.tensor(sorted(chosen), device=distances.device), float(weighted_NN[chosen].amin(0).sum())


def _keys(keys: torch.Tensor | None, num_groups: int) -> torch.Tensor:
    if keys is None:
        return torch.arange(num_groups)
    if keys.shape != (num_groups,) or keys.dtype != torch.int64:
        raise ValueError(f"keys must be int64 [{num_groups}], got {keys.dtype} {tuple(keys.shape)}")
    return keys.detach().cpu()


def _mask(name: str, mask: torch.Tensor | None, n: int) -> torch.Tensor:
    if mask is None:
        return torch.ones(n, dtype=torch.bool)
    if mask.shape != (n,):
        raise ValueError(f"{name} must have shape [{n}], got {tuple(mask.shape)}")
    return mask.detach().cpu().bool()


def _check_finite_where(name: str, rows: torch.Tensor, valid: torch.Tensor) -> None:
    # A sum is finite only where all its terms are. It copies nothing; picking the valid rows first copies them all.
    if rows.numel() and checks_values(rows) and not bool(rows.sum().isfinite()):
        check_finite(name, rows[valid.to(rows.device)])


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}; use one of {', '.join(choices)}")
