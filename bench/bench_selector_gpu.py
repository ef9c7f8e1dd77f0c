"""The CUDA selector against the time of reading its input once: batched opt_select, and k-center over a pool.

    python bench/bench_selector_gpu.py [--groups 65536] [--pool 1000000]

Needs a GPU and an extension built with `-C cmake.define.AMPO_CUDA=ON`; nothing else. Synthetic points: clusters with
noise, so that swaps have work to do. "read" is torch's sum over the same points. Rows go to bench/results/selector.csv;
the last line is JSON: opt_select_over_read (to reach: 3), k_center_step_over_read (1.5), same_indices_as_cpu.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import rows
import torch

from ampo_fast import k_center, select_responses

SIZE, K = 32, 7
EXTRA = ("mean_cost", "gap_pct", "proven")


def device_seconds(call: Callable[[], object], repeats: int = 7) -> list[float]:
    """Wall time up to the device's last kernel: what a training loop waits for, host work included."""

    def waited() -> None:
        call()
        torch.cuda.synchronize()

    waited()
    return [rows.timed(waited)[0] for _ in range(repeats)]


def clustered(count: int, size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    centers = torch.randn(64, size, generator=generator, device=device)
    which = torch.randint(0, 64, (count,), generator=generator, device=device)
    points = torch.empty(count, size, dtype=dtype, device=device)
    for part in range(0, count, 1 << 17):  # the noise of all at once would be as large again in float32
        at = slice(part, part + (1 << 17))
        noise = torch.randn(points[at].shape, generator=generator, device=device)
        points[at] = (centers[which[at]] + 0.5 * noise).to(dtype)
    return points


class Table:
    """Rows, written as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.common = rows.context("torch") | {"device": torch.cuda.get_device_name(), "mode": "cuda"}

    def add(self, op: str, variant: str, shape: str, dtype: str, seconds: list[float], num_bytes: int = 0) -> float:
        """Writes the row; returns the median in seconds. num_bytes: what was read, for its rate: a slow "read" flatters us."""
        note = f"{num_bytes / statistics.median(seconds) / 1e12:.2f} TB/s" if num_bytes else ""
        row = self.common | {"op": op, "variant": variant, "shape": shape, "dtype": dtype, "note": note}
        row |= rows.timings(seconds)
        rows.append(self.path, [row], EXTRA)
        print(f"{op:12}{variant:14}{shape:32}{row['median_ms']:>10} ms  {note}", flush=True)
        return statistics.median(seconds)


def bench_groups(table: Table, num_groups: int, size: int) -> dict:
    points = clustered(num_groups * SIZE, size, torch.bfloat16, "cuda")
    rewards = torch.rand(num_groups * SIZE, generator=torch.Generator().manual_seed(1)).cuda()
    offsets = torch.arange(num_groups + 1) * SIZE
    shape = f"B={num_groups} N={SIZE} k={K} E={size}"
    seconds = device_seconds(lambda: points.sum(dtype=torch.float32))
    read = table.add("opt_select", "read", shape, "bfloat16", seconds, points.nbytes)

    def select(**options):
        return select_responses(
            points, rewards, K, strategy="opt_select", group_offsets=offsets, impl="cuda", **options
        )

    ours = table.add("opt_select", "ampo_fast", shape, "bfloat16", device_seconds(select))
    few = 256 * SIZE
    checked = select_responses(
        points[:few].cpu(), rewards[:few].cpu(), K, strategy="opt_select", group_offsets=offsets[:257], impl="cpp"
    )
    same = float((checked.negative == select().negative[:256].cpu()).all(dim=1).double().mean())
    return {"opt_select_over_read": round(ours / read, 3), "same_indices_as_cpu": same}


def bench_pool(table: Table, count: int, size: int, k: int) -> dict:
    points = clustered(count, size, torch.float32, "cuda")
    shape = f"n={count} k={k} E={size}"
    read = table.add("k_center", "read", shape, "float32", device_seconds(lambda: points.sum()), points.nbytes)
    seconds = device_seconds(lambda: k_center(points, k, impl="cuda"), repeats=3)
    step = table.add("k_center", "ampo_fast", shape, "float32", seconds) / k
    return {"k_center_step_over_read": round(step / read, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=65536)
    parser.add_argument("--embedding", type=int, default=4096)
    parser.add_argument("--pool", type=int, default=1_000_000)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "selector.csv")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_selector_gpu.py needs a GPU; bench_selector.py is the one for a CPU")
    table = Table(options.csv)
    found = bench_groups(table, options.groups, options.embedding)
    torch.cuda.empty_cache()
    found |= bench_pool(table, options.pool, 384, 500)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
