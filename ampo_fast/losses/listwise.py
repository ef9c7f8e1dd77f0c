"""Losses over a whole group's order or distribution. m = beta log pi/pi_ref, summed over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid, softplus

from ampo_fast.losses.pairs import gap, mean_over_pairs
from ampo_fast.losses.stats import (
    CheckedStats,
    Groups,
    Loss,
    LossOutput,
    ResponseStats,
    check_positive,
    mean_output,
    padded_rewards,
)
from ampo_fast.validation import checks_values


@dataclass(frozen=True, kw_only=True)
class _Listwise(Loss):
    beta: float = 0.1

    uses_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def _output(self, stats: CheckedStats) -> LossOutput:
        groups = Groups(stats.group_offsets, stats.logp_M.device)
        score_M = self.beta * self._ratios(stats)
        return mean_output(self.group_terms(groups.pad(score_M, 0.0), padded_rewards(stats, groups), groups))

    def _ratios(self, stats: ResponseStats) -> torch.Tensor:
        return stats.log_ratio_M

    def group_terms(self, score_BG: torch.Tensor, reward_BG: torch.Tensor, groups: Groups) -> torch.Tensor:
        """[B]; 0 for an empty group. The rewards are in their own precision."""
        raise NotImplementedError


def _targets(logit_BG: torch.Tensor, mask_BG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """softmax over each group's responses; 0 in the padding, also of an empty group."""
    kept_BG = logit_BG.masked_fill(~mask_BG, torch.finfo(logit_BG.dtype).min)
    return kept_BG.softmax(1).masked_fill(~mask_BG, 0.0).to(dtype)


def _cross_entropy(target_BG: torch.Tensor, score_BG: torch.Tensor, mask_BG: torch.Tensor) -> torch.Tensor:
    kept_BG = score_BG.masked_fill(~mask_BG, torch.finfo(score_BG.dtype).min)
    return -(target_BG * kept_BG.log_softmax(1).masked_fill(~mask_BG, 0.0)).sum(1)


@dataclass(frozen=True, kw_only=True)
class InfoNCA(_Listwise):
    """-sum_i t_i log softmax(m)_i, t = softmax(r / temperature) (arXiv 2402.05369)."""

    beta: float = 0.01
    temperature: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)

    def group_terms(self, score_BG, reward_BG, groups):
        target_BG = _targets(reward_BG / self.temperature, groups.mask_BG, score_BG.dtype)
        return _cross_entropy(target_BG, score_BG, groups.mask_BG)


@dataclass(frozen=True, kw_only=True)
class NCA(InfoNCA):
    """-sum_i t_i log sigmoid(m_i) - (1/K) sum_i log sigmoid(-m_i), t = softmax(r / temperature) (arXiv 2402.05369)."""

    def group_terms(self, score_BG, reward_BG, groups):
        target_BG = _targets(reward_BG / self.temperature, groups.mask_BG, score_BG.dtype)
        pull_B = (target_BG * logsigmoid(score_BG)).sum(1)
        return -pull_B - groups.mean(logsigmoid(-score_BG))[:, 0]


@dataclass(frozen=True, kw_only=True)
class REFAInfoNCA(_Listwise):
    """-sum_i t_i log softmax(s)_i, t = softmax(alpha r), s = beta log pi(y)/|y|; no reference (arXiv 2412.16378v4, eqs. 12-17).

    Eq. 16 prints raw probabilities; the mean log-prob is what the paper's other losses, and its betas of 2.5 to 10, use.
    """

    beta: float = 10.0
    alpha: float = 1.0

    uses_reference: ClassVar[bool] = False

    def _ratios(self, stats: ResponseStats) -> torch.Tensor:
        return stats.logp_M / stats.length_M

    def group_terms(self, score_BG, reward_BG, groups):
        target_BG = _targets(self.alpha * reward_BG, groups.mask_BG, score_BG.dtype)
        return _cross_entropy(target_BG, score_BG, groups.mask_BG)


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(_Listwise):
    """sum_k [logsumexp_{j >= k} m_j - m_k], responses from highest to lowest reward, ties: lower index first."""

    def group_terms(self, score_BG, reward_BG, groups):
        return plackett_luce(score_BG, reward_BG, groups.mask_BG)


