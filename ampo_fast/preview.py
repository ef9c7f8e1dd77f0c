"""`ampo-fast train --dry-run`: what a run would train on and what it would cost, before it starts. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ampo_fast.config import Config
from ampo_fast.embeddings import make_embedder
from ampo_fast.evaluation import response_logp
from ampo_fast.model import Policy
from ampo_fast.packing import kept_candidates, pack, packed_length
from ampo_fast.rewards import make_reward, score_groups
from ampo_fast.rollouts.engines import make_engine
from ampo_fast.sampler import read_prompts
from ampo_fast.select import RewardTolerance, select_groups
from ampo_fast.start_checks import check_start
from ampo_fast.types import CandidateGroup, Prompt, SelectedGroup
from ampo_fast.update import make_loss

_NUM_GROUPS = 3


def dry_run(config: Config) -> None:
    """Prints the resolved config, three real groups with their token masks, lengths, memory and cost."""
    console = Console(width=140, soft_wrap=True)
    rows = check_start(config)
    policy = Policy.load(config.model)
    prompts = read_prompts(config, policy, rows)
    config = config.with_steps_for(len(prompts.sampler.prompts))
    console.print_json(config.model_dump_json())
    loss = make_loss(config, prompts.sampler.prompts)
    _print_lengths(prompts.read, policy, config, console)
    groups, generate_s = _sampled(prompts.sampler.prompts[:_NUM_GROUPS], policy, config)
    embedder = make_embedder(config, policy)
    if prompts.held_out and config.eval.reward:
        make_reward(config, embedder, config.eval.reward)  # only for what it refuses
    scored = score_groups(groups, make_reward(config, embedder), embedder, config)
    selected = select_groups(scored, config, RewardTolerance(config.reward.tol).update(scored))
    for group in selected:
        _print_group(group, policy, console)
    _print_cost(policy, groups, generate_s, config, console)
    _print_memory(policy, loss.uses_reference, config, console)


def _sampled(prompts: Sequence[Prompt], policy: Policy, config: Config) -> tuple[list[CandidateGroup], float]:
    """(groups, seconds of their sampling)"""
    engine = make_engine(config, policy)
    try:
        engine.start()  # once in a run, minutes for vLLM: no part of a step
        started = time.perf_counter()
        groups = engine.generate(prompts, config.rollout.n, config.rollout.sampling(config.run.seed))
        return groups, time.perf_counter() - started
    finally:
        engine.close()


def _print_lengths(prompts: Sequence[Prompt], policy: Policy, config: Config, console: Console) -> None:
    """Lengths of prompts and given responses, what is left out or cut, and BOS/EOS counts."""
    limit, budget = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    encoded = [policy.encode_prompt(prompt.messages) for prompt in prompts]
    table = Table("", "count", "shortest", "median", "longest", "over the limit", title="tokens")
    table.add_row("prompts", *_spread([len(ids) for ids in encoded], limit))
    given = [len(policy.encode_response(r.content)) for prompt in prompts for r in prompt.responses]
    if given:
        table.add_row("given responses", *_spread(given, budget))
    console.print(table)
    bos = policy.tokenizer.bos_token_id
    counts = [sum(token == bos for token in ids[:2]) for ids in encoded] if bos is not None else []
    doubled = sum(count == 2 for count in counts)
    stops = ", ".join(f"{i} {policy.tokenizer.convert_ids_to_tokens(i)!r}" for i in policy.stop_ids)
    console.print(
        f"BOS: {'none' if bos is None else f'{doubled} of {len(encoded)} prompts begin with it twice'}. Ends a turn: {stops}"
    )


def _spread(lengths: Sequence[int], limit: int) -> list[str]:
    ordered = sorted(lengths)
    over = sum(length > limit for length in lengths)
    return [str(v) for v in (len(ordered), ordered[0], ordered[len(ordered) // 2], ordered[-1], f"{over} > {limit}")]


def _print_group(group: SelectedGroup, policy: Policy, console: Console) -> None:
    """The packed tokens of a trained group: context dim, targets green, the end-of-turn target reversed."""
    scored = group.scored
    console.rule(f"prompt {scored.group.prompt.id}: {scored.group.prompt.messages[-1]['content']}")
    if group.skip_reason:
        console.print(f"left out: {group.skip_reason}")
        return
    batch = pack([group])
    context = policy.tokenizer.decode(list(scored.group.prompt_ids))
    console.print(Text("context (no target): ", style="bold") + Text(repr(context), style="dim"))
    for m, i in enumerate(kept_candidates(group)):
        rows = slice(int(batch.response_offsets[m]), int(batch.response_offsets[m + 1]))
        targets = batch.target_R[rows].tolist()
        num_stops = sum(token in policy.stop_ids for token in targets)
        line = Text(f"{'+' if i in group.positive else '-'} reward {scored.reward_raw[i]:.3f}, {len(targets)} targets, "
                    f"{num_stops} EOS: ")  # fmt: skip
        for token in targets:
            style = "reverse" if token in policy.stop_ids else "green"
            line.append(f"[{policy.tokenizer.decode([token])}]", style=style)
        console.print(line)


def _print_cost(
    policy: Policy, groups: Sequence[CandidateGroup], generate_s: float, config: Config, console: Console
) -> None:
    """FLOPs and estimated seconds of a step that trains on all N against one that trains on 1 + k."""
    started = time.perf_counter()
    response_logp(policy, groups, config.optim.micro_batch_tokens)
    forward_s = time.perf_counter() - started
    num_parameters = sum(p.numel() for p in policy.parameters())
    head = policy.head.weight.numel()
    per_step = config.optim.prompts_per_step / len(groups)
    kept = min(config.select.k + 1, config.rollout.n)
    table = Table(
        "trained on", "tokens", "TFLOP per step", "seconds per step (forward, backward)", title="cost of a step"
    )
    trained = [_step_flops(groups, count, num_parameters - head, head, per_step) for count in (config.rollout.n, kept)]
    forward_flops = trained[0][1] / 3 / per_step
    for name, (tokens, flops) in zip((f"all {config.rollout.n}", f"1 + {kept - 1}"), trained, strict=True):
        table.add_row(name, f"{tokens:.0f}", f"{flops / 1e12:.2f}", f"{flops / forward_flops * forward_s:.1f}")
    console.print(table)
    console.print(
        f"sampling: {generate_s * per_step:.1f} s per step of {config.optim.prompts_per_step} prompts, measured on {len(groups)}"
    )


def _print_memory(policy: Policy, uses_reference: bool, config: Config, console: Console) -> None:
    num_parameters = sum(p.numel() for p in policy.parameters())
    num_trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    num_copied = num_parameters if uses_reference and not policy.lora else 0  # an adapter's reference is its base
    longest = config.optim.micro_batch_tokens
    text = policy.model.config.get_text_config()
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size  # GPT-2, OPT and others call it otherwise
    per_layer = longest * (14 * text.hidden_size + 4 * wide) * 4
    activations = text.num_hidden_layers * per_layer
    if config.optim.activation_checkpointing:  # each layer's input, and one layer as it runs again
        activations = text.num_hidden_layers * longest * text.hidden_size * 4 + per_layer
    parts = {
        "parameters": 4 * num_parameters,
        "gradients": 4 * num_trained,
        "AdamW": 8 * num_trained,
        "the reference": 4 * num_copied,
        f"activations of a full micro-batch of {longest} tokens": activations,
    }
    said = ", ".join(f"{name} {_gib(num_bytes)}" for name, num_bytes in parts.items() if num_bytes)
    console.print(f"memory, estimated: {said}; optim.micro_batch_tokens bounds the last")


def _step_flops(
    groups: Sequence[CandidateGroup], count: int, backbone: int, head: int, scale: float
) -> tuple[float, float]:
    """(tokens, FLOPs) of one step on `count` responses a group: 6 per parameter and token, the head on targets only."""
    lengths = [[len(c.token_ids) for c in group.candidates][:count] for group in groups]
    tokens = sum(packed_length(len(group.prompt_ids), ls) for group, ls in zip(groups, lengths, strict=True))
    targets = sum(map(sum, lengths))
    return tokens * scale, 6 * (backbone * tokens + head * targets) * scale


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
