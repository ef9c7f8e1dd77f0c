"""Pairwise losses with a reference, on groups of two or on the pairs of a group.

z = (log pi/pi_ref)(y_w) - (log pi/pi_ref)(y_l), summed over tokens; without ref_logp_M they are reference-free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from ampo_fast.losses.pairs import GroupView, PairwiseLoss, gap, soft_label_loss


@dataclass(frozen=True, kw_only=True)
class DPO(PairwiseLoss):
    """-log sigmoid(beta z) (arXiv 2305.18290)."""

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        return -logsigmoid(self.beta * gap(view.log_ratio_BG))


@dataclass(frozen=True, kw_only=True)
class _Smoothed(PairwiseLoss):
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing = {self.label_smoothing}; it must be in [0, 0.5)")


@dataclass(frozen=True, kw_only=True)
class CDPO(_Smoothed):
    """-(1 - e) log sigmoid(beta z) - e log sigmoid(-beta z), e = label_smoothing (Mitchell 2023, conservative DPO)."""

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        return soft_label_loss(self.beta * gap(view.log_ratio_BG), 1.0 - self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class RobustDPO(_Smoothed):
    """[-(1 - e) log sigmoid(beta z) + e log sigmoid(-beta z)] / (1 - 2e), unbiased under flips (arXiv 2403.00409)."""

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        logit, flip = self.beta * gap(view.log_ratio_BG), self.label_smoothing
        return (-(1.0 - flip) * logsigmoid(logit) + flip * logsigmoid(-logit)) / (1.0 - 2.0 * flip)


@dataclass(frozen=True, kw_only=True)
class Hinge(PairwiseLoss):
    """max(0, 1 - beta z) (SLiC, arXiv 2305.10425, on the log-ratio)."""

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        return torch.relu(1.0 - self.beta * gap(view.log_ratio_BG))


@dataclass(frozen=True, kw_only=True)
class IPO(PairwiseLoss):
    """(z - 1/(2 beta))^2 (arXiv 2310.12036).

    per_token divides each response's log-ratio by its length first, as TRL does; the default sums, as the paper does.
    """

    per_token: bool = False

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        ratio_BG = view.log_ratio_BG / view.length_BG if self.per_token else view.log_ratio_BG
        return (gap(ratio_BG) - 1.0 / (2.0 * self.beta)).square()


@dataclass(frozen=True, kw_only=True)
class NCAPair(PairwiseLoss):
    """-log s(m_w) - 1/2 log s(-m_w) - 1/2 log s(-m_l), m = beta log pi/pi_ref, s = sigmoid (arXiv 2402.05369)."""

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        m_BG = self.beta * view.log_ratio_BG
        push_BG = logsigmoid(-m_BG)
        chosen_BG = -logsigmoid(m_BG) - 0.5 * push_BG
        return chosen_BG[:, :, None] - 0.5 * push_BG[:, None, :]


@dataclass(frozen=True, kw_only=True)
class RDPO(PairwiseLoss):
    """-log sigmoid(beta z + alpha (|y_w| - |y_l|)): a longer winner is asked for less (arXiv 2403.19159)."""

    alpha: float = 0.01

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        return -logsigmoid(self.beta * gap(view.log_ratio_BG) + self.alpha * gap(view.length_BG))
