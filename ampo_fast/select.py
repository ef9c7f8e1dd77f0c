"""The selection stage: which candidates of each group are trained on, and which groups are left out, and why."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence

import torch

from ampo_fast import losses
from ampo_fast.config import Config
from ampo_fast.own_selection import coverage_cost, own_negatives, own_strategy
from ampo_fast.pareto import draw_sides
from ampo_fast.random_streams import stream_seed
from ampo_fast.selection import select_responses
from ampo_fast.types import Candidate, ScoredGroup, SelectedGroup

_TOO_FEW = "fewer than two distinct valid responses"
_EQUAL = "rewards equal within the tolerance"
_CUT = "every valid response was cut by the length limit, so none may be the positive"
_BEST_CUT = "the best given response was cut by the length limit, and a worse one is no positive"
_NOT_BETTER = "no response that may be the positive is better than another"
_NONE_LOWER = "no response has a lower reward than the positive"
_FIELDS = {
    _TOO_FEW: "rollout.temperature, rollout.n, rollout.max_new_tokens and rollout.truncated, or the responses of data.train",
    _EQUAL: "reward.kind, and reward.tol for what counts as equal",
    _CUT: "rollout.max_new_tokens, and rollout.truncated for what becomes of a cut one",
    _BEST_CUT: 'rollout.max_new_tokens, or rollout.truncated = "keep"',
    _NOT_BETTER: "reward.kind, rollout.max_new_tokens and rollout.truncated",
    _NONE_LOWER: "rollout.max_new_tokens and rollout.truncated: a cut response is never the positive",
}
"""Why a group is left out -> the fields that decide it."""


class RewardTolerance:
    """Which spread of raw rewards is none: reward.tol, or 1e-6 + 1e-3 x the median spread of the run's groups so far."""

    def __init__(self, fixed: float | None, spreads: Sequence[float] = ()) -> None:
        self.fixed = fixed
        self.spreads = list(spreads)

    def update(self, groups: Sequence[ScoredGroup]) -> float:
        """Takes the groups' spreads in and returns the tolerance to use for them."""
        if self.fixed is not None:
            return self.fixed
        self.spreads += [reward_spread(group) for group in groups]
        del self.spreads[:-4096]
        return 1e-6 + 1e-3 * statistics.median(self.spreads) if self.spreads else 1e-6


def reward_spread(scored: ScoredGroup) -> float:
    kept = [reward for reward, ok in zip(scored.reward_raw, scored.valid, strict=True) if ok]
    return max(kept) - min(kept) if kept else 0.0


def select_groups(scored: Sequence[ScoredGroup], config: Config, reward_tol: float) -> list[SelectedGroup]:
    """1 positive + up to k negatives of each group by select.strategy; degenerate groups carry their skip_reason.

    For a loss that splits at the mean (SWEPO, REFADynamic, KTO) those of the k whose reward is above it are positives too.

    A response cut by the length limit is never the positive unless rollout.truncated = "keep". Losses whose target for
    equal rewards is 1/2 (MMPO, CaPO) train on ties as well. Where select.pareto is set, the fronts of several rewards decide
    who may be on which side, and the strategy chooses among those.
    """
    if not scored:
        return []
    keeps_ties = losses.loss_class(config.loss.name).soft_labels
    if keeps_ties:
        reward_tol = -1.0  # no spread is too small
    sizes = [len(group.valid) for group in scored]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    sides = [_sides(group, config) for group in scored]
    rewards = torch.tensor([reward for group in scored for reward in group.reward], dtype=torch.float64)
    is_own = own_strategy(config.select.strategy) is not None
    chosen = select_responses(
        torch.cat([group.embedding for group in scored]),
        rewards.nan_to_num(0.0),  # invalid ones only, which the mask keeps out
        1 if is_own else config.select.k,
        strategy="bottom_k" if is_own else config.select.strategy,  # for the positive alone, which is always the best
        group_offsets=offsets,
        coverage=config.select.coverage,
        valid=torch.tensor([ok for valid, _ in sides for ok in valid]),
        positive_ok=torch.tensor([ok for _, positive_ok in sides for ok in positive_ok]),
        tie_tol=None if keeps_ties else 0.0,
        keys=torch.tensor([stream_seed(group.group.prompt.id) for group in scored]),
        seed=config.run.seed,
        time_limit=config.run.timeout_s / 2,  # the other ranks wait for the whole of it
    )
    rows = list(zip(scored, chosen.positive.tolist(), chosen.negative.tolist(), chosen.cost.tolist(), strict=True))
    if is_own:
        valids = [valid for valid, _ in sides]
        rows = [_chosen_by_own(*row[:2], valid, keeps_ties, config) for row, valid in zip(rows, valids, strict=True)]
    selected = [_selected(*row, reward_tol, config) for row in rows]
    if config.select.pareto or not losses.loss_class(config.loss.name).splits_at_mean(config.loss.params):
        return selected
    return [_split_at_mean(group, positive_ok) for group, (_, positive_ok) in zip(selected, sides, strict=True)]


