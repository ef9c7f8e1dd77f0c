"""`ampo-fast train-reward`: groups in, a HuggingFace sequence classifier out, stopped where held-out pairs stop improving.

Shapes: M responses of a step, B its groups.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ampo_fast.files import write_json
from ampo_fast.losses import LossOutput, reward_model
from ampo_fast.losses.reward_model import RewardLoss
from ampo_fast.losses.stats import check_params
from ampo_fast.losses.token_diff import divergent_similarity
from ampo_fast.margins_fit import fit_slope, margins_and_labels, resolve_gamma
from ampo_fast.metrics import MetricsLog
from ampo_fast.model_card import versions
from ampo_fast.optimizer import NonfiniteGuard, guarded_step, learning_rate, make_optimizer
from ampo_fast.packing import token_runs
from ampo_fast.progress import TrainingProgress
from ampo_fast.report.reward_page import write_reward_report
from ampo_fast.reward_model.checkpoint import load_checkpoint, save_checkpoint
from ampo_fast.reward_model.config import RewardLossConfig, RewardTrainingConfig
from ampo_fast.reward_model.data import check_margins, hold_out, load_groups
from ampo_fast.reward_model.evaluation import evaluate_scores, pair_measures, pair_table
from ampo_fast.reward_model.frozen_blocks import FrozenBlocks
from ampo_fast.reward_model.model import EncodedGroup, RewardModel
from ampo_fast.run_dir import keep_data, open_run_dir, run_closed
from ampo_fast.types import Prompt

log = logging.getLogger(__name__)

_NUM_COMPARED = 8


def train_reward(config: RewardTrainingConfig, resume: bool = False) -> dict[str, Any]:
    """Trains, exports the best model to RUN/final, writes report.html; returns the summary (also summary.json).

    With resume, goes on from the run's newest evaluation, or starts anew where there is none.
    """
    with run_closed(config):
        return RewardTrainer(config, resume=resume).run()


@dataclass(frozen=True, slots=True)
class Item:
    """One group: its texts, its token ids, and, where loss.length_control asks, how many tokens of them are each response's."""

    group: Prompt
    encoded: EncodedGroup
    lengths: tuple[int, ...] = ()

    @property
    def rewards(self) -> list[float]:
        return [response.reward for response in self.group.responses]


