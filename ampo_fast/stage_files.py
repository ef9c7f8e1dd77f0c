"""Stage files, what a stage or a run leaves on disk: one line of JSON per prompt, embeddings in a .safetensors beside.

A row: {id, prompt: [messages], prompt_ids, responses: [{content, token_ids, logp, finish_reason, version, reward_raw,
reward, selected: null | "positive" | "negative"}]}; after selection also cost and skip_reason. logp is per token. Every
key is always there, null where its stage has not run. A given response with ratings by name also has scores: {name: number}.
Where several scorers judged, a response also has reward_by_scorer, their raw rewards in the order of reward.kind; reward_raw
is the mean. Numbers are written as repr, so they read back exactly; NaN is written as null.
Shapes: N candidates of a prompt, E embedding, n all candidates of a file.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ampo_fast.files import naming, save_tensors, write_atomic
from ampo_fast.jsonl import drop_torn_line, dump_line, is_number_or_null, read_jsonl
from ampo_fast.types import Candidate, CandidateGroup, GivenResponse, Prompt, ScoredGroup, SelectedGroup

Row = dict[str, Any]

_MARKS = {"positive", "negative", "None"}

# --- nouns to rows ----------------------------------------------------------------------------------------------------


def row_from_group(group: CandidateGroup) -> Row:
    """Given responses bring their ratings along, as reward_raw and scores: offline data can be scored from the file alone."""
    given = group.prompt.responses
    is_given = [response.content for response in given] == [candidate.content for candidate in group.candidates]
    ratings = given if is_given else [None] * len(group.candidates)
    return {
        "id": group.prompt.id,
        "prompt": list(group.prompt.messages),
        "prompt_ids": list(group.prompt_ids),
        "responses": [
            {
                "content": candidate.content,
                "token_ids": list(candidate.token_ids),
                "logp": [_null_if_not_finite(value) for value in candidate.logp],
                "finish_reason": candidate.finish_reason,
                "version": candidate.version,
                "reward_raw": _null_if_not_finite(rating.reward) if rating else None,
                "reward": None,
                "selected": None,
            }
            | ({"scores": dict(rating.scores)} if rating and rating.scores else {})
            for candidate, rating in zip(group.candidates, ratings, strict=True)
        ],
    }


def row_from_scored(scored: ScoredGroup) -> Row:
    row = row_from_group(scored.group)
    write_rewards(row, scored)
    return row


def row_from_selected(selected: SelectedGroup) -> Row:
    row = row_from_scored(selected.scored)
    mark(row, selected)
    return row


def write_rewards(row: Row, scored: ScoredGroup) -> None:
    """Writes raw and normalised rewards into the row's responses."""
    for i, response in enumerate(row["responses"]):
        response["reward_raw"] = _null_if_not_finite(scored.reward_raw[i])
        response["reward"] = _null_if_not_finite(scored.reward[i])
        if scored.reward_by_scorer:
            response["reward_by_scorer"] = [_null_if_not_finite(rewards[i]) for rewards in scored.reward_by_scorer]


def mark(row: Row, selected: SelectedGroup) -> None:
    """Writes the selection into the row."""
    for i, response in enumerate(row["responses"]):
        response["selected"] = "positive" if i in selected.positive else "negative" if i in selected.negative else None
    row["cost"] = _null_if_not_finite(selected.cost)
    row["skip_reason"] = selected.skip_reason


def _null_if_not_finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- rows to nouns ----------------------------------------------------------------------------------------------------


def group_from_row(row: Row, where: str = "row") -> CandidateGroup:
    """The group of a row; its prompt carries the responses and their raw rewards as given ones.

    Raises ValueError naming `where` and the key that is missing or of the wrong type.
    """
    try:
        candidates = tuple(
            Candidate(
                content=response["content"],
                token_ids=tuple(response["token_ids"]),
                logp=tuple(_nan_if_null(value) for value in response["logp"]),
                finish_reason=response["finish_reason"],
                version=response["version"],
            )
            for response in row["responses"]
        )
        given = tuple(
            GivenResponse(
                content=r["content"],
                reward=r.get("reward_raw"),
                scores=r.get("scores") or {},
                finish_reason=r["finish_reason"],
            )
            for r in row["responses"]
        )
        prompt = Prompt(id=row["id"], messages=tuple(row["prompt"]), responses=given)
        return CandidateGroup(prompt=prompt, prompt_ids=tuple(row["prompt_ids"]), candidates=candidates)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a row of a stage file ({error!r}); make it with `ampo-fast generate`") from None


