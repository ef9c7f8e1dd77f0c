"""rollout.engine = "transformers": sampling in this process, with keys and values of its own.

Shapes: A rows decoded together (active candidates), P prompt tokens, V vocab.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ampo_fast import unshared
from ampo_fast.dispatch import on_device
from ampo_fast.model import Policy
from ampo_fast.packing import pack_responses
from ampo_fast.random_streams import stream_seed
from ampo_fast.rollouts.batches import generation_batches
from ampo_fast.rollouts.few_rows import fast_few_rows
from ampo_fast.rollouts.held_casts import held_casts
from ampo_fast.rollouts.protocol import LocalEngine
from ampo_fast.rollouts.sampling import sample_tokens
from ampo_fast.types import Candidate, CandidateGroup, Prompt, Sampling

_CHECKED_LENGTHS = (9, 4)
"""Tokens of the two prompts of a check: few, for its time, and of two lengths, so that one is padded."""
_MAX_GAP, _MAX_GAP_HALF = 0.01, 0.3
"""Nats: what a decoded token's log-probs may be off by, on average over the vocabulary, with parameters in float32 (where
rounding makes 1e-5) and in half precision (a replica beside a sharded policy)."""
_NAN_LOGITS = (
    "the policy's logits are NaN: its weights are not finite (metrics.jsonl shows since which step), or its activations leave "
    "the range of model.dtype"
)


class TransformersEngine(LocalEngine):
    """Samples in this process: no server, and bit-for-bit repeatable on a CPU. With one rank the policy is the trainer's
    own module; with more, a replica that load_weights refreshes.

    The prompt is prefilled once and its keys and values repeated for the candidates. Candidate i of a prompt draws its
    uniforms from a generator keyed by (seed, step, prompt id, i), so batching and resuming change no stream.
    """

    def __init__(self, policy: Policy, batch_rows: int | None) -> None:
        self.policy = policy
        self.batch_rows = batch_rows

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = self.policy.model.state_dict()
        for name, tensor in named_tensors:
            if own[name].data_ptr() != tensor.data_ptr():  # else it is the trainer's own module, already up to date
                own[name].copy_(tensor)
        self.version = version

    def _groups(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[CandidateGroup]:
        encoded = [self.policy.encode_prompt(prompt.messages) for prompt in prompts]
        completed = self.complete(encoded, [prompt.id for prompt in prompts], n, sampling)
        return [
            CandidateGroup(prompt=prompt, prompt_ids=ids, candidates=tuple(self._candidate(*row) for row in rows))
            for prompt, ids, rows in zip(prompts, encoded, completed, strict=True)
        ]

    def why_it_cannot_decode(self) -> str | None:
        """What is wrong with two tokens after two short prompts, against a plain forward; None: nothing.

        Some layers know no keys and values that another writes, or let what pads a prompt into their state.
        """
        try:
            gap = self._decoding_gap()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code meets there
            return f"{type(error).__name__}: {error}"
        allowed = _MAX_GAP if self._is_exact else _MAX_GAP_HALF
        return None if gap <= allowed else f"its log-probs are {gap:.2g} nats from those of a plain forward"

    @property
    def _is_exact(self) -> bool:
        return self.policy.head.weight.dtype == torch.float32

    @torch.no_grad()
    def _decoding_gap(self) -> float:
        """Mean |log-prob decoded - plain| over the vocabulary by the plain probabilities, of the worst token.

        Of parameters in float32 without autocast, whose rounding would hide a small mistake.
        """
        policy = self.policy
        prompt = Prompt(id="", messages=({"role": "user", "content": "What is the capital of France?"},))
        whole = policy.encode_prompt(prompt.messages)
        prompts, answer = [whole[-length:] for length in _CHECKED_LENGTHS], Candidate(content="", token_ids=whole[:2])
        groups = [CandidateGroup(prompt=prompt, prompt_ids=ids, candidates=(answer,)) for ids in prompts]
        batch = pack_responses(groups, [(0,)] * 2, policy.device)
        with contextlib.nullcontext() if self._is_exact else policy.autocast():
            state = _Decoding.prefill(policy, prompts, 1, 2)
            first_AV = state.logits_AV
            state.advance(on_device(torch.tensor(answer.token_ids[:1] * 2), policy.device))
            hidden_RD = unshared.hidden_rows(policy.model, batch, is_sharded=False, max_padded=2.0)
            plain_RV = policy.logits(hidden_RD).log_softmax(-1)
        decoded_RV = torch.stack((first_AV, state.logits_AV), dim=1).flatten(0, 1).log_softmax(-1)
        return ((decoded_RV - plain_RV).abs() * plain_RV.exp()).sum(-1).max().item()

    @torch.no_grad()
    def complete(
        self, contexts: Sequence[Sequence[int]], keys: Sequence[str], n: int, sampling: Sampling
    ) -> list[list[tuple[list[int], list[float]]]]:
        """n continuations of each context, (token ids, their log-probs) each; its key names its random streams."""
        completed: list[list[tuple[list[int], list[float]]]] = [[] for _ in contexts]
        for batch in generation_batches([len(ids) for ids in contexts], n, self.batch_rows):
            uniform_AL = torch.stack([u for i in batch for u in _uniforms(keys[i], n, sampling)])
            with self.policy.autocast(), self._fast_layers(), _named_out_of_memory(len(uniform_AL)):
                rows = self._decode([contexts[i] for i in batch], n, uniform_AL, sampling)
            for at, i in enumerate(batch):
                completed[i] = rows[at * n : (at + 1) * n]
        return completed

    def _fast_layers(self) -> contextlib.AbstractContextManager:
        policy = self.policy
        if policy.compute_dtype != torch.float32:
            return held_casts(policy.model, policy.compute_dtype)
        return fast_few_rows(policy.model) if policy.device.type == "cpu" else contextlib.nullcontext()

    def _candidate(self, ids: list[int], logp: list[float]) -> Candidate:
        stopped = ids[-1] in self.policy.stop_ids
        # Six decimals, rounded here once: what a rollout file holds is then exactly what training sees.
        return Candidate(
            content=self.policy.decode(ids[:-1] if stopped else ids),
            token_ids=tuple(ids),
            logp=tuple(round(value, 6) for value in logp),
            finish_reason="stop" if stopped else "length",
            version=self.version,
        )

    def _decode(
        self, prompts: Sequence[Sequence[int]], n: int, uniform_AL: torch.Tensor, sampling: Sampling
    ) -> list[tuple[list[int], list[float]]]:
        """Prefill each prompt once, then decode all rows; finished rows leave the batch when a quarter has finished."""
        state = _Decoding.prefill(self.policy, prompts, n, sampling.max_new_tokens)
        rows: list[tuple[list[int], list[float]]] = [([], []) for _ in range(len(prompts) * n)]
        alive = list(range(len(rows)))  # state row -> candidate row
        finished: set[int] = set()
        for step in range(sampling.max_new_tokens):
            token_A, logp_A = sample_tokens(state.logits_AV, uniform_AL[alive, step], sampling)
            for row, token, logp in zip(alive, token_A.tolist(), logp_A.tolist(), strict=True):
                if row not in finished:
                    if math.isnan(logp):
                        raise ValueError(_NAN_LOGITS)
                    rows[row][0].append(token)
                    rows[row][1].append(logp)
                    if token in self.policy.stop_ids:
                        finished.add(row)
            running = [a for a, row in enumerate(alive) if row not in finished]
            if not running or step + 1 == sampling.max_new_tokens:
                return rows
            if len(running) <= 0.75 * len(alive):
                state.keep(running)
                token_A = token_A[running]
                alive = [alive[a] for a in running]
            state.advance(token_A)
        return rows


@contextlib.contextmanager
def _named_out_of_memory(num_rows: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"out of memory while {num_rows} candidates were decoded together; set rollout.batch_rows to less than that "
            f"(--resume auto takes it), or lower rollout.max_new_tokens ({str(error).splitlines()[0]})"
        ) from error


def _uniforms(prompt_id: str, n: int, sampling: Sampling) -> Iterator[torch.Tensor]:
    for i in range(n):
        generator = torch.Generator().manual_seed(stream_seed(sampling.seed, sampling.step, prompt_id, i))
        yield torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)


class _Decoding:
    """The decoding state of the active rows: logits for the next token, keys and values, padding, positions."""

    def __init__(self, policy: Policy, cache, padding_A: torch.Tensor, position_A: torch.Tensor) -> None:
        self.policy = policy
        self.cache, self.cache_keyword = cache, _cache_keyword(policy)
        self.padding_A = padding_A  # left padding of each row's prompt
        self.is_padded = bool(padding_A.any())  # asked of the device when rows change, not at every token
        self.position_A = position_A  # position of the next token
        self.logits_AV = torch.empty(0)

    @classmethod
    def prefill(cls, policy: Policy, prompts: Sequence[Sequence[int]], n: int, max_new_tokens: int) -> _Decoding:
        device = policy.device
        lengths = [len(ids) for ids in prompts]
        longest = max(lengths)
        length_A = on_device(torch.tensor(lengths), device)
        padding_A = longest - length_A
        token_AP = on_device(torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts]), device)
        state = cls(policy, _new_cache(longest + max_new_tokens), padding_A, length_A)
        key_P = torch.arange(longest, device=device)
        position_AP = (key_P - padding_A[:, None]).clamp(min=0)
        mask = None
        if state.is_padded:
            visible = key_P[None, None, :] >= padding_A[:, None, None]
            # A padding row attends to itself: a row with nothing visible would be NaN.
            own = torch.eye(longest, dtype=torch.bool, device=device)
            mask = _layer_masks(policy, visible & (key_P[:, None] >= key_P) | own, key_P)
        state._forward(token_AP, position_AP, mask)
        state.keep([a for a in range(len(prompts)) for _ in range(n)])
        state.logits_AV = state.logits_AV.repeat_interleave(n, dim=0)
        return state

    def keep(self, rows: list[int]) -> None:
        """Selects (and may repeat) rows of the keys and values, padding and positions."""
        index = on_device(torch.tensor(rows), self.policy.device)
        self.cache.batch_select_indices(index)
        self.padding_A, self.position_A = self.padding_A[index], self.position_A[index]
        self.is_padded = bool(self.padding_A.any())

    def advance(self, token_A: torch.Tensor) -> None:
        mask = None
        if self.is_padded:
            key_P = torch.arange(self.cache.get_seq_length() + 1, device=token_A.device)
            mask = _layer_masks(self.policy, (key_P >= self.padding_A[:, None])[:, None], key_P[-1:])
        self._forward(token_A[:, None], self.position_A[:, None], mask)
        self.position_A = self.position_A + 1

    def _forward(self, token_AL: torch.Tensor, position_AL: torch.Tensor, mask: Any) -> None:
        hidden = self.policy.model.base_model(
            input_ids=token_AL,
            position_ids=position_AL,
            attention_mask=mask,
            use_cache=True,
            **{self.cache_keyword: self.cache},
        ).last_hidden_state[:, -1]
        self.logits_AV = self.policy.logits(hidden)


def _cache_keyword(policy: Policy) -> str:
    """transformers 5.24 renamed it; a model of somebody's own may keep the older name."""
    parameters = inspect.signature(policy.model.base_model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _layer_masks(policy: Policy, visible_ALP: torch.Tensor, position_L: torch.Tensor) -> Any:
    """What transformers takes as attention_mask: masks [A, 1, L, P], by type of layer where a model has several types.

    position_L: each query's place among the P keys. transformers leaves a mask of four dimensions as it is, so a
    sliding window must be in it.
    """
    config = policy.model.config.get_text_config()
    visible = visible_ALP[:, None]
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window:  # None, or 0 where it is switched off
        return _as_attention_takes(visible, config)
    near = torch.arange(visible.shape[-1], device=visible.device) > position_L[:, None] - window
    sliding = _as_attention_takes(visible & near, config)
    return {"full_attention": _as_attention_takes(visible, config), "sliding_attention": sliding} if types else sliding


def _as_attention_takes(visible: torch.Tensor, config: Any) -> torch.Tensor:
    """The plain operations of a soft-capped model add their mask to the scores; torch's kernel takes it as it is."""
    if config._attn_implementation != "eager":
        return visible
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, torch.finfo(torch.float32).min)


def _new_cache(capacity: int):
    """A transformers cache whose keys and values are written in place: DynamicCache copies them all at every token."""
    from transformers.cache_utils import Cache, DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            # Under autocast rotary embeddings leave keys in float32: kept so, all would be cast anew at every token.
            key_states = key_states.to(value_states.dtype)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._buffers = tuple(_buffer(states, capacity) for states in (key_states, value_states))
                self._length = 0
            end = self._length + key_states.shape[2]
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, self._length : end] = states
            self._length = end
            self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
            return self.keys, self.values

        def batch_select_indices(self, indices):
            self._buffers = tuple(buffer[indices] for buffer in self._buffers)
            self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)

    return Cache(layer_class_to_replicate=PreallocatedLayer)


def _buffer(states: torch.Tensor, capacity: int) -> torch.Tensor:
    rows, heads, _, size = states.shape
    return states.new_empty(rows, heads, capacity, size)
