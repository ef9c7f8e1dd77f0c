"""What a loss sees and what it returns, and the segment operations that all losses share.

Shapes: R rows, M responses, B groups, G the largest group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class ResponseStats:
    """Per-response inputs of a loss; positional in this order."""

    logp_M: torch.Tensor
    """Sum of the response's token log-probs, its EOS included, in nats."""
    length_M: torch.Tensor
    """How many tokens that is (int or float)."""
    reward_M: torch.Tensor
    group_offsets: torch.Tensor
    """[B + 1] int64, CPU."""
    ref_logp_M: torch.Tensor | None = None
    eos_logp_M: torch.Tensor | None = None
    """EOS log-prob at the response's end; NaN where the response does not end in EOS."""
    positive_M: torch.Tensor | None = None
    baseline_B: torch.Tensor | None = None
    response_offsets: torch.Tensor | None = None
    """[M + 1] int64, CPU."""
    logp_R: torch.Tensor | None = None
    eos_logp_R: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossOutput:
    loss: torch.Tensor
    """Mean over the groups, those with an empty side counted."""
    per_group_B: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def segment_sum(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sum of each segment, in a fixed order (an atomic index_add would not be)."""
    return torch.segment_reduce(values, "sum", offsets=offsets.to(values.device))


def group_mask(group_offsets: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[B, G] True where group b has a g-th response; its True entries in row-major order are the responses."""
    sizes_B = group_offsets.diff()
    widest = int(sizes_B.max()) if sizes_B.numel() else 0
    return (torch.arange(widest) < sizes_B[:, None]).to(device)


def padded(values_M: torch.Tensor, mask_BG: torch.Tensor, fill: float | bool) -> torch.Tensor:
    """[M] -> [B, G], `fill` where there is no response. Differentiable, and deterministic on every device."""
    return torch.full(mask_BG.shape, fill, dtype=values_M.dtype, device=values_M.device).masked_scatter(
        mask_BG, values_M
    )


def mean_output(per_group_B: torch.Tensor, **metrics: torch.Tensor) -> LossOutput:
    return LossOutput(per_group_B.sum() / max(per_group_B.numel(), 1), per_group_B, metrics)
