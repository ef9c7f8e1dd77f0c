"""KTO: each response on its own against a reference point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ampo_fast.losses.stats import (
    CheckedStats,
    Groups,
    Loss,
    LossOutput,
    check_positive,
    given_positives,
    mean_output,
    padded_rewards,
)


@dataclass(frozen=True, kw_only=True)
class KTO(Loss):
    """Desirable: w_d (1 - s(beta (rho - kl))); undesirable: w_u (1 - s(beta (kl - rho))); mean over the group (arXiv 2402.01306).

    rho = log pi/pi_ref summed over tokens. Desirable: positive_M where given, else reward above the group's mean. kl is
    the batch's reference point, max(0, mean rho over mismatched pairs) in nats: a batch statistic, so it is an argument.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl: float = 0.0

    uses_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        if self.kl < 0:
            raise ValueError(f"kl = {self.kl}; clamp the estimate at 0, as the paper does")

    @classmethod
    def splits_at_mean(cls, params: Mapping[str, Any]) -> bool:
        return True

    def _output(self, stats: CheckedStats) -> LossOutput:
        groups = Groups(stats.group_offsets, stats.logp_M.device)
        logit_BG = self.beta * (groups.pad(stats.log_ratio_M, 0.0) - self.kl)
        desirable_BG = given_positives(stats, groups)
        if desirable_BG is None:
            desirable_BG = groups.above_mean(padded_rewards(stats, groups))
        # 1 - sigmoid(x) = sigmoid(-x), without losing digits where x is large.
        terms_BG = torch.where(
            desirable_BG,
            self.desirable_weight * torch.sigmoid(-logit_BG),
            self.undesirable_weight * torch.sigmoid(logit_BG),
        )
        return mean_output(groups.mean(terms_BG)[:, 0])
