"""What a loss sees and what it returns, and the layout that all losses share: responses padded to [B, G].

Shapes: R rows, M responses, B groups, G the largest group.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, ClassVar

import torch

from ampo_fast.dispatch import on_device, resolve_impl
from ampo_fast.validation import check_finite, check_offsets, check_vector, checks_values, describe


@dataclass(frozen=True, slots=True)
class ResponseStats:
    """Per-response inputs of a loss; positional in this order."""

    logp_M: torch.Tensor
    """Sum of the response's token log-probs, its EOS included, in nats."""
    length_M: torch.Tensor
    """How many tokens that is (int or float)."""
    reward_M: torch.Tensor
    group_offsets: torch.Tensor
    """[B + 1] int64, CPU."""
    ref_logp_M: torch.Tensor | None = None
    eos_logp_M: torch.Tensor | None = None
    """EOS log-prob at the response's end; NaN where the response does not end in EOS."""
    positive_M: torch.Tensor | None = None
    baseline_B: torch.Tensor | None = None
    response_offsets: torch.Tensor | None = None
    """[M + 1] int64, CPU."""
    logp_R: torch.Tensor | None = None
    eos_logp_R: torch.Tensor | None = None
    target_R: torch.Tensor | None = None
    """The responses' token ids."""
    ref_logp_R: torch.Tensor | None = None

    @property
    def log_ratio_M(self) -> torch.Tensor:
        """logp minus the reference's, where there is one; else logp (a reference-free loss)."""
        return self.logp_M if self.ref_logp_M is None else self.logp_M - self.ref_logp_M


class CheckedStats(ResponseStats):
    """Stats that a loss takes as they are: from `checked`, or from code that checked or made every tensor itself."""

    __slots__ = ()


def checked(stats: ResponseStats) -> CheckedStats:
    """The stats with their offsets on the CPU and half-precision values in float32, in which losses are computed.

    Raises ValueError for what does not fit and, on a CPU, for NaN and infinity.
    """
    if isinstance(stats, CheckedStats):
        return stats
    logp_M = stats.logp_M
    if not isinstance(logp_M, torch.Tensor) or logp_M.ndim != 1 or not logp_M.is_floating_point():
        raise ValueError(f"logp_M must be a 1-D tensor of floats, one sum a response, got {describe(logp_M)}")
    num_responses, device = logp_M.shape[0], logp_M.device
    groups = check_offsets("group_offsets", stats.group_offsets, num_responses)
    check_finite("logp_M", logp_M)
    check_lengths(stats.length_M, num_responses, device)
    rows = next((v for v in (stats.logp_R, stats.eos_logp_R, stats.ref_logp_R, stats.target_R) if v is not None), None)
    responses = stats.response_offsets
    if rows is not None and responses is not None:
        responses = check_offsets("response_offsets", responses, len(rows), allow_empty=False)
        if responses.numel() != num_responses + 1:
            raise ValueError(
                f"response_offsets has {responses.numel()} entries, logp_M {num_responses}; it needs one more"
            )
    stats = replace(stats, group_offsets=groups, response_offsets=responses)
    check_side_inputs(stats, num_responses, None if rows is None else len(rows), device)
    return CheckedStats(**{field.name: _at_least_float32(getattr(stats, field.name)) for field in fields(stats)})


def _at_least_float32(value: torch.Tensor | None) -> torch.Tensor | None:
    return value.float() if value is not None and value.dtype in (torch.bfloat16, torch.float16) else value


def check_side_inputs(stats: ResponseStats, num_responses: int, num_rows: int | None, device: torch.device) -> None:
    """What a loss is given beside sums and lengths: shapes and devices; on a CPU also NaN and infinity.

    eos_logp_M may hold NaN: the response does not end in EOS. The fused op looks at rows of log-probs itself.
    """
    lengths = {"M": num_responses, "B": stats.group_offsets.numel() - 1, "R": num_rows}
    for name in ("reward_M", "ref_logp_M", "positive_M", "baseline_B", "ref_logp_R"):
        vector = getattr(stats, name)
        if vector is not None or name == "reward_M":
            check_vector(name, vector, lengths[name[-1]], device)
            check_finite(name, vector)
    for name in ("eos_logp_M", "logp_R", "eos_logp_R", "target_R"):
        vector = getattr(stats, name)
        if vector is not None:
            check_vector(name, vector, lengths[name[-1]], device)


