"""Soft-capped attention over packed groups on CUDA without flash-attn: FlexAttention, whose scores may be changed.

No key or value is copied: a block mask says which tokens a token sees, so that blocks of other groups and of other responses
are never computed. torch's other kernels know no soft cap, and plain operations would write every score.

One program serves all lengths, windows and caps. For that its shapes are dynamic, and the window and the cap are tensors: of a
Python number that a mask or a change of scores closes over torch's compiler (2.11, 2.13) makes a symbol, which it cannot lower
there.

Shapes: T packed tokens, H query heads, K key/value heads, A head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from ampo_fast.dispatch import on_device

_NO_WINDOW = torch.iinfo(torch.int32).max  # no place is further back, and place - this does not overflow


@dataclass(frozen=True, slots=True)
class FlexPlan:
    """Where each packed token belongs, and the block masks, built once per forward and window."""

    group_T: torch.Tensor
    response_T: torch.Tensor
    """0 for the prompt, 1, 2, ... for its responses."""
    place_T: torch.Tensor
    """The token's position in its own sequence; a response's first one follows the prompt's last one."""
    _masks: dict[int | None, Any] = field(default_factory=dict)
    _caps: dict[float, Callable] = field(default_factory=dict)

    @classmethod
    def build(cls, piece_lengths: Sequence[int], responses_per_group: Sequence[int], device: torch.device) -> FlexPlan:
        """piece_lengths: [prompt, y1, y2, ...] of all groups, in packed order."""
        left = iter(piece_lengths)
        groups, responses, places = [], [], []
        for group, num_responses in enumerate(responses_per_group):
            prompt, *own = itertools.islice(left, 1 + num_responses)
            for response, length in enumerate((prompt, *own)):
                start = prompt if response else 0
                groups.append(torch.full((length,), group, dtype=torch.int32))
                responses.append(torch.full((length,), response, dtype=torch.int32))
                places.append(torch.arange(start, start + length, dtype=torch.int32))
        return cls(*(on_device(torch.cat(parts), device) for parts in (groups, responses, places)))

    def block_mask(self, window: int | None) -> Any:
        """Every token sees itself and what came before in its prompt and its own response, `window` tokens in all at most."""
        if window not in self._masks:
            group_T, response_T, place_T = self.group_T, self.response_T, self.place_T
            reach = _number(_NO_WINDOW if window is None else window, place_T.dtype, place_T.device)

            # Comparisons alone: this runs on all pairs of tokens, and a difference of places would be T x T numbers.
            def sees(batch, head, query, key):
                is_own = (response_T[key] == 0) | (response_T[key] == response_T[query])
                is_near = (place_T[key] <= place_T[query]) & (place_T[query] - reach < place_T[key])
                return (group_T[key] == group_T[query]) & is_own & is_near

            size = group_T.numel()
            self._masks[window] = _flex().create_block_mask(sees, None, None, size, size, device=group_T.device)
        return self._masks[window]

    def cap(self, softcap: float) -> Callable:
        """What makes softcap tanh(score / softcap) of a score."""
        if softcap not in self._caps:
            limit = _number(softcap, torch.float32, self.place_T.device)
            self._caps[softcap] = lambda score, batch, head, query, key: limit * torch.tanh(score / limit)
        return self._caps[softcap]


def _number(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Filled on the device: a copy from the host would wait for it."""
    return torch.full((), value, dtype=dtype, device=device)


def softcapped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: FlexPlan,
    *,
    scale: float,
    softcap: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """softmax(softcap tanh(q k^T scale / softcap)) v of every token over what it sees, [1, H, T, A] like the query."""
    changes = {"score_mod": plan.cap(softcap), "block_mask": plan.block_mask(sliding_window)}
    return _kernel(query.is_cuda)(query, key, value, **changes, scale=scale, enable_gqa=True)


def can_run(query: torch.Tensor, softcap: float | None) -> bool:
    return query.is_cuda and softcap is not None


@functools.cache
def _kernel(is_compiled: bool) -> Callable:
    # dynamic = False compiles every batch anew, for seconds; dynamic = None the first one in vain, and it takes numbers that
    # changed for symbols too.
    function = _flex().flex_attention
    return torch.compile(function, dynamic=True) if is_compiled else function


def _flex() -> ModuleType:
    from torch.nn.attention import flex_attention  # where needed: it loads the compiler, which takes seconds

    return flex_attention
