"""Prompts and multi-response data, from files, from the package, or from a hub."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from ampo_fast.data_formats import Format, Row, read_row, with_numbers
from ampo_fast.jsonl import read_json, read_jsonl
from ampo_fast.types import Prompt

log = logging.getLogger(__name__)

_JSONL = (".jsonl", ".jsonl.gz")
_TABLES = (".csv", ".tsv")
_SUFFIXES = (*_JSONL, ".json", ".parquet", *_TABLES)
_LONGEST_CELL = 1 << 27
_FORMATS_WITH_RESPONSES = "responses, completions, all_generated_responses, A0.. with score_A0.., chosen + rejected"


def load_prompts(
    source: str, *, needs_responses: bool = False, field: str = "", columns: Mapping[str, str] = MappingProxyType({})
) -> list[Prompt]:
    """Reads a .jsonl, .jsonl.gz, .json, .parquet, .csv or .tsv file, package:NAME, or a `datasets` name (NAME or NAME:SPLIT).

    Formats (data_formats.FORMATS) are known by their fields, one format a source: prompts only (`prompt` as text or
    chat turns, or `messages`); `responses` with content and reward, or `scores` by name; UltraFeedback's `completions`;
    AMPO's published columns; preference pairs (TRL, UltraFeedback-binarized, RewardBench with its `subset`). A prompt's
    id is its `id` (SUBSET/ID), else `prompt_id`, else the row's number from 1. Pairs that share id and prompt become
    ID, ID#2, ... `columns` says what a source calls those fields, {"prompt": "question"}; where needs_responses, its first
    row must have them all.

    Raises:
        ValueError: naming file and line, for a row that cannot be read, a second format, a repeated id, or, where
            needs_responses, rows without responses; naming `field` for a file that does not exist.
        ImportError: where pyarrow or datasets is needed and missing.
    """
    prompts: dict[str, Prompt] = {}
    seen_at: dict[str, str] = {}
    first: tuple[Format, str] | None = None
    for where, number, row in _rows(source, field):
        try:
            if needs_responses and not prompts:
                _check_columns(columns, row)
            row = _renamed(row, columns)
            row = with_numbers(row) if source.endswith(_TABLES) else row
            found, turns, responses = read_row(row)
            first = first or (found, where)
            _check_same_format(found, row, first)
            if needs_responses and not responses:
                raise ValueError(f"no responses; the fields that bring them: {_FORMATS_WITH_RESPONSES}")
            prompt = Prompt(
                id=_row_id(row, number), messages=turns, responses=responses, subset=_subset(row), where=where
            )
            prompt = _distinct(prompt, prompts, seen_at, found)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        prompts[prompt.id] = prompt
        seen_at[prompt.id] = where
    if not prompts:
        raise ValueError(f"{source} is empty: it holds no rows")
    return list(prompts.values())


def disagreeing(group: Prompt) -> bool:
    """Whether the chosen response of a pair has the lower score."""
    chosen = [r.reward for r in group.responses if r.is_chosen]
    rejected = [r.reward for r in group.responses if r.is_chosen is False]
    return bool(chosen and rejected) and chosen[0] < rejected[0]


def settle_disagreements(groups: Sequence[Prompt], rule: str, field: str) -> list[Prompt]:
    """Pairs whose label and scores disagree: "raise", trust the "scores", or "drop"; counted."""
    wrong = [group.id for group in groups if disagreeing(group)]
    if wrong and rule == "raise":
        raise ValueError(
            f"{field}: the chosen response scores below the rejected one in {len(wrong)} of {len(groups)} pairs "
            f'({", ".join(wrong[:5])}{", ..." if len(wrong) > 5 else ""}); set data.disagreement to "scores" to trust '
            'the scores, or to "drop", or correct the rows'
        )
    if wrong:
        log.warning("%s: labels and scores disagree in %d of %d pairs: %s", field, len(wrong), len(groups), rule)
    return [g for g in groups if not disagreeing(g)] if rule == "drop" else list(groups)


def _check_columns(columns: Mapping[str, str], row: Row) -> None:
    """A misspelt one of scores would train on labels alone, without a word."""
    for name, theirs in columns.items():
        if theirs not in row:
            raise ValueError(f"data.columns.{name} = {theirs!r} is no field; there are {', '.join(map(str, row))}")


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    rest = {key: value for key, value in row.items() if key not in columns.values()}
    return rest | {name: row[theirs] for name, theirs in columns.items() if theirs in row}


def _check_same_format(found: Format, row: Row, first: tuple[Format, str]) -> None:
    expected, where = first
    if found is expected:
        return
    missing = [field for field in expected.required if row.get(field) is None]
    what = f"missing field {', '.join(map(repr, missing))}" if missing else "two formats in one source"
    raise ValueError(f"{what}: reads as {found.name!r}, but {where} as {expected.name!r}")


def _row_id(row: Row, number: int) -> str:
    given = row.get("id") if row.get("id") is not None else row.get("prompt_id")
    if given is None:
        return str(number)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise ValueError(f"id must be text or an integer, got {type(given).__name__}")
    subset = _subset(row)
    return f"{subset}/{given}" if subset else str(given)  # RewardBench numbers its subsets one by one


def _subset(row: Row) -> str:
    subset = row.get("subset")
    return subset if isinstance(subset, str) else ""


def _distinct(prompt: Prompt, prompts: dict[str, Prompt], seen_at: dict[str, str], found: Format) -> Prompt:
    """The prompt under an id of its own; random streams are keyed by it."""
    other = prompts.get(prompt.id)
    if other is None:
        return prompt
    if not found.is_pair or other.messages != prompt.messages:
        raise ValueError(f"id {prompt.id!r} is already at {seen_at[prompt.id]}; ids must be unique")
    number = 2
    while f"{prompt.id}#{number}" in prompts:
        number += 1
    return replace(prompt, id=f"{prompt.id}#{number}")


# --- sources: each yields (where, row number from 1, row) -----------------------------------------


def _rows(source: str, field: str) -> Iterator[tuple[str, int, Row]]:
    is_packaged = source.startswith("package:")
    path = _packaged(source.removeprefix("package:")) if is_packaged else Path(source).expanduser()
    is_file_name = path.name.endswith(_SUFFIXES) or source.startswith((".", "/", "~")) or not source
    if is_file_name and not path.exists():
        raise ValueError(f"{field} = {source!r} does not exist" if field else f"{source!r} does not exist")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix in _TABLES:
        yield from _table_rows(path)
    elif path.suffix == ".json":
        yield from ((f"{path}: row {number}", number, row) for number, row in read_json(path))
    elif path.name.endswith(_JSONL):
        yield from ((f"{path}:{number}", number, row) for number, row in read_jsonl(path))
    elif path.exists():
        raise ValueError(f"{source}: a data file must end in {', '.join(_SUFFIXES)}")
    else:
        yield from _hub_rows(source)


def _packaged(name: str) -> Path:
    folder = Path(__file__).parent / "prompts"
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        known = sorted(f"package:{entry.stem}" for entry in folder.glob("*.jsonl"))
        raise ValueError(f"'package:{name}' does not exist; known: {', '.join(known)}")
    return path


def _table_rows(path: Path) -> Iterator[tuple[str, int, Row]]:
    """A table with a header; an empty cell is no value."""
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{path}:1: two columns of one name in {', '.join(header)}")
            for number, cells in enumerate(filter(None, rows), 1):
                where = f"{path}:{rows.line_num}"
                if len(cells) != len(header):
                    raise ValueError(
                        f"{where}: {len(cells)} cells under {len(header)} names; text with commas needs quotes"
                    )
                yield where, number, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8, after line {rows.line_num}: {error.reason}") from None
        except csv.Error as error:
            raise ValueError(f"{path}:{rows.line_num}: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, int, Row]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from error
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", number, row
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None


def _hub_rows(source: str) -> Iterator[tuple[str, int, Row]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{source!r} is not a file; as a data set's name it needs: pip install datasets") from error
    name, _, split = source.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:  # no such set, no such split, no network
        raise ValueError(
            f"{source!r} is not a file, and as a data set it cannot be loaded ({error}); "
            f"where no hub is reachable, give a file ({', '.join(_SUFFIXES)})"
        ) from error
    yield from ((f"{source}: row {number}", number, row) for number, row in enumerate(rows, 1))
