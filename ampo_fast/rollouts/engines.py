"""Which rollout engine a config names."""

from __future__ import annotations

from ampo_fast import distributed
from ampo_fast.config import Config
from ampo_fast.engine_config import VllmConfig, read_options
from ampo_fast.model import Policy
from ampo_fast.rollouts.decoding import TransformersEngine
from ampo_fast.rollouts.given import DataEngine
from ampo_fast.rollouts.main_engine import MainEngine
from ampo_fast.rollouts.protocol import RolloutEngine
from ampo_fast.rollouts.segments import SegmentEngine
from ampo_fast.vllm.engine import VllmEngine
from ampo_fast.vllm.server import VllmServerEngine


def samples_here(config: Config) -> bool:
    """Whether the trainer's own modules write answers: token by token, which a sharded policy cannot."""
    return config.rollout.engine == "transformers" or bool(config.rollout.segment_tokens)


def make_engine(config: Config, policy: Policy, writer: Policy | None = None) -> RolloutEngine:
    """The engine of rollout.engine, for every rank to call; those of vLLM start on first use.

    policy: of the weights that the engine is handed; whole on every rank where samples_here.
    writer: writes the segments of rollout.segment_tokens; default: the policy.
    """
    rollout = config.rollout
    if rollout.segment_tokens:
        own = TransformersEngine(policy if writer is None else writer, rollout.batch_rows)
        return SegmentEngine(DataEngine(policy), own, rollout.segment_tokens)
    if rollout.engine == "data":
        return DataEngine(policy)
    if rollout.engine == "transformers":
        return TransformersEngine(policy, rollout.batch_rows)
    options = read_options(VllmConfig, rollout.options, "rollout.options")
    dtype = options.dtype or config.model.dtype
    if rollout.engine == "vllm":
        return VllmEngine(policy, options, dtype)
    if distributed.world_size() == 1:
        return VllmServerEngine(policy, options, dtype)
    return MainEngine(policy, lambda led: VllmServerEngine(led, options, dtype))
