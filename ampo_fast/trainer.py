"""The loop: generate, score, select, pack, loss, step, sync. Everything else here serves one of these lines."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ampo_fast import losses
from ampo_fast.checkpoint import checkpoint_dirs, load_checkpoint, prune_checkpoints, require_disk, save_checkpoint
from ampo_fast.config import Config
from ampo_fast.data import load_prompts
from ampo_fast.embeddings import make_embedder
from ampo_fast.evaluation import Evaluation, evaluate
from ampo_fast.evaluation_summary import paired_summary
from ampo_fast.metrics import MetricsLog, read_metrics
from ampo_fast.model import Policy, export
from ampo_fast.model_card import versions, write_model_card
from ampo_fast.optimizer import guarded_step, learning_rate, make_optimizer
from ampo_fast.packing import micro_batches, pack
from ampo_fast.progress import TrainingProgress
from ampo_fast.report import write_report
from ampo_fast.reward_data import fitted_params, settle_disagreements
from ampo_fast.rewards import make_reward, score_group, score_groups
from ampo_fast.rollouts import TransformersEngine, generation_batches, make_engine
from ampo_fast.run_dir import open_run_dir
from ampo_fast.sampler import PromptSampler, admit_prompts
from ampo_fast.select import RewardTolerance, select_groups
from ampo_fast.stage_files import RowWriter, group_from_row, raw_rewards, read_embeddings, read_rows, write_rows_atomic
from ampo_fast.step_metrics import group_metrics, logp_difference, policy_metrics
from ampo_fast.types import CandidateGroup, PackedBatch, Prompt, Sampling, ScoredGroup, SelectedGroup
from ampo_fast.weight_sync import push_weights

log = logging.getLogger(__name__)

_MAX_NONFINITE_STEPS = 3


def train(config: Config, resume: bool = False) -> dict[str, Any]:
    """Runs AMPO as configured; returns the summary (also summary.json). SIGTERM and SIGUSR1: checkpoint and return.

    With resume, goes on from the newest complete checkpoint of the run directory, or starts anew where there is none.
    On a CPU with the transformers engine the metrics are then, bit for bit, those of a run that was never stopped.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this version trains in one process; start it without torchrun")
    return Trainer(config, resume).run()


