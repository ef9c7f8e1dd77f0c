"""Losses over groups of responses: frozen dataclasses, called on ResponseStats, usable as loss_fn of the fused op."""

from ampo_fast.losses.combine import NLL, Sum
from ampo_fast.losses.group_contrastive import (
    AMPO,
    SWEPO,
    GroupContrastive,
    REFA1vsK,
    REFADynamic,
    group_contrastive_loss,
)
from ampo_fast.losses.stats import LossOutput, ResponseStats

__all__ = [
    "AMPO",
    "NLL",
    "SWEPO",
    "GroupContrastive",
    "LossOutput",
    "REFA1vsK",
    "REFADynamic",
    "ResponseStats",
    "Sum",
    "group_contrastive_loss",
]
