"""The next round's groups, made on a thread of their own while the main thread trains on this one's.

At most one round is under way. Its thread asks servers and writes down what they answer; it never runs the policy, which
is being trained meanwhile, and takes part in no collective. Weights are handed over only after `wait`, when no request is
in flight: every candidate is then of one version from its first token to its last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ampo_fast.trace import Trace
from ampo_fast.types import CandidateGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeRound:
    groups: list[CandidateGroup]
    made_s: float
    waited_s: float
    """Of made_s, what the main thread waited for."""


class Lookahead:
    """One round at a time, made beside the main thread; all methods are the main thread's."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._index: int | None = None
        self._future: Future[tuple[list[CandidateGroup], float]] | None = None
        self._waited_s = 0.0

    def begin(self, index: int, make: Callable[[], list[CandidateGroup]]) -> None:
        """Runs make() for round `index` on the thread. Raises ValueError where another round was not taken."""
        if self._future is not None:
            raise ValueError(f"round {self._index} was made ahead and not taken; round {index} cannot begin")
        self._index, self._waited_s = index, 0.0
        self._future = self._pool.submit(self._run, index, make)

    def _run(self, index: int, make: Callable[[], list[CandidateGroup]]) -> tuple[list[CandidateGroup], float]:
        started = time.time()
        try:
            return make(), time.time() - started
        finally:
            self._trace.add("rollouts", f"generate round {index + 1}", started, time.time())

    def wait(self) -> None:
        """Returns when no request is in flight. Raises what the round's making raised."""
        if self._future is None:
            return
        started = time.time()
        self._future.result()
        self._waited_s += time.time() - started

    def take(self, index: int) -> MadeRound | None:
        """The round, waited for; None where it was not begun. Raises what its making raised."""
        if self._index != index or self._future is None:
            return None
        self.wait()
        (groups, made_s), self._future = self._future.result(), None
        return MadeRound(groups=groups, made_s=made_s, waited_s=self._waited_s)

    def close(self) -> None:
        """Waits for the thread, which ends early once its engine is closed."""
        self._pool.shutdown(wait=True, cancel_futures=True)
