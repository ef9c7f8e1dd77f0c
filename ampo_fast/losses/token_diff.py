"""Where the responses of a group differ, token by token: BMC's changed tokens and PCRM's similarity.

Plain Python on the host: token ids on a GPU are copied once per call.
Shapes: R rows, B groups, G the largest group.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence

import torch

from ampo_fast.dispatch import on_device
from ampo_fast.losses.stats import ResponseStats


def token_ids(stats: ResponseStats) -> list[list[list[int]]]:
    """The ids of every response of every group, from target_R."""
    ids = stats.target_R.tolist()
    responses = [ids[a:b] for a, b in itertools.pairwise(stats.response_offsets.tolist())]
    return [responses[a:b] for a, b in itertools.pairwise(stats.group_offsets.tolist())]


def changed_tokens(rejected: Sequence[int], chosen: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """Which tokens of each are not in the other by difflib's matching: replaced, deleted or inserted (arXiv 2408.07471).

    difflib's guess at junk is off: in long answers it takes every frequent token, a comma too, for changed.
    """
    in_rejected, in_chosen = [True] * len(rejected), [True] * len(chosen)
    for match in difflib.SequenceMatcher(None, rejected, chosen, autojunk=False).get_matching_blocks():
        in_rejected[match.a : match.a + match.size] = [False] * match.size
        in_chosen[match.b : match.b + match.size] = [False] * match.size
    return in_rejected, in_chosen


def changed_against(stats: ResponseStats, mask_BGG: torch.Tensor) -> torch.Tensor:
    """[R, G] bool: the row's token is changed in the pair with response j of its group.

    mask_BGG: the pairs (i preferred, j); False outside them. Without target_R every token counts as changed.
    """
    num_rows, widest = stats.logp_R.shape[0], mask_BGG.shape[1]
    if stats.target_R is None:
        return torch.ones(num_rows, widest, dtype=torch.bool, device=stats.logp_R.device)
    groups, starts = token_ids(stats), stats.response_offsets.tolist()
    changed_RG = torch.zeros(num_rows, widest, dtype=torch.bool)
    for b, i, j in mask_BGG.nonzero().tolist():
        pair = changed_tokens(groups[b][j], groups[b][i])
        first = int(stats.group_offsets[b])
        for own, other, changed in ((j, i, pair[0]), (i, j, pair[1])):
            start = starts[first + own]
            changed_RG[start : start + len(changed), other] = torch.tensor(changed, dtype=torch.bool)
    return on_device(changed_RG, stats.logp_R.device)


def divergent_similarity(groups: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    """[B, G, G] PCRM's similarity of two responses: shorter over longer of what follows their common beginning, in tokens.

    arXiv 2404.00978. Equal responses, padding and the diagonal: 1.
    """
    widest = max(map(len, groups), default=0)
    similarity_BGG = torch.ones(len(groups), widest, widest, dtype=torch.float64)
    for b, responses in enumerate(groups):
        for i, j in itertools.combinations(range(len(responses)), 2):
            similarity_BGG[b, i, j] = similarity_BGG[b, j, i] = _pair_similarity(responses[i], responses[j])
    return similarity_BGG


def _pair_similarity(first: Sequence[int], second: Sequence[int]) -> float:
    pairs = enumerate(zip(first, second, strict=False))
    same = next((t for t, (x, y) in pairs if x != y), min(len(first), len(second)))
    shorter, longer = sorted((len(first) - same, len(second) - same))
    return shorter / longer if longer else 1.0
