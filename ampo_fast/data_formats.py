"""What a row of data may look like: every format is known by its fields and read by one small function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from ampo_fast.jsonl import is_number
from ampo_fast.types import GivenResponse

Row = dict[str, Any]
Turns = tuple[dict[str, str], ...]
Conversation = tuple[Turns, tuple[GivenResponse, ...]]

_SCORE = re.compile(r"(chosen|rejected)_score|score_\w+|margin")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One known shape of a row."""

    name: str
    marks: tuple[str, ...]
    """A row that has one of these fields is meant to be of this format; earlier formats go first."""
    required: tuple[str, ...]
    read: Callable[[Row], Conversation]
    is_pair: bool = False
    """Several rows may then share an id: they are pairs over one prompt."""


def read_row(row: Row) -> tuple[Format, Turns, tuple[GivenResponse, ...]]:
    """The row's format, its prompt, and the responses that came with it. Null fields count as absent.

    Raises ValueError naming the field that is missing or wrong.
    """
    row = {key: value for key, value in row.items() if value is not None}
    found = next((known for known in FORMATS if any(mark in row for mark in known.marks)), None)
    if found is None:
        have = ", ".join(sorted(row)) or "none"
        raise ValueError(
            f"fields ({have}) fit no known format; known: {known_formats()}; data.columns says what yours are called"
        )
    missing = [field for field in found.required if field not in row]
    if missing:
        names = ", ".join(map(repr, missing))
        raise ValueError(f"missing field {names} of the format {found.name!r}; known: {known_formats()}")
    turns, responses = found.read(row)
    _check_prompt(turns)
    return found, turns, responses


def known_formats() -> str:
    return "; ".join(f"{known.name} ({', '.join(known.required)})" for known in FORMATS)


def with_numbers(row: Row) -> Row:
    """A table's row, whose cells are all text, with numbers for scores; what is no number stays, to be refused as one."""
    return {name: _number(cell) if _SCORE.fullmatch(name) else cell for name, cell in row.items()}


def _number(cell: str | None) -> str | float | None:
    try:
        return None if cell is None else float(cell)
    except ValueError:
        return cell


# --- parts of a row -------------------------------------------------------------------------------


def _check_prompt(turns: Turns) -> None:
    if not any(turn["role"] == "user" for turn in turns):
        raise ValueError("the prompt has no user turn")
    if turns[-1]["role"] != "user":
        role = turns[-1]["role"]
        raise ValueError(f"the prompt must end with a user turn, its last turn is the {role}'s")
    if not turns[-1]["content"].strip():
        raise ValueError("the prompt's last user turn is empty")


def _turns(value: Any, field: str) -> Turns:
    """Chat turns with role and content alone; text becomes one user turn."""
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{field} must be text or a list of chat turns, got {_kind(value)}")
    for i, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise ValueError(f"{field}[{i}] must be a chat turn {{role, content}}, got {_kind(turn)}")
        if turn.get("role") not in _ROLES:
            raise ValueError(f"{field}[{i}].role = {turn.get('role')!r}; use {', '.join(_ROLES)}")
        if not isinstance(turn.get("content"), str):
            raise ValueError(f"{field}[{i}].content must be text, got {_kind(turn.get('content'))}")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in value)


def _reward(value: Any, field: str) -> float | None:
    """A finite number, or None for null, NaN and infinity: the trainer masks and counts those."""
    if value is None:
        return None
    if not is_number(value):
        raise ValueError(f"{field} must be a number or null, got {_shown(value)}")
    return float(value) if math.isfinite(value) else None