class RewardTrainer:
    def __init__(self, config: RewardTrainingConfig, frozen: FrozenBlocks | None = None, resume: bool = False) -> None:
        """frozen: an earlier trainer's, of the same backbone, whose outputs are used and added to."""
        self.config = config
        train, held = _groups(config)
        self.loss_fn, self.gamma = make_reward_loss(config.loss, train)
        self.model = RewardModel.load(config.model, max_tokens=config.data.max_tokens, seed=config.run.seed)
        if frozen is not None:
            self.model.frozen.share(frozen)
        self.train_items = self._encode(train, "data.train")
        self.held_items = self._encode(held, "data.eval")
        if config.model.pooling == "mean":
            self.model.standardise_pooling([item.encoded for item in self.train_items], config.optim.micro_batch_tokens)
        self.length_weight = fit_length_weight(self.train_items) if config.loss.length_control else 0.0
        self.optimizer = make_optimizer(self.model.parameters(), config.optim)
        per_epoch = math.ceil(len(self.train_items) / config.optim.prompts_per_step)
        self.num_steps = per_epoch * config.run.epochs
        self.eval_steps = _eval_steps(per_epoch, config)
        self.run_dir = open_run_dir(config, resume=resume, folders=())
        keep_data(
            self.run_dir, {"data.train": train, "data.eval": held} if config.data.eval else {"data.train": train + held}
        )
        write_json(self.run_dir / "versions.json", versions())
        self.best: dict[str, Any] = {}
        self.guard = NonfiniteGuard("Lower optim.lr, and look at the scores in the data")
        self.step = 0
        found = load_checkpoint(self.run_dir, self.model, self.optimizer) if resume else None
        if found:
            self.best, state = found
            self.step, self.guard.count = state["step"], state["num_nonfinite"]

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        resume_step = self.step if self.best else -1
        with (
            MetricsLog(self.run_dir, self.config.run.trackers, resume_step=resume_step) as self.metrics,
            TrainingProgress(self.num_steps, self.step, plain_interval_s=5) as self.progress,
        ):
            if not self.best:
                self._evaluate(0)
            stopped = self._why_stop()
            for items in itertools.islice(self._batches(), self.step, None):
                if stopped:
                    break
                self._update(self.step, items)
                self.step += 1
                if self.step in self.eval_steps:
                    self._evaluate(self.step)
                    stopped = self._why_stop()
        return self._finish(self.step, stopped, time.monotonic() - started)

    # --- data ---------------------------------------------------------------------------------------------------------

    def _encode(self, groups: Sequence[Prompt], field: str) -> list[Item]:
        items, dropped = [], 0
        for group in groups:
            if self.config.data.overlong == "drop":
                kept = [r for r in group.responses if not self.model.text.is_overlong(group.messages, r.content)]
                dropped += len(group.responses) - len(kept)
                group = replace(group, responses=tuple(kept))
            if len(group.responses) > 1:
                items.append(self._item(group))
        if dropped:
            log.warning(
                "%s: left out %d responses over data.max_tokens = %d", field, dropped, self.model.text.max_tokens
            )
        if not items:
            raise ValueError(
                f"{field}: no group has two responses within data.max_tokens = {self.model.text.max_tokens}"
            )
        return items

    def _item(self, group: Prompt) -> Item:
        texts = [response.content for response in group.responses]
        is_counted = self.config.loss.length_control
        lengths = self.model.text.response_lengths(group.messages, texts) if is_counted else ()
        return Item(group, self.model.encode(group), tuple(lengths))

    def _batches(self) -> Iterator[list[Item]]:
        """Epochs of shuffled groups, prompts_per_step at a time; an epoch's last step may be smaller."""
        generator = torch.Generator().manual_seed(self.config.run.seed)
        size = self.config.optim.prompts_per_step
        for _ in range(self.config.run.epochs):
            order = torch.randperm(len(self.train_items), generator=generator).tolist()
            for at in range(0, len(order), size):
                yield [self.train_items[i] for i in order[at : at + size]]

    def _micro_batches(self, items: Sequence[Item]) -> list[list[Item]]:
        """Whole groups, like lengths together: little padding, and at most micro_batch_tokens each (a longer one alone)."""
        lengths = [self.model.num_tokens(item.encoded) for item in items]
        order = sorted(range(len(items)), key=lengths.__getitem__)
        runs = token_runs([lengths[i] for i in order], self.config.optim.micro_batch_tokens)
        return [[items[order[i]] for i in run] for run in runs]

    # --- one step -----------------------------------------------------------------------------------------------------

    def _update(self, step: int, items: Sequence[Item]) -> None:
        config = self.config.optim
        lr = learning_rate(step, self.num_steps, config)
        total, sums = torch.zeros(()), {}
        with self.progress.phase("forward_backward"):
            for batch in self._micro_batches(items):
                output = self._loss(self.model([item.encoded for item in batch]), batch)
                loss = output.per_group_B.sum() / len(items)
                loss.backward()
                total += loss.detach().cpu()
                for key, value in output.metrics.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
        with self.progress.phase("optimizer"):
            grad_norm, is_finite = guarded_step(self.optimizer, total, lr, config.max_grad_norm)
        self.guard.check(
            is_finite, f"step {step + 1}: loss {total.item()}, gradient norm {grad_norm}", self.progress.note
        )
        metrics = {"loss": total.item(), "grad_norm": grad_norm, "learning_rate": lr}
        metrics["epoch"] = (step + 1) * self.config.run.epochs / self.num_steps
        judged = sums.get("pairs", 0.0) - sums.get("pairs_equal", 0.0) * self.loss_fn.soft_labels
        if judged:
            metrics["accuracy"] = sums["pairs_right"] / judged
        self.metrics.log(step + 1, metrics | {"time/step": sum(self.progress.phase_s.values())})
        self.progress.step_done(step + 1, metrics)

    def _loss(self, score_M: torch.Tensor, items: Sequence[Item]) -> LossOutput:
        reward_M = torch.tensor([r for item in items for r in item.rewards], device=score_M.device)
        if self.length_weight:
            length_M = torch.tensor([n for item in items for n in item.lengths], device=score_M.device)
            score_M = score_M + self.length_weight * length_M.log()
        offsets = torch.tensor([0, *itertools.accumulate(len(item.encoded.ids) for item in items)])
        more = {}
        if self.loss_fn.needs_similarity:
            more["similarity"] = divergent_similarity([item.encoded.ids for item in items]).to(score_M.device)
        return self.loss_fn(score_M, reward_M, offsets, **more)

    # --- evaluation and end -------------------------------------------------------------------------------------------

    def _scores(self, items: Sequence[Item]) -> list[torch.Tensor]:
        return self.model.score_groups([item.encoded for item in items], self.config.optim.micro_batch_tokens)

    def _evaluate(self, step: int) -> None:
        """Measures the held-out pairs, keeps the best weights, and writes down where the run stands."""
        with self.progress.phase("eval"):
            scores = self._scores(self.held_items)
            found = pair_measures(pair_table([i.group for i in self.held_items], [s.tolist() for s in scores]))
            found["loss"] = self._loss(torch.cat(scores), self.held_items).loss.item()
        self.metrics.log(step, {f"eval/{key}": value for key, value in found.items()})
        self.progress.note(f"step {step}: held-out " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
        self.progress.phase_s.pop("eval", None)
        config = self.config.eval
        value = -found["accuracy"] if config.monitor == "accuracy" else found["loss"]
        if not self.best or value < self.best["value"]:
            trained = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
            self.best = {"value": value, "step": step, "weights": trained, "since": 0}
        else:
            self.best["since"] += 1
        state = {"step": step, "num_nonfinite": self.guard.count}
        save_checkpoint(self.run_dir, self.model, self.optimizer, self.best, state)

    def _why_stop(self) -> str | None:
        config = self.config.eval
        if config.patience and self.best["since"] >= config.patience:
            return f"{config.patience} evaluations without a better held-out {config.monitor} (eval.patience)"
        return None

    def _finish(self, step: int, stopped: str | None, wall_s: float) -> dict[str, Any]:
        self.model.load_state_dict(self.best["weights"], strict=False)
        scores = [score.tolist() for score in self._scores(self.held_items)]
        evaluation = evaluate_scores([item.group for item in self.held_items], scores)
        write_json(self.run_dir / "evaluation.json", evaluation)
        sample = sorted((item.encoded for item in self.held_items), key=lambda e: e.packed_tokens)[:_NUM_COMPARED]
        final = self.run_dir / "final"
        difference = self.model.export(final, sample)
        real = self.model.num_real
        numbers = ("accuracy", "accuracy_interval", "accuracy_se_by_prompt", "accuracy_longer_wins", "log_loss", "brier",
                   "ece", "num_pairs", "num_prompts", "num_ties")  # fmt: skip
        summary = {
            "run_dir": str(self.run_dir),
            "model": str(final),
            "steps": step,
            "best_step": self.best["step"],
            **{key: evaluation[key] for key in numbers},
            # None where an earlier trainer's cache held everything.
            "padding_factor": round(self.model.num_fed / real, 4) if real else None,
            "sharing_factor": round(self.model.num_read / real, 4) if real else None,
            "num_truncated": self.model.text.num_truncated,
            "export_difference": difference,
            "wall_s": round(wall_s, 1),
        }
        summary |= {"gamma": self.gamma} if self.gamma is not None else {}
        summary |= {"length_weight": self.length_weight} if self.config.loss.length_control else {}
        summary |= {"stopped": stopped} if stopped else {}
        write_json(self.run_dir / "summary.json", summary)
        write_reward_report(self.run_dir)
        return summary


def _groups(config: RewardTrainingConfig) -> tuple[list[Prompt], list[Prompt]]:
    groups = load_groups(config.data)
    if config.data.eval is None:
        train, held = hold_out(groups, config.data.eval_share, config.run.seed)
    else:
        train, held = groups, load_groups(config.data, "data.eval")
    check_margins(train, getattr(reward_model, config.loss.name))
    if not any(margins_and_labels(held)[0]):
        source = "data.eval" if config.data.eval else "the prompts that data.eval_share holds out"
        raise ValueError(f"{source}: every pair has equal scores, so nothing can be measured there")
    return train, held


def make_reward_loss(config: RewardLossConfig, groups: Sequence[Prompt]) -> tuple[RewardLoss, float | None]:
    """(the loss that loss.name and loss.params name, its gamma where it has one, fitted on the groups where asked for)."""
    try:
        kind = getattr(reward_model, config.name)
        check_params(kind, config.params)
        loss = kind(**resolve_gamma(config.params, *margins_and_labels(groups)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss.params = {config.params!r}: {error}") from error
    return loss, getattr(loss, "gamma", None)


def fit_length_weight(items: Sequence[Item]) -> float:
    """w of P(i over j) = sigmoid(w (log length_i - log length_j)), by maximum likelihood over all pairs; equal rewards: 1/2."""
    x, labels = [], []
    for item in items:
        for (r_i, n_i), (r_j, n_j) in itertools.combinations(zip(item.rewards, item.lengths, strict=True), 2):
            x.append(math.log(n_i) - math.log(n_j))
            labels.append(0.5 if r_i == r_j else float(r_i > r_j))
    try:
        return fit_slope(x, labels)
    except ValueError as error:
        raise ValueError(
            f"loss.length_control: the length decides every pair, nothing else is left to learn: {error}"
        ) from None


def _eval_steps(per_epoch: int, config: RewardTrainingConfig) -> set[int]:
    count = config.eval.per_epoch * config.run.epochs
    return {max(1, round(per_epoch * config.run.epochs * (i + 1) / count)) for i in range(count)}
