"""Distances between points, and the two classic ways to choose k of them.

Shapes: n points, E embedding, B groups, N points of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ampo_fast import selection_reference as reference
from ampo_fast.compiled import _C, as_numpy, resolve_impl, why_not_dtype
from ampo_fast.validation import (
    check_choice,
    check_finite,
    check_floats,
    check_offsets,
    check_tensor,
    checks_values,
    whole_number,
)

_METRICS = ("euclidean", "sqeuclidean", "cosine")


def pairwise_distances(
    points: torch.Tensor, *, metric: str = "euclidean", group_offsets: torch.Tensor | None = None, impl: str = "auto"
) -> torch.Tensor:
    """All distances between points [n, E] -> [n, n] float32 (float64 for float64), zeros on the diagonal.

    metric: "euclidean", "sqeuclidean", or "cosine" (1 - cos; a row of zeros is at 1 from all others). With group_offsets
    [B + 1]: one [N, N] block per group, flattened and concatenated. Raises ValueError for NaN, shapes that do not fit, an
    unknown metric, more entries than memory holds.
    """
    check_choice("metric", metric, _METRICS)
    check_floats("points", points)
    if points.ndim != 2:
        raise ValueError(f"points must be [n, E], got {tuple(points.shape)}")
    check_finite("points", points)
    if metric != "cosine":
        check_size("points", points)
    n = points.shape[0]
    offsets = check_offsets("group_offsets", torch.tensor([0, n]) if group_offsets is None else group_offsets, n)
    impl = resolve_impl(impl, points, why_not_dtype(points))
    if impl == "cuda":
        flat = _pairwise_cuda(points.detach().contiguous(), metric, offsets)
        return flat.view(n, n) if group_offsets is None else flat
    on_cpu = points.detach().cpu()
    if impl == "cpp":
        flat = torch.from_numpy(_C.pairwise(as_numpy(on_cpu), offsets.numpy(), _METRICS.index(metric)))
    else:
        blocks = [reference.distances(p, metric).flatten() for p in on_cpu.split(offsets.diff().tolist())]
        flat = torch.cat([*blocks, on_cpu.new_empty(0, dtype=torch.promote_types(points.dtype, torch.float32))])
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
    check_floats("points", points)
    k = whole_number("k", k)
    if points.ndim != 2 or not 1 <= k <= points.shape[0]:
        raise ValueError(f"k = {k}, but points are {tuple(points.shape)}; k must be in 1 .. n")
    n = points.shape[0]
    first = _indices("seeds", seeds) or [0]
    if not all(0 <= seed < n for seed in first) or len(set(first)) != len(first) or len(first) > k:
        raise ValueError(f"seeds = {first} must be distinct indices below {n}, at most k = {k}")
    check_finite("points", points)
    check_size("points", points)
    impl = resolve_impl(impl, points, why_not_dtype(points) or _why_not_pool(points.shape[1]))
    if impl == "cuda":
        return _k_center_cuda(points.detach().contiguous(), k, first)
    on_cpu = points.detach().cpu()
    if impl == "cpp":
        return torch.from_numpy(_C.k_center(as_numpy(on_cpu), k, first)).to(points.device)
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


def _indices(name: str, indices: Sequence[int] | None) -> list[int]:
    if indices is None:
        return []
    try:
        return [whole_number(f"{name}[{i}]", index) for i, index in enumerate(indices)]
    except TypeError:
        raise ValueError(f"{name} must be a list of indices, got {indices!r}") from None


_SIZES = {torch.float64: (1e-140, 1e140)}
"""Of the largest coordinate: beyond it squares leave the type's range, or lose the digits of what is below it."""


def check_size(name: str, points: torch.Tensor) -> None:
    """Raises ValueError where squared distances leave float32 (float64); on a CPU, or after validate(True)."""
    if not points.numel() or not checks_values(points):
        return
    low, high = points.detach().aminmax()
    size = max(-float(low), float(high))
    smallest, largest = _SIZES.get(points.dtype, (1e-14, 1e17))
    if size and not smallest <= size <= largest:
        work = "float64" if points.dtype == torch.float64 else "float32"
        raise ValueError(
            f"{name} has coordinates of up to {size:g}: the squares of such distances are beyond {work}; scale the points, to "
            "unit length for example"
        )


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

    distances[i, j] is what point i pays to be served by j: any dissimilarity >= 0, symmetric or not, zero on the diagonal or
    not. A greedy start, then single swaps to a local optimum (<= 5 x the optimum for a metric; Arya et al. 2004). Raises
    ValueError for shapes that do not fit, k outside 1 .. n, fixed members out of range, negative entries or NaN.
    """
    check_tensor("distances", distances)
    impl = resolve_impl(impl, distances, "k_medoids of one problem runs on the host")
    n = distances.shape[0] if distances.ndim else 0
    kept, k = _indices("fixed", fixed), whole_number("k", k)
    if distances.shape != (n, n) or not 1 <= k <= n:
        raise ValueError(f"distances must be [n, n] and k in 1 .. n, got {tuple(distances.shape)} and k = {k}")
    if len(set(kept)) != len(kept) or not all(0 <= i < n for i in kept) or len(kept) > k:
        raise ValueError(f"fixed = {kept} must be distinct indices below {n}, at most k = {k}")
    check_finite("distances", distances)
    if weights is not None:
        check_tensor("weights", weights)
    weight_N = torch.ones(n, dtype=torch.float64) if weights is None else weights.detach().cpu().double()
    if weight_N.shape != (n,):
        raise ValueError(f"weights must have shape [{n}], got {tuple(weight_N.shape)}")
    is_bad_N = ~(weight_N >= 0) | ~weight_N.isfinite()
    if bool(is_bad_N.any()):
        first = int(is_bad_N.nonzero()[0])
        raise ValueError(f"weights[{first}] = {float(weight_N[first])}; weights must be finite and >= 0")
    # Row j holds what it costs member j to serve every point.
    weighted_NN = weight_N * distances.detach().cpu().double().T
    if not bool(weighted_NN.isfinite().all()):
        raise ValueError("weights times distances overflow float64; scale them")
    if bool((weighted_NN < 0).any()):
        raise ValueError("distances holds a negative entry; k-medoids needs distances >= 0")
    if impl == "cpp":
        chosen = _C.k_medoids(weighted_NN.numpy(), k, kept)
    else:
        problem = reference.Coverage(weighted_NN, k)
        chosen = reference.swap(problem.cost_FC, reference.greedy(problem.cost_FC, k, kept), len(kept))
        while problem.sharpen(chosen):
            chosen = reference.swap(problem.cost_FC, chosen, len(kept))
    return torch.tensor(sorted(chosen), device=distances.device), float(weighted_NN[chosen].amin(0).sum())
