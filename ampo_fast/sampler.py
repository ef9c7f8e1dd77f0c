"""Which prompts are trained on, and in which order: a pure function of the data, the seed and the position."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ampo_fast.active_pairs import choose_pairs
from ampo_fast.config import Config
from ampo_fast.data import load_prompts, settle_disagreements
from ampo_fast.engine_config import VllmConfig, read_options
from ampo_fast.model import Policy
from ampo_fast.random_streams import stream_seed
from ampo_fast.rewards import check_scores
from ampo_fast.types import Prompt

log = logging.getLogger(__name__)

_NUM_LOOKED_AT = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPrompts:
    """What a run is trained and measured on."""

    sampler: PromptSampler
    longest: int
    """Tokens of the longest prompt that is trained on."""
    held_out: list[Prompt]
    read: list[Prompt]
    """data.train as it came, with what is not trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRows:
    """data.train and data.eval as they came."""

    train: list[Prompt]
    held_out: list[Prompt]


def load_rows(config: Config) -> RunRows:
    """Reads data.train and data.eval, which takes no model: what is wrong with a file is said before one is loaded."""
    train = _load(config.data.train, "data.train", config, needs_responses=config.rollout.engine == "data")
    held_out = _load_held_out(config)
    check_scores(train, config.reward.kinds)
    return RunRows(train=train, held_out=held_out)


def read_prompts(config: Config, policy: Policy, rows: RunRows) -> RunPrompts:
    """What of the rows is trained and measured on, for every rank to call.

    Raises ValueError for whatever in how many and how long they are a run could not train on.
    """
    lengths = _admitted_lengths(rows.train, policy, config, "data.train")
    train = [prompt for prompt in rows.train if prompt.id in lengths]
    if config.rollout.engine == "data":
        _warn_of_cut_answers(train, policy, config.rollout.max_new_tokens)
    count = config.data.active_pairs
    if count:
        train = choose_pairs(policy, train, count, config.rollout.max_new_tokens)
    longest = max(lengths[prompt.id] for prompt in train)
    _check_budget(longest, config)
    return RunPrompts(
        sampler=PromptSampler(train, config.prompts_per_round, config.run.seed),
        longest=longest,
        held_out=_admit_held_out(rows.held_out, policy, config),
        read=rows.train,
    )


