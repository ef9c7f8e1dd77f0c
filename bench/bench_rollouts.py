"""Rollouts with the real vLLM on this machine: one request against many, vLLM against transformers, syncs, faults, overlap.

    python bench/bench_rollouts.py [--part speed|faults|replicas|overlap|all] [--model PATH] [--tokens 32] [--repeats 3]

Rows go to bench/results/rollouts.csv; the last line is one JSON object with what was measured. Parts "faults" and
"replicas" kill and freeze real servers; their table is printed: fault, times tried, outcome, completions lost. Part
"overlap" trains with the server on one half of the cores and the trainer on the other, and reads the run's trace.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import rows
import torch

from ampo_fast.config import Config, build_config
from ampo_fast.model import Policy
from ampo_fast.rollouts.engines import make_engine
from ampo_fast.rollouts.protocol import RolloutEngine
from ampo_fast.trace import TRACE_FILE, overlap, read_spans
from ampo_fast.trainer import train
from ampo_fast.types import CandidateGroup, Prompt, Sampling
from ampo_fast.vllm import process
from ampo_fast.weight_sync import push_weights

N = 32
TEXTS = ("Why is the sky blue?", "Name three fruits.", "Write a line about rain.", "How do boats float?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("speed", "faults", "replicas", "overlap", "all"), default="all")
    parser.add_argument("--model", default="package:smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=32, help="length limit of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--eager", action="store_true", help="speed without vLLM's compilation; the other parts have none"
    )
    parser.add_argument("--rounds", type=int, default=8, help="of the overlap's run")
    parser.add_argument(
        "--candidates", type=int, default=8, help="per prompt of the overlap's run: more, and sampling is longer"
    )
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "rollouts.csv")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Speed comes last: no server may share the cores with an engine in this process.
    parts = {"overlap": measure_overlap, "faults": measure_faults, "replicas": measure_replicas, "speed": measure_speed}
    result: Counter[str] = Counter()
    for name, measure in parts.items():
        if arguments.part in (name, "all"):
            result.update(measure(arguments))
    print(json.dumps(result))


def config_of(engine: str, arguments: argparse.Namespace, **options: object) -> Config:
    settings = {"enforce_eager": True, "max_model_len": 1024} | options if engine.startswith("vllm") else {}
    values = {
        "data": {"train": "-"},
        "model": {"path": arguments.model},
        "rollout": {"engine": engine, "options": settings, "batch_rows": N * len(TEXTS)},
    }
    return build_config(values)


def prompts(count: int, label: str) -> list[Prompt]:
    """Prompts of different ids, so that the same text is sampled anew; the four texts in turn."""
    return [
        Prompt(id=f"{label}-{i}", messages=({"role": "user", "content": TEXTS[i % len(TEXTS)]},)) for i in range(count)
    ]


def nudge(policy: Policy) -> None:
    """Moves every weight by 1% of its tensor's spread: far more than a step of training does."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * parameter.std() * torch.randn_like(parameter))


# --- speed ------------------------------------------------------------------------------------------------------------


