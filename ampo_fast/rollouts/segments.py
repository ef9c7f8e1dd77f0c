"""SAPO's pairs: a given answer, and the same answer with one segment cut out and written anew (arXiv 2405.20830).

Nobody judges: the given answer is the better one. The writer is the moving reference where there is one, else the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ampo_fast.random_streams import stream_seed
from ampo_fast.rollouts.decoding import TransformersEngine
from ampo_fast.rollouts.given import DataEngine
from ampo_fast.rollouts.protocol import LocalEngine
from ampo_fast.types import Candidate, CandidateGroup, Prompt, Sampling

GIVEN, REWRITTEN = 1.0, 0.0
"""Rewards of the two candidates of a group, in this order."""


def cut_segment(length: int, tokens: int, seed: int) -> tuple[int, int]:
    """[begin, end) of the segment of an answer of `length` tokens: min(tokens, length) of them from a random place.

    begin is uniform on 0 .. length - 3 - (end - begin), 0 for a shorter answer: as in the released code, the last three
    tokens then stay the answer's own.
    """
    size = min(tokens, length)
    begin = seed % (max(0, length - 3 - size) + 1)
    return begin, begin + size


class SegmentEngine(LocalEngine):
    """A RolloutEngine whose groups are (given answer, the answer with a segment of at most `tokens` tokens written anew).

    The writer shares the trainer's modules: it is handed no weights.
    """

    def __init__(self, given: DataEngine, writer: TransformersEngine, tokens: int) -> None:
        self.given, self.writer, self.tokens = given, writer, tokens

    def _groups(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[CandidateGroup]:
        """Two candidates a prompt, whatever n: a pure function of the writer's weights, prompts and sampling."""
        groups = self.given.generate([_best_alone(prompt) for prompt in prompts], 1, sampling)
        cuts = [self._cut(group, sampling) for group in groups]
        contexts = [
            (*group.prompt_ids, *group.candidates[0].token_ids[:begin])
            for group, (begin, _) in zip(groups, cuts, strict=True)
        ]
        written = self.writer.complete(
            contexts, [prompt.id for prompt in prompts], 1, replace(sampling, max_new_tokens=self.tokens)
        )
        return [
            replace(group, prompt=prompt, candidates=(*group.candidates, self._rewritten(group, cut, rows[0][0])))
            for group, prompt, cut, rows in zip(groups, prompts, cuts, written, strict=True)
        ]

    def _cut(self, group: CandidateGroup, sampling: Sampling) -> tuple[int, int]:
        seed = stream_seed("segment", sampling.seed, sampling.step, group.prompt.id)
        return cut_segment(len(group.candidates[0].token_ids), self.tokens, seed)

    def _rewritten(self, group: CandidateGroup, cut: tuple[int, int], written: Sequence[int]) -> Candidate:
        """The answer's beginning, what was written, and the answer's own end unless what was written ends the turn."""
        given, policy = group.candidates[0].token_ids, self.writer.policy
        begin, end = cut
        new = tuple(written[: end - begin])
        ids = given[:begin] + new + (() if new[-1] in policy.stop_ids else given[end:])
        has_ended = ids[-1] in policy.stop_ids
        return Candidate(
            content=policy.decode(ids[:-1] if has_ended else ids),
            token_ids=ids,
            finish_reason="stop" if has_ended else "length",
            version=self.version,
        )


def _best_alone(prompt: Prompt) -> Prompt:
    """The prompt with the response that is the chosen one, or has the highest reward (ties, and none: the first)."""
    if not prompt.responses:
        return prompt  # the data engine says what is missing

    def rank(i: int) -> tuple[bool, float, int]:
        response = prompt.responses[i]
        return bool(response.is_chosen), -torch.inf if response.reward is None else response.reward, -i

    best = max(range(len(prompt.responses)), key=rank)
    return replace(prompt, responses=(prompt.responses[best],))
