"""fused_linear_group_loss: hidden states in, group loss out, with the gradient made on the way and no logits kept.

A group's loss, and with it the gradient scale of each of its rows, is known as soon as its responses' log-probs are.
So a chunk of whole groups needs one pass over its logits: GEMM, log-sum-exp, loss, gradient in place, dX, dW. That is
6 R D V FLOPs; every recomputing head pays 8.

Shapes: R rows (one per response token), D hidden, V vocab, M responses, B groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ampo_fast.dispatch import on_device, resolve_impl
from ampo_fast.head import HeadOptions, default_chunk_rows, head_chunk, logit_buffer, whole_group_rows
from ampo_fast.logprobs import HeadGradients, linear_logprob
from ampo_fast.losses.stats import CheckedStats, LossOutput, ResponseStats, check_side_inputs, segment_sum
from ampo_fast.opaque import opaque
from ampo_fast.validation import (
    check_first_order,
    check_head,
    check_logprobs,
    check_normalizer,
    check_offsets,
    describe,
)

_MODES = ("auto", "grouped", "recompute", "frozen")


@opaque
def fused_linear_group_loss(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_R: torch.Tensor,
    response_offsets: torch.Tensor,
    group_offsets: torch.Tensor,
    reward_M: torch.Tensor,
    loss_fn: Callable[[ResponseStats], LossOutput],
    *,
    ref_logp_M: torch.Tensor | None = None,
    positive_M: torch.Tensor | None = None,
    baseline_B: torch.Tensor | None = None,
    ref_logp_R: torch.Tensor | None = None,
    compare_tokens: bool = False,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    eos_id: int | None = None,
    normalizer: float | torch.Tensor | None = None,
    mode: str = "auto",
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, ResponseStats]:
    """Sum over groups of loss_fn's per-group loss / normalizer, with its gradient, holding the logits of a chunk at a time.

    Args:
        hidden_RD: the hidden state that predicts each response token; the prompt's last one once per response.
        response_offsets: int64 [M + 1] into the rows; group_offsets: int64 [B + 1] into the responses.
        loss_fn: ResponseStats -> LossOutput, additive over groups (ampo_fast.losses).
        ref_logp_R: the reference's log-prob of each row's token, for losses that weight tokens (BMC).
        compare_tokens: shows the loss the token ids as well: BMC then weights the tokens that differ between two responses (else
            all of them), and DPOPCRM takes its similarity from the parts that differ (else from the lengths).
        normalizer: what the sum is divided by, default B; under accumulation, the global count of groups.
        mode: "grouped" 6RDV, gradient made in the forward; "recompute" 8RDV; "frozen" 4RDV, for a weight that needs no
            gradient; "auto": frozen for a frozen weight without eos_id, else grouped where every group fits chunk_rows (by
            default: where no group's logits pass 1 GiB on a CPU, 4 GiB on a GPU), else recompute. float16: recompute, since
            a loss scale reaches a gradient made in the forward too late, when what is small has become 0.
        chunk_rows: rows whose logits exist at once, more only for a group that is longer; default about 64 MiB of logits on
            a CPU, 4096 to 8192 rows on a GPU.
        impl: how the rows of a chunk are passed over: "torch", "triton", or "auto" (triton for CUDA tensors).
    Returns:
        (loss, ResponseStats): a scalar that takes a scalar upstream gradient, repeatedly (but has no second derivative);
            and detached statistics.
    Raises:
        ValueError: arguments that do not fit, mode="frozen" with a trainable weight; on a CPU also targets out of range
            and NaN logits.
    """
    if mode not in _MODES:
        raise ValueError(f"mode = {mode!r}; use one of {', '.join(_MODES)}")
    check_head(hidden_RD, weight_VD, target_R, bias_V, eos_id)
    responses = check_offsets("response_offsets", response_offsets, hidden_RD.shape[0], allow_empty=False)
    groups = check_offsets("group_offsets", group_offsets, responses.numel() - 1)
    stats = _side_inputs(responses, groups, reward_M, ref_logp_M, positive_M, baseline_B, ref_logp_R, hidden_RD.device)
    stats = dataclasses.replace(stats, target_R=target_R if compare_tokens else None)
    options = HeadOptions(temperature, softcap, eos_id)
    impl = resolve_impl("fused_linear_group_loss", impl, hidden_RD)
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"chunk_rows = {chunk_rows!r}; it must be at least 1, or None for the default")
    check_normalizer(normalizer)
    if isinstance(loss_fn, type) or not callable(loss_fn):
        raise ValueError(
            f"loss_fn = {loss_fn!r}; it must be a loss such as ampo_fast.losses.AMPO(), or a function of its stats"
        )
    num_groups = groups.numel() - 1
    norm = max(num_groups, 1) if normalizer is None else normalizer
    rows = chunk_rows or default_chunk_rows(weight_VD.shape[0], hidden_RD.device)
    longest = chunk_rows or max(rows, whole_group_rows(weight_VD))
    mode = _resolve_mode(mode, weight_VD, bias_V, eos_id, responses[groups].diff(), longest)
    if mode != "grouped" or not torch.is_grad_enabled():
        return _from_logprobs(hidden_RD, weight_VD, bias_V, target_R, stats, loss_fn, norm, options, impl)
    plan = _Plan(loss_fn=loss_fn, stats=stats, options=options, normalizer=norm, chunk_rows=rows, impl=impl)
    loss = _GroupedLoss.apply(hidden_RD, weight_VD, bias_V, target_R, plan)
    check_logprobs(plan.logp_R)
    return loss, plan.out_stats()


def _side_inputs(responses, groups, reward_M, ref_logp_M, positive_M, baseline_B, ref_logp_R, device) -> CheckedStats:
    stats = CheckedStats(
        logp_M=torch.empty(0, device=device),
        length_M=on_device(responses.diff(), device),
        reward_M=reward_M,
        group_offsets=groups,
        ref_logp_M=ref_logp_M,
        positive_M=positive_M,
        baseline_B=baseline_B,
        response_offsets=responses,
        ref_logp_R=ref_logp_R,
    )
    check_side_inputs(stats, responses.numel() - 1, int(responses[-1]), device)
    return stats


def _resolve_mode(mode, weight_VD, bias_V, eos_id: int | None, group_rows, longest: int) -> str:
    is_trained = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if mode == "frozen" and is_trained:
        raise ValueError('mode = "frozen" drops the head\'s gradient, but weight_VD or bias_V requires one; use "auto"')
    if mode != "auto":
        return mode
    # With eos_id "frozen" computes the logits twice, as "recompute" does, and "grouped" once.
    if not is_trained and eos_id is None:
        return "frozen"
    if weight_VD.dtype == torch.float16:
        return "recompute"
    return "grouped" if group_rows.numel() == 0 or int(group_rows.max()) <= longest else "recompute"


def _from_logprobs(hidden_RD, weight_VD, bias_V, target_R, stats, loss_fn, norm, options: HeadOptions, impl):
    """Log-probs first, the loss on all of them, gradients by linear_logprob's own backward (recompute or frozen)."""
    out = linear_logprob(
        hidden_RD, weight_VD, target_R, bias_V=bias_V,
        temperature=options.temperature, softcap=options.softcap, eos_id=options.eos_id, impl=impl,
    )  # fmt: skip
    logp_R, eos_logp_R = out if options.eos_id is not None else (out, None)
    full = with_logprobs(stats, logp_R, eos_logp_R, target_R, options.eos_id)
    return _total(loss_fn, full) / norm, _detached(full)


def _total(loss_fn: Callable[[ResponseStats], LossOutput], stats: CheckedStats) -> torch.Tensor:
    """The sum of the groups' losses."""
    output = loss_fn(stats)
    if not isinstance(output, LossOutput):
        raise ValueError(
            f"loss_fn returned {describe(output)}; it must return ampo_fast.losses.LossOutput(loss, per_group_B)"
        )
    return output.per_group_B.sum()


def with_logprobs(stats: CheckedStats, logp_R, eos_logp_R, target_R, eos_id: int | None) -> CheckedStats:
    """Fills in the rows and their sums per response.

    eos_logp_M is the EOS log-prob at the response's last row, NaN where it ends otherwise.
    """
    offsets = stats.response_offsets
    eos_logp_M = None
    if eos_logp_R is not None:
        last_M = on_device(offsets[1:], logp_R.device) - 1
        eos_logp_M = eos_logp_R[last_M].masked_fill(target_R[last_M] != eos_id, torch.nan)
    return dataclasses.replace(
        stats,
        logp_M=segment_sum(logp_R, offsets),
        eos_logp_M=eos_logp_M,
        logp_R=logp_R,
        eos_logp_R=eos_logp_R,
    )


def _detached(stats: ResponseStats) -> ResponseStats:
    values = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
    return ResponseStats(**{k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in values.items()})


@dataclass
class _Plan:
    """What travels through autograd beside the tensors, and the log-probs that come back out."""

    loss_fn: Callable[[ResponseStats], LossOutput]
    stats: CheckedStats
    options: HeadOptions
    normalizer: float | torch.Tensor
    chunk_rows: int
    impl: str
    logp_R: torch.Tensor | None = None
    eos_logp_R: torch.Tensor | None = None
    target_R: torch.Tensor | None = None

    def out_stats(self) -> ResponseStats:
        return _detached(with_logprobs(self.stats, self.logp_R, self.eos_logp_R, self.target_R, self.options.eos_id))

    @property
    def longest_group(self) -> int:
        rows_B = self.stats.response_offsets[self.stats.group_offsets].diff()
        return int(rows_B.max()) if rows_B.numel() else 0

    def group_runs(self) -> Iterator[tuple[int, int]]:
        """Runs [first, last) of whole groups that fit chunk_rows together; one group at least."""
        ends = self.stats.response_offsets[self.stats.group_offsets].tolist()
        first = 0
        while first < len(ends) - 1:
            last = first + 1
            while last < len(ends) - 1 and ends[last + 1] - ends[first] <= self.chunk_rows:
                last += 1
            yield first, last
            first = last

    def chunk_stats(self, first: int, last: int) -> tuple[slice, CheckedStats]:
        """(rows, side inputs) of groups [first, last), offsets starting at 0."""
        stats = self.stats
        m0, m1 = int(stats.group_offsets[first]), int(stats.group_offsets[last])
        r0, r1 = int(stats.response_offsets[m0]), int(stats.response_offsets[m1])

        def cut(vector, a, b):
            return None if vector is None else vector[a:b]

        part = CheckedStats(
            logp_M=stats.logp_M,
            length_M=stats.length_M[m0:m1],
            reward_M=stats.reward_M[m0:m1],
            group_offsets=stats.group_offsets[first : last + 1] - m0,
            ref_logp_M=cut(stats.ref_logp_M, m0, m1),
            positive_M=cut(stats.positive_M, m0, m1),
            baseline_B=cut(stats.baseline_B, first, last),
            response_offsets=stats.response_offsets[m0 : m1 + 1] - r0,
            target_R=cut(stats.target_R, r0, r1),
            ref_logp_R=cut(stats.ref_logp_R, r0, r1),
        )
        return slice(r0, r1), part


class _GroupedLoss(torch.autograd.Function):
    """Loss and all gradients in the forward; the backward scales them, and casts: several chunks' dW waits for it in float32,
    so that one pass does both."""

    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, bias_V, target_R, plan: _Plan):
        loss, gradients = _walk_groups(hidden_RD, weight_VD, bias_V, target_R, plan, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients.sums())
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in (hidden_RD, weight_VD, bias_V)]
        return loss / plan.normalizer

    @staticmethod
    def backward(ctx, upstream):
        check_first_order("fused_linear_group_loss")
        scaled = (
            None if total is None else _scaled(total, upstream, dtype)
            for total, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None)


