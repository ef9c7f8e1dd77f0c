"""Selected groups -> micro-batches -> packed batches: each prompt once, then its responses; no padding.

Shapes: T packed tokens, R predicted response tokens, M responses, B groups.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ampo_fast.dispatch import on_device
from ampo_fast.types import Candidate, CandidateGroup, PackedBatch, Prompt, ScoredGroup, Segment, SelectedGroup


def packed_length(prompt_length: int, response_lengths: Sequence[int]) -> int:
    """Tokens fed for one group: a response's last token predicts nothing and is only a target."""
    return prompt_length + sum(max(length - 1, 0) for length in response_lengths)


def group_length(group: CandidateGroup, indices: Iterable[int]) -> int:
    """packed_length of the group with these of its candidates."""
    return packed_length(len(group.prompt_ids), [len(group.candidates[i].token_ids) for i in indices])


def token_runs(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in order, cut into runs of at most max_tokens (one item may be longer alone)."""
    runs: list[list[int]] = []
    used = 0
    for i, length in enumerate(lengths):
        if not runs or used + length > max_tokens:
            runs.append([])
            used = 0
        runs[-1].append(i)
        used += length
    return runs


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward holds: whole groups, a part of one group that is longer than the budget, or nothing (idle)."""

    groups: tuple[SelectedGroup, ...] = ()
    part: tuple[int, ...] = ()
    """The candidates of groups[0] that are in it, a run of its kept ones; empty where the groups are whole."""

    @property
    def is_whole(self) -> bool:
        return bool(self.groups) and not self.part


def kept_candidates(group: SelectedGroup) -> tuple[int, ...]:
    """Indices of the trained candidates in packed order."""
    return (*group.positive, *group.negative)


def count_targets(group: SelectedGroup) -> int:
    """Response tokens that the group is trained on."""
    return sum(len(group.scored.group.candidates[i].token_ids) for i in kept_candidates(group))


def micro_batches(groups: Sequence[SelectedGroup], max_tokens: int) -> list[MicroBatch]:
    """The groups in order, cut into runs of at most max_tokens packed tokens; a longer group alone, in parts."""
    batches: list[MicroBatch] = []
    used = max_tokens
    for group in groups:
        length = _part_tokens(group, kept_candidates(group))
        if length > max_tokens:
            batches += [MicroBatch((group,), part) for part in group_parts(group, max_tokens)]
            used = max_tokens
        elif used + length > max_tokens:
            batches.append(MicroBatch((group,)))
            used = length
        else:
            batches[-1] = MicroBatch((*batches[-1].groups, group))
            used += length
    return batches


def group_parts(group: SelectedGroup, max_tokens: int) -> list[tuple[int, ...]]:
    """Runs of the group's kept candidates that fit max_tokens with the prompt. Raises ValueError when one alone does not."""
    parts: list[tuple[int, ...]] = []
    for i in kept_candidates(group):
        if parts and _part_tokens(group, (*parts[-1], i)) <= max_tokens:
            parts[-1] = (*parts[-1], i)
            continue
        alone = _part_tokens(group, (i,))
        if alone > max_tokens:
            raise ValueError(
                f"prompt {group.scored.group.prompt.id} ({len(group.scored.group.prompt_ids)} tokens) and one response of "
                f"{len(group.scored.group.candidates[i].token_ids)} pack to {alone} tokens, more than "
                f"optim.micro_batch_tokens = {max_tokens}; raise it, or lower rollout.max_new_tokens or data.max_prompt_tokens"
            )
        parts.append((i,))
    return parts


def balanced_shares(weights: Sequence[int], num_shares: int) -> list[list[int]]:
    """Indices 0 .. len - 1 dealt into shares of about equal weight: the heaviest first, each to the lightest share.

    A pure function of its arguments; within a share the indices ascend. Shares may be empty.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        lightest = loads.index(min(loads))
        shares[lightest].append(i)
        loads[lightest] += weights[i]
    return [sorted(share) for share in shares]


def group_tokens(group: SelectedGroup, max_tokens: int) -> int:
    """Tokens forwarded with gradient for one trained group; a group in parts repeats its prompt in each."""
    return sum(_part_tokens(group, part) for part in group_parts(group, max_tokens))


def _part_tokens(group: SelectedGroup, indices: Sequence[int]) -> int:
    return group_length(group.scored.group, indices)


def rank_micro_batches(groups: Sequence[SelectedGroup], max_tokens: int, num_ranks: int) -> list[list[MicroBatch]]:
    """For each rank its micro-batches: shares of about equal tokens, equally many each; an empty one where it has none."""
    shares = balanced_shares([group_tokens(group, max_tokens) for group in groups], num_ranks)
    ranks = [micro_batches([groups[i] for i in share], max_tokens) for share in shares]
    longest = max(map(len, ranks))
    return [batches + [MicroBatch()] * (longest - len(batches)) for batches in ranks]


def idle_batch(device: torch.device | str = "cpu") -> PackedBatch:
    """The smallest batch that every loss is defined on, for a rank that must keep the others company in a forward."""
    return longest_batch(1, prompt_length=1, num_responses=2, response_length=1, device=device)


def longest_batch(
    num_groups: int, prompt_length: int, num_responses: int, response_length: int, device: torch.device | str = "cpu"
) -> PackedBatch:
    """Groups without meaning, all of one shape: the first response of each is the positive."""
    candidate = Candidate(content="", token_ids=(0,) * response_length)
    group = CandidateGroup(
        prompt=Prompt(id="", messages=()), prompt_ids=(0,) * prompt_length, candidates=(candidate,) * num_responses
    )
    reward = [1.0] + [0.0] * (num_responses - 1)
    return pack_responses(
        [group] * num_groups,
        [range(num_responses)] * num_groups,
        device,
        reward=[reward] * num_groups,
        positive=[(0,)] * num_groups,
    )


def pack(groups: Sequence[SelectedGroup], device: torch.device | str = "cpu") -> PackedBatch:
    """One batch of trained groups: [prompt | positive | negatives] each, rewards and sides with them."""
    kept = [kept_candidates(group) for group in groups]
    return pack_responses(
        [group.scored.group for group in groups],
        kept,
        device,
        reward=[_kept(g.scored, k) for g, k in zip(groups, kept, strict=True)],
        positive=[group.positive for group in groups],
        baseline=[group.scored.mean_reward for group in groups],
    )


def pack_micro_batch(micro: MicroBatch, device: torch.device | str = "cpu") -> PackedBatch:
    """A part has neither rewards nor sides: its gradient comes from the whole group."""
    if micro.part:
        return pack_responses([micro.groups[0].scored.group], [micro.part], device)
    return pack(micro.groups, device) if micro.groups else idle_batch(device)


def _kept(scored: ScoredGroup, indices: Sequence[int]) -> list[float]:
    return [scored.reward[i] for i in indices]


def pack_responses(
    groups: Sequence[CandidateGroup],
    kept: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    reward: Sequence[Sequence[float]] | None = None,
    positive: Sequence[Sequence[int]] | None = None,
    baseline: Sequence[float] | None = None,
) -> PackedBatch:
    """Packs the kept candidates of each group; every one needs at least one token.

    reward: of the kept ones. positive: which candidates are. baseline: a number per group. Zeros where not given.

    Row r of the batch is the hidden state that predicts target r: the prompt's last one for a response's first token,
    then the response's own. Positions restart at the prompt's end for each response.
    """
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    sampled: list[float] = []
    segments: list[Segment] = []
    lengths: list[int] = []
    for group, indices in zip(groups, kept, strict=True):
        prompt = group.prompt_ids
        start = len(tokens)
        tokens += prompt
        positions += range(len(prompt))
        fed = []
        for response in (group.candidates[i] for i in indices):
            ids = response.token_ids
            rows += [start + len(prompt) - 1, *range(len(tokens), len(tokens) + len(ids) - 1)]
            tokens += ids[:-1]
            positions += range(len(prompt), len(prompt) + len(ids) - 1)
            targets += ids
            sampled += response.logp
            lengths.append(len(ids))
            fed.append(len(ids) - 1)
        segments.append(Segment(start=start, prompt_length=len(prompt), response_lengths=tuple(fed)))
    num_responses = [len(indices) for indices in kept]
    flat_reward = [value for values in reward for value in values] if reward else [0.0] * len(lengths)
    sides = [i in side for indices, side in zip(kept, positive or [()] * len(kept), strict=True) for i in indices]
    sent = functools.partial(_sent, device=device)
    return PackedBatch(
        token_T=sent(tokens),
        position_T=sent(positions),
        segments=tuple(segments),
        row_R=sent(rows),
        target_R=sent(targets),
        response_offsets=_offsets(lengths),
        group_offsets=_offsets(num_responses),
        reward_M=sent(flat_reward),
        positive_M=sent(sides, dtype=torch.bool),
        baseline_B=sent(baseline or [0.0] * len(segments)),
        sampled_logp_R=sent(sampled) if len(sampled) == len(targets) else None,
    )


def _sent(values: Sequence, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    return on_device(torch.tensor(values, dtype=dtype), device)


def _offsets(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)])
