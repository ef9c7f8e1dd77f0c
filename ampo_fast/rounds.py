"""A round's groups: sampled, scored, selected and written to rollouts/ once, then trained on step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ampo_fast.config import Config
from ampo_fast.embeddings import Embedder
from ampo_fast.model import Policy
from ampo_fast.progress import TrainingProgress
from ampo_fast.rewards import RewardFn, score_group, score_groups
from ampo_fast.rollouts import IncompleteBatch, RolloutEngine, generation_batches
from ampo_fast.sampler import PromptSampler
from ampo_fast.select import RewardTolerance, select_groups
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

    def selected(self, index: int, first_step: int, step: int, progress: TrainingProgress) -> list[SelectedGroup]:
        """The groups of round `index`, whose first step is `first_step`; `step` steps are done."""
        if self._newest is not None and self._newest[0] == index:
            return self._newest[1]
        prompts = self.sampler.round(index)
        path = self.rollout_dir / f"step_{first_step + 1:06d}.jsonl"
        self._spreads_before_newest = list(self.tolerance.spreads)
        if path.exists():  # left by the run that is being resumed, and equal to what would be sampled again
            scored = self._reload(path, prompts)
        elif step != first_step:
            raise ValueError(f"{path} is missing and cannot be sampled again: the policy has moved on since")
        else:
            groups = self._generate(prompts, first_step, path, progress)
            with progress.phase("score"):
                scored = score_groups(groups, self.reward_fn, self.embedder, self.config)
        with progress.phase("select"):
            self.reward_tol = self.tolerance.update(scored)
            selected = select_groups(scored, self.config, self.reward_tol)
        write_rows_atomic(path, selected)
        _partial(path).unlink(missing_ok=True)
        self._newest = index, selected
        return selected

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
        with progress.phase("generate", total=len(prompts)), RowWriter(_partial(path)) as writer:
            done = writer.groups(prompts)
            for batch in batches:
                todo = [prompts[i] for i in batch]
                missing = [prompt for prompt in todo if prompt.id not in done]
                if missing:
                    groups = self._answers(missing if self.engine.answers_singly else todo, sampling, writer)
                    done |= {group.prompt.id: group for group in groups}
                progress.advance(len(batch))
        return [done[prompt.id] for prompt in prompts]

    def _answers(self, prompts: Sequence[Prompt], sampling: Sampling, writer: RowWriter) -> list[CandidateGroup]:
        """The engine's groups, written down; also those of a batch that it could not finish."""
        try:
            groups = self.engine.generate(prompts, self.config.rollout.n, sampling)
        except IncompleteBatch as failure:
            writer.write(failure.finished)
            raise
        writer.write(groups)
        return groups


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial.jsonl")
