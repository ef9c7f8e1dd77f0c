"""The stages alone, file to file: generate, score, embed, select. Each resumes where it was stopped.

Rows that the output already holds are kept; the rest is computed and appended, one line per prompt. A sidecar
OUTPUT.config.json remembers the settings that the stage depends on, and another configuration is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ampo_fast.config import Config
from ampo_fast.data import load_prompts
from ampo_fast.embeddings import make_embedder
from ampo_fast.model import Policy
from ampo_fast.progress import TrainingProgress
from ampo_fast.rewards import check_missing, make_reward, normalize_rewards, normalizer_for, score_group, valid_candidates
from ampo_fast.rollouts import generation_batches, make_engine
from ampo_fast.sampler import admit_prompts
from ampo_fast.select import RewardTolerance, select_groups
from ampo_fast.stage_files import (
    RowWriter,
    embeddings_path,
    group_from_row,
    mark,
    raw_rewards,
    read_embeddings,
    read_rows,
    row_from_group,
    write_embeddings,
)
from ampo_fast.types import CandidateGroup, Sampling

Row = dict[str, Any]
_BATCH = 64
"""Prompts scored or selected between two writes."""

_SETTINGS = {
    "generate": ("data.train", "model.path", "model.dtype", "rollout", "run.seed"),
    "score": ("reward", "rollout.truncated", "loss.name"),
    "embed": ("embed",),
    "select": ("select", "reward.tol", "rollout.truncated", "run.seed"),
}


def generate(config: Config, source: Path | None, output: Path) -> int:
    """Samples rollout.n candidates for every prompt of `source` (default data.train); returns how many rows are new."""
    _check_settings("generate", config, output, source)
    prompts = load_prompts(str(source) if source else config.data.train)
    policy = Policy.load(config.model)
    prompts = admit_prompts(prompts, policy, config, "the prompts")
    engine = make_engine(config, policy)
    rollout = config.rollout
    sampling = Sampling(
        temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k,
        max_new_tokens=rollout.max_new_tokens, seed=config.run.seed,
    )  # fmt: skip
    lengths = [len(policy.encode_prompt(prompt.messages)) for prompt in prompts]
    batches = [[prompts[i] for i in batch] for batch in generation_batches(lengths, rollout.n, rollout.batch_rows)]

    def rows(batch: Sequence[Any]) -> list[Row]:
        return [row_from_group(group) for group in engine.generate(batch, rollout.n, sampling)]

    return _append("generate", output, batches, lambda prompt: prompt.id, rows)


def score(config: Config, source: Path, output: Path) -> int:
    """Adds reward_raw and the normalised reward to every response."""
    _check_settings("score", config, output, source)
    reward_fn = make_reward(config)

    def rows(batch: Sequence[Row]) -> list[Row]:
        groups = [_group(row) for row in batch]
        rewards = reward_fn(groups)
        check_missing(groups, rewards, config.reward.max_missing_share)
        for row, group, raw in zip(batch, groups, rewards, strict=True):
            _write_rewards(row, group, raw, config)
        return list(batch)

    return _append("score", output, _batches(read_rows(source)), lambda row: row["id"], rows)


def _write_rewards(row: Row, group: CandidateGroup, raw: Sequence[float | None], config: Config) -> None:
    numbers = [math.nan if value is None else float(value) for value in raw]
    valid = valid_candidates(group, numbers, config.rollout.truncated)
    rewards = normalize_rewards(numbers, valid, normalizer_for(config))
    for response, value, reward in zip(row["responses"], numbers, rewards, strict=True):
        response["reward_raw"] = value if math.isfinite(value) else None
        response["reward"] = reward if math.isfinite(reward) else None


def embed(config: Config, source: Path, output: Path) -> int:
    """Writes the embeddings of every response beside the rows. Done as a whole: it is fast, and one tensor."""
    _check_settings("embed", config, output, source)
    rows = read_rows(source)
    policy = Policy.load(config.model) if config.embed.model == "policy" else None
    embedder = make_embedder(config, policy)
    blocks = []
    with TrainingProgress(len(rows), unit="prompt", plain_interval_s=5) as progress, progress.phase("embed"):
        for i, row in enumerate(rows, 1):
            blocks.append(embedder.embed([response["content"] for response in row["responses"]]))
            progress.step_done(i, {})
    output.unlink(missing_ok=True)
    write_embeddings(output, blocks)
    return _append("embed", output, _batches(rows), lambda row: row["id"], list)


def select(config: Config, source: Path, output: Path) -> int:
    """Marks 1 positive and k negatives in every row; a degenerate group stays unmarked."""
    _check_settings("select", config, output, source)
    rows = read_rows(source)
    blocks = dict(zip([row["id"] for row in rows], read_embeddings(source, [len(r["responses"]) for r in rows]), strict=True))
    scored = {
        row["id"]: score_group(_group(row), raw_rewards(row), blocks[row["id"]], config) for row in rows
    }
    tolerance = RewardTolerance(config.reward.tol).update(list(scored.values()))

    def marked(batch: Sequence[Row]) -> list[Row]:
        chosen = select_groups([scored[row["id"]] for row in batch], config, tolerance)
        for row, selected in zip(batch, chosen, strict=True):
            mark(row, selected)
        return list(batch)

    added = _append("select", output, _batches(rows), lambda row: row["id"], marked)
    if embeddings_path(output) != embeddings_path(source):
        write_embeddings(output, [blocks[row["id"]] for row in read_rows(output)])
    return added


def _group(row: Row) -> CandidateGroup:
    return group_from_row(row, f"row {row.get('id')!r}")


def _batches(rows: Sequence[Row]) -> list[list[Row]]:
    return [list(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH)]


def _append(
    stage: str,
    output: Path,
    batches: Sequence[Sequence[Any]],
    key: Callable[[Any], str],
    compute: Callable[[Sequence[Any]], list[Row]],
) -> int:
    """Runs `compute` on what the output lacks, batch by batch, each on disk before the next; returns the new rows."""
    total = sum(len(batch) for batch in batches)
    added = 0
    with RowWriter(output) as writer:
        done = {row["id"] for row in writer.rows}
        seen = 0
        with TrainingProgress(total, unit="prompt", plain_interval_s=5) as progress:
            for batch in batches:
                todo = [item for item in batch if key(item) not in done]
                if todo:
                    with progress.phase(stage):
                        rows = compute(todo)
                    writer.write_rows(rows)
                    added += len(rows)
                seen += len(batch)
                progress.step_done(seen, {})
    return added


def _check_settings(stage: str, config: Config, output: Path, source: Path | None) -> None:
    """Remembers the settings that the stage depends on, and refuses to add rows made with others."""
    if source is not None and output.resolve() == source.resolve():
        raise ValueError(f"--output {output} is the input; a stage never writes over what it reads")
    resolved = json.loads(config.model_dump_json())
    settings = {name: _lookup(resolved, name) for name in _SETTINGS[stage]}
    sidecar = output.with_name(output.name + ".config.json")
    if sidecar.exists() and output.exists():
        before = json.loads(sidecar.read_text())
        differing = [name for name in settings if before.get(name) != settings[name]]
        if differing:
            raise ValueError(
                f"{output} was made with another {', '.join(differing)} "
                f"({'; '.join(f'{name}: {before.get(name)} -> {settings[name]}' for name in differing)}); "
                "choose another --output"
            )
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    sidecar.write_text(json.dumps(settings, indent=2) + "\n")


def _lookup(values: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        values = values[part]
    return values
