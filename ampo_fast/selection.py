"""Which responses to train on: 1 positive and k informative negatives of each group, from their embeddings and rewards.

Shapes: n stacked candidates, N candidates of a group, B groups, P positives, E embedding.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch

from ampo_fast import selection_reference as reference
from ampo_fast.compiled import _C, IMPLS, as_numpy, resolve_impl, why_not_dtype
from ampo_fast.distances import check_size
from ampo_fast.validation import (
    check_choice,
    check_finite,
    check_floats,
    check_offsets,
    check_tensor,
    checks_values,
    whole_number,
)

STRATEGIES = ("bottom_k", "coreset", "k_center", "opt_select", "opt_select_exact", "best_worst", "random")
_MAX_INDICES = 1 << 32
_MAX_SPREAD = 700.0
"""Of mean and lowest reward: the logarithm of the largest weight that a double holds, with room for the distances."""


class Selection(NamedTuple):
    """Indices are int64 and local to the group; -1 fills what could not be chosen."""

    positive: torch.Tensor
    """[B, P] by descending reward."""
    negative: torch.Tensor
    """[B, k] ascending."""
    cost: torch.Tensor
    """[B] coverage cost; NaN for a degenerate group, infinity where the mean reward is some 700 above the lowest."""
    lower_bound: torch.Tensor
    """[B] no k negatives cost less."""
    proven: torch.Tensor
    """[B] True where the cost is known to be the optimum, to 2^-24 of it: float32 distances have no more digits. False where
    the weights of two rewards are so far apart that a double cannot hold both (about 700)."""


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
    the positive covered), opt_select (local search on the cost, <= 5 x optimum where no weight is lost to another's size),
    opt_select_exact (proven, or the best known when time_limit seconds are over, which the groups share), best_worst (k = 1),
    random.

    Args:
        embeddings: float [n, E], rewards: float [n], stacked group after group by group_offsets int64 [B + 1].
        valid: bool [n]; False is never selected and counted nowhere. positive_ok: bool [n]; False can only be negative.
        tie_tol: a candidate with reward >= the positive's - tie_tol is no negative.
        keys: int64 [B], stable ids that seed "random" and "coreset" together with `seed`.
        impl: "auto" stays on the device for CUDA embeddings where the extension has CUDA (resolve_impl says what fits).
    Raises:
        ValueError: k < 1, an unknown strategy, shapes that do not fit; where the host selects also NaN among the valid and
            distances beyond float32, or all so small that it squares them to 0 (a GPU is not waited for: there they give a cost
            of NaN, infinity or 0).
    """
    check_choice("impl", impl, IMPLS)
    check_choice("strategy", strategy, STRATEGIES)
    check_choice("coverage", coverage, ("candidates", "all"))
    k, positives, seed = (whole_number(n, v) for n, v in (("k", k), ("positives", positives), ("seed", seed)))
    if k < 1 or positives < 1:
        raise ValueError(f"k = {k} and positives = {positives}; both must be whole numbers of at least 1")
    if strategy == "best_worst" and k != 1:
        raise ValueError(f'strategy "best_worst" keeps one negative, k is {k}')
    check_floats("embeddings", embeddings)
    check_tensor("rewards", rewards)
    if embeddings.ndim != 2 or rewards.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings must be [n, E] and rewards [n], got {tuple(embeddings.shape)}, {tuple(rewards.shape)}"
        )
    n = rewards.shape[0]
    offsets = check_offsets("group_offsets", torch.tensor([0, n]) if group_offsets is None else group_offsets, n)
    num_groups = len(offsets) - 1
    if num_groups * max(k, positives) > _MAX_INDICES:
        raise ValueError(f"k = {k} and positives = {positives} ask for more than {_MAX_INDICES} indices; lower them")
    if time_limit is not None and not (isinstance(time_limit, Real) and time_limit >= 0):
        raise ValueError(f"time_limit = {time_limit!r}; use seconds >= 0, or None for no limit")
    if tie_tol is not None and not (isinstance(tie_tol, Real) and tie_tol >= 0):
        raise ValueError(f"tie_tol = {tie_tol!r}; use a reward difference >= 0, or None for no such rule")
    problem = _Problem(
        points=embeddings.detach(),
        rewards=rewards.detach().double(),
        valid=_mask("valid", valid, rewards),
        positive_ok=_mask("positive_ok", positive_ok, rewards),
        offsets=offsets,
        keys=_keys(keys, num_groups, rewards.device),
        k=k,
        positives=positives,
        strategy=strategy,
        covers_positives=coverage == "all",
        tie_tol=tie_tol,
        seed=seed,
        time_limit=time_limit,
    )
    impl = resolve_impl(impl, problem.points, _why_not_select_cuda(problem))
    if impl != "cuda":
        problem = problem.to(torch.device("cpu"))
    # After the copy: on the host the values can be looked at for nothing, wherever they came from.
    _check_finite_where("rewards", problem.rewards, problem.valid)
    _check_finite_where("embeddings", problem.points, problem.valid)
    if impl != "cuda":
        _check_not_tiny(problem.points, problem.valid)
    if impl == "cuda":
        return _select_cuda(problem)
    chosen = _select_cpp(problem) if impl == "cpp" else _select_torch(problem)
    _check_costs(chosen, problem)
    return Selection(*(tensor.to(embeddings.device) for tensor in chosen))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """The checked arguments of select_responses; tensors where they came from, but for the offsets: on the CPU."""

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

    def to(self, device: torch.device) -> _Problem:
        names = ("points", "rewards", "valid", "positive_ok", "keys")
        moved = {name: getattr(self, name).to(device).contiguous() for name in names}
        return dataclasses.replace(self, **moved)