def _shown(value: Any) -> str:
    return f"str {value!r}" if isinstance(value, str) else _kind(value)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _is_text(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _converse(row: Row, fields: Sequence[str], values: Sequence[Any], rewards: Sequence[Any]) -> Conversation:
    """The prompt, and one response per value: its text, its assistant turn, or a whole conversation.

    Whole conversations carry the prompt themselves, so `prompt` may be absent: it is what they share.
    """
    prompt = _turns(row["prompt"], "prompt") if "prompt" in row else None
    if prompt is None and _is_text(values):
        prompt, values = _shared_text(values)
    texts = []
    for field, value in zip(fields, values, strict=True):
        if isinstance(value, str):
            texts.append(value)
            continue
        *before, last = _turns(value, field) or ({"role": "nobody", "content": ""},)
        if last["role"] != "assistant":
            raise ValueError(f"{field} must be text or end with an assistant turn")
        prompt = _joint_prompt(prompt, tuple(before), row, field)
        texts.append(last["content"])
    if prompt is None:
        raise ValueError(f"{' and '.join(fields)} share no prompt, and there is no field 'prompt'")
    pairs = zip(texts, rewards, fields, strict=True)
    given = [GivenResponse(content=t, reward=_reward(r, f"the reward of {f}")) for t, r, f in pairs]
    return prompt, tuple(given)


def _joint_prompt(prompt: Turns | None, before: Turns, row: Row, field: str) -> Turns | None:
    """The prompt, after meeting the turns that stand before a response's last one."""
    if not before or before == prompt:
        return prompt
    if prompt is None:
        return before
    # UltraFeedback writes the first question as text beside conversations that hold all of it.
    asked = [turn["content"].strip() for turn in before if turn["role"] == "user"]
    if isinstance(row.get("prompt"), str) and row["prompt"].strip() in asked and len(prompt) == 1:
        return before
    raise ValueError(f"{field} does not begin with the turns of the prompt that the others have")


def _shared_text(values: Sequence[str]) -> tuple[Turns, list[str]]:
    """Texts that begin alike: the beginning, up to a whole word, is the prompt; the rest are responses."""
    first, *others = values
    same = (all(x[i : i + 1] == char for x in others) for i, char in enumerate(first))
    shared = first[: len(list(takewhile(bool, same)))]
    if any(not value[len(shared) : len(shared) + 1].isspace() for value in values):
        # The texts part inside a word, or right after a blank: cut behind the last blank.
        shared = shared[: len(shared) - len(re.search(r"\S*$", shared).group())]
    if not shared.strip() or len(set(values)) == 1:
        raise ValueError("chosen and rejected share no prompt (a beginning in whole words), or nothing else")
    turns = ({"role": "user", "content": shared.strip()},)
    return turns, [value[len(shared) :].strip() for value in values]


# --- one reader per format ------------------------------------------------------------------------


def _multi_response(row: Row) -> Conversation:
    """Also the rows of stage files, whose raw reward comes before the normalised one."""
    responses = row["responses"]
    if not isinstance(responses, list | tuple):
        raise ValueError(f"responses must be a list of {{content, reward}}, got {_kind(responses)}")
    return _turns(row["prompt"], "prompt"), tuple(
        _scored(response, f"responses[{i}]") for i, response in enumerate(responses)
    )


def _scored(response: Any, field: str) -> GivenResponse:
    if not isinstance(response, dict):
        raise ValueError(f"{field} must be {{content, reward}}, got {_kind(response)}")
    key = "reward_raw" if "reward_raw" in response else "reward"
    scores = _scores(response.get("scores"))
    for needed in ("content", key):
        if needed not in response and not (needed == "reward" and scores):
            raise ValueError(f"{field}: missing field {needed!r}")
    if not isinstance(response["content"], str):
        raise ValueError(f"{field}.content must be text, got {_kind(response['content'])}")
    reward = _reward(response[key], f"{field}.{key}") if key in response else _mean(scores)
    cut = (
        {"finish_reason": "length"} if response.get("finish_reason") == "length" else {}
    )  # other tools have more reasons
    return GivenResponse(content=response["content"], reward=reward, scores=scores, **cut)


def _scores(value: Any) -> dict[str, float | None]:
    """The numbers of {name: number}; other tools' `scores`, of any other shape, are none of ours."""
    if not isinstance(value, dict):
        return {}
    return {name: _reward(number, name) for name, number in value.items() if number is None or is_number(number)}


def _mean(scores: dict[str, float | None]) -> float | None:
    """None unless every score is there: means over different aspects do not compare."""
    values = list(scores.values())
    return math.fsum(values) / len(values) if values and None not in values else None


def _ultrafeedback(row: Row) -> Conversation:
    """The reward is the mean of the aspects' ratings: `overall_score` is known to be wrong where the critique is harsh."""
    completions = row["completions"]
    if not isinstance(completions, list | tuple):
        raise ValueError(f"completions must be a list of {{response, annotations}}, got {_kind(completions)}")
    given = []
    for i, completion in enumerate(completions):
        annotations = completion.get("annotations") if isinstance(completion, dict) else None
        if not isinstance(annotations, dict) or not isinstance(completion.get("response"), str):
            raise ValueError(f"completions[{i}] must be {{response, annotations}} with a text and ratings by aspect")
        scores = {aspect: _rating(found, f"completions[{i}].{aspect}") for aspect, found in annotations.items()}
        given.append(GivenResponse(content=completion["response"], reward=_mean(scores), scores=scores))
    return _turns(row["instruction"], "instruction"), tuple(given)


def _rating(annotation: Any, field: str) -> float | None:
    """A judge's Rating, written as text; None for its N/A."""
    rating = annotation.get("Rating") if isinstance(annotation, dict) else None
    if not isinstance(rating, str) or not re.fullmatch(r"\d+(\.\d+)?|N/A", rating.strip()):
        raise ValueError(f"{field}.Rating must be a number as text, or N/A, got {rating!r}")
    return None if rating.strip() == "N/A" else float(rating)


def _ampo_pool(row: Row) -> Conversation:
    texts, scores = row["all_generated_responses"], row["all_reward_scores"]
    for field in ("all_generated_responses", "all_reward_scores"):
        if not isinstance(row[field], list | tuple):
            raise ValueError(f"{field} must be a list, got {_kind(row[field])}")
    if len(texts) != len(scores):
        raise ValueError(f"{len(texts)} all_generated_responses but {len(scores)} all_reward_scores")
    names = [f"all_generated_responses[{i}]" for i in range(len(texts))]
    return _converse(row, names, texts, scores)


def _ampo_columns(row: Row) -> Conversation:
    names = sorted((key for key in row if re.fullmatch(r"A\d+", key)), key=lambda key: int(key[1:]))
    return _converse(row, names, [row[n] for n in names], [row.get(f"score_{n}") for n in names])


def _pair(row: Row) -> Conversation:
    """Rewards are the scores where given, else the margin over 0, else 1 over 0."""
    fields = ("chosen", "rejected")
    scores = [row.get(f"{field}_score", row.get(f"score_{field}")) for field in fields]
    if scores.count(None) == 1:
        lacks = fields[scores.index(None)]
        raise ValueError(f"a score of one side only: missing field '{lacks}_score'")
    margin = _reward(row.get("margin"), "margin")
    _check_margin(margin, scores)
    if None in scores:
        scores = [1.0 if margin is None else margin, 0.0]
    turns, given = _converse(row, fields, [row[field] for field in fields], scores)
    return turns, tuple(replace(response, is_chosen=i == 0) for i, response in enumerate(given))


def _check_margin(margin: float | None, scores: Sequence[Any]) -> None:
    """A margin is chosen minus rejected: it has the sign of the scores' difference, and without scores is not below 0."""
    if margin is None:
        return
    chosen, rejected = (_reward(score, "a score") for score in scores)
    gap = 0.0 if chosen is None or rejected is None else chosen - rejected
    if margin * gap < 0.0 or (margin < 0.0 and None in scores):
        beside = "" if None in scores else f", but the scores' difference is {gap}"
        raise ValueError(
            f"margin = {margin}{beside}: it must be chosen minus rejected; swap the two responses or correct the margin"
        )


def _prompt(row: Row) -> Conversation:
    return _turns(row["prompt"], "prompt"), ()


def _messages(row: Row) -> Conversation:
    return _turns(row["messages"], "messages"), ()


FORMATS = (
    Format(
        name="multi-response",
        marks=("responses",),
        required=("prompt", "responses"),
        read=_multi_response,
    ),
    Format(
        name="UltraFeedback",
        marks=("completions",),
        required=("instruction", "completions"),
        read=_ultrafeedback,
    ),
    # The pool goes before A0..A7, which were selected from it: selecting is this program's work.
    Format(
        name="AMPO pool",
        marks=("all_generated_responses", "all_reward_scores"),
        required=("prompt", "all_generated_responses", "all_reward_scores"),
        read=_ampo_pool,
    ),
    Format(
        name="AMPO columns",
        marks=("A0", "score_A0"),
        required=("prompt", "A0", "score_A0", "A1", "score_A1"),
        read=_ampo_columns,
    ),
    Format(
        name="UltraFeedback-binarized",
        marks=("score_chosen", "score_rejected"),
        required=("chosen", "rejected", "score_chosen", "score_rejected"),
        read=_pair,
        is_pair=True,
    ),
    Format(
        name="preference pair",
        marks=("chosen", "rejected"),
        required=("chosen", "rejected"),
        read=_pair,
        is_pair=True,
    ),
    Format(name="prompts only", marks=("prompt",), required=("prompt",), read=_prompt),
    Format(name="messages", marks=("messages",), required=("messages",), read=_messages),
)