def plackett_luce(score_BG: torch.Tensor, reward_BG: torch.Tensor, mask_BG: torch.Tensor) -> torch.Tensor:
    """[B]: negative log-likelihood of the reward order under scores. Padding adds nothing wherever it is sorted."""
    order_BG = reward_BG.argsort(dim=1, descending=True, stable=True)
    sorted_BG, is_in_BG = score_BG.gather(1, order_BG), mask_BG.gather(1, order_BG)
    index_G = torch.arange(score_BG.shape[1], device=score_BG.device)
    is_later_BGG = (index_G > index_G[:, None]) & is_in_BG[:, None, :]
    # softplus of the later ones' differences, not logcumsumexp, whose backward loses digits with the scores' size.
    lowest = torch.finfo(score_BG.dtype).min
    rest_BG = (-gap(sorted_BG)).masked_fill(~is_later_BGG, lowest).logsumexp(2)
    return torch.where(is_in_BG, softplus(rest_BG, threshold=80.0), 0.0).sum(1)


@dataclass(frozen=True, kw_only=True)
class LambdaPO(_Listwise):
    """sum_{r_i > r_j} |G_i - G_j| |1/log2(1+tau_i) - 1/log2(1+tau_j)| log(1 + e^{-(m_i - m_j)}), G = 2^r - 1 (arXiv 2402.01878).

    tau is the policy's own rank (1 = highest m, ties: lower index first; no gradient). normalized (default, as public
    code does): gains divided by the group's best DCG, and the mean over pairs; False: raw gains and the sum, as printed.

    Gains are LambdaRank's, for rewards of 0 and more: below it the best DCG can come close to 0, and the loss be of any size.
    Raises ValueError on a CPU where 2^r overflows.
    """

    normalized: bool = True

    default_normalize: ClassVar[str] = "minmax"

    def group_terms(self, score_BG, reward_BG, groups):
        mask_BG = groups.mask_BG
        gain_BG = (torch.exp2(reward_BG) - 1.0).masked_fill(~mask_BG, 0.0)
        if checks_values(gain_BG) and bool(gain_BG.to(score_BG.dtype).isinf().any()):
            raise ValueError(
                f"reward_M reaches {reward_BG.max():g}: its gain 2^r overflows; divide the rewards "
                '(in a run: reward.normalize = "minmax")'
            )
        if self.normalized:
            gain_BG = gain_BG / _best_dcg(gain_BG, reward_BG, mask_BG)
        discount_BG = 1.0 / torch.log2(1.0 + _ranks(score_BG.detach(), mask_BG))
        weight_BGG = gap(gain_BG).abs().to(score_BG.dtype) * gap(discount_BG).abs()
        preferred_BGG = (gap(reward_BG) > 0) & mask_BG[:, :, None] & mask_BG[:, None, :]
        terms_BGG = weight_BGG * softplus(-gap(score_BG))
        if self.normalized:
            return mean_over_pairs(terms_BGG, preferred_BGG)
        return torch.where(preferred_BGG, terms_BGG, 0.0).sum((1, 2))


def _ranks(score_BG: torch.Tensor, mask_BG: torch.Tensor) -> torch.Tensor:
    """1 for the highest score of each group; padding comes last."""
    order_BG = score_BG.masked_fill(~mask_BG, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_G = torch.arange(1, score_BG.shape[1] + 1, dtype=score_BG.dtype, device=score_BG.device)
    return torch.zeros_like(score_BG).scatter(1, order_BG, rank_G.expand_as(score_BG))


def _best_dcg(gain_BG: torch.Tensor, reward_BG: torch.Tensor, mask_BG: torch.Tensor) -> torch.Tensor:
    """[B, 1] sum_i G_i / log2(1 + rank of r_i); 1 where it would divide by zero (no gain anywhere)."""
    dcg_B1 = (gain_BG / torch.log2(1.0 + _ranks(reward_BG, mask_BG))).sum(1, keepdim=True)
    return torch.where(dcg_B1.abs() > 0, dcg_B1, 1.0)
