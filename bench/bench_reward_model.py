"""Reward models on real pairs: accuracy and calibration of Bradley-Terry and MMPO, and speed against TRL's RewardTrainer.

    AMPO_FAST_DATA=DIR python bench/bench_reward_model.py          # DIR holds pairs_dev.jsonl.gz; or --data FILE
    python bench/bench_reward_model.py --data FILE --part speed    # or --part accuracy

Test prompts are split off by hash and seed, and are seen by no training run; each run stops by its own held-out prompts.
Rows go to bench/results/reward_model.csv; the last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from ampo_fast.config import build_config
from ampo_fast.jsonl import dump_line, read_jsonl
from ampo_fast.metrics import read_metrics
from ampo_fast.model_card import versions
from ampo_fast.reward_model.config import RewardDataConfig, RewardTrainingConfig
from ampo_fast.reward_model.data import hold_out, load_groups
from ampo_fast.reward_model.evaluation import evaluate_scores
from ampo_fast.reward_model.training import RewardTrainer

RESULTS = Path(__file__).parent / "results" / "reward_model.csv"
COLUMNS = ("op", "variant", "seed", "backbone", "keep_blocks", "pooling", "trained_blocks", "max_tokens", "epochs",
           "num_pairs", "accuracy", "accuracy_se_by_prompt", "accuracy_longer_wins", "brier", "ece", "log_loss", "step",
           "seconds", "pairs_per_s", "padding_factor", "threads", "device", "versions", "commit", "date", "note")  # fmt: skip
WHOLE_MODEL = {"keep_blocks": None, "pooling": "native", "trained_blocks": None}
LOSSES = {
    "bt": {"name": "BradleyTerry"},
    "mmpo": {"name": "MMPOReward", "params": {"gamma": {"agreement": 0.8}}},
}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as work:
        answer: dict = {}
        if options.part in ("all", "accuracy"):
            answer |= accuracy(options, Path(work))
        if options.part in ("all", "speed"):
            answer |= speed(options, Path(work))
    print(json.dumps(answer))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="pairs; default: pairs_dev.jsonl.gz of $AMPO_FAST_DATA")
    parser.add_argument("--part", choices=("all", "accuracy", "speed"), default="all")
    parser.add_argument("--backbone", default="package:all-minilm-l6-v2")
    parser.add_argument("--pooling", choices=("native", "mean"), default="mean")
    parser.add_argument("--keep-blocks", type=int, default=0)
    parser.add_argument("--trained-blocks", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="default: all")
    parser.add_argument("--test-share", type=float, default=0.2)
    parser.add_argument("--speed-pairs", type=int, default=64)
    parser.add_argument("--speed-repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--note", default="")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.data is None:
        if "AMPO_FAST_DATA" not in os.environ:
            parser.error("give --data FILE, or set AMPO_FAST_DATA to the directory of pairs_dev.jsonl.gz")
        options.data = Path(os.environ["AMPO_FAST_DATA"]) / "pairs_dev.jsonl.gz"
    return options


def _config(options: argparse.Namespace, work: Path, train: Path, name: str, seed: int, loss: dict, **sections: dict):
    values = {
        "run": {"name": name, "dir": str(work), "seed": seed, "epochs": options.epochs},
        "data": {"train": str(train), "max_tokens": options.max_tokens},
        "model": {
            "path": options.backbone,
            "keep_blocks": options.keep_blocks,
            "pooling": options.pooling,
            "trained_blocks": options.trained_blocks,
        },
        "loss": loss,
        "optim": {"lr": options.lr, "micro_batch_tokens": 16384, "weight_decay": options.weight_decay},
        "eval": {"patience": 0},
    }
    for section, more in sections.items():
        values[section] |= more
    return build_config(values, schema=RewardTrainingConfig)


# --- accuracy and calibration -----------------------------------------------------------------------------------------


def accuracy(options: argparse.Namespace, work: Path) -> dict:
    """mean and standard error over seeds, on test prompts."""
    found: dict[str, list[dict]] = {variant: [] for variant in options.losses}
    shared = None
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        train, test = _split(options, work, seed)
        for variant, loss in ((name, LOSSES[name]) for name in options.losses):
            trainer = RewardTrainer(_config(options, work, train, f"{variant}{seed}", seed, loss), shared)
            summary = trainer.run()
            shared = trainer.model.frozen
            encoded = [trainer.model.encode(group) for group in test]
            scores = [score.tolist() for score in trainer.model.score_groups(encoded, 16384)]
            result = evaluate_scores(test, scores)
            found[variant].append(result)
            _write(options, "accuracy", variant, result | {"step": summary["best_step"], "seed": seed,
                   "seconds": summary["wall_s"], "padding_factor": summary["padding_factor"]})  # fmt: skip
            _write_curve(options, work / f"{variant}{seed}", variant, seed)
            keys = ("accuracy", "accuracy_longer_wins", "brier", "ece", "log_loss")
            print(f"seed {seed} {variant}: " + ", ".join(f"{key} {result[key]:.4f}" for key in keys), flush=True)
    answer = {
        "accuracy_longer_wins": _mean_se([r["accuracy_longer_wins"] for r in found[options.losses[0]]]),
        **{
            f"{key}_{variant}": _mean_se([r[key] for r in results])
            for key in ("accuracy", "ece", "brier")
            for variant, results in found.items()
        },
    }
    if set(found) >= {"bt", "mmpo"}:
        answer["mmpo_minus_bt"] = {
            key: _mean_se([m[key] - b[key] for m, b in zip(found["mmpo"], found["bt"], strict=True)])
            for key in ("accuracy", "ece", "brier")
        }
    return answer


def _split(options: argparse.Namespace, work: Path, seed: int) -> tuple[Path, list]:
    """(file of the training rows, test groups): by prompt; trainers split their own held-out prompts off the former."""
    groups = load_groups(RewardDataConfig(train=str(options.data)))
    train, test = hold_out(groups, options.test_share, seed=1000 + seed)
    kept = {group.id for group in train}
    # Ids as load_groups makes them: pairs of one prompt are ID, ID#2, ...
    path = work / f"train{seed}.jsonl"
    rows = [row for _, row in read_jsonl(options.data)]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(dump_line(row) for row, group in zip(rows, groups, strict=True) if group.id in kept)
    return path, test


def _mean_se(values: list[float]) -> dict[str, float]:
    se = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 4), "se": se if se is None else round(se, 4)}


def _write_curve(options: argparse.Namespace, run_dir: Path, variant: str, seed: int) -> None:
    for row in read_metrics(run_dir / "metrics.jsonl"):
        if "eval/accuracy" in row:
            held = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
            _write(options, "curve", variant, held | {"seed": seed, "step": row["step"]})


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace, work: Path) -> dict:
    """Pairs a second of full fine-tuning with Bradley-Terry: ours and TRL's three settings in turn, on the same token ids;
    medians, against the best of the three."""
    train = work / "speed.jsonl"
    rows = [row for _, row in read_jsonl(options.data)]
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()[: options.speed_pairs]
    with train.open("w", encoding="utf-8") as file:
        file.writelines(dump_line(rows[i]) for i in chosen)
    options.epochs = 1
    full = {"model": WHOLE_MODEL, "data": {"eval": str(train)}, "optim": {"weight_decay": 0.01, "lr": 2e-5}}
    samples: dict[str, list[float]] = {"ours": [], **{name: [] for name in _TRL}}
    for i in range(options.speed_repeats):
        trainer = RewardTrainer(_config(options, work, train, f"speed-{i}", 0, LOSSES["bt"], **full))
        pairs = [{"chosen_ids": i.encoded.ids[0], "rejected_ids": i.encoded.ids[1]} for i in trainer.train_items]
        samples["ours"].append(_time_ours(trainer))
        padding = {"ours": round(trainer.model.num_fed / trainer.model.num_real, 4)}
        for name, settings in _TRL.items():
            samples[name].append(_time_trl(options, work, pairs, **settings))
            padding[name] = _trl_padding(pairs, name)
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    for name, value in seconds.items():
        _write(options, "speed", name, {"seconds": value, "num_pairs": len(pairs), "padding_factor": padding[name],
               "pairs_per_s": len(pairs) / value})  # fmt: skip
        print(f"{name}: {value:.1f} s for {len(pairs)} pairs, padding factor {padding[name]}", flush=True)
    ours = seconds.pop("ours")
    best = min(seconds, key=seconds.get)
    return {"speedup_vs_trl": round(seconds[best] / ours, 3), "trl_best": best}


_TRL = {
    "trl_default_batches": {"train_sampling_strategy": "random"},
    "trl_length_grouped": {"train_sampling_strategy": "group_by_length"},
    # Smaller forwards suit a CPU's caches: the same 16 pairs a step, 4 at a time.
    "trl_length_grouped_4x4": {
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    },
}


def _time_ours(trainer: RewardTrainer) -> float:
    """Seconds of the optimizer steps of one epoch; the evaluations are not counted."""
    trainer.run()
    rows = read_metrics(trainer.run_dir / "metrics.jsonl")
    trainer.model.requires_grad_(False)
    return sum(row["time/step"] for row in rows if "time/step" in row)


def _time_trl(options: argparse.Namespace, work: Path, pairs: list[dict], **settings: object) -> float:
    """Seconds of TRL's training loop; without gradient checkpointing and in float32, as fast as it goes on a CPU."""
    from datasets import Dataset
    from trl import RewardConfig
    from trl import RewardTrainer as TRLRewardTrainer

    from ampo_fast.reward_model.model import RewardModel

    config = _config(options, work, work / "speed.jsonl", "trl", 0, LOSSES["bt"], model=WHOLE_MODEL)
    loaded = RewardModel.load(config.model, max_tokens=options.max_tokens, seed=0)
    rows = [pair | {"length": max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))} for pair in pairs]
    arguments = RewardConfig(
        output_dir=str(work / "trl"), num_train_epochs=1, bf16=False,
        gradient_checkpointing=False, max_length=None, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, use_cpu=True, remove_unused_columns=False, learning_rate=2e-5,
        length_column_name="length", **({"per_device_train_batch_size": 16} | settings),
    )  # fmt: skip
    trainer = TRLRewardTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=loaded.text.tokenizer,
    )
    return trainer.train().metrics["train_runtime"]


