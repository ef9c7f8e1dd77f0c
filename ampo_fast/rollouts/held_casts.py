"""Frozen linear layers under autocast: their weights are cast once for all tokens of a batch, not at every one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import linear


@contextlib.contextmanager
def held_casts(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Has the model's frozen float32 linear layers compute in `dtype` with casts of their weights that are kept inside.

    autocast keeps the casts of what is trained alone: the base of an adapter of 8B parameters would be 32 GB to read and
    16 GB to write for every token. The results have the same bits.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _is_cast_each_time(module)]
    for layer in layers:
        layer.forward = functools.partial(linear, weight=layer.weight.to(dtype), bias=layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_cast_each_time(layer: nn.Linear) -> bool:
    return layer.weight.dtype == torch.float32 and not layer.weight.requires_grad
