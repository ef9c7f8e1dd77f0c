"""torch.compile calls the fused ops as they are: no program a length, and nothing loaded where nobody compiles."""

import subprocess
import sys

import pytest

COMPILED = """
import torch
from ampo_fast import fused_linear_group_loss, linear_logprob
from ampo_fast.losses import AMPO
import torch._dynamo as dynamo

weight = torch.randn(50, 8, requires_grad=True)
def step(hidden, target):
    offsets = torch.tensor([0, 2, hidden.shape[0]])
    loss, _ = fused_linear_group_loss(
        torch.relu(hidden), weight, target, offsets, torch.tensor([0, 2]), torch.tensor([1.0, 0.0]), AMPO()
    )
    return loss + linear_logprob(hidden, weight, target).mean()

compiled = torch.compile(step, backend="eager", dynamic=True)
frames = []
for rows in range(5, 25):
    hidden, target = torch.randn(rows, 8), torch.arange(rows)
    torch.testing.assert_close(compiled(hidden, target), step(hidden, target))
    frames.append(dynamo.utils.counters["frames"]["total"])
assert frames[-1] == frames[2] <= 20, frames  # 17 with torch 2.11
assert not any("recompile_limit" in reason for reason in dynamo.utils.counters["unimplemented"])
"""

EAGER = """
import sys, torch
from ampo_fast import linear_logprob
linear_logprob(torch.randn(3, 8), torch.randn(50, 8), torch.arange(3))
assert "torch._dynamo" not in sys.modules
"""


@pytest.mark.parametrize("code", [COMPILED, EAGER], ids=["compiled", "eager"])
def test_a_script(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
