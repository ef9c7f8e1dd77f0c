"""Before against after on the same held-out prompts, for the summary line and the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def paired_summary(
    before_rows: Sequence[Mapping[str, Any]], after_rows: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Means, paired standard error and win rate of raw rewards over prompts that both files scored.

    With m_p the mean raw reward of prompt p's samples and d_p = m_p(after) - m_p(before) over P
    prompts: reward = mean_p m_p, reward_se = sqrt(sum (d_p - mean d)^2 / (P - 1) / P) (None for one
    prompt), and win_rate = mean of [d_p > 0] + [d_p = 0] / 2. Rows are stage-file rows; samples
    without a reward are left out of m_p, prompts without one on either side are left out of
    everything (num_prompts says how many stayed).

    Returns reward_before, reward_after, reward_se, win_rate, num_prompts. Raises ValueError when an
    id appears twice in a file or no prompt is scored in both.
    """
    before, after = prompt_means(before_rows), prompt_means(after_rows)
    ids = [key for key in before if key in after]
    if not ids:
        raise ValueError(f"no prompt has a reward both before ({len(before)} have) and after ({len(after)} have)")
    differences = [after[key] - before[key] for key in ids]
    wins = [1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences]
    return {
        "reward_before": statistics.fmean(before[key] for key in ids),
        "reward_after": statistics.fmean(after[key] for key in ids),
        "reward_se": _standard_error(differences),
        "win_rate": statistics.fmean(wins),
        "num_prompts": len(ids),
    }


def print_completions(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], file: Any) -> None:
    """The first held-out prompts before and after, one above the other."""
    for old, new in list(zip(before, after, strict=True))[:6]:
        print(f"\n{old['prompt'][-1]['content']}", file=file)
        for name, row in (("before", old), ("after", new)):
            response = row["responses"][0]
            reward = "none" if response["reward_raw"] is None else f"{response['reward_raw']:.2f}"
            print(f"  {name:>6} [{reward}] {response['content']!r}", file=file)


def prompt_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Prompt id -> mean raw reward of its scored samples, in file order; left out without any."""
    means: dict[str, float] = {}
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(f"prompt id {row['id']!r} appears twice in the evaluation rows")
        seen.add(row["id"])
        rewards = [response.get("reward_raw") for response in row["responses"]]
        scored = [float(r) for r in rewards if r is not None and math.isfinite(r)]
        if scored:
            means[row["id"]] = statistics.fmean(scored)
    return means


def num_unscored(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many responses of the rows carry no finite raw reward."""
    rewards = [response.get("reward_raw") for row in rows for response in row["responses"]]
    return sum(1 for r in rewards if r is None or not math.isfinite(r))


def _standard_error(differences: Sequence[float]) -> float | None:
    count = len(differences)
    return statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
