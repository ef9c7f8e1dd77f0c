"""Two processes, and a sharded policy that rank 0 asks while the other follows."""

import pytest
import torch
from builders import group
from runs import two_ranks

from ampo_fast.config import ModelConfig
from ampo_fast.evaluation import response_logp
from ampo_fast.model import Policy

CASES = """
import sys
import torch
from builders import group
from ampo_fast import distributed
from ampo_fast.config import ModelConfig
from ampo_fast.evaluation import response_logp
from ampo_fast.led_policy import LedPolicy
from ampo_fast.model import Policy
from ampo_fast.named_weights import NamedWeights

MODEL, OUT = sys.argv[1:]
GROUPS = [group(["tea", "a long answer", "sun"])]

def compute(led, out):
    out["logp"] = response_logp(led, GROUPS, 1000)
    weights = NamedWeights(led)
    out["weights"] = {name: tensor.clone() for name, tensor in weights}
    out["names"] = [name for name, _ in weights]
    out["after"] = response_logp(led, GROUPS, 8)

def stop_in_the_middle(led):
    for i, _ in enumerate(NamedWeights(led)):
        if i == 2:
            raise OSError(28, "the disk is full")

def go_on_after_a_walk_left_early(led, out):
    first = iter(NamedWeights(led))
    next(first)
    second = iter(NamedWeights(led))
    next(second)
    out["then"] = response_logp(led, GROUPS, 1000)
    third = iter(NamedWeights(led))
    next(third)  # and nothing after it

with distributed.process_group(60):
    policy = Policy.load(ModelConfig(path=MODEL)).shard()
    led, out = LedPolicy(policy), {}
    for work in (lambda: stop_in_the_middle(led), lambda: (_ for _ in ()).throw(KeyError("none"))):
        try:
            led.lead(work)
        except (OSError, KeyError) as error:
            out.setdefault("errors", []).append(str(error))
    led.lead(lambda: go_on_after_a_walk_left_early(led, out))
    led.lead(lambda: compute(led, out))
    # Each rank asks for its own groups, of which one has fewer.
    out["own"] = response_logp(policy, GROUPS * (2 * distributed.rank()), 1)
    torch.save(out, f"{OUT}/rank{distributed.rank()}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("led")
    for status, err in two_ranks(CASES, tiny_model, out):
        assert status == 0, err[-3000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tiny_model):
    return Policy.load(ModelConfig(path=str(tiny_model)))


GROUPS = [group(["tea", "a long answer", "sun"])]


def test_rank_0_computes_with_the_shards_of_all(ranks, alone):
    expected = response_logp(alone, GROUPS, 1000)
    for name in ("logp", "after", "then"):
        torch.testing.assert_close(ranks[0][name], expected, atol=1e-5, rtol=0)
    assert "logp" not in ranks[1]


def test_weights_are_walked_over_as_often_as_they_are_asked_for(ranks, alone):
    expected = alone.model.state_dict()
    assert ranks[0]["names"] == list(ranks[0]["weights"]) == list(expected)
    assert all(torch.equal(tensor, ranks[0]["weights"][name]) for name, tensor in expected.items())


def test_what_stops_rank_0_in_the_middle_of_a_walk_stops_both_and_they_go_on_together(ranks):
    for rank in ranks:
        assert rank["errors"] == ["[Errno 28] the disk is full", "'none'"]


def test_a_rank_with_fewer_groups_keeps_the_other_company(ranks, alone):
    assert ranks[0]["own"].numel() == 0
    torch.testing.assert_close(ranks[1]["own"], response_logp(alone, GROUPS * 2, 1000), atol=1e-5, rtol=0)
