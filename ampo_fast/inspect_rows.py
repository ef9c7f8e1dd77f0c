"""`ampo-fast inspect`: the groups of a stage file, in the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ampo_fast.stage_files import read_rows

_MARK = {"positive": "+", "negative": "-", None: ""}


def inspect(path: Path, *, only: str | None, limit: int, console: Console) -> None:
    """Prints up to `limit` groups (or the one with id `only`), candidates by falling reward. ValueError: no such id."""
    rows = read_rows(path)
    if only is not None:
        rows = [row for row in rows if str(row["id"]) == only]
        if not rows:
            raise ValueError(f"{path} has no prompt with id {only!r}")
    for row in rows[:limit]:
        _print_group(row, console)
    if len(rows) > limit:
        console.print(f"({len(rows) - limit} more prompts; --limit {len(rows)} shows all)")


def _print_group(row: dict[str, Any], console: Console) -> None:
    console.print(Text(f"{row['id']}  {row['prompt'][-1]['content']}", style="bold"))
    table = Table(show_edge=False, pad_edge=False)
    for name, justify in (("", "left"), ("reward", "right"), ("tokens", "right"), ("end", "left"), ("response", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    seen: set[str] = set()
    for response in sorted(row["responses"], key=_falling_reward):
        text = response["content"].strip()
        end = response.get("finish_reason", "")
        note = f"{end} duplicate" if text in seen else end
        seen.add(text)
        reward = response.get("reward_raw", response.get("reward"))
        table.add_row(
            _MARK[response.get("selected")],
            "" if reward is None else f"{reward:.4f}",
            str(len(response.get("token_ids", ()))),
            note,
            Text(text),
        )
    console.print(table)
    console.print()


def _falling_reward(response: dict[str, Any]) -> float:
    reward = response.get("reward_raw", response.get("reward"))
    return math.inf if reward is None else -reward
