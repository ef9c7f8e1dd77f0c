"""Embedders: response texts in, L2-normalised float32 vectors out. They say where candidates lie for the selector.

Shapes: n texts, W windows, L tokens of a window, E embedding, D hidden.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from ampo_fast import distributed
from ampo_fast.assets import resolve_model
from ampo_fast.config import Config
from ampo_fast.dispatch import on_device
from ampo_fast.model import Policy
from ampo_fast.model_limits import context_length

log = logging.getLogger(__name__)


class Embedder(Protocol):
    num_windowed: int
    """How many texts were longer than the window so far; they are averaged over windows, never cut."""

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """[n, E] float32 on the CPU, rows of unit length."""
        ...


def make_embedder(config: Config, policy: Policy | None) -> Embedder:
    """A sentence encoder, or the policy itself where embed.model = "policy"."""
    if config.embed.model == "policy":
        if policy is None:
            raise ValueError('embed.model = "policy" needs the policy loaded; name a sentence encoder instead')
        return PolicyEmbedder(policy, config.embed.batch_rows)
    return SentenceEncoder(config.embed.model, config.embed.batch_rows)


class SentenceEncoder:
    """Mean-pooled last hidden states of a BERT-like encoder (sentence-transformers' recipe for MiniLM), on this process's
    device."""

    def __init__(self, path: str, batch_rows: int = 64) -> None:
        from transformers import AutoModel, AutoTokenizer

        source = resolve_model(path, "embed.model")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModel.from_pretrained(source, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(f"embed.model = {path!r} cannot be loaded: {error}") from error
        self.model = model.to(distributed.device()).eval()
        self.batch_rows = batch_rows
        self.window = (context_length(self.model) or 512) - self.tokenizer.num_special_tokens_to_add()
        self.num_windowed = 0
        # The reward and the selector often look at the same texts in one step: encode each once.
        self._recent: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        missing = [text for text in dict.fromkeys(texts) if text not in self._recent]
        if len(self._recent) + len(missing) > 65536:
            self._recent.clear()
            missing = list(dict.fromkeys(texts))
        if missing:
            self._recent.update(zip(missing, self._encode(missing), strict=True))
        return torch.stack([self._recent[text] for text in texts])

    def _encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Means over a text's windows of the windows' pooled vectors, weighted by their tokens, [n, E]: a last window of a
        word counts as a word."""
        ids = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        windows, owner_W = _windows(ids, self.window)
        self.num_windowed += _count_windowed(ids, self.window, "sentence encoder", self.num_windowed == 0)
        length_W = torch.tensor([max(len(window), 1) for window in windows])
        return _direction_of_sums(self._pool_windows(windows) * length_W[:, None], owner_W, len(texts))

    def _pool_windows(self, windows: Sequence[list[int]]) -> torch.Tensor:
        """[W, E] on the CPU, in the order of the windows."""
        order = sorted(range(len(windows)), key=lambda w: len(windows[w]))
        device, pooled = self.model.device, []
        start, end = _special_frame(self.tokenizer)
        for at in range(0, len(order), self.batch_rows):
            chunk = order[at : at + self.batch_rows]
            rows = [torch.tensor([*start, *windows[w], *end]) for w in chunk]
            token_WL = on_device(pad_sequence(rows, batch_first=True), device)
            mask_WL = on_device(pad_sequence([torch.ones_like(r) for r in rows], batch_first=True), device)
            hidden_WLE = self.model(input_ids=token_WL, attention_mask=mask_WL).last_hidden_state
            weight_WL1 = mask_WL[..., None].float()
            mean_WE = (hidden_WLE * weight_WL1).sum(1) / weight_WL1.sum(1)
            pooled.append(normalize(mean_WE, dim=1))
        pooled_WE = torch.cat(pooled).cpu()  # fetched once: each time waits for the device
        return torch.empty_like(pooled_WE).index_copy_(0, torch.tensor(order), pooled_WE)


def _special_frame(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text ([CLS] and [SEP] for BERT)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return framed[:at], framed[at + len(bare) :]


class PolicyEmbedder:
    """Mean over tokens of the policy's own last hidden state, of the response alone. What the data holds can be longer than
    the policy was made for: it runs in windows."""

    def __init__(self, policy: Policy, batch_rows: int = 64) -> None:
        self.policy = policy
        self.batch_rows = batch_rows
        self.window = policy.usable_length or sys.maxsize
        self.num_windowed = 0

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        rows = [self.policy.encode_response(text) for text in place]
        windows, owner_W = _windows(rows, self.window)
        self.num_windowed += _count_windowed(rows, self.window, "policy", self.num_windowed == 0)
        batches = [windows[at : at + self.batch_rows] for at in range(0, len(windows), self.batch_rows)]
        sum_WD = torch.stack([states_LD.float().sum(0) for b in batches for states_LD in self.policy.states(b)]).cpu()
        return _direction_of_sums(sum_WD, owner_W, len(rows))[[place[text] for text in texts]]


def _windows(rows: Sequence[Sequence[int]], size: int) -> tuple[list[Sequence[int]], torch.Tensor]:
    """Token ids in windows of at most `size`, one at least of each row, and the row [W] of each window."""
    cut = [[row[at : at + size] for at in range(0, max(len(row), 1), size)] for row in rows]
    return [window for row in cut for window in row], torch.tensor([i for i, row in enumerate(cut) for _ in row])


def _count_windowed(rows: Sequence[Sequence[int]], size: int, reader: str, is_first: bool) -> int:
    """How many rows are longer than a window; said once: the run's summary has the sum."""
    count = sum(len(row) > size for row in rows)
    if count and is_first:
        log.warning(
            "%d of %d texts are longer than the %s's window of %d tokens: averaged over windows",
            count, len(rows), reader, size,
        )  # fmt: skip
    return count


def _direction_of_sums(vector_WE: torch.Tensor, owner_W: torch.Tensor, count: int) -> torch.Tensor:
    """[count, E]: of each text the sum of its windows' vectors, of unit length."""
    return normalize(torch.zeros(count, vector_WE.shape[1]).index_add_(0, owner_W, vector_WE), dim=1)