def check_lengths(length_M: torch.Tensor, num_responses: int, device: torch.device) -> None:
    check_vector("length_M", length_M, num_responses, device)
    check_finite("length_M", length_M)
    if checks_values(length_M) and bool((length_M <= 0).any()):
        first = int((length_M <= 0).nonzero()[0])
        raise ValueError(f"length_M[{first}] = {length_M[first]} is not positive; leave empty responses out")


@dataclass(frozen=True, slots=True)
class LossOutput:
    loss: torch.Tensor
    """Mean over the groups, those without a term (an empty side, no pair) counted."""
    per_group_B: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def check_params(kind: Callable[..., Any], params: Iterable[str]) -> None:
    """Raises ValueError naming what is no field of the loss, and the fields that it has."""
    known = list(inspect.signature(kind).parameters)
    unknown = [name for name in params if name not in known]
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; its fields: {', '.join(known) or 'none'}")


class Loss:
    """Called on ResponseStats, which are checked; with what the fused op and the trainer read from a loss before they call it.

    To write one: a frozen dataclass below it, with its parameters as fields and `_output(stats) -> LossOutput`.
    """

    needs_rows: ClassVar[bool] = False
    """Whether it reads response_offsets, logp_R, eos_logp_R and target_R."""
    needs_eos: ClassVar[bool] = False
    """Whether it reads EOS log-probs (the caller passes eos_id)."""
    uses_reference: ClassVar[bool] = False
    """Whether its published form divides by a reference policy."""
    needs_reference_rows: ClassVar[bool] = False
    """Whether it wants the reference's log-probs token by token (ref_logp_R), not only summed."""
    soft_labels: ClassVar[bool] = False
    """Whether responses of equal reward carry a label too (1/2) and are trained on."""
    default_normalize: ClassVar[str] = "none"
    """What reward.normalize = "auto" is for it; "none" where the scale of the rewards is the signal (margins, ranks)."""
    fits_gamma: ClassVar[bool] = False
    """Whether its gamma is a slope on raw reward margins, which can be fitted on the data (margins_fit)."""

    @classmethod
    def implied_params(cls, normalize: str) -> dict[str, Any]:
        """Fields that follow from the rule by which the rewards were normalised."""
        return {}

    @classmethod
    def splits_at_mean(cls, params: Mapping[str, Any]) -> bool:
        """Whether, with these fields, every response above its group's mean reward is a positive, not the best one alone."""
        return False

    def __call__(self, stats: ResponseStats) -> LossOutput:
        return self._output(checked(stats))

    def _output(self, stats: CheckedStats) -> LossOutput:
        raise NotImplementedError


