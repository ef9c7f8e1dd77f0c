"""A configuration from a TOML file and `--section.field value` overrides, and one message for all that is wrong in it."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ampo_fast.config.sections import ADVANCED, Config, Section


def field_paths(section: type[Section] = Config, prefix: str = "", is_full: bool = False) -> Iterator[tuple[str, Any]]:
    """Yields ("section.field", FieldInfo) for every common field; a section within a section is one, like model.lora.

    is_full: also the advanced ones and those of inner sections.
    """
    for name, info in section.model_fields.items():
        is_section = isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        if is_section and (is_full or not prefix):
            yield from field_paths(info.annotation, f"{prefix}{name}.", is_full)
        elif is_full or info.json_schema_extra != ADVANCED:
            yield f"{prefix}{name}", info


def recipe_path(name: str) -> Path:
    """The path of a TOML file, or of a recipe that ships in the package (`quickstart`)."""
    path = Path(name)
    if path.suffix == ".toml" or path.exists():
        if not path.is_file():
            raise ValueError(f"config file {name} does not exist")
        return path
    # Not importlib.resources: under an editable install its path is two directories at once, not one on disk.
    recipes = Path(__file__).parent.parent / "recipes"
    known = sorted(entry.stem for entry in recipes.glob("*.toml"))
    if name not in known:
        raise ValueError(f"no config file or recipe {name!r}; recipes: {', '.join(known)}")
    return recipes / f"{name}.toml"


def load_config(name: str, overrides: Sequence[str] = (), schema: type[Section] = Config) -> Any:
    """Reads a TOML file or recipe, applies `--section.field value` pairs, and validates once against `schema`.

    Raises ValueError with every problem in one message: field, value got, and the nearest name for an unknown key.
    """
    path = recipe_path(name)
    with path.open("rb") as file:
        try:
            values = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: {error}") from None
    for key, value in parse_overrides(overrides):
        _set(values, key, value)
    return build_config(values, source=str(path), schema=schema)


def build_config(values: dict[str, Any], source: str = "config", schema: type[Section] = Config) -> Any:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{source}:\n  " + "\n  ".join(problem_lines(error, schema))) from None


def problem_lines(error: ValidationError, schema: type[Section], prefix: str = "") -> list[str]:
    """What is wrong with values of `schema`, a line for each field; prefix: of its fields' names, as "rollout.options."."""
    return [_problem_line(problem, schema, prefix) for problem in error.errors()]


def _problem_line(problem: Any, schema: type[Section], prefix: str) -> str:
    path = ".".join(map(str, problem["loc"]))
    key = f"{prefix}{path}" if path else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{_instead_of(path, schema, prefix)}"
    message = problem["msg"].removeprefix("Value error, ")
    if key and problem["type"] != "missing":
        return f"{key} = {problem['input']!r}: {message}"
    return f"{key} {message}".strip()


_TRL = {
    "beta": "loss.params.beta",
    "bf16": "model.dtype",
    "dataset_name": "data.train",
    "eval_steps": "eval.every",
    "gradient_checkpointing": "optim.activation_checkpointing",
    "learning_rate": "optim.lr",
    "loss_type": "loss.name",
    "max_completion_length": "rollout.max_new_tokens",
    "max_length": "data.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "lr_scheduler_type": "optim.min_lr_ratio",
    "max_steps": "run.steps",
    "model_name_or_path": "model.path",
    "num_generations": "rollout.n",
    "num_train_epochs": "run.epochs",
    "output_dir": "run.dir",
    "per_device_train_batch_size": "optim.prompts_per_step",
    "report_to": "run.trackers",
    "reward_funcs": "reward.kind",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "use_vllm": "rollout.engine",
    "warmup_steps": "optim.warmup_ratio",
}
"""What TRL and transformers call a field."""


def nearest_field(key: str, schema: type[Section] = Config) -> str | None:
    """The field that an unknown key most likely means: TRL's name for one, its last part, or what is written alike."""
    names = [path for path, _ in field_paths(schema, is_full=True)]
    last = key.rpartition(".")[2]
    theirs = _TRL.get(last, "")
    if theirs in names or (theirs.startswith("loss.params.") and "loss.params" in names):
        return theirs
    same = [name for name in names if name.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, [*names, *schema.model_fields], n=1, cutoff=0.4)
    return same[0] if len(same) == 1 else close[0] if close else None


def _instead_of(key: str, schema: type[Section], prefix: str) -> str:
    """What to write for an unknown key."""
    if prefix:  # no help text lists these
        return f"; known: {', '.join(schema.model_fields)}"
    if schema is not Config and any(f"{path}.".startswith(f"{key}.") for path, _ in field_paths(is_full=True)):
        return ": `ampo-fast train` alone reads it; leave it out"
    nearest = nearest_field(key, schema)
    return f"; did you mean {nearest}?" if nearest else ""


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """["--optim.lr", "1e-6", "--run.name=a"] -> [("optim.lr", 1e-6), ("run.name", "a")]."""
    pairs, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or "." not in flag:
            raise ValueError(f"expected --section.field value, got {flag!r}")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"{flag} needs a value")
            text = rest.pop(0)
        pairs.append((key, _parse_value(text, flag)))
    return pairs


def _parse_value(text: str, flag: str) -> Any:
    """A TOML value where it reads as one (numbers, true, [lists], {tables}), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text.startswith(("{", "[")):
            raise ValueError(
                f"{flag} {text}: no TOML value ({error}); lists are [1, 2], tables {{beta = 0.1}}"
            ) from None
        return text


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"--{key}: {parent} is a value, not a section")
    values[last] = value
