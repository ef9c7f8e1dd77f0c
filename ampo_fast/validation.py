"""Argument checks shared by the public ops: shapes, dtypes, devices and offsets always raise; values where that is free."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real

import torch

_VALIDATE_VALUES_ON_CUDA = False
_nan_is_let_through: ContextVar[bool] = ContextVar("nan_is_let_through", default=False)


def validate(flag: bool) -> None:
    """Whether value checks (target range, NaN) also run, and wait for the device, on CUDA tensors. They always run on a CPU.

    Off, a bad target or logit makes its log-prob NaN, and the loss with it, which a trainer's non-finite guard sees.
    """
    global _VALIDATE_VALUES_ON_CUDA
    _VALIDATE_VALUES_ON_CUDA = bool(flag)


def checks_values(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" or _VALIDATE_VALUES_ON_CUDA


def check_offsets(name: str, offsets: torch.Tensor, total: int, *, allow_empty: bool = True) -> torch.Tensor:
    """offsets as int64 on the CPU: first 0, last `total`, never falling. A CUDA tensor is copied to the host, once."""
    if (
        not isinstance(offsets, torch.Tensor)
        or offsets.ndim != 1
        or offsets.numel() < 1
        or offsets.dtype != torch.int64
    ):
        raise ValueError(f"{name} must be a 1-D int64 tensor of count + 1 entries, got {describe(offsets)}")
    offsets = offsets.cpu()
    sizes = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(f"{name} must rise from 0 to {total}, got {offsets[0]} .. {offsets[-1]}")
    if bool((sizes < 0).any()):
        i = int((sizes < 0).nonzero()[0])
        raise ValueError(
            f"{name} must rise from 0 to {total}, but entry {i + 1} is {offsets[i + 1]} after {offsets[i]}"
        )
    if not allow_empty and bool((sizes == 0).any()):
        raise ValueError(f"{name}: segment {int((sizes == 0).nonzero()[0])} is empty; leave it out")
    return offsets


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}; use one of {', '.join(map(repr, choices))}")


def whole_number(name: str, value: object) -> int:
    """The value as an int, numpy's and 0-d tensors' included. Raises ValueError for anything that is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} = {value!r}; it must be a whole number") from None


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        way_out = "; torch.from_numpy makes one" if type(value).__module__ == "numpy" else ""
        raise ValueError(f"{name} must be a torch tensor, got {type(value).__name__}{way_out}")
    if type(value).__name__ == "DTensor":
        raise ValueError(
            f"{name} is a DTensor; pass {name}.full_tensor(), or {name}.to_local() where each rank has its own"
        )


def check_floats(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must hold floats, got {tensor.dtype}; {name}.float() converts them")


def check_normalizer(normalizer: float | torch.Tensor | None) -> None:
    """What a summed loss is divided by: a positive number, or a 0-d tensor (its value is looked at on a CPU), or None."""
    if normalizer is None:
        return
    if isinstance(normalizer, torch.Tensor):
        if normalizer.ndim:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got one of shape {tuple(normalizer.shape)}")
        if not checks_values(normalizer):
            return
    elif not isinstance(normalizer, Real):
        raise ValueError(f"normalizer = {normalizer!r}; it must be a number or a 0-d tensor")
    if not bool(normalizer > 0):
        raise ValueError(f"normalizer = {normalizer}; it divides the loss and must be positive")


def check_vector(name: str, vector: torch.Tensor, length: int, device: torch.device) -> None:
    check_tensor(name, vector)
    if vector.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}], got {describe(vector)}")
    if vector.device != device:
        raise ValueError(f"{name} is on {vector.device}, the other tensors on {device}")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    if _nan_is_let_through.get() or not checks_values(tensor) or not tensor.is_floating_point():
        return
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinity; mask those rows before the call")


@contextmanager
def nan_let_through() -> Iterator[None]:
    """Inside, NaN and infinite values do not raise: for a trainer whose own guard leaves the step out, on all ranks alike."""
    token = _nan_is_let_through.set(True)
    try:
        yield
    finally:
        _nan_is_let_through.reset(token)


def check_logprobs(logp_R: torch.Tensor) -> None:
    """Raises ValueError naming the first row whose logits are NaN; on CUDA only after validate(True)."""
    if _nan_is_let_through.get() or not checks_values(logp_R):
        return
    is_nan_R = torch.isnan(logp_R)
    if bool(is_nan_R.any()):
        row = int(is_nan_R.nonzero()[0])
        raise ValueError(
            f"the logits of row {row} are NaN; look for NaN or infinity in hidden_RD, weight_VD and bias_V"
        )


def check_first_order(op: str) -> None:
    """Raises RuntimeError inside a backward whose result is to be differentiated again (create_graph=True).

    autograd's once_differentiable would leave the second derivative out, in silence, where the upstream gradient is a constant,
    as a loss's is, or where another path reaches the inputs.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} has no second derivative: call backward without create_graph, or take ampo_fast.reference's plain torch"
        )


def check_head(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_R: torch.Tensor,
    bias_V: torch.Tensor | None,
    eos_id: int | None,
) -> None:
    """Raises ValueError naming the argument that does not fit hidden [R, D], weight [V, D], target [R], bias [V]."""
    if type(weight_VD).__name__ == "DTensor":
        raise ValueError("weight_VD is a sharded DTensor; call this inside the FSDP root's forward, where it is whole")
    check_tensor("hidden_RD", hidden_RD)
    check_tensor("weight_VD", weight_VD)
    if hidden_RD.ndim != 2 or weight_VD.ndim != 2 or hidden_RD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden_RD and weight_VD must be [R, D] and [V, D], got {tuple(hidden_RD.shape)} and {tuple(weight_VD.shape)}"
        )
    if weight_VD.device != hidden_RD.device:
        raise ValueError(f"weight_VD is on {weight_VD.device}, hidden_RD on {hidden_RD.device}; move one of them")
    if hidden_RD.dtype != weight_VD.dtype or not hidden_RD.is_floating_point():
        raise ValueError(
            f"hidden_RD and weight_VD must share a float dtype, got {hidden_RD.dtype} and {weight_VD.dtype}; "
            "cast one, hidden_RD.to(weight_VD.dtype) for example"
        )
    num_tokens = weight_VD.shape[0]
    check_vector("target_R", target_R, hidden_RD.shape[0], hidden_RD.device)
    if target_R.dtype != torch.int64:
        raise ValueError(f"target_R must be int64, got {target_R.dtype}")
    if bias_V is not None:
        check_vector("bias_V", bias_V, num_tokens, hidden_RD.device)
    if eos_id is not None and (isinstance(eos_id, bool) or not isinstance(eos_id, Integral)):
        raise ValueError(
            f"eos_id = {eos_id!r}; it must be one token id: of several pass the one that ends the responses"
        )
    if eos_id is not None and not 0 <= eos_id < num_tokens:
        raise ValueError(f"eos_id = {eos_id} is outside the vocabulary of {num_tokens}")
    if (
        target_R.numel()
        and checks_values(target_R)
        and not 0 <= int(target_R.min()) <= int(target_R.max()) < num_tokens
    ):
        row = int(((target_R < 0) | (target_R >= num_tokens)).nonzero()[0])
        raise ValueError(
            f"target_R[{row}] = {int(target_R[row])} is outside the vocabulary, 0 .. {num_tokens - 1}; leave padding rows out"
        )


def describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
