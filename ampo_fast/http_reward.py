"""A reward served over HTTP: batches, retries, bounded waits; the key comes from the environment.

One call: POST {"prompts": [[{"role", "content"}, ...], ...], "responses": ["...", ...]} -> {"rewards": [0.3, null, ...]},
one number (or null: no reward) for each response, in order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ampo_fast.engine_config import HttpConfig
from ampo_fast.http_client import HttpError, JsonClient, retried
from ampo_fast.jsonl import is_number_or_null
from ampo_fast.types import Prompt


class HttpScorer:
    """Scores responses at a URL. Raises HttpError where a batch still fails after reward.options.attempts calls."""

    def __init__(self, url: str, config: HttpConfig) -> None:
        self.client = JsonClient(url, os.environ.get(config.key_env), config.timeout_s)
        self.config = config

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        size = self.config.batch
        starts = range(0, len(responses), size)
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            parts = list(pool.map(lambda at: self._batch(prompts[at : at + size], responses[at : at + size]), starts))
        return [reward for part in parts for reward in part]

    def _batch(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        body = {"prompts": [list(prompt.messages) for prompt in prompts], "responses": list(responses)}
        return retried(lambda: _rewards(self.client.post("", body), len(responses)), self.config.attempts)


def _rewards(answer: object, count: int) -> list[float | None]:
    """The answer's rewards. Anything but `count` numbers or nulls is a failed call."""
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list) or len(rewards) != count or not all(map(is_number_or_null, rewards)):
        shown = f"{len(rewards)} rewards" if isinstance(rewards, list) else repr(answer)[:200]
        raise HttpError(f'the scorer must answer {{"rewards": [{count} numbers or nulls]}}, it sent {shown}', True)
    return rewards
