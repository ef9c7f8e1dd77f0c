"""Points for the selector's benchmark: real MiniLM embeddings of a multi-response file, or synthetic ones where it is absent.

Shapes: B prompts, M responses of a prompt, N candidates of a group, E embedding.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import normalize

from ampo_fast.jsonl import read_jsonl

EMBEDDING = 384
RESPONSES = 48
ENCODER = "package:all-minilm-l6-v2"


@dataclass(frozen=True, slots=True)
class Prompts:
    point_BME: torch.Tensor
    """float32, rows of unit length"""
    reward_BM: torch.Tensor
    """minmax over the prompt's responses, as the trainer passes them"""
    source: str

    def groups(self, num_groups: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(points [n, E], rewards [n], offsets): each group `size` responses of one prompt, drawn without replacement."""
        g = torch.Generator().manual_seed(seed)
        num_prompts, num_responses = self.reward_BM.shape
        points, rewards = [], []
        for b in range(num_groups):
            pick = torch.randperm(num_responses, generator=g)[:size]
            points.append(self.point_BME[b % num_prompts, pick])
            rewards.append(self.reward_BM[b % num_prompts, pick])
        return torch.cat(points), torch.cat(rewards), torch.arange(0, num_groups * size + 1, size)

    def joined(self, num_groups: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Groups of `size` > M responses: half of each of two neighbouring prompts."""
        half = size // 2
        points = self.point_BME[: 2 * num_groups, :half].reshape(num_groups * size, -1)
        rewards = self.reward_BM[: 2 * num_groups, :half].reshape(-1)
        return points, rewards, torch.arange(0, num_groups * size + 1, size)


def load_prompts(path: Path | None, num_prompts: int, checkpoint_prompts: int = 8) -> Prompts:
    """Embeddings of the file's first prompts that have 48 responses, kept under the temporary directory; synthetic without."""
    if path is None:
        return synthetic(num_prompts)
    cache = (
        Path(tempfile.gettempdir())
        / f"ampo_fast_bench_{os.getuid()}"
        / hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    )
    cache.mkdir(parents=True, exist_ok=True)
    rows = _rows(path, num_prompts)
    encoder, points = None, []
    for at in range(0, len(rows), checkpoint_prompts):
        part = rows[at : at + checkpoint_prompts]
        file = cache / f"{at}_{len(part)}.pt"
        if not file.exists():
            from ampo_fast.embeddings import SentenceEncoder

            encoder = encoder or SentenceEncoder(ENCODER)
            texts = [r["content"] for row in part for r in row["responses"][:RESPONSES]]
            torch.save(encoder.embed(texts).view(len(part), RESPONSES, -1), file)
            print(f"embedded {at + len(part)} of {len(rows)} prompts", flush=True)
        points.append(torch.load(file))
    reward_BM = torch.tensor([[r["reward"] for r in row["responses"][:RESPONSES]] for row in rows])
    source = f"MiniLM embeddings of {len(rows)} prompts x {RESPONSES} real responses ({path.name})"
    return Prompts(torch.cat(points), _minmax(reward_BM), source)


def synthetic(num_prompts: int) -> Prompts:
    """Unit vectors around one center a prompt, as answers to one question lie; rewards uniform."""
    g = torch.Generator().manual_seed(0)
    center_B1E = torch.randn(num_prompts, 1, EMBEDDING, generator=g)
    point_BME = normalize(center_B1E + 0.8 * torch.randn(num_prompts, RESPONSES, EMBEDDING, generator=g), dim=2)
    return Prompts(point_BME, _minmax(torch.rand(num_prompts, RESPONSES, generator=g)), "SYNTHETIC embeddings")


def pool(prompts: Prompts, size: int, noise: float = 0.3) -> torch.Tensor:
    """[size, E]: the prompts' vectors drawn with replacement, each moved by noise of that length and scaled to unit length."""
    g = torch.Generator().manual_seed(1)
    base_XE = prompts.point_BME.flatten(0, 1)
    drawn_NE = base_XE[torch.randint(len(base_XE), (size,), generator=g)]
    return normalize(drawn_NE + noise / EMBEDDING**0.5 * torch.randn(drawn_NE.shape, generator=g), dim=1)


def _rows(path: Path, num_prompts: int) -> list[dict]:
    rows = [row for _, row in read_jsonl(path) if len(row["responses"]) >= RESPONSES][:num_prompts]
    if not rows:
        raise ValueError(f"{path} has no prompt with {RESPONSES} responses")
    return rows


def _minmax(reward_BM: torch.Tensor) -> torch.Tensor:
    low_B1, high_B1 = reward_BM.amin(1, keepdim=True), reward_BM.amax(1, keepdim=True)
    return (reward_BM - low_B1) / (high_B1 - low_B1).clamp_min(1e-12)
