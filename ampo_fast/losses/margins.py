"""Pairwise losses that read how much better, not only which: reward margins as targets, slopes or bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import logsigmoid

from ampo_fast.losses.pairs import GroupView, PairwiseLoss, gap, soft_label_loss
from ampo_fast.losses.stats import check_positive, segment_sum
from ampo_fast.losses.token_diff import changed_against, divergent_similarity, token_ids


@dataclass(frozen=True, kw_only=True)
class MMPO(PairwiseLoss):
    """-p log sigmoid(beta z) - (1 - p) log sigmoid(-beta z), p = sigmoid(gamma (r_w - r_l)) (arXiv 2410.03145).

    The gradient vanishes where beta z = gamma (r_w - r_l). Equal rewards: a target of 1/2.
    """

    beta: float = 0.01
    gamma: float = 2.2

    soft_labels: ClassVar[bool] = True
    fits_gamma: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("gamma", self.gamma)

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        target_BGG = view.in_work_precision(torch.sigmoid(self.gamma * gap(view.reward_BG)))
        return soft_label_loss(self.beta * gap(view.log_ratio_BG), target_BGG)


@dataclass(frozen=True, kw_only=True)
class MMDPO(PairwiseLoss):
    """DPO with beta(d) = beta (1 + w (1 - e^{-k d})), d = r_w - r_l >= 0: in [beta, (1 + w) beta] (arXiv 2502.10391, sec. 4).

    The paper's text; its released trainer puts a batch statistic in the place of d, which no per-group loss can have.
    """

    w: float = 0.5
    k: float = 0.5

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        margin_BGG = view.in_work_precision(gap(view.reward_BG)).clamp(min=0.0)
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

    calibrated: the rewards are win rates already, say against candidates that are not trained on, averaged over several
    rewards. Equal rewards: a target of 0. The paper's diffusion time weight has no counterpart here.
    """

    calibrated: bool = False

    soft_labels: ClassVar[bool] = True
    default_normalize: ClassVar[str] = "win_rate"

    @classmethod
    def implied_params(cls, normalize: str) -> dict[str, Any]:
        # These win rates are against all candidates, which the loss never sees.
        return {"calibrated": True} if normalize == "win_rate" else {}

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        given_BG = view.reward_BG if self.calibrated else calibrated_reward(view.reward_BG, view.groups.mask_BG)
        target_BGG = view.in_work_precision(gap(given_BG))
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

    sim is shorter over longer of the parts that follow the common beginning, in tokens (token_diff.divergent_similarity);
    without target_R, of the whole responses. The released DPO code takes the cosine of two sentence embeddings.
    """

    beta1: float = 6.0
    beta2: float = 1e-3
    beta3: float = 0.0

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        logit_BGG = self.beta * gap(view.log_ratio_BG)
        bound_BGG = prior_bound(self._similarity(view), self.beta1, self.beta2, self.beta3)
        return -logsigmoid(logit_BGG) - logsigmoid(bound_BGG - logit_BGG)

    def _similarity(self, view: GroupView) -> torch.Tensor:
        if view.stats.target_R is None:
            return length_similarity(view.length_BG)
        return divergent_similarity(token_ids(view.stats)).to(view.length_BG)


@dataclass(frozen=True, kw_only=True)
class BMC(PairwiseLoss):
    """-log s(beta (x_w - x_l)), x = sum_t lambda_t log pi(y_t)/pi_ref(y_t) (arXiv 2408.07471, DPO-BMC).

    lambda_t = 1 + min(1/pi(y_t), delta), detached, on the tokens that differ between the two responses, else 1. The tokens
    are those of target_R; without it every one counts as changed. The reference's tokens are weighted alike where
    ref_logp_R is given; else ref_logp_M is subtracted as it is. The released code also leaves English stop words at 1, and
    weights the reference's tokens by the reference's own probabilities.
    """

    beta: float = 0.05
    delta: float = 2.0

    needs_rows: ClassVar[bool] = True
    needs_reference_rows: ClassVar[bool] = True

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        stats = view.stats
        if stats.logp_R is None or stats.response_offsets is None:
            raise ValueError("BMC weights tokens: it needs logp_R and response_offsets (the fused op gives both)")
        if not view.mask_BGG.numel():
            return view.mask_BGG.to(stats.logp_R)
        extra_R = torch.exp(-stats.logp_R.detach()).clamp(max=self.delta)
        weight_RG = 1.0 + extra_R[:, None] * changed_against(stats, view.mask_BGG)
        x_BGG = torch.stack([self._weighted_ratios(view, weight_R) for weight_R in weight_RG.unbind(1)], dim=2)
        return -logsigmoid(self.beta * (x_BGG - x_BGG.transpose(1, 2)))

    def _weighted_ratios(self, view: GroupView, weight_R: torch.Tensor) -> torch.Tensor:
        """[B, G]: x of every response by these weights."""
        stats = view.stats
        by_token = stats.ref_logp_R is not None
        ratio_R = stats.logp_R - stats.ref_logp_R if by_token else stats.logp_R
        x_M = segment_sum(weight_R * ratio_R, stats.response_offsets)
        is_subtracted = by_token or stats.ref_logp_M is None
        return view.groups.pad(x_M if is_subtracted else x_M - stats.ref_logp_M, 0.0)
