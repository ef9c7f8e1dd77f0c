"""What a bench's row says of the machine and the code that it was measured on, and that no row is lost."""

import os
import signal
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import rows

    return rows


def test_a_machine_without_git_keeps_its_rows(rows, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("AMPO_FAST_COMMIT", raising=False)
    assert rows.context("torch")["commit"] == "unknown"
    monkeypatch.setenv("AMPO_FAST_COMMIT", "1234567")  # what a machine that was sent the files alone is told
    assert rows.context("torch")["commit"] == "1234567"


def fails():
    raise MemoryError


def is_ended():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("second", "error", "times"), [(fails, MemoryError, 3), (is_ended, SystemExit, 1)])
def test_an_error_costs_its_own_call_alone_and_a_time_limit_what_was_not_yet_timed(rows, second, error, times):
    kept = {}
    before = signal.getsignal(signal.SIGTERM)

    def keep(seconds, results):
        kept.update({name: (len(samples), results[name]) for name, samples in seconds.items()})

    with pytest.raises(error):
        rows.alternate({"first": lambda: 7, "second": second}, 3, keep)
    assert kept == {"first": (times, 7)}
    assert signal.getsignal(signal.SIGTERM) == before


def test_calls_are_timed_in_turn_after_a_warm_up_each(rows):
    order = []
    seconds, results = rows.alternate({name: lambda name=name: order.append(name) or name for name in "ab"}, 3)
    assert "".join(order) == "aabb" + "abab"
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 3, "b": 3}
    assert results == {"a": "a", "b": "b"}
