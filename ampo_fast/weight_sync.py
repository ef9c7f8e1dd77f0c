"""Puts the trained weights into the rollout engine and names the new version."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ampo_fast.model import Policy
from ampo_fast.rollouts.decoding import TransformersEngine
from ampo_fast.rollouts.protocol import RolloutEngine


def push_weights(policy: Policy, engine: RolloutEngine, version: int) -> int:
    """Streams the parameters, one at a time, into the engine as `version`; the tied head is sent beside the embedding.

    (An engine that receives only the embedding keeps a stale head.) Every rank must call it: a sharded policy is gathered
    on the way. Where the engine shares the policy's module nothing is copied.
    """
    is_shared = isinstance(engine, TransformersEngine) and engine.policy is policy
    engine.load_weights(version, () if is_shared else named_weights(policy))
    return engine.version


def named_weights(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by its name in the base model's files; a tied head has its own, an adapter is merged."""
    return policy.whole_tensors()
