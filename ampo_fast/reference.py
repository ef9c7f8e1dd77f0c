"""The ops in plain torch, any dtype, one group and one row at a time: the oracle of the tests (float64 is the truth).

Not a fast path: the logits of all rows exist, and groups are looped over.
"""

from __future__ import annotations

import itertools

import torch


def linear_logprob(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_R: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    eos_id: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log softmax(z)_target, z = softcap tanh((hidden W^T + bias) / softcap) / temperature, in the dtype given."""
    logits_RV = hidden_RD @ weight_VD.t()
    if bias_V is not None:
        logits_RV = logits_RV + bias_V
    if softcap is not None:
        logits_RV = softcap * torch.tanh(logits_RV / softcap)
    logp_RV = torch.log_softmax(logits_RV / temperature, dim=1)
    logp_R = logp_RV.gather(1, target_R[:, None])[:, 0]
    return logp_R if eos_id is None else (logp_R, logp_RV[:, eos_id])


def group_contrastive_loss(
    logp_M: torch.Tensor,
    length_M: torch.Tensor,
    reward_M: torch.Tensor,
    group_offsets: torch.Tensor,
    *,
    positive_M: torch.Tensor | None = None,
    baseline_B: torch.Tensor | None = None,
    beta: float,
    alpha: float = 0.0,
    gamma: float = 1.0,
    score: str = "avg",
    weight: str = "signed",
    split: str = "best",
) -> torch.Tensor:
    """[B] -log( sum_{+} e^s / (sum_{+} e^s + gamma sum_{-} e^s) ), group by group; 0 where a side is empty."""
    losses = []
    for group, (begin, end) in enumerate(itertools.pairwise(group_offsets.tolist())):
        x_G, reward_G = logp_M[begin:end], reward_M[begin:end]
        if end == begin:
            losses.append(logp_M.new_zeros(()))
            continue
        score_G = beta * (x_G / length_M[begin:end] if score == "avg" else x_G)
        deviation_G = reward_G - (reward_G.mean() if baseline_B is None else baseline_B[group])
        if weight != "none":
            score_G = score_G + alpha * (deviation_G.abs() if weight == "abs" else deviation_G)
        positive_G = _side(reward_G, deviation_G, split) if positive_M is None else positive_M[begin:end].bool()
        if positive_G.all() or not positive_G.any():
            losses.append(0.0 * x_G.sum())
            continue
        counted_G = positive_G | (gamma > 0)
        log_gamma_G = torch.where(positive_G, 0.0, torch.tensor(gamma or 1.0, dtype=x_G.dtype).log())
        everyone = torch.logsumexp((score_G + log_gamma_G)[counted_G], 0)
        losses.append(everyone - torch.logsumexp(score_G[positive_G], 0))
    return torch.stack(losses) if losses else logp_M.new_zeros(0)


def _side(reward_G: torch.Tensor, deviation_G: torch.Tensor, split: str) -> torch.Tensor:
    if split == "mean":
        return deviation_G > 0
    return torch.arange(reward_G.numel(), device=reward_G.device) == int(reward_G.argmax())
