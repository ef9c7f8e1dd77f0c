"""The row passes over one chunk of logits: log-prob of the target, then the gradient of the logits in their own buffer.

R rows, V vocab. One program per row; a row is read once by each pass. z = softcap tanh((logit + bias) / softcap) / temperature.
Rows are addressed in 64 bits: R * V may pass 2^31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ampo_fast.kernels.launch import launch


@triton.jit
def _scores(
    logits, bias, columns, is_inside, softcap, inv_temperature, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """(z, dz/dlogit) of one block of a row, float32; z is -inf outside the vocabulary."""
    z = tl.load(logits + columns, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=is_inside, other=0.0).to(tl.float32)
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        squashed = 2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0
        slope = 1.0 - squashed * squashed
        z = squashed * softcap
    return tl.where(is_inside, z * inv_temperature, float("-inf")), slope * inv_temperature


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
    logits_RV, bias_V, target_R, lse_R, logp_R, rest_R, eos_logp_R,
    num_tokens, row_stride, eos_id, softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_EOS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """lse, logp = z_y - lse, rest = 1 - p_y (summed, not subtracted) and the EOS log-prob of one row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_R + row)
    logits = logits_RV + row * row_stride
    # The target stays out of the running sum: 1 - p_y is then exact also where the model is sure.
    top = -float("inf")
    others = 0.0
    z_target = 0.0
    z_eos = 0.0
    for start in range(0, num_tokens, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        is_inside = columns < num_tokens
        z, _ = _scores(logits, bias_V, columns, is_inside, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
        is_target = columns == target
        z_target += tl.sum(tl.where(is_target, z, 0.0), 0)
        if HAS_EOS:
            z_eos += tl.sum(tl.where(columns == eos_id, z, 0.0), 0)
        new_top = tl.maximum(top, tl.max(z, 0))
        weights = tl.where(is_inside & (columns != target), tl.exp(z - new_top), 0.0)
        others = others * tl.exp(top - new_top) + tl.sum(weights, 0)
        top = new_top
    own = tl.exp(z_target - top)
    log_sum = tl.log(others + own)
    is_token = (target >= 0) & (target < num_tokens)
    tl.store(lse_R + row, top + log_sum)
    # Differences to the top, not to lse, which rounds to the digits of the top.
    logp = tl.where(z_target == top, -log1p(others), z_target - top - log_sum)
    # NaN where the target is no token: nobody waits for the device to say so, and the loss must not look sound.
    tl.store(logp_R + row, tl.where(is_token, at_most_zero(logp), float("nan")))
    tl.store(rest_R + row, others / (others + own))
    if HAS_EOS:
        tl.store(eos_logp_R + row, at_most_zero(z_eos - top - log_sum))


@triton.jit
def gradient_kernel(
    logits_RV, bias_V, target_R, lse_R, rest_R, grad_R, grad_eos_R,
    num_tokens, row_stride, eos_id, softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_EOS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Overwrites one row of logits with d/dlogit of g logp + g_eos eos_logp: -(g + g_eos) p + g 1_y + g_eos 1_eos."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_R + row)
    lse = tl.load(lse_R + row)
    rest = tl.load(rest_R + row)
    grad = tl.load(grad_R + row)
    grad_eos = 0.0
    if HAS_EOS:
        grad_eos = tl.load(grad_eos_R + row)
    logits = logits_RV + row * row_stride
    for start in range(0, num_tokens, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        is_inside = columns < num_tokens
        z, slope = _scores(logits, bias_V, columns, is_inside, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
        p = tl.exp(z - lse)
        dz = -(grad + grad_eos) * p
        if HAS_EOS:
            dz = tl.where(columns == eos_id, grad_eos * (1.0 - p) - grad * p, dz)
            at_target = tl.where(target == eos_id, (grad + grad_eos) * rest, grad * rest - grad_eos * p)
        else:
            at_target = grad * rest
        dz = tl.where(columns == target, at_target, dz)
        tl.store(logits + columns, (dz * slope).to(logits_RV.dtype.element_ty), mask=is_inside)


def _launch(num_tokens: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(num_tokens), 4096)
    return {"BLOCK_V": block, "num_warps": max(1, min(8, block // 512))}


def row_logprob(
    logits_RV: torch.Tensor,
    target_R: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    eos_id: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(lse, logp, 1 - p_target, eos_logp or None), float32 [R], of logits [R, V] in any float dtype."""
    num_rows, num_tokens = logits_RV.shape
    lse_R, logp_R, rest_R = (logits_RV.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
    eos_logp_R = None if eos_id is None else torch.empty_like(lse_R)
    if num_rows:
        launch(
            logprob_kernel, num_rows,
            logits_RV, bias_V, target_R, lse_R, logp_R, rest_R, eos_logp_R,
            num_tokens, logits_RV.stride(0), eos_id or 0, softcap or 1.0, 1.0 / temperature,
            HAS_BIAS=bias_V is not None, HAS_SOFTCAP=softcap is not None, HAS_EOS=eos_id is not None,
            **_launch(num_tokens),
        )  # fmt: skip
    return lse_R, logp_R, rest_R, eos_logp_R


def row_gradient_(
    logits_RV: torch.Tensor,
    target_R: torch.Tensor,
    lse_R: torch.Tensor,
    rest_R: torch.Tensor,
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
            logits_RV, bias_V, target_R, lse_R, rest_R, grad_R, grad_eos_R,
            num_tokens, logits_RV.stride(0), eos_id or 0, softcap or 1.0, 1.0 / temperature,
            HAS_BIAS=bias_V is not None, HAS_SOFTCAP=softcap is not None, HAS_EOS=eos_id is not None,
            **_launch(num_tokens),
        )  # fmt: skip
    return logits_RV
