"""Shared-prefix attention as one variable-length kernel call: prompts' keys and values gathered once per response.

The kernel (flash-attn where it is installed, else torch's own varlen_attn) sees sequences of queries and, for each, a
longer one of keys: a prompt sees itself, a response sees its prompt and itself. It aligns the causal mask to the last
query and key, so that a response token sees the whole prompt. Half-precision on CUDA only; elsewhere attention.py runs
the pieces one by one.

Shapes: T packed tokens, S gathered keys, H query heads, K key/value heads, A head size.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ampo_fast.dispatch import on_device

_HALF = (torch.float16, torch.bfloat16)
_MAX_HEAD_SIZE = 256  # of both kernels
_HEAD_SIZE_STEP = 8  # torch's refuses what is between


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """Where each sequence's queries and keys lie; all tensors on the device of the forward."""

    key_index_S: torch.Tensor
    """Packed token of each gathered key."""
    own_T: torch.Tensor
    """Gathered key that is the token's own one, not a copy for a response."""
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """Pair j: prompt tokens, and the gathered keys that are their copies for response j of their group; none twice."""
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    max_query: int
    max_key: int

    @classmethod
    def build(
        cls, piece_lengths: Sequence[int], responses_per_group: Sequence[int], device: torch.device
    ) -> VarlenPlan:
        """piece_lengths: [prompt, y1, y2, ...] of all groups, in packed order; empty responses are no sequence."""
        keys: list[torch.Tensor] = []
        own: list[torch.Tensor] = []
        copies: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        queries, lengths = [], []
        lengths_left = iter(piece_lengths)
        token = at = 0
        for num_responses in responses_per_group:
            prompt = torch.arange(token, token + next(lengths_left))
            pieces = [prompt, *(_take(lengths_left, token, prompt.numel(), num_responses))]
            token += sum(map(len, pieces))
            nonempty = [piece for piece in pieces[1:] if len(piece)]
            for j, piece in enumerate([prompt, *nonempty]):
                seen = prompt if j == 0 else torch.cat((prompt, piece))
                keys.append(seen)
                own.append(torch.arange(at + len(seen) - len(piece), at + len(seen)))
                if j:
                    if len(copies) < j:
                        copies.append(([], []))
                    copies[j - 1][0].append(prompt)
                    copies[j - 1][1].append(torch.arange(at, at + len(prompt)))
                queries.append(len(piece))
                lengths.append(len(seen))
                at += len(seen)
        return cls(
            key_index_S=on_device(torch.cat(keys), device),
            own_T=on_device(torch.cat(own), device),
            copies=tuple(
                (on_device(torch.cat(tokens), device), on_device(torch.cat(at_S), device)) for tokens, at_S in copies
            ),
            query_offsets=_offsets(queries, device),
            key_offsets=_offsets(lengths, device),
            max_query=max(queries),
            max_key=max(lengths),
        )


def _take(lengths, token: int, prompt: int, count: int) -> list[torch.Tensor]:
    """The packed tokens of the next `count` responses, which follow a prompt that starts at `token`."""
    ends = list(itertools.accumulate(itertools.islice(lengths, count), initial=token + prompt))
    return [torch.arange(a, b) for a, b in itertools.pairwise(ends)]


