"""Checkpoints that survive: written aside, synced, renamed; partial ones are never seen; no pickle.

checkpoints/step_000030/ holds shard-*.safetensors, each rank's part of the parameters and of AdamW's moments in
float32, written by torch.distributed.checkpoint, and state.json: format, world size, counters, every shard's size and CRC.
Any number of ranks may load what any other number saved. Everything random is keyed by (seed, step, prompt,
candidate), so there is no generator state to save.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError

from ampo_fast import distributed
from ampo_fast.config import CheckpointConfig, Config
from ampo_fast.files import fsync_path, save_tensors, write_json
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


@dataclass
class Snapshot:
    """What one checkpoint will hold; `tensors` are the run's own until a copy takes their place."""

    target: Path
    tensors: dict[str, torch.Tensor]
    header: dict[str, Any]
    crc: dict[str, int] = field(default_factory=dict)
    """Of every shard, once they are written."""

    @property
    def aside(self) -> Path:
        return self.target.with_name(f"{self.target.name}.partial")


def save_checkpoint(
    root: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Writes root/step_N so that it exists complete or not at all; every rank must call it.

    Raises OSError (disk full, ...) on every rank, whichever met it, and leaves older checkpoints as they were.
    """
    taken = snapshot(root, step, policy, optimizer, state)
    if distributed.on_main(lambda: open_aside(taken)):
        write_shards(taken)
        distributed.on_main(lambda: commit(taken))
    return taken.target


def snapshot(
    root: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Snapshot:
    """Every rank must call it. The state is taken as it is now; the tensors only once they are copied or written."""
    header = {"format": FORMAT, "world_size": distributed.world_size(), "adapter": policy.adapter_id}
    state = json.loads(json.dumps(state))
    return Snapshot(root / f"step_{step:06d}", _tensors(policy, optimizer), header | {"state": state})


def open_aside(taken: Snapshot) -> bool:
    """An empty directory to write to, on a disk with room; for rank 0. -> False where the checkpoint exists already."""
    if taken.target.exists():
        return False
    taken.aside.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(taken.aside, ignore_errors=True)
    _check_disk(taken.aside.parent, taken.tensors)
    taken.aside.mkdir()
    return True


def write_shards(taken: Snapshot, group: dist.ProcessGroup | None = None) -> None:
    """Writes and syncs every rank's shards. group: whose collectives are used; default all ranks' own.

    May run beside the training when the tensors are a copy. Raises OSError on every rank, and leaves nothing behind.
    """
    with _removed_on_error(taken):
        if distributed.world_size() == 1:
            _write_alone(taken.aside, taken.tensors)
        else:
            writer = _Writer(str(taken.aside))
            _collective(
                lambda: dcp.save(taken.tensors, storage_writer=writer, process_group=group), f"write {taken.aside}"
            )
        with distributed.together(group):
            own = {path.name: _crc(path) for path in taken.aside.glob(f"shard-{distributed.rank() + 1:05d}-*")}
        taken.crc = {name: crc for part in distributed.all_gather(own, group) for name, crc in part.items()}


def commit(taken: Snapshot) -> None:
    """Names the shards, which are all there, with size and CRC, then makes the directory real by its name; for rank 0."""
    aside = taken.aside
    with _removed_on_error(taken):
        files = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        write_json(aside / "state.json", {"files": files, "crc32": taken.crc} | taken.header)
        aside.rename(taken.target)
        fsync_path(taken.target.parent)


@contextlib.contextmanager
def _removed_on_error(taken: Snapshot) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if distributed.is_main():
            shutil.rmtree(taken.aside, ignore_errors=True)
        raise


def load_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores model and optimizer in place, whatever number of ranks saved them, and returns the state that was given.

    Every rank must call it. Raises ValueError naming the file that is damaged, or what differs in a checkpoint of
    another model or format.
    """
    adapter = policy.adapter_id
    header = distributed.on_main(lambda: _read_header(path, adapter))
    with distributed.together():
        _check_crc(path, header.get("crc32", {}))
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        shapes = {name: tuple(saved.size) for name, saved in reader.read_metadata().state_dict_metadata.items()}
        _check_model(path, _tensors(policy, optimizer), shapes)
        _make_moments(policy, optimizer, shapes)
        distributed.reshard(policy)  # else the whole parameters that a forward left behind hide what is loaded
        tensors = _tensors(policy, optimizer)
        _collective(lambda: _load(tensors, reader), f"read {path}")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error}); {_WAY_OUT}") from error
    return header["state"]


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
        kinds.setdefault(kind, {})[name] = tensor
    for i, part in enumerate(kinds.values(), 1):
        save_tensors(aside / f"shard-00001-model-{i:05d}-of-{len(kinds):05d}.safetensors", part)


