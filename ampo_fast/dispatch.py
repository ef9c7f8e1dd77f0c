"""Which implementation of an operation runs: by stated facts, said once in the log; asked for by name, that one or an error."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch

log = logging.getLogger(__name__)


def resolve_impl(op: str, impl: str, tensor: torch.Tensor) -> str:
    """ "torch" or "triton" for an operation on `tensor`.

    "auto": triton for CUDA tensors of at most float32 where triton is installed, else torch. "triton" by name where it
    cannot run: ValueError with what would make it run.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f'impl = {impl!r}; {op} knows "auto", "torch" and "triton"')
    if impl == "torch":
        return impl
    hindrance = _why_no_triton(tensor)
    if impl == "triton" and hindrance:
        raise ValueError(f'impl = "triton" cannot run {op} here: {hindrance}; or use impl = "auto"')
    chosen = "torch" if hindrance or not tensor.is_cuda else "triton"
    if impl == "auto":
        _say_once(op, chosen, hindrance or "a CUDA tensor")
        return chosen
    return impl


def on_device(plan: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A small tensor made on the host, such as offsets, on `device`, and nobody waits for what the device has still to do.

    Ordinary host memory is staged before the copy returns, so `plan` may be freed or changed right after.
    """
    return plan.to(device, non_blocking=True)


def _why_no_triton(tensor: torch.Tensor) -> str | None:
    if tensor.dtype == torch.float64:
        return "float64 is computed by torch alone; pass float32 or bfloat16"
    if not _has_triton():
        return "triton is not installed; pip install 'ampo-fast[triton]'"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {tensor.device}; move them to a CUDA device (TRITON_INTERPRET=1 interprets, slowly)"
    return None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _say_once(op: str, chosen: str, why: str) -> None:
    log.info("%s runs in %s: %s", op, chosen, why)
