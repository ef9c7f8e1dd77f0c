"""What is wrong with a run is said before its model is loaded, as far as it takes no model to see it."""

from __future__ import annotations

import logging

from ampo_fast.config import Config
from ampo_fast.engine_config import HttpConfig, VllmConfig, read_options
from ampo_fast.metrics import check_trackers
from ampo_fast.own_selection import own_strategy
from ampo_fast.rewards import check_scorers
from ampo_fast.sampler import RunRows, load_rows
from ampo_fast.update import check_loss

log = logging.getLogger(__name__)


def check_start(config: Config) -> RunRows:
    """The rows of data.train and data.eval.

    Raises ValueError or ImportError for a loss, a strategy, a tracker, a scorer or data that the run cannot have.
    """
    check_loss(config)
    own_strategy(config.select.strategy)
    check_trackers(config.run.trackers)
    check_scorers(config)
    _check_options(config)
    return load_rows(config)


def _check_options(config: Config) -> None:
    """Of an engine or scorer that is not this run's too: a config may hold them for another, but not misspelt."""
    scorers = [*config.reward.kinds, config.eval.reward or ""]
    for field, values, schema, is_read in (
        ("rollout.options", config.rollout.options, VllmConfig, config.rollout.engine.startswith("vllm")),
        ("reward.options", config.reward.options, HttpConfig, any(kind.startswith("http") for kind in scorers)),
    ):
        read_options(schema, values, field)
        if values and not is_read:
            log.warning(
                "nothing reads %s: %s", field, ", ".join(f"{name} = {value!r}" for name, value in values.items())
            )
