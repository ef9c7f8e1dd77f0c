"""JSON Lines, read with errors that name file and line, written without bare NaN."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a .jsonl or .jsonl.gz file.

    A blank last line is tolerated. Raises ValueError naming file and line for an empty or broken
    line, and naming the file where it is missing, unreadable or holds no rows.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    num_rows, blank_line = 0, None
    for number, line in enumerate(_lines(path), 1):
        if blank_line is not None:
            raise ValueError(f"{path}:{blank_line}: empty line; remove it")
        if not line.strip():
            blank_line = number
            continue
        num_rows += 1
        yield number, _parse(line.rstrip(), f"{path}:{number}")
    if not num_rows:
        raise ValueError(f"{path} is empty: it holds no rows")


def read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number from 1, object) of a .json file: one list of objects, or JSON Lines under that name."""
    content = path.read_bytes()
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from read_jsonl(path)
        return
    try:
        rows = json.loads(content)
    except ValueError as error:  # of the bytes as of the JSON
        raise ValueError(f"{path}: not JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
        _check_whole_characters(row, where)
        yield number, row


def drop_torn_line(path: Path) -> None:
    """Cuts a last line without its newline off: the one that a killed process was writing."""
    content = path.read_bytes()
    num_whole_bytes = content.rfind(b"\n") + 1  # bytewise: a kill can cut a line inside a UTF-8 character
    if num_whole_bytes < len(content):
        with path.open("rb+") as file:
            file.truncate(num_whole_bytes)


def dump_line(row: dict[str, Any]) -> str:
    """One line of JSON with its newline; floats as repr, so that they read back exactly.

    Raises ValueError on a NaN or infinite number: write null.
    """
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def is_number(value: Any) -> bool:
    """Whether a value that JSON gave is a number: to Python true and false are ones too."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_number_or_null(value: Any) -> bool:
    """What a reward is in JSON: a finite number, or null where there is none."""
    return value is None or (is_number(value) and math.isfinite(value))


def without_nan(value: Any) -> Any:
    """The same with null where a number is NaN or infinite, at any depth."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix != ".gz":
        with path.open("rb") as file:
            yield from file
        return
    try:
        with gzip.open(path, "rb") as file:
            yield from file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if b"\\ud" in line.lower():  # an escaped surrogate: two of them are a character, one alone is not
        _check_whole_characters(row, where)
    return row


def _check_whole_characters(row: dict[str, Any], where: str) -> None:
    """A tokenizer takes no text that is not Unicode, and UTF-8 cannot write it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{where}: {half} is half a character (a text was cut inside one); remove it") from None
