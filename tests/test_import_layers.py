"""Imports point one way: each module imports only from lower levels, or from its own level where listed."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ampo_fast"

# A package is one entry (losses, report), or a room: each of its modules is one (vllm.engine).
LEVELS = [
    {"types", "config", "margins_fit", "jsonl", "files", "memory", "assets", "metrics", "progress", "trace",
     "evaluation_summary", "_C", "kernels", "dispatch", "opaque", "templating", "urls", "engine_config", "vllm.lifeline",
     "reward_model.config", "reward_model.calibration", "random_streams", "user_code"},
    {"validation", "compiled", "reference", "selection_reference"},
    {"distributed"},
    {"losses", "head", "logprobs", "fused", "selection", "distances", "data_formats"},
    {"data", "attention", "attention_flex", "attention_varlen", "lora", "liger", "model", "model_files", "model_limits",
     "led_policy", "named_weights", "export", "unshared", "packing", "embeddings", "rewards", "select", "own_selection", "pareto",
     "sampler",
     "optimizer", "weight_sync", "checkpoint", "checkpoint_writer", "stage_files", "step_metrics",
     "evaluation", "early_stop", "run_dir", "model_card", "stop_signals",
     "update", "reference_logps", "split_groups", "utilisation", "active_pairs",
     "http_client", "http_reward", "python_reward",
     "rollouts.batches", "rollouts.decoding", "rollouts.engines", "rollouts.few_rows", "rollouts.given",
     "rollouts.held_casts", "rollouts.lookahead", "rollouts.main_engine", "rollouts.protocol",
     "rollouts.replay", "rollouts.rounds", "rollouts.sampling",
     "rollouts.segments",
     "vllm.canary", "vllm.engine", "vllm.process", "vllm.replica", "vllm.requests", "vllm.server", "vllm.transfer",
     "vllm.weight_files",
     "reward_model.checkpoint", "reward_model.classifier_settings", "reward_model.data", "reward_model.evaluation",
     "reward_model.frozen_blocks", "reward_model.mean_pooling", "reward_model.model", "reward_model.text"},
    {"start_checks"},
    {"report", "preview", "stages", "inspect_rows"},
    {"trainer", "reward_model.training", "evaluate"},
    {"cli"},
]  # fmt: skip
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
ROOMS = {name.split(".")[0] for name in LEVEL if "." in name}


def entry(parts):
    """("model",) -> "model", ("losses", "stats") -> "losses", ("vllm", "engine", "VllmEngine") -> "vllm.engine"."""
    room, *rest = parts
    return f"{room}.{rest[0]}" if room in ROOMS and rest else room


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import, which this test does not follow"
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            package, *parts = name.split(".")
            # What `from ampo_fast import` finds without a level is a public name, found by __getattr__.
            if package == "ampo_fast" and parts and (len(parts) > 1 or parts[0] in LEVEL.keys() | ROOMS):
                yield entry(parts)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] != "__init__" or (len(parts) > 1 and parts[0] not in ROOMS):
            yield entry(parts), path


def test_every_module_has_a_level_and_every_level_its_modules():
    assert {name for name, _ in modules()} ^ LEVEL.keys() == {"_C", "kernels"}  # which are made from other directories


def test_imports_go_down_and_never_in_a_circle():
    graph = {}
    for name, path in modules():
        where = path.relative_to(PACKAGE)
        for target in imports_of(path):
            assert target in LEVEL, f"{where} imports {target}, which has no level"
            assert LEVEL[target] <= LEVEL[name], (
                f"{where} (level {LEVEL[name]}) imports {target} (level {LEVEL[target]})"
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


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_begins_with_its_map_and_imports_nothing_of_ours(room):
    path = PACKAGE / room / "__init__.py"
    assert not list(imports_of(path)), "importing one module of a room must not import others"
    text = ast.parse(path.read_text())
    named = [line.split()[0] for line in ast.get_docstring(text).splitlines() if line.startswith("    ")]
    assert sorted(named) == sorted(path.stem for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__")


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
                "liger_kernel",
            }:
                users.setdefault(root, set()).add(name)
    assert users["transformers"] == {
        "assets", "attention", "embeddings", "export", "model_files", "named_weights", "reward_model.model",
        "rollouts.decoding",
    }  # fmt: skip
    assert users["datasets"] == {"data"}
    assert users["vllm"] == {"vllm.engine"}
    assert users["peft"] == {"lora"}
    assert users["liger_kernel"] == {"liger"}
    assert users["wandb"] == {"metrics"}
    assert users["plotly"] <= {"report"}
