"""Stage files: one line of JSON per prompt, embeddings in a .safetensors beside it. What a stage or a run leaves on disk.

A row: {id, prompt: [messages], prompt_ids, responses: [{content, token_ids, logp, finish_reason, version, reward_raw,
reward, selected: null | "positive" | "negative"}]}. logp is per token. Numbers are written as repr, so they read back
exactly; NaN is written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ampo_fast.jsonl import dump_line, read_jsonl
from ampo_fast.types import Candidate, CandidateGroup, GivenResponse, Prompt, ScoredGroup, SelectedGroup

_RESPONSE_KEYS = ("content", "token_ids", "logp", "finish_reason", "version")


def row_from_group(group: CandidateGroup) -> dict[str, Any]:
    responses = [{key: getattr(candidate, key) for key in _RESPONSE_KEYS} for candidate in group.candidates]
    empty = {"reward_raw": None, "reward": None, "selected": None}
    return {
        "id": group.prompt.id,
        "prompt": list(group.prompt.messages),
        "prompt_ids": list(group.prompt_ids),
        "responses": [response | empty for response in responses],
    }


def row_from_scored(scored: ScoredGroup) -> dict[str, Any]:
    row = row_from_group(scored.group)
    for response, raw, reward in zip(row["responses"], scored.reward_raw, scored.reward, strict=True):
        response |= {"reward_raw": _null_if_nan(raw), "reward": _null_if_nan(reward)}
    return row


def row_from_selected(selected: SelectedGroup) -> dict[str, Any]:
    row = row_from_scored(selected.scored)
    mark(row, selected)
    return row


def mark(row: dict[str, Any], selected: SelectedGroup) -> None:
    """Writes the selection into the row's responses."""
    for i, response in enumerate(row["responses"]):
        response["selected"] = "positive" if i in selected.positive else "negative" if i in selected.negative else None


def group_from_row(row: dict[str, Any], where: str = "row") -> CandidateGroup:
    """The group of a row. Raises ValueError naming `where` and the key that is missing or of the wrong type."""
    try:
        candidates = tuple(
            Candidate(
                content=response["content"],
                token_ids=tuple(response["token_ids"]),
                logp=tuple(response["logp"]),
                finish_reason=response["finish_reason"],
                version=response["version"],
            )
            for response in row["responses"]
        )
        given = tuple(GivenResponse(content=r["content"], reward=r.get("reward_raw")) for r in row["responses"])
        prompt = Prompt(id=row["id"], messages=tuple(row["prompt"]), responses=given)
        return CandidateGroup(prompt=prompt, prompt_ids=tuple(row["prompt_ids"]), candidates=candidates)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a row of a stage file ({error!r}); make it with `ampo-fast generate`") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows. Raises ValueError naming file and line."""
    return [row for _, row in read_jsonl(Path(path))]


def read_groups(path: Path) -> list[CandidateGroup]:
    return [group_from_row(row, f"{path}:{number}") for number, row in read_jsonl(Path(path))]


def raw_rewards(row: dict[str, Any]) -> list[float | None]:
    return [response.get("reward_raw") for response in row["responses"]]


def embeddings_path(path: Path) -> Path:
    return Path(path).with_suffix(".safetensors")


def read_embeddings(path: Path, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The [N, E] blocks of a stage file's rows of these sizes. Raises ValueError where the counts differ."""
    beside = embeddings_path(path)
    if not beside.is_file():
        raise ValueError(f"{beside} does not exist: run `ampo-fast embed` on {path} first")
    stacked = load_file(beside)["embeddings"]
    if len(stacked) != sum(sizes):
        raise ValueError(f"{beside} holds {len(stacked)} embeddings, {path} has {sum(sizes)} responses; embed it again")
    return list(stacked.split(list(sizes)))


def write_rows_atomic(path: Path, items: Iterable[ScoredGroup | SelectedGroup]) -> None:
    """Writes the rows and their embeddings so that the row file exists whole or not at all (embeddings first)."""
    items = list(items)
    scored = [item.scored if isinstance(item, SelectedGroup) else item for item in items]
    rows = [row_from_selected(item) if isinstance(item, SelectedGroup) else row_from_scored(item) for item in items]
    write_embeddings(path, [group.embedding for group in scored])
    _replace(Path(path), lambda aside: aside.write_text("".join(map(dump_line, rows)), encoding="utf-8"))


def write_embeddings(path: Path, blocks: Sequence[torch.Tensor]) -> None:
    stacked = torch.cat(list(blocks)).contiguous()
    _replace(embeddings_path(path), lambda aside: save_file({"embeddings": stacked}, aside))


def _replace(path: Path, write) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    write(aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


class RowWriter:
    """Appends rows to a file that survives kill -9: a torn last line is dropped on opening, finished rows are kept.

    with RowWriter(path) as writer:
        done = writer.groups(prompts)        # {prompt id: group} already in the file
        writer.write(groups)                 # on disk (fsync) when it returns
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.rows = self._recover()
        self._file = self.path.open("a", encoding="utf-8")

    def _recover(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("rb+") as file:
                file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def groups(self, prompts: Sequence[Prompt]) -> dict[str, CandidateGroup]:
        """The finished groups of these prompts, with the prompts as given."""
        return {group.prompt.id: group for group in map(group_from_row, self.rows)} if prompts else {}

    def write(self, groups: Sequence[CandidateGroup]) -> None:
        self.write_rows([row_from_group(group) for group in groups])

    def write_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        self._file.write("".join(map(dump_line, rows)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def _null_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
