"""Checkpoints that survive: written aside, synced, renamed; partial ones are never seen; no pickle.

checkpoints/step_000030/ holds shard-*.safetensors, each rank's part of the parameters and of AdamW's moments in
float32, written by torch.distributed.checkpoint, and state.json: format, world size, counters, and every shard's size.
Any number of ranks may load what any other number saved. Everything random is keyed by (seed, step, prompt,
candidate), so there is no generator state to save.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file

from ampo_fast import distributed
from ampo_fast.config import CheckpointConfig
from ampo_fast.model import Policy

log = logging.getLogger(__name__)

FORMAT = 2
"""Of the directory. 1 was two whole safetensors files, written by a single process."""

_WAY_OUT = "delete that directory to fall back to the checkpoint before"
_NAME = re.compile(r"step_(\d{6,})")


def checkpoint_dirs(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every complete checkpoint, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def save_checkpoint(
    root: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Writes root/step_N so that it exists complete or not at all; every rank must call it.

    Raises OSError (disk full, ...) on every rank, whichever met it, and leaves older checkpoints as they were.
    """
    target = root / f"step_{step:06d}"
    if distributed.on_main(target.exists):
        return target
    aside = root / f"{target.name}.partial"
    tensors = _tensors(policy, optimizer)
    try:
        distributed.on_main(lambda: _open_aside(aside, tensors))
        if distributed.world_size() == 1:
            _write_alone(aside, tensors)
        else:
            _collective(lambda options: dcp.save(tensors, storage_writer=_Writer(str(aside)), **options), f"write {aside}")
        distributed.on_main(lambda: _commit(aside, target, state))
    except BaseException:
        if distributed.is_main():
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def load_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores model and optimizer in place, whatever number of ranks saved them, and returns the state that was given.

    Every rank must call it. Raises ValueError naming the file that is damaged, or what differs in a checkpoint of
    another model or format.
    """
    state = distributed.on_main(lambda: _read_state(path))
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        shapes = {name: tuple(saved.size) for name, saved in reader.read_metadata().state_dict_metadata.items()}
        _check_model(path, _tensors(policy, optimizer), shapes)
        _make_moments(policy, optimizer, shapes)
        distributed.reshard(policy)  # else the whole parameters that a forward left behind hide what is loaded
        tensors = _tensors(policy, optimizer)
        _collective(lambda options: dcp.load(tensors, storage_reader=reader, **options), f"read {path}")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error}); {_WAY_OUT}") from error
    return state


def _make_moments(policy: Policy, optimizer: torch.optim.Optimizer, saved: Collection[str]) -> None:
    """AdamW's state, sharded as its parameter, for every parameter that had been trained when the checkpoint was made."""
    for name, parameter in policy.model.named_parameters():
        optimizer.state.pop(parameter, None)
        if f"optimizer.{name}.exp_avg" in saved:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _write_alone(aside: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The same files as DCP's, a kind of tensor at a time: DCP's writer holds all of them twice more in memory."""
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2] if name.startswith("optimizer.") else "model"
        kinds.setdefault(kind, {})[name] = tensor.contiguous()
    for i, part in enumerate(kinds.values(), 1):
        path = aside / f"shard-00001-model-{i:05d}-of-{len(kinds):05d}.safetensors"
        try:
            save_file(part, path)
        except SafetensorError as error:  # what the file system says comes wrapped
            raise OSError(f"cannot write {path} ({error})") from error
        with path.open("rb") as file:
            os.fsync(file.fileno())


class _Writer(dcp.HuggingFaceStorageWriter):
    """One safetensors file a rank, named by it."""

    def __init__(self, path: str) -> None:
        super().__init__(path, save_distributed=True)


def _collective(work: Callable[[dict[str, Any]], Any], what: str) -> None:
    """Runs a DCP call; what any rank's file system says is an OSError on every rank."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*in a single process")  # that is what was asked for
            work({"no_dist": distributed.world_size() == 1})
    except dcp.CheckpointException as error:  # a BaseException, with what every rank met
        where, cause = next(iter(error.failures.items()))
        raise OSError(f"cannot {what} (rank {where}: {cause[0]})") from error


def _tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters (a tied head once), buffers and AdamW's state under flat names; views, so that loading fills them."""
    persistent = policy.model.state_dict().keys()
    named = {f"model.{name}": buffer for name, buffer in policy.model.named_buffers() if name in persistent}
    for name, parameter in policy.model.named_parameters():
        named[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            # safetensors cannot slice a scalar.
            named[f"optimizer.{name}.{key}"] = value.reshape(1) if value.ndim == 0 else value
    return named


def _open_aside(aside: Path, tensors: dict[str, torch.Tensor]) -> None:
    aside.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    _check_disk(aside.parent, tensors)
    aside.mkdir()


def _commit(aside: Path, target: Path, state: dict[str, Any]) -> None:
    """The shards are on disk (DCP syncs each): name them with their sizes, then make the directory real by its name."""
    files = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
    header = {"format": FORMAT, "world_size": distributed.world_size(), "files": files}
    (aside / "state.json").write_text(json.dumps(header | {"state": state}))
    _fsync(aside / "state.json")
    _fsync(aside)
    aside.rename(target)
    _fsync(target.parent)


def _read_state(path: Path) -> dict[str, Any]:
    """The caller's part of state.json, after checking that every shard is there and whole."""
    try:
        header = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path / 'state.json'} cannot be read ({error}); {_WAY_OUT}") from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {header.get('format', 1)}, this version reads {FORMAT}; {_WAY_OUT}"
        )
    for name, size in header["files"].items():
        shard = path / name
        have = shard.stat().st_size if shard.exists() else None
        if have != size:
            problem = "is missing" if have is None else f"has {have} bytes of {size}: truncated"
            raise ValueError(f"checkpoint shard {shard} {problem}; {_WAY_OUT}")
    if header["world_size"] != distributed.world_size():
        log.warning(
            "%s was saved by %d ranks and is loaded by %d: what follows is equal within rounding, not bit for bit",
            path, header["world_size"], distributed.world_size(),
        )  # fmt: skip
    return header["state"]


