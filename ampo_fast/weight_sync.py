"""Puts the trained weights into the rollout engine and names the new version."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ampo_fast.model import Policy
from ampo_fast.named_weights import NamedWeights
from ampo_fast.rollouts.decoding import TransformersEngine
from ampo_fast.rollouts.protocol import RolloutEngine


def push_weights(policy: Policy, engine: RolloutEngine, version: int) -> int:
    """Streams the parameters, one at a time, into the engine as `version`; the tied head is sent beside the embedding.

    (An engine that receives only the embedding keeps a stale head.) Every rank must call it: a sharded policy is gathered
    on the way. Where the engine shares the policy's module nothing is copied.
    """
    engine.load_weights(version, _as_taken_by(engine, policy))
    return engine.version


def _as_taken_by(engine: RolloutEngine, policy: Policy) -> Iterable[tuple[str, torch.Tensor]]:
    """A replica in this process has the module's own names; any other engine knows those of its files."""
    if not isinstance(engine, TransformersEngine):
        return NamedWeights(policy)
    return () if engine.policy is policy else policy.whole_tensors()