def scored_from_row(row: Row, embedding: torch.Tensor, where: str = "row") -> ScoredGroup:
    """The group with its rewards as stored; valid is what has a normalised reward. embedding [N, E]."""
    group = group_from_row(row, where)
    reward = tuple(_nan_if_null(response.get("reward")) for response in row["responses"])
    return ScoredGroup(
        group=group,
        reward_raw=tuple(_nan_if_null(response.get("reward_raw")) for response in row["responses"]),
        reward=reward,
        valid=tuple(math.isfinite(value) for value in reward),
        embedding=embedding,
        reward_by_scorer=_by_scorer(row),
    )


def selected_from_row(row: Row, embedding: torch.Tensor) -> SelectedGroup:
    """The group with its selection as stored: positives by falling reward, negatives by index."""
    scored = scored_from_row(row, embedding)
    marks = [response.get("selected") for response in row["responses"]]
    side = {name: [i for i, value in enumerate(marks) if value == name] for name in ("positive", "negative")}
    return SelectedGroup(
        scored=scored,
        positive=tuple(sorted(side["positive"], key=lambda i: -scored.reward[i])),
        negative=tuple(side["negative"]),
        cost=_nan_if_null(row.get("cost")),
        skip_reason=row.get("skip_reason"),
    )


def raw_rewards(row: Row) -> list[float | tuple[float | None, ...] | None]:
    """What the scorers gave: a number for each response, or a tuple where there are several."""
    by_scorer = [response.get("reward_by_scorer") for response in row["responses"]]
    if all(by_scorer):
        return [tuple(rewards) for rewards in by_scorer]
    return [response.get("reward_raw") for response in row["responses"]]


def _by_scorer(row: Row) -> tuple[tuple[float, ...], ...]:
    rewards = [response.get("reward_by_scorer") for response in row["responses"]]
    if not all(rewards):
        return ()
    return tuple(tuple(map(_nan_if_null, column)) for column in zip(*rewards, strict=True))


def _nan_if_null(value: float | None) -> float:
    return math.nan if value is None else value


# --- files ------------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """All rows. Raises ValueError naming file and line where one is broken, not of a stage file, or repeats an id."""
    rows: list[Row] = []
    seen_at: dict[str, str] = {}
    for number, row in read_jsonl(Path(path)):
        where = f"{path}:{number}"
        _check_row(row, where)
        if row["id"] in seen_at:
            raise ValueError(f"{where}: id {row['id']!r} is already at {seen_at[row['id']]}; ids must be unique")
        seen_at[row["id"]] = where
        rows.append(row)
    return rows


def is_stage_row(row: Any) -> bool:
    return isinstance(row, dict) and not _wrong_keys(row)


def _check_row(row: Row, where: str) -> None:
    wrong = _wrong_keys(row)
    if wrong:
        raise ValueError(f"{where}: not a row of a stage file ({', '.join(wrong)}); make it with `ampo-fast generate`")


def _wrong_keys(row: Row) -> list[str]:
    wrong = [] if isinstance(row.get("id"), str) else ["id must be text"]
    if not (row.get("prompt") and _have_texts(row["prompt"], "role", "content")):
        wrong.append("prompt must be a list of messages, each with role and content")
    if not _have_texts(row.get("responses"), "content"):
        return [*wrong, "responses must be a list, each with text content"]
    numbers = [(name, response.get(name)) for response in row["responses"] for name in ("reward", "reward_raw")]
    wrong += sorted(
        {f"{name} = {value!r} must be a number or null" for name, value in numbers if not is_number_or_null(value)}
    )
    marks = {str(response.get("selected")) for response in row["responses"]}
    return wrong + [f"selected = {mark!r} must be positive, negative or null" for mark in sorted(marks - _MARKS)]


def _have_texts(items: Any, *keys: str) -> bool:
    return isinstance(items, list) and all(
        isinstance(item, dict) and all(isinstance(item.get(key), str) for key in keys) for item in items
    )


