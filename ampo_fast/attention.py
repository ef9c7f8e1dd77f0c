"""Attention over packed groups [prompt | y1 | y2 | ...]: each prompt's keys and values are computed once and shared.

Linear layers see every prompt token once. Only inside attention are the prompt's K and V put before each response's
own. In half precision on CUDA one variable-length kernel does them all (attention_varlen.py), or FlexAttention where scores
are soft-capped and flash-attn is missing (attention_flex.py); elsewhere torch SDPA runs on the pieces (a few plain
operations where scores are soft-capped). Registered with transformers' AttentionInterface, so
Llama-like models need no change to their code; `segments=plan` travels through the model's forward as a keyword.

Shapes: T packed tokens, H query heads, K key/value heads, A head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ampo_fast import attention_flex, attention_varlen
from ampo_fast.attention_flex import FlexPlan
from ampo_fast.attention_varlen import VarlenPlan
from ampo_fast.types import Segment

NAME = "ampo_segments"

# Keywords that models hand on to every attention and that change nothing here; any other that is set is refused.
_HARMLESS = {
    "cache_position", "is_causal", "num_items_in_batch", "output_attentions", "output_hidden_states", "position_ids",
    "return_dict", "use_cache",
}  # fmt: skip


_MAX_PADDED = 1.25
"""A group's responses attend in one call where padding them to one length makes at most this many times their tokens."""


@dataclass(eq=False, slots=True)
class SegmentPlan:
    """The pieces of one packed batch, and the additive masks that they need, built once per forward.

    Not frozen: of a frozen dataclass torch 2.11's compiler guards every field, and each new number of pieces is a new program.
    """

    piece_lengths: tuple[int, ...]
    """Lengths of [prompt, y1, y2, ...] of all groups, in packed order; zero-length responses included."""
    responses_per_group: tuple[int, ...]
    windows: set[int | None] = field(default_factory=set)
    """What the layers that ran gave as their sliding window."""
    _masks: dict[tuple, torch.Tensor] = field(default_factory=dict)
    _varlen: dict[torch.device, VarlenPlan] = field(default_factory=dict)
    _flex: dict[torch.device, FlexPlan] = field(default_factory=dict)

    @classmethod
    def build(cls, segments: Sequence[Segment]) -> SegmentPlan:
        lengths = [length for s in segments for length in (s.prompt_length, *s.response_lengths)]
        return cls(tuple(lengths), tuple(len(s.response_lengths) for s in segments))

    def mask(self, before: int, query: torch.Tensor, window: int | None) -> torch.Tensor:
        """[L, before + L] additive, of the query's type, for a query [1, H, L, A] that `before` keys came before; each
        sees itself and what came before, `window` tokens in all at most. The layers share it."""
        key = before, query.shape[2], window, query.dtype
        if key not in self._masks:
            allowed = torch.ones(query.shape[2], before + query.shape[2], dtype=torch.bool, device=query.device)
            allowed = allowed.tril(diagonal=before)
            if window is not None:
                allowed = allowed.triu(diagonal=before - window + 1)
            self._masks[key] = query.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
        return self._masks[key]

    def varlen(self, device: torch.device) -> VarlenPlan:
        if device not in self._varlen:
            self._varlen[device] = VarlenPlan.build(self.piece_lengths, self.responses_per_group, device)
        return self._varlen[device]

    def flex(self, device: torch.device) -> FlexPlan:
        if device not in self._flex:
            self._flex[device] = FlexPlan.build(self.piece_lengths, self.responses_per_group, device)
        return self._flex[device]


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    segments: SegmentPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature; query [1, H, T, A], key and value [1, K, T, A] -> [1, T, H, A], contiguous.

    Raises ValueError without `segments`, and for a keyword that it does not honour: a wrong result would be silent.
    """
    refused = [name for name, value_ in kwargs.items() if value_ is not None and name not in _HARMLESS]
    refused += ["dropout"] * bool(dropout) + ["is_causal = False"] * (kwargs.get("is_causal") is False)
    refused += ["a mask of the model's own"] * (attention_mask is not None)
    if refused or segments is None:
        raise ValueError(
            f"shared-prefix attention does not honour {', '.join(refused) or 'a call without segments'}; "
            'set model.attention = "unshared" for this model'
        )
    options = {"scale": scaling if scaling is not None else query.shape[-1] ** -0.5, "softcap": softcap}
    options["sliding_window"] = sliding_window
    segments.windows.add(sliding_window)
    attend = _by_pieces
    if attention_varlen.can_run(query, softcap):
        attend = _by_kernel
    elif attention_flex.can_run(query, softcap):
        attend = _by_flex
    # Contiguous, as transformers' own: some models take a view of it.
    return attend(query, key, value, segments, **options).contiguous(), None


def _by_kernel(query, key, value, segments: SegmentPlan, **options: Any) -> torch.Tensor:
    dtype = attention_varlen.compute_dtype(query)
    query_THA, key_TKA, value_TKA = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    plan = segments.varlen(query.device)
    return attention_varlen.varlen_attention(query_THA, key_TKA, value_TKA, plan, **options)[None]


def _by_flex(query, key, value, segments: SegmentPlan, **options: Any) -> torch.Tensor:
    dtype = attention_varlen.compute_dtype(query)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    plan = segments.flex(query.device)
    return attention_flex.softcapped_attention(query, key, value, plan, **options).transpose(1, 2)


def _by_pieces(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: SegmentPlan,
    *,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    options = {"scale": scale, "softcap": softcap}
    # split, not slices: the backward of a slice writes a full-size gradient, the backward of split is one cat.
    query_pieces, key_pieces, value_pieces = (x.split(segments.piece_lengths, dim=2) for x in (query, key, value))
    out, i = [], 0
    for num_responses in segments.responses_per_group:
        prompt_key, prompt_value = key_pieces[i], value_pieces[i]
        prompt = prompt_key.shape[2]
        is_plain = softcap is None and (sliding_window is None or sliding_window >= prompt)
        mask = None if is_plain else segments.mask(0, query_pieces[i], sliding_window)
        out.append(_attend(query_pieces[i], prompt_key, prompt_value, mask, **options))
        own = range(i + 1, i + 1 + num_responses)
        for batch in _batches({j: segments.piece_lengths[j] for j in own if segments.piece_lengths[j]}):
            queries = _stacked([query_pieces[j] for j in batch])
            keys, values = (
                torch.cat((first.expand(len(batch), -1, -1, -1), _stacked([pieces[j] for j in batch])), dim=2)
                for first, pieces in ((prompt_key, key_pieces), (prompt_value, value_pieces))
            )
            # What pads a shorter response comes after its own tokens: causality alone keeps it out of their sight.
            attended = _attend(queries, keys, values, segments.mask(prompt, queries, sliding_window), **options)
            each = attended.split(1)
            out += [rows[:, :, : segments.piece_lengths[j]] for rows, j in zip(each, batch, strict=True)]
        i += 1 + num_responses
    return torch.cat([rows.transpose(1, 2) for rows in out], dim=1)


def _batches(lengths: dict[int, int]) -> list[list[int]]:
    """The pieces of a group's responses that attend in one call: all where padding is cheap, else each alone."""
    if lengths and max(lengths.values()) * len(lengths) <= _MAX_PADDED * sum(lengths.values()):
        return [list(lengths)]
    return [[j] for j in lengths]


