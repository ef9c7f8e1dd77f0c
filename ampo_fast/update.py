"""One optimizer step on selected groups: pack, loss, backward over micro-batches, guarded step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from ampo_fast import losses
from ampo_fast.config import Config
from ampo_fast.losses.stats import Loss
from ampo_fast.model import Policy
from ampo_fast.optimizer import guarded_step, learning_rate, make_optimizer
from ampo_fast.packing import micro_batches, pack
from ampo_fast.progress import TrainingProgress
from ampo_fast.reward_data import fitted_params
from ampo_fast.step_metrics import logp_difference, policy_metrics
from ampo_fast.types import PackedBatch, Prompt, SelectedGroup

_MAX_NONFINITE_STEPS = 3


def make_loss(config: Config, prompts: Sequence[Prompt] = ()) -> Loss:
    """The loss that loss.name and loss.params name, plus the NLL term where asked for; gamma fitted on given rewards."""
    classes = {name: getattr(losses, name) for name in losses.__all__}
    known = [name for name, kind in classes.items() if isinstance(kind, type) and issubclass(kind, Loss)]
    if config.loss.name not in known or config.loss.name == "Sum":
        raise ValueError(
            f"loss.name = {config.loss.name!r}; known: {', '.join(name for name in known if name != 'Sum')}"
        )
    try:
        loss = classes[config.loss.name](**fitted_params(config.loss, config.reward.normalize, prompts))
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss.params = {config.loss.params!r}: {error}") from error
    if config.loss.nll_weight:
        return losses.Sum([(1.0, loss), (config.loss.nll_weight, losses.NLL())])
    return loss


class Updater:
    """The policy's optimizer, its loss and, where the loss asks for one, the frozen reference."""

    def __init__(self, config: Config, policy: Policy, prompts: Sequence[Prompt] = ()) -> None:
        self.config = config
        self.policy = policy
        self.loss_fn = make_loss(config, prompts)
        self.optimizer = make_optimizer(policy.parameters(), config.optim)
        self.reference = Policy.load(config.model) if self.loss_fn.uses_reference else None
        self.eos_id = policy.stop_ids[0] if self.loss_fn.needs_eos else None
        self._num_nonfinite = 0

    def step(
        self, selected: Sequence[SelectedGroup], step: int, progress: TrainingProgress, is_comparable: bool
    ) -> dict[str, float]:
        """Forward and backward over micro-batches of whole groups, then one guarded optimizer step; returns its metrics.

        Every micro-batch's loss is divided by the step's count of trained groups, so that any split gives the same step.
        is_comparable: whether the engine's log-probs are of the distribution that is trained. num_tokens counts this
        step's tokens.
        """
        config = self.config.optim
        trained = [group for group in selected if group.is_trained]
        lr = learning_rate(step, self.config.run.steps, config)
        if not trained:
            return {"learning_rate": lr, "num_tokens": 0}
        total, stats, batches = torch.zeros((), device=self.policy.device), [], []
        for groups in micro_batches(trained, config.micro_batch_tokens):
            with progress.phase("pack"):
                batch = self._with_reference(pack(groups, self.policy.device))
            with progress.phase("forward_backward"):
                loss, part = self.policy(batch, self.loss_fn, len(trained), eos_id=self.eos_id)
                loss.backward()
            total += loss.detach()
            stats.append(part)
            batches.append(batch)
        with progress.phase("optimizer"):
            grad_norm, is_finite = guarded_step(self.optimizer, total, lr, config.max_grad_norm)
        self._guard(is_finite, f"step {step + 1}: loss {total.item()}, gradient norm {grad_norm}", progress)
        metrics = {"loss": total.item(), "grad_norm": grad_norm, "learning_rate": lr}
        metrics["num_tokens"] = sum(batch.token_T.numel() for batch in batches)
        if is_comparable:
            metrics |= logp_difference(stats, batches)
        return metrics | policy_metrics(stats, batches)

    def _with_reference(self, batch: PackedBatch) -> PackedBatch:
        if self.reference is None:
            return batch
        logp_R = self.reference.token_logp(batch)
        ends = batch.response_offsets.tolist()
        ref_logp_M = torch.stack([logp_R[a:b].sum() for a, b in itertools.pairwise(ends)])
        return dataclasses.replace(batch, ref_logp_M=ref_logp_M)

    def _guard(self, is_finite: bool, what: str, progress: TrainingProgress) -> None:
        self._num_nonfinite = 0 if is_finite else self._num_nonfinite + 1
        if not is_finite:
            progress.note(f"{what}: update left out")
        if self._num_nonfinite == _MAX_NONFINITE_STEPS:
            raise ValueError(
                f"{_MAX_NONFINITE_STEPS} steps in a row had a non-finite loss or gradient; nothing was trained on them. "
                "Lower optim.lr or loss.params.beta, and look at the rewards in rollouts/"
            )
