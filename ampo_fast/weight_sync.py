"""Puts the trained weights into the rollout engine and names the new version."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ampo_fast.led_policy import LedPolicy
from ampo_fast.model import Policy
from ampo_fast.rollouts.decoding import TransformersEngine
from ampo_fast.rollouts.protocol import RolloutEngine


def push_weights(policy: Policy, engine: RolloutEngine, version: int) -> int:
    """Streams the parameters, one at a time, into the engine as `version`; the tied head is sent beside the embedding.

    (An engine that receives only the embedding keeps a stale head.) Every rank must call it: a sharded policy is gathered
    on the way. Where the engine shares the policy's module nothing is copied.
    """
    is_shared = isinstance(engine, TransformersEngine) and engine.policy is policy
    engine.load_weights(version, () if is_shared else NamedWeights(policy))
    return engine.version


class NamedWeights:
    """A policy's tensors by their names in the base model's files; a tied head has its own, an adapter is merged.

    Can be iterated as often as needed; each time is one of all ranks and gathers a sharded policy anew, tensor by tensor.
    """

    def __init__(self, policy: Policy | LedPolicy) -> None:
        self._policy = policy

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._policy.whole_tensors()
