"""Losses of reward models, on one score per response.

Shapes: M responses, B groups, G the largest group. A pair is (w, l) with reward r_w > r_l and scores s_w, s_l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from ampo_fast.losses import listwise
from ampo_fast.losses.margins import length_similarity, prior_bound
from ampo_fast.losses.pairs import gap, mean_over_pairs, preferred_pairs, soft_label_loss
from ampo_fast.losses.stats import Groups, LossOutput, check_lengths, check_positive, mean_output
from ampo_fast.validation import (
    check_choice,
    check_finite,
    check_offsets,
    check_tensor,
    check_vector,
    checks_values,
    describe,
)


@dataclass(frozen=True, slots=True)
class ScoredView:
    """Scores and rewards side by side in their groups."""

    groups: Groups
    score_BG: torch.Tensor
    reward_BG: torch.Tensor
    length_BG: torch.Tensor | None
    similarity_BGG: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class RewardLoss:
    """Base: loss(score_M, reward_M, group_offsets, *, length_M=None, similarity=None) -> LossOutput.

    similarity: [B, G, G] in [0, 1], or one per group [B] for groups of two; PCRM alone reads it (and length_M without).
    Raises ValueError for shapes or offsets that do not fit and, on a CPU, NaN or infinite scores or rewards.
    """

    soft_labels: ClassVar[bool] = False
    """Whether pairs of equal reward carry a label too (1/2) and are kept."""
    reads_margins: ClassVar[bool] = False
    """Whether it reads how large a pair's reward margin is, not only its sign."""
    needs_similarity: ClassVar[bool] = False
    """Whether the trainer should give it `similarity`."""

    def __call__(
        self,
        score_M: torch.Tensor,
        reward_M: torch.Tensor,
        group_offsets: torch.Tensor,
        *,
        length_M: torch.Tensor | None = None,
        similarity: torch.Tensor | None = None,
    ) -> LossOutput:
        if not isinstance(score_M, torch.Tensor) or not score_M.is_floating_point() or score_M.ndim != 1:
            raise ValueError(f"score_M must be a 1-D tensor of floats, one score per response, got {describe(score_M)}")
        offsets = check_offsets("group_offsets", group_offsets, score_M.shape[0])
        for name, vector in (("score_M", score_M), ("reward_M", reward_M)):
            check_vector(name, vector, int(offsets[-1]), score_M.device)
            check_finite(name, vector)
        if length_M is not None:
            check_lengths(length_M, int(offsets[-1]), score_M.device)
        groups = Groups(offsets, score_M.device)
        work = torch.promote_types(score_M.dtype, torch.float32)
        view = ScoredView(
            groups=groups,
            score_BG=groups.pad(score_M.to(work), 0.0),
            reward_BG=groups.pad(reward_M.to(work), 0.0),
            length_BG=None if length_M is None else groups.pad(length_M.to(work), 1.0),
            similarity_BGG=_similarity(similarity, groups, work),
        )
        return self._output(view)

    def _output(self, view: ScoredView) -> LossOutput:
        raise NotImplementedError


def _similarity(similarity: torch.Tensor | None, groups: Groups, work: torch.dtype) -> torch.Tensor | None:
    if similarity is None:
        return None
    num_groups, widest = groups.mask_BG.shape
    check_tensor("similarity", similarity)
    if similarity.shape == (num_groups,):
        similarity = similarity[:, None, None].expand(num_groups, widest, widest)
    if similarity.shape != (num_groups, widest, widest):
        raise ValueError(
            f"similarity must be [{num_groups}] or [{num_groups}, {widest}, {widest}], got {tuple(similarity.shape)}"
        )
    check_finite("similarity", similarity)
    if checks_values(similarity) and bool(((similarity < 0) | (similarity > 1)).any()):
        raise ValueError(f"similarity must be in [0, 1], got {similarity.min():g} .. {similarity.max():g}")
    return similarity.to(work)


