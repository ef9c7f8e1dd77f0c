"""The training step: each prompt once against once per response, and the whole on-policy step against TRL's GRPOTrainer.

    python bench/bench_step.py [--parts shared,trl,memory,ranks] [--repeats 5] [--trl-steps 5]

shared: forward + backward of one group of 8, SmolLM2-135M, float32; stock transformers (SDPA, an equal-length batch, the
prompt in every row, our head) against the shared prefix, with model.compile (speedup_shared_*) and without it
(speedup_shared_eager_*), in turn; largest relative difference of the gradients.
trl: 2 prompts x 8 completions x 32 tokens; TRL's step, then ours on 1 + 3, then ours on all 8, in turn, in one process.
memory: peak resident memory of a run of each (TRL where it is installed), every one in a process of its own.
ranks: ten steps of a tiny model on two gloo processes against one; largest relative difference of a step's loss, float32.
Rows go to bench/results/step.csv; the last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import rows
import torch

from ampo_fast.config import Config, load_config
from ampo_fast.data import load_prompts
from ampo_fast.fused import fused_linear_group_loss
from ampo_fast.losses import AMPO
from ampo_fast.memory import peak_rss_mib
from ampo_fast.model import Policy
from ampo_fast.packing import pack_responses
from ampo_fast.types import Candidate, CandidateGroup, PackedBatch, Prompt, Sampling

GROUP = 8
SHAPES = {"512_128": (512, 128), "180_350": (180, 350)}
PROMPTS, COMPLETIONS, TOKENS = 2, 8, 32


# --- each prompt once -------------------------------------------------------------------------------------------------


def random_group(prompt: int, response: int, num_tokens: int) -> CandidateGroup:
    generator = torch.Generator().manual_seed(prompt)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(20, num_tokens, (count,), generator=generator).tolist())

    candidates = tuple(Candidate(content="", token_ids=ids(response)) for _ in range(GROUP))
    return CandidateGroup(prompt=Prompt(id="0", messages=()), prompt_ids=ids(prompt), candidates=candidates)


def shared_step(policy: Policy, batch: PackedBatch) -> torch.Tensor:
    loss, _ = policy(batch, AMPO(), 1)
    loss.backward()
    return loss


def whole_rows(group: CandidateGroup) -> torch.Tensor:
    return torch.tensor([group.prompt_ids + candidate.token_ids for candidate in group.candidates])


def stock_step(policy: Policy, group: CandidateGroup, batch: PackedBatch) -> torch.Tensor:
    """transformers as it comes, the prompt in every row of an equal-length batch; our head on the response rows."""
    first = len(group.prompt_ids) - 1
    hidden = policy.model.base_model(input_ids=whole_rows(group), use_cache=False).last_hidden_state
    hidden_RD = hidden[:, first:-1].flatten(0, 1)
    loss, _ = fused_linear_group_loss(
        hidden_RD, policy.head.weight, batch.target_R, batch.response_offsets, batch.group_offsets, batch.reward_M, AMPO(),
        positive_M=batch.positive_M, normalizer=1,
    )  # fmt: skip
    loss.backward()
    return loss


def naive_step(policy: Policy, group: CandidateGroup, batch: PackedBatch) -> torch.Tensor:
    """Whole logits of every row, log_softmax, gather: what most training scripts do."""
    from ampo_fast.losses import ResponseStats

    first = len(group.prompt_ids) - 1
    logits = policy.model(input_ids=whole_rows(group), use_cache=False).logits[:, :-1]
    token_logp = torch.log_softmax(logits, -1).gather(2, whole_rows(group)[:, 1:, None])[:, first:, 0]
    length_M = batch.response_offsets.diff()
    loss = AMPO()(
        ResponseStats(token_logp.sum(1), length_M, batch.reward_M, batch.group_offsets, positive_M=batch.positive_M)
    ).loss
    loss.backward()
    return loss


def gradients(policy: Policy, step: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    policy.zero_grad()
    step()
    return [parameter.grad.clone() for parameter in policy.parameters()]


def measure_shared(shapes: list[str], repeats: int, context: dict) -> tuple[list[dict], dict]:
    policy, compiled = (Policy.load(load_config("quickstart").model) for _ in range(2))
    compiled.compile_blocks()
    table, found, worst = [], {}, 0.0
    for name in shapes:
        prompt, response = SHAPES[name]
        group = random_group(prompt, response, policy.head.weight.shape[0])
        batch = _batch(group)
        steps = {"shared": lambda b=batch: shared_step(policy, b)}
        steps["compiled"] = lambda b=batch: shared_step(compiled, b)
        steps["stock"] = lambda g=group, b=batch: stock_step(policy, g, b)
        *ours, theirs = (
            gradients(compiled if variant == "compiled" else policy, step) for variant, step in steps.items()
        )
        norms = [(a - b).norm() / b.norm() for grads in ours for a, b in zip(grads, theirs, strict=True)]
        worst = max(worst, float(torch.stack(norms).max()))
        seconds, _ = rows.alternate(steps, repeats)
        for variant, samples in seconds.items():
            base = {"op": "step", "variant": variant, "mode": "forward+backward", "shape": name, "dtype": "float32"}
            table.append(base | context | rows.timings(samples))
            print(f"{name:10} {variant:8} {table[-1]['median_ms']:>8} ms")
        medians = {row["variant"]: float(row["median_ms"]) for row in table if row["shape"] == name}
        for key, variant in (("shared", "compiled"), ("shared_eager", "shared")):
            found[f"speedup_{key}_{name}"] = round(medians["stock"] / medians[variant], 3)
    return table, found | {"max_rel_err_shared": worst}


def _batch(group: CandidateGroup) -> PackedBatch:
    batch = pack_responses([group], [range(GROUP)], reward=[[i / GROUP for i in range(GROUP)]])
    batch.positive_M[-1] = True
    return batch


# --- the whole step, against TRL --------------------------------------------------------------------------------------


class OurStep:
    """Generate, score, embed, select, train, sync: the loop's own parts on two prompts."""

    def __init__(self, config: Config, k: int) -> None:
        from ampo_fast.embeddings import make_embedder
        from ampo_fast.progress import TrainingProgress
        from ampo_fast.rewards import make_reward
        from ampo_fast.rollouts.engines import make_engine
        from ampo_fast.update import Updater

        select = config.select.model_copy(
            update={"k": k, "strategy": "bottom_k" if k == COMPLETIONS - 1 else "opt_select"}
        )
        self.config = config.model_copy(update={"select": select})
        self.policy = Policy.load(config.model)
        self.engine = make_engine(self.config, self.policy)
        self.embedder = make_embedder(self.config, self.policy)
        self.reward_fn = make_reward(self.config, self.embedder)
        self.updater = Updater(self.config, self.policy)
        self.progress = TrainingProgress(total_steps=10**6)
        self.step = 0

    def __call__(self, prompts: list[Prompt]) -> dict[str, float]:
        """Seconds by phase."""
        from ampo_fast.rewards import score_groups
        from ampo_fast.select import select_groups
        from ampo_fast.weight_sync import push_weights

        self.progress.phase_s = {}
        with self.progress.phase("generate"):
            sampling = Sampling(temperature=1.0, max_new_tokens=TOKENS, seed=0, step=self.step)
            groups = self.engine.generate(prompts, COMPLETIONS, sampling)
        with self.progress.phase("score"):
            scored = score_groups(groups, self.reward_fn, self.embedder, self.config)
        with self.progress.phase("select"):
            selected = select_groups(scored, self.config, 0.0)
        self.updater.step(selected, self.step, self.progress, is_comparable=False)
        with self.progress.phase("sync"):
            push_weights(self.policy, self.engine, self.step)
        self.step += 1
        return dict(self.progress.phase_s)


