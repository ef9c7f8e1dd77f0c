"""Forward + backward of packed groups on one GPU, an 8B-shaped random model in bfloat16: each prompt once against once per
response (stock transformers SDPA on equal-length rows, our head), in turn.

    python bench/bench_step_gpu.py [--shapes 512,128 180,350] [--groups 4] [--layers 32 --hidden 4096 ...]

Prints tokens, seconds, the speed-up against the ratio of tokens, and the model FLOP utilisation (FLOPs of the tokens that
are computed, the shared prompt once; recomputed ones not counted). Rows go to bench/results/step.csv; the last line is JSON.
Needs torch and transformers, no model files. On a CPU it runs too, with a smaller model: `--layers 2 --hidden 64 ...`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import rows
import torch

from ampo_fast import attention
from ampo_fast.fused import fused_linear_group_loss
from ampo_fast.losses import AMPO
from ampo_fast.packing import pack_responses
from ampo_fast.types import Candidate, CandidateGroup, PackedBatch, Prompt

SIZE = 8
H200_BF16 = 989e12


def make_model(options: argparse.Namespace) -> torch.nn.Module:
    """Llama 3 8B's shape by default, random weights, parameters in bfloat16: gradients without the optimizer's states."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention.register()
    config = LlamaConfig(
        hidden_size=options.hidden, num_hidden_layers=options.layers, num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads, intermediate_size=options.intermediate, vocab_size=options.vocab,
        max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def make_groups(prompt: int, response: int, count: int, vocab: int) -> list[CandidateGroup]:
    generator = torch.Generator().manual_seed(prompt)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())

    return [
        CandidateGroup(
            prompt=Prompt(id=str(i), messages=()), prompt_ids=ids(prompt),
            candidates=tuple(Candidate(content="", token_ids=ids(response)) for _ in range(SIZE)),
        )
        for i in range(count)
    ]  # fmt: skip


def make_batch(groups: list[CandidateGroup], device: str) -> PackedBatch:
    reward = [[i / SIZE for i in range(SIZE)]] * len(groups)
    batch = pack_responses(groups, [range(SIZE)] * len(groups), device, reward)
    batch.positive_M[SIZE - 1 :: SIZE] = True
    return batch


def head_loss(model: torch.nn.Module, hidden_RD: torch.Tensor, batch: PackedBatch, num_groups: int) -> None:
    loss, _ = fused_linear_group_loss(
        hidden_RD, model.lm_head.weight, batch.target_R, batch.response_offsets, batch.group_offsets, batch.reward_M,
        AMPO(), positive_M=batch.positive_M, normalizer=num_groups,
    )  # fmt: skip
    loss.backward()


def shared_step(model: torch.nn.Module, groups: list[CandidateGroup], device: str) -> None:
    """All groups in one packed batch, as the trainer does it."""
    batch = make_batch(groups, device)
    model.config._attn_implementation = attention.NAME
    plan = attention.SegmentPlan.build(batch.segments)
    hidden_TD = model.base_model(
        input_ids=batch.token_T[None], position_ids=batch.position_T[None], segments=plan, use_cache=False
    ).last_hidden_state[0]
    head_loss(model, hidden_TD[batch.row_R], batch, len(groups))


def stock_step(model: torch.nn.Module, groups: list[CandidateGroup], device: str, groups_per_batch: int) -> None:
    """Every row has its own prompt; micro-batches of about as many tokens as the packed one."""
    model.config._attn_implementation = "sdpa"
    for at in range(0, len(groups), groups_per_batch):
        part = groups[at : at + groups_per_batch]
        ids = torch.tensor([g.prompt_ids + c.token_ids for g in part for c in g.candidates], device=device)
        first = len(part[0].prompt_ids) - 1
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head_loss(model, hidden[:, first:-1].flatten(0, 1), make_batch(part, device), len(groups))


def flops(model: torch.nn.Module, tokens: int, pairs: int, num_rows: int) -> float:
    """6 per parameter and token outside embedding and head, 12 A H per query-key pair and layer, 6 R D V in the head."""
    config = model.config
    body = sum(
        p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and "lm_head" not in name
    )
    scores = 12 * config.num_hidden_layers * config.hidden_size * pairs
    return 6.0 * body * tokens + scores + 6.0 * num_rows * config.hidden_size * config.vocab_size


def work(shape: tuple[int, int], count: int) -> dict[str, tuple[int, int]]:
    """Tokens and causal query-key pairs of `count` groups, by variant."""
    prompt, response = shape
    fed = response - 1
    alone = response + prompt  # the stock rows hold their last token too
    own = fed * (fed + 1) // 2 + fed * prompt
    shared_pairs = prompt * (prompt + 1) // 2 + SIZE * own
    stock_pairs = SIZE * alone * (alone + 1) // 2
    return {
        "shared": (count * (prompt + SIZE * fed), count * shared_pairs),
        "stock": (count * SIZE * alone, count * stock_pairs),
    }


def measure(model, shape: tuple[int, int], options: argparse.Namespace, context: dict) -> dict:
    """The ratios; a row for each variant goes to options.csv."""
    groups = make_groups(*shape, options.groups, options.vocab)
    sizes = work(shape, options.groups)
    ratio = sizes["stock"][0] / sizes["shared"][0]
    per_batch = max(1, round(options.groups / ratio))
    is_cuda = options.device == "cuda"

    def waited(step):
        def call() -> float:
            model.zero_grad(set_to_none=True)
            if is_cuda:
                torch.cuda.reset_peak_memory_stats()
            step()
            if is_cuda:
                torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 2**20 if is_cuda else 0.0

        return call

    calls = {
        "shared": waited(lambda: shared_step(model, groups, options.device)),
        "stock": waited(lambda: stock_step(model, groups, options.device, per_batch)),
    }
    medians, mfu = {}, {}

    def keep(seconds: dict[str, list[float]], peaks: dict[str, float]) -> None:
        for name, samples in seconds.items():
            timing = rows.timings(samples)
            medians[name] = float(timing["median_ms"])
            done = flops(model, *sizes[name], options.groups * SIZE * shape[1])
            mfu[name] = done / (medians[name] / 1e3) / H200_BF16
            note = f"{sizes[name][0]} tokens; {done / 1e12:.0f} TFLOP"
            row = {
                "op": "step_8b", "variant": name, "mode": "forward+backward", "dtype": "bfloat16", **context, **timing,
                "shape": f"{options.groups}x{SIZE} {shape[0]}+{shape[1]}", "peak_mib": f"{peaks[name]:.0f}",
                "roofline_pct": f"{100 * mfu[name]:.1f}" if is_cuda else "", "note": note,
            }  # fmt: skip
            rows.append(options.csv, [row])
            measured = f"MFU {mfu[name]:.1%}  {peaks[name]:.0f} MiB  {note}"
            print(f"{shape} {name:8}{timing['median_ms']:>10} ms  {measured}", flush=True)

    rows.alternate(calls, options.repeats, keep)
    speedup = medians["stock"] / medians["shared"]
    key = "_".join(map(str, shape))
    return {
        f"speedup_shared_{key}": round(speedup, 3),
        f"share_of_token_ratio_{key}": round(speedup / ratio, 3),
        f"mfu_{key}": round(mfu["shared"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["512,128", "180,350"], help="prompt,response in tokens")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "step.csv")
    options = parser.parse_args()
    context = rows.context("torch", "transformers")
    context |= {"device": torch.cuda.get_device_name()} if options.device == "cuda" else {}
    model = make_model(options)
    found: dict[str, float] = {}
    for text in options.shapes:
        found |= measure(model, tuple(map(int, text.split(","))), options, context)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
