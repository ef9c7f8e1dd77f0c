"""Regularisers and weighted sums of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ampo_fast.losses.stats import (
    CheckedStats,
    Groups,
    Loss,
    LossOutput,
    ResponseStats,
    given_positives,
    mean_output,
    padded_rewards,
)


@dataclass(frozen=True, kw_only=True)
class NLL(Loss):
    """-log pi(y+) / |y+|, averaged over the group's positives; 0 for a group without one.

    The positives are positive_M where given, else the response of the highest reward (ties: lowest index).
    """

    def _output(self, stats: CheckedStats) -> LossOutput:
        groups = Groups(stats.group_offsets, stats.logp_M.device)
        positive_BG = given_positives(stats, groups)
        if positive_BG is None:
            positive_BG = groups.first_best(padded_rewards(stats, groups))
        nll_BG = groups.pad(-stats.logp_M / stats.length_M, 0.0)
        kept_BG = torch.where(positive_BG, nll_BG, 0.0)
        return mean_output(kept_BG.sum(1) / positive_BG.sum(1).clamp(min=1))


@dataclass(frozen=True)
class Sum(Loss):
    """sum_i weight_i loss_i(stats): Sum([(1.0, AMPO()), (0.1, NLL())])."""

    terms: Sequence[tuple[float, Callable[[ResponseStats], LossOutput]]]

    @property
    def needs_rows(self) -> bool:
        return any(loss.needs_rows for _, loss in self.terms)

    @property
    def needs_eos(self) -> bool:
        return any(loss.needs_eos for _, loss in self.terms)

    @property
    def uses_reference(self) -> bool:
        return any(loss.uses_reference for _, loss in self.terms)

    @property
    def needs_reference_rows(self) -> bool:
        return any(loss.needs_reference_rows for _, loss in self.terms)

    def _output(self, stats: CheckedStats) -> LossOutput:
        parts = [(weight, loss(stats)) for weight, loss in self.terms]
        per_group_B = sum(weight * part.per_group_B for weight, part in parts)
        return mean_output(per_group_B)