def measure_speed(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of four ways to sample N candidates of a prompt, alternating in one process."""
    config = config_of("vllm", arguments, enforce_eager=arguments.eager)
    policy = Policy.load(config.model)
    engine = make_engine(config, policy)
    own = make_engine(config_of("transformers", arguments), policy)
    sampling = Sampling(max_new_tokens=arguments.tokens)
    one = prompts(1, "one")
    same = [Prompt(id=f"many-{i}", messages=one[0].messages) for i in range(N)]
    ways: dict[str, Callable[[], list[CandidateGroup]]] = {
        "vllm, one request": lambda: engine.generate(one, N, sampling),
        "vllm, N at a time": lambda: engine.generate(same, 1, sampling),
        "vllm, one after another": lambda: [g for p in same for g in engine.generate([p], 1, sampling)],
        "transformers": lambda: own.generate(one, N, sampling),
    }
    rates = timed_rates(ways, arguments)
    sync = measure_syncs(policy, engine, arguments)
    engine.close()
    fast = rates["vllm, one request"]
    return {
        "speedup_n_in_one_request": round(fast / rates["vllm, one after another"], 2),
        "n_in_one_request_vs_concurrent": round(fast / rates["vllm, N at a time"], 2),
        "vllm_vs_transformers": round(fast / rates["transformers"], 2),
    } | sync


def timed_rates(ways: dict[str, Callable[[], list[CandidateGroup]]], arguments: argparse.Namespace) -> dict[str, float]:
    """Median tokens per second by way, written to the CSV; responses differ in length, so tokens are what is counted."""
    seconds, results = rows.alternate(ways, arguments.repeats)
    about = rows.context("torch", "transformers", "vllm-cpu")
    rates, table = {}, []
    for way, groups in results.items():
        tokens = sum(len(c.token_ids) for g in groups for c in g.candidates)
        rates[way] = tokens / statistics.median(seconds[way])
        print(f"{way:>26}: {rates[way]:8.1f} tokens/s, {tokens} tokens", flush=True)
        table.append(
            about
            | rows.timings(seconds[way])
            | {
                "op": "rollout", "variant": way, "mode": "generate", "dtype": "float32",
                "shape": f"N={N} max_new_tokens={arguments.tokens}",
                "note": f"{rates[way]:.1f} tokens/s" + (", vLLM eager" if arguments.eager else ""),
            }
        )  # fmt: skip
    rows.append(arguments.csv, table)
    return rates


def measure_syncs(policy: Policy, engine: RolloutEngine, arguments: argparse.Namespace) -> dict[str, float]:
    """Three syncs of changed weights: the worst difference of log-probs after one, and the smallest change by one."""
    gaps, changes, seconds = [], [], []
    for version in (1, 2, 3):
        nudge(policy)
        spent, _ = rows.timed(lambda v=version: push_weights(policy, engine, v))
        seconds.append(spent)
        gaps.append(engine.sync_metrics["sync/logp_difference"])
        changes.append(engine.sync_metrics["sync/logp_change"])
    note = f"canary included; difference {max(gaps):.2g}, change {min(changes):.2g} nats a token"
    row = {"op": "sync", "variant": "vllm", "mode": "load_weights", "dtype": "float32", "note": note}
    rows.append(arguments.csv, [rows.context("torch", "transformers", "vllm-cpu") | rows.timings(seconds) | row])
    print(f"sync: {statistics.median(seconds):.2f} s, {note}", flush=True)
    return {"sync_logprob_difference": max(gaps), "sync_changed_logprobs": min(changes)}


# --- faults -----------------------------------------------------------------------------------------------------------


def measure_faults(arguments: argparse.Namespace) -> dict[str, int]:
    """Real servers, killed and frozen in the middle of their work; what had been asked for must be there at the end."""
    policy = Policy.load(config_of("vllm-server", arguments).model)
    options = {"restarts": 4, "request_timeout_s": 120.0, "sync_timeout_s": 60.0}
    engine = make_engine(config_of("vllm-server", arguments, **options), policy)
    cases = {
        "kill -9 during generation": lambda: during_generation(policy, engine, signal.SIGKILL),
        "kill -9 during a sync": lambda: during_sync(policy, engine, signal.SIGKILL),
        "frozen (SIGSTOP) during a sync": lambda: during_sync(policy, engine, signal.SIGSTOP),
    }
    about, table = rows.context("torch", "transformers", "vllm-cpu"), []
    survived = lost = 0
    engine.generate(prompts(1, "warm"), 2, Sampling(max_new_tokens=4))
    print(f"{'fault':<32} tried  outcome                      lost", flush=True)
    for name, case in cases.items():
        try:
            seconds, missing = rows.timed(case)
            outcome, survived, lost = f"went on after {seconds:.0f} s", survived + 1, lost + missing
        except Exception as error:  # any error is an outcome of the table
            missing, outcome = -1, f"stopped: {error}"
        print(f"{name:<32} 1      {outcome:<28} {missing}", flush=True)
        note = f"{' '.join(outcome.split())[:200]}; completions lost: {missing}"
        row = {"op": "fault", "variant": name, "mode": "vllm-server", "dtype": "float32", "note": note}
        table.append(about | row)
    engine.close()
    rows.append(arguments.csv, table)
    return {"faults_tried": len(cases), "faults_survived": survived, "completions_lost": lost}


def measure_replicas(arguments: argparse.Namespace) -> dict[str, float]:
    """Two servers; one is killed in the middle of a batch and not started again: the other answers the rest."""
    policy = Policy.load(config_of("vllm-server", arguments).model)
    engine = make_engine(config_of("vllm-server", arguments, replicas=2, restarts=0, memory_share=0.2), policy)
    sampling, count = Sampling(max_new_tokens=arguments.tokens), 8
    engine.generate(prompts(2, "warm"), 2, Sampling(max_new_tokens=4))
    rates, missing = {}, 0
    for label in ("two servers", "one killed meanwhile", "one left"):
        if label == "one killed meanwhile":
            strike_later(engine, signal.SIGKILL, 1.0)
        seconds, groups = rows.timed(lambda label=label: engine.generate(prompts(count, label), 8, sampling))
        rates[label] = sum(len(c.token_ids) for g in groups for c in g.candidates) / seconds
        missing += 8 * count - sum(len(group.candidates) for group in groups)
    engine.close()
    note = ", ".join(f"{label} {rate:.0f} tokens/s" for label, rate in rates.items()) + f"; completions lost: {missing}"
    print(f"kill -9 of one of two replicas: {note}", flush=True)
    row = {"op": "fault", "variant": "kill -9 of one of two replicas", "mode": "vllm-server", "dtype": "float32"}
    rows.append(arguments.csv, [rows.context("torch", "transformers", "vllm-cpu") | row | {"note": note}])
    return {"faults_tried": 1, "faults_survived": 1, "completions_lost": missing}


def during_generation(policy: Policy, engine: RolloutEngine, what: signal.Signals) -> int:
    """Strikes a second after the requests went out; returns how many of their completions are missing."""
    strike_later(engine, what, 1.0)
    groups = engine.generate(prompts(4, "struck"), 8, Sampling(max_new_tokens=128))
    return 4 * 8 - sum(len(group.candidates) for group in groups)


def during_sync(policy: Policy, engine: RolloutEngine, what: signal.Signals) -> int:
    """Strikes when the weights are written and the server is about to read them; then generates with the new version."""
    nudge(policy)
    load, struck = engine.replicas[0].load, threading.Event()

    def load_and_strike(weights: Path) -> None:
        if not struck.is_set():
            struck.set()
            strike_later(engine, what, 0.05)
        load(weights)

    engine.replicas[0].load = load_and_strike
    push_weights(policy, engine, engine.version + 1)
    groups = engine.generate(prompts(2, "after"), 8, Sampling(max_new_tokens=16))
    return 2 * 8 - sum(c.version == engine.version for group in groups for c in group.candidates)


def strike_later(engine: RolloutEngine, what: signal.Signals, delay_s: float) -> None:
    group = engine.replicas[0].process.group

    def strike() -> None:
        time.sleep(delay_s)
        os.killpg(group, what)

    threading.Thread(target=strike, daemon=True).start()


# --- overlap ----------------------------------------------------------------------------------------------------------


def measure_overlap(arguments: argparse.Namespace) -> dict[str, float]:
    """A run whose next round is sampled while this one trains, each on its own cores; read from the run's trace."""
    with TemporaryDirectory() as folder, own_cores() as halves:
        train(overlap_config(arguments, Path(folder)))
        measured = overlap(read_spans(Path(folder) / "run" / TRACE_FILE))
    ratio = measured.wall_s / measured.bound_s
    note = (
        f"{measured.num_rounds} rounds: sampling {measured.generate_s:.2f} s, training with sync {measured.train_s:.2f} s, "
        f"wall {measured.wall_s:.2f} s a round; wall / max(sampling, training) {ratio:.3f}; {halves}"
    )
    print(f"overlap: {note}", flush=True)
    row = {"op": "overlap", "variant": "max_staleness 1", "mode": "vllm-server", "dtype": "float32", "note": note}
    row |= {"shape": f"4 prompts x {arguments.candidates} x {arguments.tokens}"}
    rows.append(
        arguments.csv, [rows.context("torch", "transformers", "vllm-cpu") | rows.timings([measured.wall_s]) | row]
    )
    return {"overlap_wall_over_longer": round(ratio, 3)}


def overlap_config(arguments: argparse.Namespace, folder: Path) -> Config:
    data = folder / "train.jsonl"
    lines = [{"id": str(i), "prompt": f"{TEXTS[i % len(TEXTS)]} Answer {i}."} for i in range(64)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "run": {"name": "run", "dir": str(folder), "steps": arguments.rounds, "trackers": []},
        "data": {"train": str(data)},
        "model": {"path": arguments.model},
        "rollout": {
            "engine": "vllm-server", "n": arguments.candidates, "max_new_tokens": arguments.tokens, "truncated": "keep",
            "options": {"enforce_eager": True, "max_model_len": 1024},
        },
        "reward": {"kind": "relevance"},
        "embed": {"model": "policy"},
        "select": {"k": 3},
        "optim": {"prompts_per_step": 4, "lr": 1e-5, "warmup_ratio": 0.0},
        "checkpoint": {"every": 0},
    }  # fmt: skip
    return build_config(values)


@contextmanager
def own_cores() -> Iterator[str]:
    """This process on the first half of its cores, the servers that it starts on the second."""
    cores = sorted(os.sched_getaffinity(0))
    own, theirs = cores[: len(cores) // 2], cores[len(cores) // 2 :]
    listed = ",".join(map(str, theirs))
    serve_command = process.serve_command

    def pinned(*arguments: object) -> Callable[[int], list[str]]:
        command = serve_command(*arguments)
        env = ["env", f"VLLM_CPU_OMP_THREADS_BIND={listed}", f"OMP_NUM_THREADS={len(theirs)}"]
        return lambda port: [*env, "taskset", "-c", listed, *command(port)]

    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), own)
    torch.set_num_threads(len(own))
    process.serve_command = pinned
    try:
        yield f"{len(own)} + {len(theirs)} cores"
    finally:
        process.serve_command = serve_command
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))


if __name__ == "__main__":
    main()