def _stacked(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """[1, H, L, A] each -> [pieces, H, longest L, A], zeros after the shorter ones."""
    longest = max(piece.shape[2] for piece in pieces)
    return torch.cat([torch.nn.functional.pad(piece, (0, 0, 0, longest - piece.shape[2])) for piece in pieces])


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(cap(q k^T scale) + mask) v; torch's kernel where there is no cap, which it does not know; None: causal."""
    if query.shape[0] == 1 or softcap is not None:
        # A CPU's backward is parallel over sequences and key heads: one sequence with few of them leaves cores idle.
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    work = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores + mask, dim=-1, dtype=work).to(value.dtype) @ value


def register() -> None:
    """Makes NAME known to transformers; no mask function is registered, so models pass 4-D masks through untouched."""
    from transformers import AttentionInterface

    if NAME not in AttentionInterface():  # else what keep_out_of_programs did would be undone
        AttentionInterface.register(NAME, segment_attention)


def keep_out_of_programs() -> None:
    """Makes torch.compile call NAME as it is: it goes by the lengths of the pieces, so that every batch would be a program of
    its own. Not done at import: it loads the compiler, which takes seconds."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, torch.compiler.disable(segment_attention))


def why_not_shared(model: Any) -> str | None:
    """Why a transformers model cannot run shared-prefix attention, or None where nothing speaks against it."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    unknown = kinds - {"full_attention", "sliding_attention"}
    return f"it has layers of type {', '.join(sorted(unknown))}" if unknown else None


def honour_softcap(model: Any) -> None:
    """Has transformers' own attention cap its scores where the model's does: before 5.24 its SDPA left the cap out in silence."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
