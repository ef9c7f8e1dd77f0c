"""The peak of this process's memory, and of no other's."""

import subprocess
import sys

import pytest

from ampo_fast.memory import peak_rss_mib

CHILD = "from ampo_fast.memory import peak_rss_mib; {}; print(peak_rss_mib())"


def peak_of_child(code="pass"):
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(code)], capture_output=True, text=True, check=True, close_fds=False
    )
    return float(done.stdout)


def test_what_was_held_and_given_back_counts():
    assert peak_of_child("x = bytes(range(256)) * 2**20; del x") == pytest.approx(peak_of_child() + 256, abs=8)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process inherits the peak of the one that forked it")
def test_what_the_parent_holds_does_not():
    before = peak_of_child()
    held = bytes(range(256)) * 2**20
    assert peak_rss_mib() > 256
    assert peak_of_child() == pytest.approx(before, abs=8)
    del held
