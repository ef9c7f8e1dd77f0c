"""A policy's tensors on their way out: named as in a model's files, and a file's worth of them at a time."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from ampo_fast.led_policy import LedPolicy
from ampo_fast.model import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = re.compile(r".*?\.\d+\.")


class NamedWeights:
    """A policy's tensors by their names in the base model's files; a tied head has its own, an adapter is merged.

    Can be iterated as often as needed; each time is one of all ranks and gathers a sharded policy anew, tensor by tensor.
    """

    def __init__(self, policy: Policy | LedPolicy) -> None:
        self._policy = policy

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return as_in_files(self._policy.model, self._policy.whole_tensors())


def as_in_files(
    model: PreTrainedModel, named_tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under the names, and in the shapes, of its files, which vLLM and others read.

    transformers renames some when it loads a model, and stacks the experts of a layer: such a model goes block by block
    through transformers' own way back, any other tensor by tensor.
    """
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    is_stacked = any(isinstance(way, WeightConverter) for way in getattr(model, "_weight_conversions", None) or ())
    for _, piece in itertools.groupby(named_tensors, key=_block_of if is_stacked else _name_of):
        yield from revert_weight_conversion(model, dict(piece)).items()


def _name_of(item: tuple[str, torch.Tensor]) -> str:
    return item[0]


def _block_of(item: tuple[str, torch.Tensor]) -> str:
    block = _BLOCK.match(item[0])
    return block[0] if block else item[0]


def pieces(
    named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, max_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Copies in host memory, as many at a time as make up one file (one at least)."""
    piece: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, tensor in named_tensors:
        copy = tensor.to("cpu", dtype, copy=True)
        if piece and num_bytes + copy.nbytes > max_bytes:
            yield piece
            piece, num_bytes = {}, 0
        piece[name] = copy
        num_bytes += copy.nbytes
    if piece:
        yield piece
