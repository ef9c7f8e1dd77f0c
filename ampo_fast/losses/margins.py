"""Pairwise losses that read how much better, not only which: reward margins as targets, slopes or bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from ampo_fast.losses.pairs import GroupView, PairwiseLoss, gap, soft_label_loss
from ampo_fast.losses.stats import ResponseStats, check_positive, segment_sum


@dataclass(frozen=True, kw_only=True)
class MMPO(PairwiseLoss):
    """-p log sigmoid(beta z) - (1 - p) log sigmoid(-beta z), p = sigmoid(gamma (r_w - r_l)) (arXiv 2410.03145).

    The gradient vanishes where beta z = gamma (r_w - r_l). Equal rewards: a target of 1/2.
    """

    beta: float = 0.01
    gamma: float = 2.2

    soft_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("gamma", self.gamma)

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        target_BGG = torch.sigmoid(self.gamma * gap(view.reward_BG))
        return soft_label_loss(self.beta * gap(view.log_ratio_BG), target_BGG)


@dataclass(frozen=True, kw_only=True)
class MMDPO(PairwiseLoss):
    """DPO with beta(d) = beta (1 + w (1 - e^{-k d})), d = r_w - r_l >= 0: in [beta, (1 + w) beta] (arXiv 2502.10391, sec. 4).

    The paper's text; its released trainer puts a batch statistic in the place of d, which no per-group loss can have.
    """

    w: float = 0.5
    k: float = 0.5

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        margin_BGG = gap(view.reward_BG).clamp(min=0.0)
        beta_BGG = self.beta * (1.0 - self.w * torch.expm1(-self.k * margin_BGG))
        return -logsigmoid(beta_BGG * gap(view.log_ratio_BG))


def calibrated_reward(reward_BG: torch.Tensor, mask_BG: torch.Tensor) -> torch.Tensor:
    """R_ca(i) = 1/(N-1) sum_{j != i} sigmoid(R_i - R_j): the expected win rate against the others (arXiv 2502.02588)."""
    wins_BGG = torch.sigmoid(gap(reward_BG)).masked_fill(~mask_BG[:, None, :], 0.0)
    others_B = (mask_BG.sum(1) - 1).clamp(min=1)
    return (wins_BGG.sum(2) - 0.5) / others_B[:, None]


@dataclass(frozen=True, kw_only=True)
class CaPO(PairwiseLoss):
    """(R_ca(y_w) - R_ca(y_l) - beta z)^2, R_ca the win rate against the group's other responses (arXiv 2502.02588).

    Equal rewards: a target of 0. The paper's diffusion time weight has no counterpart here.
    """

    soft_labels: ClassVar[bool] = True

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        target_BGG = gap(calibrated_reward(view.reward_BG, view.groups.mask_BG))
        return (target_BGG - self.beta * gap(view.log_ratio_BG)).square()


def prior_bound(similarity: torch.Tensor, beta1: float, beta2: float, beta3: float) -> torch.Tensor:
    """PCRM's largest credible margin d* = beta1 / (similarity + beta2) + beta3 (arXiv 2404.00978); no gradient."""
    return (beta1 / (similarity + beta2) + beta3).detach()


def length_similarity(length_BG: torch.Tensor) -> torch.Tensor:
    """[B, G, G] shorter length / longer length: PCRM's similarity where no better one is given."""
    first, second = length_BG[:, :, None], length_BG[:, None, :]
    return torch.minimum(first, second) / torch.maximum(first, second)


@dataclass(frozen=True, kw_only=True)
class DPOPCRM(PairwiseLoss):
    """-log s(beta z) - log s(d* - beta z): DPO with PCRM's bound d* = beta1 / (sim + beta2) + beta3 (arXiv 2404.00978).

    sim is the shorter response's length over the longer one's; the released code measures the parts that diverge, which
    no per-response statistic shows.
    """

    beta1: float = 6.0
    beta2: float = 1e-3
    beta3: float = 0.0

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        logit_BGG = self.beta * gap(view.log_ratio_BG)
        bound_BGG = prior_bound(length_similarity(view.length_BG), self.beta1, self.beta2, self.beta3)
        return -logsigmoid(logit_BGG) - logsigmoid(bound_BGG - logit_BGG)


@dataclass(frozen=True, kw_only=True)
class BMC(PairwiseLoss):
    """DPO on x = sum_t (1 + min(1/pi(y_t), delta)) log pi(y_t) - ref_logp, the weights detached (arXiv 2408.07471).

    ref_logp_M is subtracted as given: like the released code, weight the reference's tokens by the reference's own
    probabilities before summing. Every token counts as changed between the two responses: which ones a diff would name is
    not in ResponseStats.
    """

    beta: float = 0.05
    delta: float = 2.0

    needs_rows: ClassVar[bool] = True

    def log_ratios(self, stats: ResponseStats) -> torch.Tensor:
        if stats.logp_R is None or stats.response_offsets is None:
            raise ValueError("BMC weights tokens: it needs logp_R and response_offsets (the fused op gives both)")
        weight_R = 1.0 + torch.exp(-stats.logp_R.detach()).clamp(max=self.delta)
        x_M = segment_sum(weight_R * stats.logp_R, stats.response_offsets)
        return x_M if stats.ref_logp_M is None else x_M - stats.ref_logp_M

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        return -logsigmoid(self.beta * gap(view.log_ratio_BG))
