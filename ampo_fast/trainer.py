"""The loop: generate, score, select, pack, loss, step, sync. Everything else here serves one of these lines.

    groups   = engine.generate(prompts)       rounds.RoundMaker._groups: a round for several steps, ahead where that can be
    scored   = score_groups(groups)           RoundMaker._make
    selected = select_groups(scored)          RoundMaker._select: on rank 0, for all
    batch    = pack_micro_batch(selected)     update.Updater._backward: rank by rank, one micro-batch after the other
    loss     = policy(batch, loss_fn)         likewise; of a group longer than a micro-batch in parts (split_groups)
    guarded_step(optimizer, loss)             Updater.step
    push_weights(policy, engine, version)     Trainer._sync: after a round's last step

Trainer._train_one_step asks for the first three at once (rounds.selected), for the next three at once (updater.step).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ampo_fast import distributed
from ampo_fast.checkpoint import checkpoint_dirs, load_checkpoint, require_disk
from ampo_fast.checkpoint_writer import CheckpointWriter
from ampo_fast.config import Config
from ampo_fast.early_stop import START as EVALUATION_START
from ampo_fast.early_stop import take_in, why_stop
from ampo_fast.embeddings import make_embedder
from ampo_fast.evaluation import Evaluation, evaluate
from ampo_fast.evaluation_summary import paired_summary, print_completions
from ampo_fast.export import export
from ampo_fast.files import write_json
from ampo_fast.memory import peak_rss_mib
from ampo_fast.metrics import MetricsLog, read_metrics
from ampo_fast.model import Policy
from ampo_fast.model_card import versions, write_model_card
from ampo_fast.progress import TrainingProgress
from ampo_fast.report import write_report
from ampo_fast.rewards import make_reward
from ampo_fast.rollouts.engines import make_actor_engine, make_engine, samples_here
from ampo_fast.rollouts.replay import ReplayBuffer
from ampo_fast.rollouts.rounds import RoundMaker
from ampo_fast.run_dir import check_run_dir, keep_data, open_run_dir, run_closed
from ampo_fast.sampler import read_prompts
from ampo_fast.select import why_untrained
from ampo_fast.stage_files import read_rows, write_rows_atomic
from ampo_fast.start_checks import check_start
from ampo_fast.step_metrics import group_metrics
from ampo_fast.stop_signals import stop_signals
from ampo_fast.trace import TRACE_FILE, Trace
from ampo_fast.types import SelectedGroup
from ampo_fast.update import Updater
from ampo_fast.weight_sync import push_weights

log = logging.getLogger(__name__)


def train(config: Config, resume: bool = False) -> dict[str, Any]:
    """Runs AMPO as configured; returns the summary (also summary.json). SIGTERM and SIGUSR1: checkpoint and return.

    Under torchrun every process calls it: prompts, scoring and training are split over the ranks, the parameters are
    sharded, and rank 0 writes the run directory. With resume, goes on from the newest complete checkpoint of the run
    directory, or starts anew where there is none. On a CPU with the transformers engine and as many ranks as before the
    metrics are then, bit for bit, those of a run that was never stopped.
    """
    with distributed.process_group(config.run.timeout_s), distributed.named_errors(), run_closed(config):
        trainer = Trainer(config, resume)
        try:
            return trainer.run()
        finally:
            trainer.checkpoints.close()
            trainer.engine.close()
            trainer.rounds.close()


class Trainer:
    def __init__(self, config: Config, resume: bool) -> None:
        rows = check_start(config)
        if not resume:  # whose settings are compared once the data has said how many steps they make
            distributed.on_main(lambda: check_run_dir(config, resume))
        self.policy = Policy.load(config.model)
        if config.model.compile:
            self.policy.compile_blocks()
        if config.optim.activation_checkpointing:
            self.policy.checkpoint_activations()
        self.policy.shard()
        prompts = read_prompts(config, self.policy, rows)
        self.sampler, self.eval_prompts = prompts.sampler, prompts.held_out
        self.config = config = config.with_steps_for(len(self.sampler.prompts))
        self.actor = Policy.load_replica(config.model) if self._needs_replica() else self.policy
        self.embedder = make_embedder(config, self.actor)
        self.reward_fn = self.eval_reward_fn = make_reward(config, self.embedder)
        if self.eval_prompts and config.eval.reward:
            self.eval_reward_fn = make_reward(config, self.embedder, config.eval.reward)
        self.updater = Updater(config, self.policy, self.sampler.prompts)
        if self.policy.device.type == "cuda":  # a CPU has memory to swap to, and no time to spend on a trial
            self.updater.preflight(prompts.longest)
        self.engine = make_engine(config, self.actor, self._segment_writer())
        self.actor_engine = make_actor_engine(config, self.engine, self.actor, self._answers_held_out)
        self.run_dir = distributed.on_main(lambda: open_run_dir(config, resume))
        read = {"data.train": prompts.read, "data.eval": self.eval_prompts}
        distributed.on_main(lambda: keep_data(self.run_dir, read))
        if self.updater.reference is not None:
            self.updater.reference.keep_in(self.run_dir)
        self.state: dict[str, Any] = {
            "spreads": [],
            "num_tokens": 0,
            "trained_groups": 0,
            "num_nonfinite": 0,
            **EVALUATION_START,
            "wall_s": 0.0,
        }
        self.has_warned = False
        self.step = self._restore() if resume else 0
        require_disk(self.run_dir, self.policy, config)
        self.checkpoints = CheckpointWriter(
            self.run_dir / "checkpoints", self.policy, self.updater.optimizer, config.checkpoint
        )
        if distributed.is_main():
            write_json(self.run_dir / "versions.json", versions())
        self.trace = Trace(self.run_dir / TRACE_FILE if distributed.is_main() else None)
        self.rounds = RoundMaker(
            config, self.actor, self.engine, self.sampler, self.reward_fn, self.embedder,
            self.run_dir / "rollouts", self.state["spreads"], self.trace,
        )  # fmt: skip
        self.replay = ReplayBuffer(config.rollout.replay, config.run.seed, self.rounds.read)
        self.started = time.monotonic() - self.state["wall_s"]

    def _needs_replica(self) -> bool:
        """Whether the policy is sharded, and something samples or embeds with it for one rank's prompts alone."""
        config = self.config
        needs_whole = samples_here(config) or self._answers_held_out or config.embed.model == "policy"
        return needs_whole and distributed.world_size() > 1

    @property
    def _answers_held_out(self) -> bool:
        """Whether the actor writes answers that the data does not bring."""
        return self.config.rollout.engine == "data" and bool(self.eval_prompts)

    def _segment_writer(self) -> Policy:
        reference = self.updater.reference
        return reference.model if reference is not None and reference.moves else self.actor

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        config = self.config
        with (
            self._open_metrics() as self.metrics,
            self._open_progress() as self.progress,
            stop_signals() as stop,
        ):
            if self.eval_prompts and self.step == 0:
                take_in(self.state, self.step, self._evaluate("before"))
            elif self._is_evaluation_due() and self.state["evaluated"] != self.step:  # a signal had left it out
                self._take_in(distributed.on_main(self._measured) or self._evaluate(self._evaluation_name()))
            stopped, signal = why_stop(self.state, config.eval), None
            while self.step < config.run.steps and not (stopped or signal):
                self._train_one_step()
                signal = next(filter(None, distributed.all_gather(stop.reason)), None)
                if not signal and self._is_evaluation_due():
                    self._take_in(self._evaluate(self._evaluation_name()))
                    stopped = why_stop(self.state, config.eval)
                if stopped or signal or self._is_checkpoint_due():
                    self._save()
            if signal:
                self.checkpoints.wait()
                self.progress.note(f"{signal}: saved step {self.step}; go on with --resume auto")
                return {"run_dir": str(self.run_dir), "steps": self.step, "stopped": signal}
            return self._finish(stopped)

    def _train_one_step(self) -> None:
        """One optimizer step on the next prompts_per_step groups of the current round."""
        round_index, at = self._place(self.step)
        selected = self.rounds.selected(round_index, self.step, self.progress)
        if self.config.rollout.replay:
            selected = self.replay.draw(round_index, selected)
        selected = selected[at : at + self.config.optim.prompts_per_step]
        metrics = self.updater.step(selected, self.step, self.progress, self._is_comparable)
        self.state["num_tokens"] += metrics["num_tokens"]
        self._count_trained(selected)
        if distributed.is_main():  # which alone has the candidates that were not selected
            metrics |= group_metrics(selected, self.rounds.reward_tol, self.step) | self.rounds.overlap_metrics
        self.step += 1
        if self._place(self.step)[0] != round_index:
            self._sync(self.step)
            metrics |= self.engine.sync_metrics
        if distributed.is_main():
            metrics = self._log_step(metrics)
        self.progress.step_done(self.step, metrics)

    def _count_trained(self, selected: Sequence[SelectedGroup]) -> None:
        """Says the first time that a step has nothing to train on: a run of such steps ends like any other."""
        num_trained = sum(group.is_trained for group in selected)
        self.state["trained_groups"] += num_trained
        if not (num_trained or self.has_warned):
            self.has_warned = True
            self.progress.note(f"warning: step {self.step + 1} trains on no group: {why_untrained(selected)}")

    def _sync(self, version: int) -> None:
        """Sends the weights to everyone who holds a copy, once no request is in flight; every rank takes part."""
        self.rounds.wait(self.progress)
        with self.progress.phase("sync"):
            self._push(version)

    def _push(self, version: int) -> None:
        """The actor first: another engine is handed its tensors, and is checked against it."""
        for engine, source in ((self.actor_engine, self.policy), (self.engine, self.actor)):
            if engine.version != version:
                push_weights(source, engine, version)

    # --- where we are ---------------------------------------------------------------------------------------------

    def _place(self, step: int) -> tuple[int, int]:
        """(round, index of the step's first group within the round)."""
        round_index, within = divmod(step, self.config.steps_per_round)
        return round_index, within * self.config.optim.prompts_per_step % self.config.prompts_per_round

    @property
    def _is_comparable(self) -> bool:
        """Whether engine and trainer log-probs are of the same kind of distribution: temperature 1, nothing truncated."""
        rollout = self.config.rollout
        return rollout.temperature == 1.0 and rollout.top_p == 1.0 and not rollout.top_k

    def _log_step(self, metrics: dict[str, float]) -> dict[str, float]:
        seconds = dict(self.progress.phase_s)
        step_s = sum(seconds.values())
        sampled = metrics["completions/mean_length"] * metrics["group/size"] * self.config.optim.prompts_per_step
        tokens = {"": sampled, "trained_": metrics["num_tokens"], "wasted_": metrics.get("perf/wasted_tokens", 0)}
        metrics |= {f"perf/{kind}tokens_per_second": number / step_s for kind, number in tokens.items()}
        metrics |= {"num_tokens": self.state["num_tokens"]}
        metrics |= {"epoch": self.sampler.epoch(self.step / self.config.steps_per_round)}
        metrics |= {f"time/{name}": value for name, value in seconds.items()} | {"time/step": step_s}
        metrics |= {"perf/peak_rss_mib": peak_rss_mib()}
        self.metrics.log(self.step, metrics)
        return metrics

    # --- evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(self, name: str) -> dict[str, float]:
        """Writes eval/NAME.jsonl, then its line of metrics (so that a line implies the file); returns the metrics."""
        with self.progress.phase("eval"):
            result = self._measure()
        seconds = self.progress.phase_s.pop("eval")
        if distributed.is_main():
            write_rows_atomic(self.run_dir / "eval" / f"{name}.jsonl", result.scored)
            self.metrics.log(self.step, result.metrics | {"time/eval": seconds})
        shown = ", ".join(f"{key.removeprefix('eval/')} {value:.4f}" for key, value in result.metrics.items())
        self.progress.note(f"evaluation at step {self.step}: {shown}")
        return result.metrics

    def _measure(self) -> Evaluation:
        config = self.config
        self._sync(self.step)  # within a round, weights that are not the policy's own are behind
        engine = self.actor_engine if self._answers_held_out else self.engine
        return evaluate(self.policy, engine, self.eval_prompts, self.eval_reward_fn, self.embedder, config, self._start)

    @contextlib.contextmanager
    def _start(self) -> Iterator[Policy]:
        """The policy that the run began with: loaded only where none is in memory."""
        reference = self.updater.reference
        if self.policy.lora:
            with self.policy.adapter_off():
                yield self.policy
        elif reference is not None and reference.is_copy_of_start:
            yield reference.model
        else:
            yield Policy.load(self.config.model).shard()

    def _is_evaluation_due(self) -> bool:
        every = self.config.eval.every
        return bool(self.eval_prompts and every and self.step % every == 0 and self.step < self.config.run.steps)

    def _take_in_last(self) -> None:
        is_there = distributed.on_main(self._has_last_evaluation)
        measured = distributed.on_main(self._measured) if is_there else self._evaluate("after")
        if self.config.eval.every and self.state["evaluated"] != self.step:
            self._take_in(measured)

    def _take_in(self, measured: Mapping[str, float]) -> None:
        """Of an evaluation after the start: keeps the best policy."""
        if take_in(self.state, self.step, measured) and self.config.checkpoint.save_best:
            self._export("best", self._reached())

    def _evaluation_name(self) -> str:
        return f"step_{self.step:06d}"

    def _export(self, name: str, summary: dict[str, Any]) -> None:
        export(self.policy, self.run_dir / name)
        if distributed.is_main():
            write_model_card(self.run_dir / name, self.config, summary)

    # --- start, save, finish --------------------------------------------------------------------------------------

    def _open_metrics(self) -> contextlib.AbstractContextManager[MetricsLog | None]:
        if not distributed.is_main():
            return contextlib.nullcontext()
        return MetricsLog(self.run_dir, self.config.run.trackers, resume_step=self.step or -1)

    @contextlib.contextmanager
    def _open_progress(self) -> Iterator[TrainingProgress]:
        """The display on rank 0, silence on the others; every rank tells the others where it is."""

        def note(phase: str) -> None:
            distributed.note_phase(f"step {self.step + 1}, {phase}")

        with open(os.devnull, "w") as silence:
            stream = None if distributed.is_main() else silence
            on_span = functools.partial(self.trace.add, "trainer")
            with TrainingProgress(
                self.config.run.steps, self.step, stream=stream, on_phase=note, on_span=on_span
            ) as progress:
                yield progress

    def _restore(self) -> int:
        found = distributed.on_main(lambda: checkpoint_dirs(self.run_dir / "checkpoints"))
        if not found:
            return 0
        step, path = found[-1]
        kept = load_checkpoint(path, self.policy, self.updater.optimizer)
        self.state |= {"evaluated": step} | kept  # an older one may lack a key
        self.updater.guard.count = self.state["num_nonfinite"]
        if self.updater.reference is not None:
            self.updater.reference.restore(step)
        self._push(step)
        log.info("resumed from %s", path)
        return step

    def _is_checkpoint_due(self) -> bool:
        every = self.config.checkpoint.every
        return self.step == self.config.run.steps or bool(every and self.step % every == 0)

    def _save(self) -> None:
        self.state["spreads"] = self.rounds.spreads_before(self._place(self.step)[0])
        self.state["num_nonfinite"] = self.updater.guard.count
        self.state["wall_s"] = time.monotonic() - self.started
        with self.progress.phase("checkpoint"):
            if self.updater.reference is not None:
                self.updater.reference.save(self.step)
            self.checkpoints.save(self.step, self.state)

    def _finish(self, stopped: str | None) -> dict[str, Any]:
        """Final evaluation and export; then, of the model that is safe by now, summary, card and report."""
        if self.eval_prompts:
            self._take_in_last()
        self.checkpoints.wait()
        num_windowed = sum(distributed.all_gather(self.embedder.num_windowed))
        export(self.policy, self.run_dir / "final")
        return distributed.on_main(lambda: self._describe(stopped, num_windowed))

    def _describe(self, stopped: str | None, num_windowed: int) -> dict[str, Any]:
        summary = self._summarise(stopped, num_windowed)
        write_model_card(self.run_dir / "final", self.config, summary)
        write_report(self.run_dir)
        return summary

    def _measured(self) -> dict[str, Any] | None:
        """The metrics of this step's evaluation, where there was one."""
        rows = read_metrics(self.metrics.path)
        return next((row for row in rows if row["step"] == self.step and "eval/reward" in row), None)

    def _has_last_evaluation(self) -> bool:
        """Whether eval/after.jsonl is of this step; an evaluation on the way that stopped the run becomes it."""
        if self._measured() is None:
            return False
        folder = self.run_dir / "eval"
        on_the_way = folder / f"{self._evaluation_name()}.jsonl"
        if on_the_way.exists():
            write_rows_atomic(folder / "after.jsonl", read_rows(on_the_way))
        return True

    def _reached(self) -> dict[str, int]:
        return {"steps": self.step, "trained_groups": self.state["trained_groups"]}

    def _summarise(self, stopped: str | None, num_windowed: int) -> dict[str, Any]:
        summary: dict[str, Any] = {"run_dir": str(self.run_dir)} | self._reached()
        if self.eval_prompts:
            before, after = (read_rows(self.run_dir / "eval" / f"{name}.jsonl") for name in ("before", "after"))
            try:
                summary |= paired_summary(before, after)
            except ValueError as error:  # nothing scored in both: no result, but a run all the same
                self.progress.note(f"no result: {error}")
            print_completions(before, after, file=sys.stderr)
        if stopped:
            summary["stopped"] = stopped
        if self.updater.fitted_gamma is not None:
            summary["gamma"] = self.updater.fitted_gamma
        if num_windowed:  # since the start or the resume
            summary["num_windowed"] = num_windowed
        summary |= {"wall_s": round(time.monotonic() - self.started, 1), "peak_rss_mib": round(peak_rss_mib())}
        write_json(self.run_dir / "summary.json", summary)
        return summary
