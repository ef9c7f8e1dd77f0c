import itertools
import math

import pytest
import torch

from ampo_fast.config import OptimConfig
from ampo_fast.optimizer import NonfiniteGuard, guarded_step, learning_rate, make_optimizer


def test_schedule_warms_up_then_falls_as_a_cosine():
    config = OptimConfig(lr=1.0, warmup_ratio=0.2, min_lr_ratio=0.1)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2] == 1.0
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates[1:]))
    assert rates[-1] > 0.1


def test_bfloat16_parameters_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        make_optimizer([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], OptimConfig())


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing(poison):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([weight], OptimConfig())
    weight.grad = torch.tensor([1.0, math.nan if poison == "gradient" else 1.0, 1.0])
    loss = torch.tensor(math.inf if poison == "loss" else 1.0)
    _, taken = guarded_step(optimizer, loss, 0.1, 1.0)
    assert not taken
    assert weight.tolist() == [1.0, 1.0, 1.0]
    assert weight.grad is None
    assert not optimizer.state


def test_a_finite_step_is_clipped_and_taken():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([weight], OptimConfig())
    weight.grad = torch.tensor([30.0, 40.0])
    norm, taken = guarded_step(optimizer, torch.tensor(1.0), 0.1, 1.0)
    assert taken
    assert norm == pytest.approx(50.0)
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.9), atol=1e-3, rtol=0)


def test_three_non_finite_steps_in_a_row_end_the_run_and_each_is_noted():
    guard, notes = NonfiniteGuard("Lower optim.lr."), []
    for step, is_finite in enumerate([False, False, True, False, False]):
        guard.check(is_finite, f"step {step}: loss nan", notes.append)
    assert notes == [f"step {step}: loss nan: update left out" for step in (0, 1, 3, 4)]
    resumed = NonfiniteGuard("Lower optim.lr.")
    resumed.count = guard.count
    with pytest.raises(ValueError, match=r"3 steps in a row .* nothing was trained on them\. Lower optim\.lr\."):
        resumed.check(False, "step 5: loss nan", notes.append)
