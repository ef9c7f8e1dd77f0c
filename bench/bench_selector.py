"""The selector against what people use instead, in one process and run: a table, rows in bench/results/selector.csv, and a
last line of JSON with the ratios.

    python bench/bench_selector.py [--data responses.jsonl.gz]        (or AMPO_FAST_DATA; synthetic points without)

Peers: `pip install -e ".[bench]"` (scikit-learn, kmedoids, highspy). The first run with a data file also embeds it, which
takes minutes; the embeddings are kept under the temporary directory.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path

import highspy
import kmedoids
import numpy as np
import rows
import sklearn.metrics
import torch
from selector_data import EMBEDDING, Prompts, load_prompts, pool

from ampo_fast import _C, k_center, select_responses

CSV = Path(__file__).parent / "results" / "selector.csv"
EXTRA = ("mean_cost", "gap_pct", "proven")
SIZE, K = 32, 7


class Report:
    """Collects rows, prints each as a line of the table."""

    def __init__(self, source: str) -> None:
        self.rows: list[dict] = []
        self.common = rows.context("torch", "scikit-learn", "kmedoids", "highspy") | {"dtype": "float32"}
        print(
            f"points: {source}; vector unit: {_C.vector_path()}; {self.common['device']}, {torch.get_num_threads()} threads"
        )
        print(
            f"{'op':<12}{'variant':<22}{'shape':<28}{'median ms':>11}{'cost':>10}{'gap %':>9}{'MiB':>8}{'roof %':>8}  note"
        )

    def add(self, op: str, variant: str, shape: str, seconds: list[float] | None = None, **fields: object) -> None:
        row = {"op": op, "variant": variant, "mode": "cpu", "shape": shape} | self.common | fields
        row |= rows.timings(seconds) if seconds else {}
        self.rows.append(row)
        cells = [str(row.get(f, "")) for f in ("median_ms", "mean_cost", "gap_pct", "peak_mib", "roofline_pct")]
        widths = (11, 10, 9, 8, 8)
        print(
            f"{op:<12}{variant:<22}{shape:<28}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)),
            end="",
        )
        print(f"  {row.get('note', '')}", flush=True)


class Roofline:
    """What this machine does at best, measured here: fp32 FLOP/s of a large matmul, bytes/s of a large sum."""

    def __init__(self) -> None:
        a, long = torch.randn(1536, 1536), torch.ones(32 << 20)
        self.flops = 2 * 1536**3 / min(rows.timed(lambda: a @ a)[0] for _ in range(5))
        self.bytes = 4 * len(long) / min(rows.timed(lambda: long.sum())[0] for _ in range(5))

    def pct(self, flops: float, num_bytes: float, seconds: float) -> str:
        return f"{100 * max(flops / self.flops, num_bytes / self.bytes) / seconds:.1f}"


# --- local search over many groups -------------------------------------------------------------------------------------


def weighted_distances(points: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """What a user of a k-medoids library passes: [N - 1, N - 1] w_i d_ij without the positive, rows the covered points."""
    rest = np.delete(np.arange(len(rewards)), rewards.argmax())
    weight = np.exp(rewards.mean() - rewards)[rest]
    return weight[:, None] * sklearn.metrics.pairwise_distances(points[rest])


def fasterpam_costs(points: np.ndarray, rewards: np.ndarray, offsets: list[int], init: str) -> list[float]:
    costs = []
    for start, end in pairwise(offsets):
        distance = weighted_distances(points[start:end], rewards[start:end])
        costs.append(kmedoids.fasterpam(distance, K, init=init, random_state=0, n_cpu=1).loss)
    return costs


def bench_opt_select(prompts: Prompts, report: Report, roofline: Roofline, num_groups: int = 4096) -> dict:
    points, rewards, offsets = prompts.groups(num_groups, SIZE)
    as_arrays = (points.numpy(), rewards.double().numpy(), offsets.tolist())
    calls = {
        "ampo_fast": lambda: select_responses(points, rewards, K, strategy="opt_select", group_offsets=offsets),
        "fasterpam": lambda: fasterpam_costs(*as_arrays, "random"),
        "fasterpam init=build": lambda: fasterpam_costs(*as_arrays, "build"),
    }
    seconds, results = rows.alternate(calls, repeats=5)
    cost = {name: float(np.mean(results[name])) for name in calls if name != "ampo_fast"}
    cost["ampo_fast"] = results["ampo_fast"].cost.mean().item()
    median = {name: float(np.median(s)) for name, s in seconds.items()}
    flops = num_groups * SIZE * (SIZE - 1) / 2 * EMBEDDING * 3
    for name, call in calls.items():
        note = "sklearn pairwise_distances + kmedoids.fasterpam per group" if name != "ampo_fast" else ""
        pct = roofline.pct(flops, points.nbytes, median[name])
        fields = {"mean_cost": f"{cost[name]:.5f}", "peak_mib": rows.peak_mib(call), "roofline_pct": pct, "note": note}
        report.add("opt_select", name, f"B={num_groups} N={SIZE} k={K} E={EMBEDDING}", seconds[name], **fields)
    return {
        "opt_select_speedup_vs_fasterpam": round(median["fasterpam"] / median["ampo_fast"], 2),
        "opt_select_cost_over_fasterpam": round(cost["ampo_fast"] / cost["fasterpam"], 5),
        "opt_select_speedup_vs_fasterpam_build": round(median["fasterpam init=build"] / median["ampo_fast"], 2),
        "opt_select_cost_over_fasterpam_build": round(cost["ampo_fast"] / cost["fasterpam init=build"], 5),
    }


# --- the proven optimum ------------------------------------------------------------------------------------------------


def p_median(cost_FC: np.ndarray, k: int) -> highspy.Highs:
    """min sum_ji c_ji x_ji, sum_j x_ji = 1, x_ji <= y_j, sum_j y_j = k, y binary; columns y, then x by facility."""
    num_facilities, num_clients = cost_FC.shape
    num_x = num_facilities * num_clients
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("mip_rel_gap", 0.0)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = num_facilities + num_x, 1 + num_clients + num_x
    lp.col_cost_ = np.concatenate((np.zeros(num_facilities), cost_FC.ravel()))
    lp.col_lower_, lp.col_upper_ = np.zeros(lp.num_col_), np.ones(lp.num_col_)
    lp.row_lower_ = np.concatenate(([k], np.ones(num_clients), np.full(num_x, -highspy.kHighsInf)))
    lp.row_upper_ = np.concatenate(([k], np.ones(num_clients), np.zeros(num_x)))
    lp.integrality_ = [highspy.HighsVarType.kInteger] * num_facilities + [highspy.HighsVarType.kContinuous] * num_x
    entries = [[(0, 1.0)] + [(1 + num_clients + j * num_clients + i, -1.0) for i in range(num_clients)]
               for j in range(num_facilities)]  # fmt: skip
    entries += [[(1 + x % num_clients, 1.0), (1 + num_clients + x, 1.0)] for x in range(num_x)]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.cumsum([0] + [len(column) for column in entries])
    lp.a_matrix_.index_ = np.array([row for column in entries for row, _ in column])
    lp.a_matrix_.value_ = np.array([value for column in entries for _, value in column])
    solver.passModel(lp)
    return solver


def group(groups: tuple[torch.Tensor, torch.Tensor, torch.Tensor], b: int) -> tuple[torch.Tensor, torch.Tensor]:
    points, rewards, offsets = groups
    return points[offsets[b] : offsets[b + 1]], rewards[offsets[b] : offsets[b + 1]]


def each_exact(groups: tuple[torch.Tensor, torch.Tensor, torch.Tensor], k: int) -> tuple[list[float], int]:
    """(seconds of each group, one call a group; how many were proven)"""
    seconds, proven = [], 0
    for b in range(len(groups[2]) - 1):
        points, rewards = group(groups, b)
        spent, out = rows.timed(lambda p=points, r=rewards: select_responses(p, r, k, strategy="opt_select_exact"))
        seconds.append(spent)
        proven += int(out.proven[0])
    return seconds, proven


def bench_exact(prompts: Prompts, report: Report, mip_groups: int, mip_budget_s: float) -> dict:
    num_groups = len(prompts.reward_BM)
    groups = prompts.groups(num_groups, SIZE)
    each_exact(prompts.groups(2, SIZE), K)  # warm-up
    ours, proven = each_exact(groups, K)
    report.add("exact", "ampo_fast", f"B={num_groups} N={SIZE} k={K} E={EMBEDDING}", ours, proven=proven,
               note=f"{proven} of {num_groups} proven; mean {1e3 * np.mean(ours):.3g} ms, from embeddings")  # fmt: skip
    theirs, worst, start = [], 0.0, time.perf_counter()
    while len(theirs) < min(mip_groups, num_groups) and time.perf_counter() - start < mip_budget_s:
        points, rewards = group(groups, len(theirs))
        solver = p_median(weighted_distances(points.numpy(), rewards.double().numpy()).T, K)
        theirs.append(rows.timed(solver.run)[0])
        own = select_responses(points, rewards, K, strategy="opt_select_exact").cost[0].item()
        worst = max(worst, abs(solver.getInfo().objective_function_value / own - 1))
    same = len(theirs)
    ratio = float(np.mean(theirs) / np.mean(ours[:same]))
    report.add("exact", "HiGHS p-median MIP", f"B={same} N={SIZE} k={K}", theirs, proven=same,
               note=f"mean {1e3 * np.mean(theirs):.4g} ms, solve only; objectives agree to {worst:.1e}")  # fmt: skip
    larger = {"two prompts joined": prompts.joined(num_groups // 2, 64), "synthetic gaussian": gaussian(16, 64)}
    medians = {}
    for name, points in larger.items():
        seconds, proven = each_exact(points, 8)
        count = len(points[2]) - 1
        medians[name] = float(np.median(seconds))
        report.add("exact", "ampo_fast", f"B={count} N=64 k=8 E={EMBEDDING}", seconds, proven=proven,
                   note=f"{name}; {proven} of {count} proven; slowest {max(seconds):.3g} s")  # fmt: skip
    return {
        "exact_groups": num_groups,
        "exact_groups_proven": int(report.rows[-4]["proven"]),
        "exact_speedup_vs_highs": round(ratio, 1),
        "highs_groups": same,
        "exact_n64_k8_median_s": round(medians["two prompts joined"], 4),
        "exact_n64_k8_gaussian_median_s": round(medians["synthetic gaussian"], 4),
    }


def gaussian(num_groups: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The hard case: nearly equal distances everywhere."""
    g = torch.Generator().manual_seed(0)
    total = num_groups * size
    points, rewards = torch.randn(total, EMBEDDING, generator=g), torch.rand(total, generator=g)
    return points, rewards, torch.arange(0, total + 1, size)