def _scaled(total: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total * upstream, rounded once, to `dtype`. On a GPU one pass casts as it multiplies; nothing of total's size is made
    beside the result."""
    # One dimension more than a scalar has: a 0-d factor would be rounded to total's dtype first.
    return torch.mul(total, upstream.reshape(1), out=torch.empty_like(total, dtype=dtype))


def _walk_groups(
    hidden_RD, weight_VD, bias_V, target_R, plan: _Plan, needed: tuple[bool, bool, bool]
) -> tuple[torch.Tensor, HeadGradients]:
    """(loss summed over the groups, gradients), chunk by chunk. The last chunk's logits are freed when this returns: the
    gradients are cast after that."""
    options = plan.options
    work = torch.float64 if hidden_RD.dtype == torch.float64 else torch.float32
    plan.target_R = target_R
    plan.logp_R = hidden_RD.new_zeros(hidden_RD.shape[0], dtype=work)
    plan.eos_logp_R = None if options.eos_id is None else torch.zeros_like(plan.logp_R)
    chunks = [plan.chunk_stats(first, last) for first, last in plan.group_runs()]
    num_with_rows = sum(rows.start < rows.stop for rows, _ in chunks)
    gradients = HeadGradients(hidden_RD, weight_VD, bias_V, needed, num_with_rows)
    loss = hidden_RD.new_zeros((), dtype=work)
    buffer = logit_buffer(hidden_RD, weight_VD, max(plan.chunk_rows, plan.longest_group))
    for rows, part in chunks:
        if rows.start == rows.stop:
            eos_logp_R = None if plan.eos_logp_R is None else plan.eos_logp_R[rows]
            empty = with_logprobs(part, plan.logp_R[rows], eos_logp_R, target_R[rows], options.eos_id)
            loss += _total(plan.loss_fn, empty)
            continue
        chunk = head_chunk(hidden_RD[rows], weight_VD, target_R[rows], bias_V, options, plan.impl, buffer)
        plan.logp_R[rows] = chunk.logp_R
        if plan.eos_logp_R is not None:
            plan.eos_logp_R[rows] = chunk.eos_logp_R
        part_loss, grad_R, grad_eos_R = row_gradients(
            plan.loss_fn, part, chunk.logp_R, chunk.eos_logp_R, target_R[rows], options.eos_id, plan.normalizer
        )
        loss += part_loss
        gradients.add(rows, chunk.logit_gradient(grad_R, grad_eos_R))
    return loss, gradients


def row_gradients(
    loss_fn: Callable[[ResponseStats], LossOutput],
    side: ResponseStats,
    logp_R: torch.Tensor,
    eos_logp_R: torch.Tensor | None,
    target_R: torch.Tensor,
    eos_id: int | None,
    normalizer: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(loss summed over the groups, d(loss / normalizer) / d logp_R, the same / d eos_logp_R) of groups whose rows are
    known; side is what the loss is given beside them."""
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in (logp_R, eos_logp_R) if leaf is not None]
        eos_leaf = leaves[1] if len(leaves) == 2 else None
        loss = _total(loss_fn, with_logprobs(side, leaves[0], eos_leaf, target_R, eos_id))
        found = torch.autograd.grad(loss / normalizer, leaves, allow_unused=True) if loss.requires_grad else [None] * 2
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=False)]
    return loss.detach(), grads[0], grads[1] if eos_leaf is not None else None
