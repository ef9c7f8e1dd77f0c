"""Rank 0's engine, as every rank sees it: servers have one client, and one canary, however many ranks train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ampo_fast import distributed
from ampo_fast.led_policy import LedPolicy
from ampo_fast.model import Policy
from ampo_fast.named_weights import NamedWeights
from ampo_fast.rollouts.protocol import Keep, RolloutEngine
from ampo_fast.types import CandidateGroup, Prompt, Sampling


class MainEngine:
    """make(policy) is called on rank 0 alone; what it and its engine raise when started or handed weights is raised on all."""

    answers_singly = True
    answers_for_all = True

    def __init__(self, policy: Policy, make: Callable[[LedPolicy], RolloutEngine]) -> None:
        self.version = 0
        self._policy = LedPolicy(policy)
        made: list[RolloutEngine] = []
        distributed.on_main(lambda: made.append(make(self._policy)))
        self._own = made[0] if made else None

    def start(self) -> None:
        self._policy.lead(lambda: self._own.start())

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, keep: Keep | None = None
    ) -> list[CandidateGroup]:
        """Rank 0's alone, on any thread: no other rank takes part."""
        return self._own.generate(prompts, n, sampling, keep)

    def rest(self) -> None:
        if self._own is not None:
            self._own.rest()

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """named_tensors: the policy's, which rank 0 gathers when its engine wants them, as often as it does."""
        self._policy.lead(lambda: self._own.load_weights(version, NamedWeights(self._policy)))
        self.version = version

    @property
    def sync_metrics(self) -> Mapping[str, float]:
        return {} if self._own is None else self._own.sync_metrics

    def close(self) -> None:
        if self._own is not None:
            self._own.close()