def _check_model(path: Path, own: dict[str, torch.Tensor], saved: dict[str, tuple[int, ...]]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    differing = [
        f"{name.removeprefix('model.')} is {saved.get(name, 'missing')} there, {shapes.get(name, 'missing')} here"
        for name in sorted(shapes.keys() | saved.keys())
        if name.startswith("model.") and shapes.get(name) != saved.get(name)
    ]
    if differing:
        raise ValueError(f"checkpoint {path} is of another model than model.path: {'; '.join(differing[:3])}")


def prune_checkpoints(root: Path, config: CheckpointConfig) -> None:
    """Removes all but the newest keep_last and, for good, every step that keep_every divides."""
    for step, path in checkpoint_dirs(root)[: -config.keep_last]:
        if not (config.keep_every and step % config.keep_every == 0):
            shutil.rmtree(path)
    for leftover in root.glob("step_*.partial"):
        shutil.rmtree(leftover)


def require_disk(run_dir: Path, policy: Policy, config: CheckpointConfig) -> None:
    """Raises ValueError at the start of a run whose checkpoints and export cannot fit: parameters and two moments in
    float32, keep_last + 1 times, and two exports."""
    parameters = 4 * sum(parameter.numel() for parameter in policy.parameters())
    have = sum(file.stat().st_size for file in run_dir.rglob("*.safetensors"))
    needed = parameters * (3 * (config.keep_last + 1) + 2) - have
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise ValueError(
            f"the run needs up to {needed / 2**30:.1f} GiB for checkpoints and export, {run_dir} has {free / 2**30:.1f} GiB "
            "free; free some, or lower checkpoint.keep_last"
        )


def _check_disk(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())  # of all shards together
    free = shutil.disk_usage(root).free
    if free < 1.02 * needed:
        raise OSError(
            f"a checkpoint needs {needed / 2**20:.0f} MiB, {root} has {free / 2**20:.0f} MiB free; "
            "free some, or lower checkpoint.keep_last"
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
