"""SIGTERM and SIGUSR1 as a wish to stop, so that a scheduler's warning becomes a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    reason: str | None = None
    """The signal's name, once one has come."""


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGTERM and SIGUSR1 ask for a stop after the running step; handlers are put back afterwards."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        stop.reason = signal.Signals(number).name

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
