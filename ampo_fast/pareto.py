"""CaPO's pairs under several rewards: one response from the front that nothing beats, others from the one that beats nothing.

Shapes: S scorers, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ampo_fast.random_streams import stream_seed
from ampo_fast.types import ScoredGroup


def dominance(reward_SN: torch.Tensor) -> torch.Tensor:
    """[N, N] True where i is at least as good as j by every reward and better by one."""
    gap_SNN = reward_SN[:, :, None] - reward_SN[:, None, :]
    return (gap_SNN >= 0).all(0) & (gap_SNN > 0).any(0)


def draw_sides(scored: ScoredGroup, may_be_positive: Sequence[bool], seed: int) -> tuple[list[bool], list[bool]]:
    """([N] who stays in the selection, [N] the one that is the positive); nobody where no candidate beats another.

    arXiv 2502.02588 draws pairs from the upper front (dominated by none) and the lower one (dominating none). The positive
    is drawn from the upper front's candidates that dominate another, keyed by seed and prompt; beside it stay those of the
    lower front that it dominates, so that every pair is right by every reward. A cut response (may_be_positive False) is
    on no upper front and keeps nobody off it. Raises ValueError for a group with one reward per response.
    """
    if not scored.reward_by_scorer:
        raise ValueError(
            f"prompt {scored.group.prompt.id} has one reward per response, select.pareto = true compares several: score it "
            "with a list in reward.kind"
        )
    valid_N = torch.tensor(scored.valid)
    reward_SN = torch.tensor(scored.reward_by_scorer, dtype=torch.float64)
    beats_NN = dominance(reward_SN) & valid_N[:, None] & valid_N
    able_N = torch.tensor(may_be_positive) & valid_N
    upper = (able_N & beats_NN.any(1) & ~(beats_NN & able_N[:, None]).any(0)).nonzero()[:, 0].tolist()
    nobody = [False] * len(scored.valid)
    if not upper:
        return nobody, nobody
    positive = upper[stream_seed("pareto", seed, scored.group.prompt.id) % len(upper)]
    kept_N = beats_NN[positive] & ~beats_NN.any(1)
    kept_N[positive] = True
    return kept_N.tolist(), [i == positive for i in range(len(nobody))]
