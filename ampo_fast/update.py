"""One optimizer step on selected groups: pack, loss, backward over micro-batches, guarded step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from ampo_fast import distributed, losses
from ampo_fast.config import Config
from ampo_fast.losses.stats import Loss
from ampo_fast.model import Policy
from ampo_fast.optimizer import guarded_step, learning_rate, make_optimizer
from ampo_fast.packing import idle_batch, longest_batch, pack, packed_length, rank_micro_batches
from ampo_fast.progress import TrainingProgress
from ampo_fast.reference_logps import ReferenceLogps
from ampo_fast.reward_data import fitted_params
from ampo_fast.step_metrics import TrainedGroup, logp_difference, policy_metrics, trained_groups
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
        self.reference = ReferenceLogps(config, prompts) if self.loss_fn.uses_reference else None
        self.eos_id = policy.stop_ids[0] if self.loss_fn.needs_eos else None
        self._num_nonfinite = 0

    def step(
        self, selected: Sequence[SelectedGroup], step: int, progress: TrainingProgress, is_comparable: bool
    ) -> dict[str, float]:
        """Forward and backward over micro-batches of whole groups, then one guarded optimizer step; returns its metrics.

        selected: the step's groups over all ranks, the same on each; each rank trains on its share. Every micro-batch's
        loss is divided by the global count of trained groups, so that any split over micro-batches and ranks gives the
        same step. is_comparable: whether the engine's log-probs are of the distribution that is trained. num_tokens
        counts this step's tokens over all ranks.
        """
        config = self.config.optim
        trained = [group for group in selected if group.is_trained]
        lr = learning_rate(step, self.config.run.steps, config)
        if not trained:  # on every rank: all see the same groups
            return {"learning_rate": lr, "num_tokens": 0}
        loss, mine, num_tokens = self._backward(trained, progress)
        with progress.phase("optimizer"):
            sums = distributed.total(torch.stack((loss, loss.new_tensor(num_tokens))))
            grad_norm, is_finite = guarded_step(self.optimizer, sums[0], lr, config.max_grad_norm)
        if self.reference is not None:
            self.reference.follow(self.policy, step + 1)
        self._guard(is_finite, f"step {step + 1}: loss {sums[0].item()}, gradient norm {grad_norm}", progress)
        metrics = {"loss": sums[0].item(), "grad_norm": grad_norm, "learning_rate": lr}
        metrics["num_tokens"] = int(sums[1].item())
        groups = [group for part in distributed.all_gather(mine) for group in part]
        if is_comparable:
            metrics |= logp_difference(groups)
        return metrics | policy_metrics(groups)

    def preflight(self, longest_prompt: int) -> int:
        """Forward and backward of the longest micro-batch that a run can meet, without a step; returns its tokens.

        longest_prompt: in tokens. What does not fit is then found now, as a MemoryError, and not hours later.
        """
        config, length = self.config, self.config.rollout.max_new_tokens
        kept = config.select.k + 1
        fitting = config.optim.micro_batch_tokens // packed_length(longest_prompt, [length] * kept)
        num_groups = max(1, min(fitting, config.optim.prompts_per_step))
        batch = self._with_reference(longest_batch(num_groups, longest_prompt, kept, length, self.policy.device))
        with _named_out_of_memory(batch):
            loss, _ = self.policy(batch, self.loss_fn, math.inf, eos_id=self.eos_id)
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return batch.token_T.numel()

    def _backward(
        self, trained: Sequence[SelectedGroup], progress: TrainingProgress
    ) -> tuple[torch.Tensor, list[TrainedGroup], int]:
        """This rank's share of the step's loss (float64), its groups' numbers and its packed tokens."""
        device, num_ranks = self.policy.device, distributed.world_size()
        shares = rank_micro_batches(trained, self.config.optim.micro_batch_tokens, num_ranks)
        own = shares[distributed.rank()]
        total, mine, num_tokens = torch.zeros((), device=device, dtype=torch.float64), [], 0
        if self.reference is not None:
            with progress.phase("reference"):
                self.reference.prepare(trained)
        for i, groups in enumerate(own):
            with progress.phase("pack"):
                batch = self._with_reference(pack(groups, device) if groups else idle_batch(device), groups)
            distributed.sync_gradients(self.policy, i + 1 == len(own))
            with progress.phase("forward_backward"), _named_out_of_memory(batch):
                # An idle rank's loss counts for nothing: over infinity, so are its gradients.
                normalizer = len(trained) if groups else math.inf
                loss, part = self.policy(batch, self.loss_fn, normalizer, eos_id=self.eos_id)
                loss.backward()
            if groups:
                total += loss.detach()
                mine += trained_groups(part, batch)
                num_tokens += batch.token_T.numel()
        return total, mine, num_tokens

    def _with_reference(self, batch: PackedBatch, groups: Sequence[SelectedGroup] = ()) -> PackedBatch:
        if self.reference is None:
            return batch
        return dataclasses.replace(batch, ref_logp_M=self.reference.of(batch, groups))

    def _guard(self, is_finite: bool, what: str, progress: TrainingProgress) -> None:
        self._num_nonfinite = 0 if is_finite else self._num_nonfinite + 1
        if not is_finite:
            progress.note(f"{what}: update left out")
        if self._num_nonfinite == _MAX_NONFINITE_STEPS:
            raise ValueError(
                f"{_MAX_NONFINITE_STEPS} steps in a row had a non-finite loss or gradient; nothing was trained on them. "
                "Lower optim.lr or loss.params.beta, and look at the rewards in rollouts/"
            )


@contextlib.contextmanager
def _named_out_of_memory(batch: PackedBatch) -> Iterator[None]:
    """Turns an accelerator's out-of-memory error into a MemoryError that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"out of memory on rank {distributed.rank()} in a micro-batch of {batch.token_T.numel()} tokens; lower "
            "optim.micro_batch_tokens, set optim.activation_checkpointing = true, or lower rollout.max_new_tokens; "
            f"more ranks share the parameters ({str(error).splitlines()[0]})"
        ) from error
