"""Which preference pairs are worth a label or a step: a D-optimal design on last-layer features (ADPO, APO).

DPO with only its last layer trained is a logistic regression on v = beta sqrt(mu (1 - mu)) (phi(x, y1) - phi(x, y2)), and
log det(lambda I + sum v v^T) is what a set of pairs tells about it (arXiv 2503.01076; arXiv 2402.10500 picks the same
pair: the largest v^T H^-1 v). At the start policy and reference agree, so that mu = 1/2 for every pair.
Shapes: n pairs, D features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from ampo_fast import distributed
from ampo_fast.model import Policy
from ampo_fast.packing import idle_batch, pack_responses
from ampo_fast.rollouts.given import DataEngine
from ampo_fast.types import Prompt, Sampling

log = logging.getLogger(__name__)

RIDGE = 1e-3
"""lambda of H_0, beside features of unit length."""


def d_optimal(v_nD: torch.Tensor, count: int, ridge: float = RIDGE) -> list[int]:
    """The first `count` picks of argmax_i log det(H + v_i v_i^T), H <- H + v_i v_i^T, H_0 = ridge I; each pair once.

    Equal gains go to the lowest index. float64, O(count n D): H's inverse is kept up to date by Sherman and Morrison's
    formula, and det(H + v v^T) = det(H) (1 + v^T H^-1 v) needs no determinant. Raises ValueError unless 1 <= count <= n.
    """
    if not 1 <= count <= v_nD.shape[0]:
        raise ValueError(f"count = {count} must be from 1 to the number of pairs, {v_nD.shape[0]}")
    v_nD = v_nD.double()
    inverse_DD = torch.eye(v_nD.shape[1], dtype=torch.float64) / ridge
    gain_n = v_nD.square().sum(1) / ridge
    chosen: list[int] = []
    for _ in range(count):
        best = int(gain_n.argmax())
        chosen.append(best)
        u_D = inverse_DD @ v_nD[best]
        scale = 1.0 + float(v_nD[best] @ u_D)
        inverse_DD -= torch.outer(u_D, u_D) / scale
        gain_n = gain_n - (v_nD @ u_D).square() / scale
        gain_n[chosen] = -torch.inf
    return chosen


def choose_pairs(policy: Policy, pairs: Sequence[Prompt], count: int, max_new_tokens: int) -> list[Prompt]:
    """`count` of the pairs by d_optimal, in their own order; all of them where there are no more.

    Every rank must call it, and runs its share of the pairs. Raises ValueError for a prompt that has not exactly two
    responses.
    """
    wrong = [pair.id for pair in pairs if len(pair.responses) != 2]
    if wrong:
        raise ValueError(f"data.active_pairs chooses among pairs, but prompt {wrong[0]} has not two responses")
    if count >= len(pairs):
        log.warning("data.active_pairs = %d, but there are only %d pairs: all are used", count, len(pairs))
        return list(pairs)
    differences_nD = _differences(policy, pairs, max_new_tokens)
    return [pairs[i] for i in sorted(distributed.on_main(lambda: d_optimal(0.5 * differences_nD, count)))]


def _differences(policy: Policy, pairs: Sequence[Prompt], max_new_tokens: int) -> torch.Tensor:
    """_difference of every pair, [n, D]: rank r has run the pairs r, r + ranks, ..."""
    ranks = distributed.world_size()
    mine = [_difference(policy, pair, max_new_tokens) for pair in pairs[distributed.rank() :: ranks]]
    if distributed.rank() >= len(pairs) % ranks > 0:  # its share is one shorter than the others'
        policy.response_states(idle_batch(policy.device))
    if distributed.is_sharded(policy):
        distributed.reshard(policy)
    shares = distributed.all_gather(mine)
    return torch.stack([shares[i % ranks][i // ranks] for i in range(len(pairs))])


def _difference(policy: Policy, pair: Prompt, max_new_tokens: int) -> torch.Tensor:
    """phi(x, y1) - phi(x, y2), [D] on the CPU: phi is the last hidden state over the response, averaged, of unit length."""
    (group,) = DataEngine(policy).generate([pair], 2, Sampling(max_new_tokens=max_new_tokens))
    batch = pack_responses([group], [range(2)], policy.device)
    hidden_RD = policy.response_states(batch).double().cpu()
    first, second = hidden_RD.split(batch.response_offsets.diff().tolist())
    return normalize(first.mean(0), dim=0) - normalize(second.mean(0), dim=0)
