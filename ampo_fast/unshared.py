"""Responses that run each with its own copy of the prompt, for models whose attention cannot share one.

Shapes: L tokens of the longest sequence, D hidden, R predicted response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ampo_fast import distributed
from ampo_fast.types import PackedBatch

_MAX_PADDED = 1.25
"""Sequences run in one call where padding them to one length makes at most this many times their tokens."""


def hidden_rows(model: Any, batch: PackedBatch, is_sharded: bool, max_padded: float = _MAX_PADDED) -> torch.Tensor:
    """The hidden state that predicts each response token, [R, D]; sequences of like length run in one call.

    What pads a sequence comes after its own tokens: a causal layer of any kind (attention, window, state space) keeps it out
    of their sight, so there is no mask, which some of these layers would ignore. is_sharded: every call is one of all ranks,
    so those that have fewer make up for it with calls that change nothing, forward and backward.
    """
    sequences, starts = _sequences(batch)
    calls = padded_calls([len(ids) for ids in sequences], max_padded)
    missing = max(distributed.all_gather(len(calls))) - len(calls) if is_sharded else 0
    rows: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    for call in calls:
        hidden = _run(model, pad_sequence([sequences[i] for i in call], batch_first=True))
        for i, hidden_LD in zip(call, hidden, strict=True):
            rows[i] = hidden_LD[starts[i] : len(sequences[i])]
    hidden_RD = torch.cat(rows)
    for _ in range(missing):
        hidden_RD = hidden_RD + 0.0 * _run(model, sequences[0][None, :1])[0]
    return hidden_RD


def padded_calls(lengths: Sequence[int], max_padded: float = _MAX_PADDED) -> list[list[int]]:
    """Indices of the sequences that run together, the longest first; max_padded 1 pads nothing."""
    calls: list[list[int]] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total += lengths[i]
        if not calls or lengths[calls[-1][0]] * (len(calls[-1]) + 1) > max_padded * total:
            calls.append([])
            total = lengths[i]
        calls[-1].append(i)
    return calls


def padded_tokens(lengths: Sequence[int]) -> int:
    """What those calls run, padding included."""
    return sum(lengths[call[0]] * len(call) for call in padded_calls(lengths))


def _sequences(batch: PackedBatch) -> tuple[list[torch.Tensor], list[int]]:
    """Every response's token ids behind its prompt's, and where the first row that predicts one of them is."""
    sequences, starts = [], []
    for segment in batch.segments:
        length = segment.prompt_length + sum(segment.response_lengths)
        pieces = batch.token_T[segment.start : segment.start + length].split(
            (segment.prompt_length, *segment.response_lengths)
        )
        sequences += [torch.cat((pieces[0], response)) for response in pieces[1:]]
        starts += [segment.prompt_length - 1] * len(segment.response_lengths)
    return sequences, starts


def _run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state