class _Writer(dcp.HuggingFaceStorageWriter):
    """One safetensors file a rank, named by it."""

    def __init__(self, path: str) -> None:
        super().__init__(path, save_distributed=True)


def _load(tensors: dict[str, torch.Tensor], reader: dcp.HuggingFaceStorageReader) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*in a single process")  # that is what was asked for
        dcp.load(tensors, storage_reader=reader, no_dist=distributed.world_size() == 1)


def _collective(work: Callable[[], Any], what: str) -> None:
    """Runs a DCP call; what any rank's file system says is an OSError on every rank."""
    try:
        work()
    except dcp.CheckpointException as error:  # a BaseException, with what every rank met
        where, cause = next(iter(error.failures.items()))
        raise OSError(f"cannot {what} (rank {where}: {cause[0]})") from error


def _tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters (a tied head once), buffers and AdamW's state under flat names; views, so that loading fills them. Of a
    model with an adapter the adapter alone."""
    persistent = () if policy.lora else policy.model.state_dict().keys()
    named = {f"model.{name}": buffer for name, buffer in policy.model.named_buffers() if name in persistent}
    for name, parameter in policy.model.named_parameters():
        if policy.lora and not parameter.requires_grad:
            continue
        named[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            # safetensors cannot slice a scalar.
            named[f"optimizer.{name}.{key}"] = value.reshape(1) if value.ndim == 0 else value
    return named


def _read_header(path: Path, adapter: dict[str, Any] | None) -> dict[str, Any]:
    """state.json, after checking that it is of this adapter, and every shard there and whole."""
    file = path / "state.json"
    try:
        header = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {file} cannot be read ({error}); {_WAY_OUT}") from error
    if not isinstance(header, dict):
        raise ValueError(f"checkpoint {file} holds a {type(header).__name__}, not an object; {_WAY_OUT}")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {header.get('format', 1)}, this version reads {FORMAT}; {_WAY_OUT}"
        )
    for key, kind in (("files", dict), ("state", dict), ("world_size", int)):
        if not isinstance(header.get(key), kind):
            raise ValueError(f"checkpoint {file} lacks {key!r}, or it is no {kind.__name__}; {_WAY_OUT}")
    _check_adapter(path, adapter or {}, header.get("adapter") or {})
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
    return header


def _check_crc(path: Path, crc: dict[str, int]) -> None:
    """Every rank reads its share of the shards; an older checkpoint has no CRCs."""
    for name in sorted(crc)[distributed.rank() :: distributed.world_size()]:
        if _crc(path / name) != crc[name]:
            raise ValueError(f"checkpoint shard {path / name} is not what was written: its CRC differs; {_WAY_OUT}")


def _crc(path: Path) -> int:
    crc, block = 0, memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            crc = zlib.crc32(block[:count], crc)
    return crc


def _check_adapter(path: Path, own: dict[str, Any], saved: dict[str, Any]) -> None:
    differing = [key for key in sorted(own.keys() | saved.keys()) if own.get(key) != saved.get(key)]
    if differing == ["base"]:
        raise ValueError(
            f"checkpoint {path} is an adapter of another base: its weights hash to {saved['base'][:12]}, those of "
            f"model.path to {own['base'][:12]}; set model.path to the base that it was trained on"
        )
    if differing:
        said = "; ".join(
            f"{key} is {saved.get(key, 'not set')} there, {own.get(key, 'not set')} here" for key in differing
        )
        raise ValueError(f"checkpoint {path} is of another adapter than model.lora: {said}")


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


def require_disk(run_dir: Path, policy: Policy, config: Config) -> None:
    """Raises ValueError at the start of a run whose checkpoints and exports cannot fit: trained parameters and two moments
    in float32, keep_last + 1 times, and two exports of all; with a reference that moves, its weights once more than those.

    What such files of an earlier start hold counts as free: they are what the new ones replace.
    """
    parameters = 4 * sum(parameter.numel() for parameter in policy.parameters())
    trained = 4 * sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    keep_last = config.checkpoint.keep_last
    moving = parameters * (keep_last + 2) if config.reference.every else 0
    needed = 3 * trained * (keep_last + 1) + moving + 2 * parameters
    replaced = [path for _, path in checkpoint_dirs(run_dir / "checkpoints")[-keep_last:]]
    replaced += [run_dir / "best", run_dir / "final", run_dir / "reference"]
    needed -= sum(file.stat().st_size for folder in replaced for file in folder.rglob("*.safetensors"))
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