def embeddings_path(path: Path) -> Path:
    return Path(path).with_suffix(".safetensors")


def read_embeddings(path: Path, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The [N, E] blocks of a stage file's rows of these sizes. Raises ValueError where missing, broken or too few."""
    beside = embeddings_path(path)
    if not beside.is_file():
        raise ValueError(f"{beside} does not exist: run `ampo-fast embed` on {path} first")
    try:
        stacked_nE = load_file(beside)["embeddings"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{beside} does not hold embeddings ({error}); delete it and embed again") from None
    if stacked_nE.ndim != 2 or not stacked_nE.is_floating_point() or not bool(stacked_nE.isfinite().all()):
        raise ValueError(f"{beside} must hold finite floats, a row each response; delete it and embed again")
    if len(stacked_nE) != sum(sizes):
        count, wanted = len(stacked_nE), sum(sizes)
        raise ValueError(f"{beside} holds {count} embeddings, {path} has {wanted} responses; embed it again")
    return list(stacked_nE.split(list(sizes)))


def with_embeddings(path: Path, rows: Sequence[Row]) -> list[tuple[Row, torch.Tensor]]:
    """Each row of the stage file with its [N, E] block. Raises what read_embeddings raises."""
    return list(zip(rows, read_embeddings(path, [len(row["responses"]) for row in rows]), strict=True))


def write_rows_atomic(
    path: Path,
    items: Iterable[ScoredGroup | SelectedGroup | Row],
    embeddings: Sequence[torch.Tensor] | None = None,
) -> None:
    """Writes rows and their embeddings so that the row file exists whole or not at all (embeddings first).

    Groups bring their embeddings; for plain rows pass their [N, E] blocks, or None to write the rows alone.
    """
    items = list(items)
    groups = [item.scored if isinstance(item, SelectedGroup) else item for item in items]
    if groups and isinstance(groups[0], ScoredGroup):
        embeddings = [group.embedding for group in groups]
    rows = [_row(item) for item in items]
    if embeddings is not None:
        write_embeddings(path, embeddings)
    write_atomic(Path(path), lambda aside: aside.write_text("".join(map(dump_line, rows)), encoding="utf-8"))


def _row(item: ScoredGroup | SelectedGroup | Row) -> Row:
    if isinstance(item, SelectedGroup):
        return row_from_selected(item)
    return row_from_scored(item) if isinstance(item, ScoredGroup) else item


def write_embeddings(path: Path, blocks: Sequence[torch.Tensor]) -> None:
    """Stacks the rows' [N, E] blocks in file order into the .safetensors beside `path`, whole or not at all."""
    save_tensors(embeddings_path(path), {"embeddings": torch.cat(list(blocks))})


class RowWriter:
    """Appends rows to a file that survives kill -9: a torn last line is dropped on opening, finished rows are kept.

    with RowWriter(path) as writer:
        done = writer.groups(prompts)        # {prompt id: group} already in the file
        writer.write(groups)                 # on disk (fsync) when it returns
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.rows = self._recover()
        """What the file held when it was opened."""
        self._ids = {row["id"] for row in self.rows}
        self._file = self.path.open("a", encoding="utf-8")

    def _recover(self) -> list[Row]:
        if not self.path.exists():
            return []
        drop_torn_line(self.path)
        return read_rows(self.path) if self.path.stat().st_size else []

    def groups(self, prompts: Sequence[Prompt]) -> dict[str, CandidateGroup]:
        """The finished groups of these prompts, with the prompts as given."""
        by_id = {prompt.id: prompt for prompt in prompts}
        return {
            row["id"]: dataclasses.replace(group_from_row(row), prompt=by_id[row["id"]])
            for row in self.rows
            if row["id"] in by_id
        }

    def write(self, groups: Sequence[CandidateGroup]) -> None:
        """Leaves out what the file held when it was opened: a batch of which a part was written may be made again whole."""
        self.write_rows([row_from_group(group) for group in groups if group.prompt.id not in self._ids])

    def write_rows(self, rows: Sequence[Row]) -> None:
        with naming(self.path):
            self._file.write("".join(map(dump_line, rows)))
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        with naming(self.path):  # what a full disk did not take is tried once more
            self._file.close()
