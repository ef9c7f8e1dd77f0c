"""A round's groups: sampled, scored, selected and written to rollouts/ once, then trained on step by step.

With rollout.max_staleness = 1 the next round is sampled ahead, by the weights that this one's training began with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ampo_fast import distributed
from ampo_fast.config import Config
from ampo_fast.embeddings import Embedder
from ampo_fast.lookahead import Lookahead
from ampo_fast.model import Policy
from ampo_fast.progress import TrainingProgress
from ampo_fast.rewards import RewardFn, score_group, score_groups
from ampo_fast.rollouts import IncompleteBatch, RolloutEngine, rank_batches, shared_answers
from ampo_fast.sampler import PromptSampler
from ampo_fast.select import RewardTolerance, select_groups, without_unselected
from ampo_fast.stage_files import (
    RowWriter,
    group_from_row,
    raw_rewards,
    read_embeddings,
    read_rows,
    selected_from_row,
    write_rows_atomic,
)
from ampo_fast.trace import Trace
from ampo_fast.types import CandidateGroup, Prompt, Sampling, ScoredGroup, SelectedGroup


class RoundMaker:
    """Makes rounds in order, keeps the newest, and takes from rollouts/ what a stopped run had already made."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        engine: RolloutEngine,
        sampler: PromptSampler,
        reward_fn: RewardFn,
        embedder: Embedder,
        rollout_dir: Path,
        spreads: Sequence[float],
        trace: Trace,
    ) -> None:
        self.config, self.policy, self.engine, self.sampler = config, policy, engine, sampler
        self.reward_fn, self.embedder, self.rollout_dir = reward_fn, embedder, rollout_dir
        self.tolerance = RewardTolerance(config.reward.tol, spreads)
        self.reward_tol = 0.0
        self._spreads_before_newest = list(spreads)
        self._newest: tuple[int, list[SelectedGroup]] | None = None
        self._written: list[SelectedGroup] = []
        self._ahead = Lookahead(trace) if config.max_staleness else None
        self.overlap_metrics: dict[str, float] = {}
        """Of the newest round, where it was sampled ahead: seconds that took, and those that nobody waited for."""

    def selected(self, index: int, step: int, progress: TrainingProgress) -> list[SelectedGroup]:
        """The groups of round `index`; `step` steps are done."""
        if self._newest is not None and self._newest[0] == index:
            return self._newest[1]
        path = self._path(index)
        self._spreads_before_newest = list(self.tolerance.spreads)
        # Left by the run that is being resumed, and equal to what would be sampled again.
        if distributed.on_main(path.exists):
            self._begin_next(index)
            selected = self._select(lambda: self._reload(index), path, progress)
        elif step != self._first_step(index):
            raise ValueError(f"{path} is missing and cannot be sampled again: the policy has moved on since")
        else:
            selected = self._make(index, progress)
        self._newest = index, selected
        return selected

    def _make(self, index: int, progress: TrainingProgress) -> list[SelectedGroup]:
        groups = self._groups(index, progress)
        self._begin_next(index)
        with progress.phase("score"):
            scored = score_groups(groups, self.reward_fn, self.embedder, self.config)
        with progress.phase("gather"):
            parts = distributed.gather(scored)
        selected = self._select(lambda: _in_order(parts, self.sampler.round(index)), self._path(index), progress)
        self._partial(index).unlink(missing_ok=True)  # still there where the ranks share no disk
        return selected

    # --- sampling, here or ahead ----------------------------------------------------------------------------------

    def _groups(self, index: int, progress: TrainingProgress) -> list[CandidateGroup]:
        """This rank's groups of the round: those sampled ahead, or sampled now."""
        self.overlap_metrics = {}
        batches = self._batches(index)
        with progress.phase("generate", total=sum(map(len, batches))):
            self.engine.start()
            if not self.engine.answers_for_all:
                groups = self._answered(index, batches, progress.advance)
            else:
                shares = [[prompt for batch in rank for prompt in batch] for rank in self._rank_batches(index)]
                groups = shared_answers(lambda: self._answered(index, batches, progress.advance), shares)
            self.engine.rest()
        return groups

    def _answered(
        self, index: int, batches: Sequence[Sequence[Prompt]], advance: Callable[[int], None]
    ) -> list[CandidateGroup]:
        """What this rank's engine answers of the round: ahead, or now."""
        made = self._ahead.take(index) if self._ahead is not None else None
        if made is None:
            return self._generate(index, batches, advance)
        hidden_s = max(0.0, made.made_s - made.waited_s)
        self.overlap_metrics = {"overlap/generate_s": made.made_s, "overlap/hidden_s": hidden_s}
        return made.groups

    def _begin_next(self, index: int) -> None:
        """Sets the round after `index` going with the weights that the engine has, unless it is made or the run ends."""
        following = index + 1
        is_last = self._first_step(following) >= self.config.run.steps
        if self._ahead is None or is_last or distributed.on_main(self._path(following).exists):
            return
        self.engine.start()  # on this thread: it checks the engine against the policy, which no other may run
        batches = self._batches(following)
        if batches:  # none where another rank answers for this one
            self._ahead.begin(following, lambda: self._generate(following, batches))

    def wait(self, progress: TrainingProgress) -> None:
        """Returns when no request is in flight, so that weights can be handed over; the wait counts as "generate"."""
        if self._ahead is not None:
            with progress.phase("generate"):
                distributed.on_main(self._ahead.wait)

    def close(self) -> None:
        """Ends the thread that samples ahead; its engine is to be closed before."""
        if self._ahead is not None:
            self._ahead.close()

    # --- selection ------------------------------------------------------------------------------------------------

    def _select(
        self, scored: Callable[[], list[ScoredGroup]], path: Path, progress: TrainingProgress
    ) -> list[SelectedGroup]:
        """Rank 0 selects (milliseconds) and writes the round; the others receive what is trained on, the rest left empty."""

        def select_and_write() -> tuple[float, list[SelectedGroup]]:
            groups = scored()
            self.reward_tol = self.tolerance.update(groups)
            self._written = select_groups(groups, self.config, self.reward_tol)
            write_rows_atomic(path, self._written)
            for leftover in path.parent.glob(f"{path.stem}.partial*.jsonl"):  # also of ranks that there are no more
                leftover.unlink()
            return self.reward_tol, [without_unselected(group) for group in self._written]

        with progress.phase("select"):
            self.reward_tol, selected = distributed.on_main(select_and_write)
        return self._written if distributed.is_main() else selected

    def spreads_before(self, index: int) -> list[float]:
        """The reward spreads seen before round `index` (the newest, or the next one): what a resumed run starts from."""
        is_newest = self._newest is not None and self._newest[0] == index
        return self._spreads_before_newest if is_newest else list(self.tolerance.spreads)

    def read(self, index: int) -> list[SelectedGroup]:
        """The groups of an earlier round as its file holds them, on every rank."""

        def read() -> list[SelectedGroup]:
            path = self._path(index)
            if not path.is_file():
                raise ValueError(f"{path} is missing: rollout.replay draws from every round; use another --run.name")
            rows = read_rows(path)
            embeddings = read_embeddings(path, [len(row["responses"]) for row in rows])
            return [selected_from_row(row, embedding) for row, embedding in zip(rows, embeddings, strict=True)]

        return distributed.on_main(read)

    def _reload(self, index: int) -> list[ScoredGroup]:
        path = self._path(index)
        rows = read_rows(path)
        if [row["id"] for row in rows] != [prompt.id for prompt in self.sampler.round(index)]:
            raise ValueError(f"{path} holds other prompts than this round's; was the data changed since the run began?")
        embeddings = read_embeddings(path, [len(row["responses"]) for row in rows])
        return [
            score_group(group_from_row(row), raw_rewards(row), embedding, self.config)
            for row, embedding in zip(rows, embeddings, strict=True)
        ]

    # --- one round's sampling -------------------------------------------------------------------------------------

    def _first_step(self, index: int) -> int:
        return index * self.config.steps_per_round

    def _path(self, index: int) -> Path:
        return self.rollout_dir / f"step_{self._first_step(index) + 1:06d}.jsonl"

    def _partial(self, index: int) -> Path:
        return self._path(index).with_suffix(f".partial{distributed.rank() or ''}.jsonl")

    def _batches(self, index: int) -> list[list[Prompt]]:
        """The prompts of the round that this rank's engine answers, by the calls that it is asked in."""
        if self.engine.answers_for_all:
            return [self.sampler.round(index)] if distributed.is_main() else []
        return self._rank_batches(index)[distributed.rank()]

    def _rank_batches(self, index: int) -> list[list[list[Prompt]]]:
        """Each rank's prompts of the round, by the batches that are decoded together."""
        rollout, prompts = self.config.rollout, self.sampler.round(index)
        lengths = [len(self.policy.encode_prompt(prompt.messages)) for prompt in prompts]
        ranks = rank_batches(lengths, rollout.n, rollout.batch_rows, rollout.max_new_tokens)
        return [[[prompts[i] for i in batch] for batch in batches] for batches in ranks]

    def _generate(
        self, index: int, batches: Sequence[Sequence[Prompt]], advance: Callable[[int], None] = lambda count: None
    ) -> list[CandidateGroup]:
        """Candidates for this rank's prompts, kept on disk batch by batch so that a killed run repeats at most one batch
        (of an engine that answers for all: nothing that was finished).

        advance is told of prompts as they are answered.
        """
        rollout = self.config.rollout
        sampling = Sampling(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=rollout.max_new_tokens,
            seed=self.config.run.seed,
            step=self._first_step(index),
        )
        mine = [prompt for batch in batches for prompt in batch]
        with RowWriter(self._partial(index)) as writer:
            done = writer.groups(mine)
            for batch in batches:
                missing = [prompt for prompt in batch if prompt.id not in done]
                asked = missing if self.engine.answers_singly or not missing else batch
                advance(len(batch) - len(asked))
                if asked:
                    groups = self._answers(asked, sampling, writer, advance)
                    done |= {group.prompt.id: group for group in groups if group.prompt.id not in done}
        return [done[prompt.id] for prompt in mine]

    def _answers(
        self, prompts: Sequence[Prompt], sampling: Sampling, writer: RowWriter, advance: Callable[[int], None]
    ) -> list[CandidateGroup]:
        """The engine's groups, written down; also those of a batch that it could not finish."""

        def keep(groups: Sequence[CandidateGroup]) -> None:
            writer.write(groups)
            advance(len(groups))

        n = self.config.rollout.n
        if self.engine.answers_for_all:
            return self.engine.generate(prompts, n, sampling, keep=lambda group: keep([group]))
        try:
            groups = self.engine.generate(prompts, n, sampling)
        except IncompleteBatch as failure:
            keep(failure.finished)
            raise
        keep(groups)
        return groups


def _in_order(parts: Sequence[Sequence[ScoredGroup]], prompts: Sequence[Prompt]) -> list[ScoredGroup]:
    """All ranks' groups in the round's order of prompts."""
    by_id = {scored.group.prompt.id: scored for part in parts for scored in part}
    return [by_id[prompt.id] for prompt in prompts]
