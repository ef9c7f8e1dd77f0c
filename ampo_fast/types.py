"""The nouns that flow through the loop: Prompt -> CandidateGroup -> ScoredGroup -> SelectedGroup -> PackedBatch.

Shapes: N candidates of one prompt, E embedding, T packed tokens, R predicted response tokens, M responses, B groups.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenResponse:
    """A response that came with the data instead of from the policy (offline training)."""

    content: str
    reward: float | None = None
    is_chosen: bool | None = None
    """A pair's label, which may come from another judge than the reward; None where the row is no pair."""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """Several ratings by name, where the data gives them."""
    finish_reason: FinishReason = "stop"
    """"length" where the data says that it was cut, as stage files do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One conversation to answer.

    Example: Prompt(id="7", messages=({"role": "user", "content": "Why is the sky blue?"},))
    """

    id: str
    """Stable and unique in its data set: random streams and the selector are keyed by it."""
    messages: tuple[dict[str, str], ...]
    """Chat turns {"role", "content"}; the last one is the user's."""
    responses: tuple[GivenResponse, ...] = ()
    """Given responses; empty where the policy is to write them."""
    subset: str = ""
    """Which part of a benchmark it is from (RewardBench), where the data says so."""
    where: str = field(default="", compare=False)
    """FILE:LINE that it was read from, for messages; empty where it was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One sampled (or given) response. Its token ids are what training sees: text is never tokenised again."""

    content: str
    token_ids: tuple[int, ...]
    """Response tokens; the last one is the end-of-turn token exactly when finish_reason is "stop"."""
    logp: tuple[float, ...] = ()
    """The engine's log-prob of each token at the sampling temperature, in nats; empty for given responses."""
    finish_reason: FinishReason = "stop"
    version: int = 0
    """The policy version that wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateGroup:
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    """The chat template applied once, generation prompt included."""
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    group: CandidateGroup
    reward_raw: tuple[float, ...]
    """[N] as the scorer gave them; NaN where it could not."""
    reward: tuple[float, ...]
    """[N] normalised once over the valid candidates; NaN where invalid."""
    valid: tuple[bool, ...]
    """[N] False: empty, a duplicate of an earlier candidate, or without a reward. Never selected, counted nowhere."""
    embedding: torch.Tensor
    """[N, E] float32, L2-normalised."""
    reward_by_scorer: tuple[tuple[float, ...], ...] = ()
    """[S, N] raw rewards in the order of reward.kind, where that names several; reward_raw is then their mean."""

    @property
    def mean_reward(self) -> float:
        """Of the valid ones, rounded once: a reward that equals the mean is not above it."""
        return statistics.mean(reward for reward, ok in zip(self.reward, self.valid, strict=True) if ok)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedGroup:
    scored: ScoredGroup
    positive: tuple[int, ...]
    """Indices into the candidates; empty where the group is degenerate."""
    negative: tuple[int, ...]
    cost: float
    """Coverage cost of the selection (contracts: select_responses); NaN where degenerate."""
    skip_reason: str | None = None
    """Why the group is not trained on, or None."""

    @property
    def is_trained(self) -> bool:
        return self.skip_reason is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Where one group lies in the packed tokens: [prompt | y1 | y2 | ...]."""

    start: int
    prompt_length: int
    response_lengths: tuple[int, ...]
    """How many tokens of each response are fed in: its length minus one, since the last one predicts nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Whole groups, each prompt stored once, nothing padded. Made by packing.pack."""

    token_T: torch.Tensor
    """[T] int64"""
    position_T: torch.Tensor
    """[T] int64; positions restart at the prompt's end for each response."""
    segments: tuple[Segment, ...]
    row_R: torch.Tensor
    """[R] int64 index into T of the hidden state that predicts target r; the prompt's last row serves every response."""
    target_R: torch.Tensor
    """[R] int64: exactly the response tokens and their end-of-turn token."""
    response_offsets: torch.Tensor
    """[M + 1] int64, CPU"""
    group_offsets: torch.Tensor
    """[B + 1] int64, CPU"""
    reward_M: torch.Tensor
    """[M] float32, normalised"""
    positive_M: torch.Tensor
    """[M] bool"""
    baseline_B: torch.Tensor
    """[B] float32: mean normalised reward over all valid candidates of the group, selected or not."""
    sampled_logp_R: torch.Tensor | None = None
    """[R] float32: the engine's log-probs, where all responses have them."""
    ref_logp_M: torch.Tensor | None = None
    """[M] float32: the reference policy's summed log-probs, where the loss needs them."""
    ref_logp_R: torch.Tensor | None = None
    """[R] float32: the same token by token, where the loss weights tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the policy is sampled. Seeds are derived from (seed, step, prompt id, candidate index), never from state."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    seed: int = 0
    step: int = 0