def _trl_padding(pairs: list[dict], name: str) -> float:
    """Padded over real tokens of TRL's batches: chosen and rejected together, to the longest of them all."""
    size = _TRL[name].get("per_device_train_batch_size", 16)
    order = list(pairs)
    if name != "trl_default_batches":
        order.sort(key=lambda pair: max(map(len, pair.values())))
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    fed = sum(2 * len(batch) * max(len(ids) for pair in batch for ids in pair.values()) for batch in batches)
    return round(fed / sum(len(ids) for pair in pairs for ids in pair.values()), 4)


# --- rows -------------------------------------------------------------------------------------------------------------


def _write(options: argparse.Namespace, op: str, variant: str, values: dict) -> None:
    found = versions()
    names = ("torch", "transformers")
    row = {key: values.get(key, "") for key in COLUMNS} | {
        "op": op, "variant": variant, "backbone": options.backbone, "max_tokens": options.max_tokens,
        "trained_blocks": "all" if op == "speed" else options.trained_blocks,
        "keep_blocks": "all" if op == "speed" or options.keep_blocks is None else options.keep_blocks,
        "pooling": "native" if op == "speed" else options.pooling, "epochs": options.epochs,
        "threads": torch.get_num_threads(), "device": platform.processor() or platform.machine(),
        "versions": " ".join(f"{name} {found[name]}" for name in names), "commit": found["commit"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "note": options.note,
    }  # fmt: skip
    row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
    is_new = not options.results.exists()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
