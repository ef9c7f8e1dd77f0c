"""Imports point one way: each module imports only from lower levels, or from its own level where listed."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "ampo_fast"

LEVELS = [
    {"types", "config", "reward_config", "calibration", "margins_fit", "jsonl", "assets", "metrics", "progress", "trace",
     "evaluation_summary", "_C", "kernels", "dispatch", "templating", "urls", "engine_config"},
    {"validation", "compiled", "reference", "selection_reference"},
    {"distributed"},
    {"losses", "head", "logprobs", "fused", "selection", "distances", "data_formats"},
    {"data", "attention", "attention_varlen", "lora", "model", "model_files",
     "packing", "embeddings", "rewards", "rollouts", "select", "pareto", "segments", "replay", "sampler", "optimizer",
     "weight_sync", "checkpoint", "checkpoint_writer", "stage_files", "step_metrics",
     "evaluation", "run_dir", "model_card", "stop_signals",
     "update", "reference_logps", "split_groups", "utilisation", "rounds", "reward_data", "reward_text", "frozen_blocks",
     "reward_model",      "reward_evaluation", "mean_pooling",
     "reward_checkpoint", "classifier_settings", "active_pairs",
     "http_client", "http_reward", "canary", "vllm_engine", "vllm_server", "vllm_process", "vllm_requests",
     "vllm_replica", "lifeline", "engines", "main_engine", "lookahead", "vllm_transfer"},
    {"report", "preview", "stages", "inspect_rows"},
    {"trainer", "reward_training", "evaluate"},
    {"cli"},
]  # fmt: skip
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ampo_fast":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names if a.name in LEVEL]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("ampo_fast.")]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            yield name, path


def test_every_module_has_a_level():
    assert sorted({name for name, _ in modules()} - LEVEL.keys()) == []


def test_imports_go_down_and_never_in_a_circle():
    graph = {}
    for name, path in modules():
        for target in imports_of(path):
            assert LEVEL[target] <= LEVEL[name], (
                f"{path.name} (level {LEVEL[name]}) imports {target} (level {LEVEL[target]})"
            )
            if target != name:
                graph.setdefault(name, set()).add(target)
    done, active = set(), []

    def visit(name):
        assert name not in active, f"circle: {' -> '.join([*active[active.index(name) :], name])}"
        if name not in done:
            active.append(name)
            for target in graph.get(name, ()):
                visit(target)
            done.add(active.pop())

    for name in graph:
        visit(name)


def test_heavy_imports_live_in_few_modules():
    users = {}
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            roots = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            roots += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for root in {r.split(".")[0] for r in roots} & {
                "transformers",
                "datasets",
                "wandb",
                "plotly",
                "vllm",
                "peft",
            }:
                users.setdefault(root, set()).add(name)
    assert users["transformers"] == {
        "assets", "attention", "embeddings", "model", "model_files", "reward_model", "rollouts",
    }  # fmt: skip
    assert users["datasets"] == {"data"}
    assert users["vllm"] == {"vllm_engine"}
    assert users["peft"] == {"lora"}
    assert users["wandb"] == {"metrics"}
    assert users["plotly"] <= {"report"}