@dataclass(frozen=True, kw_only=True)
class _PairReward(RewardLoss):
    """Mean over a group's pairs; 0 for a group without one."""

    pairs: str = "all"

    def __post_init__(self) -> None:
        check_choice("pairs", self.pairs, ("all", "best_vs_rest"))

    def _output(self, view: ScoredView) -> LossOutput:
        mask_BGG, equal_BGG = preferred_pairs(view.groups, view.reward_BG, self.pairs, None, self.soft_labels)
        per_group_B = mean_over_pairs(self.pair_terms(view), mask_BGG)
        judged_BGG = mask_BGG & ~equal_BGG
        is_right_BGG = judged_BGG & (gap(view.score_BG) > 0)
        return mean_output(
            per_group_B, pairs=mask_BGG.sum(), pairs_equal=equal_BGG.sum(), pairs_right=is_right_BGG.sum()
        )

    def pair_terms(self, view: ScoredView) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(_PairReward):
    """-log sigmoid(s_w - s_l); pairs of equal reward are left out."""

    def pair_terms(self, view: ScoredView) -> torch.Tensor:
        return -logsigmoid(gap(view.score_BG))


@dataclass(frozen=True, kw_only=True)
class MMPOReward(_PairReward):
    """-p log s(s_w - s_l) - (1 - p) log s(s_l - s_w), p = sigmoid(gamma (r_w - r_l)) (arXiv 2410.03145). Equal rewards: 1/2."""

    gamma: float = 1.0

    soft_labels: ClassVar[bool] = True
    reads_margins: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("gamma", self.gamma)

    def pair_terms(self, view: ScoredView) -> torch.Tensor:
        return soft_label_loss(gap(view.score_BG), torch.sigmoid(self.gamma * gap(view.reward_BG)))


@dataclass(frozen=True, kw_only=True)
class MarginBT(_PairReward):
    """-log sigmoid(s_w - s_l - (r_w - r_l)): the score gap must pass the reward gap (arXiv 2307.09288, eq. 2)."""

    reads_margins: ClassVar[bool] = True

    def pair_terms(self, view: ScoredView) -> torch.Tensor:
        return -logsigmoid(gap(view.score_BG) - gap(view.reward_BG))


@dataclass(frozen=True, kw_only=True)
class PCRM(_PairReward):
    """-log s(d) - log s(d* - d), d = s_w - s_l, d* = beta1 / (similarity + beta2) + beta3, no gradient (arXiv 2404.00978).

    similarity as given, else shorter length over longer (length_M).
    """

    beta1: float = 6.0
    beta2: float = 1e-3
    beta3: float = 0.0

    needs_similarity: ClassVar[bool] = True

    def pair_terms(self, view: ScoredView) -> torch.Tensor:
        similarity_BGG = view.similarity_BGG
        if similarity_BGG is None:
            if view.length_BG is None:
                raise ValueError("PCRM needs similarity, or length_M to take it from the lengths")
            similarity_BGG = length_similarity(view.length_BG)
        bound_BGG = prior_bound(similarity_BGG, self.beta1, self.beta2, self.beta3)
        gap_BGG = gap(view.score_BG)
        return -logsigmoid(gap_BGG) - logsigmoid(bound_BGG - gap_BGG)


@dataclass(frozen=True, kw_only=True)
class Listwise(RewardLoss):
    """Plackett-Luce: sum_k [logsumexp_{j >= k} s_j - s_k] from highest to lowest reward, ties: lower index first."""

    def _output(self, view: ScoredView) -> LossOutput:
        if view.score_BG.numel() == 0:
            return mean_output(view.score_BG.sum(1))
        return mean_output(listwise.plackett_luce(view.score_BG, view.reward_BG, view.groups.mask_BG))


@dataclass(frozen=True, kw_only=True)
class InfoNCA(RewardLoss):
    """-sum_i softmax(r / temperature)_i log softmax(score)_i: InfoNCA's targets on scores (arXiv 2402.05369)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)

    def _output(self, view: ScoredView) -> LossOutput:
        if view.score_BG.numel() == 0:
            return mean_output(view.score_BG.sum(1))
        loss = listwise.InfoNCA(temperature=self.temperature)
        return mean_output(loss.group_terms(view.score_BG, view.reward_BG, view.groups))