class Groups:
    """Responses side by side in their groups: [M] <-> [B, G]. Built on the host, so nothing waits for the device."""

    def __init__(self, group_offsets: torch.Tensor, device: torch.device) -> None:
        sizes_B = group_offsets.diff()
        self.widest = int(sizes_B.max()) if sizes_B.numel() else 0
        mask_BG = torch.arange(self.widest) < sizes_B[:, None]
        # Groups of one size, the usual case, lie in memory as they are wanted: no index, no copy.
        self._position_M = None
        if not bool(mask_BG.all()):
            self._position_M = on_device(mask_BG.flatten().nonzero()[:, 0], device)
        self.mask_BG = on_device(mask_BG, device)
        self.size_B = on_device(sizes_B, device)

    def pad(self, values_M: torch.Tensor, fill: float | bool) -> torch.Tensor:
        """[M] -> [B, G], `fill` where there is no response. Differentiable; may be a view of the values."""
        if self._position_M is None:
            return values_M.reshape(self.mask_BG.shape)
        flat = torch.full((self.mask_BG.numel(),), fill, dtype=values_M.dtype, device=values_M.device)
        return flat.index_copy(0, self._position_M, values_M).view(self.mask_BG.shape)

    def unpad(self, values_BG: torch.Tensor) -> torch.Tensor:
        flat = values_BG.flatten()
        return flat if self._position_M is None else flat[self._position_M]

    def mean(self, values_BG: torch.Tensor) -> torch.Tensor:
        """[B, 1]: the mean over each group's responses; 0 for an empty group."""
        total_B1 = values_BG.masked_fill(~self.mask_BG, 0.0).sum(1, keepdim=True)
        return total_B1 / self.size_B.clamp(min=1)[:, None]

    def above_mean(self, reward_BG: torch.Tensor) -> torch.Tensor:
        """[B, G] True where a reward is above its group's mean, decided exactly for rewards of float32 or less.

        A float32 mean rounds, otherwise in a row that is padded otherwise: a reward that equals it would change sides with
        the group's company.
        """
        if reward_BG.numel() == 0:
            return self.mask_BG
        reward_BG = reward_BG.double()
        lowest_B1 = reward_BG.masked_fill(~self.mask_BG, torch.inf).amin(1, keepdim=True)
        above_BG = torch.where(self.mask_BG, reward_BG - lowest_B1, 0.0)
        return (above_BG * self.size_B[:, None] > above_BG.sum(1, keepdim=True)) & self.mask_BG

    def first_best(self, reward_BG: torch.Tensor) -> torch.Tensor:
        """[B, G] True at each group's highest reward, ties to the lowest index. NaN is never the best."""
        if reward_BG.numel() == 0:
            return self.mask_BG
        known_BG = reward_BG.masked_fill(~self.mask_BG | reward_BG.isnan(), -torch.inf)
        top_BG = (known_BG == known_BG.amax(1, keepdim=True)) & self.mask_BG
        return top_BG & (top_BG.cumsum(1, dtype=torch.int32) == 1)


def given_positives(stats: CheckedStats, groups: Groups) -> torch.Tensor | None:
    """[B, G] bool: positive_M in its groups, or None."""
    return None if stats.positive_M is None else groups.pad(stats.positive_M.bool(), False)


def padded_rewards(stats: CheckedStats, groups: Groups) -> torch.Tensor:
    """[B, G] in the rewards' own precision, by which sides are decided; 0 in the padding."""
    work = torch.promote_types(stats.reward_M.dtype, torch.float32)
    return groups.pad(stats.reward_M.to(work), 0.0)


def segment_sum(values_R: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[M] sum of each segment, in a fixed order (an atomic index_add has none); offsets int64 [M + 1] on the CPU."""
    return _SegmentSum.apply(values_R, offsets)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_R: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        device_offsets = on_device(offsets, values_R.device)
        ctx.offsets, ctx.num_rows = device_offsets, values_R.shape[0]
        if resolve_impl("segment_sum", "auto", values_R) == "triton":
            from ampo_fast.kernels.segment_sum import segment_sum as triton_sum

            return triton_sum(values_R, device_offsets)
        return torch.segment_reduce(values_R, "sum", offsets=device_offsets)

    @staticmethod
    def backward(ctx, grad_M: torch.Tensor):
        # Spread on the device and to a length that the host knows: a copy of an index per row, or a question how many there
        # are, would wait for all that is queued.
        return torch.repeat_interleave(grad_M, ctx.offsets.diff(), output_size=ctx.num_rows), None


def mean_output(per_group_B: torch.Tensor, **metrics: torch.Tensor) -> LossOutput:
    return LossOutput(per_group_B.sum() / max(per_group_B.numel(), 1), per_group_B, metrics)


def check_positive(name: str, value: float) -> None:
    if not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} = {value!r}; it must be a positive number")
