"""Prompts and multi-response data from files: every format is recognised by its columns and read by one small function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from ampo_fast.jsonl import read_jsonl
from ampo_fast.types import GivenResponse, Prompt

Row = dict[str, Any]
Turns = tuple[dict[str, str], ...]

_ROLES = ("system", "user", "assistant", "tool")


def load_prompts(source: str) -> list[Prompt]:
    """Reads a .jsonl, .jsonl.gz or .parquet file, package:NAME, or a `datasets` name (NAME or NAME:SPLIT).

    Formats, by their columns: prompts only (`prompt` as text or chat turns, or `messages`); `responses` with content and
    reward; AMPO's published columns; A0, A1, ... with score_A0, ...; preference pairs (TRL, UltraFeedback-binarized).

    Raises:
        ValueError: naming file and line, for anything that cannot be read as one of them, and for a repeated id.
    """
    prompts: list[Prompt] = []
    first_seen: dict[str, str] = {}
    for where, number, row in _rows(source):
        try:
            prompt = _read_row(row, number)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            text = f"missing field {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{where}: {text}") from None
        if prompt.id in first_seen:
            raise ValueError(f"{where}: id {prompt.id!r} is also at {first_seen[prompt.id]}; ids must be unique")
        first_seen[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{source} holds no rows")
    return prompts


def _rows(source: str) -> Iterator[tuple[str, int, Row]]:
    """(where, row number from 1, row)"""
    if source.startswith("package:"):
        name = source.removeprefix("package:")
        path = Path(str(files("ampo_fast") / "prompts" / f"{name}.jsonl"))
        if not path.is_file():
            known = sorted(f"package:{p.stem}" for p in path.parent.glob("*.jsonl"))
            raise ValueError(f"{source!r} does not ship with ampo_fast; known: {', '.join(known)}")
    else:
        path = Path(source)
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from ((f"{path}:{number}", number, row) for number, row in read_jsonl(path))
    elif path.exists():
        raise ValueError(f"{source}: a data file must end in .jsonl, .jsonl.gz or .parquet")
    else:
        yield from _hub_rows(source)


def _parquet_rows(path: Path) -> Iterator[tuple[str, int, Row]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"{path}: Parquet needs pyarrow: pip install 'ampo-fast[data]'") from error
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
    yield from ((f"{path}:row {number}", number, row) for number, row in enumerate(table.to_pylist(), 1))


def _hub_rows(source: str) -> Iterator[tuple[str, int, Row]]:
    if source.startswith((".", "/")) or not source:
        raise ValueError(f"{source} does not exist")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{source!r} is no file; as a hub name it needs: pip install 'ampo-fast[data]'") from error
    name, _, split = source.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises many types for "no such set" and "no network"; all mean this
        raise ValueError(f"{source!r} is neither a file nor a data set that a hub gave: {error}") from error
    yield from ((f"{source}:row {number}", number, row) for number, row in enumerate(rows, 1))


# --- one row ----------------------------------------------------------------------------------------------------------


def _read_row(row: Row, number: int) -> Prompt:
    for is_format, read in _FORMATS:
        if is_format(row):
            turns, responses = read(row)
            break
    else:
        raise ValueError(
            f"columns {', '.join(sorted(row)) or '(none)'} fit no known format; expected prompt or messages, with "
            "responses, all_generated_responses + all_reward_scores, A0.. + score_A0.., or chosen + rejected"
        )
    _check_turns(turns)
    return Prompt(id=_row_id(row, number), messages=turns, responses=responses)


def _row_id(row: Row, number: int) -> str:
    given = row.get("id", row.get("prompt_id"))
    return str(number) if given is None else str(given)


def _turns(value: Any, field: str) -> Turns:
    """Text becomes one user turn; chat turns stay."""
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if not isinstance(value, list | tuple) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"{field} must be text or a list of chat turns, got {type(value).__name__}")
    for i, turn in enumerate(value):
        if turn.get("role") not in _ROLES or not isinstance(turn.get("content"), str):
            raise ValueError(f"{field}[{i}] must have role ({', '.join(_ROLES)}) and text content")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in value)


def _check_turns(turns: Turns) -> None:
    if not any(turn["role"] == "user" for turn in turns):
        raise ValueError("the prompt has no user turn")
    if turns[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"the prompt must end with the user's turn, it ends with the {turns[-1]['role']}'s")
    if not turns[-1]["content"].strip():
        raise ValueError("the prompt's last turn is empty")


def _answer(value: Any, field: str) -> str:
    """The response text of a string, of chat turns (the last assistant turn), or of one turn."""
    if isinstance(value, str):
        return value
    turns = _turns([value] if isinstance(value, dict) else value, field)
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"{field} must end with an assistant turn")
    return turns[-1]["content"]


def _number(value: Any, field: str) -> float | None:
    """A finite reward, or None (null, NaN): counted and masked later."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{field} must be a number or null, got {value!r}")
    return float(value) if math.isfinite(value) else None


