"""The run directory: made once, never overwritten silently, resumed only by the same configuration."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ampo_fast.config import Config
from ampo_fast.files import write_json
from ampo_fast.reward_model.config import RewardTrainingConfig
from ampo_fast.types import Prompt

log = logging.getLogger(__name__)

_CONFIG = "config.json"
_LOCK = ".lock"
_locks: dict[Path, IO[str]] = {}
"""Of the runs that this process has open."""

# Fields that may differ on --resume; the name of a table stands for all that is in it. These say who watches, how long it
# goes on, where it is kept and what is too much to bear, not what is computed.
_FREE = (
    "run.name", "run.dir", "run.trackers", "run.timeout_s", "data.max_overlong_share", "data.max_missing_share",
    "reward.max_missing_share", "reward.options", "eval.every", "eval.max_kl", "eval.patience", "checkpoint",
)  # fmt: skip
# The same numbers in another order or by another kernel: what a run that does not fit, or is too slow, may need.
_ROUNDING = (
    "model.attention", "model.compile", "model.liger", "model.cache_mib", "rollout.options", "rollout.batch_rows",
    "embed.batch_rows", "optim.micro_batch_tokens", "optim.activation_checkpointing",
)  # fmt: skip


def open_run_dir(
    config: Config | RewardTrainingConfig, resume: bool, folders: Sequence[str] = ("rollouts", "eval", "checkpoints")
) -> Path:
    """Creates DIR/NAME and writes config.json, or checks that an existing one is of the same configuration.

    Raises ValueError when the directory exists and resume is False, another process has it open, or a field differs from
    the run's own.
    """
    path = config.run_dir
    saved = path / _CONFIG
    check_run_dir(config, resume)
    resolved = _resolved(config)
    if saved.exists():
        _lock(path)
        _warn_of_rounding(path, _read(saved), resolved)
        return path
    path.mkdir(parents=True, exist_ok=True)
    _lock(path)
    for name in folders:
        (path / name).mkdir(exist_ok=True)
    write_json(saved, resolved)
    return path


def check_run_dir(config: Config | RewardTrainingConfig, resume: bool) -> None:
    """Raises ValueError for a directory that open_run_dir would refuse, and creates none: a start may still fail."""
    path = config.run_dir
    saved = path / _CONFIG
    if saved.exists():
        if not resume:
            raise ValueError(f"{path} already holds a run; add --resume auto, or choose another --run.name")
        _check_same(path, _read(saved), _resolved(config))
    elif any(_is_content(entry) for entry in path.rglob("*")):
        raise ValueError(f"{path} exists and is not a run directory; choose another --run.name")


def _resolved(config: Config | RewardTrainingConfig) -> Any:
    return json.loads(config.model_dump_json())


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


@contextlib.contextmanager
def run_closed(config: Config | RewardTrainingConfig) -> Iterator[None]:
    """Lets others open the run once what is inside has ended, however it did."""
    try:
        yield
    finally:
        lock = _locks.pop(config.run_dir.resolve(), None)
        if lock is not None:
            lock.close()


def _lock(path: Path) -> None:
    """Keeps other processes out until this one ends or run_closed does; the system lets go of a killed one's by itself."""
    if path.resolve() in _locks:
        return
    file = (path / _LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{path} is in use by {holder}; stop it first, or choose another --run.name") from None
    except OSError as error:  # some network file systems know no locks
        log.warning("%s cannot be locked (%s): nothing keeps a second process from resuming it", path, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    _locks[path.resolve()] = file


def _is_content(entry: Path) -> bool:
    """Whether it is more than what a start that was killed leaves: folders, temporary files, the lock."""
    return not entry.is_dir() and entry.name != _LOCK and not entry.name.endswith(".tmp")


def _read(saved: Path) -> Any:
    try:
        return json.loads(saved.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{saved} cannot be read ({error}); restore it, or choose another --run.name") from error


def _check_same(path: Path, saved: Any, resolved: Any) -> None:
    refused = [told for key, told in _told_differences(saved, resolved) if not _is_of(key, _FREE + _ROUNDING)]
    if refused:
        raise ValueError(f"{path} was started with other settings ({'; '.join(refused)}); use another --run.name")


def _warn_of_rounding(path: Path, saved: Any, resolved: Any) -> None:
    rounded = [told for key, told in _told_differences(saved, resolved) if _is_of(key, _ROUNDING)]
    if rounded:
        log.warning(
            "%s goes on with %s: what follows is equal within rounding, not bit for bit", path, "; ".join(rounded)
        )


def _told_differences(saved: Any, resolved: Any) -> list[tuple[str, str]]:
    return [(key, f"{key}: {old!r} -> {new!r}") for key, old, new in _differences(saved, resolved)]


def _is_of(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix, old, new
