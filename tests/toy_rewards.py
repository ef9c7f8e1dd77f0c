"""Reward functions that the tests name as module:function."""


def vowels(prompts, responses):
    """Share of vowels: cheap, varied, deterministic."""
    return [sum(c in "aeiou" for c in r.lower()) / (len(r) + 1) for r in responses]


def constant(prompts, responses):
    return [1.0 for _ in responses]


def broken(prompts, responses):
    return [None for _ in responses]


def sometimes_missing(prompts, responses):
    return [float("nan") if i % 8 == 3 else len(r) for i, r in enumerate(responses)]


def missing_tea(prompts, responses):
    """Cannot judge what one of the held-out prompts asks."""
    return [None if "tea" in str(p) else len(set(r)) for p, r in zip(prompts, responses, strict=True)]


def too_few(prompts, responses):
    return [1.0]


def brevity(prompts, responses):
    """Pulls against `length`: no two rewards agree on everything."""
    return [1.0 / (1 + len(r)) for r in responses]
