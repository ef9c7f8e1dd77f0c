"""The group-contrastive family: AMPO, SWEPO/MPO and REFA are one function with different options.

    L = -log( sum_{+} e^s / ( sum_{+} e^s + gamma sum_{-} e^s ) )       (REFA eqs. 6 and 18, arXiv 2412.16378v4)
    s = beta log pi(y) / |y|  or  beta log pi(y) [/ pi_ref(y)],   plus alpha w,   w = (r - mean r)^p

Shapes: M responses, B groups, G the largest group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ampo_fast.dispatch import on_device, resolve_impl
from ampo_fast.losses.stats import (
    CheckedStats,
    Groups,
    Loss,
    LossOutput,
    ResponseStats,
    check_positive,
    checked,
    given_positives,
    mean_output,
    padded_rewards,
    segment_sum,
)
from ampo_fast.validation import check_choice, check_first_order, check_normalizer

_CHOICES = {
    "score": ("avg", "sum"),
    "weight": ("signed", "abs", "none"),
    "alpha_place": ("outside", "inside"),
    "split": ("best", "mean", "given"),
    "eos_penalty": (None, "target", "simple", "budget_independent", "budgeted"),
    "weight_power": (1, 2),
}


@dataclass(frozen=True, kw_only=True)
class GroupContrastive(Loss):
    """-log( sum_{+} e^s / (sum_{+} e^s + gamma sum_{-} e^s) ) per group; options as in group_contrastive_loss.

    Every reading of the papers is one of the options. Defaults: signed weights added outside beta (the form AMPO and
    REFA print); "abs" is SWEPO's (its negatives are pushed by |r - mean r|); "inside" is REFA's appendix, eq. 19/22.
    """

    beta: float
    alpha: float = 0.0
    gamma: float = 1.0
    score: str = "avg"
    weight: str = "signed"
    alpha_place: str = "outside"
    weight_power: int = 1
    split: str = "best"
    eos_penalty: str | None = None
    eos_lambda: float = 0.0
    eos_budget: int | None = None

    default_normalize: ClassVar[str] = "minmax"  # exp(alpha r) needs a fixed scale

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_positive("beta", self.beta)
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha = {self.alpha}; it must be a number")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma = {self.gamma}; it must be a number that is not negative")
        if self.eos_penalty == "budgeted" and not (self.eos_budget and self.eos_budget > 0):
            raise ValueError(f'eos_budget = {self.eos_budget}; eos_penalty = "budgeted" needs a number of tokens')

    @classmethod
    def splits_at_mean(cls, params: Mapping[str, Any]) -> bool:
        return params.get("split", cls.split) == "mean"

    @property
    def needs_eos(self) -> bool:
        return self.eos_penalty is not None

    @property
    def needs_rows(self) -> bool:
        return self.eos_penalty == "budgeted"

    def _output(self, stats: CheckedStats) -> LossOutput:
        return mean_output(self.per_group(stats))

    def per_group(self, stats: CheckedStats, impl: str = "auto") -> torch.Tensor:
        """[B] the groups' losses; impl "torch", "triton" or "auto" as group_contrastive_loss has it."""
        if self.split == "given" and stats.positive_M is None:
            raise ValueError('split = "given" needs positive_M')
        if resolve_impl("group_contrastive_loss", impl, stats.logp_M) == "triton":
            per_group_B = _TritonContrast.apply(stats.logp_M, stats, self)
        else:
            groups = Groups(stats.group_offsets, stats.logp_M.device)
            score_BG = groups.pad(self._scores(stats, groups), 0.0)
            positive_BG = self._positives(stats, groups)
            per_group_B = _contrast(score_BG, positive_BG, groups.mask_BG & ~positive_BG, self.gamma)
        if self.needs_eos:
            per_group_B = per_group_B + self._eos_term(stats)
        return per_group_B

    def _scores(self, stats: ResponseStats, groups: Groups) -> torch.Tensor:
        x_M = stats.log_ratio_M
        if self.score == "avg":
            x_M = x_M / stats.length_M
        score_M = self.beta * x_M
        if self.weight == "none" or self.alpha == 0.0:
            return score_M
        reward_BG = padded_rewards(stats, groups)
        deviation_M = groups.unpad(reward_BG - _baseline(stats, groups, reward_BG)).to(score_M.dtype)
        weight_M = deviation_M**self.weight_power
        if self.weight == "abs":
            weight_M = weight_M.abs()
        return score_M + self.alpha * (self.beta if self.alpha_place == "inside" else 1.0) * weight_M

    def _positives(self, stats: ResponseStats, groups: Groups) -> torch.Tensor:
        given_BG = given_positives(stats, groups)
        if given_BG is not None:
            return given_BG
        reward_BG = padded_rewards(stats, groups)
        if self.split == "mean" and stats.baseline_B is None:
            return groups.above_mean(reward_BG)
        if self.split == "mean":
            return (reward_BG > stats.baseline_B.to(reward_BG)[:, None]) & groups.mask_BG
        return groups.first_best(reward_BG)

    def _eos_term(self, stats: ResponseStats) -> torch.Tensor:
        """Per group, summed over the responses that end in EOS (REFA eqs. 7, 9, 10, 31)."""
        if stats.eos_logp_M is None:
            raise ValueError(f"eos_penalty = {self.eos_penalty!r} needs eos_logp_M (pass eos_id to the fused op)")
        groups = Groups(stats.group_offsets, stats.logp_M.device)
        ends_M = ~torch.isnan(stats.eos_logp_M)
        logp_M = torch.where(ends_M, stats.eos_logp_M, 0.0)
        if self.eos_penalty == "budget_independent":
            term_M = -logp_M
        elif self.eos_penalty == "simple":
            term_M = logp_M.exp()
        elif self.eos_penalty == "budgeted":
            term_M = self._budgeted(stats)
        else:
            length_BG = groups.pad(stats.length_M.to(logp_M.dtype), 0.0)
            longest_B1 = length_BG.amax(1, keepdim=True) if length_BG.numel() else length_BG
            term_M = logp_M.exp() * groups.unpad(longest_B1 - length_BG)
        return self.eos_lambda * groups.pad(torch.where(ends_M, term_M, 0.0), 0.0).sum(1)

    def _budgeted(self, stats: ResponseStats) -> torch.Tensor:
        """(1/b) sum_{t < b} P(EOS at t) - (1/(|y| - b)) sum_{t > b} P(EOS at t), t from 1; no second term for |y| <= b."""
        if stats.eos_logp_R is None or stats.response_offsets is None:
            raise ValueError(
                'eos_penalty = "budgeted" needs every row\'s EOS log-prob (eos_logp_R, response_offsets): '
                "call the loss through fused_linear_group_loss with eos_id"
            )
        budget, offsets = self.eos_budget, stats.response_offsets
        length_M = offsets.diff()
        place_R = torch.arange(1, int(offsets[-1]) + 1) - offsets[:-1].repeat_interleave(length_M)
        # In float64: a log-prob of float64 must not meet a third that was rounded to float32.
        over_R = (length_M - budget).clamp(min=1).double().reciprocal().repeat_interleave(length_M)
        factor_R = (place_R < budget).double() / budget - torch.where(place_R > budget, over_R, 0.0)
        return segment_sum(factor_R.to(stats.eos_logp_R) * stats.eos_logp_R.exp(), offsets)