def _why_not_select_cuda(problem: _Problem) -> str | None:
    if problem.strategy in ("coreset", "opt_select_exact"):
        return f'strategy "{problem.strategy}" runs on the host'
    largest = int(problem.offsets.diff().max()) if len(problem.keys) else 0
    if _C is not None and (largest > _C.max_cuda_group or problem.k > _C.max_cuda_k):
        return f"a group of more than {_C.max_cuda_group} candidates, or k above {_C.max_cuda_k}, runs on the host"
    return why_not_dtype(problem.points)


def _select_cuda(problem: _Problem) -> Selection:
    """On the points' device and torch's current stream, without waiting for it. Not yet run on a GPU."""
    device, num_groups = problem.points.device, len(problem.keys)
    problem = problem.to(device)
    out = Selection(
        positive=torch.empty(num_groups, problem.positives, dtype=torch.int64, device=device),
        negative=torch.empty(num_groups, problem.k, dtype=torch.int64, device=device),
        cost=torch.empty(num_groups, dtype=torch.float64, device=device),
        lower_bound=torch.empty(num_groups, dtype=torch.float64, device=device),
        proven=torch.empty(num_groups, dtype=torch.bool, device=device),
    )
    with torch.cuda.device(device):
        _C.select_cuda(
            problem.points.data_ptr(),
            problem.points.dtype == torch.bfloat16,
            *problem.points.shape,
            problem.rewards.data_ptr(),
            problem.valid.data_ptr(),
            problem.positive_ok.data_ptr(),
            problem.offsets.numpy(),
            problem.keys.data_ptr(),
            *_options(problem),
            [tensor.data_ptr() for tensor in out],
            torch.cuda.current_stream(device).cuda_stream,
        )
    return out


def _options(problem: _Problem) -> tuple[object, ...]:
    """What both compiled selectors take beside the arrays, in their order."""
    return (
        STRATEGIES.index(problem.strategy),
        problem.k,
        problem.positives,
        problem.covers_positives,
        math.nan if problem.tie_tol is None else problem.tie_tol,
        problem.seed & 0xFFFFFFFFFFFFFFFF,
    )