def bench_strategies(prompts: Prompts, report: Report, num_groups: int = 4096) -> dict:
    """Cost by strategy over all groups, each draw of responses a group of its own."""
    points, rewards, offsets = prompts.groups(num_groups, SIZE)
    shape = f"B={num_groups} N={SIZE} k={K} E={EMBEDDING}"
    gaps, outs = {}, {}
    for strategy in ("opt_select_exact", "random", "bottom_k", "coreset", "k_center", "opt_select"):
        spent, out = rows.timed(
            lambda s=strategy: select_responses(points, rewards, K, strategy=s, group_offsets=offsets)
        )
        outs[strategy] = out
        least = outs["opt_select_exact"].cost
        gaps[strategy] = 100 * (out.cost / least - 1).mean().item()
        optimal = int((out.cost <= least * (1 + 1e-9)).sum())
        report.add("strategy", strategy, shape, [spent], mean_cost=f"{out.cost.mean().item():.5f}",
                   gap_pct=f"{gaps[strategy]:.4f}", proven=int(out.proven.sum()),
                   note=f"{optimal} of {num_groups} at the optimum; one timing")  # fmt: skip
    return {
        "batch_groups": num_groups,
        "batch_groups_proven": int(outs["opt_select_exact"].proven.sum()),
        "local_search_mean_gap_pct": round(gaps["opt_select"], 4),
    }