def _baseline(stats: CheckedStats, groups: Groups, reward_BG: torch.Tensor) -> torch.Tensor:
    """[B, 1] rbar of weights and mean split: the given one, else the mean over the responses passed."""
    return groups.mean(reward_BG) if stats.baseline_B is None else stats.baseline_B.to(reward_BG)[:, None]


class _TritonContrast(torch.autograd.Function):
    """Loss and gradient in one launch; the backward only scales."""

    @staticmethod
    def forward(ctx, logp_M: torch.Tensor, stats: ResponseStats, loss: GroupContrastive) -> torch.Tensor:
        from ampo_fast.kernels.group_contrastive import group_contrastive

        def as_float(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.detach().float()

        def in_own_precision(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.detach().to(torch.promote_types(values.dtype, torch.float32))

        sizes_B = stats.group_offsets.diff()
        positive_M = None if stats.positive_M is None else stats.positive_M.to(torch.int8)
        loss_B, grad_M = group_contrastive(
            as_float(logp_M), as_float(stats.length_M), in_own_precision(stats.reward_M),
            on_device(stats.group_offsets, logp_M.device), int(sizes_B.max()) if sizes_B.numel() else 0,
            as_float(stats.ref_logp_M), positive_M, in_own_precision(stats.baseline_B),
            beta=loss.beta, alpha=loss.alpha * (loss.beta if loss.alpha_place == "inside" else 1.0),
            log_gamma=math.log(loss.gamma) if loss.gamma else -math.inf,
            is_avg=loss.score == "avg", weight=loss.weight if loss.alpha else "none",
            is_squared=loss.weight_power == 2, split_mean=loss.split == "mean",
        )  # fmt: skip
        ctx.save_for_backward(grad_M)
        ctx.group_M = on_device(torch.repeat_interleave(sizes_B), logp_M.device)
        return loss_B

    @staticmethod
    def backward(ctx, upstream_B: torch.Tensor):
        check_first_order('group_contrastive_loss of impl "triton"')
        (grad_M,) = ctx.saved_tensors
        return grad_M * upstream_B[ctx.group_M], None, None


def _contrast(
    score_BG: torch.Tensor, positive_BG: torch.Tensor, negative_BG: torch.Tensor, gamma: float
) -> torch.Tensor:
    """The loss of each group from scores and sides; 0, with zero gradient, where a side is empty."""
    if score_BG.numel() == 0:
        return score_BG.sum(1)
    # Masks as factors: on a CPU a product costs an eighth of a `where`. Every response is on one side; padding, whose score
    # is 0, on none.
    sides = [side_BG.to(score_BG.dtype) for side_BG in (positive_BG, negative_BG)]
    lowest = torch.finfo(score_BG.dtype).min
    tops = [(score_BG.detach() + (1.0 - side_BG) * lowest).amax(1, keepdim=True) for side_BG in sides]
    # Each response below its own side's top: one exp for both sides, which is finite, and so is its gradient.
    mass_BG = (score_BG - sides[0] * tops[0] - sides[1] * tops[1]).exp()
    has_both_B = positive_BG.any(1) & negative_BG.any(1)
    log_masses = [((mass_BG * side_BG).sum(1) + ~has_both_B).log() for side_BG in sides]
    gap_B = torch.where(has_both_B, (tops[1] - tops[0])[:, 0], 0.0) + (log_masses[1] - log_masses[0])
    log_gamma = torch.tensor(gamma, dtype=torch.float64).log().to(score_BG)
    # logaddexp(a, b) - a = softplus(b - a): exact to the last digit also where one side is everything.
    loss_B = torch.nn.functional.softplus(gap_B + log_gamma, threshold=80.0)
    return torch.where(has_both_B, loss_B, 0.0)


@dataclass(frozen=True, kw_only=True)
class AMPO(GroupContrastive):
    """AMPO as trained (arXiv 2502.18293 with REFA-1vsk's score): average log-prob, one positive, beta 10, gamma 3.

    The printed form is GroupContrastive(score="sum", beta=1, alpha=1).
    """

    beta: float = 10.0
    gamma: float = 3.0


@dataclass(frozen=True, kw_only=True)
class SWEPO(GroupContrastive):
    """SWEPO/MPO (arXiv 2412.04628): summed log-ratios to the reference, positives above the mean, |deviation| weights."""

    beta: float = 0.1
    alpha: float = 0.5
    score: str = "sum"
    weight: str = "abs"
    split: str = "mean"

    uses_reference: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class REFA1vsK(GroupContrastive):
    """REFA-1vsk (arXiv 2412.16378v4, eq. 18 with length normalisation)."""

    beta: float = 10.0
    gamma: float = 3.0


@dataclass(frozen=True, kw_only=True)
class REFADynamic(GroupContrastive):
    """REFA-Dynamic (arXiv 2412.16378v4, eq. 6): positives above the group's mean reward (or baseline_B)."""

    beta: float = 10.0
    gamma: float = 4.0
    split: str = "mean"


def group_contrastive_loss(
    logp_M: torch.Tensor,
    length_M: torch.Tensor,
    reward_M: torch.Tensor,
    group_offsets: torch.Tensor,
    *,
    ref_logp_M: torch.Tensor | None = None,
    eos_logp_M: torch.Tensor | None = None,
    positive_M: torch.Tensor | None = None,
    baseline_B: torch.Tensor | None = None,
    beta: float,
    alpha: float = 0.0,
    gamma: float = 1.0,
    score: str = "avg",
    weight: str = "signed",
    alpha_place: str = "outside",
    weight_power: int = 1,
    split: str = "best",
    eos_penalty: str | None = None,
    eos_lambda: float = 0.0,
    eos_budget: int | None = None,
    normalizer: float | torch.Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> torch.Tensor:
    """Group-contrastive loss -log( sum_{+} e^s / (sum_{+} e^s + gamma sum_{-} e^s) ) from summed log-probs.

    s = beta x / length ("avg") or beta x ("sum"), x = logp minus ref_logp where given; plus alpha w with
    w = (r - rbar)^weight_power, signed or in absolute value, times beta as well for alpha_place "inside". rbar is baseline_B
    where given, else the mean over the responses passed. The positives are positive_M where given, else the best response
    (ties: lowest index) or, with split "mean", all above rbar. A group with an empty side has loss 0 and gradient 0.
    Sources: AMPO arXiv 2502.18293; REFA arXiv 2412.16378v4; SWEPO arXiv 2412.04628.

    Args:
        logp_M: float [M], nats, EOS included. length_M: [M] tokens. reward_M: [M]. group_offsets: int64 [B + 1].
        eos_penalty: None, "target", "simple" or "budget_independent" on eos_logp_M (NaN: does not end in EOS). "budgeted"
            (with eos_budget) reads every token's EOS log-prob: GroupContrastive through fused_linear_group_loss has it.
        reduction: "mean" (sum / normalizer, default B), "sum" or "none" (per group).
        impl: "torch", "triton" (one program per group; the gradient is made with the loss: no second one) or "auto".
    Raises:
        ValueError: shapes, offsets or options that do not fit; on a CPU also NaN.
    """
    check_normalizer(normalizer)
    stats = checked(
        ResponseStats(logp_M, length_M, reward_M, group_offsets, ref_logp_M, eos_logp_M, positive_M, baseline_B)
    )
    loss_fn = GroupContrastive(
        beta=beta, alpha=alpha, gamma=gamma, score=score, weight=weight, alpha_place=alpha_place,
        weight_power=weight_power, split=split, eos_penalty=eos_penalty, eos_lambda=eos_lambda,
        eos_budget=eos_budget,
    )  # fmt: skip
    per_group_B = loss_fn.per_group(stats, impl)
    if reduction == "none":
        return per_group_B
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction = {reduction!r}; use mean, sum or none")
    if reduction == "sum":
        return per_group_B.sum()
    return per_group_B.sum() / (max(per_group_B.numel(), 1) if normalizer is None else normalizer)
