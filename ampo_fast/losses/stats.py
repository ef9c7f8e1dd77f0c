"""What a loss sees and what it returns, and the layout that all losses share: responses padded to [B, G].

Shapes: R rows, M responses, B groups, G the largest group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ampo_fast.dispatch import on_device, resolve_impl


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
    target_R: torch.Tensor | None = None
    """The responses' token ids."""
    ref_logp_R: torch.Tensor | None = None

    @property
    def log_ratio_M(self) -> torch.Tensor:
        """logp minus the reference's, where there is one; else logp (a reference-free loss)."""
        return self.logp_M if self.ref_logp_M is None else self.logp_M - self.ref_logp_M


@dataclass(frozen=True, slots=True)
class LossOutput:
    loss: torch.Tensor
    """Mean over the groups, those without a term (an empty side, no pair) counted."""
    per_group_B: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def check_params(kind: Callable[..., Any], params: Iterable[str]) -> None:
    """Raises ValueError naming what is no field of the loss, and the fields that it has."""
    known = list(inspect.signature(kind).parameters)
    unknown = [name for name in params if name not in known]
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; its fields: {', '.join(known) or 'none'}")


class Loss:
    """What the fused op and the trainer read from a loss before they call it."""

    needs_rows: ClassVar[bool] = False
    """Whether it reads response_offsets, logp_R, eos_logp_R and target_R."""
    needs_eos: ClassVar[bool] = False
    """Whether it reads EOS log-probs (the caller passes eos_id)."""
    uses_reference: ClassVar[bool] = False
    """Whether its published form divides by a reference policy."""
    needs_reference_rows: ClassVar[bool] = False
    """Whether it wants the reference's log-probs token by token (ref_logp_R), not only summed."""


class Groups:
    """Responses side by side in their groups: [M] <-> [B, G]. Built on the host, so nothing waits for the device."""

    def __init__(self, group_offsets: torch.Tensor, device: torch.device) -> None:
        sizes_B = group_offsets.diff()
        self.widest = int(sizes_B.max()) if sizes_B.numel() else 0
        mask_BG = torch.arange(self.widest) < sizes_B[:, None]
        self.position_M = on_device(mask_BG.flatten().nonzero()[:, 0], device)
        self.mask_BG = on_device(mask_BG, device)
        self.size_B = on_device(sizes_B, device)

    def pad(self, values_M: torch.Tensor, fill: float | bool) -> torch.Tensor:
        """[M] -> [B, G], `fill` where there is no response. Differentiable; each place is written once."""
        flat = torch.full((self.mask_BG.numel(),), fill, dtype=values_M.dtype, device=values_M.device)
        return flat.index_copy(0, self.position_M, values_M).view(self.mask_BG.shape)

    def unpad(self, values_BG: torch.Tensor) -> torch.Tensor:
        return values_BG.flatten()[self.position_M]

    def mean(self, values_BG: torch.Tensor) -> torch.Tensor:
        """[B, 1]: the mean over each group's responses; 0 for an empty group."""
        total_B1 = values_BG.masked_fill(~self.mask_BG, 0.0).sum(1, keepdim=True)
        return total_B1 / self.size_B.clamp(min=1)[:, None]

    def first_best(self, reward_BG: torch.Tensor) -> torch.Tensor:
        """[B, G] True at each group's highest reward, ties to the lowest index. NaN is never the best."""
        if reward_BG.numel() == 0:
            return self.mask_BG
        known_BG = reward_BG.masked_fill(~self.mask_BG | reward_BG.isnan(), -torch.inf)
        top_BG = (known_BG == known_BG.amax(1, keepdim=True)) & self.mask_BG
        return top_BG & (top_BG.cumsum(1) == 1)


def segment_sum(values_R: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[M] sum of each segment, in a fixed order (an atomic index_add has none); offsets int64 [M + 1] on the CPU."""
    return _SegmentSum.apply(values_R, offsets)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_R: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.offsets = offsets
        device_offsets = on_device(offsets, values_R.device)
        if resolve_impl("segment_sum", "auto", values_R) == "triton":
            from ampo_fast.kernels.segment_sum import segment_sum as triton_sum

            return triton_sum(values_R.contiguous(), device_offsets)
        return torch.segment_reduce(values_R, "sum", offsets=device_offsets)

    @staticmethod
    def backward(ctx, grad_M: torch.Tensor):
        length_M = ctx.offsets.diff()
        spread = on_device(torch.repeat_interleave(length_M), grad_M.device)
        return grad_M[spread], None


def mean_output(per_group_B: torch.Tensor, **metrics: torch.Tensor) -> LossOutput:
    return LossOutput(per_group_B.sum() / max(per_group_B.numel(), 1), per_group_B, metrics)


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} = {value}; it must be positive")