def _prompt_only(row: Row) -> tuple[Turns, tuple[GivenResponse, ...]]:
    field = "prompt" if "prompt" in row else "messages"
    return _turns(row[field], field), ()


def _with_responses(row: Row) -> tuple[Turns, tuple[GivenResponse, ...]]:
    if not isinstance(row["responses"], list) or not all(isinstance(r, dict) for r in row["responses"]):
        raise ValueError("responses must be a list of {content, reward}")
    given = []
    for i, response in enumerate(row["responses"]):
        reward = response.get("reward_raw", response.get("reward"))
        if not isinstance(response.get("content"), str):
            raise ValueError(f"responses[{i}] has no text content")
        given.append(GivenResponse(content=response["content"], reward=_number(reward, f"responses[{i}].reward")))
    return _turns(row["prompt"], "prompt"), tuple(given)


def _ampo_lists(row: Row) -> tuple[Turns, tuple[GivenResponse, ...]]:
    texts, scores = row["all_generated_responses"], row["all_reward_scores"]
    if len(texts) != len(scores):
        raise ValueError(f"{len(texts)} all_generated_responses but {len(scores)} all_reward_scores")
    return _turns(row["prompt"], "prompt"), _given(texts, scores, "all_generated_responses", "all_reward_scores")


def _ampo_columns(row: Row) -> tuple[Turns, tuple[GivenResponse, ...]]:
    count = next(i for i in range(len(row) + 1) if f"A{i}" not in row)
    texts = [row[f"A{i}"] for i in range(count)]
    scores = [row[f"score_A{i}"] for i in range(count)]
    turns = [_turns(text, "A") for text in texts if not isinstance(text, str)]
    if turns and len(turns[0]) > 1 and "prompt" not in row:
        return turns[0][:-1], _given(texts, scores, "A", "score_A")
    return _turns(row["prompt"], "prompt"), _given(texts, scores, "A", "score_A")


def _given(texts: Any, scores: Any, text_field: str, score_field: str) -> tuple[GivenResponse, ...]:
    pairs = enumerate(zip(texts, scores, strict=True))
    return tuple(
        GivenResponse(content=_answer(text, f"{text_field}[{i}]"), reward=_number(score, f"{score_field}[{i}]"))
        for i, (text, score) in pairs
    )


def _pair(row: Row) -> tuple[Turns, tuple[GivenResponse, ...]]:
    """A preference pair: scores where given, else the margin against 0, else 1 against 0."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        turns = _turns(row["prompt"], "prompt")
    else:
        a, b = _turns(chosen, "chosen"), _turns(rejected, "rejected")
        if isinstance(chosen, str):
            raise ValueError("chosen and rejected without a prompt must be chat turns that share their beginning")
        common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        turns = a[: min(common, len(a) - 1)]
        if not turns:
            raise ValueError("chosen and rejected share no prompt")
    scores = [row.get(f"{side}_score", row.get(f"score_{side}")) for side in ("chosen", "rejected")]
    if scores == [None, None]:
        scores = [row["margin"], 0.0] if row.get("margin") is not None else [1.0, 0.0]
    return turns, _given([chosen, rejected], scores, "chosen/rejected", "score")


_FORMATS: tuple[tuple[Callable[[Row], bool], Callable[[Row], tuple[Turns, tuple[GivenResponse, ...]]]], ...] = (
    (lambda row: "responses" in row, _with_responses),
    (lambda row: "all_generated_responses" in row, _ampo_lists),
    (lambda row: "A0" in row, _ampo_columns),
    (lambda row: "chosen" in row, _pair),
    (lambda row: "prompt" in row or "messages" in row, _prompt_only),
)
