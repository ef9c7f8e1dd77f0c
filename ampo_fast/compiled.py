"""The compiled extension: whether it is there, what it can take, and the numpy views that it reads."""

from __future__ import annotations

import functools
import logging

import numpy as np
import torch

from ampo_fast.validation import check_choice

try:
    from ampo_fast import _C
except ImportError:  # a checkout that was never built: the torch path still answers, and resolve_impl says so
    _C = None

log = logging.getLogger(__name__)

IMPLS = ("auto", "torch", "cpp", "cuda")


def resolve_impl(impl: str, points: torch.Tensor | None = None, why_not_cuda: str | None = None) -> str:
    """ "cpp", "torch" or "cuda". auto: cuda for CUDA points where it is built and fits, else cpp where that is built, else torch.

    CUDA points that cuda does not take are copied to the host. Each choice is logged once. Raises ValueError for an impl
    asked for by name that cannot run, with what would make it run.
    """
    check_choice("impl", impl, IMPLS)
    if impl == "cpp" and _C is None:
        raise ValueError(
            'impl = "cpp" needs the compiled extension: pip install the package (a C++ compiler is enough)'
        )
    is_cuda = points is not None and points.is_cuda
    reason = _why_no_cuda_at_all(is_cuda) or why_not_cuda
    if impl == "cuda" and reason:
        raise ValueError(f'impl = "cuda" cannot run this: {reason}')
    if impl == "auto" and is_cuda and not reason:
        impl = "cuda"
    elif impl == "auto":
        impl = "torch" if _C is None else "cpp"
        _log_once(impl, reason if is_cuda else None)
    return impl


def _why_no_cuda_at_all(is_cuda: bool) -> str | None:
    if _C is None or not _C.has_cuda:
        return "the extension was built without CUDA; install with -C cmake.define.AMPO_CUDA=ON where nvcc is"
    return None if is_cuda else "the points are on the CPU; move them to a CUDA device"


def why_not_dtype(points: torch.Tensor) -> str | None:
    return None if points.dtype in (torch.float32, torch.bfloat16) else f"{points.dtype} runs on the host"


@functools.cache
def _log_once(impl: str, why_not_cuda: str | None) -> None:
    if why_not_cuda:
        log.warning("CUDA points are copied to the host for selection: %s", why_not_cuda)
    if impl == "torch":
        log.warning("the compiled selector is not built; selection runs in torch, slower")
    else:
        log.info("selection runs compiled, vector unit: %s", _C.vector_path())


def as_numpy(points: torch.Tensor) -> np.ndarray:
    """float32 and float64 without a copy, bfloat16 as the uint16 of its bits, anything else as float32."""
    points = points.contiguous()
    if points.dtype == torch.bfloat16:
        return points.view(torch.int16).numpy().view(np.uint16)
    return (points if points.dtype in (torch.float32, torch.float64) else points.float()).numpy()
