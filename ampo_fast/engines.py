"""Which rollout engine a config names."""

from __future__ import annotations

import os

from ampo_fast.config import Config
from ampo_fast.engine_config import VllmConfig, read_options
from ampo_fast.model import Policy
from ampo_fast.rollouts import DataEngine, RolloutEngine, TransformersEngine
from ampo_fast.vllm_engine import VllmEngine
from ampo_fast.vllm_server import VllmServerEngine


def make_engine(config: Config, policy: Policy) -> RolloutEngine:
    """The engine of rollout.engine; those of vLLM start on first use."""
    rollout = config.rollout
    if rollout.engine == "data":
        return DataEngine(policy)
    if rollout.engine == "transformers":
        return TransformersEngine(policy, rollout.batch_rows)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f'rollout.engine = "{rollout.engine}" works with one training process; start it without torchrun, or set '
            'rollout.engine = "transformers"'
        )
    options = read_options(VllmConfig, rollout.options, "rollout.options")
    engine = VllmEngine if rollout.engine == "vllm" else VllmServerEngine
    return engine(policy, options, config.model.dtype)