def _warn_of_cut_answers(prompts: Sequence[Prompt], policy: Policy, limit: int) -> None:
    """By a sample: what is cut is never a positive, so a low limit leaves much of the data untrained."""
    sample = prompts[:: -(-len(prompts) // _NUM_LOOKED_AT)]
    lengths = [len(policy.encode_response(r.content)) for p in sample for r in p.responses if r.finish_reason == "stop"]
    num_long = sum(length > limit for length in lengths)
    if num_long:
        log.warning(
            "data.train: %d of %d answers that were looked at are longer than rollout.max_new_tokens = %d: they are cut there, "
            "and a group whose best answer is cut is left out; the longest has %d tokens",
            num_long, len(lengths), limit, max(lengths),
        )  # fmt: skip


def _load_held_out(config: Config) -> list[Prompt]:
    source = config.data.eval
    if source is None or not config.eval.prompts:
        return []
    if config.reward.is_given and not config.eval.reward:
        raise ValueError(
            f"data.eval needs a scorer for fresh answers: set eval.reward (reward.kind is {config.reward.kind!r})"
        )
    return _load(source, "data.eval", config)


def _admit_held_out(prompts: list[Prompt], policy: Policy, config: Config) -> list[Prompt]:
    return admit_prompts(prompts, policy, config, "data.eval")[: config.eval.prompts] if prompts else []


def _load(source: str, field: str, config: Config, needs_responses: bool = False) -> list[Prompt]:
    prompts = load_prompts(source, needs_responses=needs_responses, field=field, columns=config.data.columns)
    return settle_disagreements(prompts, config.data.disagreement, field)


def admit_prompts(prompts: Sequence[Prompt], policy: Policy, config: Config, field: str) -> list[Prompt]:
    """Leaves out prompts longer than data.max_prompt_tokens, counts them, and raises when they are too many."""
    lengths = _admitted_lengths(prompts, policy, config, field)
    return [prompt for prompt in prompts if prompt.id in lengths]


def _admitted_lengths(prompts: Sequence[Prompt], policy: Policy, config: Config, field: str) -> dict[str, int]:
    """{id: tokens} of the prompts that admit_prompts keeps."""
    limit = config.data.max_prompt_tokens
    lengths = {prompt.id: _prompt_length(prompt, policy, field) for prompt in prompts}
    kept = {prompt_id: length for prompt_id, length in lengths.items() if length <= limit}
    long = [prompt.where or prompt.id for prompt in prompts if prompt.id not in kept]
    num_long = len(long)
    named = f"{', '.join(long[:5])}{', ...' if num_long > 5 else ''}"
    if num_long > config.data.max_overlong_share * len(prompts):
        raise ValueError(
            f"{field}: {num_long} of {len(prompts)} prompts are longer than data.max_prompt_tokens = {limit}, more than "
            f"data.max_overlong_share = {config.data.max_overlong_share} allows ({named}); raise one of them"
        )
    if not kept:
        raise ValueError(f"{field}: no prompt is within data.max_prompt_tokens = {limit}; raise it")
    if num_long:
        log.warning(
            "%s: left out %d of %d prompts longer than %d tokens: %s", field, num_long, len(prompts), limit, named
        )
    _check_longest(max(kept.values()), policy, config, field)
    return kept


def _prompt_length(prompt: Prompt, policy: Policy, field: str) -> int:
    try:
        return len(policy.encode_prompt(prompt.messages))
    except ValueError as error:
        raise ValueError(f"{field}, {prompt.where or prompt.id}: {error}") from error


def _check_longest(longest: int, policy: Policy, config: Config, field: str) -> None:
    """Of a rope that changes with the length one long sequence would change the log-probs of all that run beside it."""
    new, way_out = config.rollout.max_new_tokens, "lower data.max_prompt_tokens or rollout.max_new_tokens"
    needed = f"the longest prompt of {field} ({longest} tokens) and rollout.max_new_tokens = {new}"
    limit, context = policy.rope_limit, policy.context_length
    if limit and longest + new > limit[1]:
        raise ValueError(
            f"model.path = {config.model.path!r}: a sequence over {limit[1]} tokens changes the frequencies of its rope (type "
            f"{limit[0]}) for all that run beside it; {needed} pass that; {way_out}"
        )
    served = _served_tokens(config)
    if served and longest + new > served:
        raise ValueError(
            f"rollout.options.max_model_len = {served}: {needed} pass that, and vLLM would refuse or cut such answers; "
            f"raise it, or {way_out}"
        )
    if context and longest + new > context:
        raise ValueError(
            f"model.path = {config.model.path!r} was made for {context} positions; {needed} pass that; {way_out}"
        )


def _served_tokens(config: Config) -> int:
    """Tokens that the vLLM of the config takes, prompt and answer; 0: what the model does, or no vLLM."""
    if not config.rollout.engine.startswith("vllm"):
        return 0
    return read_options(VllmConfig, config.rollout.options, "rollout.options").max_model_len


def _check_budget(longest: int, config: Config) -> None:
    needed, budget = longest + config.rollout.max_new_tokens, config.optim.micro_batch_tokens
    if needed > budget:
        raise ValueError(
            f"optim.micro_batch_tokens = {budget} cannot hold the longest prompt ({longest} tokens) and one response "
            f"(rollout.max_new_tokens = {config.rollout.max_new_tokens}); raise it to at least {needed}"
        )


class PromptSampler:
    """Epochs of shuffled prompts, cut into rounds; no prompt twice in one round, none dropped."""

    def __init__(self, prompts: Sequence[Prompt], prompts_per_round: int, seed: int) -> None:
        if len(prompts) < prompts_per_round:
            raise ValueError(
                f"a round needs {prompts_per_round} prompts (rollout.prompts_per_round or optim.prompts_per_step), "
                f"the data has {len(prompts)}"
            )
        self.prompts = list(prompts)
        self.prompts_per_round = prompts_per_round
        self.seed = seed
        self._order: list[int] = []

    def round(self, index: int) -> list[Prompt]:
        start = index * self.prompts_per_round
        while len(self._order) < start + self.prompts_per_round:
            self._order += self._next_epoch()
        return [self.prompts[i] for i in self._order[start : start + self.prompts_per_round]]

    def epoch(self, index: int) -> float:
        """How many passes over the data the first `index` rounds make."""
        return index * self.prompts_per_round / len(self.prompts)

    def _next_epoch(self) -> list[int]:
        epoch = len(self._order) // len(self.prompts)
        generator = torch.Generator().manual_seed(stream_seed("epoch", self.seed, epoch))
        shuffled = torch.randperm(len(self.prompts), generator=generator).tolist()
        # A round that crosses the epochs' border must not meet a prompt of its first part again.
        used = set(self._order[len(self._order) // self.prompts_per_round * self.prompts_per_round :])
        return [i for i in shuffled if i not in used] + [i for i in shuffled if i in used]
