"""What is wrong with a run is said before its model is loaded, as far as it takes no model to see it."""

from __future__ import annotations

from ampo_fast.config import Config
from ampo_fast.metrics import check_trackers
from ampo_fast.own_selection import own_strategy
from ampo_fast.rewards import check_scorers
from ampo_fast.sampler import RunRows, load_rows
from ampo_fast.update import check_loss


def check_start(config: Config) -> RunRows:
    """The rows of data.train and data.eval.

    Raises ValueError or ImportError for a loss, a strategy, a tracker, a scorer or data that the run cannot have.
    """
    check_loss(config)
    own_strategy(config.select.strategy)
    check_trackers(config.run.trackers)
    check_scorers(config)
    return load_rows(config)