def _select_cpp(problem: _Problem) -> Selection:
    limit = math.inf if problem.time_limit is None else problem.time_limit
    arrays = (problem.rewards, problem.valid, problem.positive_ok, problem.offsets, problem.keys)
    positive, negative, cost, lower_bound, proven = _C.select(
        as_numpy(problem.points), *(array.numpy() for array in arrays), *_options(problem), limit
    )
    as_tensor = torch.from_numpy
    return Selection(
        as_tensor(positive), as_tensor(negative), as_tensor(cost), as_tensor(lower_bound), as_tensor(proven).bool()
    )


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
        chosen, bound = _choose(instance, problem)
        positive[b, : len(instance.positives)] = torch.tensor(instance.positives)
        negative[b, : len(chosen)] = torch.tensor(sorted(chosen))
        cost[b] = instance.cost(chosen)
        is_known, bound = math.isinf(bound), instance.shifted(bound)
        lower_bound[b] = min(bound, float(cost[b]))
        proven[b] = bound >= cost[b] and (is_known or not instance.has_lost(chosen))
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


def _choose(instance: reference.Instance, problem: _Problem) -> tuple[list[int], float]:
    """(negatives, what no negatives cost less than, before the shift: infinity where these are known to be the cheapest)."""
    if instance.k == len(instance.eligible):
        return list(instance.eligible), math.inf
    if problem.strategy == "opt_select_exact":
        return reference.opt_select_exact(instance, problem.time_limit)
    if problem.strategy == "opt_select":
        return reference.opt_select(instance)
    return _BY_NAME[problem.strategy](instance), 0.0


_BY_NAME = {
    "bottom_k": reference.bottom_k,
    "best_worst": reference.bottom_k,
    "coreset": reference.coreset,
    "k_center": reference.k_center,
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


def _keys(keys: torch.Tensor | None, num_groups: int, device: torch.device) -> torch.Tensor:
    if keys is None:
        return torch.arange(num_groups, device=device)
    check_tensor("keys", keys)
    if keys.shape != (num_groups,) or keys.dtype != torch.int64:
        raise ValueError(f"keys must be int64 [{num_groups}], got {keys.dtype} {tuple(keys.shape)}")
    return keys.detach()


def _mask(name: str, mask: torch.Tensor | None, rewards: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    check_tensor(name, mask)
    if mask.shape != rewards.shape or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool [{len(rewards)}], got {mask.dtype} {tuple(mask.shape)}")
    return mask.detach()


def _check_costs(chosen: Selection, problem: _Problem) -> None:
    """A cost that is not finite may come from rewards so far apart that a weight overflows; then the choice stands."""
    for b in (~chosen.cost.isfinite() & (chosen.negative[:, 0] >= 0)).nonzero()[:, 0].tolist():
        group = slice(int(problem.offsets[b]), int(problem.offsets[b + 1]))
        reward_N = problem.rewards[group][problem.valid[group]]
        if reward_N.mean() - reward_N.min() < _MAX_SPREAD:
            raise ValueError(
                f"the embeddings of group {b} are so long that their distances overflow float32; scale them, to unit length "
                "for example"
            )


def _check_not_tiny(points: torch.Tensor, valid: torch.Tensor) -> None:
    """Raises where the squares of distances are 0: every choice would cost nothing, and that be proven. Embeddings that are too
    long are found by their costs."""
    if not points.numel():
        return
    low, high = points.aminmax()
    if not max(-float(low), float(high)) >= 1e-10:  # else all is well, and the valid rows need no copy
        check_size("embeddings", points[valid])


def _check_finite_where(name: str, rows: torch.Tensor, valid: torch.Tensor) -> None:
    # A sum is finite only where all its terms are. It copies nothing; picking the valid rows first copies them all.
    if rows.numel() and checks_values(rows) and not bool(rows.sum().isfinite()):
        check_finite(name, rows[valid.to(rows.device)])
