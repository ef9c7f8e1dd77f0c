"""Losses over groups of responses: frozen dataclasses, called on ResponseStats, usable as loss_fn of the fused op.

losses.reward_model holds those of reward models, on one score per response.
"""

from ampo_fast.losses.combine import NLL, Sum
from ampo_fast.losses.group_contrastive import (
    AMPO,
    SWEPO,
    GroupContrastive,
    REFA1vsK,
    REFADynamic,
    group_contrastive_loss,
)
from ampo_fast.losses.kto import KTO
from ampo_fast.losses.listwise import NCA, InfoNCA, LambdaPO, PlackettLuce, REFAInfoNCA
from ampo_fast.losses.margins import BMC, DPOPCRM, MMDPO, MMPO, CaPO
from ampo_fast.losses.pairwise import CDPO, DPO, IPO, RDPO, Hinge, NCAPair, RobustDPO
from ampo_fast.losses.reference_free import CPO, ORPO, SimPO
from ampo_fast.losses.stats import Loss, LossOutput, ResponseStats
from ampo_fast.user_code import named_object

__all__ = [
    "AMPO",
    "BMC",
    "CDPO",
    "CPO",
    "DPO",
    "DPOPCRM",
    "IPO",
    "KTO",
    "MMDPO",
    "MMPO",
    "NCA",
    "NLL",
    "ORPO",
    "RDPO",
    "SWEPO",
    "CaPO",
    "GroupContrastive",
    "Hinge",
    "InfoNCA",
    "LambdaPO",
    "LossOutput",
    "NCAPair",
    "PlackettLuce",
    "REFA1vsK",
    "REFADynamic",
    "REFAInfoNCA",
    "ResponseStats",
    "RobustDPO",
    "SimPO",
    "Sum",
    "group_contrastive_loss",
]


def loss_class(name: str) -> type[Loss]:
    """The loss that loss.name names, one of these or a user's own as MODULE:CLASS. Raises ValueError, naming the known ones."""
    if ":" in name:
        return _own_class(name)
    classes = {each: globals()[each] for each in __all__ if each != "Sum"}  # which is made by loss.nll_weight
    known = {each: kind for each, kind in classes.items() if _is_loss(kind)}
    if name not in known:
        raise ValueError(f"loss.name = {name!r}; known: {', '.join(known)}; or MODULE:CLASS, a losses.Loss of your own")
    return known[name]


def _own_class(name: str) -> type[Loss]:
    kind = named_object(name, "loss.name")
    if not _is_loss(kind):
        raise ValueError(
            f"loss.name = {name!r} is no loss: it must be a subclass of ampo_fast.losses.Loss, called on ResponseStats, that "
            "returns a LossOutput"
        )
    return kind


def _is_loss(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Loss) and kind is not Loss
