"""The row passes over one chunk of logits: log-prob of the target, then the gradient of the logits in their own buffer.

R rows, V vocab. One program per row; a row is read once by each pass. score = softcap tanh((logit + bias) / softcap), and the
model's distribution is softmax(score / temperature). Rows are addressed in 64 bits: R * V may pass 2^31.

A block of a row is [L, W]: lane l holds W neighbours, which it loads at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ampo_fast.kernels.launch import launch

_LOG2_E = tl.constexpr(1.4426950408889634)


class RowSums(NamedTuple):
    """What the gradient's pass needs of the first one; float32 [R]."""

    top_R: torch.Tensor
    """The highest score."""
    others_R: torch.Tensor
    """Sum of exp((score - top) / temperature) over all but the target."""
    own_R: torch.Tensor
    """The target's exp((score - top) / temperature)."""


@triton.jit
def _block_columns(start, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr):
    return start + tl.arange(0, BLOCK_V // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _scores(logits, bias, columns, num_tokens, is_full, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """(score, d score / d logit), float32; the score is -inf outside the vocabulary.

    is_full: no column lies outside. A mask that may end anywhere makes every load one number wide, so only a row's last
    block has one.
    """
    if is_full:
        score = tl.load(logits + columns).to(tl.float32)
        if HAS_BIAS:
            score += tl.load(bias + columns).to(tl.float32)
    else:
        score = tl.load(logits + columns, mask=columns < num_tokens, other=0.0).to(tl.float32)
        if HAS_BIAS:
            score += tl.load(bias + columns, mask=columns < num_tokens, other=0.0).to(tl.float32)
    slope = 1.0
    if HAS_SOFTCAP:
        squashed = 1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * _LOG2_E / softcap)))
        slope = 1.0 - squashed * squashed
        score = squashed * softcap
    if not is_full:
        score = tl.where(columns < num_tokens, score, float("-inf"))
    return score, slope


@triton.jit
def _holds(start, column, BLOCK_V: tl.constexpr):
    """Whether the block has this column: the same for all threads, which leave out together what only one column needs."""
    return (column >= start) & (column < start + BLOCK_V)


@triton.jit
def _token(target_R, row, num_tokens):
    """A row's target, in 32 bits; num_tokens where it is no token."""
    target = tl.load(target_R + row)
    return tl.where((target >= 0) & (target < num_tokens), target, num_tokens).to(tl.int32)


@triton.jit
def at_most_zero(logp):
    """min(logp, 0) that keeps NaN: a GPU's own min(NaN, 0) is 0, a log-prob of certainty."""
    return tl.where(logp > 0.0, 0.0, logp)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 by Kahan's quotient, exact where 1 + x rounds to 1."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def logprob_kernel(
    logits_RV, bias_V, target_R, top_R, others_R, own_R, logp_R, eos_logp_R,
    num_tokens, row_stride, eos_id, softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_EOS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row's sums, the log-prob of its target and, where asked for, of EOS."""
    row = tl.program_id(0).to(tl.int64)
    target = _token(target_R, row, num_tokens)
    logits = logits_RV + row * row_stride
    own_score = _scores(logits, bias_V, target, num_tokens, False, softcap, HAS_BIAS, HAS_SOFTCAP)[0]
    scale = inv_temperature * _LOG2_E
    # A top and a sum for each lane: no two threads wait for each other before the row's end. The tops start at a finite
    # number, so that a lane which sees nothing but -inf has a sum of 0, not NaN.
    top_L = tl.full((BLOCK_V // WIDTH,), -3.0e38, tl.float32)
    others_L = tl.zeros((BLOCK_V // WIDTH,), tl.float32)
    for start in range(0, num_tokens, BLOCK_V):
        columns_LW = _block_columns(start, WIDTH, BLOCK_V)
        is_full = start + BLOCK_V <= num_tokens
        score_LW = _scores(logits, bias_V, columns_LW, num_tokens, is_full, softcap, HAS_BIAS, HAS_SOFTCAP)[0]
        # The target stays out of the sum: 1 - p_y is then exact also where the model is sure.
        if _holds(start, target, BLOCK_V):
            score_LW = tl.where(columns_LW == target, float("-inf"), score_LW)
        new_top_L = tl.maximum(top_L, tl.max(score_LW, 1))
        # The difference first, then the scale: equal scores give exactly 1, whatever the compiler contracts.
        weights_LW = tl.exp2((score_LW - new_top_L[:, None]) * scale)
        others_L = others_L * tl.exp2((top_L - new_top_L) * scale) + tl.sum(weights_LW, 1)
        top_L = new_top_L
    top = tl.maximum(tl.max(top_L, 0), own_score)
    others = tl.sum(others_L * tl.exp2((top_L - top) * scale), 0)
    own = tl.exp2((own_score - top) * scale)
    log_sum = tl.log(others + own)
    tl.store(top_R + row, top)
    tl.store(others_R + row, others)
    tl.store(own_R + row, own)
    # Differences to the top, not to top + log sum, which rounds to the digits of the top.
    logp = tl.where(own == 1.0, -log1p(others), (own_score - top) * inv_temperature - log_sum)
    # NaN where the target is no token: nobody waits for the device to say so, and the loss must not look sound.
    tl.store(logp_R + row, tl.where(target < num_tokens, at_most_zero(logp), float("nan")))
    if HAS_EOS:
        eos_score = _scores(logits, bias_V, eos_id, num_tokens, False, softcap, HAS_BIAS, HAS_SOFTCAP)[0]
        tl.store(eos_logp_R + row, at_most_zero((eos_score - top) * inv_temperature - log_sum))


@triton.jit
def gradient_kernel(
    logits_RV, bias_V, target_R, top_R, others_R, own_R, grad_R, grad_eos_R,
    num_tokens, row_stride, eos_id, softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_EOS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Overwrites one row of logits with d/dlogit of g logp + g_eos eos_logp: -(g + g_eos) p + g 1_y + g_eos 1_eos.

    A thread reads only logits that it overwrites itself: the threads do not wait for each other.
    """
    row = tl.program_id(0).to(tl.int64)
    target = _token(target_R, row, num_tokens)
    top = tl.load(top_R + row)
    others = tl.load(others_R + row)
    own = tl.load(own_R + row)
    inv_sum = 1.0 / (others + own)
    grad = tl.load(grad_R + row) * inv_temperature
    grad_eos = 0.0
    at_target = grad * (others * inv_sum)
    if HAS_EOS:
        grad_eos = tl.load(grad_eos_R + row) * inv_temperature
        apart = at_target - grad_eos * (own * inv_sum)
        at_target = tl.where(target == eos_id, (grad + grad_eos) * (others * inv_sum), apart)
    factor = -(grad + grad_eos) * inv_sum
    scale = inv_temperature * _LOG2_E
    logits = logits_RV + row * row_stride
    for start in range(0, num_tokens, BLOCK_V):
        columns_LW = _block_columns(start, WIDTH, BLOCK_V)
        is_full = start + BLOCK_V <= num_tokens
        score_LW, slope_LW = _scores(logits, bias_V, columns_LW, num_tokens, is_full, softcap, HAS_BIAS, HAS_SOFTCAP)
        weights_LW = tl.exp2((score_LW - top) * scale)
        dz_LW = weights_LW * factor
        if HAS_EOS:  # noqa: SIM102 decided when the kernel is compiled, the other one while it runs
            if _holds(start, eos_id, BLOCK_V):
                dz_LW = tl.where(columns_LW == eos_id, dz_LW + grad_eos, dz_LW)
        if _holds(start, target, BLOCK_V):
            dz_LW = tl.where(columns_LW == target, at_target, dz_LW)
        gradient_LW = (dz_LW * slope_LW).to(logits_RV.dtype.element_ty)
        if is_full:
            tl.store(logits + columns_LW, gradient_LW)
        else:
            tl.store(logits + columns_LW, gradient_LW, mask=columns_LW < num_tokens)


def _launch(logits_RV: torch.Tensor) -> dict[str, int]:
    """A lane loads 16 bytes at once, the widest load there is."""
    width = 16 // logits_RV.element_size()
    block = max(width, min(triton.next_power_of_2(logits_RV.shape[1]), 4096))
    return {"WIDTH": width, "BLOCK_V": block, "num_warps": max(1, min(8, block // 512))}


def row_logprob(
    logits_RV: torch.Tensor,
    target_R: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    eos_id: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None, RowSums]:
    """(logp, eos_logp or None, sums), float32 [R], of logits [R, V] in any float dtype."""
    num_rows, num_tokens = logits_RV.shape
    logp_R, *of_row = (logits_RV.new_empty(num_rows, dtype=torch.float32) for _ in range(4))
    sums = RowSums(*of_row)
    eos_logp_R = None if eos_id is None else torch.empty_like(logp_R)
    if num_rows:
        launch(
            logprob_kernel, num_rows,
            logits_RV, bias_V, target_R, *sums, logp_R, eos_logp_R,
            num_tokens, logits_RV.stride(0), eos_id or 0, softcap or 1.0, 1.0 / temperature,
            HAS_BIAS=bias_V is not None, HAS_SOFTCAP=softcap is not None, HAS_EOS=eos_id is not None,
            **_launch(logits_RV),
        )  # fmt: skip
    return logp_R, eos_logp_R, sums


def row_gradient_(
    logits_RV: torch.Tensor,
    target_R: torch.Tensor,
    sums: RowSums,
    grad_R: torch.Tensor,
    grad_eos_R: torch.Tensor | None,
    bias_V: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    eos_id: int | None,
) -> torch.Tensor:
    """Turns logits into the gradient of sum_r g_r logp_r + g_eos_r eos_logp_r, in place; grads are float32 [R]."""
    num_rows, num_tokens = logits_RV.shape
    if num_rows:
        launch(
            gradient_kernel, num_rows,
            logits_RV, bias_V, target_R, *sums, grad_R, grad_eos_R,
            num_tokens, logits_RV.stride(0), eos_id or 0, softcap or 1.0, 1.0 / temperature,
            HAS_BIAS=bias_V is not None, HAS_SOFTCAP=softcap is not None, HAS_EOS=eos_id is not None,
            **_launch(logits_RV),
        )  # fmt: skip
    return logits_RV
