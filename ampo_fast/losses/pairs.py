"""Which responses of a group are compared with which, and the base of every pairwise loss.

Shapes: M responses, B groups, G the largest group. [B, G, G] entry (i, j): response i compared with response j.
A group of two is one pair. Everything is dense in G: groups are small (2 .. 64), and no pair list has to be counted on
the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from ampo_fast.losses.stats import (
    CheckedStats,
    Groups,
    Loss,
    LossOutput,
    ResponseStats,
    check_positive,
    given_positives,
    mean_output,
    padded_rewards,
)
from ampo_fast.validation import check_choice


def gap(values_BG: torch.Tensor) -> torch.Tensor:
    """[B, G, G]: value of i minus value of j."""
    return values_BG[:, :, None] - values_BG[:, None, :]


def preferred_pairs(
    groups: Groups, reward_BG: torch.Tensor, pairs: str, positive_BG: torch.Tensor | None, keep_equal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, G, G] pairs (i preferred, j), [B, G, G] those of equal reward); each unordered pair at most once.

    pairs "all": every two responses of a group, the higher reward preferred. "best_vs_rest": positive_BG where given,
    whatever the rewards, else the first of the highest reward, against each other response. Pairs of equal reward are left
    out unless keep_equal, where the lower index comes first. A NaN reward is in no pair.
    """
    both_BGG = groups.mask_BG[:, :, None] & groups.mask_BG[:, None, :]
    better_BGG = gap(reward_BG) > 0
    equal_BGG = gap(reward_BG) == 0
    if pairs == "best_vs_rest":
        best_BG = groups.first_best(reward_BG) if positive_BG is None else positive_BG
        both_BGG = both_BGG & best_BG[:, :, None] & ~best_BG[:, None, :]
        better_BGG = better_BGG | (gap(reward_BG) < 0)  # of a given positive
    else:
        index_G = torch.arange(reward_BG.shape[1], device=reward_BG.device)
        equal_BGG = equal_BGG & (index_G[:, None] < index_G)
    equal_BGG = equal_BGG & both_BGG
    preferred_BGG = better_BGG & both_BGG
    return (preferred_BGG | equal_BGG) if keep_equal else preferred_BGG, equal_BGG


def mean_over_pairs(terms_BGG: torch.Tensor, mask_BGG: torch.Tensor) -> torch.Tensor:
    """[B]: mean of each group's terms where the mask holds; 0, with zero gradient, for a group without a pair."""
    kept_BGG = torch.where(mask_BGG, terms_BGG, 0.0)
    return kept_BGG.sum((1, 2)) / mask_BGG.sum((1, 2)).clamp(min=1)


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group's responses side by side, as a pairwise loss sees them. Padding: log-probs -1, lengths 1, rewards 0."""

    groups: Groups
    log_ratio_BG: torch.Tensor
    """log pi(y) / pi_ref(y), or log pi(y) without a reference; summed over tokens."""
    logp_BG: torch.Tensor
    length_BG: torch.Tensor
    reward_BG: torch.Tensor
    """In the rewards' own precision."""
    mask_BGG: torch.Tensor
    """The pairs (i preferred, j) that are compared."""
    equal_BGG: torch.Tensor
    """The pairs of equal reward."""
    stats: ResponseStats

    @classmethod
    def of(cls, stats: ResponseStats, log_ratio_M: torch.Tensor, pairs: str, keep_equal: bool) -> GroupView:
        groups = Groups(stats.group_offsets, stats.logp_M.device)
        work = stats.logp_M.dtype
        reward_BG = padded_rewards(stats, groups)
        mask_BGG, equal_BGG = preferred_pairs(groups, reward_BG, pairs, given_positives(stats, groups), keep_equal)
        return cls(
            groups=groups,
            log_ratio_BG=groups.pad(log_ratio_M, -1.0),
            logp_BG=groups.pad(stats.logp_M, -1.0),
            length_BG=groups.pad(stats.length_M.to(work), 1.0),
            reward_BG=reward_BG,
            mask_BGG=mask_BGG,
            equal_BGG=equal_BGG,
            stats=stats,
        )

    def in_work_precision(self, values_BGG: torch.Tensor) -> torch.Tensor:
        """What was made of rewards, in the log-probs' precision, in which the loss is computed."""
        return values_BGG.to(self.logp_BG.dtype)

    @property
    def mean_logp_BG(self) -> torch.Tensor:
        return self.logp_BG / self.length_BG


@dataclass(frozen=True, kw_only=True)
class PairwiseLoss(Loss):
    """Base: mean of pair_terms over a group's pairs. per_group_B is 0 for a group left without a pair."""

    beta: float = 0.1
    pairs: str = "all"

    uses_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_choice("pairs", self.pairs, ("all", "best_vs_rest"))

    def _output(self, stats: CheckedStats) -> LossOutput:
        view = GroupView.of(stats, self.log_ratios(stats), self.pairs, self.soft_labels)
        per_group_B = mean_over_pairs(self.pair_terms(view), view.mask_BGG)
        return mean_output(per_group_B, **self._metrics(view))

    def log_ratios(self, stats: ResponseStats) -> torch.Tensor:
        return stats.log_ratio_M if self.uses_reference else stats.logp_M

    def pair_terms(self, view: GroupView) -> torch.Tensor:
        """[B, G, G]: the loss of the pair in which i is preferred to j."""
        raise NotImplementedError

    @torch.no_grad()
    def _metrics(self, view: GroupView) -> dict[str, torch.Tensor]:
        """Sums, so that they add up over chunks: pairs, pairs of equal reward, pairs that the policy ranks right."""
        judged_BGG = view.mask_BGG & ~view.equal_BGG
        is_right_BGG = judged_BGG & (gap(view.log_ratio_BG) > 0)
        return {"pairs": view.mask_BGG.sum(), "pairs_equal": view.equal_BGG.sum(), "pairs_right": is_right_BGG.sum()}


def soft_label_loss(logit: torch.Tensor, target: torch.Tensor | float) -> torch.Tensor:
    """-p log sigmoid(x) - (1 - p) log sigmoid(-x) for a target p."""
    return -target * logsigmoid(logit) - (1.0 - target) * logsigmoid(-logit)
