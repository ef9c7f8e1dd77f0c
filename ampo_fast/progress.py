"""What a person sees while long work runs: a live display on a terminal, plain lines anywhere else.

Everything goes to stderr; stdout belongs to the last JSON line.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class TrainingProgress:
    """Shows step, running phase, the phases' shares of the time, tokens/s, reward, loss, time left.

    with TrainingProgress(total_steps=30) as progress:
        for step in range(1, 31):
            with progress.phase("generate"):
                ...
            with progress.phase("score", total=len(batches)):
                ...; progress.advance()
            log.log(step, metrics | {f"time/{name}": s for name, s in progress.phase_s.items()})
            progress.step_done(step, metrics)      # also clears phase_s

    `phase_s` holds the seconds per phase since the last `step_done`. A phase within a phase is
    shown while it runs, and its seconds belong to the outer one. The time left is remaining steps x
    the mean phase seconds of a step, evaluations not counted. `on_phase` is told of every phase that begins, `on_span` of
    every outermost one that ended: (name, start, end) in seconds since 1970.
    For other long work name its `unit`, and give `plain_interval_s` so that the plain form prints at most one line in
    that time.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        unit: str = "step",
        plain_interval_s: float = 0.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
        on_phase: Callable[[str], None] = lambda name: None,
        on_span: Callable[[str, float, float], None] = lambda name, start, end: None,
    ) -> None:
        self._on_phase, self._on_span = on_phase, on_span
        self.phase_s: dict[str, float] = {}
        self._total_s: dict[str, float] = {}
        self._total_steps, self._step, self._start_step = total_steps, start_step, start_step
        self._unit, self._plain_interval_s = unit, plain_interval_s
        self._stream = stream or sys.stderr
        self._clock = clock
        self._metrics: dict[str, float] = {}
        self._step_seconds_sum = 0.0
        self._last_line_at: float | None = None
        self._running: list[_Phase] = []
        self._live: Live | None = None

    def __enter__(self) -> TrainingProgress:
        if _is_terminal(self._stream):
            console = Console(file=self._stream)
            # Twice a second: the redraw thread must not take time from the training threads.
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2, transient=False)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Times what runs inside under `name`; `total` is how far `advance` will count."""
        self._running.append(_Phase(name, total))
        self._on_phase(name)
        started = self._clock()
        try:
            yield
        finally:
            self._running.pop()
            if not self._running:
                seconds = self._clock() - started
                self.phase_s[name] = self.phase_s.get(name, 0.0) + seconds
                self._total_s[name] = self._total_s.get(name, 0.0) + seconds
                now = time.time()
                self._on_span(name, now - seconds, now)

    def advance(self, count: int = 1) -> None:
        """Moves the running phase on by `count`; outside a phase it does nothing."""
        if self._running:
            self._running[-1].done += count

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the step's numbers, and starts the next step's `phase_s`."""
        self._step, self._metrics = step, dict(metrics)
        self._step_seconds_sum += sum(s for name, s in self.phase_s.items() if name != "eval")
        if self._live is None and self._is_line_due():
            self._print(self._plain_line())
        self.phase_s = {}

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live display where there is one."""
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            self._print(text)

    def eta_s(self) -> float | None:
        """Seconds left, or None before the first finished step."""
        steps_seen = self._step - self._start_step
        if steps_seen <= 0:
            return None
        return self._step_seconds_sum / steps_seen * (self._total_steps - self._step)

    def shares(self) -> dict[str, float]:
        """Each phase's share of all phase seconds so far, largest first; shares sum to 1."""
        total = sum(self._total_s.values())
        ordered = sorted(self._total_s.items(), key=lambda item: -item[1])
        return {name: seconds / total for name, seconds in ordered} if total > 0 else {}

    def _is_line_due(self) -> bool:
        now = self._clock()
        last, is_end = self._last_line_at, self._step >= self._total_steps
        if last is not None and not is_end and now - last < self._plain_interval_s:
            return False
        self._last_line_at = now
        return True

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _numbers(self) -> list[str]:
        parts = [f"{key} {self._metrics[key]:.4f}" for key in ("reward", "loss") if key in self._metrics]
        if "group/count" in self._metrics:
            parts.append(f"trained {self._metrics['group/trained']}/{self._metrics['group/count']}")
        if "perf/tokens_per_second" in self._metrics:
            parts.append(f"{self._metrics['perf/tokens_per_second']:,.0f} tokens/s")
        return parts

    def _plain_line(self) -> str:
        step_s = sum(self.phase_s.values())
        split = ", ".join(f"{name} {seconds / step_s:.0%}" for name, seconds in self.phase_s.items() if step_s > 0)
        parts = [f"{self._unit} {self._step}/{self._total_steps}", *self._numbers()]
        if split:
            parts.append(f"{step_s:.1f} s ({split})")
        eta = self.eta_s()
        if eta:
            parts.append(f"eta {_duration(eta)}")
        return "  ".join(parts)

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 2))
        eta = self.eta_s()
        head.add_row(
            Text(f"{self._unit} {self._step}/{self._total_steps}", style="bold"),
            ProgressBar(total=self._total_steps, completed=self._step, width=30),
            *(Text(part) for part in self._numbers()),
            Text(f"eta {_duration(eta)}" if eta is not None else "eta --:--", style="cyan"),
        )
        split = "  ".join(f"{name} {share:.0%}" for name, share in self.shares().items())
        now = " > ".join(str(phase) for phase in list(self._running))
        phases = Text(f"{now or 'waiting':<28}", style="green") + Text(split, style="dim")
        return Group(head, phases)


class _Phase:
    def __init__(self, name: str, total: int | None) -> None:
        self.name, self.total, self.done = name, total, 0

    def __str__(self) -> str:
        return self.name if self.total is None else f"{self.name} {self.done}/{self.total}"


def _is_terminal(stream: TextIO) -> bool:
    # Not rich's own test: FORCE_COLOR would let control characters into a log file.
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
