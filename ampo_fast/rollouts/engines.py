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
    Raises ValueError where answers are to be written here and the model cannot be decoded here.
    """
    rollout = config.rollout
    if rollout.segment_tokens:
        own = _own_engine(config, policy if writer is None else writer)
        return SegmentEngine(DataEngine(policy), own, rollout.segment_tokens)
    if rollout.engine == "data":
        return DataEngine(policy)
    if rollout.engine == "transformers":
        return _own_engine(config, policy)
    options = read_options(VllmConfig, rollout.options, "rollout.options")
    dtype = options.dtype or config.model.dtype
    if rollout.engine == "vllm":
        return VllmEngine(policy, options, dtype)
    if distributed.world_size() == 1:
        return VllmServerEngine(policy, options, dtype)
    return MainEngine(policy, lambda led: VllmServerEngine(led, options, dtype))


def _own_engine(config: Config, policy: Policy) -> TransformersEngine:
    rollout, engine = config.rollout, TransformersEngine(policy, config.rollout.batch_rows)
    problem = engine.why_it_cannot_decode()
    if problem is None:
        return engine
    field, way_out = 'rollout.engine = "transformers"', 'set rollout.engine = "vllm", "vllm-server" or "data"'
    if rollout.segment_tokens:
        field, way_out = f"rollout.segment_tokens = {rollout.segment_tokens}", "set it to 0"
    raise ValueError(f"{field} cannot decode a {type(policy.model).__name__} token by token: {problem}; {way_out}")