class Trainer:
    def __init__(self, config: Config, resume: bool) -> None:
        self.config = config
        self.policy = Policy.load(config.model)
        self.train_prompts = self._prompts(config.data.train, "data.train")
        self.loss_fn = make_loss(config, self.train_prompts)
        self.eval_prompts = self._eval_prompts()
        self.sampler = PromptSampler(self.train_prompts, config.prompts_per_round, config.run.seed)
        self.embedder = make_embedder(config, self.policy)
        self.reward_fn = make_reward(config, self.embedder)
        self.optimizer = make_optimizer(self.policy.parameters(), config.optim)
        self.engine = make_engine(config, self.policy)
        self.reference = Policy.load(config.model) if needs_reference(self.loss_fn) else None
        self.run_dir = open_run_dir(config, resume)
        self.state: dict[str, Any] = {
            "spreads": [],
            "num_tokens": 0,
            "best_reward": None,
            "bad_evals": 0,
            "wall_s": 0.0,
        }
        self.step = self._restore() if resume else 0
        require_disk(self.run_dir, self.policy, config.checkpoint)
        (self.run_dir / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
        self.tolerance = RewardTolerance(config.reward.tol, self.state["spreads"])
        self.num_nonfinite = 0
        self.started = time.monotonic() - self.state["wall_s"]

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        config = self.config
        resume_step = self.step if self.step else -1
        with (
            MetricsLog(self.run_dir, config.run.trackers, resume_step=resume_step) as self.metrics,
            TrainingProgress(config.run.steps, self.step) as self.progress,
            _stop_signals() as stop,
        ):
            if self.eval_prompts and self.step == 0:
                self._evaluate("before")
            stopped = None
            while self.step < config.run.steps and not stopped:
                self._train_one_step()
                stopped = stop.reason or self._evaluate_if_due()
                if stopped or self._is_checkpoint_due():
                    self._save()
            if stop.reason:
                self.progress.note(f"{stop.reason}: saved step {self.step}; go on with --resume auto")
                return {"run_dir": str(self.run_dir), "steps": self.step, "stopped": stop.reason}
            return self._finish(stopped)

    def _train_one_step(self) -> None:
        """One optimizer step on the next prompts_per_step groups of the current round."""
        round_index, at = self._place(self.step)
        selected = self._round(round_index)[at : at + self.config.optim.prompts_per_step]
        metrics = self._update(selected) | group_metrics(selected, self.reward_tol)
        self.step += 1
        if self._place(self.step)[0] != round_index:
            with self.progress.phase("sync"):
                push_weights(self.policy, self.engine, self.step)
        self._log_step(metrics)

    def _round(self, index: int) -> list[SelectedGroup]:
        """The round's groups: sampled, scored, selected and written to rollouts/ once, then trained on step by step."""
        if getattr(self, "_current_round", None) == index:
            return self._selected
        prompts = self.sampler.round(index)
        first_step = index * self._steps_per_round
        path = self.run_dir / "rollouts" / f"step_{first_step + 1:06d}.jsonl"
        self.state["spreads"] = list(self.tolerance.spreads)
        if path.exists():  # left by the run that is being resumed, and equal to what would be sampled again
            scored = self._reload(path, prompts)
        else:
            if self.step != first_step:
                raise ValueError(f"{path} is missing and cannot be sampled again: the policy has moved on since")
            groups = self._generate(prompts, first_step, path)
            with self.progress.phase("score"):
                scored = score_groups(groups, self.reward_fn, self.embedder, self.config)
        with self.progress.phase("select"):
            self.reward_tol = self.tolerance.update(scored)
            self._selected = select_groups(scored, self.config, self.reward_tol)
        write_rows_atomic(path, self._selected)
        _partial(path).unlink(missing_ok=True)
        self._current_round = index
        return self._selected

    def _reload(self, path: Path, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        rows = read_rows(path)
        if [row["id"] for row in rows] != [prompt.id for prompt in prompts]:
            raise ValueError(f"{path} holds other prompts than this round's; was the data changed since the run began?")
        embeddings = read_embeddings(path, [len(row["responses"]) for row in rows])
        return [
            score_group(group_from_row(row), raw_rewards(row), embedding, self.config)
            for row, embedding in zip(rows, embeddings, strict=True)
        ]

    def _generate(self, prompts: Sequence[Prompt], first_step: int, path: Path) -> list[CandidateGroup]:
        """Candidates for every prompt, kept on disk batch by batch so that a killed run repeats at most one batch."""
        rollout = self.config.rollout
        sampling = Sampling(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=rollout.max_new_tokens,
            seed=self.config.run.seed,
            step=first_step,
        )
        lengths = [len(self.policy.encode_prompt(prompt.messages)) for prompt in prompts]
        batches = generation_batches(lengths, rollout.n, rollout.batch_rows)
        with self.progress.phase("generate", total=len(prompts)), RowWriter(_partial(path)) as writer:
            done = writer.groups(prompts)
            for batch in batches:
                todo = [prompts[i] for i in batch]
                if not all(prompt.id in done for prompt in todo):
                    groups = self.engine.generate(todo, rollout.n, sampling)
                    writer.write(groups)
                    done |= {group.prompt.id: group for group in groups}
                self.progress.advance(len(batch))
        return [done[prompt.id] for prompt in prompts]

    def _update(self, selected: Sequence[SelectedGroup]) -> dict[str, float]:
        """Forward and backward over micro-batches of whole groups, then one guarded optimizer step.

        Every micro-batch's loss is divided by the step's count of trained groups, so that any split gives the same step.
        """
        config = self.config.optim
        trained = [group for group in selected if group.is_trained]
        lr = learning_rate(self.step, self.config.run.steps, config)
        if not trained:
            return {"learning_rate": lr, "num_tokens": self.state["num_tokens"]}
        total, stats, batches = torch.zeros((), device=self.policy.device), [], []
        for groups in micro_batches(trained, config.micro_batch_tokens):
            with self.progress.phase("pack"):
                batch = self._with_reference(pack(groups, self.policy.device), groups)
            with self.progress.phase("forward_backward"):
                loss, part = self.policy(batch, self.loss_fn, len(trained), eos_id=eos_id(self.loss_fn, self.policy))
                loss.backward()
            total += loss.detach()
            stats.append(part)
            batches.append(batch)
        with self.progress.phase("optimizer"):
            grad_norm, is_finite = guarded_step(self.optimizer, total, lr, config.max_grad_norm)
        self._guard(is_finite, total, grad_norm)
        self.state["num_tokens"] += sum(batch.token_T.numel() for batch in batches)
        metrics = {
            "loss": total.item(),
            "grad_norm": grad_norm,
            "learning_rate": lr,
            "num_tokens": self.state["num_tokens"],
        }
        if self._is_comparable:
            metrics |= logp_difference(stats, batches)
        return metrics | policy_metrics(stats, batches)

    def _with_reference(self, batch: PackedBatch, groups: Sequence[SelectedGroup]) -> PackedBatch:
        if self.reference is None:
            return batch
        logp_R = self.reference.token_logp(batch)
        ends = batch.response_offsets.tolist()
        ref_logp_M = torch.stack([logp_R[a:b].sum() for a, b in itertools.pairwise(ends)])
        return dataclasses.replace(batch, ref_logp_M=ref_logp_M)

    # --- where we are ---------------------------------------------------------------------------------------------

    @property
    def _steps_per_round(self) -> int:
        per_pass = self.config.prompts_per_round // self.config.optim.prompts_per_step
        return per_pass * self.config.rollout.updates_per_round

    def _place(self, step: int) -> tuple[int, int]:
        """(round, index of the step's first group within the round)."""
        round_index, within = divmod(step, self._steps_per_round)
        return round_index, within * self.config.optim.prompts_per_step % self.config.prompts_per_round

    @property
    def _is_comparable(self) -> bool:
        """Whether engine and trainer log-probs are of the same distribution: temperature 1, nothing truncated, on-policy."""
        rollout = self.config.rollout
        is_fresh = self.step % self._steps_per_round == 0
        return is_fresh and rollout.temperature == 1.0 and rollout.top_p == 1.0 and not rollout.top_k

    def _guard(self, is_finite: bool, loss: torch.Tensor, grad_norm: float) -> None:
        self.num_nonfinite = 0 if is_finite else self.num_nonfinite + 1
        if not is_finite:
            self.progress.note(f"step {self.step + 1}: loss {loss.item()}, gradient norm {grad_norm}: update left out")
        if self.num_nonfinite == _MAX_NONFINITE_STEPS:
            raise ValueError(
                f"{_MAX_NONFINITE_STEPS} steps in a row had a non-finite loss or gradient; nothing was trained on them. "
                "Lower optim.lr or loss.params.beta, and look at the rewards in rollouts/"
            )

    def _log_step(self, metrics: dict[str, float]) -> None:
        seconds = dict(self.progress.phase_s)
        step_s = sum(seconds.values())
        metrics |= {"epoch": self.sampler.epoch(self.step / self._steps_per_round)}
        metrics |= {f"time/{name}": value for name, value in seconds.items()} | {"time/step": step_s}
        sampled = metrics["completions/mean_length"] * metrics["group/size"] * self.config.optim.prompts_per_step
        metrics |= {"perf/tokens_per_second": sampled / step_s, "perf/peak_rss_mib": peak_rss_mib()}
        self.metrics.log(self.step, metrics)
        self.progress.step_done(self.step, metrics)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(self, name: str) -> float:
        """Writes eval/NAME.jsonl, then its line of metrics (so that a line implies the file); returns the mean reward."""
        with self.progress.phase("eval"):
            result = self._measure()
        write_rows_atomic(self.run_dir / "eval" / f"{name}.jsonl", result.scored)
        self.metrics.log(self.step, result.metrics | {"time/eval": self.progress.phase_s.get("eval", 0.0)})
        shown = ", ".join(f"{key.removeprefix('eval/')} {value:.4f}" for key, value in result.metrics.items())
        self.progress.note(f"evaluation at step {self.step}: {shown}")
        self.progress.phase_s.pop("eval", None)
        return result.metrics["eval/reward"]

    def _measure(self) -> Evaluation:
        config = self.config
        engine = self.engine
        if config.rollout.engine == "data":
            engine = TransformersEngine(self.policy, config.rollout.batch_rows)
        reward_fn = make_reward(config, self.embedder, config.eval.reward) if config.eval.reward else self.reward_fn
        return evaluate(
            self.policy, engine, self.eval_prompts, reward_fn, self.embedder, config, lambda: Policy.load(config.model)
        )

    def _evaluate_if_due(self) -> str | None:
        """Evaluates every eval.every steps, keeps the best policy; returns why to stop, or None."""
        config = self.config.eval
        if not (
            config.every and self.eval_prompts and self.step % config.every == 0 and self.step < self.config.run.steps
        ):
            return None
        reward = self._evaluate(f"step_{self.step:06d}")
        kl = read_metrics(self.metrics.path)[-1]["eval/kl"]
        if self.state["best_reward"] is None or reward > self.state["best_reward"]:
            self.state |= {"best_reward": reward, "bad_evals": 0}
            if self.config.checkpoint.save_best:
                export(self.policy, self.run_dir / "best")
                write_model_card(self.run_dir / "best", self.config, {"steps": self.step})
        else:
            self.state["bad_evals"] += 1
        if config.max_kl is not None and kl > config.max_kl:
            return f"KL to the start is {kl:.4f} nats per token, over eval.max_kl = {config.max_kl}"
        if config.patience and self.state["bad_evals"] >= config.patience:
            return f"{config.patience} evaluations without a better reward (eval.patience)"
        return None

    # --- start, save, finish --------------------------------------------------------------------------------------

    def _prompts(self, source: str, field: str) -> list[Prompt]:
        needs_responses = field == "data.train" and self.config.rollout.engine == "data"
        prompts = settle_disagreements(load_prompts(source, needs_responses=needs_responses), "scores", field)
        prompts = admit_prompts(prompts, self.policy, self.config, field)
        if not prompts:
            raise ValueError(f"{field} = {source!r} leaves no prompt to use")
        return prompts

    def _eval_prompts(self) -> list[Prompt]:
        config = self.config
        if config.data.eval is None or not config.eval.prompts:
            return []
        if config.reward.kind == "data" and not config.eval.reward:
            raise ValueError('data.eval needs a scorer for fresh answers: set eval.reward (reward.kind is "data")')
        return self._prompts(config.data.eval, "data.eval")[: config.eval.prompts]

    def _restore(self) -> int:
        found = checkpoint_dirs(self.run_dir / "checkpoints")
        if not found:
            return 0
        step, path = found[-1]
        self.state = load_checkpoint(path, self.policy, self.optimizer)
        self.engine.load_weights(step // self._steps_per_round * self._steps_per_round, [])
        log.info("resumed from %s", path)
        return step

    def _is_checkpoint_due(self) -> bool:
        every = self.config.checkpoint.every
        return self.step == self.config.run.steps or bool(every and self.step % every == 0)

    def _save(self) -> None:
        root = self.run_dir / "checkpoints"
        self.state["wall_s"] = time.monotonic() - self.started
        with self.progress.phase("checkpoint"):
            save_checkpoint(root, self.step, self.policy, self.optimizer, self.state)
            prune_checkpoints(root, self.config.checkpoint)

    def _finish(self, stopped: str | None) -> dict[str, Any]:
        """Final evaluation, export, report and summary."""
        summary: dict[str, Any] = {"run_dir": str(self.run_dir), "steps": self.step}
        if self.eval_prompts:
            if not any(row["step"] == self.step and "eval/reward" in row for row in read_metrics(self.metrics.path)):
                self._evaluate("after")
            before, after = (read_rows(self.run_dir / "eval" / f"{name}.jsonl") for name in ("before", "after"))
            summary |= paired_summary(before, after)
            print_completions(before, after, file=sys.stderr)
        if stopped:
            summary["stopped"] = stopped
        summary |= {"wall_s": round(time.monotonic() - self.started, 1), "peak_rss_mib": round(peak_rss_mib())}
        (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        export(self.policy, self.run_dir / "final")
        write_model_card(self.run_dir / "final", self.config, summary)
        write_report(self.run_dir)
        return summary


def make_loss(config: Config, prompts: Sequence[Prompt] = ()) -> Any:
    """The loss that loss.name and loss.params name, plus the NLL term where asked for; gamma fitted on given rewards."""
    known = [name for name in losses.__all__ if isinstance(getattr(losses, name), type)]
    if config.loss.name not in known:
        raise ValueError(f"loss.name = {config.loss.name!r}; known: {', '.join(known)}")
    try:
        loss = getattr(losses, config.loss.name)(**fitted_params(config.loss, config.reward.normalize, prompts))
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss.params = {config.loss.params!r}: {error}") from error
    if config.loss.nll_weight:
        return losses.Sum([(1.0, loss), (config.loss.nll_weight, losses.NLL())])
    return loss


def eos_id(loss_fn: Any, policy: Policy) -> int | None:
    return policy.stop_ids[0] if getattr(loss_fn, "needs_eos", False) else None


def needs_reference(loss_fn: Any) -> bool:
    return getattr(loss_fn, "uses_reference", False)


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_completions(before: Sequence[dict], after: Sequence[dict], file: Any, limit: int = 6) -> None:
    """The same held-out prompts before and after, one above the other."""
    for old, new in list(zip(before, after, strict=True))[:limit]:
        print(f"\n{old['prompt'][-1]['content']}", file=file)
        for name, row in (("before", old), ("after", new)):
            response = row["responses"][0]
            print(f"  {name:>6} [{response['reward_raw']:.2f}] {response['content']!r}", file=file)


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial.jsonl")


class _Stop:
    reason: str | None = None


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGTERM and SIGUSR1 ask for a stop after the running step; handlers are put back afterwards."""
    stop = _Stop()

    def ask(number: int, frame: Any) -> None:
        stop.reason = signal.Signals(number).name

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
