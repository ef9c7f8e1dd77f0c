"""Checkpoints that survive: written aside, synced, renamed; partial ones are never seen; no pickle.

checkpoints/step_000030/ holds model.safetensors and optimizer.safetensors (float32) and state.json (step, counters).
Everything random is keyed by (seed, step, prompt, candidate), so there is no generator state to save.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ampo_fast.config import CheckpointConfig
from ampo_fast.model import Policy

log = logging.getLogger(__name__)

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
    """Writes root/step_N so that it exists complete or not at all. Raises OSError (disk full, ...) leaving older ones."""
    target = root / f"step_{step:06d}"
    if target.exists():
        return target
    aside = root / f".step_{step:06d}.incomplete"
    shutil.rmtree(aside, ignore_errors=True)
    tensors = {"model": _unique(policy.model.state_dict()), "optimizer": _optimizer_tensors(optimizer)}
    root.mkdir(parents=True, exist_ok=True)
    _check_disk(root, tensors)
    aside.mkdir()
    try:
        for name, content in tensors.items():
            save_file(content, aside / f"{name}.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": step, **state}))
        for path in aside.iterdir():
            _fsync(path)
        _fsync(aside)
        aside.rename(target)
        _fsync(root)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def load_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores model and optimizer in place and returns state.json. Raises ValueError for another model or a corrupt file."""
    try:
        state = json.loads((path / "state.json").read_text())
        model = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
    except Exception as error:  # safetensors raises its own type for a truncated file; any cause means the same here
        raise ValueError(
            f"checkpoint {path} cannot be read ({error}); delete it to fall back to the one before"
        ) from error
    own = _unique(policy.model.state_dict())
    differing = sorted(
        name
        for name in own.keys() | model.keys()
        if name not in own or name not in model or own[name].shape != model[name].shape
    )
    if differing:
        raise ValueError(f"checkpoint {path} is of another model: {', '.join(differing[:3])} differ")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(model[name])
    _load_optimizer(optimizer, moments)
    return state


def prune_checkpoints(root: Path, config: CheckpointConfig) -> None:
    """Removes all but the newest keep_last and, for good, every step that keep_every divides."""
    for step, path in checkpoint_dirs(root)[: -config.keep_last]:
        if not (config.keep_every and step % config.keep_every == 0):
            shutil.rmtree(path)
    for leftover in root.glob(".step_*.incomplete"):
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


def _unique(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each storage once: safetensors refuses a head that is tied to the embedding."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor.detach()
    return kept


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    entries = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, entry in entries.items() for key, value in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_disk(root: Path, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
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
