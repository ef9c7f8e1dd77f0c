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


def make_actor_engine(
    config: Config, engine: RolloutEngine, actor: Policy, answers_held_out: bool
) -> TransformersEngine:
    """The engine of the run where it is the actor's own; else one that keeps the actor up to date and, where that is asked
    for, answers held-out prompts. Raises ValueError where it cannot."""
    if isinstance(engine, TransformersEngine):
        return engine
    own = TransformersEngine(actor, config.rollout.batch_rows)
    if answers_held_out:
        _check_decoding(own, 'data.eval beside rollout.engine = "data"', "set eval.prompts = 0")
    return own


def _own_engine(config: Config, policy: Policy) -> TransformersEngine:
    rollout, engine = config.rollout, TransformersEngine(policy, config.rollout.batch_rows)
    field, way_out = 'rollout.engine = "transformers"', 'set rollout.engine = "vllm", "vllm-server" or "data"'
    if rollout.segment_tokens:
        field, way_out = f"rollout.segment_tokens = {rollout.segment_tokens}", "set it to 0"
    _check_decoding(engine, field, way_out)
    return engine


def _check_decoding(engine: TransformersEngine, field: str, way_out: str) -> None:
    problem = engine.why_it_cannot_decode()
    if problem is not None:
        raise ValueError(
            f"{field} cannot decode a {type(engine.policy.model).__name__} token by token: {problem}; {way_out}"
        )
