"""Pairwise losses that have no reference by definition; ref_logp_M is not read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from ampo_fast.losses.pairs import GroupView, PairwiseLoss, gap


@dataclass(frozen=True, kw_only=True)
class SimPO(PairwiseLoss):
    """-log sigmoid(beta (lbar_w - lbar_l) - gamma), lbar the mean log-prob per token (arXiv 2405.14734).

    gamma is the margin itself; TRL and the paper's scripts state it as a ratio, gamma / beta.
    """

    beta: float = 2.0
    gamma: float = 1.0

    uses_reference: ClassVar[bool] = False

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        return -logsigmoid(self.beta * gap(view.mean_logp_BG) - self.gamma)


@dataclass(frozen=True, kw_only=True)
class CPO(PairwiseLoss):
    """-log sigmoid(beta (log pi(y_w) - log pi(y_l))) - nll_weight log pi(y_w) / |y_w| (arXiv 2401.08417).

    The NLL term is the mean over the winner's own tokens, so that it adds over groups; TRL's is over the batch's.
    """

    nll_weight: float = 0.0

    uses_reference: ClassVar[bool] = False

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        nll_BG1 = -view.mean_logp_BG[:, :, None]
        return -logsigmoid(self.beta * gap(view.logp_BG)) + self.nll_weight * nll_BG1


@dataclass(frozen=True, kw_only=True)
class ORPO(PairwiseLoss):
    """-log pi(y_w)/|y_w| - beta log sigmoid(log odds_w - log odds_l), odds = p / (1 - p), p = exp(lbar) (arXiv 2403.07691).

    beta is the paper's lambda. A mean log-prob of 0 (infinite odds) counts as the nearest one below it.
    """

    uses_reference: ClassVar[bool] = False

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        mean_BG = view.mean_logp_BG
        below_BG = mean_BG.clamp(max=-torch.finfo(mean_BG.dtype).eps)
        log_odds_BG = below_BG - torch.log(-torch.expm1(below_BG))
        return -mean_BG[:, :, None] - self.beta * logsigmoid(gap(log_odds_BG))
