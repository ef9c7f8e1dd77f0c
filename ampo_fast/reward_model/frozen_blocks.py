"""Frozen blocks of a transformer: which parameters are trained, and their output kept instead of computed each epoch.

Shapes: n rows and L tokens of a batch, D hidden.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

Unit = tuple[int, int, int]
"""(row, first token, end) of what is computed alone, whatever shares its batch."""


@dataclass(slots=True)
class _Cache:
    left: int
    """Bytes that may still be taken."""
    kept: dict[Hashable, torch.Tensor] = field(default_factory=dict)


class FrozenBlocks:
    """Freezes embeddings and all but the last `trained` blocks; None trains everything.

    The output of the last frozen block is a fixed function of a unit's tokens: it is kept, up to limit_mib, under the
    unit's key, and put in place of the frozen blocks the next time.
    """

    def __init__(self, model: nn.Module, trained: int | None, limit_mib: int) -> None:
        self._blocks = find_blocks(model.base_model)
        self._cache = _Cache(limit_mib * 2**20)
        self.count = 0
        if trained is None:
            return
        if trained >= len(self._blocks):
            raise ValueError(
                f"model.trained_blocks = {trained}, but the model has {len(self._blocks)} blocks: "
                "leave it out to train everything"
            )
        self.count = len(self._blocks) - trained
        output = _first_output(model.base_model, self._blocks[self.count - 1])
        self._is_tuple = isinstance(output, tuple)
        self._blocks[: self.count].requires_grad_(False)
        for parameter in _read_by(_hidden(output)):
            parameter.requires_grad_(False)

    @property
    def kept(self) -> dict[Hashable, torch.Tensor]:
        return self._cache.kept

    def forward(
        self, keys: Sequence[Hashable], units: Sequence[Unit], shape: tuple[int, int], run: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """run(), with the frozen blocks left out where the outputs of all units [n, L] = shape are kept."""
        if not self.count or not (self.kept or self._cache.left > 0):
            return run()
        if all(key in self.kept for key in keys):
            first = self.kept[keys[0]]
            hidden_nLD = first.new_zeros((*shape, first.shape[1]))
            for key, (row, start, end) in zip(keys, units, strict=True):
                hidden_nLD[row, start:end] = self.kept[key]
            with self._replaced(hidden_nLD):
                return run()
        seen: list[torch.Tensor] = []
        hook = self._blocks[self.count - 1].register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            result = run()
        finally:
            hook.remove()
        for key, (row, start, end) in zip(keys, units, strict=True):
            self.keep(key, _hidden(seen[0])[row, start:end])
        return result

    def share(self, other: FrozenBlocks) -> None:
        """Uses, and adds to, the outputs that `other` keeps: for a second model of the same frozen weights.

        Raises ValueError where the frozen blocks differ.
        """
        mine, theirs = (blocks._blocks[: blocks.count].state_dict() for blocks in (self, other))
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in mine):
            raise ValueError("the frozen blocks differ: their outputs cannot be shared")
        self._cache = other._cache

    def keep(self, key: Hashable, hidden_LD: torch.Tensor) -> None:
        size = hidden_LD.numel() * hidden_LD.element_size()
        if key in self.kept:
            return
        if size > self._cache.left:
            if self._cache.left > 0:
                log.warning("model.cache_mib is full after %d texts: the others run through all blocks", len(self.kept))
            self._cache.left = 0
            return
        self._cache.left -= size
        self.kept[key] = hidden_LD.detach().clone()

    @contextlib.contextmanager
    def _replaced(self, hidden_nLD: torch.Tensor) -> Iterator[None]:
        blocks = list(self._blocks)
        for i, block in enumerate(blocks[: self.count]):
            self._blocks[i] = StandIn(block, hidden_nLD if i == self.count - 1 else None, self._is_tuple)
        try:
            yield
        finally:
            for i, block in enumerate(blocks):
                self._blocks[i] = block


class StandIn(nn.Module):
    """In a block's place: gives what it is made with, or what it is given; all else that is asked of it is the block's."""

    def __init__(self, block: nn.Module, hidden_nLD: torch.Tensor | None = None, is_tuple: bool = False) -> None:
        super().__init__()
        self.__dict__ |= {"block": block, "hidden_nLD": hidden_nLD, "is_tuple": is_tuple}  # no submodule of this one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_nLD = hidden_states if self.hidden_nLD is None else self.hidden_nLD
        return (hidden_nLD, None) if self.is_tuple else hidden_nLD


def find_blocks(base: nn.Module) -> nn.ModuleList:
    """The longest list of modules: a transformer's blocks. Raises ValueError where there is none."""
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(base).__name__} has no list of blocks: leave model.trained_blocks out")
    return max(lists, key=len)


def _hidden(output: Any) -> torch.Tensor:
    """A block's output without the attention that DeBERTa and MPNet give beside it."""
    return output[0] if isinstance(output, tuple) else output


def _first_output(base: nn.Module, block: nn.Module) -> Any:
    """What the block gives in a forward of a few tokens, with its graph."""
    seen: list[Any] = []
    with block.register_forward_hook(lambda module, args, output: seen.append(output)), torch.enable_grad():
        base(input_ids=torch.tensor([[0, 1, 2]], device=base.device))
    return seen[0]


def _read_by(tensor: torch.Tensor) -> list[nn.Parameter]:
    """The parameters that it depends on. Where a module stands does not say: OPT's embeddings stand beside its blocks, and
    every block of DeBERTa reads the encoder's rel_embeddings."""
    found, seen, left = [], set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        left += [before for before, _ in node.next_functions]
    return found
