"""What a run's evaluations say: which policy is the best so far, and whether to go on.

All of it is in the state that checkpoints hold: a run that was killed after it stopped does not train on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ampo_fast.config import EvalConfig

START = {"best_reward": None, "bad_evals": 0, "evaluated": 0, "kl": 0.0}


def take_in(state: dict[str, Any], step: int, measured: Mapping[str, float | None]) -> bool:
    """Takes an evaluation in -> whether it is the best so far, which is then the one to beat.

    A metric that is NaN (None as it reads back) is no reward, and leaves the KL as it was. The start's evaluation, at step 0,
    counts against nothing: there is none before it to be better than.
    """
    reward, kl = measured["eval/reward"], measured["eval/kl"]
    state |= {"evaluated": step, "kl": kl if _is_finite(kl) else state["kl"]}
    best = state["best_reward"]
    is_better = _is_finite(reward) and (best is None or reward > best)
    bad_evals = 0 if is_better or step == 0 else state["bad_evals"] + 1
    state |= {"bad_evals": bad_evals} | ({"best_reward": reward} if is_better else {})
    return is_better


def why_stop(state: Mapping[str, Any], config: EvalConfig) -> str | None:
    """What speaks against going on, or None."""
    if config.max_kl is not None and state["kl"] > config.max_kl:
        return f"KL to the start is {state['kl']:.4f} nats per token, over eval.max_kl = {config.max_kl}"
    if config.patience and state["bad_evals"] >= config.patience:
        return f"{config.patience} evaluations without a better reward (eval.patience)"
    return None


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
