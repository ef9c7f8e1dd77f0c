"""A selection that is a user's own function, MODULE:FUNCTION(embeddings, rewards, k), called group by group.

Shapes: N candidates of a group, C of them that may be trained on, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch

from ampo_fast.user_code import named_object, own_grad_mode, told


def own_strategy(name: str) -> Callable[..., Any] | None:
    """The function that select.strategy names; None for a strategy of ours. Raises ValueError where it cannot be had."""
    if ":" not in name:
        return None
    function = named_object(name, "select.strategy")
    if not callable(function):
        raise ValueError(f"select.strategy = {name!r} is no function: it is {type(function).__name__}")
    return function


def own_negatives(
    name: str, embedding_NE: torch.Tensor, reward_N: torch.Tensor, positive: int, eligible: Sequence[int], k: int
) -> list[int]:
    """The group's negatives, ascending: what the function makes of the positive, as row 0, and those that may be negatives.

    Raises ValueError where it fails, or does not return from 1 to k different rows after row 0.
    """
    rows = [positive, *eligible]
    function, named = own_strategy(name), f"select.strategy = {name!r}"
    try:
        with own_grad_mode():
            returned = function(embedding_NE[rows].clone(), reward_N[rows].clone(), k)
            chosen = [index(row) for row in returned]
    except Exception as error:
        raise ValueError(f"{named} failed: {told(error, function)}") from error
    if not 1 <= len(set(chosen)) == len(chosen) <= k or not all(1 <= row < len(rows) for row in chosen):
        raise ValueError(
            f"{named} returned {chosen} for {len(rows)} rows and k = {k}; it must return from 1 to k different rows of "
            f"1 .. {len(rows) - 1}: row 0 is the positive"
        )
    return sorted(rows[row] for row in chosen)


def coverage_cost(
    embedding_NE: torch.Tensor, reward_N: torch.Tensor, valid: Sequence[bool], positive: int, negative: Sequence[int],
    covers_positive: bool,
) -> float:  # fmt: skip
    """That of select_responses, for negatives that it did not choose."""
    kept = [i for i, ok in enumerate(valid) if ok]
    covered = [i for i in kept if covers_positive or i != positive]
    mean = reward_N[kept].mean()
    nearest = torch.cdist(embedding_NE[covered].double(), embedding_NE[list(negative)].double()).amin(1)
    return math.fsum(((mean - reward_N[covered]).exp() * nearest).tolist())
