"""Sections to read: held-out answers before and after side by side, and the groups of the last round."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ampo_fast.report.run_data import Row, RunData
from ampo_fast.report.section import Section, number

_NUM_PAIRS = 8
_NUM_GROUPS = 8


def completions_section(run: RunData) -> Section:
    head = {"id": "answers", "title": "Answers before and after"}
    after = {row["id"]: row for row in run.after}
    both = [(row, after[row["id"]]) for row in run.before if row["id"] in after]
    both = [(old, new) for old, new in both if old["responses"] and new["responses"]]
    if not both:
        return Section(**head, absent="The run has no held-out answers from before and after training to compare.")
    pairs = [
        {"prompt": _prompt(old), "before": _answer(old["responses"][0]), "after": _answer(new["responses"][0])}
        for old, new in both[:_NUM_PAIRS]
    ]
    text = (
        f"The first {len(pairs)} of {len(both)} held-out prompts, the first answer to each: in file order, not picked."
    )
    return Section(**head, sentences=[text], pairs=pairs)


def groups_section(run: RunData) -> Section:
    head = {"id": "groups", "title": "Groups of the last round"}
    if not run.rollouts:
        return Section(**head, absent="The run has kept no rollouts.")
    step, path = list(run.rollouts.items())[-1]
    return _groups_of(run, head, path, f"the round that began with step {step}")


def file_groups_section(run: RunData, path: Path) -> Section:
    """The first groups of one stage file."""
    return _groups_of(run, {"id": "groups", "title": "Groups"}, path, path.name)


def _groups_of(run: RunData, head: dict[str, str], path: Path, what: str) -> Section:
    rows = run.rows(path)
    if not rows:
        return Section(**head, absent=f"{path.name} has no row that could be read.")
    text = f"{min(len(rows), _NUM_GROUPS)} of {len(rows)} groups of {what}, best answer first."
    return Section(**head, sentences=[text], groups=[_group(row) for row in rows[:_NUM_GROUPS]])


def _group(row: Row) -> dict[str, Any]:
    answers = [_answer(response) for response in row["responses"]]
    answers.sort(key=lambda answer: -answer["order"])
    return {
        "prompt": _prompt(row),
        "skip_reason": row.get("skip_reason"),
        "cost": number(row.get("cost")) if row.get("cost") is not None else None,
        "answers": answers,
    }


def _prompt(row: Row) -> dict[str, Any]:
    return {"text": row["prompt"][-1]["content"], "num_earlier_turns": len(row["prompt"]) - 1}


def _answer(response: Row) -> dict[str, Any]:
    reward = response.get("reward_raw")
    return {
        "text": response["content"],
        "reward": number(reward),
        "normalized": number(response.get("reward")),
        "order": -math.inf if reward is None else reward,
        "num_tokens": len(response.get("token_ids") or ()),
        "is_cut": response.get("finish_reason") == "length",
        "selected": response.get("selected"),
    }
