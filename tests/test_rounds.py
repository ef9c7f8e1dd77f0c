"""A round whose engine breaks off: what was answered is on disk and is not asked for again."""

import pytest
from builders import config, prompt

from ampo_fast.embeddings import make_embedder
from ampo_fast.progress import TrainingProgress
from ampo_fast.rewards import make_reward
from ampo_fast.rollouts.decoding import TransformersEngine
from ampo_fast.rollouts.protocol import IncompleteBatch
from ampo_fast.rollouts.rounds import RoundMaker
from ampo_fast.sampler import PromptSampler
from ampo_fast.stage_files import read_rows
from ampo_fast.trace import Trace

PROMPTS = [prompt(i, f"say {word}") for i, word in enumerate(["tea", "sun", "rain", "wind"])]


class ServedEngine(TransformersEngine):
    """Answers one prompt at a time and breaks off after `whole` prompts, once, as the engine of vLLM's servers does."""

    answers_singly = answers_for_all = True

    def __init__(self, policy, whole):
        super().__init__(policy, 64)
        self.whole, self.asked = whole, []

    def generate(self, prompts, n, sampling, keep=None):
        self.asked.append([prompt.id for prompt in prompts])
        whole, self.whole = self.whole, None
        groups = []
        for one in prompts[:whole]:
            groups += super().generate([one], n, sampling, keep)
        if whole is None:
            return groups
        raise IncompleteBatch("the server is gone")


def rounds(engine, policy, folder, reward_fn=None):
    settings = config(
        rollout={"n": 4, "max_new_tokens": 6, "prompts_per_round": 4, "truncated": "keep"},
        optim={"prompts_per_step": 4}, reward={"kind": "toy_rewards:vowels"}, embed={"model": "policy"},
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    embedder = make_embedder(settings, policy)
    sampler = PromptSampler(PROMPTS, 4, 0)
    reward_fn = reward_fn or make_reward(settings, embedder)
    return RoundMaker(settings, policy, engine, sampler, reward_fn, embedder, folder, [], Trace(None))


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_finished_groups_of_a_broken_batch_are_kept_and_not_made_again(tiny_policy, tmp_path, whole):
    engine = ServedEngine(tiny_policy, whole)
    with TrainingProgress(1, 0) as progress:
        with pytest.raises(IncompleteBatch, match="gone"):
            rounds(engine, tiny_policy, tmp_path / "r").selected(0, 0, progress)
        partial = tmp_path / "r" / "step_000001.partial.jsonl"
        kept = [row["id"] for row in read_rows(partial)] if partial.stat().st_size else []
        assert len(kept) == whole
        selected = rounds(engine, tiny_policy, tmp_path / "r").selected(0, 0, progress)
        undisturbed = ServedEngine(tiny_policy, None)
        expected = rounds(undisturbed, tiny_policy, tmp_path / "other").selected(0, 0, progress)
    first, second = engine.asked
    assert sorted(first) == sorted([*kept, *second])
    assert len(second) == 4 - whole
    assert [s.scored.group for s in selected] == [s.scored.group for s in expected]


def test_a_batch_that_is_on_disk_in_part_is_decoded_whole_and_written_once(tiny_policy, tmp_path):
    """As a kill within the writing leaves it, of an engine whose answers depend on the batch."""

    def broken(groups):
        raise KeyboardInterrupt

    def interrupted():
        with TrainingProgress(1, 0) as progress, pytest.raises(KeyboardInterrupt):
            rounds(TransformersEngine(tiny_policy, 64), tiny_policy, tmp_path, broken).selected(0, 0, progress)
        return partial.read_bytes()

    partial = tmp_path / "step_000001.partial.jsonl"
    whole = interrupted()
    partial.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert interrupted() == whole
