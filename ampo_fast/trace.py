"""Who did what when: spans of time in trace.jsonl, one line each, {"lane", "name", "start", "end"} in seconds since 1970.

Two lanes: "trainer", the phases of the main thread, and "rollouts", the rounds sampled ahead of it.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

TRACE_FILE = "trace.jsonl"

Span = dict[str, Any]
_SHORTEST_S = 1e-3
"""Shorter spans are dropped: nobody could see them."""


class Trace:
    """Appends spans to a file; from any thread. Without a path it drops them."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()

    def add(self, lane: str, name: str, start: float, end: float) -> None:
        if self._path is None or end - start < _SHORTEST_S:
            return
        line = json.dumps({"lane": lane, "name": name, "start": round(start, 4), "end": round(end, 4)})
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Means over the rounds that were sampled ahead, in seconds; a round lasts from the begin of its sampling to the next's."""

    wall_s: float
    generate_s: float
    train_s: float
    """The trainer's own phases: what it did not wait for."""
    bound_s: float
    """max(generate, train) of each round: no schedule of the two is faster."""
    num_rounds: int


def read_spans(path: Path) -> list[Span]:
    """The spans of a trace, by their start; lines that are none (torn by a kill) are left out."""
    spans: list[Span] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            span = json.loads(line)
            times = {key: float(span[key]) for key in ("start", "end")}
            spans.append({"lane": str(span["lane"]), "name": str(span["name"])} | times)
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(spans, key=lambda span: span["start"])


def overlap(spans: Sequence[Span]) -> Overlap | None:
    """How well sampling and training ran beside each other; None where fewer than two rounds were sampled ahead."""
    ahead = [span for span in spans if span["lane"] == "rollouts"]
    busy = [span for span in spans if span["lane"] == "trainer" and span["name"] != "generate"]
    rounds = []
    for span, following in itertools.pairwise(ahead):
        start, end = span["start"], following["start"]
        train_s = sum(max(0.0, min(end, s["end"]) - max(start, s["start"])) for s in busy)
        rounds.append((end - start, span["end"] - start, train_s))
    if not rounds:
        return None
    wall_s, generate_s, train_s = map(fmean, zip(*rounds, strict=True))
    bound_s = fmean(max(made, trained) for _, made, trained in rounds)
    return Overlap(wall_s=wall_s, generate_s=generate_s, train_s=train_s, bound_s=bound_s, num_rounds=len(rounds))
