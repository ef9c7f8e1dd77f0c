"""The stages alone, file to file: generate, score, embed, select. Each goes on where it was stopped.

Rows that the output holds are kept; the rest is computed batch by batch, each batch on disk before the next. Batches
are a function of the input alone and are redone whole, so that a stage that was stopped and resumed writes, byte for
byte, what one that was never stopped writes. An engine whose answers do not depend on the batch is asked for the missing
ones alone, and its groups are on disk as soon as each is finished. A sidecar OUTPUT.config.json holds the settings that
the stage depends on; others are refused. Embeddings beside the input follow the rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ampo_fast.config import Config
from ampo_fast.data import load_prompts
from ampo_fast.embeddings import make_embedder
from ampo_fast.files import save_tensors, write_atomic, write_json
from ampo_fast.jsonl import read_jsonl
from ampo_fast.model import Policy
from ampo_fast.progress import TrainingProgress
from ampo_fast.rewards import check_missing, make_reward, score_group
from ampo_fast.rollouts.batches import generation_batches
from ampo_fast.rollouts.engines import make_engine
from ampo_fast.rollouts.protocol import RolloutEngine
from ampo_fast.sampler import admit_prompts
from ampo_fast.select import RewardTolerance, select_groups
from ampo_fast.stage_files import (
    Row,
    RowWriter,
    embeddings_path,
    group_from_row,
    is_stage_row,
    mark,
    read_rows,
    row_from_group,
    scored_from_row,
    with_embeddings,
    write_rewards,
    write_rows_atomic,
)
from ampo_fast.types import GivenResponse, Prompt, ScoredGroup

_NO_JSONL = (".parquet", ".csv", ".tsv", ".json")

KeepRows = Callable[[Sequence[Row]], None]

_BATCH_PROMPTS = 64
"""Prompts scored, embedded or selected between two writes."""
_SERVED_PROMPTS = 1024
"""Prompts that servers are asked in one call: they idle at the end of a call alone, and its answers are in memory till then."""

_SETTINGS = {
    "generate": (
        "run.seed",
        "model.path",
        "model.dtype",
        "rollout.engine",
        "rollout.n",
        "rollout.temperature",
        "rollout.top_p",
        "rollout.top_k",
        "rollout.max_new_tokens",
        "rollout.batch_rows",
        "rollout.segment_tokens",
    ),
    "score": ("reward.kind", "reward.normalize", "rollout.truncated"),
    "embed": ("embed.model",),
    "select": (
        "run.seed",
        "select.strategy",
        "select.k",
        "select.coverage",
        "select.pareto",
        "loss.name",
        "reward.tol",
        "rollout.truncated",
    ),
}


def generate(config: Config, source: str | Path | None, output: Path) -> int:
    """Samples rollout.n candidates for every prompt of `source` (default data.train); returns how many rows are new."""
    is_offline = config.rollout.engine == "data"
    field = "--input" if source else "data.train"
    path, columns = str(source or config.data.train), config.data.columns
    prompts = load_prompts(path, needs_responses=is_offline, field=field, columns=columns)
    _claim("generate", config, output)
    policy = Policy.load(config.model)
    prompts = admit_prompts(prompts, policy, config, field)
    rollout = config.rollout
    sampling = rollout.sampling(config.run.seed)
    engine = make_engine(config, policy)
    batches = _asked_together(prompts, engine, policy, config)

    def answer(batch: Sequence[Prompt], keep: KeepRows) -> None:
        engine.generate(batch, rollout.n, sampling, lambda groups: keep(list(map(row_from_group, groups))))

    try:
        return _append("generate", output, prompts, batches, answer, singly=engine.answers_singly)
    finally:
        engine.close()


def _asked_together(
    prompts: Sequence[Prompt], engine: RolloutEngine, policy: Policy, config: Config
) -> list[list[Prompt]]:
    """The prompts of each call of the engine."""
    if engine.answers_for_all:  # servers, which batch what they are asked themselves
        return [list(prompts[at : at + _SERVED_PROMPTS]) for at in range(0, len(prompts), _SERVED_PROMPTS)]
    lengths = [len(policy.encode_prompt(prompt.messages)) for prompt in prompts]
    batches = generation_batches(lengths, config.rollout.n, config.rollout.batch_rows)
    return [[prompts[i] for i in batch] for batch in batches]


def score(config: Config, source: Path, output: Path) -> int:
    """Adds the raw and the normalised reward to every response; needs no embeddings. Returns how many rows are new."""
    rows = _input("score", config, source, output)
    reward_fn = make_reward(config)

    def judge(batch: Sequence[Row], keep: KeepRows) -> None:
        groups = [group_from_row(row, f"{source}, id {row['id']!r}") for row in batch]
        rewards = reward_fn(groups)
        check_missing(groups, rewards, config.reward.max_missing_share)
        for row, group, raw in zip(batch, groups, rewards, strict=True):
            write_rewards(row, score_group(group, raw, torch.empty(0), config))
        keep(batch)

    given = ("scores", "reward_raw") if config.reward.kind == "data" else ("scores",)
    added = _append("score", output, rows, _batches(rows), judge, reads=given)
    _copy_embeddings(source, output)
    return added


def embed(config: Config, source: Path, output: Path) -> int:
    """Copies the rows and writes every response's embedding beside them; returns how many rows were embedded.

    Finished batches wait in OUTPUT.parts/, under a digest of their texts, until the whole tensor can be written.
    """
    rows = _input("embed", config, source, output)
    parts = output.with_name(output.name + ".parts")
    done = _embedded(output, parts)
    todo = [batch for batch in _batches(rows) if not all(_digest(row) in done for row in batch)]
    if todo:
        parts.mkdir(parents=True, exist_ok=True)
        policy = Policy.load(config.model) if config.embed.model == "policy" else None
        embedder = make_embedder(config, policy)
        _embed_batches(embedder.embed, todo, done, parts, total=len(rows))
    write_rows_atomic(output, rows, [done[_digest(row)] for row in rows])
    shutil.rmtree(parts, ignore_errors=True)
    return sum(len(batch) for batch in todo)


def select(config: Config, source: Path, output: Path) -> int:
    """Marks 1 positive and k negatives in every row; a degenerate group carries its skip_reason instead."""
    rows = _input("select", config, source, output)
    if all(response.get("reward") is None for row in rows for response in row["responses"]):
        raise ValueError(f"{source} has no rewards: run `ampo-fast score` on it first")
    scored = {
        row["id"]: scored_from_row(row, block, f"{source}, id {row['id']!r}")
        for row, block in with_embeddings(source, rows)
    }
    _check_embeddings(list(scored.values()), output)
    tolerance = RewardTolerance(config.reward.tol).update(list(scored.values()))

    def choose(batch: Sequence[Row], keep: KeepRows) -> None:
        chosen = select_groups([scored[row["id"]] for row in batch], config, tolerance)
        for row, group in zip(batch, chosen, strict=True):
            mark(row, group)
        keep(batch)

    judged = ("reward", "reward_raw", "reward_by_scorer", "finish_reason")
    added = _append("select", output, rows, _batches(rows), choose, reads=judged)
    _copy_embeddings(source, output)
    return added


# --- resuming ---------------------------------------------------------------------------------------------------------


def _append(
    stage: str,
    output: Path,
    items: Sequence[Prompt] | Sequence[Row],
    batches: Sequence[Sequence[Any]],
    compute: Callable[[Sequence[Any], KeepRows], None],
    singly: bool = False,
    reads: Sequence[str] = (),
) -> int:
    """Computes the batches that the output lacks rows of; leaves the output in the order of `items`.

    compute hands over rows as they are finished. singly: of a batch only the items that have no row are computed. reads: the
    fields of a response, beside its text, that a row of the output rests on and still holds.
    """
    by_id = {_id(item): item for item in items}
    with RowWriter(output) as writer:
        _check_belongs(writer.rows, by_id, output, reads)
        done = {row["id"] for row in writer.rows}
        before = len(done)
        with TrainingProgress(len(by_id), before, unit="prompt", plain_interval_s=5) as progress:

            def keep(rows: Sequence[Row]) -> None:
                writer.write_rows([row for row in rows if row["id"] not in done])
                done.update(row["id"] for row in rows)
                progress.advance(len(rows))

            for batch in batches:
                missing = [item for item in batch if _id(item) not in done]
                if not missing:
                    continue
                asked = missing if singly else batch
                with progress.phase(stage, total=len(asked)):
                    compute(asked, keep)
                progress.step_done(len(done), {})
    _put_in_order(output, list(by_id))
    return len(done) - before


def _check_belongs(rows: Sequence[Row], by_id: dict[str, Any], output: Path, reads: Sequence[str]) -> None:
    """Rows of another input under the same name would be mixed in silently."""
    for row in rows:
        item = by_id.get(row["id"])
        if item is None:
            raise ValueError(f"{output} has a row {row['id']!r} that the input lacks; choose another --output")
        other = _what_differs(row, item, reads)
        if other:
            raise ValueError(f"{output}: row {row['id']!r} has other {other} than the input; choose another --output")


def _what_differs(row: Row, item: Prompt | Row, reads: Sequence[str]) -> str | None:
    if isinstance(item, Prompt):
        return None if row["prompt"] == list(item.messages) else "texts"
    if row["prompt"] != item["prompt"] or _texts(row) != _texts(item):
        return "texts"
    both = zip(row["responses"], item["responses"], strict=True)
    return "rewards" if any(ours.get(name) != theirs.get(name) for ours, theirs in both for name in reads) else None


def _check_embeddings(scored: Sequence[ScoredGroup], output: Path) -> None:
    """Of an output that was finished once, with as many rows: one that was stopped has none yet."""
    beside = embeddings_path(output)
    if not beside.is_file():
        return
    ours, theirs = torch.cat([group.embedding for group in scored]), load_file(beside)["embeddings"]
    if ours.shape == theirs.shape and not torch.equal(ours, theirs):
        raise ValueError(f"{beside} holds other embeddings than the input; choose another --output")


def _put_in_order(output: Path, ids: Sequence[str]) -> None:
    rows = read_rows(output)
    if [row["id"] for row in rows] != list(ids):
        place = {prompt_id: i for i, prompt_id in enumerate(ids)}
        write_rows_atomic(output, sorted(rows, key=lambda row: place[row["id"]]))


def _input(stage: str, config: Config, source: Path, output: Path) -> list[Row]:
    if source.resolve() == output.resolve():
        raise ValueError(f"--input and --output are both {source}; choose another --output")
    rows = [_as_stage_row(row) for row in _read(source, config.data.columns)]
    _claim(stage, config, output)
    return rows


def _read(source: Path, columns: Mapping[str, str]) -> list[Row]:
    """The rows of a stage file, or those of a data file of any format that brings responses."""
    if source.suffix not in _NO_JSONL and is_stage_row(next(read_jsonl(source))[1]):
        return read_rows(source)
    prompts = load_prompts(str(source), needs_responses=True, field="--input", columns=columns)
    return [
        {"id": prompt.id, "prompt": list(prompt.messages), "responses": list(map(_given, prompt.responses))}
        for prompt in prompts
    ]


def _given(response: GivenResponse) -> dict[str, Any]:
    scores = {"scores": dict(response.scores)} if response.scores else {}
    return {"content": response.content, "reward": response.reward, "finish_reason": response.finish_reason} | scores


def _as_stage_row(row: Row) -> Row:
    """A row of a data file, whose answers no engine sampled, with what scoring, embedding and selecting need; no tokens."""
    if "prompt_ids" in row or any("token_ids" in response for response in row["responses"]):
        return row
    unsampled = {"token_ids": [], "logp": [], "finish_reason": "stop", "version": 0}
    responses = [unsampled | {"reward_raw": given.get("reward")} | given for given in row["responses"]]
    return row | {"prompt_ids": [], "responses": responses}


def _claim(stage: str, config: Config, output: Path) -> None:
    """Writes the stage's settings beside the output, or checks that the output was begun with the same ones."""
    settings = {"stage": stage} | _settings(stage, config)
    sidecar = output.with_name(output.name + ".config.json")
    if output.exists():
        if not sidecar.exists():
            raise ValueError(f"{output} exists and was not begun by `ampo-fast {stage}`; choose another --output")
        begun = json.loads(sidecar.read_text())
        differing = [
            f"{name} = {begun.get(name)!r}, now {settings.get(name)!r}"
            for name in sorted(begun.keys() | settings.keys())
            if begun.get(name) != settings.get(name)
        ]
        if differing:
            raise ValueError(f"{output} was begun with {'; '.join(differing)}; choose another --output")
    if output.suffix in (".gz", *_NO_JSONL):
        raise ValueError(f"--output {output}: a stage file is plain JSON Lines; name it .jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(sidecar, settings)


def _settings(stage: str, config: Config) -> dict[str, Any]:
    names = [*_SETTINGS[stage]]
    if stage == "score" and config.reward.normalize == "auto":
        names.append("loss.name")  # which decides what auto is
    if stage == "embed" and config.embed.model == "policy":
        names += ["model.path", "model.dtype"]
    sections = config.model_dump(mode="json")
    return {name: sections[name.partition(".")[0]][name.partition(".")[2]] for name in names}


# --- embeddings -------------------------------------------------------------------------------------------------------


def _embed_batches(
    embed_texts: Callable[[Sequence[str]], torch.Tensor],
    batches: Sequence[Sequence[Row]],
    done: dict[str, torch.Tensor],
    parts: Path,
    total: int,
) -> None:
    num_done = total - sum(len(batch) for batch in batches)
    with TrainingProgress(total, num_done, unit="prompt", plain_interval_s=5) as progress:
        for batch in batches:
            with progress.phase("embed", total=len(batch)):
                texts = [text for row in batch for text in _texts(row)]
                blocks = embed_texts(texts).split([len(row["responses"]) for row in batch])
                fresh = {_digest(row): block for row, block in zip(batch, blocks, strict=True)}
                save_tensors(parts / f"{_digest(*batch)}.safetensors", {key: b.clone() for key, b in fresh.items()})
            done |= fresh
            num_done += len(batch)
            progress.step_done(num_done, {})


def _embedded(output: Path, parts: Path) -> dict[str, torch.Tensor]:
    """{digest of a row's texts: [N, E]} of what is already embedded."""
    done: dict[str, torch.Tensor] = {}
    if output.exists() and embeddings_path(output).exists():
        done |= {_digest(row): block for row, block in with_embeddings(output, read_rows(output))}
    for part in sorted(parts.glob("*.safetensors")):
        done |= load_file(part)
    return done


def _digest(*rows: Row) -> str:
    texts = [_texts(row) for row in rows]
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()


def _copy_embeddings(source: Path, output: Path) -> None:
    """The output has the input's rows in the input's order, so its embeddings are the same file."""
    if embeddings_path(source).exists():
        write_atomic(embeddings_path(output), lambda aside: shutil.copyfile(embeddings_path(source), aside))


# --- rows -------------------------------------------------------------------------------------------------------------


def _id(item: Prompt | Row) -> str:
    return item.id if isinstance(item, Prompt) else item["id"]


def _texts(row: Row) -> list[str]:
    return [response["content"] for response in row["responses"]]


def _batches(rows: Sequence[Row]) -> list[list[Row]]:
    return [list(rows[at : at + _BATCH_PROMPTS]) for at in range(0, len(rows), _BATCH_PROMPTS)]
