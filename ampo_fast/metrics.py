"""metrics.jsonl, one JSON object a line, and the trackers that are asked for beside it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ampo_fast.files import write_atomic

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends one line per `log` call to RUN/metrics.jsonl, and tells the trackers asked for.

    A line is on disk (fsync) before `log` returns; a number that is not finite is written as null.
    With `resume_step`, lines of later steps and a torn last line are dropped first, by an atomic
    rewrite, so that a resumed run leaves the same file as one that was never stopped; -1 drops all.

    Raises ValueError when the run already has metrics and `resume_step` is None, or a tracker is
    unknown; ImportError, with the package to install, when a tracker asked for is missing.
    """

    def __init__(self, run_dir: Path, trackers: Sequence[str] = (), *, resume_step: int | None = None) -> None:
        run_dir = Path(run_dir)
        self.path = run_dir / METRICS_FILE
        if resume_step is not None:
            _truncate_after(self.path, resume_step)
        elif self.path.exists() and self.path.stat().st_size:
            raise ValueError(f"{self.path} already holds a run's metrics; resume it or choose another run.name")
        self._trackers = [_open_tracker(name, run_dir, resume_step) for name in trackers]
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes {"step": step, **metrics}; one step may have a training and an evaluation line."""
        finite = {key: _finite_or_none(value) for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        numbers = {key: value for key, value in finite.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def close(self) -> None:
        """Closes the file and the trackers; safe to call twice."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a torn last one (its writer was killed, or is at work).

    Raises ValueError naming file and line for any other broken line.
    """
    rows, problems = scan_metrics(path)
    if problems:
        raise ValueError("; ".join(problems))
    return rows


def scan_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """As read_metrics, but returns (good lines, a sentence per broken line), raising nothing."""
    rows: list[dict[str, Any]] = []
    problems = []
    # Split on "\n" alone and bytewise: a kill can cut a line inside a UTF-8 character.
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            problems.append(f'{path}:{number}: not a JSON object with an integer "step"')
    return rows, problems


def _truncate_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    # json round-trips floats exactly (repr), so a kept line is the line that was written.
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
    write_atomic(path, lambda aside: aside.write_text(lines, encoding="utf-8"))


def _finite_or_none(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events at purge_step and later are hidden: those that the resumed run writes again.
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=purge_step, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        import wandb

        id_file = run_dir / "wandb_id"
        known = resume_step is not None and id_file.exists()
        self._run = wandb.init(
            project="ampo_fast",
            name=run_dir.name,
            dir=str(run_dir),
            id=id_file.read_text(encoding="utf-8") if known else None,
            resume="allow" if known else None,
        )
        id_file.write_text(self._run.id, encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[Path, int | None], Any]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that is not known, ImportError for one whose package is missing."""
    for name in names:
        if name not in _TRACKERS:
            raise ValueError(f"run.trackers has {name!r}; known: {', '.join(_TRACKERS)}")
        try:
            import_module(_MODULES[name])
        except ImportError as error:
            raise ImportError(_missing(name)) from error


def _open_tracker(name: str, run_dir: Path, resume_step: int | None) -> Any:
    check_trackers([name])
    return _TRACKERS[name](run_dir, resume_step)


def _missing(package: str) -> str:
    return (
        f"run.trackers asks for {package}, which is not installed: pip install {package}, "
        f"or leave it out of run.trackers (metrics.jsonl is always written)"
    )