def our_config() -> Config:
    # "keep": at 32 tokens nearly every answer is cut; a cut one may be the positive, or there would be nothing to train on.
    arguments = ["--rollout.truncated", "keep", "--optim.prompts_per_step", str(PROMPTS), "--loss.nll_weight", "0.0"]
    return load_config("quickstart", [*arguments, "--rollout.temperature", "1.0", "--run.steps", "1000"])


def trl_trainer(prompts: list[Prompt], steps: int, callback: object | None) -> object:
    """GRPOTrainer at the same work: its defaults, but for float32 on a CPU and no checkpointing of activations."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from ampo_fast.assets import resolve_model
    from ampo_fast.embeddings import SentenceEncoder
    from ampo_fast.rewards import relevance

    encoder = SentenceEncoder("package:all-minilm-l6-v2")

    def reward(prompts: list, completions: list, **_: object) -> list[float]:
        asked = [Prompt(id=str(i), messages=tuple(messages)) for i, messages in enumerate(prompts)]
        return relevance(asked, [completion[0]["content"] for completion in completions], encoder)

    config = GRPOConfig(
        output_dir=os.environ.get("TMPDIR", "/tmp") + "/trl_bench", max_steps=steps, num_generations=COMPLETIONS,
        per_device_train_batch_size=PROMPTS * COMPLETIONS, max_completion_length=TOKENS, temperature=1.0,
        learning_rate=8e-6, use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", logging_steps=1000, disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": list(prompt.messages)} for prompt in prompts])
    return GRPOTrainer(
        model=resolve_model("package:smollm2-135m-instruct", "model"), reward_funcs=reward, args=config,
        train_dataset=data, callbacks=[callback] if callback else None,
    )  # fmt: skip


def measure_trl(steps: int, context: dict) -> tuple[list[dict], dict]:
    from transformers import TrainerCallback

    prompts = load_prompts("package:quickstart_train")
    ours = {"ours_1_3": OurStep(our_config(), 3), "ours_all": OurStep(our_config(), COMPLETIONS - 1)}
    seconds: dict[str, list[float]] = {"trl": [], **{name: [] for name in ours}}
    phases: list[dict[str, float]] = []

    class Alternate(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            seconds["trl"].append(time.perf_counter() - self.started)
            at = PROMPTS * len(seconds["trl"])
            for name, step in ours.items():
                spent, split = rows.timed(lambda step=step: step(prompts[at : at + PROMPTS]))
                seconds[name].append(spent)
                if name == "ours_1_3":
                    phases.append(split)

    trl_trainer(prompts, steps + 1, Alternate()).train()
    table = []
    for name, samples in seconds.items():
        row = {"op": "on_policy_step", "variant": name, "mode": "generate+train", "dtype": "float32", **context}
        row |= {"shape": f"{PROMPTS}x{COMPLETIONS}x{TOKENS}"} | rows.timings(samples[1:])  # the first one warms up
        if name == "ours_1_3":
            total = sum(sum(split.values()) for split in phases[1:])
            shares = {key: sum(split.get(key, 0.0) for split in phases[1:]) / total for key in phases[-1]}
            row["note"] = " ".join(f"{key} {share:.0%}" for key, share in shares.items())
        table.append(row)
        print(f"{name:10} {row['median_ms']:>8} ms  {row.get('note', '')}")
    medians = {row["variant"]: float(row["median_ms"]) for row in table}
    return table, {
        "speedup_vs_trl": round(medians["trl"] / medians["ours_1_3"], 3),
        "speedup_vs_trl_all": round(medians["trl"] / medians["ours_all"], 3),
    }


# --- memory, each in a process of its own -----------------------------------------------------------------------------


def run_alone(what: str) -> None:
    """One thing in this process; prints its peak resident memory and the parameters' share of it."""
    if what == "trl":
        trainer = trl_trainer(load_prompts("package:quickstart_train"), 3, None)
        trainer.train()
        count = sum(parameter.numel() for parameter in trainer.model.parameters())
    elif what == "ours":
        step = OurStep(our_config(), 3)
        for i in range(3):
            step(load_prompts("package:quickstart_train")[2 * i : 2 * i + 2])
        count = sum(parameter.numel() for parameter in step.policy.parameters())
    else:
        policy = Policy.load(load_config("quickstart").model)
        group = random_group(*SHAPES["512_128"], policy.head.weight.shape[0])
        batch = _batch(group)
        call = {"shared": lambda: shared_step(policy, batch), "naive": lambda: naive_step(policy, group, batch)}[what]
        # Not getrusage's peak: that of loading the model is higher than the shared step's.
        print(json.dumps({"peak_mib": float(rows.peak_mib(call))}))
        return
    peak = peak_rss_mib()
    print(json.dumps({"peak_mib": peak, "beyond_16_bytes_mib": peak - 16 * count / 2**20}))


