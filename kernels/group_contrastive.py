"""The group-contrastive loss and its gradient, one program per group, from summed log-probs to dL/d logp.

    s_i = beta x_i + alpha w_i,   L = log(1 + gamma sum_{-} e^s / sum_{+} e^s),   dL/ds_i = p_i - 1[i in +] q_i

p over everyone (negatives weighted by gamma), q over the positives. A group with an empty side: loss 0, gradient 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ampo_fast.kernels.launch import launch
from ampo_fast.kernels.row_pass import log1p


@triton.jit
def group_kernel(
    logp_M, ref_logp_M, length_M, reward_M, positive_M, baseline_B, offsets_B, loss_B, grad_M,
    beta, alpha, log_gamma,
    HAS_REF: tl.constexpr, HAS_POSITIVE: tl.constexpr, HAS_BASELINE: tl.constexpr, IS_AVG: tl.constexpr,
    WEIGHT: tl.constexpr, IS_SQUARED: tl.constexpr, SPLIT_MEAN: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """WEIGHT: 0 none, 1 signed, 2 abs. Lengths and log-probs are float32, rewards too or float64; positives int8."""
    group = tl.program_id(0)
    first = tl.load(offsets_B + group)
    size = (tl.load(offsets_B + group + 1) - first).to(tl.int32)
    place = tl.arange(0, BLOCK_G)
    is_in = place < size
    at = first + place
    x = tl.load(logp_M + at, mask=is_in, other=0.0)
    if HAS_REF:
        x -= tl.load(ref_logp_M + at, mask=is_in, other=0.0)
    slope = tl.full((BLOCK_G,), 1.0, tl.float32) * beta
    if IS_AVG:
        slope = beta / tl.load(length_M + at, mask=is_in, other=1.0)
    score = slope * x
    reward = tl.load(reward_M + at, mask=is_in, other=0.0)
    base = tl.sum(reward, 0) / tl.maximum(size, 1).to(tl.float32)
    if HAS_BASELINE:
        base = tl.load(baseline_B + group).to(reward.dtype)
    if WEIGHT > 0:
        weight = (reward - base).to(tl.float32)
        if IS_SQUARED:
            weight = weight * weight
        if WEIGHT == 2:
            weight = tl.abs(weight)
        score += alpha * weight
    if HAS_POSITIVE:
        is_plus = is_in & (tl.load(positive_M + at, mask=is_in, other=0) != 0)
    elif SPLIT_MEAN and HAS_BASELINE:
        is_plus = is_in & (reward > base)
    elif SPLIT_MEAN:
        # In float64, where the sum of float32 rewards is exact: a rounded mean would move a reward that equals it.
        wide = reward.to(tl.float64)
        above = tl.where(is_in, wide - tl.min(tl.where(is_in, wide, float("inf")), 0), 0.0)
        is_plus = is_in & (above * size.to(tl.float64) > tl.sum(above, 0))
    else:
        known = tl.where(is_in, reward, float("-inf"))
        is_top = is_in & (known == tl.max(known, 0))
        is_plus = place == tl.min(tl.where(is_top, place, BLOCK_G), 0)
    is_minus = is_in & (is_plus == 0)
    has_both = (tl.sum(is_plus.to(tl.int32), 0) > 0) & (tl.sum(is_minus.to(tl.int32), 0) > 0)

    plus = tl.where(is_plus, score, float("-inf"))
    minus = tl.where(is_minus, score + log_gamma, float("-inf"))
    # An empty side would make every exponent NaN; 0 stands in, and the group is masked at the end.
    plus_top = tl.where(has_both, tl.max(plus, 0), 0.0)
    minus_top = tl.where(has_both, tl.max(minus, 0), 0.0)
    # gamma = 0 leaves no negative mass: its maximum is -inf, and -inf minus itself must not happen.
    minus_top = tl.maximum(minus_top, -3.0e38)
    plus_lse = plus_top + tl.log(tl.sum(tl.exp(plus - plus_top), 0))
    minus_sum = tl.sum(tl.exp(minus - minus_top), 0)
    d = minus_top + tl.log(tl.maximum(minus_sum, 1.2e-38)) - plus_lse
    d = tl.where(minus_sum > 0.0, d, float("-inf"))
    # softplus(d), from the side that cannot overflow.
    loss = tl.maximum(d, 0.0) + log1p(tl.exp(-tl.abs(d)))
    share_minus = 1.0 / (1.0 + tl.exp(-d))
    q_plus = tl.where(is_plus, tl.exp(plus - plus_lse), 0.0)
    q_minus = tl.where(is_minus, tl.exp(minus - minus_top) / tl.maximum(minus_sum, 1.2e-38), 0.0)
    # dL/ds: a positive gets q (share_plus - 1) = -q share_minus, which keeps its digits where the loss is small.
    grad = (q_minus * share_minus - q_plus * share_minus) * slope
    tl.store(loss_B + group, tl.where(has_both, loss, 0.0))
    tl.store(grad_M + at, tl.where(has_both, grad, 0.0), mask=is_in)


def group_contrastive(
    logp_M: torch.Tensor,
    length_M: torch.Tensor,
    reward_M: torch.Tensor,
    group_offsets: torch.Tensor,
    widest: int,
    ref_logp_M: torch.Tensor | None,
    positive_M: torch.Tensor | None,
    baseline_B: torch.Tensor | None,
    *,
    beta: float,
    alpha: float,
    log_gamma: float,
    is_avg: bool,
    weight: str,
    is_squared: bool,
    split_mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [B], dL/d logp [M]), float32. group_offsets on the device; widest: the largest group, known on the host."""
    num_groups = group_offsets.numel() - 1
    loss_B = logp_M.new_empty(num_groups, dtype=torch.float32)
    grad_M = logp_M.new_zeros(logp_M.shape[0], dtype=torch.float32)
    if num_groups:
        block = triton.next_power_of_2(max(widest, 2))
        launch(
            group_kernel, num_groups,
            logp_M, ref_logp_M, length_M, reward_M, positive_M, baseline_B, group_offsets, loss_B, grad_M,
            beta, alpha, log_gamma,
            HAS_REF=ref_logp_M is not None, HAS_POSITIVE=positive_M is not None, HAS_BASELINE=baseline_B is not None,
            IS_AVG=is_avg, WEIGHT=("none", "signed", "abs").index(weight), IS_SQUARED=is_squared,
            SPLIT_MEAN=split_mean, BLOCK_G=block, num_warps=1 if block <= 128 else 4,
        )  # fmt: skip
    return loss_B, grad_M
