"""Ranks under torchrun: start and stop, agreement between ranks, FSDP2, and errors that name the rank and the phase.

One process without torchrun is one rank without a process group: every function here then answers at once.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import pickle
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

T = TypeVar("T")

_store: dist.Store | None = None
_timeout_s = 1800.0
_phase = "start"
_groups = itertools.count()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This process's GPU (LOCAL_RANK), or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


# --- start and stop ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group(timeout_s: float) -> Iterator[None]:
    """Joins the group that torchrun's environment describes, and leaves it at the end; nothing for one process.

    timeout_s: how long a rank waits for the others, here and in every collective.
    Raises ValueError for an environment that does not describe a group, or a rank that two processes claim;
    TimeoutError naming the ranks that did not come.
    """
    own, size = _environment()
    if size == 1:
        yield
        return
    global _store, _timeout_s
    _timeout_s = timeout_s
    timeout = datetime.timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    _store = _meet(own, size, timeout)
    # The CPU's gloo beside NCCL carries the objects that ranks exchange, and the checkpoints.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # A name of its own for every group of this process: the addresses that the last one left in the store are dead.
    named = dist.PrefixStore(f"group/{next(_groups)}", _store)
    dist.init_process_group(backend, store=named, rank=own, world_size=size, timeout=timeout)
    yield
    # Not after an error: the peers may be gone, and leaving a group is something that its ranks do together.
    dist.destroy_process_group()
    _store = None


def second_group() -> dist.ProcessGroup | None:
    """All ranks again, on gloo, for a thread whose collectives must not meet those of the main one; None for one process."""
    if world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=_timeout_s))


def _environment() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them."""
    values = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    try:
        own, size = int(values["RANK"]), int(values["WORLD_SIZE"])
    except ValueError:
        raise ValueError(f"RANK and WORLD_SIZE must be whole numbers, got {values}; start with torchrun") from None
    if not 0 <= own < size:
        raise ValueError(f"RANK = {own} is not one of WORLD_SIZE = {size} ranks; start with torchrun")
    if size > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise ValueError(f"WORLD_SIZE = {size} without MASTER_ADDR and MASTER_PORT; start with torchrun")
    return own, size


def _meet(own: int, size: int, timeout: datetime.timedelta) -> dist.Store:
    """The store all ranks share, once each rank has come to it exactly once."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_server = own == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's agent serves itself
    try:
        shared = dist.TCPStore(
            host, port, is_master=is_server, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistNetworkError as error:
        raise ConnectionError(
            f"rank {own} of {size} found nobody at MASTER_ADDR:MASTER_PORT = {host}:{port} within "
            f"{timeout.total_seconds():.0f} s (run.timeout_s); is rank 0 running?"
        ) from error
    # torchrun keeps one store over its restarts: an earlier attempt's ranks must not count as duplicates.
    store = dist.PrefixStore(f"ampo_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
    store.set_timeout(timeout)
    me = f"process {os.getpid()} on {platform.node()}"
    other = store.compare_set(f"who/{own}", "", me).decode()
    if other != me:
        raise ValueError(f"RANK = {own} of {size} is claimed by {me} and by {other}; every process needs its own")
    try:
        store.wait([f"who/{other}" for other in range(size)], timeout)
    except RuntimeError as error:
        missing = [other for other in range(size) if not store.check([f"who/{other}"])]
        named = ", ".join(map(str, missing))
        raise TimeoutError(
            f"rank {own} waited {timeout.total_seconds():.0f} s (run.timeout_s) for rank {named} of {size}; "
            "is its process running, and can it reach MASTER_ADDR?"
        ) from error
    return store


# --- agreement --------------------------------------------------------------------------------------------------------


def all_gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order, on every rank. group: whose collective is used; default all ranks' own."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group)
    return values


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on rank 0; an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values or []


def from_main(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], T]) -> T:
    """Runs work on rank 0 alone; its result, or its exception, is every rank's."""
    if world_size() == 1:
        return work()
    result, error = None, None
    if is_main():
        try:
            result = work()
        except Exception as caught:  # whatever stops rank 0 must stop the others too, with the same words
            error = caught
    result, told = from_main((result, portable(error)))
    if told is not None:
        raise error or told
    return result


def dealt_by_main(work: Callable[[], Sequence[T]]) -> T:
    """Runs work on rank 0 alone: it makes one value a rank, and each rank gets its own; an exception is every rank's."""
    made: list[T] = []
    on_main(lambda: made.extend(work()))
    if world_size() == 1:
        return made[0]
    own: list[Any] = [None]
    dist.scatter_object_list(own, made or None, src=0)
    return own[0]


@contextlib.contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """What any rank raises inside is raised on every rank. All must enter; inside none may wait for another.

    group: as all_gather's.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    told = next((other for other in all_gather(portable(error), group) if other is not None), None)
    if told is not None:
        raise error or told


def portable(error: Exception | None) -> Exception | None:
    """The error as other ranks can receive it: itself, or its name and words where it cannot be pickled and read back."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


# --- errors -----------------------------------------------------------------------------------------------------------