def _split_at_mean(selected: SelectedGroup, positive_ok: Sequence[bool]) -> SelectedGroup:
    """Of the kept candidates all above the mean reward of the valid ones are positives, if that leaves a negative."""
    scored, negative = selected.scored, selected.negative
    if not selected.is_trained:
        return selected
    above = [i for i in negative if positive_ok[i] and scored.reward[i] > scored.mean_reward]
    if len(above) == len(negative):
        return selected
    positive = sorted((*selected.positive, *above), key=lambda i: -scored.reward[i])
    below = tuple(i for i in negative if i not in above)
    return dataclasses.replace(selected, positive=tuple(positive), negative=below)


def _chosen_by_own(
    scored: ScoredGroup, positive: list[int], valid: Sequence[bool], keeps_ties: bool, config: Config
) -> tuple[ScoredGroup, list[int], list[int], float]:
    """The group, its positive, its negatives and their coverage cost, by a user's own select.strategy."""
    best, settings = positive[0], config.select
    reward_N = torch.tensor(scored.reward, dtype=torch.float64)
    eligible = [
        i for i, ok in enumerate(valid) if ok and i != best and (keeps_ties or bool(reward_N[i] < reward_N[best]))
    ]
    if best < 0 or not eligible:
        return scored, [], [], math.nan
    negative = own_negatives(settings.strategy, scored.embedding, reward_N, best, eligible, settings.k)
    cost = coverage_cost(scored.embedding, reward_N, valid, best, negative, settings.coverage == "all")
    return scored, positive, negative, cost


def _sides(group: ScoredGroup, config: Config) -> tuple[Sequence[bool], Sequence[bool]]:
    """([N] who may be selected, [N] who may be the positive)."""
    keeps_cut = config.rollout.truncated == "keep"
    positive_ok = [candidate.finish_reason == "stop" or keeps_cut for candidate in group.group.candidates]
    if not keeps_cut and _is_given_best_cut(group, config):
        positive_ok = [False] * len(positive_ok)
    return draw_sides(group, positive_ok, config.run.seed) if config.select.pareto else (group.valid, positive_ok)


def _is_given_best_cut(scored: ScoredGroup, config: Config) -> bool:
    """A given response was rated whole: where the best is cut here, the next best is no example of a good answer."""
    kept = [i for i, ok in enumerate(scored.valid) if ok]
    if config.rollout.engine != "data" or not kept:
        return False
    best = max(scored.reward[i] for i in kept)
    return all(scored.group.candidates[i].finish_reason == "length" for i in kept if scored.reward[i] == best)


def why_untrained(groups: Sequence[SelectedGroup]) -> str:
    """Of groups that are all left out: the commonest reason, and the fields that decide it."""
    reason, count = Counter(group.skip_reason for group in groups).most_common(1)[0]
    fields = _FIELDS.get(reason, "rollouts/")  # another version's rollouts have reasons in other words
    return f"{reason} ({count} of {len(groups)}); see {fields}"


def without_unselected(group: SelectedGroup) -> SelectedGroup:
    """What training needs of a group: the candidates that are not trained on keep their place and lose their tokens."""
    kept = {*group.positive, *group.negative}
    whole = group.scored.group
    candidates = tuple(c if i in kept else Candidate(content="", token_ids=()) for i, c in enumerate(whole.candidates))
    slim = dataclasses.replace(whole, candidates=candidates)
    embedding = group.scored.embedding[:0]
    return dataclasses.replace(group, scored=dataclasses.replace(group.scored, group=slim, embedding=embedding))


def _selected(
    scored: ScoredGroup, positive: list[int], negative: list[int], cost: float, reward_tol: float, config: Config
) -> SelectedGroup:
    kept_positive = tuple(i for i in positive if i >= 0)
    kept_negative = tuple(i for i in negative if i >= 0)
    if kept_positive and kept_negative and reward_spread(scored) > reward_tol:
        return SelectedGroup(scored=scored, positive=kept_positive, negative=kept_negative, cost=cost)
    reason = _why_degenerate(scored, reward_tol, config)
    return SelectedGroup(scored=scored, positive=(), negative=(), cost=math.nan, skip_reason=reason)


def _why_degenerate(scored: ScoredGroup, reward_tol: float, config: Config) -> str:
    if sum(scored.valid) < 2:
        return _TOO_FEW
    if reward_spread(scored) <= reward_tol:
        return _EQUAL
    candidates = zip(scored.group.candidates, scored.valid, strict=True)
    if not any(ok and candidate.finish_reason == "stop" for candidate, ok in candidates):
        return _CUT
    if _is_given_best_cut(scored, config):
        return _BEST_CUT
    if scored.reward_by_scorer:
        return _NOT_BETTER
    return _NONE_LOWER
