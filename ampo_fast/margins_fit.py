"""MMPO's gamma: given, fitted to independent labels, or set to a stated agreement rate. Plain Python floats.

A pair's margin is m = r_w - r_l; its soft target is p = sigmoid(gamma m) (arXiv 2410.03145).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ampo_fast.types import Prompt

log = logging.getLogger(__name__)

_MAX_EXPONENT = 700.0
_HOW = 'a number, {fit = "labels"} or {agreement = RATE}'


def sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def mean_target(gamma: float, margins: Sequence[float]) -> float:
    """Mean of sigmoid(gamma m): how often the higher score is expected to be preferred."""
    return math.fsum(sigmoid(gamma * m) for m in margins) / len(margins)


def fit_gamma(margins: Sequence[float], labels: Sequence[float]) -> float:
    """The gamma that maximises sum_i [y_i log sigmoid(gamma m_i) + (1 - y_i) log sigmoid(-gamma m_i)].

    labels: 1 where the response of the margin's first term was preferred, 0 where the other, between for a share of
    votes; they must not come from the scores. Raises ValueError where the likelihood has no maximum (labels that are the
    sign of the margin), where it is at gamma <= 0, and for empty or non-finite input.
    """
    _check("margins", margins)
    _check("labels", labels)
    if len(margins) != len(labels):
        raise ValueError(f"{len(margins)} margins but {len(labels)} labels")
    wrong = [y for y in labels if not 0.0 <= y <= 1.0]
    if wrong:
        raise ValueError(f"labels must be in [0, 1], got {wrong[0]}")
    if all(m == 0.0 for m in margins):
        raise ValueError("every margin is 0: equal scores say nothing about gamma")
    if all(y == (m > 0) for m, y in zip(margins, labels, strict=True) if m):
        raise ValueError(
            "the labels are the sign of the margin, so the likelihood grows with gamma without end: labels must be "
            "independent of the scores (votes, a second judge); else give gamma, or an agreement rate"
        )
    gamma = fit_slope(margins, labels)
    if gamma <= 0.0:
        raise ValueError("the labels do not agree with the margins (the best gamma is not above 0): check their signs")
    return gamma


def fit_slope(x: Sequence[float], labels: Sequence[float]) -> float:
    """The w that maximises sum_i [y_i log sigmoid(w x_i) + (1 - y_i) log sigmoid(-w x_i)]: logistic regression, no intercept.

    0 where x is 0 throughout. Raises ValueError where the sign of x is the label (or its opposite): no maximum.
    """
    told = [(value, y) for value, y in zip(x, labels, strict=True) if value != 0.0]
    if not told:
        return 0.0
    # The likelihood is concave, so its slope at 0 says on which side the maximum lies.
    sign = 1.0 if math.fsum(value * (y - 0.5) for value, y in told) >= 0.0 else -1.0
    if all(y == (sign * value > 0) for value, y in told):
        raise ValueError("the sign of x is the label throughout: the likelihood grows without end")

    def slope(w: float) -> float:
        return math.fsum(sign * value * (y - sigmoid(sign * w * value)) for value, y in told)

    return sign * _root(slope, max(abs(value) for value, _ in told)) if slope(0.0) > 0.0 else 0.0


def gamma_for_agreement(margins: Sequence[float], rate: float) -> float:
    """The gamma for which mean sigmoid(gamma |m|) = rate: judges agree with the higher score at that rate.

    Raises ValueError for a rate outside (1/2, 1), or not below what equal scores leave: they count 1/2 at any gamma.
    """
    _check("margins", margins)
    sizes = [abs(m) for m in margins]
    most = math.fsum(1.0 if m > 0 else 0.5 for m in sizes) / len(sizes)
    if not 0.5 < rate < most:
        raise ValueError(f"agreement = {rate}; it must be above 0.5 and below {most:g} (equal scores count 1/2)")
    return _root(lambda gamma: rate - mean_target(gamma, sizes), max(sizes))


def _root(falling: Any, largest: float) -> float:
    """Where a falling function of gamma >= 0 crosses 0, by bisection to the last bit or so."""
    low, high = 0.0, 1.0 / largest
    while falling(high) > 0.0:
        low, high = high, 2.0 * high
        if high * largest > _MAX_EXPONENT * 1e6:
            raise ValueError("no finite gamma fits: the margins that matter are vanishingly small beside the largest")
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if falling(middle) > 0.0 else (low, middle)
    return 0.5 * (low + high)


def resolve_gamma(params: Mapping[str, Any], margins: Sequence[float], labels: Sequence[float]) -> dict[str, Any]:
    """A loss's fields with gamma as a number; margins and labels are those of the training pairs.

    gamma: a number, {fit = "labels"} or {agreement = RATE}. Warns where a given gamma does not suit the margins' scale.
    labels may be empty, where the data has none beside the scores.
    """
    gamma = params.get("gamma")
    if not isinstance(gamma, Mapping):
        if isinstance(gamma, int | float) and margins:
            warn_about_scale(float(gamma), margins)
        return dict(params)
    if gamma == {"fit": "labels"}:
        if not labels:
            raise ValueError(
                'loss.params.gamma = {fit = "labels"}: the data has no chosen and rejected beside its scores'
            )
        return {**params, "gamma": fit_gamma(margins, labels)}
    if set(gamma) == {"agreement"} and isinstance(gamma["agreement"], int | float):
        return {**params, "gamma": gamma_for_agreement(margins, float(gamma["agreement"]))}
    raise ValueError(f"loss.params.gamma = {dict(gamma)!r}; use {_HOW}")


def fitted_params(params: Mapping[str, Any], normalize: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """loss.params with gamma resolved on the rewards that came with the prompts; normalize: reward.normalize.

    Raises ValueError where a fit is asked for and the rewards did not come with the data, or are rescaled per group
    (their margins are then not those that were fitted).
    """
    given = [replace(p, responses=tuple(r for r in p.responses if r.reward is not None)) for p in prompts]
    margins, labels = margins_and_labels(given)
    if not isinstance(params.get("gamma", 1.0), int | float):
        if not margins:
            raise ValueError('gamma is fitted on given rewards: it needs data with responses (rollout.engine = "data")')
        if normalize not in ("auto", "none"):
            raise ValueError(
                f'gamma is fitted on the raw rewards, but reward.normalize = {normalize!r}; set it to "none"'
            )
    return resolve_gamma(params, margins, labels)


def margins_and_labels(groups: Sequence[Prompt]) -> tuple[list[float], list[float]]:
    """(reward gaps of every two responses, 1 or 0 for pairs with chosen and rejected); labels empty unless all have one."""
    margins, labels = [], []
    for group in groups:
        for first, second in itertools.combinations(group.responses, 2):
            margins.append(first.reward - second.reward)
            if first.is_chosen is not None and second.is_chosen is not None:
                labels.append(float(first.is_chosen))
    return margins, labels if len(labels) == len(margins) else []


def warn_about_scale(gamma: float, margins: Sequence[float]) -> None:
    """Warns where the soft targets are all but hard, or all but 1/2, naming the gamma of an agreement of 0.75."""
    sizes = [abs(m) for m in margins if m]
    if not sizes:
        return
    target = mean_target(gamma, sizes)
    if 0.52 <= target <= 0.98:
        return
    kind = "all but hard labels" if target > 0.98 else "all but coin tosses"
    try:
        way_out = f"gamma = {gamma_for_agreement(sizes, 0.75):.3g} would make it 0.75"
    except ValueError:
        way_out = f"no gamma suits the largest, {max(sizes):.3g}, beside the rest"
    log.warning(
        "gamma = %g on these margins (median %.3g) makes a mean target of %.3f: %s; %s",
        gamma, sorted(sizes)[len(sizes) // 2], target, kind, way_out,
    )  # fmt: skip


def _check(name: str, values: Sequence[float]) -> None:
    if not len(values):
        raise ValueError(f"{name} is empty")
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"{name} has {len(wrong)} values that are not finite, the first {wrong[0]}")
