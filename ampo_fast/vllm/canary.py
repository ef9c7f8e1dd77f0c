"""Does the engine sample from the weights that we train? Log-probs of a fixed prompt, trainer against engine.

Two looks after every sync. A fixed response is scored: the same tokens each time, so that a version can be compared with
the one before. And a few tokens are sampled after the fixed prompt: that way lead the keys and values of the prompt, which
the engine caches and must have forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ampo_fast.evaluation import response_logp
from ampo_fast.model import Policy
from ampo_fast.types import Candidate, CandidateGroup, Prompt, Sampling

log = logging.getLogger(__name__)

NUM_SAMPLES = 2
SAMPLING = Sampling(max_new_tokens=16)
_TEXT = (
    "A ship sails north from a quiet harbour at dawn. The captain counts the crew, the cook counts the bread, and the boy "
    "at the mast counts the gulls. By noon the wind has turned, the sea is grey, and nobody counts any longer. "
)
_MIN_PROMPT_TOKENS = 160
"""Over a cache block of any backend (16 to 128 tokens): a shorter prompt would never be served from the cache."""
_ANSWER = (
    "They reach the island in the evening, tired and glad. The captain pays for supper, the cook falls asleep by the fire, "
    "and the boy walks down to the beach to look at the ship once more. Nobody has told him yet that they will stay for the "
    "winter, but he sees it in the way the sails were folded."
)
_ANSWER_TOKENS = 64
"""Enough for a steady mean, and no more where a tokenizer knows no words."""
NOTABLE_GAP = 0.05
"""Nats a token: what only half precision explains."""


class SyncError(ValueError):
    """The engine does not sample from the trainer's weights."""


class Canary:
    """Compares each replica of an engine with the trainer; `metrics` holds the newest comparison, in nats a token."""

    def __init__(self, policy: Policy, tolerance: float) -> None:
        self.policy, self.tolerance = policy, tolerance
        self.prompt, self.prompt_ids = _fixed_prompt(policy)
        self.response_ids = policy.encode_response(_ANSWER)[:_ANSWER_TOKENS]
        self.metrics: dict[str, float] = {}
        self._trainer: torch.Tensor | None = None
        self._trainer_change = 0.0
        self._engine: dict[str, torch.Tensor] = {}
        self._engine_before: dict[str, torch.Tensor] = {}

    def check_room(self, max_model_len: int | None, name: str) -> None:
        """Raises ValueError where a model that takes max_model_len tokens (None, 0: any number) cannot answer the canary."""
        need = len(self.prompt_ids) + max(len(self.response_ids) + 1, SAMPLING.max_new_tokens)
        if max_model_len and max_model_len < need:
            raise ValueError(
                f"{name} = {max_model_len}: the check of the weights after each sync takes {need} tokens; "
                f"set it to {need} or more"
            )

    def renew(self) -> None:
        """Takes the trainer's log-probs of the fixed response; to be called when the weights have changed."""
        fixed = Candidate(content="", token_ids=self.response_ids)
        logp_R = self._logp([fixed])
        self._trainer_change = _mean_gap(logp_R, self._trainer) if self._trainer is not None else 0.0
        self._trainer = logp_R
        self._engine_before = dict(self._engine)
        self.metrics = {}

    def check(self, name: str, fixed_logp: Sequence[float], samples: Sequence[Candidate] = ()) -> None:
        """Raises SyncError, with both values, where replica `name` differs by more than the tolerance or did not change."""
        trainer_R = self._logp(samples) if samples else None  # first: of a sharded policy it is a forward of all ranks
        engine_R = torch.tensor(fixed_logp, dtype=torch.float32)
        self._compare(name, "a fixed response", engine_R, self._trainer)
        before = self._engine_before.get(name)
        change = _mean_gap(engine_R, before) if before is not None else 0.0
        # A stale engine stays within the tolerance for many small steps: but then it does not change at all.
        if before is not None and change == 0.0 and self._trainer_change > min(self.tolerance, NOTABLE_GAP) / 10:
            raise SyncError(
                f"{name}: the sync left the engine's log-probs as they were, the trainer's moved by "
                f"{self._trainer_change:.3g} nats a token: the weights did not arrive"
            )
        self._engine[name] = engine_R
        self._worst("sync/logp_change", change)
        if trainer_R is not None:
            sampled_R = torch.tensor([value for candidate in samples for value in candidate.logp])
            self._compare(name, "its own samples", sampled_R, trainer_R)

    def is_as_checked(self, name: str, fixed_logp: Sequence[float]) -> bool:
        """Whether replica `name` still scores as it did at its check: no more than what else it computes can move that."""
        return _mean_gap(torch.tensor(fixed_logp, dtype=torch.float32), self._engine[name]) <= self.tolerance / 3

    def _compare(self, name: str, what: str, engine_R: torch.Tensor, trainer_R: torch.Tensor) -> None:
        gap = _mean_gap(engine_R, trainer_R)
        self._worst("sync/logp_difference", gap)
        if not gap <= self.tolerance:
            raise SyncError(
                f"{name}: log-probs of {what} after a fixed prompt differ by {gap:.4g} nats a token on average, more than "
                f"{self.tolerance:g} (rollout.options.canary_tol): engine {_shown(engine_R)}, trainer {_shown(trainer_R)}. "
                "Either the engine serves another model or dtype, or the sync failed"
            )
        level = logging.WARNING if gap >= NOTABLE_GAP else logging.INFO
        log.log(level, "%s: engine and trainer differ by %.2g nats a token on %s", name, gap, what)

    def _logp(self, candidates: Sequence[Candidate]) -> torch.Tensor:
        group = CandidateGroup(prompt=self.prompt, prompt_ids=self.prompt_ids, candidates=tuple(candidates))
        return response_logp(self.policy, [group], max_tokens=1)

    def _worst(self, key: str, value: float) -> None:
        self.metrics[key] = max(value, self.metrics.get(key, 0.0))


def default_tolerance(policy: Policy, dtype: str) -> float:
    """Nats a token: what the trainer and a right engine that computes in dtype may differ by.

    In half precision most of it is the engine's: SmolLM2 itself, its activations kept in bfloat16, is 0.040 to 0.054 from
    float32 on a fixed text, 0.004 to 0.006 in float16, and 0.013 to 0.026 under autocast to bfloat16. The limit is three
    times the most; a tied head left stale was 0.15 to 0.5 off. On CUDA vLLM's attention uses TF32 for float32: about 0.0025.
    """
    if policy.compute_dtype != torch.float32 or dtype != "float32":
        return 0.15
    return 0.01 if policy.device.type == "cuda" else 0.001


def _fixed_prompt(policy: Policy) -> tuple[Prompt, tuple[int, ...]]:
    text, ids = _TEXT, ()
    while len(ids) < _MIN_PROMPT_TOKENS:
        prompt = Prompt(id="canary", messages=({"role": "user", "content": text},))
        ids = policy.encode_prompt(prompt.messages)
        text += _TEXT
    return prompt, ids


def _mean_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().mean().item() if len(a) == len(b) else float("inf")


def _shown(logp_R: torch.Tensor) -> str:
    head = ", ".join(f"{value:.4f}" for value in logp_R[:4].tolist())
    return f"mean {logp_R.mean().item():.4f} ({head}, ...)"
