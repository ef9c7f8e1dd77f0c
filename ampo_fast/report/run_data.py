"""What a run directory holds, read leniently: a broken line or a missing file is reported, not fatal."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ampo_fast.metrics import METRICS_FILE, scan_metrics
from ampo_fast.stage_files import is_stage_row

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunData:
    dir: Path
    config: Row
    """config.json; empty when absent."""
    versions: Row
    summary: Row
    """summary.json; empty while the run is going or when it was killed."""
    train: list[Row]
    """Lines of metrics.jsonl, one per optimizer step."""
    evals: list[Row]
    """Lines of metrics.jsonl, one per evaluation."""
    before: list[Row]
    """Stage-file rows of eval/before.jsonl."""
    after: list[Row]
    rollouts: dict[int, Path]
    """First step of a round -> its stage file, in order."""
    problems: list[str] = field(default_factory=list)
    """A sentence for each thing that could not be read."""

    def setting(self, key: str) -> Any:
        """The configured value of "section.field", or None where the configuration does not have it."""
        section, name = key.split(".")
        return self.config.get(section, {}).get(name)

    def rows(self, path: Path) -> list[Row]:
        """The sound rows of a stage file; broken ones go to `problems`, once."""
        rows, problems = scan_rows(path)
        self.problems.extend(problem for problem in problems if problem not in self.problems)
        return rows


def load_run(run_dir: Path) -> RunData:
    """Raises ValueError when the directory holds neither a configuration nor metrics."""
    run_dir = Path(run_dir)
    metrics, config = run_dir / METRICS_FILE, run_dir / "config.json"
    if not metrics.is_file() and not config.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it has neither config.json nor {METRICS_FILE}")
    problems: list[str] = []
    lines, broken = scan_metrics(metrics) if metrics.is_file() else ([], [f"{metrics} does not exist"])
    problems += broken
    run = RunData(
        dir=run_dir,
        config=_read_object(config, problems),
        versions=_read_object(run_dir / "versions.json", problems),
        summary=_read_object(run_dir / "summary.json", []),
        train=[line for line in lines if not _is_evaluation(line)],
        evals=[line for line in lines if _is_evaluation(line)],
        before=[],
        after=[],
        rollouts=_rollout_files(run_dir / "rollouts"),
        problems=problems,
    )
    for name, rows in (("before", run.before), ("after", run.after)):
        path = run_dir / "eval" / f"{name}.jsonl"
        if path.is_file():
            rows.extend(run.rows(path))
    return run


def scan_rows(path: Path) -> tuple[list[Row], list[str]]:
    """(rows with an id, a prompt and responses; a sentence per line that is not one). A repeated id is not one."""
    rows: list[Row] = []
    problems, seen = [], set()
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        problem = None
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            row, problem = None, "not JSON"
        if problem is None and not is_stage_row(row):
            problem = "not a row of a stage file"
        elif problem is None and row["id"] in seen:
            problem = f"id {row['id']!r} appears twice"
        if problem is None:
            rows.append(row)
            seen.add(row["id"])
        else:
            problems.append(f"{path}:{number}: {problem}; left out of this report")
    return rows, problems


def _is_evaluation(line: Row) -> bool:
    return any(key.startswith("eval/") for key in line)


def _rollout_files(folder: Path) -> dict[int, Path]:
    # The pattern leaves out step_000012.partial.jsonl: a round that is being sampled.
    found = {path: re.fullmatch(r"step_(\d+)\.jsonl", path.name) for path in folder.glob("step_*.jsonl")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def _read_object(path: Path, problems: list[str]) -> Row:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path} does not exist")
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not JSON: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path}: not a JSON object")
        return {}
    return value