def measure_memory(context: dict, with_trl: bool) -> tuple[list[dict], dict]:
    table, peaks = [], {}
    for what in ("shared", "naive", "ours", *(["trl"] if with_trl else [])):
        done = subprocess.run([sys.executable, __file__, "--alone", what], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{what}: {done.stderr[-2000:]}")
        peaks[what] = json.loads(done.stdout.splitlines()[-1])
        table.append({"op": "step_memory", "variant": what, "dtype": "float32", **context,
                      "peak_mib": f"{peaks[what]['peak_mib']:.0f}", "note": str(peaks[what]).replace(",", ";")})  # fmt: skip
        print(what, peaks[what])
    found = {"memory_vs_padded_naive": round(peaks["shared"]["peak_mib"] / peaks["naive"]["peak_mib"], 3)}
    if with_trl:
        beyond = {name: peaks[name]["beyond_16_bytes_mib"] for name in ("ours", "trl")}
        found |= {"memory_vs_trl": round(beyond["ours"] / beyond["trl"], 3)}
    return table, found


# --- two processes against one ----------------------------------------------------------------------------------------


def measure_ranks(context: dict) -> tuple[list[dict], dict]:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from conftest import make_tiny_model
    from runs import command, write_run

    from ampo_fast.metrics import read_metrics

    losses = []
    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny_model(Path(scratch) / "model")
        for ranks in (None, 2):
            folder = Path(scratch) / str(ranks)
            folder.mkdir()
            config = write_run(folder, model, run={"steps": 10}, eval={"prompts": 0})
            argv, env = command(config, ranks=ranks)
            done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{ranks or 1} ranks: {done.stderr[-2000:]}")
            losses.append([row["loss"] for row in read_metrics(folder / "runs/r/metrics.jsonl") if "loss" in row])
    one, two = torch.tensor(losses, dtype=torch.float64)
    worst = ((two - one).abs() / one.abs()).max().item()
    row = {
        "op": "step_ranks",
        "variant": "2 gloo ranks",
        "mode": "10 steps",
        "shape": "tiny",
        "dtype": "float32",
        **context,
    }
    return [row | {"note": f"largest relative difference of a loss to one rank's {worst:.2e}"}], {
        "max_rel_err_2ranks": worst
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="shared,trl,memory,ranks")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="of part shared: prompt_response"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trl-steps", type=int, default=5)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "step.csv")
    options = parser.parse_args()
    if options.alone:
        return run_alone(options.alone)
    parts = options.parts.split(",")
    packages = ("torch", "transformers") + (("trl",) if "trl" in parts else ())
    context = rows.context(*packages)
    found: dict[str, float] = {}
    if "memory" in parts:  # first: its processes need the memory that this one keeps after the others
        table, ratios = measure_memory(context, importlib.util.find_spec("trl") is not None)
        rows.append(options.csv, table)
        found |= ratios
    if "ranks" in parts:
        table, errors = measure_ranks(context)
        rows.append(options.csv, table)
        found |= errors
    if "trl" in parts:
        table, ratios = measure_trl(options.trl_steps, context)
        rows.append(options.csv, table)
        found |= ratios
    if "shared" in parts:
        table, ratios = measure_shared(options.shapes, options.repeats, context)
        rows.append(options.csv, table)
        found |= ratios
    print(json.dumps(found))
    return None


if __name__ == "__main__":
    main()