# --- k-center over a pool ----------------------------------------------------------------------------------------------


def numpy_loop(points: np.ndarray, steps: int) -> list[int]:
    chosen, nearest = [0], np.full(len(points), np.inf, np.float32)
    for _ in range(steps):
        nearest = np.minimum(nearest, np.linalg.norm(points - points[chosen[-1]], axis=1))
        chosen.append(int(nearest.argmax()))
    return chosen


def torch_loop(points: torch.Tensor, steps: int) -> list[int]:
    chosen, nearest = [0], torch.full((len(points),), torch.inf)
    for _ in range(steps):
        nearest = torch.minimum(nearest, torch.cdist(points, points[chosen[-1]][None])[:, 0])
        chosen.append(int(nearest.argmax()))
    return chosen


def torch_gemv_loop(points: torch.Tensor, steps: int) -> list[int]:
    """One matrix-vector product a step: the fastest loop, which loses the digits of near-duplicates to cancellation."""
    norm, chosen, nearest = points.square().sum(1), [0], torch.full((len(points),), torch.inf)
    for _ in range(steps):
        nearest = torch.minimum(nearest, norm - 2 * (points @ points[chosen[-1]]) + norm[chosen[-1]])
        chosen.append(int(nearest.argmax()))
    return chosen


def bench_k_center(prompts: Prompts, report: Report, roofline: Roofline, size: int = 200_000, k: int = 500) -> dict:
    """The loops cost the same at every step, so they run `steps` of the k - 1 and are scaled up; the note says so."""
    ratios = {}
    for data, points in {"": pool(prompts, size), "_gaussian": torch.randn(size, EMBEDDING)}.items():
        spent, chosen = rows.timed(lambda p=points: k_center(p, k))
        floor = roofline.pct(0, points.nbytes * (k - 1), spent)
        kind = "gaussian" if data else "prompts' vectors + noise 0.3"
        shape = f"n={size} k={k} E={EMBEDDING}"
        note = f"{kind}; 100 % = one read of the pool a step"
        report.add("k_center", "ampo_fast", shape, [spent], roofline_pct=floor, note=note)
        loops = {"numpy": (numpy_loop, points.numpy(), 12), "torch": (torch_loop, points, 30)}
        loops["torch gemv"] = (torch_gemv_loop, points, 60)
        for name, (loop, pool_NE, steps) in loops.items():
            loop(pool_NE, 1)
            took, picks = rows.timed(lambda f=loop, p=pool_NE, s=steps: f(p, s))
            whole = took / steps * (k - 1)
            same = sum(a == b for a, b in zip(picks, chosen.tolist(), strict=False))
            note = f"{kind}; {steps} steps measured, scaled to {k - 1}; {same} of {len(picks)} picks the same"
            report.add("k_center", f"{name} loop", shape, [whole],
                       roofline_pct=roofline.pct(0, points.nbytes * (k - 1), whole), note=note)  # fmt: skip
            ratios[f"k_center_speedup_vs_{name.replace(' ', '_')}{data}"] = round(whole / spent, 2)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description="The selector against its peers; see the top of this file.")
    parser.add_argument(
        "--data", type=Path, help="multi-response; default: alpaca_multi_dev.jsonl.gz of $AMPO_FAST_DATA"
    )
    parser.add_argument("--prompts", type=int, default=72, help="prompts of it to embed and use, at most")
    parser.add_argument("--mip-groups", type=int, default=24, help="groups solved by HiGHS at most")
    parser.add_argument("--mip-seconds", type=float, default=60.0, help="no further group for HiGHS after this long")
    parser.add_argument("--csv", type=Path, default=CSV, help="rows are appended here")
    args = parser.parse_args()
    if args.data is None and "AMPO_FAST_DATA" in os.environ:
        args.data = Path(os.environ["AMPO_FAST_DATA"]) / "alpaca_multi_dev.jsonl.gz"
    prompts = load_prompts(args.data, args.prompts)
    report, roofline = Report(prompts.source), Roofline()
    ratios = bench_opt_select(prompts, report, roofline)
    ratios |= bench_exact(prompts, report, args.mip_groups, args.mip_seconds)
    ratios |= bench_strategies(prompts, report)
    ratios |= bench_k_center(prompts, report, roofline)
    for row in report.rows:
        row["note"] = "; ".join(part for part in (row.get("note"), prompts.source) if part)
    rows.append(args.csv, report.rows, EXTRA)
    print(json.dumps(ratios | {"points": prompts.source}))


if __name__ == "__main__":
    main()
