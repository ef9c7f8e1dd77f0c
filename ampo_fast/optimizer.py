"""AdamW on float32 parameters, warm-up + cosine, clipping, and a guard that lets no non-finite step through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ampo_fast.config import BaseOptimConfig
from ampo_fast.distributed import whole


def make_optimizer(parameters: Iterable[nn.Parameter], config: BaseOptimConfig) -> torch.optim.AdamW:
    """Raises ValueError for bfloat16 parameters: at small learning rates most of their updates round to nothing."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    low = {str(parameter.dtype) for parameter in trained if parameter.dtype != torch.float32}
    if low:
        raise ValueError(f"trained parameters are {', '.join(low)}; AdamW needs float32 (model.dtype is compute only)")
    return torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def learning_rate(step: int, num_steps: int, config: BaseOptimConfig) -> float:
    """Linear warm-up over warmup_ratio of the run, then a cosine down to min_lr_ratio x lr. step counts from 0."""
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


def guarded_step(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float, max_grad_norm: float
) -> tuple[float, bool]:
    """Clips, checks loss and gradient norm, steps. -> (gradient norm before clipping, whether the step was taken).

    A non-finite loss or norm leaves parameters and optimizer state as they were. Under FSDP the norm is that of all
    shards, and the loss must be the sum over ranks: every rank then decides alike.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    is_finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
    if is_finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm), is_finite


_MAX_NONFINITE_STEPS = 3


class NonfiniteGuard:
    """Says which steps guarded_step left out, and ends a run that has nothing else."""

    def __init__(self, way_out: str) -> None:
        self.way_out = way_out
        self.count = 0
        """Steps in a row that were left out; part of a checkpoint."""

    def check(self, is_finite: bool, what: str, note: Callable[[str], None]) -> None:
        """what: the step and its numbers. Raises ValueError at the third step in a row that was left out."""
        self.count = 0 if is_finite else self.count + 1
        if not is_finite:
            note(f"{what}: update left out")
        if self.count >= _MAX_NONFINITE_STEPS:
            raise ValueError(
                f"{self.count} steps in a row had a non-finite loss or gradient; nothing was trained on them. {self.way_out}"
            )
