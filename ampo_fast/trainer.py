"""The loop: generate, score, select, pack, loss, step, sync. Everything else here serves one of these lines."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

from ampo_fast.checkpoint import checkpoint_dirs, load_checkpoint, prune_checkpoints, require_disk, save_checkpoint
from ampo_fast.config import Config
from ampo_fast.data import load_prompts
from ampo_fast.embeddings import make_embedder
from ampo_fast.engines import make_engine
from ampo_fast.evaluation import Evaluation, evaluate
from ampo_fast.evaluation_summary import paired_summary
from ampo_fast.metrics import MetricsLog, read_metrics
from ampo_fast.model import Policy, export
from ampo_fast.model_card import versions, write_model_card
from ampo_fast.progress import TrainingProgress
from ampo_fast.report import write_report
from ampo_fast.rewards import make_reward
from ampo_fast.rollouts import TransformersEngine
from ampo_fast.rounds import RoundMaker
from ampo_fast.run_dir import open_run_dir
from ampo_fast.sampler import PromptSampler, admit_prompts
from ampo_fast.stage_files import read_rows, write_rows_atomic
from ampo_fast.step_metrics import group_metrics
from ampo_fast.stop_signals import stop_signals
from ampo_fast.types import Prompt
from ampo_fast.update import Updater, make_loss
from ampo_fast.weight_sync import push_weights

log = logging.getLogger(__name__)


def train(config: Config, resume: bool = False) -> dict[str, Any]:
    """Runs AMPO as configured; returns the summary (also summary.json). SIGTERM and SIGUSR1: checkpoint and return.

    With resume, goes on from the newest complete checkpoint of the run directory, or starts anew where there is none.
    On a CPU with the transformers engine the metrics are then, bit for bit, those of a run that was never stopped.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this version trains in one process; start it without torchrun")
    trainer = Trainer(config, resume)
    try:
        return trainer.run()
    finally:
        trainer.engine.close()


class Trainer:
    def __init__(self, config: Config, resume: bool) -> None:
        self.config = config
        make_loss(config)  # a loss that cannot be built is said before the model is loaded
        self.policy = Policy.load(config.model)
        self.train_prompts = self._prompts(config.data.train, "data.train")
        self.eval_prompts = self._eval_prompts()
        self.sampler = PromptSampler(self.train_prompts, config.prompts_per_round, config.run.seed)
        self.embedder = make_embedder(config, self.policy)
        self.reward_fn = make_reward(config, self.embedder)
        self.updater = Updater(config, self.policy)
        self.engine = make_engine(config, self.policy)
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
        self.rounds = RoundMaker(
            config, self.policy, self.engine, self.sampler, self.reward_fn, self.embedder,
            self.run_dir / "rollouts", self.state["spreads"],
        )  # fmt: skip
        self.started = time.monotonic() - self.state["wall_s"]

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        config = self.config
        resume_step = self.step if self.step else -1
        with (
            MetricsLog(self.run_dir, config.run.trackers, resume_step=resume_step) as self.metrics,
            TrainingProgress(config.run.steps, self.step) as self.progress,
            stop_signals() as stop,
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
        first_step = round_index * self._steps_per_round
        selected = self.rounds.selected(round_index, first_step, self.step, self.progress)
        selected = selected[at : at + self.config.optim.prompts_per_step]
        metrics = self.updater.step(selected, self.step, self.progress, self._is_comparable)
        self.state["num_tokens"] += metrics["num_tokens"]
        metrics |= {"num_tokens": self.state["num_tokens"]} | group_metrics(selected, self.rounds.reward_tol)
        self.step += 1
        if self._place(self.step)[0] != round_index:
            with self.progress.phase("sync"):
                push_weights(self.policy, self.engine, self.step)
            metrics |= self.engine.sync_metrics
        self._log_step(metrics)

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
        elif engine.version != self.step:  # within a round an engine with weights of its own is behind
            push_weights(self.policy, engine, self.step)
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
        prompts = load_prompts(source, needs_responses=needs_responses)
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
        self.state = load_checkpoint(path, self.policy, self.updater.optimizer)
        push_weights(self.policy, self.engine, step // self._steps_per_round * self._steps_per_round)
        log.info("resumed from %s", path)
        return step

    def _is_checkpoint_due(self) -> bool:
        every = self.config.checkpoint.every
        return self.step == self.config.run.steps or bool(every and self.step % every == 0)

    def _save(self) -> None:
        root = self.run_dir / "checkpoints"
        self.state["spreads"] = self.rounds.spreads_before(self._place(self.step)[0])
        self.state["wall_s"] = time.monotonic() - self.started
        with self.progress.phase("checkpoint"):
            save_checkpoint(root, self.step, self.policy, self.updater.optimizer, self.state)
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


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_completions(before: Sequence[dict], after: Sequence[dict], file: Any, limit: int = 6) -> None:
    """The same held-out prompts before and after, one above the other."""
    for old, new in list(zip(before, after, strict=True))[:limit]:
        print(f"\n{old['prompt'][-1]['content']}", file=file)
        for name, row in (("before", old), ("after", new)):
            response = row["responses"][0]
            print(f"  {name:>6} [{response['reward_raw']:.2f}] {response['content']!r}", file=file)
