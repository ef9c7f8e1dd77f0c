"""The run directory: made once, never overwritten silently, resumed only by the same configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ampo_fast.config import Config
from ampo_fast.files import write_json
from ampo_fast.reward_model.config import RewardTrainingConfig
from ampo_fast.types import Prompt

# Fields that may differ on --resume: they change who watches and how long, not what is computed.
_FREE = (
    "run.trackers",
    "run.dir",
    "run.timeout_s",
    "checkpoint.every",
    "checkpoint.asynchronous",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
)


def open_run_dir(
    config: Config | RewardTrainingConfig, resume: bool, folders: Sequence[str] = ("rollouts", "eval", "checkpoints")
) -> Path:
    """Creates DIR/NAME and writes config.json, or checks that an existing one is of the same configuration.

    Raises ValueError when the directory exists and resume is False, or when a field differs from the run's own.
    """
    path = config.run_dir
    saved = path / "config.json"
    resolved = json.loads(config.model_dump_json())
    if saved.exists():
        if not resume:
            raise ValueError(f"{path} already holds a run; add --resume auto, or choose another --run.name")
        differing = [
            f"{key}: {old!r} -> {new!r}"
            for key, old, new in _differences(json.loads(saved.read_text()), resolved)
            if key not in _FREE
        ]
        if differing:
            raise ValueError(f"{path} was started with other settings ({'; '.join(differing)}); use another --run.name")
        return path
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} exists and is not a run directory; choose another --run.name")
    path.mkdir(parents=True, exist_ok=True)
    for name in folders:
        (path / name).mkdir(exist_ok=True)
    write_json(saved, resolved)
    return path


def keep_data(run_dir: Path, prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Writes the hashes of what the data fields give to data.json, or checks those of a resumed run against it.

    Raises ValueError naming the field whose prompts, responses, rewards or order are others than the run began with: the
    order of training goes by position, and what is already sampled and scored would be mixed with the new.
    """
    path = run_dir / "data.json"
    now = {field: {"num_prompts": len(rows), "hash": _hash(rows)} for field, rows in prompts.items()}
    begun = json.loads(path.read_text()) if path.exists() else now
    for field, found in now.items():
        if begun[field] != found:
            before, after = begun[field]["num_prompts"], found["num_prompts"]
            counts = f" ({before} prompts then, {after} now)" if before != after else ""
            raise ValueError(
                f"{field} gives other prompts, responses or rewards than {run_dir} began with{counts}; restore the data, or "
                "use another --run.name"
            )
    write_json(path, now)


def _hash(prompts: Iterable[Prompt]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        given = [[r.content, r.reward, r.is_chosen, dict(r.scores)] for r in prompt.responses]
        digest.update(json.dumps([prompt.id, prompt.messages, given], sort_keys=True).encode())
    return digest.hexdigest()


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix, old, new
