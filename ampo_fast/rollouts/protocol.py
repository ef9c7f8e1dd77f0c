"""What a rollout engine is: prompts in, groups of candidates out, each with its own log-probs and policy version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch

from ampo_fast.types import CandidateGroup, Prompt, Sampling

Keep = Callable[[Sequence[CandidateGroup]], None]


class RolloutEngine(Protocol):
    version: int
    answers_singly: bool
    """Whether a prompt's answers do not depend on the batch it is in: then a broken batch is not repeated whole."""
    answers_for_all: bool
    """Whether rank 0's engine answers every rank's prompts, in one call; the other ranks' engines are asked for nothing."""
    sync_metrics: Mapping[str, float]
    """How the newest sync went, in nats a token (sync/*); empty where the engine shares the trainer's module."""

    def start(self) -> None:
        """Makes it ready to answer with the policy's weights as they are; where it is ready nothing happens. All ranks
        call it together, as they do load_weights: what one meets all raise."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, keep: Keep | None = None
    ) -> list[CandidateGroup]:
        """n candidates for each prompt, in the prompts' order: a pure function of weights, prompts, n and sampling.

        keep is called on this thread with groups as soon as they are finished, with each group once: where generate
        raises, keep has what was finished before. In-process engines finish all groups of a call together.
        """
        ...

    def rest(self) -> None:
        """Gives back what memory it can until it is asked or handed weights again."""
        ...

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def close(self) -> None: ...


class IncompleteBatch(ConnectionError):
    """Some prompts of a batch could not be answered; those that were have been kept."""


class LocalEngine:
    """What the engines share that need the policy alone: ready as they are made, with nothing to give back."""

    answers_singly = False
    answers_for_all = False
    sync_metrics: Mapping[str, float] = MappingProxyType({})
    version = 0

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, keep: Keep | None = None
    ) -> list[CandidateGroup]:
        groups = self._groups(prompts, n, sampling)
        if keep is not None:
            keep(groups)
        return groups

    def _groups(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[CandidateGroup]:
        raise NotImplementedError

    def start(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.version = version

    def close(self) -> None:
        pass
