import math

import pytest

from ampo_fast.config import EvalConfig
from ampo_fast.early_stop import START, take_in, why_stop


def taken_in(*evaluations):
    state = dict(START)
    found = [take_in(state, step, {"eval/reward": r, "eval/kl": kl}) for step, (r, kl) in enumerate(evaluations)]
    return found, state


def test_an_evaluation_without_a_reward_is_never_the_best():
    found, state = taken_in((math.nan, 0.1), (None, None), (0.2, 0.3), (math.nan, math.nan))
    assert found == [False, False, True, False]
    assert state == {"best_reward": 0.2, "bad_evals": 1, "evaluated": 3, "kl": 0.3}


def test_only_a_higher_reward_is_better_and_starts_the_patience_anew():
    found, state = taken_in((0.5, 0.0), (0.5, 0.0), (0.4, 0.0), (0.6, 0.0))
    assert found == [True, False, False, True]
    assert state["bad_evals"] == 0


def test_an_unscored_start_does_not_stop_a_run_before_its_first_step():
    _, state = taken_in((math.nan, 0.0))
    assert why_stop(state, EvalConfig(patience=1)) is None


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({}, None),
        ({"patience": 3}, None),
        ({"patience": 2}, r"2 evaluations without a better reward (eval.patience)"),
        ({"max_kl": 0.7}, None),
        ({"max_kl": 0.5}, "KL to the start is 0.6000 nats per token, over eval.max_kl = 0.5"),
    ],
)
def test_what_speaks_against_going_on_names_its_field(limits, said):
    _, state = taken_in((0.5, 0.1), (0.4, 0.2), (0.3, 0.6))
    assert why_stop(state, EvalConfig(**limits)) == said
