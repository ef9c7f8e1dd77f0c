"""`ampo-fast inspect`: the groups of a stage file, in the terminal; plain text where the output is none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ampo_fast.stage_files import read_rows

_SIGN = {"positive": "+", "negative": "-", None: ""}
_STYLE = {"positive": "green", "negative": "red", None: "dim"}


def inspect(path: Path, *, only: str | None, limit: int, console: Console) -> None:
    """Prints up to `limit` groups (or the one with id `only`), candidates by falling reward. ValueError: no such id."""
    rows = read_rows(path)
    if only is not None:
        rows = [row for row in rows if row["id"] == only]
        if not rows:
            raise ValueError(f"{path} has no prompt with id {only!r}")
    for row in rows[:limit]:
        _print_group(row, console)
    if len(rows) > limit:
        console.print(f"({len(rows) - limit} more prompts; --limit {len(rows)} shows all)")


def _print_group(row: dict[str, Any], console: Console) -> None:
    console.print(Text(row["id"], style="bold cyan"))
    for turn in row["prompt"]:
        console.print(Text(f"{turn['role']}: {_printable(turn['content'])}", style="bold"))
    repeats = _repeats(row["responses"])
    console.print(Text(_summary(row, repeats)))
    # The box's lines are for the eye; in a file they would only be in the way of grep.
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, show_edge=False, pad_edge=False)
    for name, justify in (("", "left"), ("reward", "right"), ("tokens", "right"), ("end", "left"), ("note", "left")):
        table.add_column(name, justify=justify, no_wrap=True)
    table.add_column("response", overflow="fold")
    for i in sorted(range(len(row["responses"])), key=lambda i: _falling_reward(row["responses"][i])):
        response = row["responses"][i]
        mark = response.get("selected")
        table.add_row(
            _SIGN[mark],
            _number(_raw_reward(response)),
            str(len(response.get("token_ids") or ()) or ""),  # of answers that no engine sampled nothing is known
            response.get("finish_reason", ""),
            "duplicate" if i in repeats else "" if response["content"].strip() else "empty",
            Text(_printable(response["content"].strip())),
            style=_STYLE[mark],
        )
    console.print(table)
    console.print()


def _summary(row: dict[str, Any], repeats: set[int]) -> str:
    responses = row["responses"]
    rewards = [reward for reward in map(_raw_reward, responses) if reward is not None]
    parts = [f"{len(responses)} candidates", f"{len(responses) - len(repeats)} distinct"]
    num_cut = sum(response.get("finish_reason") == "length" for response in responses)
    parts += [f"{num_cut} cut by the length limit"] if num_cut else []
    parts += [f"reward {min(rewards):.4f} to {max(rewards):.4f}"] if rewards else ["no rewards yet"]
    parts += [f"coverage cost {row['cost']:.4f}"] if row.get("cost") is not None else []
    parts += [f"left out: {row['skip_reason']}"] if row.get("skip_reason") else []
    return ", ".join(parts)


def _repeats(responses: list[dict[str, Any]]) -> set[int]:
    """Indices of responses whose text an earlier one has."""
    first: dict[str, int] = {}
    return {i for i, r in enumerate(responses) if first.setdefault(r["content"].strip(), i) != i}


def _raw_reward(response: dict[str, Any]) -> float | None:
    return response.get("reward_raw", response.get("reward"))


def _falling_reward(response: dict[str, Any]) -> float:
    reward = _raw_reward(response)
    return math.inf if reward is None else -reward


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _printable(text: str) -> str:
    """Control characters escaped: a model's answer must not move the reader's cursor."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