def _offsets(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return on_device(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)


class _Gather(torch.autograd.Function):
    """x_T[key_index]; the backward sums the copies in float32 and always in the same order (an atomic index_add does not)."""

    @staticmethod
    def forward(ctx, x_TKA: torch.Tensor, plan: VarlenPlan) -> torch.Tensor:
        ctx.plan = plan
        return x_TKA[plan.key_index_S]

    @staticmethod
    def backward(ctx, grad_SKA: torch.Tensor) -> tuple[torch.Tensor, None]:
        plan = ctx.plan
        work = torch.promote_types(grad_SKA.dtype, torch.float32)
        grad_TKA = grad_SKA[plan.own_T].to(work)
        for token, at_S in plan.copies:
            # No token is named twice in one call: there is no order of additions to be left to chance.
            grad_TKA.index_add_(0, token, grad_SKA[at_S].to(work))
        return grad_TKA.to(grad_SKA.dtype), None


def varlen_attention(
    query_THA: torch.Tensor,
    key_TKA: torch.Tensor,
    value_TKA: torch.Tensor,
    plan: VarlenPlan,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(cap(q k^T scale)) v of every token over its prompt and its own response up to itself, [T, H, A].

    query [T, H, A], key and value [T, K, A], K dividing H, of one half-precision type. sliding_window: tokens seen, the
    query's own included.
    """
    # A window of W tokens is W - 1 to the left; 0 to the right is causal.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    return kernel(softcap)(
        query_THA, _Gather.apply(key_TKA, plan), _Gather.apply(value_TKA, plan), plan, scale, window, softcap
    )


def can_run(query: torch.Tensor, softcap: float | None) -> bool:
    """Whether a kernel takes this query: CUDA, half precision (under autocast too), head size, a soft cap."""
    return (
        query.is_cuda
        and compute_dtype(query) in _HALF
        and query.shape[-1] <= _MAX_HEAD_SIZE
        and query.shape[-1] % _HEAD_SIZE_STEP == 0
        and kernel(softcap) is not None
    )


def compute_dtype(query: torch.Tensor) -> torch.dtype:
    """The type to attend in: autocast's where it is on (rotary embeddings leave queries in float32 there)."""
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype


@functools.cache
def kernel(softcap: float | None) -> Callable | None:
    """flash-attn's, else torch's, which knows no soft cap; None where neither serves."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None if softcap else _torch_kernel()
    return functools.partial(_flash_attn, flash_attn_varlen_func)


def _flash_attn(function, query, key, value, plan: VarlenPlan, scale, window, softcap):
    return function(
        query, key, value, plan.query_offsets, plan.key_offsets, plan.max_query, plan.max_key, softmax_scale=scale,
        causal=True, window_size=window, softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _torch_kernel() -> Callable | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return functools.partial(_torch_varlen, varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters)


def _torch_varlen(function, knows_gqa: bool, query, key, value, plan: VarlenPlan, scale, window, softcap):
    options = {"scale": scale, "window_size": window}
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and knows_gqa:
        options["enable_gqa"] = True
    elif repeats > 1 and not _shares_heads(function, query.device, query.dtype):
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    return function(
        query, key, value, plan.query_offsets, plan.key_offsets, plan.max_query, plan.max_key, **options
    )  # fmt: skip


@functools.cache
def _shares_heads(function: Callable, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel takes fewer key heads than query heads and is right, gradients included: asked by a tiny call.

    torch 2.11's does, and does not say so. Repeated keys and values are a quarter of what an 8B model keeps for the backward.
    """
    repeated = _tiny_call(function, device, dtype, lambda x_SKA: x_SKA.repeat_interleave(2, dim=1))
    try:
        shared = _tiny_call(function, device, dtype, lambda x_SKA: x_SKA)
    except (RuntimeError, ValueError):
        return False
    tolerance = 16 * torch.finfo(dtype).eps
    return all(
        ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(shared, repeated, strict=True)
    )


def _tiny_call(function: Callable, device: torch.device, dtype: torch.dtype, prepare: Callable) -> list[torch.Tensor]:
    """Output and gradients of one sequence, 4 query heads, 2 key heads; `prepare` is what becomes of keys and values."""
    length, size = 3, _HEAD_SIZE_STEP
    query_THA, key_SKA, value_SKA, grad_THA = (
        torch.arange(length * heads * size, device=device).add(start).sin().to(dtype).view(length, heads, size)
        for start, heads in ((0, 4), (100, 2), (200, 2), (300, 4))
    )
    offsets = _offsets([length], device)
    inputs = [x.requires_grad_() for x in (query_THA, key_SKA, value_SKA)]
    # The first forward asks, which may be one without gradients, or in a checkpoint, whose hooks would count what is kept here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        out_THA = function(
            query_THA, prepare(key_SKA), prepare(value_SKA), offsets, offsets, length, length, scale=1.0, window_size=(-1, 0)
        )  # fmt: skip
        return [out_THA.detach(), *torch.autograd.grad(out_THA, inputs, grad_THA)]
