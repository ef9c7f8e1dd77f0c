"""Attention over packed groups [prompt | y1 | y2 | ...]: each prompt's keys and values are computed once and shared.

Linear layers see every prompt token once. Only inside attention are the prompt's K and V put before each response's
own, and torch SDPA runs on the pieces. Registered with transformers' AttentionInterface, so Llama-like models need no
change to their code; `segments=plan` travels through the model's forward as a keyword.

Shapes: T packed tokens, H query heads, K key/value heads, A head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ampo_fast.types import Segment

NAME = "ampo_segments"

# Keywords that change what attention computes and that this one does not honour. Raising beats a wrong result.
_REFUSED = ("softcap", "sliding_window", "s_aux", "sinks", "position_bias")


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """The pieces of one packed batch, and the additive masks that its responses need, built once per forward."""

    piece_lengths: tuple[int, ...]
    """Lengths of [prompt, y1, y2, ...] of all groups, in packed order; zero-length responses included."""
    responses_per_group: tuple[int, ...]
    mask: dict[tuple[int, int], torch.Tensor]
    """(prompt length, response length) -> [response, prompt + response] additive mask."""

    @classmethod
    def build(cls, segments: Sequence[Segment], dtype: torch.dtype, device: torch.device) -> SegmentPlan:
        lengths = [length for s in segments for length in (s.prompt_length, *s.response_lengths)]
        shapes = {(s.prompt_length, n) for s in segments for n in s.response_lengths if n}
        masks = {(p, n): _bottom_right_causal(p, n, dtype, device) for p, n in shapes}
        return cls(tuple(lengths), tuple(len(s.response_lengths) for s in segments), masks)


def _bottom_right_causal(prompt: int, response: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    allowed = torch.ones(response, prompt + response, dtype=torch.bool, device=device).tril(diagonal=prompt)
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -torch.inf)


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: SegmentPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature; query [1, H, T, A], key and value [1, K, T, A] -> [1, T, H, A].

    Without `segments` (generation) it is transformers' own SDPA attention.
    """
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused or dropout:
        raise ValueError(
            f"shared-prefix attention does not honour {', '.join(refused) or 'dropout'}; "
            'set model.attention = "unshared" for this model'
        )
    groups = query.shape[1] // key.shape[1]
    # split, not slices: the backward of a slice writes a full-size gradient, the backward of split is one cat.
    query_pieces = query.split(segments.piece_lengths, dim=2)
    key_pieces = key.repeat_interleave(groups, dim=1).split(segments.piece_lengths, dim=2)
    value_pieces = value.repeat_interleave(groups, dim=1).split(segments.piece_lengths, dim=2)
    out, i = [], 0
    for num_responses in segments.responses_per_group:
        prompt_key, prompt_value = key_pieces[i], value_pieces[i]
        out.append(
            scaled_dot_product_attention(query_pieces[i], prompt_key, prompt_value, is_causal=True, scale=scaling)
        )
        for j in range(i + 1, i + 1 + num_responses):
            if query_pieces[j].shape[2] == 0:
                continue
            keys = torch.cat((prompt_key, key_pieces[j]), dim=2)
            values = torch.cat((prompt_value, value_pieces[j]), dim=2)
            mask = segments.mask[prompt_key.shape[2], query_pieces[j].shape[2]]
            out.append(scaled_dot_product_attention(query_pieces[j], keys, values, attn_mask=mask, scale=scaling))
        i += 1 + num_responses
    return torch.cat(out, dim=2).transpose(1, 2), None


def register() -> None:
    """Makes NAME known to transformers; no mask function is registered, so models pass 4-D masks through untouched."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, segment_attention)


def why_not_shared(model: Any) -> str | None:
    """Why a transformers model cannot run shared-prefix attention, or None where it can."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention has a softcap"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of type {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"it attends through a sliding window of {config.sliding_window}"
    return None
