"""The canary without an engine: how far off an engine may be, and what is said of it."""

import logging
from types import SimpleNamespace

import pytest
import torch

from ampo_fast.vllm.canary import Canary, SyncError, default_tolerance


@pytest.fixture
def canary(tiny_policy):
    canary = Canary(tiny_policy, 0.15)
    canary.renew()
    return canary


def off_by(canary, gap):
    return (canary._trainer + gap).tolist()


def test_the_fixed_response_is_long_enough_for_a_steady_mean(canary):
    assert len(canary.response_ids) == 64


@pytest.mark.parametrize(("gap", "is_warned"), [(0.04, False), (0.06, True)])
def test_a_gap_that_only_half_precision_explains_is_warned_of(canary, caplog, gap, is_warned):
    caplog.set_level(logging.WARNING)
    canary.check("server-0", off_by(canary, gap))
    assert ("server-0: engine and trainer differ by" in caplog.text) is is_warned


def test_a_gap_beyond_the_tolerance_stops_the_run(canary):
    with pytest.raises(SyncError, match=r"server-0: .* differ by 0\.16"):
        canary.check("server-0", off_by(canary, 0.16))


def test_a_wide_tolerance_does_not_hide_an_engine_that_did_not_move(canary):
    canary.check("server-0", off_by(canary, 0.0))
    stale = off_by(canary, 0.0)
    canary._trainer = canary._trainer + 0.008  # as the trainer's were before the step
    canary.renew()
    with pytest.raises(SyncError, match="did not arrive"):
        canary.check("server-0", stale)


def test_a_server_scores_as_checked_within_a_third_of_the_tolerance(canary):
    canary.check("server-0", off_by(canary, 0.1))
    assert canary.is_as_checked("server-0", off_by(canary, 0.14))
    assert not canary.is_as_checked("server-0", off_by(canary, 0.04))


@pytest.mark.parametrize(
    ("trainer", "engine", "device", "tolerance"),
    [
        (torch.float32, "float32", "cpu", 0.001),
        (torch.float32, "float32", "cuda", 0.01),  # vLLM's attention: TF32
        (torch.bfloat16, "bfloat16", "cuda", 0.15),
        (torch.float32, "bfloat16", "cuda", 0.15),
        (torch.bfloat16, "float32", "cpu", 0.15),
    ],
)
def test_the_tolerance_follows_what_both_sides_compute_in(trainer, engine, device, tolerance):
    policy = SimpleNamespace(compute_dtype=trainer, device=torch.device(device))
    assert default_tolerance(policy, engine) == tolerance
