"""The linear layers of a decoding step on a CPU: a row for each candidate, against the whole weight."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from ampo_fast.compiled import _C

_MAX_ROWS = 96  # beyond it torch's own products are as fast


@contextlib.contextmanager
def fast_few_rows(model: nn.Module) -> Iterator[None]:
    """Has the model's float32 linear layers go through csrc/few_rows.h where they are given few rows, without gradients;
    all others, and machines without AVX2, as before.

    A row's result has the same bits whatever rows are beside it.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _is_taken(module.weight)]
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.detach().numpy()
        layer.forward = functools.partial(_forward, layer, layer.weight.detach().numpy(), bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_taken(weight_OI: torch.Tensor) -> bool:
    return (
        _C is not None
        and _C.vector_path() != "plain"
        and weight_OI.dtype == torch.float32
        and weight_OI.is_contiguous()
    )


def _forward(layer: nn.Linear, weight_OI: np.ndarray, bias_O: np.ndarray | None, x: torch.Tensor) -> torch.Tensor:
    num_rows = x.numel() // layer.in_features
    if not 1 <= num_rows <= _MAX_ROWS:
        return linear(x, layer.weight, layer.bias)
    y_RO = _C.few_rows(x.reshape(num_rows, -1).contiguous().numpy(), weight_OI, bias_O)
    return torch.from_numpy(y_RO).view(*x.shape[:-1], -1)
