"""From logits to tokens: temperature, top-k, top-p and one uniform number a token.

Shapes: A rows decoded together (active candidates), V vocab, K blocks of B tokens.
"""

from __future__ import annotations

import torch

from ampo_fast.dispatch import on_device
from ampo_fast.types import Sampling


def sample_tokens(
    logits_AV: torch.Tensor, uniform_A: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF sampling: token = first v with CDF(v) > u. Returns (token [A], its log-prob [A]), both after temperature,
    top-k and top-p (what vLLM calls processed log-probs). Of NaN logits the log-prob is NaN, the token any."""
    logp_AV = torch.log_softmax(_truncate(logits_AV.float() / sampling.temperature, sampling), dim=-1)
    token_A1 = _inverse_cdf(logp_AV.exp(), on_device(uniform_A, logp_AV.device))[:, None]
    return token_A1[:, 0], logp_AV.gather(1, token_A1)[:, 0]


def _inverse_cdf(p_AV: torch.Tensor, uniform_A: torch.Tensor, block: int = 256) -> torch.Tensor:
    """First v with CDF(v) > u times the total mass; never a token of zero mass. p_AV [A, V] float32, uniform_A float64.

    float64, because 50,000 float32 additions would misplace the far end of the CDF by more than many a token's mass;
    in two levels, because a float64 cumsum over the whole vocabulary took an eighth of a decoding step on a CPU.
    """
    num_tokens = p_AV.shape[1]
    p_AKB = torch.nn.functional.pad(p_AV, (0, -num_tokens % block)).unflatten(1, (-1, block))
    ends_AK = p_AKB.sum(-1, dtype=torch.float64).cumsum(-1)
    target_A1 = uniform_A[:, None] * ends_AK[:, -1:]
    block_A1 = torch.searchsorted(ends_AK, target_A1, right=True).clamp_(max=ends_AK.shape[1] - 1)
    start_A1 = torch.where(block_A1 > 0, ends_AK.gather(1, (block_A1 - 1).clamp(min=0)), 0.0)
    inside_AB = p_AKB.gather(1, block_A1[..., None].expand(-1, 1, block))[:, 0].cumsum(-1, dtype=torch.float64)
    # Rounding can put the target at or past the block's own end: then its last token of positive mass is the answer.
    target_A1 = torch.minimum(target_A1 - start_A1, torch.nextafter(inside_AB[:, -1:], inside_AB.new_zeros(())))
    offset_A1 = torch.searchsorted(inside_AB, target_A1, right=True)
    return (block_A1 * block + offset_A1)[:, 0].clamp_(max=num_tokens - 1)  # where all is NaN it lies beyond


def _truncate(logits_AV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    if sampling.top_k:
        kth_A1 = logits_AV.topk(min(sampling.top_k, logits_AV.shape[-1])).values[:, -1:]
        logits_AV = logits_AV.masked_fill(logits_AV < kth_A1, -torch.inf)
    if sampling.top_p < 1.0:
        sorted_AV, order_AV = logits_AV.sort(descending=True)
        before_AV = sorted_AV.softmax(-1).cumsum(-1) - sorted_AV.softmax(-1)
        cut_AV = torch.zeros_like(logits_AV, dtype=torch.bool).scatter_(1, order_AV, before_AV >= sampling.top_p)
        logits_AV = logits_AV.masked_fill(cut_AV, -torch.inf)
    return logits_AV
