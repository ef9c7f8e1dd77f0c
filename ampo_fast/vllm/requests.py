"""What both vLLM engines ask for, and what an answer must be to count as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ampo_fast.model import Policy
from ampo_fast.random_streams import stream_seed
from ampo_fast.types import Candidate, Sampling

HEAD_IN_FLOAT32 = {"head_dtype": "float32"}
"""hf_overrides of every vLLM that we start: logits of about 20 rounded to bfloat16 would be off by up to 0.06 nats each."""


def computes_prompts_whole() -> bool:
    """Whether a vLLM started here must not compute a prompt in parts: on a CPU it dies of that (0.32), since it rewinds the
    candidate's generator after each part and a CPU's cannot be rewound."""
    return not torch.cuda.is_available()


class BadAnswer(RuntimeError):
    """An engine's answer that cannot be trained on: of the wrong count, length, tokens or log-probs."""


def request_fields(policy: Policy, prompt_id: str, n: int, sampling: Sampling) -> dict[str, Any]:
    """SamplingParams (and completion request) fields for one prompt's n candidates.

    Everything that changes the distribution is stated, since a checkpoint's generation_config.json would fill the rest.
    vLLM seeds child i with seed + i: the hash keeps prompts apart, and 62 bits leave room for the children.
    """
    return {
        "n": n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(policy.stop_ids),
        "ignore_eos": True,  # the stop ids above are all there are: the model's own EOS is among them
        "seed": stream_seed(sampling.seed, sampling.step, prompt_id) >> 1,
        "logprobs": 0,  # of the sampled token alone
    }


def answer_room(prompt_ids: Sequence[int], max_tokens: int, max_model_len: int | None) -> int:
    """Tokens that an answer may have: vLLM cuts without a word where prompt and answer reach max_model_len."""
    return min(max_tokens, max_model_len - len(prompt_ids)) if max_model_len else max_tokens


def read_candidate(
    policy: Policy, token_ids: Sequence[int], logp: Sequence[float], finish_reason: str | None, room: int, version: int
) -> Candidate:
    """A checked candidate; room: answer_room. Raises BadAnswer where tokens, log-probs and finish reason contradict each
    other or what was asked for."""
    wrong = _what_is_wrong(policy, token_ids, logp, finish_reason, room)
    if wrong:
        raise BadAnswer(f"{wrong} (finish_reason {finish_reason!r}, tokens {list(token_ids)[:8]}...)")
    # Six decimals, as the transformers engine: what a rollout file holds is then exactly what training sees.
    return Candidate(
        content=policy.decode(token_ids[:-1] if finish_reason == "stop" else token_ids),
        token_ids=tuple(token_ids),
        logp=tuple(round(value, 6) for value in logp),
        finish_reason=finish_reason,
        version=version,
    )


def checked_logp(logp: Sequence[float]) -> list[float]:
    """The log-probs as they are. Raises BadAnswer where one is none."""
    if not _are_logp(logp):
        raise BadAnswer(f"log-probs that are none ({list(logp)[:8]}...)")
    return list(logp)


def _are_logp(logp: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) and value <= 1e-4 for value in logp)


def _what_is_wrong(
    policy: Policy, token_ids: Sequence[int], logp: Sequence[float], finish_reason: str | None, room: int
) -> str | None:
    if finish_reason not in ("stop", "length"):
        return "the completion was broken off"
    if not token_ids or len(logp) != len(token_ids):
        return f"{len(token_ids)} tokens with {len(logp)} log-probs"
    if len(token_ids) > room or (finish_reason == "length" and len(token_ids) < room):
        return f"{len(token_ids)} tokens where the limit is {room}"
    vocab = policy.head.weight.shape[0]
    if not all(isinstance(token, int) and 0 <= token < vocab for token in token_ids):
        return f"token ids outside the vocabulary of {vocab}"
    if not _are_logp(logp):
        return "log-probs that are none"
    stops = [token in policy.stop_ids for token in token_ids]
    if any(stops[:-1]) or stops[-1] != (finish_reason == "stop"):
        return "the end-of-turn token is not where the completion ends"
    return None
