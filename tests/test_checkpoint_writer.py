"""Checkpoints beside the training: the state as it was when it was saved, one at a time, and no error lost."""

import threading

import pytest
import torch
from test_checkpoint import trained

from ampo_fast import checkpoint_writer
from ampo_fast.checkpoint import checkpoint_dirs, load_checkpoint
from ampo_fast.checkpoint_writer import CheckpointWriter
from ampo_fast.config import CheckpointConfig


@pytest.fixture
def held(monkeypatch):
    """Writers wait for this event before they write."""
    event, write = threading.Event(), checkpoint_writer.write_shards

    def held_write(*args):
        assert event.wait(60)
        write(*args)

    monkeypatch.setattr(checkpoint_writer, "write_shards", held_write)
    yield event
    event.set()


def writer(root, policy, optimizer, **options):
    return CheckpointWriter(root, policy, optimizer, CheckpointConfig(asynchronous=True, **options))


def test_what_is_written_is_the_state_when_it_was_saved(tiny_model, tmp_path, held):
    policy, optimizer = trained(tiny_model, 0)
    saved = [p.detach().clone() for p in policy.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in policy.parameters()]
    checkpoints, state = writer(tmp_path, policy, optimizer), {"spreads": [1.0]}
    checkpoints.save(1, state)
    state["spreads"].append(2.0)
    for parameter in policy.parameters():
        parameter.data.zero_()
        optimizer.state[parameter]["exp_avg"].zero_()
    assert checkpoint_dirs(tmp_path) == []  # training went on before it was written
    held.set()
    checkpoints.wait()
    other, other_optimizer = trained(tiny_model, 1)
    assert load_checkpoint(tmp_path / "step_000001", other, other_optimizer) == {"spreads": [1.0]}
    for p, was, moment in zip(other.parameters(), saved, moments, strict=True):
        assert torch.equal(p, was)
        assert torch.equal(other_optimizer.state[p]["exp_avg"], moment)


def test_one_is_in_flight_and_the_old_ones_are_pruned(tiny_model, tmp_path, held):
    policy, optimizer = trained(tiny_model, 0)
    checkpoints = writer(tmp_path, policy, optimizer, keep_last=2)
    checkpoints.save(1, {})
    threading.Timer(0.3, held.set).start()
    checkpoints.save(2, {})
    assert held.is_set()
    assert checkpoint_dirs(tmp_path)[0][0] == 1  # whole before the second one began
    checkpoints.save(3, {})
    checkpoints.save(3, {})  # again is nothing
    checkpoints.wait()
    assert [step for step, _ in checkpoint_dirs(tmp_path)] == [2, 3]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("ask", ["save", "wait"])
def test_an_error_of_the_writer_is_raised_at_the_next_save_or_at_the_end(tiny_model, tmp_path, monkeypatch, ask):
    policy, optimizer = trained(tiny_model, 0)
    checkpoints = writer(tmp_path, policy, optimizer)
    checkpoints.save(1, {})
    checkpoints.wait()

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_shards", full)
    checkpoints.save(2, {})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait() if ask == "wait" else checkpoints.save(3, {})
    assert [step for step, _ in checkpoint_dirs(tmp_path)] == [1]
    checkpoints.close()


def test_a_run_that_fails_lets_the_one_in_flight_end(tiny_model, tmp_path, held):
    policy, optimizer = trained(tiny_model, 0)
    checkpoints = writer(tmp_path, policy, optimizer)
    checkpoints.save(1, {})
    threading.Timer(0.2, held.set).start()
    checkpoints.close()
    assert [step for step, _ in checkpoint_dirs(tmp_path)] == [1]


def test_a_synchronous_one_is_there_on_return(tiny_model, tmp_path):
    policy, optimizer = trained(tiny_model, 0)
    checkpoints = CheckpointWriter(tmp_path, policy, optimizer, CheckpointConfig(keep_last=1))
    for step in (1, 2):
        checkpoints.save(step, {})
    assert [step for step, _ in checkpoint_dirs(tmp_path)] == [2]
    checkpoints.close()
