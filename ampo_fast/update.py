"""One optimizer step on selected groups: pack, loss, backward over micro-batches, guarded step."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence

import torch

from ampo_fast import distributed, losses
from ampo_fast.config import Config
from ampo_fast.losses.stats import Loss, check_params
from ampo_fast.margins_fit import fitted_params
from ampo_fast.model import Policy
from ampo_fast.optimizer import NonfiniteGuard, guarded_step, learning_rate, make_optimizer
from ampo_fast.packing import (
    MicroBatch,
    count_targets,
    longest_batch,
    pack_micro_batch,
    packed_length,
    rank_micro_batches,
)
from ampo_fast.progress import TrainingProgress
from ampo_fast.reference_logps import ReferenceLogps
from ampo_fast.rewards import normalizer_for
from ampo_fast.split_groups import GivenGradient, PartLogp, SplitGroup
from ampo_fast.step_metrics import (
    TrainedGroup,
    is_fresh,
    logp_difference,
    policy_metrics,
    sharing_metrics,
    trained_groups,
)
from ampo_fast.types import PackedBatch, Prompt, SelectedGroup
from ampo_fast.utilisation import utilisation
from ampo_fast.vllm.canary import NOTABLE_GAP, default_tolerance

log = logging.getLogger(__name__)


def make_loss(config: Config, prompts: Sequence[Prompt] = ()) -> Loss:
    """The loss that loss.name and loss.params name, plus the NLL term where asked for; gamma fitted on given rewards."""
    kind, params = losses.loss_class(config.loss.name), config.loss.params
    try:
        check_params(kind, params)
        if kind.fits_gamma:
            params = fitted_params(params, config.reward.normalize, prompts)
        loss = kind(**kind.implied_params(normalizer_for(config)) | params)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss.params = {config.loss.params!r}: {error}") from error
    if config.loss.nll_weight:
        return losses.Sum([(1.0, loss), (config.loss.nll_weight, losses.NLL())])
    return loss


def check_loss(config: Config) -> None:
    """Raises what make_loss does for loss.name and loss.params; what a gamma is fitted on is not looked at."""
    loss = config.loss
    if isinstance(loss.params.get("gamma"), dict):
        loss = loss.model_copy(update={"params": loss.params | {"gamma": 1.0}})
    make_loss(config.model_copy(update={"loss": loss}))


class Updater:
    """The policy's optimizer, its loss and, where the loss asks for one, the frozen reference."""

    def __init__(self, config: Config, policy: Policy, prompts: Sequence[Prompt] = ()) -> None:
        self.config = config
        self.policy = policy
        self.loss_fn = make_loss(config, prompts)
        self.optimizer = make_optimizer(policy.parameters(), config.optim)
        self.reference = None
        if self.loss_fn.uses_reference:
            self.reference = ReferenceLogps(config, policy, prompts, by_token=self.loss_fn.needs_reference_rows)
        self.eos_id = policy.stop_ids[0] if self.loss_fn.needs_eos else None
        self.has_warned = False
        self.guard = NonfiniteGuard("Lower optim.lr or loss.params.beta, and look at the rewards in rollouts/")

    @property
    def fitted_gamma(self) -> float | None:
        """MMPO's gamma, where loss.params asks for a fit instead of giving it."""
        if not isinstance(self.config.loss.params.get("gamma"), dict):
            return None
        loss = self.loss_fn.terms[0][1] if isinstance(self.loss_fn, losses.Sum) else self.loss_fn
        return loss.gamma

    def step(
        self, selected: Sequence[SelectedGroup], step: int, progress: TrainingProgress, is_comparable: bool
    ) -> dict[str, float]:
        """Forward and backward over micro-batches, one guarded optimizer step, then the reference's; returns its metrics.

        selected: the step's groups over all ranks, the same on each; each rank trains on its share. Every micro-batch's
        loss is divided by the global count of trained groups, so that any split over micro-batches and ranks gives the
        same step. is_comparable: whether the engine's log-probs are at the temperature that is trained. num_tokens
        counts this step's tokens over all ranks.
        """
        trained = [group for group in selected if group.is_trained]
        lr = learning_rate(step, self.config.run.steps, self.config.optim)
        metrics: dict[str, float] = {"num_tokens": 0}
        if trained:  # or not on any rank: all see the same groups
            metrics = self._train(trained, step, lr, progress, is_comparable)
        if self.reference is not None:
            self.reference.follow(self.policy, step + 1)
        return metrics | {"learning_rate": lr}

    def _train(
        self, trained: Sequence[SelectedGroup], step: int, lr: float, progress: TrainingProgress, is_comparable: bool
    ) -> dict[str, float]:
        config = self.config.optim
        plans = rank_micro_batches(trained, config.micro_batch_tokens, distributed.world_size())
        if self.reference is not None:
            with progress.phase("reference"):
                self.reference.prepare(trained)
        loss, mine, num_tokens = self._backward(plans, len(trained), progress)
        distributed.check_gradients(self.policy)
        with progress.phase("optimizer"):
            sums = distributed.total(torch.stack((loss, loss.new_tensor(num_tokens))))
            grad_norm, is_finite = guarded_step(self.optimizer, sums[0], lr, config.max_grad_norm)
        self.guard.check(is_finite, f"step {step + 1}: loss {sums[0].item()}, gradient norm {grad_norm}", progress.note)
        metrics = {"loss": sums[0].item(), "grad_norm": grad_norm, "num_tokens": int(sums[1].item())}
        metrics |= sharing_metrics(plans, self.policy.is_shared, config.activation_checkpointing)
        num_targets = sum(map(count_targets, trained))
        seconds = progress.phase_s["forward_backward"] + progress.phase_s["optimizer"]
        metrics |= utilisation(self.policy, metrics["num_tokens"], num_targets, seconds)
        groups = [group for part in distributed.all_gather(mine) for group in part]
        if is_comparable:
            metrics |= logp_difference(groups, is_fresh(trained, step))
            self._warn_of_mismatch(metrics, step)
        return metrics | policy_metrics(groups)

    def _warn_of_mismatch(self, metrics: dict[str, float], step: int) -> None:
        """Once: the engine of "transformers" has no other check of what it samples from than two tokens at its start."""
        name = "sampling/sampling_logp_difference/mean"
        dtype = self.config.rollout.options.get("dtype") or self.config.model.dtype
        allowed = max(NOTABLE_GAP, default_tolerance(self.policy, dtype))
        if self.has_warned or metrics.get(name, 0.0) <= allowed:
            return
        self.has_warned = True
        if distributed.is_main():
            log.warning(
                "step %d: %s is %.3g nats a token, over %g: the engine samples from another distribution than the one that is "
                'trained; compare with model.attention = "unshared", and with another rollout.engine',
                step + 1, name, metrics[name], allowed,
            )  # fmt: skip

    def preflight(self, longest_prompt: int) -> int:
        """Forward and backward of the longest micro-batch that a run can meet, without a step; returns its tokens.

        longest_prompt: in tokens. What does not fit is then found now, as a MemoryError, and not hours later.
        """
        config, length = self.config, self.config.rollout.max_new_tokens
        budget, kept = config.optim.micro_batch_tokens, config.select.k + 1
        num_groups = min(budget // packed_length(longest_prompt, [length] * kept), config.optim.prompts_per_step)
        if num_groups == 0:  # a group of that length is split: its largest part, with its own loss
            kept = max(1, (budget - longest_prompt) // max(1, length - 1))
        batch = longest_batch(max(1, num_groups), longest_prompt, kept, length, self.policy.device)
        with self._named_out_of_memory(batch):
            if num_groups == 0:
                loss, _ = self.policy(batch, self._no_gradient(batch), 1, eos_id=self.eos_id)
            else:
                loss, _ = self.policy(
                    self._with_reference(batch, MicroBatch()), self.loss_fn, math.inf, eos_id=self.eos_id
                )
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return batch.token_T.numel()

    def _backward(
        self, plans: Sequence[Sequence[MicroBatch]], num_trained: int, progress: TrainingProgress
    ) -> tuple[torch.Tensor, list[TrainedGroup], int]:
        """This rank's share of the step's loss (float64), its groups' numbers and its tokens that got a gradient."""
        device, own = self.policy.device, plans[distributed.rank()]
        total, mine, num_tokens = torch.zeros((), device=device, dtype=torch.float64), [], 0
        with progress.phase("forward_backward"):
            splits = self._split_groups(plans, num_trained)
        for split in splits:
            total += split.loss.double() / num_trained
            mine += trained_groups(split.stats, split.batch)
        part_losses = iter([loss for split in splits for loss in split.part_losses])
        for i, micro in enumerate(own):
            with progress.phase("pack"):
                batch = pack_micro_batch(micro, device)
            # A forward of the reference too is one of all ranks.
            if self.reference is not None and any(plan[i].is_whole for plan in plans):
                with progress.phase("reference"):
                    batch = self.reference.of(batch, micro)
            distributed.sync_gradients(self.policy, i + 1 == len(own))
            with progress.phase("forward_backward"), self._named_out_of_memory(batch):
                if micro.is_whole:
                    loss, part = self.policy(batch, self.loss_fn, num_trained, eos_id=self.eos_id)
                    total += loss.detach()
                    mine += trained_groups(part, batch)
                else:
                    given = next(part_losses) if micro.part else self._no_gradient(batch)
                    loss, _ = self.policy(batch, given, 1, eos_id=self.eos_id)
                loss.backward()
            if micro.groups:
                num_tokens += batch.token_T.numel()
        return total, mine, num_tokens

    def _split_groups(self, plans: Sequence[Sequence[MicroBatch]], num_trained: int) -> list[SplitGroup]:
        """Phase 1 of this rank's groups that are longer than a micro-batch; all ranks make equally many forwards."""
        own = [micro for micro in plans[distributed.rank()] if micro.part]
        num_forwards = max(sum(bool(micro.part) for micro in plan) for plan in plans)
        found = [self._part_logp(micro) for micro in own + [MicroBatch()] * (num_forwards - len(own))]
        distributed.reshard(self.policy)
        groups = itertools.groupby(zip(own, found, strict=False), key=lambda pair: id(pair[0].groups[0]))
        pairs = [list(group) for _, group in groups]
        return [
            SplitGroup.build(group[0][0], [part for _, part in group], self.loss_fn, self.eos_id, num_trained)
            for group in pairs
        ]

    def _part_logp(self, micro: MicroBatch) -> PartLogp:
        batch = pack_micro_batch(micro, self.policy.device)
        with self._named_out_of_memory(batch):
            out = self.policy.token_logp(batch, self.eos_id)
            logp_R, eos_logp_R = out if self.eos_id is not None else (out, None)
            batch = self._with_reference(batch, micro)
            return PartLogp(logp_R, eos_logp_R, batch.ref_logp_M, batch.ref_logp_R)

    def _no_gradient(self, batch: PackedBatch) -> GivenGradient:
        """For a rank that keeps the others company in a forward: exactly zero, whatever the loss is."""
        zero_R = torch.zeros(batch.target_R.shape, device=self.policy.device)
        return GivenGradient(zero_R, None if self.eos_id is None else zero_R)

    def _with_reference(self, batch: PackedBatch, micro: MicroBatch) -> PackedBatch:
        return batch if self.reference is None else self.reference.of(batch, micro)

    @contextlib.contextmanager
    def _named_out_of_memory(self, batch: PackedBatch) -> Iterator[None]:
        """Turns an accelerator's out-of-memory error into a MemoryError that says what to change, and keeps what was held."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            run_dir, rank = self.config.run_dir, distributed.rank()
            # Beside the run directory, which may not be made yet.
            snapshot = run_dir.with_name(f"{run_dir.name}.out_of_memory.rank{rank}.pickle")
            with contextlib.suppress(OSError, RuntimeError):  # a disk without room for it must not hide what to change
                snapshot.parent.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(snapshot))
            raise MemoryError(
                f"out of memory on rank {rank} in a micro-batch of {batch.token_T.numel()} tokens; lower "
                "optim.micro_batch_tokens or set optim.activation_checkpointing = true (--resume auto takes both), or lower "
                f"rollout.max_new_tokens; more ranks share the parameters ({str(error).splitlines()[0]}). What was held: "
                f"{snapshot}, for https://pytorch.org/memory_viz"
            ) from error
