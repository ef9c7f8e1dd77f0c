"""The group-contrastive loss, forward + backward, from summed log-probs: ours against two in eager torch.

"reference" goes group by group. "eager_dense" is what one writes by hand where all groups are of one size: a table, no
ragged groups, no empty sides, no checks.

    python bench/bench_group_loss.py [--groups 4096] [--size 8] [--device cpu] [--repeats 20]

Rows go to bench/results/group_loss.csv; the last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import rows
import torch

from ampo_fast import group_contrastive_loss, reference

OPTIONS = {"beta": 10.0, "gamma": 3.0, "alpha": 0.3}


def eager_dense(logp_M: torch.Tensor, length_M: torch.Tensor, reward_M: torch.Tensor, size: int) -> torch.Tensor:
    score_BG, reward_BG = (OPTIONS["beta"] * logp_M / length_M).view(-1, size), reward_M.view(-1, size)
    score_BG = score_BG + OPTIONS["alpha"] * (reward_BG - reward_BG.mean(1, keepdim=True))
    best_B1 = reward_BG.argmax(1, keepdim=True)
    log_factor_BG = torch.full_like(score_BG, math.log(OPTIONS["gamma"])).scatter(1, best_B1, 0.0)
    return (torch.logsumexp(score_BG + log_factor_BG, 1) - score_BG.gather(1, best_B1)[:, 0]).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=4096)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "group_loss.csv")
    options = parser.parse_args()
    total = options.groups * options.size
    generator = torch.Generator().manual_seed(0)
    length_M = torch.randint(1, 500, (total,), generator=generator).to(options.device)
    logp_M = -torch.rand(total, generator=generator).to(options.device) * length_M
    logp_M.requires_grad_()
    reward_M = torch.rand(total, generator=generator).to(options.device)
    offsets = torch.arange(0, total + 1, options.size)

    def ours(impl: str):
        return lambda: group_contrastive_loss(logp_M, length_M, reward_M, offsets, impl=impl, **OPTIONS)

    losses = {"ours_torch": ours("torch")}
    losses |= {"ours_triton": ours("triton")} if options.device == "cuda" else {}
    losses["eager_dense"] = lambda: eager_dense(logp_M, length_M, reward_M, options.size)
    losses["reference"] = lambda: reference.group_contrastive_loss(
        logp_M, length_M, reward_M, offsets, **OPTIONS
    ).mean()

    def full(loss):
        def call() -> None:
            logp_M.grad = None
            loss().backward()
            if options.device == "cuda":
                torch.cuda.synchronize()

        return call

    calls = {name: full(loss) for name, loss in losses.items()}
    context = rows.context("torch") | ({"device": torch.cuda.get_device_name()} if options.device == "cuda" else {})
    base = {"op": "group_contrastive_loss", "mode": "forward+backward", "dtype": "float32", **context}
    base["shape"] = f"{options.groups}x{options.size}"
    medians = {}

    def keep(seconds: dict[str, list[float]], _: dict) -> None:
        table = [base | {"variant": name} | rows.timings(samples) for name, samples in seconds.items()]
        rows.append(options.csv, table)
        for row in table:
            medians[row["variant"]] = float(row["median_ms"])
            print(f"{row['variant']:16} {row['median_ms']:>9} ms")

    slow = {"reference": calls.pop("reference")}
    rows.alternate(calls, options.repeats, keep)
    # The eager loop takes a thousand times longer: its own few repeats, within the same run. On a GPU, which waits for the
    # launches of some fifty operations a group, one.
    rows.alternate(slow, 1 if options.device == "cuda" else 3, keep)
    best = min(value for name, value in medians.items() if name.startswith("ours"))
    ratios = {f"speedup_vs_{name}": round(medians[name] / best, 2) for name in ("eager_dense", "reference")}
    print(json.dumps({**ratios, **medians}))


if __name__ == "__main__":
    main()
