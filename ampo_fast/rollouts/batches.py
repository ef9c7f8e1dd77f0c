"""Which prompts are answered together, and by which rank's engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ampo_fast import distributed
from ampo_fast.packing import balanced_shares
from ampo_fast.types import CandidateGroup, Prompt

_ROWS = 64
_ROWS_ON_GPU = 512
"""A decoding step on a GPU is mostly launches: it takes about as long for 64 rows as for 512."""


def generation_batches(lengths: Sequence[int], n: int, batch_rows: int | None, num_ranks: int = 1) -> list[list[int]]:
    """Indices of the prompts decoded together: neighbours in length, at most batch_rows candidates (one prompt at least).

    A pure function of its arguments and, where batch_rows is None, of the kind of device, so that a resumed run decodes the
    same batches. A batch is what is saved or redone. num_ranks: at least so many batches, where there are so many prompts.
    """
    if batch_rows is None:
        batch_rows = _ROWS if distributed.device().type == "cpu" else _ROWS_ON_GPU
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    size = max(1, min(batch_rows // n, -(-len(lengths) // num_ranks)))
    return [order[at : at + size] for at in range(0, len(order), size)]


def rank_batches(lengths: Sequence[int], n: int, batch_rows: int | None, max_new_tokens: int) -> list[list[list[int]]]:
    """Each rank's generation batches: whole batches, dealt over the ranks by their tokens."""
    batches = generation_batches(lengths, n, batch_rows, distributed.world_size())
    weights = [sum(lengths[i] + n * max_new_tokens for i in batch) for batch in batches]
    return [[batches[i] for i in share] for share in balanced_shares(weights, distributed.world_size())]


def shared_answers(
    answer: Callable[[], Sequence[CandidateGroup]], shares: Sequence[Sequence[Prompt]]
) -> list[CandidateGroup]:
    """Runs answer on rank 0 alone, for all prompts; each rank gets the groups of its share, or rank 0's exception."""

    def deal() -> list[list[CandidateGroup]]:
        by_id = {group.prompt.id: group for group in answer()}
        return [[by_id[prompt.id] for prompt in share] for share in shares]

    return distributed.dealt_by_main(deal)
