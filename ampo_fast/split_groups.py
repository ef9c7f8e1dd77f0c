"""The exact gradient of a group that is longer than a micro-batch: log-probs of its parts first, then one coefficient a row.

Phase 1 forwards the parts without gradient; the whole group's log-probs give its loss and d loss / d log-prob of every row.
Phase 2 forwards each part again with the linear loss sum_r c_r log p_r, whose gradient is the group's own, part by part.

Shapes: R rows of the group, M its responses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ampo_fast.fused import row_gradients, with_logprobs
from ampo_fast.losses.stats import CheckedStats, Loss, LossOutput, ResponseStats
from ampo_fast.packing import MicroBatch, pack
from ampo_fast.types import PackedBatch


@dataclass(frozen=True)
class GivenGradient(Loss):
    """sum_r grad_r log p_r (+ the same of the EOS log-probs): the loss whose gradient is known already."""

    needs_rows = True

    grad_R: torch.Tensor
    grad_eos_R: torch.Tensor | None = None

    def __call__(self, stats: ResponseStats) -> LossOutput:
        loss = (self.grad_R * stats.logp_R).sum()
        if self.grad_eos_R is not None:
            loss = loss + (self.grad_eos_R * stats.eos_logp_R).sum()
        return LossOutput(loss, loss[None])


@dataclass(frozen=True)
class PartLogp:
    """What phase 1 knows of one part."""

    logp_R: torch.Tensor
    eos_logp_R: torch.Tensor | None
    ref_logp_M: torch.Tensor | None
    ref_logp_R: torch.Tensor | None


@dataclass(frozen=True)
class SplitGroup:
    """A group whose loss is known, with the linear loss of each of its parts."""

    loss: torch.Tensor
    """Not divided by the count of groups."""
    batch: PackedBatch
    stats: ResponseStats
    part_losses: list[GivenGradient]

    @classmethod
    def build(
        cls, micro: MicroBatch, parts: Sequence[PartLogp], loss_fn: Loss, eos_id: int | None, normalizer: float
    ) -> SplitGroup:
        """micro: any part of the group; parts: all of them, in order; normalizer: the global count of trained groups."""
        logp_R = torch.cat([part.logp_R for part in parts])
        eos_logp_R = None if eos_id is None else torch.cat([part.eos_logp_R for part in parts])
        batch = pack(micro.groups, logp_R.device)
        reference = {name: _joined(parts, name) for name in ("ref_logp_M", "ref_logp_R")}
        batch = dataclasses.replace(batch, **reference)
        side = CheckedStats(
            logp_M=logp_R.new_empty(0),
            length_M=batch.response_offsets.diff().to(logp_R.device),
            reward_M=batch.reward_M,
            group_offsets=batch.group_offsets,
            **reference,
            positive_M=batch.positive_M,
            baseline_B=batch.baseline_B,
            response_offsets=batch.response_offsets,
            target_R=batch.target_R,
        )
        given = (logp_R, eos_logp_R, batch.target_R, eos_id)
        loss, grad_R, grad_eos_R = row_gradients(loss_fn, side, *given, normalizer)
        sizes = [part.logp_R.numel() for part in parts]
        eos_parts = [None] * len(sizes) if grad_eos_R is None else grad_eos_R.split(sizes)
        part_losses = [GivenGradient(*pair) for pair in zip(grad_R.split(sizes), eos_parts, strict=True)]
        return cls(loss, batch, with_logprobs(side, *given), part_losses)


def _joined(parts: Sequence[PartLogp], name: str) -> torch.Tensor | None:
    values = [getattr(part, name) for part in parts]
    return None if values[0] is None else torch.cat(values)
