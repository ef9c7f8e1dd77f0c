"""A round whose engine breaks off: what was answered is on disk and is not asked for again."""

import pytest
from builders import config, prompt

from ampo_fast.embeddings import make_embedder
from ampo_fast.progress import TrainingProgress
from ampo_fast.rewards import make_reward
from ampo_fast.rollouts import IncompleteBatch, TransformersEngine
from ampo_fast.rounds import RoundMaker
from ampo_fast.sampler import PromptSampler
from ampo_fast.stage_files import read_rows
from ampo_fast.trace import Trace

PROMPTS = [prompt(i, f"say {word}") for i, word in enumerate(["tea", "sun", "rain", "wind"])]


class BreakingEngine(TransformersEngine):
    """Answers one prompt at a time, as a server does, and breaks off after `whole` prompts, once."""

    answers_singly = True

    def __init__(self, policy, whole):
        super().__init__(policy, 64)
        self.whole, self.asked = whole, []

    def generate(self, prompts, n, sampling):
        self.asked.append([prompt.id for prompt in prompts])
        groups = [group for prompt in prompts for group in super(BreakingEngine, self).generate([prompt], n, sampling)]
        if self.whole is None:
            return groups
        finished, self.whole = groups[: self.whole], None
        raise IncompleteBatch("the server is gone", finished)


def rounds(engine, policy, folder):
    settings = config(
        rollout={"n": 4, "max_new_tokens": 6, "prompts_per_round": 4, "truncated": "keep"},
        optim={"prompts_per_step": 4}, reward={"kind": "toy_rewards:vowels"}, embed={"model": "policy"},
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    embedder = make_embedder(settings, policy)
    sampler = PromptSampler(PROMPTS, 4, 0)
    return RoundMaker(
        settings, policy, engine, sampler, make_reward(settings, embedder), embedder, folder, [], Trace(None)
    )


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_finished_groups_of_a_broken_batch_are_kept_and_not_made_again(tiny_policy, tmp_path, whole):
    engine = BreakingEngine(tiny_policy, whole)
    with TrainingProgress(1, 0) as progress:
        with pytest.raises(IncompleteBatch, match="gone"):
            rounds(engine, tiny_policy, tmp_path / "r").selected(0, 0, progress)
        partial = tmp_path / "r" / "step_000001.partial.jsonl"
        kept = [row["id"] for row in read_rows(partial)] if partial.stat().st_size else []
        assert len(kept) == whole
        selected = rounds(engine, tiny_policy, tmp_path / "r").selected(0, 0, progress)
        undisturbed = BreakingEngine(tiny_policy, None)
        expected = rounds(undisturbed, tiny_policy, tmp_path / "other").selected(0, 0, progress)
    first, second = engine.asked
    assert sorted(first) == sorted([*kept, *second])
    assert len(second) == 4 - whole
    assert [s.scored.group for s in selected] == [s.scored.group for s in expected]