def note_phase(name: str) -> None:
    """Says what this rank is about to do, for the errors of this one and of the others should it stop or hang."""
    global _phase
    _phase = name
    if _store is not None:
        _store.set(f"phase/{rank()}", name)


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Turns a collective's failure into a ConnectionError that names this rank, its phase, and where the others were."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not _is_collective(error):
            raise
        first = str(error).splitlines()[0]
        raise ConnectionError(
            f"rank {rank()} of {world_size()} in {_phase}: another rank stopped, or did not answer within "
            f"{_timeout_s:.0f} s (run.timeout_s); last seen: {_last_seen()}. Its own error is in its output; "
            f"--resume auto goes on from the last checkpoint ({first})"
        ) from error


def _is_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "Timed out waiting")
    )


def _last_seen() -> str:
    seen = []
    for other in range(world_size()):
        if other == rank():
            continue
        try:
            known = _store is not None and _store.check([f"phase/{other}"])
            where = _store.get(f"phase/{other}").decode() if known else "start"
        except RuntimeError:  # the store went down with the machine that held it
            where = "unknown"
        seen.append(f"rank {other} in {where}")
    return ", ".join(seen)


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def shard(root: nn.Module, blocks: Iterable[nn.Module], compute_dtype: torch.dtype, methods: Iterable[str]) -> None:
    """Shards every block and then the root over all ranks, in place; parameters, gradients and their sums are float32.

    Rank 0's values count; on the others parameters may still be on the meta device: no more than a block of them is ever
    whole there. methods: forwards of the root beside `forward`. Everything outside the blocks (embedding, tied head, last
    norm) is one unit, whole inside the root's forwards. Gradients are summed, not averaged: losses carry the global count.
    """
    blocks = list(blocks)
    inside = {module for block in blocks for module in block.modules()}
    mesh = init_device_mesh(device().type, (world_size(),))
    options = {"param_dtype": compute_dtype, "reduce_dtype": torch.float32}
    for block in blocks:
        share_values(block.modules())
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(**options))
    share_values(module for module in root.modules() if module not in inside)
    # Casting the root's inputs would round rewards and reference log-probs to the compute type, and its loss.
    fully_shard(
        root, mesh=mesh, mp_policy=MixedPrecisionPolicy(**options, output_dtype=None, cast_forward_inputs=False)
    )
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, which is how FSDP divides while it reduces.
            module.set_force_sum_reduction_for_comms(True)
            # Else the gradient of what one rank alone used (an expert, say) is added to that of what another used instead.
            if _counts_missing_gradients():
                module.set_reduce_scatter_unused_params(True, recurse=False)
    for name in methods:
        register_fsdp_forward_method(root, name)


def _counts_missing_gradients() -> bool:
    return hasattr(FSDPModule, "set_reduce_scatter_unused_params")  # torch 2.11 has no such switch


def check_gradients(root: nn.Module) -> None:
    """Raises ValueError, after a backward, where ranks used different parameters and this torch mixes up their gradients."""
    if world_size() == 1 or _counts_missing_gradients():
        return
    used = [name for name, parameter in root.named_parameters() if parameter.grad is not None]
    everywhere = [set(names) for names in all_gather(used)]
    differing = sorted(set.union(*everywhere) - set.intersection(*everywhere))
    if differing:
        raise ValueError(
            f"the ranks used different parameters of the model ({', '.join(differing[:3])}, ...), whose gradients "
            f"torch {torch.__version__} would add to each other: train on one rank, or with torch 2.13"
        )


def share_values(modules: Iterable[nn.Module]) -> None:
    """Puts rank 0's parameters and buffers of the modules (not of their children) on every rank's device, one by one."""
    received: dict[
        int, tuple[torch.Tensor, torch.Tensor]
    ] = {}  # with what it replaces: an id is reused once that is gone
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in received:  # else tied to one that came before
                    received[id(tensor)] = tensor, _from_main(tensor)
                tensors[name] = received[id(tensor)][1]


def _from_main(tensor: torch.Tensor) -> torch.Tensor:
    there = device()
    data = tensor.detach().to(there).contiguous() if is_main() else torch.empty_like(tensor, device=there)
    dist.broadcast(data.detach(), src=0)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def sync_gradients(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward reduces gradients over ranks: only an accumulation's last one should."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)


def is_sharded(module: nn.Module) -> bool:
    """Whether its forwards are ones of all ranks."""
    return isinstance(module, FSDPModule)


def reshard(module: nn.Module) -> None:
    """Frees the whole parameters that a pass without gradients leaves behind; weights loaded before that are ignored."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a sharded one (all ranks must ask), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def to_the_end(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Walks over items that every rank must walk over: whatever the caller left of them is walked through at the end."""
    iterator = iter(items)
    try:
        yield itertools.chain(iterator)  # which cannot be closed, as a generator is that is left early
    finally:
        for _ in iterator:
            pass


def whole_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of the module's state, gathered one at a time; all ranks must iterate to the end."""
    reshard(module)
    for name, tensor in module.state_dict().items():
        yield name, whole(tensor.detach())
