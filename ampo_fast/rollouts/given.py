"""rollout.engine = "data": the responses that came with the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from ampo_fast.model import Policy
from ampo_fast.rollouts.protocol import LocalEngine
from ampo_fast.types import Candidate, CandidateGroup, Prompt, Sampling


class DataEngine(LocalEngine):
    """Offline: the candidates are the responses that came with the data, tokenised once."""

    answers_singly = True

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def _groups(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[CandidateGroup]:
        return [self._group(prompt, sampling.max_new_tokens) for prompt in prompts]

    def _group(self, prompt: Prompt, max_new_tokens: int) -> CandidateGroup:
        if not prompt.responses:
            raise ValueError(f'prompt {prompt.id} has no responses: rollout.engine = "data" needs multi-response data')
        candidates = []
        for response in prompt.responses:
            ids = self.policy.encode_response(response.content)
            ids = ids[:-1] if response.finish_reason == "length" else ids  # it did not end
            reason = "length" if len(ids) > max_new_tokens else response.finish_reason
            candidates.append(Candidate(content=response.content, token_ids=ids[:max_new_tokens], finish_reason=reason))
        prompt_ids = self.policy.encode_prompt(prompt.messages)
        return CandidateGroup(prompt=prompt, prompt_ids=prompt_ids, candidates=tuple(candidates))
