"""A round's groups: sampled, scored, selected and written to rollouts/ once, then trained on step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ampo_fast import distributed
from ampo_fast.config import Config
from ampo_fast.embeddings import Embedder
from ampo_fast.model import Policy
from ampo_fast.progress import TrainingProgress
from ampo_fast.rewards import RewardFn, score_group, score_groups
from ampo_fast.rollouts import IncompleteBatch, RolloutEngine, rank_batches
from ampo_fast.sampler import PromptSampler
from ampo_fast.select import RewardTolerance, select_groups, without_unselected
from ampo_fast.stage_files import RowWriter, group_from_row, raw_rewards, read_embeddings, read_rows, write_rows_atomic
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
    ) -> None:
        self.config, self.policy, self.engine, self.sampler = config, policy, engine, sampler
        self.reward_fn, self.embedder, self.rollout_dir = reward_fn, embedder, rollout_dir
        self.tolerance = RewardTolerance(config.reward.tol, spreads)
        self.reward_tol = 0.0
        self._spreads_before_newest = list(spreads)
        self._newest: tuple[int, list[SelectedGroup]] | None = None
        self._written: list[SelectedGroup] = []

    def selected(self, index: int, first_step: int, step: int, progress: TrainingProgress) -> list[SelectedGroup]:
        """The groups of round `index`, whose first step is `first_step`; `step` steps are done."""
        if self._newest is not None and self._newest[0] == index:
            return self._newest[1]
        prompts = self.sampler.round(index)
        path = self.rollout_dir / f"step_{first_step + 1:06d}.jsonl"
        self._spreads_before_newest = list(self.tolerance.spreads)
        # Left by the run that is being resumed, and equal to what would be sampled again.
        if distributed.on_main(path.exists):
            selected = self._select(lambda: self._reload(path, prompts), path, progress)
        elif step != first_step:
            raise ValueError(f"{path} is missing and cannot be sampled again: the policy has moved on since")
        else:
            own = _partial(path, distributed.rank())
            groups = self._generate(prompts, first_step, own, progress)
            with progress.phase("score"):
                scored = score_groups(groups, self.reward_fn, self.embedder, self.config)
            with progress.phase("gather"):
                parts = distributed.gather(scored)
            selected = self._select(lambda: _in_order(parts, prompts), path, progress)
            own.unlink(missing_ok=True)  # still there where the ranks share no disk
        self._newest = index, selected
        return selected

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

    def _reload(self, path: Path, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        rows = read_rows(path)
        if [row["id"] for row in rows] != [prompt.id for prompt in prompts]:
            raise ValueError(f"{path} holds other prompts than this round's; was the data changed since the run began?")
        embeddings = read_embeddings(path, [len(row["responses"]) for row in rows])
        return [
            score_group(group_from_row(row), raw_rewards(row), embedding, self.config)
            for row, embedding in zip(rows, embeddings, strict=True)
        ]

    def _generate(
        self, prompts: Sequence[Prompt], first_step: int, path: Path, progress: TrainingProgress
    ) -> list[CandidateGroup]:
        """Candidates for this rank's prompts, kept on disk batch by batch so that a killed run repeats at most one batch."""
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
        batches = rank_batches(lengths, rollout.n, rollout.batch_rows, rollout.max_new_tokens)
        mine = [prompts[i] for batch in batches for i in batch]
        with progress.phase("generate", total=len(mine)), RowWriter(path) as writer:
            done = writer.groups(mine)
            for batch in batches:
                todo = [prompts[i] for i in batch]
                missing = [prompt for prompt in todo if prompt.id not in done]
                if missing:
                    groups = self._answers(missing if self.engine.answers_singly else todo, sampling, writer)
                    done |= {group.prompt.id: group for group in groups}
                progress.advance(len(batch))
        return [done[prompt.id] for prompt in mine]

    def _answers(self, prompts: Sequence[Prompt], sampling: Sampling, writer: RowWriter) -> list[CandidateGroup]:
        """The engine's groups, written down; also those of a batch that it could not finish."""
        try:
            groups = self.engine.generate(prompts, self.config.rollout.n, sampling)
        except IncompleteBatch as failure:
            writer.write(failure.finished)
            raise
        writer.write(groups)
        return groups


def _in_order(parts: Sequence[Sequence[ScoredGroup]], prompts: Sequence[Prompt]) -> list[ScoredGroup]:
    """All ranks' groups in the round's order of prompts."""
    by_id = {scored.group.prompt.id: scored for part in parts for scored in part}
    return [by_id[prompt.id] for prompt in prompts]


def _partial(path: Path, rank: int) -> Path:
    return path.with_suffix(f".partial{rank or ''}.jsonl")
