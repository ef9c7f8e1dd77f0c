"""Small nouns for tests."""

import torch

from ampo_fast.config import Config, build_config
from ampo_fast.types import Candidate, CandidateGroup, Prompt, ScoredGroup


def prompt(i: int = 0, text: str = "hello?") -> Prompt:
    return Prompt(id=f"p{i}", messages=({"role": "user", "content": text},))


def group(texts, i: int = 0, prompt_ids=(0, 3, 10, 11), finish=None, lengths=None) -> CandidateGroup:
    finish = finish or ["stop"] * len(texts)
    lengths = lengths or [3 + k for k in range(len(texts))]
    candidates = tuple(
        Candidate(content=t, token_ids=tuple(range(20, 20 + n)), logp=(-1.0,) * n, finish_reason=f)
        for t, n, f in zip(texts, lengths, finish, strict=True)
    )
    return CandidateGroup(prompt=prompt(i), prompt_ids=tuple(prompt_ids), candidates=candidates)


def scored(rewards, i: int = 0, valid=None, normalized=None, by_scorer=(), **more) -> ScoredGroup:
    made = group([f"text {k}" for k in range(len(rewards))], i, **more)
    points = torch.nn.functional.normalize(
        torch.randn(len(rewards), 6, generator=torch.Generator().manual_seed(i)), dim=1
    )
    return ScoredGroup(
        group=made,
        reward_raw=tuple(rewards),
        reward=tuple(normalized or rewards),
        valid=tuple(valid or [True] * len(rewards)),
        embedding=points,
        reward_by_scorer=by_scorer,
    )


def config(**sections) -> Config:
    values = {"data": {"train": "x.jsonl"}, "model": {"path": "m"}, "select": {"k": 3}}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return build_config(values)
