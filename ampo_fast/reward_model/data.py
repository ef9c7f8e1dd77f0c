"""Pairs and groups for reward models: what is scored, what is left out and counted, what is held out.

A group is a Prompt whose responses carry rewards. A pair is a group of two.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import replace

from ampo_fast.data import load_prompts, settle_disagreements
from ampo_fast.losses.reward_model import RewardLoss
from ampo_fast.margins_fit import margins_and_labels
from ampo_fast.reward_model.config import RewardDataConfig
from ampo_fast.types import GivenResponse, Prompt

log = logging.getLogger(__name__)


def load_groups(config: RewardDataConfig, field: str = "data.train") -> list[Prompt]:
    """Groups of at least two scored responses from data.train or data.eval, as `config` treats what does not fit.

    Raises ValueError, naming field and rows: too many missing scores, chosen below rejected, nothing left.
    """
    source = config.train if field == "data.train" else config.eval
    groups = load_prompts(source, needs_responses=True, field=field, columns=config.columns)
    groups = scored_only(groups, config.max_missing_share, field)
    groups = settle_disagreements(groups, config.disagreement, field)
    if config.group_by_prompt:
        groups = by_prompt(groups)
    kept = [group for group in groups if len(group.responses) > 1]
    if not kept:
        raise ValueError(f"{field} = {source!r} has no prompt with two different scored responses")
    return kept


def scored_only(groups: Sequence[Prompt], max_share: float, field: str) -> list[Prompt]:
    """The groups without the responses that have no score; raises where those are more than max_share of all."""
    missing = [f"{g.id}[{i}]" for g in groups for i, r in enumerate(g.responses) if r.reward is None]
    total = sum(len(group.responses) for group in groups)
    if len(missing) > max_share * total:
        raise ValueError(
            f"{field}: {len(missing)} of {total} responses have no finite score, more than data.max_missing_share = "
            f"{max_share}: {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}"
        )
    if missing:
        log.warning("%s: left out %d of %d responses without a finite score", field, len(missing), total)
    return [replace(g, responses=tuple(r for r in g.responses if r.reward is not None)) for g in groups]


def by_prompt(groups: Sequence[Prompt]) -> list[Prompt]:
    """One group per conversation, each text once; a text scored more than once gets the mean."""
    merged: dict[str, list[Prompt]] = {}
    for group in groups:
        merged.setdefault(conversation_key(group), []).append(group)
    return [replace(same[0], responses=_merged_responses(same)) for same in merged.values()]


def _merged_responses(groups: Sequence[Prompt]) -> tuple[GivenResponse, ...]:
    rewards: dict[str, list[float]] = {}
    for response in itertools.chain.from_iterable(group.responses for group in groups):
        rewards.setdefault(response.content, []).append(response.reward)
    return tuple(GivenResponse(content=text, reward=sum(found) / len(found)) for text, found in rewards.items())


def conversation_key(group: Prompt) -> str:
    """The same for the same chat turns, whatever the row's id."""
    turns = json.dumps(group.messages, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(turns.encode(), digest_size=16).hexdigest()


def hold_out(groups: Sequence[Prompt], share: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held out): `share` of the conversations, at least one, with all their groups; by hash, not by order.

    Raises ValueError where there is only one conversation.
    """
    keys = {conversation_key(group) for group in groups}
    if len(keys) < 2:
        raise ValueError("all rows have one prompt: nothing can be held out by prompt; give data.eval")
    count = min(len(keys) - 1, max(1, round(share * len(keys))))
    order = sorted(keys, key=lambda key: hashlib.blake2b(f"{seed}/{key}".encode()).digest())
    held = set(order[:count])
    return (
        [group for group in groups if conversation_key(group) not in held],
        [group for group in groups if conversation_key(group) in held],
    )


def check_margins(groups: Sequence[Prompt], loss: type[RewardLoss]) -> None:
    """Refuses data that the loss can learn nothing from: all scores equal, or, for a margin loss, all margins alike."""
    sizes = {abs(margin) for margin in margins_and_labels(groups)[0]}
    if sizes == {0.0} and not loss.soft_labels:
        raise ValueError(
            f"every pair has equal scores: loss.name = {loss.__name__!r} learns nothing from ties (MMPOReward takes 1/2)"
        )
    if loss.reads_margins and len(sizes) == 1:
        raise ValueError(
            f"loss.name = {loss.__name__!r} reads margins, and every margin here is {sizes.pop()} (pairs without scores have "
            '1): it would be label smoothing only; give scores, or set loss.name = "BradleyTerry" and loss.params = {}'
        )
